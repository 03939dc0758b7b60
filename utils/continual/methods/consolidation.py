"""Seedbed's own method: new samples do not push old classes down, old ones keep their labels and their answers.

Four parts, each of which alone is known:

- The loss of new samples lowers the scores of classes that were seen before and are not in the batch by `MARGIN` nats,
  so that they are hardly pushed down; Caccia et al., New Insights on Reducing Abrupt Representation Change in Online
  Continual Learning (arXiv:2104.05025), section 4, leave them out altogether. Where every batch has every class, as in
  a domain-incremental stream, nothing is lowered.
- Each batch is joined by twice as many remembered samples, from a memory that is balanced between classes (Chrysakis
  & Moens, ICML 2020). One forward pass serves both of Buzzega et al.'s terms (arXiv:2004.07211, equation 6): the loss
  of their labels, and the squared distance of their logits to those that are stored.
- At the end of a task the samples that came in with it get the answers that the model gives now, and older ones an
  answer for the classes that are new to them (as Boschini et al., arXiv:2201.00766, section 4.1, amend theirs).
- Where answers are not stored, as those to every token of a text, what they depend on is held by the diagonal Fisher
  information (Kirkpatrick et al., arXiv:1612.00796, equation 3), computed on the memory, so that it speaks of all
  tasks alike and is one for all. Beside stored answers it costs a quarter of the time and gains nothing that can be
  told from chance on the images of `benchmarks/continual_methods.py`; `ContinualConfig.penalty` asks for it.

A stream without boundaries does without the last two.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.adapters.objectives import REAL_VALUED
from utils.continual.anchors import Anchors
from utils.continual.fisher import diagonal_fisher
from utils.continual.learner import LOGITS, TASK, Learner, unmasked
from utils.continual.method import Method
from utils.continual.methods.der import distance, positions
from utils.runtime.isolation import preserved
from utils.training.batch_inputs import model_inputs
from utils.training.evaluation import masked
from utils.training.state import ModelChange, Undo

MARGIN = 4.0
"""Nats by which old classes are lowered in the loss of new samples: their share of its gradient falls by e^-4."""
OUT = -1e4
"""Added to a score that is to play no part; float16 holds it."""
REPLAYED = 2
"""Remembered samples for each new one."""
CHUNK = 256
"""Remembered samples in a forward pass without gradients."""
MOST_LOGITS = 4096
"""Numbers that the stored answer to one sample may have; more, as of language models, are not stored."""


class Consolidation(Method):
    """Replay with labels and answers, new classes beside old ones instead of over them, and weights on springs.

    Attributes:
        seen: True for each class that has come up, ``(outputs,)``; empty before the first batch.
        anchors: Where weights are held, and how strongly.
    """

    name = "consolidation"
    answers_kept = True
    holds = True
    remembers = True
    lowers = True
    policy = "balanced"
    label_weight = 1.0
    logit_weight = 1.0
    penalty = 30.0

    def __init__(self) -> None:
        """Remember nothing yet."""
        self.seen = torch.zeros(0, dtype=torch.bool)
        self.anchors = Anchors()

    def keeps_logits(self, learner: Learner) -> bool:
        """Tell whether answers are stored: not those of every token of a text."""
        return learner.data.task != "masked_lm" and max(1, learner.outputs) * positions(learner) <= MOST_LOGITS

    def lowered(self, learner: Learner, labels: Tensor) -> Tensor | None:
        """Lower the classes that were seen and are not among the labels."""
        if not learner.classifies or learner.settings.setting == "task":
            return None
        self._widen(learner.outputs)
        present = torch.zeros_like(self.seen)
        present[labels.cpu()] = True
        old = self.seen & ~present
        self.seen = self.seen | present
        return self._unseen_out() - MARGIN * old

    def _widen(self, outputs: int) -> None:
        """Make room for more classes, none of which came up yet."""
        if self.seen.numel() < outputs:
            self.seen = torch.cat([self.seen, torch.zeros(outputs - len(self.seen), dtype=torch.bool)])

    def _unseen_out(self) -> Tensor:
        """Return what is added to scores so that classes that never came up play no part, ``(outputs,)``."""
        return torch.where(self.seen, 0.0, OUT)

    def extra_loss(self, learner: Learner, batch: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return the loss of remembered samples' labels and answers; None while there are none."""
        if not len(learner.memory):
            return None
        settings = learner.settings
        old = learner.remembered(settings.replayed or REPLAYED * len(batch["labels"]))
        lowers = learner.classifies and settings.setting != "task"
        if lowers:
            # A head that grew may give more scores than was said of the model.
            self._widen(logits.shape[-1])
        loss, present, targets = learner.loss(old, lowered=self._unseen_out() if lowers else None)
        total = (self.label_weight if settings.label_weight is None else settings.label_weight) * loss
        if LOGITS in old:
            weight = self.logit_weight if settings.logit_weight is None else settings.logit_weight
            stored = old[LOGITS]
            if lowers:
                # What the model said of a class before it came up means nothing.
                unseen = ~self.seen[: stored.shape[-1]].to(stored.device)
                stored = stored.masked_fill(unseen, torch.finfo(stored.dtype).min)
            total = total + weight * distance(unmasked(present), stored, targets)
        return total

    def change_gradient(self, learner: Learner) -> None:
        """Add the pull of the anchors."""
        self.anchors.pull(learner, self._strength(learner))

    def _strength(self, learner: Learner) -> float:
        """Return the weight of the anchors; without a setting none where stored answers do what they would."""
        if learner.settings.penalty is not None:
            return learner.settings.penalty
        return 0.0 if self.keeps_logits(learner) else self.penalty

    def end_task(self, learner: Learner) -> None:
        """Bring the stored answers up to date, and see what the weights mean for all remembered samples."""
        if not len(learner.memory):
            return
        if self.keeps_logits(learner):
            self._amend(learner)
        if self._strength(learner) > 0:
            self._anchor(learner)

    def _amend(self, learner: Learner) -> None:
        """Store the model's answers: all of this task's samples, of older ones those to classes that were new."""
        memory, slots = learner.memory, learner.memory.slots
        rows = memory.read(slots)
        stored, new = rows[LOGITS], rows[TASK] == learner.task.number
        answers = []
        with torch.no_grad(), preserved(learner.module), learner.precision():
            learner.module.eval()
            for part in torch.arange(len(slots)).split(CHUNK):
                batch = learner.batch_of({name: value[part] for name, value in rows.items()})
                answers.append(unmasked(learner.loss(batch)[1]).to(stored))
        now, lowest = torch.cat(answers), torch.finfo(stored.dtype).min
        known = torch.zeros(stored.shape[-1], dtype=torch.bool)
        known[list(learner.classes) or slice(None)] = True
        if learner.settings.setting != "class":
            known[:] = True
        now = now.masked_fill(~known, lowest)
        # Of each task only the outputs that may answer it.
        if (allowed := learner.rows_allowed(rows[TASK])) is not None:
            now = now.masked_fill(~allowed.view(len(now), *[1] * (now.dim() - 2), -1), lowest)
        fresh = new.view(-1, *[1] * (stored.dim() - 1))
        memory.update(slots, {LOGITS: torch.where(fresh | (stored == lowest), now, stored)})

    def _anchor(self, learner: Learner) -> None:
        """Hold the weights where they are, as strongly as answers to remembered samples depend on them."""
        slots = learner.memory.slots
        rows = learner.memory.read(slots)
        order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(learner.number("fisher")))
        chosen = order[: learner.settings.fisher_samples]

        def batch_of(start: int, end: int) -> dict[str, Tensor]:
            batch = learner.batch_of({name: value[chosen[start:end]] for name, value in rows.items()})
            samples = {name: value for name, value in batch.items() if name not in (TASK, LOGITS, "slots")}
            return {**masked(learner.data, samples, learner.number("fisher masking")), TASK: batch[TASK]}

        def answer(batch: dict[str, Tensor]) -> Tensor:
            learner.masked.answers, learner.masked.lowered = learner.rows_allowed(batch[TASK].cpu()), None
            samples = {name: value for name, value in batch.items() if name != TASK}
            return learner.masked.logits(model_inputs(learner.adapter, samples, learner.data))

        fisher = diagonal_fisher(
            learner.module, answer, batch_of, len(chosen), learner.data.task in REAL_VALUED,
            learner.number("fisher"),
        )  # fmt: skip
        self.anchors.place(fisher.values, {name: p.detach().clone() for name, p in learner.parameters.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the classes seen and the anchors."""
        return {"seen": self.seen, "anchors": self.anchors.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.seen = state["seen"]
        self.anchors.load_state_dict(state["anchors"])

    def migrate(self, change: ModelChange) -> Undo:
        """Let the anchors follow; the memory's answers stay narrower until the next task ends."""
        return self.anchors.migrate(change)

    @property
    def stored_floats(self) -> int:
        """How many numbers it keeps: two for each trained weight."""
        return self.anchors.stored_floats
