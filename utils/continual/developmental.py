"""Samples from the easiest to the hardest, as a dataset in the user's hands."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.continual.curriculum import Phase, share_at
from utils.continual.difficulty import Difficulty, sample_lengths, scored
from utils.runtime.errors import DataError
from utils.training.prepared_data import PreparedData


class DevelopmentalDataset(Dataset[dict[str, Tensor]]):
    """The samples that a phase may draw, the easiest first; it grows with `advance`.

    ``DataLoader(dataset, shuffle=True)`` draws from what the phase allows at that moment; make it anew, or start a new
    epoch, after an `advance`.

    Attributes:
        phase: The present phase.
        scores: Difficulty of each sample of the data, float32 ``(samples,)``.
        order: Sample numbers from the easiest to the hardest, int64 ``(samples,)``.
        step: Steps done in this phase.
    """

    def __init__(
        self,
        data: PreparedData | Mapping[str, Tensor],
        phase: Phase | Mapping[str, Any] | float = 1.0,
        difficulty: str | Tensor | Sequence[float] | Difficulty = "length",
        begin: float = 0.1,
    ) -> None:
        """Put samples in their order.

        Args:
            data: Prepared data, of which the training samples are taken, or tensors by name; their first dimension
                counts samples.
            phase: Where it begins: a phase, whose `steps` say how often `advance` is called in it, or the share of
                the easiest samples.
            difficulty: ``length``, a number for each sample (such as `utils.continual.difficulty.sample_losses`), or a
                function of a batch that returns them.
            begin: Share of the samples with which the phase begins.

        Raises:
            DataError: There is not one finite number for each sample, or texts have no lengths that differ.
            ConfigError: The phase is wrong.
        """
        self.samples = dict(data.train if isinstance(data, PreparedData) else data)
        origin = data.reference if isinstance(data, PreparedData) else "The data"
        count = len(next(iter(self.samples.values())))
        if isinstance(difficulty, str):
            if difficulty != "length":
                raise DataError(
                    f"The difficulty of a DevelopmentalDataset is {difficulty!r}.",
                    "Expected 'length', numbers, or a function.",
                    "Measure losses with utils.continual.difficulty.sample_losses, and give these.",
                )
            self.scores = sample_lengths(self.samples, origin)
        elif callable(difficulty):
            self.scores = scored(difficulty, self.samples, origin)
        else:
            self.scores = torch.as_tensor(difficulty).float()
        if self.scores.shape != (count,) or bool(self.scores.isnan().any()):
            raise DataError(
                f"The difficulty has the shape {tuple(self.scores.shape)}, for {count} samples.",
                "Expected one number for each sample.",
                "Give as many numbers as there are samples.",
            )
        self.order = by_difficulty(self.scores)
        self.phase, self.step, self._begin = _phase(phase), 0, begin if isinstance(phase, (Phase, Mapping)) else 0.0

    @property
    def share(self) -> float:
        """Share of the samples that may be drawn now."""
        whole = self.phase.steps
        done = self.step / whole if isinstance(whole, int) else 1.0
        return share_at(self.phase.pacing, self._begin, self.phase.share, done)

    def __len__(self) -> int:
        """Return how many samples may be drawn now."""
        return pool_size(self.share, len(self.order))

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """Return a sample; place 0 is the easiest.

        Raises:
            IndexError: So many may not be drawn yet.
        """
        if not -len(self) <= place < len(self):
            raise IndexError(f"Place {place} of {len(self)} samples that the phase {self.phase.name!r} may draw.")
        index = int(self.order[place % len(self)])
        return {name: value[index] for name, value in self.samples.items()}

    def difficulty(self, place: int) -> float:
        """Return how hard the sample at a place is."""
        return float(self.scores[self.order[place]])

    def advance(self, phase: Phase | Mapping[str, Any] | float | None = None) -> None:
        """Go on by one step of the phase, or to another phase, which begins with what may be drawn now.

        Args:
            phase: The next phase; None stays in this one.

        Raises:
            ConfigError: The phase is wrong.
        """
        if phase is None:
            self.step += 1
            return
        self._begin, self.phase, self.step = self.share, _phase(phase), 0

    def __repr__(self) -> str:
        """Say what may be drawn, and how hard it is."""
        low, high, most = self.difficulty(0), self.difficulty(len(self) - 1), self.difficulty(len(self.order) - 1)
        return (
            f"DevelopmentalDataset({self.phase.name!r}: {len(self):,} of {len(self.order):,} samples, difficulty "
            f"{low:.4g} to {high:.4g} of {most:.4g})"
        )


def _phase(value: Phase | Mapping[str, Any] | float) -> Phase:
    """Return a phase; a number is the share of one that has it from the beginning."""
    if isinstance(value, Phase):
        return value
    return Phase.from_dict(value) if isinstance(value, Mapping) else Phase(f"{value:.0%}", value)


def by_difficulty(scores: Tensor, hardest_first: bool = False) -> Tensor:
    """Return sample numbers from the easiest to the hardest, int64; of equal ones the first comes first."""
    return scores.argsort(stable=True, descending=hardest_first)


def pool_size(share: float, samples: int, least: int = 1) -> int:
    """Return how many of the easiest samples a share is: at least `least`, where there are so many."""
    # A share that was computed may be a rounding error above what was meant.
    return min(samples, max(least, ceil(share * samples - 1e-6)))
