"""Progressive columns through adapters: each task after the first has small weights of its own beside frozen ones.

Rusu et al., Progressive Neural Networks (arXiv:1606.04671), equation 2: a new task gets a new column of every layer,
which also takes what the columns before it computed; those are frozen. Here the first task's column is the model, and a
later one adds to each linear map W x of it a map of low rank, B A x + b (Hu et al., LoRA, arXiv:2106.09685, equation 3;
after the adapters of Houlsby et al., arXiv:1902.00751): what the frozen layers compute is the lateral input, and the
parameters grow linearly in the tasks, not quadratically. Columns of other tasks are no input: they would have to run
too.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from utils.continual.learner import Learner
from utils.continual.method import Method
from utils.continual.methods.isolation import TaskBuffers, check_bits, samples_of
from utils.runtime.errors import ConfigError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.training.state import MigrationError, ModelChange

CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}
DOWN, UP, SHIFT = "down", "up", "shift"


class Column:
    """What one task adds to the layers of a model.

    Attributes:
        weights: By layer: ``down`` A ``(rank, inputs, ...)``, ``up`` B ``(outputs, rank, ...)`` and ``shift`` b
            ``(outputs,)``.
    """

    def __init__(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over values, which are trained from now on."""
        self.weights = {
            layer: {name: nn.Parameter(value.detach().clone()) for name, value in own.items()}
            for layer, own in weights.items()
        }
        self._handles: list[RemovableHandle] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All weights, in the order of the layers."""
        return [value for own in self.weights.values() for value in own.values()]

    def attach(self, module: nn.Module) -> None:
        """Add to what the layers of a model compute, until `detach`."""
        if self._handles:
            return
        for layer, own in self.weights.items():
            place = next(module.get_submodule(layer).parameters()).device
            for value in own.values():
                value.data = value.data.to(place)
            self._handles.append(module.get_submodule(layer).register_forward_hook(adding(own)))

    def detach(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()


class Columns(Method):
    """Freeze the model after the first task, and give each later one a column of low rank.

    The columns are trained by an AdamW of their own, with the rate, the betas and the weight decay of the run.

    Attributes:
        columns: By task.
        done: The last task that has ended; -1 before.
    """

    name = "columns"
    needs_boundaries = True
    needs_task = True
    alone = True

    def __init__(self) -> None:
        """Start without columns."""
        self.columns: dict[int, Column] = {}
        self.buffers = TaskBuffers()
        self.done = -1
        self.optimizer: torch.optim.AdamW | None = None
        self._moments: Mapping[str, Any] | None = None
        self._ready = False
        self._frozen: list[nn.Parameter] = []

    def check(self, learner: Learner) -> None:
        """Make sure that there are layers to add to.

        Raises:
            ConfigError: There are none, the model is compiled, or its weights are averaged.
        """
        check_bits(learner, self.name)
        if learner.training is not None and learner.training.compile:
            raise ConfigError(
                f"ContinualConfig.method is {self.name!r} and TrainingConfig.compile is True.",
                "Expected False: a compiled model does not notice what is added to its layers.",
                "Set compile to False, or method to packnet.",
            )
        if not layers_of(learner):
            raise ConfigError(
                f"{learner.adapter.name} calls no linear layer and no convolution of torch.",
                "Expected layers to which a task can add something.",
                "Set ContinualConfig.method to packnet or replay.",
            )

    def begin_task(self, learner: Learner) -> None:
        """Make the column of a task after the first."""
        self.buffers.begin(learner.module)
        if learner.task.number:
            self.columns[learner.task.number] = made(learner)
        self.optimizer, self._moments, self._ready = None, None, False

    def _get_ready(self, learner: Learner) -> None:
        """Let the present task's column take part in training, before the first pass of a session or a task."""
        self._ready, loop = True, learner.loop
        if loop.scaler is not None:
            raise ConfigError(
                f"ContinualConfig.method is {self.name!r} and TrainingConfig.precision is 16-mixed.",
                "Expected bf16-mixed or 32-true: the scale of gradients follows the run's own optimizer alone.",
                "Set precision to one of these.",
            )
        column = self.columns.get(learner.task.number)
        if column is None:
            return
        column.attach(learner.module)
        group = loop.optimizer.param_groups[0]
        groups: list[dict[str, Any]] = [
            {"params": [own[name] for own in column.weights.values() for name in (DOWN, UP)]},
            {"params": [own[SHIFT] for own in column.weights.values()], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=loop.config.weight_decay,
            fused=group["fused"],
        )  # fmt: skip
        if self._moments is not None:
            self.optimizer.load_state_dict(dict(self._moments))
            self._moments = None
        self._frozen = list(learner.parameters.values())
        # The loop averages, measures, checks and clips the gradients of these.
        loop.trained = column.parameters

    def new_pass(self, learner: Learner) -> None:
        """Spare the frozen weights their gradients."""
        if not self._ready:
            self._get_ready(learner)
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def change_gradient(self, learner: Learner) -> None:
        """Let the model's parameters be again what they were; without a gradient the run's optimizer leaves them."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def after_step(self, learner: Learner) -> None:
        """Step the column."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learner.loop.learning_rate
        found = getattr(learner.loop.optimizer, "found_inf", None)
        if found is not None:
            # On a GPU a gradient that is not finite is noticed later; no step is made until then.
            self.optimizer.found_inf = found  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def end_task(self, learner: Learner) -> None:
        """Keep the column for good."""
        self.done = learner.task.number
        self.buffers.keep(learner.module, self.done)
        self.end(learner)

    def end(self, learner: Learner) -> None:
        """Take the column off the model, and let it train as before."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for column in self.columns.values():
            column.detach()
        if self.optimizer is not None:
            self._moments = self.optimizer.state_dict()
            learner.loop.follow_model()
        self.optimizer, self._frozen, self._ready = None, [], False

    @contextmanager
    def as_of(self, learner: Learner, task: int) -> Iterator[None]:
        """Add the column of a task, and no other, while the block runs.

        A task that has not begun is answered as the present one.
        """
        present = self.columns.get(learner.task.number)
        wanted = self.columns.get(task) if task <= self.done else present
        attached = present is not None and bool(present._handles)
        if present is not None and wanted is not present:
            present.detach()
        if wanted is not None:
            wanted.attach(learner.module)
        try:
            if task <= self.done:
                with self.buffers.applied(learner.module, task):
                    yield
            else:
                yield
        finally:
            if wanted is not None and not (wanted is present and attached):
                wanted.detach()
            if present is not None and attached:
                present.attach(learner.module)

    def state_dict(self) -> dict[str, Any]:
        """Return the columns, and what the optimizer remembers of the present one."""
        moments = self._moments if self.optimizer is None else self.optimizer.state_dict()
        return {
            "columns": {
                str(task): {layer: {name: v.detach() for name, v in own.items()} for layer, own in c.weights.items()}
                for task, c in self.columns.items()
            },
            "buffers": self.buffers.state_dict(), "done": self.done, "moments": moments,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.columns = {int(task): Column(weights) for task, weights in state["columns"].items()}
        self.buffers.load_state_dict(state["buffers"])
        self.done, self._moments, self._ready = state["done"], state["moments"], False

    def migrate(self, change: ModelChange) -> None:
        """Leave growth to the first task.

        Raises:
            MigrationError: The first task has ended.
        """
        if self.done >= 0:
            raise MigrationError(
                f"{change.kind} would grow a model that is frozen since its first task ended.",
                "Expected growth during the first task: what is added later is never trained.",
                "Raise ContinualConfig.column_width, or set method to packnet or consolidation.",
            )

    @property
    def stored_floats(self) -> int:
        """Weights of all columns, and the buffers of each task."""
        return sum(p.numel() for column in self.columns.values() for p in column.parameters) + self.buffers.numbers


def layers_of(learner: Learner) -> list[str]:
    """Return the names of the linear layers and convolutions that the model calls, found by calling it."""
    called: list[str] = []
    found = {name: child for name, child in learner.module.named_modules() if type(child) in (nn.Linear, *CONVOLUTIONS)}
    with preserved(learner.module, learner.seed, "layers"), torch.no_grad():
        learner.module.eval()
        for name, child in found.items():
            child.register_forward_hook(lambda *_, name=name: called.append(name))
        learner.adapter.logits(samples_of(learner, learner.task.number))
    return [name for name in found if name in called]


def made(learner: Learner) -> Column:
    """Return a column for the present task that changes nothing yet: B and b are zero, A is random."""
    weights = {}
    for layer in layers_of(learner):
        child: Any = learner.module.get_submodule(layer)
        weight = child.weight
        outputs, inputs = weight.shape[0], math.prod(weight.shape[1:])
        rank = min(learner.settings.column_width, outputs, inputs)
        generator = torch.Generator().manual_seed(derive_seed(learner.seed, "column", learner.task.number, layer))
        # Of all input channels, also where the layer's own come in groups.
        size = (rank, *weight.shape[1:]) if isinstance(child, nn.Linear) else \
            (rank, child.in_channels, *weight.shape[2:])  # fmt: skip
        down = torch.randn(size, generator=generator) / math.sqrt(math.prod(size[1:]))
        up = torch.zeros(outputs, rank, *(1,) * (weight.dim() - 2))
        weights[layer] = {
            DOWN: down.to(weight), UP: up.to(weight), SHIFT: torch.zeros(outputs).to(weight),
        }  # fmt: skip
    return Column(weights)


def adding(own: Mapping[str, Tensor]) -> Any:
    """Return a hook that adds a column's part to what a layer computes."""

    def hook(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        value = given[0]
        if isinstance(layer, nn.Linear):
            added = functional.linear(functional.linear(value, own[DOWN]), own[UP], own[SHIFT])
        else:
            convolve: Any = CONVOLUTIONS[type(layer)]  # type: ignore[index]
            settings: Any = layer
            seen = convolve(value, own[DOWN], None, settings.stride, settings.padding, settings.dilation)
            added = convolve(seen, own[UP], own[SHIFT])
        return output + added

    return hook
