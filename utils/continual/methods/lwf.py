"""Learning without forgetting: the model goes on answering new samples as it did before the task, beside the labels.

Li & Hoiem, Learning without Forgetting (arXiv:1606.09282), equations 2 and 3: the loss gets ``-sum_c y'_c log z'_c``
with the answers y' of the model before the task and z' of the present one, both softened by a temperature,
``y'_c = y_c^(1/T) / sum_d y_d^(1/T)``; here T = 2 by default, and a weight of 1. Of several old tasks with outputs of
their own each has its own sum, and these are added up. The old answers are computed batch by batch, so that samples
may be changed at random. The paper first trains new outputs alone for a while; here all are trained from the start.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.continual.anchors import wide
from utils.continual.learner import Learner, unmasked
from utils.continual.method import Method
from utils.runtime.errors import ConfigError
from utils.training.batch_inputs import model_inputs
from utils.training.state import MigrationError, ModelChange, Undo

SAME = 1e-3
"""Largest change of an old answer, as a share of the answers' size, with which the old model counts as followed."""
KEPT_ROWS = 2


class _Asked(nn.Module):
    """A model as a batch is put to it, so that its weights can be given from outside."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.inner, self.learner = learner.module, learner

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        adapter = self.learner.adapter
        return adapter.logits(model_inputs(adapter, batch, self.learner.data))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block in eval mode; each part has its own mode back afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


class LwF(Method):
    """Distil what the model answered before the task, on the task's own samples.

    Attributes:
        teacher: Weights and running statistics at the end of the last task, by name; empty in the first task.
    """

    name = "lwf"
    answers_kept = True
    needs_boundaries = True
    logit_weight = 1.0

    def __init__(self) -> None:
        """Know no earlier model."""
        self.teacher: dict[str, Tensor] = {}
        self._asked: _Asked | None = None
        self._seen: tuple[dict[str, Tensor], Tensor] | None = None

    def check(self, learner: Learner) -> None:
        """Make sure that the model scores classes, and that what it is shown can be shown twice.

        Raises:
            ConfigError: Its answers are numbers, or its text is hidden at random.
        """
        task = learner.data.task
        if task in REAL_VALUED:
            raise ConfigError(
                f"ContinualConfig.method is {learner.settings.method!r} and the task is {task}.",
                "Expected a model that scores classes or tokens: lwf keeps the probabilities of old answers.",
                "Use ewc, si or replay.",
            )
        if task == "masked_lm":
            raise ConfigError(
                f"ContinualConfig.method is {learner.settings.method!r} and the task is {task}.",
                "Expected samples that the old model can be shown too: here each pass hides other tokens.",
                "Use ewc, si or replay.",
            )

    def end_task(self, learner: Learner) -> None:
        """Keep the model as it is."""
        module = learner.module
        kept = set(module.state_dict(keep_vars=True))
        state = {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in kept}}
        self.teacher, self._seen = {name: tensor.detach().clone() for name, tensor in state.items()}, None

    def extra_loss(self, learner: Learner, batch: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return how far the answers are from the old ones, in nats; None in the first task."""
        if not self.teacher:
            return None
        settings = learner.settings
        old = self.old_answers(learner, batch)
        self._seen = {name: value[:KEPT_ROWS] for name, value in batch.items()}, old[:KEPT_ROWS].clone()
        counted = (labels != IGNORED).reshape(-1)
        new, old = _rows(unmasked(logits))[counted], _rows(old)[counted]
        total: Tensor | None = None
        for outputs in self.groups(learner):
            part = slice(None) if outputs is None or logits.shape[-1] == 1 else list(outputs)
            softened = (old[:, part] / settings.temperature).softmax(-1)
            kept = functional.cross_entropy(new[:, part] / settings.temperature, softened)
            total = kept if total is None else total + kept
        weight = self.logit_weight if settings.logit_weight is None else settings.logit_weight
        return None if total is None else weight * total

    def groups(self, learner: Learner) -> list[Sequence[int] | None]:
        """Return the outputs of earlier tasks whose answers are kept: together, or each task's own; None is all."""
        earlier = learner.tasks[: learner.task.number]
        if learner.settings.setting == "task":
            return [task.answers or None for task in earlier]
        return [sorted({one for task in earlier for one in task.classes}) or None]

    @torch.no_grad()
    def old_answers(self, learner: Learner, batch: dict[str, Tensor]) -> Tensor:
        """Return what the model answered before the task, all outputs; the model is left as it was."""
        if self._asked is None or self._asked.learner is not learner:
            self._asked = _Asked(learner)
            device = learner.adapter.device
            self.teacher = {name: tensor.to(device) for name, tensor in self.teacher.items()}
        given = {f"inner.{name}": tensor for name, tensor in self.teacher.items()}
        with _evaluating(learner.module):
            return functional_call(self._asked, given, (batch,)).detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the old weights."""
        return {"teacher": dict(self.teacher)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.teacher = {name: tensor.clone() for name, tensor in state["teacher"].items()}
        self._asked = self._seen = None

    def migrate(self, change: ModelChange) -> Undo | None:
        """Let the old model grow as the present one does; what is new in it is as in the present one.

        Raises:
            MigrationError: It would not answer as before, or there is no sample to see that on.
        """
        if not self.teacher:
            return None
        if self._seen is None or self._asked is None:
            raise MigrationError(
                "LwF has not asked its old model since it was kept.",
                "Expected a batch on which to see that the old model answers as before.",
                "Let the model grow a step later.",
            )
        before = self.teacher
        after: dict[str, Tensor] = {}
        for name, tensor in {**change.parameters, **change.buffers}.items():
            how = change.of(name)
            if name in change.buffers and how.source not in before:
                continue
            known = None if how.source is None else before.get(how.source)
            fits = known is not None and known.dim() == tensor.dim() and known.is_floating_point()
            moved = how.other_values(known, tensor.to(known)) if known is not None and fits else None
            after[name] = moved if moved is not None and moved.shape == tensor.shape else tensor.detach().clone()
        self.teacher = after
        batch, old = self._seen
        try:
            new = self.old_answers(self._asked.learner, batch)[..., : old.shape[-1]]
            moved_by = float((new.float() - old.float()).abs().max())
        except BaseException:
            self.teacher = before
            raise
        if not moved_by <= SAME * float(old.float().abs().max()):
            self.teacher = before
            raise MigrationError(
                f"The old model that LwF asks cannot follow {change.kind}: an answer changed by {moved_by:.2g}.",
                f"Expected at most {SAME:g} of the answers' size.",
                "Grow another part, grow before the second task, or use replay.",
            )

        def undo() -> None:
            self.teacher = before

        return undo

    @property
    def stored_floats(self) -> int:
        """How many numbers it keeps: the model once more."""
        return sum(tensor.numel() for tensor in self.teacher.values())


def _rows(logits: Tensor) -> Tensor:
    """Return scores ``(rows, classes)``, at least in float32; a single score is that of yes against no."""
    rows = logits.reshape(-1, logits.shape[-1]).to(wide(logits))
    return torch.cat([torch.zeros_like(rows), rows], -1) if rows.shape[-1] == 1 else rows
