"""The training data of a stream of tasks, in its order, as a pure function of (seed, position)."""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.continual.task import Task
from utils.runtime.errors import ConfigError
from utils.runtime.seeding import derive_seed
from utils.training.augmentation import Augmentation
from utils.training.batching import collate
from utils.training.stream import SampleStream


class TaskStream(SampleStream):
    """Task after task, each for its number of steps, in shuffled passes over its own samples.

    The position is one number, as in `SampleStream`: a resumed stream goes on in the middle of a task, with the samples
    that an uninterrupted one would have handed out. A pass that ends inside a step is followed by the next one.

    Where borders are blurred, samples near a border change places with those as far behind it, the nearer the likelier
    (one of two at the border itself); what is handed out in all is the same. Aljundi et al., Task-Free Continual
    Learning (arXiv:1812.03596), ask for streams whose tasks do not end at a known step.

    Attributes:
        tasks: The tasks in their order.
        ends: Sample numbers at which they end.
    """

    def __init__(
        self,
        data: dict[str, Tensor],
        tasks: Sequence[Task],
        ends: Sequence[int],
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None = None,
        together: bool = False,
        restart: bool = True,
        blur: float = 0.0,
    ) -> None:
        """Shuffle the samples of each task.

        Args:
            data: The training samples.
            tasks: The tasks.
            ends: The samples that are handed out up to the end of each task, multiples of `batch_size`; see `ends_of`.
            batch_size: Samples in a batch.
            seed: Decides the orders.
            augmentation: Changes ``pixel_values`` at random.
            together: Mix the samples of all tasks; there is one end then.
            restart: Let the learning rate's schedule begin anew with each task.
            blur: Share of each task, half at its beginning and half at its end, over which a border is blurred.
        """
        super().__init__(data, batch_size, seed, augmentation=augmentation)
        self.tasks, self.ends = tuple(tasks), tuple(ends)
        self.together, self.restarts = together, self.ends[:-1] if restart else ()
        self._starts = torch.tensor([0, *self.ends])
        self._sizes = torch.tensor([len(task.train) for task in self.tasks]).cumsum(0)
        self._rows = torch.cat([task.train for task in self.tasks]) if together else torch.empty(0)
        self._changed = [t.number for t in self.tasks if t.relabelled or t.permutation is not None]
        self._widths = [] if together else _blurred(self.ends, blur)
        self._orders: dict[tuple[int, int], Tensor] = {}

    def task_at(self, position: int) -> Task:
        """Return the task to which a position of the stream belongs; the end belongs to the last."""
        return self.tasks[min(bisect_right(self.ends, position), len(self.tasks) - 1)]

    def batch_at(self, position: int) -> dict[str, Tensor]:
        """Return the batch that starts at a position of the stream."""
        places = torch.arange(position, position + self.batch_size)
        if self.together:
            drawn, passes = self._drawn(len(self._rows), -1, places)
            return self._shown(self._rows[drawn], passes, torch.searchsorted(self._sizes, drawn, right=True))
        if not any(self._widths):
            task = self.task_at(position)
            drawn, passes = self._drawn(len(task.train), task.number, places - int(self._starts[task.number]))
            return self._shown(task.train[drawn], passes, None, task)
        places = self._swapped(places)
        owners = torch.searchsorted(self._starts[1:], places, right=True).clamp(max=len(self.tasks) - 1)
        indices, passes = torch.empty_like(places), torch.empty_like(places)
        for number in owners.unique().tolist():
            own, task = owners == number, self.tasks[number]
            drawn, passes[own] = self._drawn(len(task.train), number, places[own] - int(self._starts[number]))
            indices[own] = task.train[drawn]
        return self._shown(indices, passes, owners)

    def _shown(
        self, indices: Tensor, passes: Tensor, owners: Tensor | None, task: Task | None = None
    ) -> dict[str, Tensor]:
        """Return some samples as their tasks show them: of one task, or of several with the number of each."""
        batch = collate(self.data, indices)
        if self.augmentation is not None:
            # Before pixels are put in another order, where neighbours are neighbours still.
            batch["pixel_values"] = self.augmentation(batch["pixel_values"], passes, indices)
        if task is not None:
            return task.shown(batch)
        assert owners is not None
        for number in self._changed:
            own = owners == number
            if own.any():
                for name, rows in self.tasks[number].shown({n: value[own] for n, value in batch.items()}).items():
                    batch[name][own] = rows
        return batch

    def _swapped(self, places: Tensor) -> Tensor:
        """Return, for places of the stream, those whose samples stand there where borders are blurred."""
        for border, (end, width) in enumerate(zip(self.ends[:-1], self._widths, strict=True)):
            # How far from the border, from 0, on either side: both of a pair draw the same number.
            away = torch.where(places < end, end - 1 - places, places - end)
            near = away < width
            if near.any():
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "blurred border", border))
                draws = torch.rand(width, generator=generator)
                chance = (1 - (torch.arange(width) + 0.5) / width) / 2
                swaps = near & (draws < chance)[away.clamp(max=width - 1)]
                places = torch.where(swaps, 2 * end - 1 - places, places)
        return places

    def _drawn(self, count: int, key: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands at some places of passes over `count` things that are shuffled anew in each pass.

        Returns:
            Numbers below `count`, and the pass of each.
        """
        passes = places // count
        first, last = (int(one) for one in passes.aminmax())
        if first == last:
            return self._order(count, key, first)[places - first * count], passes
        drawn = torch.empty_like(places)
        for number in range(first, last + 1):
            own = passes == number
            drawn[own] = self._order(count, key, number)[places[own] - number * count]
        return drawn, passes

    def _order(self, count: int, key: int, number: int) -> Tensor:
        """Return the order of one pass."""
        if (key, number) not in self._orders:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "task order", key, number))
            while len(self._orders) > 3:
                # A batch needs the last two passes of at most two tasks.
                del self._orders[next(iter(self._orders))]
            self._orders[key, number] = torch.randperm(count, generator=generator)
        return self._orders[key, number]


def ends_of(tasks: Sequence[Task], steps: int, each: int, together: bool = False) -> list[int]:
    """Divide the steps of a run among tasks as their samples are divided, at least one step for each.

    Args:
        tasks: The tasks.
        steps: Steps of the run.
        each: Samples of a step.
        together: All tasks are learned at once.

    Returns:
        The samples that are handed out up to the end of each task, multiples of `each`.

    Raises:
        ConfigError: There are fewer steps than tasks.
    """
    if together:
        return [steps * each]
    if steps < len(tasks):
        raise ConfigError(
            f"The run has {steps} steps, and the stream has {len(tasks)} tasks.",
            "Expected at least one step for each task.",
            "Train for more steps (max_steps, max_epochs), or make fewer tasks (ContinualConfig.tasks).",
        )
    total, so_far, done = sum(len(task.train) for task in tasks), 0, 0
    ends: list[int] = []
    for number, task in enumerate(tasks):
        so_far += len(task.train)
        done = min(max(done + 1, round(steps * so_far / total)), steps - (len(tasks) - 1 - number))
        ends.append(each * done)
    return ends


def _blurred(ends: Sequence[int], blur: float) -> list[int]:
    """Return on how many samples before and behind each border the tasks on both sides change places."""
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    return [int(blur * min(lengths[number : number + 2]) / 2) for number in range(len(ends) - 1)]
