"""PackNet: each task keeps a share of the weights for itself, and leaves the rest to those that come.

Mallya & Lazebnik, PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning (arXiv:1711.05769),
section 3: train on a task, set the smallest weights of each layer that are still free to zero, train those that are
left a little longer, and never change them again; the next task begins with the zeros. A task answers with the weights
of its own and of earlier tasks alone. Biases and norms belong to the first task. The paper has no numbered equation.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.continual.learner import Learner
from utils.continual.method import Method
from utils.continual.methods.isolation import TaskBuffers, check_bits, rows_of
from utils.runtime.errors import ConfigError
from utils.training.schedules import parameter_groups
from utils.training.state import MigrationError, ModelChange, Undo

RETRAINED = 3
"""One in so many steps of a task, the last ones, comes after the pruning: in the paper 10 epochs after 20."""
FREE = -1
"""Owner of an entry that no task has taken."""
MOST_TASKS = 127


class PackNet(Method):
    """Give each task weights of its own.

    A task's pruning comes within its steps, at two thirds; the run has no more steps than any other. Outputs that
    answer one task only keep all their weights, as the separate heads of the paper do.

    Attributes:
        owners: By parameter, the task that each entry belongs to, or `FREE`; int8, of the parameter's shape.
        born: Of parameters that growth made, the last task that had ended and the values that they had: with these they
            change nothing for it and earlier ones.
        pruned: The last task whose weights were chosen.
        done: The last task that has ended.
    """

    name = "packnet"
    needs_boundaries = True
    needs_task = True
    alone = True

    def __init__(self) -> None:
        """Start with a model that belongs to nobody."""
        self.owners: dict[str, Tensor] = {}
        self.born: dict[str, tuple[int, Tensor]] = {}
        self.buffers = TaskBuffers()
        self.pruned = self.done = FREE
        self._held: dict[str, tuple[Tensor, Tensor]] | None = None
        self._lists: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    def check(self, learner: Learner) -> None:
        """Make sure that there is a weight for every task.

        Raises:
            ConfigError: There are more tasks than weights or numbers for them, or the weights are averaged.
        """
        check_bits(learner, self.name)
        tasks, share = len(learner.tasks), learner.settings.kept_share
        if share == 1 and tasks > 1:
            raise ConfigError(
                f"ContinualConfig.kept_share is 1 and there are {tasks} tasks.",
                "Expected less than 1: the first task would leave no weight to the second.",
                "Set kept_share to None, which divides the weights evenly.",
            )
        if tasks > MOST_TASKS:
            raise ConfigError(
                f"ContinualConfig.method is {self.name!r} and there are {tasks} tasks.",
                f"Expected at most {MOST_TASKS}.",
                "Make fewer tasks, or choose another method.",
            )
        matrices = matrices_of(learner.module)
        smallest = min((p.numel() for name, p in learner.parameters.items() if name in matrices), default=0)
        if smallest < tasks:
            raise ConfigError(
                f"The smallest trained matrix of {learner.adapter.name} has {smallest} weights, for {tasks} tasks.",
                "Expected a weight for each task in every layer.",
                "Make fewer tasks, train a larger model, or set method to replay.",
            )

    def begin_task(self, learner: Learner) -> None:
        """Leave what belongs to earlier tasks as it is from now on."""
        self.buffers.begin(learner.module)
        for name, parameter in learner.parameters.items():
            if name not in self.owners:
                self.owners[name] = torch.full(parameter.shape, FREE, dtype=torch.int8, device=parameter.device)
        self._held = self._lists = None

    def change_gradient(self, learner: Learner) -> None:
        """Leave out what may not move, so that it takes nothing of the norm at which gradients are clipped."""
        parameters, moves, _ = self._holding(learner)
        pairs = [(p.grad, move) for p, move in zip(parameters, moves, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [m for _, m in pairs])

    @torch.no_grad()
    def after_step(self, learner: Learner) -> None:
        """Put back what momentum and weight decay have moved; at two thirds of a task's steps, prune."""
        parameters, moves, values = self._holding(learner)
        if parameters:
            # An entry times one plus zero, or times zero plus its value: exact, and one kernel for all tensors.
            torch._foreach_mul_(parameters, moves)
            torch._foreach_add_(parameters, values)
        number = learner.task.number
        start = learner.ends[number - 1] if number else 0
        steps = learner.ends[number] - start
        if self.pruned < number and learner.step + 1 == start + steps - steps // RETRAINED:
            self._prune(learner)

    def end_task(self, learner: Learner) -> None:
        """Keep the task's weights and buffers for good."""
        if self.pruned < learner.task.number:
            self._prune(learner)
        self.done = learner.task.number
        self.buffers.keep(learner.module, self.done)

    @torch.no_grad()
    def _prune(self, learner: Learner) -> None:
        """Choose the weights that the present task keeps, and set the other free ones to zero."""
        number = learner.task.number
        share = learner.settings.kept_share or 1 / (len(learner.tasks) - number)
        rows, matrices = rows_of(learner, number), matrices_of(learner.module)
        for name, parameter in learner.parameters.items():
            owner = self.owners[name] = self.owners[name].to(parameter.device)
            free = owner == FREE
            if name in rows:
                # Rows of a head: those of other tasks wait for them as they are.
                own, foreign = (one.view(-1, *(1,) * (owner.dim() - 1)) for one in (rows[name].own, rows[name].foreign))
                owner[free & own] = number
                free &= ~own & ~foreign
            if name not in matrices:
                owner[free] = number
                continue
            count = int(free.sum())
            if not count:
                continue
            kept = largest(parameter.detach().abs()[free], max(1, round(share * count)))
            owner[free] = torch.where(kept, number, FREE).to(torch.int8)
            parameter[free & (owner == FREE)] = 0.0
        self.pruned = number
        self._held = self._lists = None

    @torch.no_grad()
    def _holding(self, learner: Learner) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return parameters that hold something fast, where they move (1) or not (0), and the values that stay."""
        if self._held is None:
            mine = self.pruned if self.pruned > self.done else FREE
            self._held = {}
            for name, parameter in learner.parameters.items():
                move = (self.owners[name] == mine).to(parameter.device)
                if not bool(move.all()):
                    # Not minus zero, which plus zero would become.
                    value = torch.where(move, 0.0, parameter.detach()) + 0.0
                    self._held[name] = move.to(parameter.dtype), value
        if self._lists is None:
            parameters = dict(learner.module.named_parameters())
            held = self._held
            self._lists = [parameters[n] for n in held], [m for m, _ in held.values()], [v for _, v in held.values()]
        return self._lists

    @contextmanager
    def as_of(self, learner: Learner, task: int) -> Iterator[None]:
        """Take the weights of later tasks out, while the block runs; a task that has not ended gets all there are."""
        if task > self.done:
            yield
            return
        parameters = dict(learner.module.named_parameters())
        present = {name: parameters[name].detach().clone() for name in self.owners}
        with torch.no_grad():
            for name, value in present.items():
                owner = self.owners[name].to(value.device)
                after, born = self.born.get(name, (FREE, value))
                other = born.to(value.device) if task <= after else torch.zeros_like(value)
                parameters[name].copy_(torch.where((owner >= 0) & (owner <= task), value, other))
        try:
            with self.buffers.applied(learner.module, task):
                yield
        finally:
            with torch.no_grad():
                for name, value in present.items():
                    parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return who owns what."""
        return {
            "owners": dict(self.owners), "born": {name: list(born) for name, born in self.born.items()},
            "buffers": self.buffers.state_dict(), "pruned": self.pruned, "done": self.done,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the weights have their values already."""
        self.owners = dict(state["owners"])
        self.born = {name: (after, value) for name, (after, value) in state["born"].items()}
        self.buffers.load_state_dict(state["buffers"])
        self.pruned, self.done, self._held = state["pruned"], state["done"], None
        self._lists = None

    def migrate(self, change: ModelChange) -> Undo:
        """Follow new and renamed parameters; the present task owns what is new.

        Raises:
            MigrationError: A task has ended, and a parameter that it answers with would get another shape or other
                values: sums over more terms round differently, so old answers would lose their bits.
        """
        if self.done > FREE:
            untouched = {how.source for name in (*change.parameters, *change.buffers)
                         if not (how := change.of(name)).insertions and how.factor == 1.0}  # fmt: skip
            touched = sorted(name for name in change.before if name not in untouched)
            if touched:
                raise MigrationError(
                    f"{change.kind} would change {touched[0]}, with which {self.done + 1} finished tasks answer.",
                    "Expected growth that only adds parameters, such as depth: a larger sum rounds differently, and "
                    "PackNet keeps every bit of old answers.",
                    "Grow in depth, or during the first task, or set ContinualConfig.method to consolidation.",
                )
        kept = self.owners, self.born, self.buffers, self._held, self._lists
        present = self.pruned if self.pruned > self.done else FREE
        owners, born = {}, {}
        held: dict[str, tuple[Tensor, Tensor]] | None = None if self._held is None else {}
        for name, parameter in change.parameters.items():
            how = change.of(name)
            if how.source is None and parameter.requires_grad:
                owners[name] = torch.full(parameter.shape, present, dtype=torch.int8, device=parameter.device)
                if self.done > FREE:
                    born[name] = self.done, parameter.detach().clone()
            elif how.source in self.owners:
                # Counted from one on the way, because new entries are zero.
                moved = how.carried(self.owners[how.source].short() + 2)
                owners[name] = torch.where(moved == 0, present, moved - 2).to(torch.int8)
                if how.source in self.born:
                    born[name] = self.born[how.source]
            if held is not None and self._held is not None and how.source in self._held:
                # The weights have just made a step and are not put back yet: what is held is known here only.
                move, value = self._held[how.source]
                move = 1 - how.carried(1 - move)
                value = how.carried((value - how.around) * how.factor + how.around if how.factor != 1.0 else value)
                held[name] = move, torch.where(move == 1, 0.0, value)
        self.owners, self.born, self._held, self._lists = owners, born, held, None
        self.buffers = self.buffers.renamed(change)

        def undo() -> None:
            self.owners, self.born, self.buffers, self._held, self._lists = kept

        return undo

    @property
    def stored_floats(self) -> int:
        """Owners take a quarter of a number each."""
        return sum(one.numel() for one in self.owners.values()) // 4 + self.buffers.numbers


def largest(values: Tensor, count: int) -> Tensor:
    """Return where the largest of some values are, boolean ``(values,)``; of equal ones the first.

    Args:
        values: ``(values,)``.
        count: How many, at least 1.
    """
    last = values.kthvalue(len(values) - count + 1).values
    found = values > last
    equal = (values == last).nonzero()[: count - int(found.sum())]
    found[equal] = True
    return found


def matrices_of(module: nn.Module) -> set[str]:
    """Return the names of the trained parameters that mix features, and so have weights to prune: those that decay."""
    return {name for group in parameter_groups(module, 1.0) if group["weight_decay"] for name, _ in group["params"]}
