"""The order of the training data, as a pure function of (seed, position)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from utils.runtime.seeding import derive_seed
from utils.training.augmentation import Augmentation
from utils.training.batching import collate
from utils.training.state import ModelChange


class SampleStream:
    """An endless sequence of shuffled passes over the samples, cut into batches of equal size.

    Sample number ``i`` of the stream is entry ``i mod n`` of the permutation of pass ``i div n``, and that permutation
    is drawn from (seed, pass). The position is therefore one number, and a resumed stream continues with exactly the
    samples that an uninterrupted one would have handed out, across the ends of passes too. What augmentation draws
    depends on the seed, the pass and the sample, so that it does not matter which process makes a batch.
    """

    sequential = False
    """Whether batches exist in their order only, so that worker processes cannot make them by number."""
    restarts: tuple[int, ...] = ()
    """Samples after which the learning rate's schedule begins anew."""

    def __init__(
        self,
        data: Mapping[str, Tensor],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Shuffle some data.

        Args:
            data: Tensors whose first dimension counts the samples.
            batch_size: Samples in a batch of one process.
            seed: Decides the order.
            rank: Number of this process among those that share the stream; each takes its own part of every batch.
            world: How many share it.
            augmentation: Changes ``pixel_values`` at random.
        """
        self.data, self.batch_size, self.seed = dict(data), batch_size, seed
        self.rank, self.world, self.augmentation = rank, world, augmentation
        self.samples = len(next(iter(self.data.values())))
        self.consumed = 0
        self._permutation: tuple[int, Tensor] | None = None

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the next `count` batches; `advance` says when one has been trained on."""
        start = self.consumed + self.rank * self.batch_size
        for number in range(count):
            yield self.batch_at(start + number * self.batch_size * self.world)

    def batch_at(self, position: int) -> dict[str, Tensor]:
        """Return the batch that starts at a position of the stream."""
        indices = self._indices(position, position + self.batch_size)
        batch = collate(self.data, indices)
        if self.augmentation is not None:
            passes = torch.arange(position, position + self.batch_size) // self.samples
            batch["pixel_values"] = self.augmentation(batch["pixel_values"], passes, indices)
        return batch

    def advance(self) -> None:
        """Count one batch as trained on, by every process."""
        self.consumed += self.batch_size * self.world

    @property
    def passes(self) -> float:
        """How many times the data has been seen."""
        return self.consumed / self.samples

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"consumed": self.consumed, "samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position."""
        self.consumed = state["consumed"]

    def migrate(self, change: ModelChange) -> None:
        """A change of the model does not move the data."""

    def _indices(self, start: int, end: int) -> Tensor:
        pieces = []
        while start < end:
            number, offset = divmod(start, self.samples)
            piece = self._pass(number)[offset : offset + end - start]
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _pass(self, number: int) -> Tensor:
        if self._permutation is None or self._permutation[0] != number:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", number))
            self._permutation = (number, torch.randperm(self.samples, generator=generator))
        return self._permutation[1]
