"""The training data of a run with a curriculum: the easiest samples first, at an exact position."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.continual.curriculum import CurriculumConfig, share_at
from utils.continual.developmental import by_difficulty, pool_size
from utils.runtime.errors import DataError
from utils.runtime.seeding import derive_seed
from utils.training.augmentation import Augmentation
from utils.training.batching import collate
from utils.training.stream import SampleStream


@dataclass(frozen=True)
class Began:
    """When a phase began."""

    step: int
    """Optimizer steps done."""
    start: float
    """Share of the samples with which it began."""
    length: int
    """Steps over which its share grows, and after which it ends unless it is the last."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"step": self.step, "start": self.start, "length": self.length}


class CurriculumStream(SampleStream):
    """Batches of the easiest samples, of which there are more and more.

    While the share grows, the samples of a step are drawn at random, each at most once; while it stays, they come in
    shuffled passes. A step has no fewer samples to draw from than it takes. What is drawn depends on the seed, the step
    and when the phases began; a resumed stream goes on with exactly the samples that an uninterrupted one would have
    handed out.

    Attributes:
        settings: The curriculum.
        scores: Difficulty of each sample, float32 ``(samples,)``; None before it was measured.
        began: When each phase up to the present one began.
    """

    sequential = True

    def __init__(
        self,
        data: Mapping[str, Tensor],
        settings: CurriculumConfig,
        total_steps: int,
        step_samples: int,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Begin with the first phase.

        Args:
            data: The training samples.
            settings: The curriculum.
            total_steps: Steps of the run.
            step_samples: Samples of a step.
            batch_size: Samples in a batch.
            seed: Decides what is drawn.
            augmentation: Changes ``pixel_values`` at random.

        Raises:
            ConfigError: No step is left for the last phase.
        """
        super().__init__(data, batch_size, seed, augmentation=augmentation)
        self.settings, self.total_steps, self.step_samples = settings, total_steps, step_samples
        self._lengths = settings.lengths(total_steps)
        self.began: list[Began] = [Began(0, settings.begin, self._lengths[0])]
        self.scores: Tensor | None = None
        self._ordered: Tensor | None = None
        self._shuffled: tuple[tuple[int, int], Tensor] | None = None

    @property
    def phase(self) -> int:
        """Number of the present phase."""
        return len(self.began) - 1

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.consumed // self.step_samples

    @property
    def over(self) -> bool:
        """Whether the present phase has had its steps; the last one never has."""
        last = self.began[-1]
        return self.phase < len(self.settings.phases) - 1 and self.step - last.step >= last.length

    def put_in_order(self, scores: Tensor) -> None:
        """Put the samples in another order.

        Args:
            scores: Difficulty of each sample, ``(samples,)``.
        """
        self.scores = scores.detach().float().cpu()
        self._ordered, self._shuffled = by_difficulty(self.scores, self.settings.hardest_first), None

    def share_at(self, step: int) -> float:
        """Return the share of the samples that may be drawn in a step of the present phase."""
        last, phase = self.began[-1], self.settings.phases[self.phase]
        return share_at(phase.pacing, last.start, phase.share, (step - last.step) / last.length)

    def go_on(self) -> None:
        """Begin the next phase, behind the step that was just done."""
        share, number = self.share_at(self.step), self.phase + 1
        rest = self.total_steps - self.step
        endless = number == len(self.settings.phases) - 1 and self.settings.phases[number].steps is None
        self.began.append(Began(self.step, share, rest if endless else self._lengths[number]))
        self._shuffled = None

    def batch_at(self, position: int) -> dict[str, Tensor]:
        """Return the batch that starts at a position of the present phase.

        Raises:
            DataError: The position is in an earlier phase, or the difficulty was not measured yet.
        """
        step, last = position // self.step_samples, self.began[-1]
        if self._ordered is None or step < last.step:
            raise DataError(
                f"Step {step} of the stream is before the present phase, or nothing is known about difficulty.",
                "Expected a position in the present phase: earlier ones knew samples in another order.",
                "Read the stream in its order.",
            )
        count = pool_size(self.share_at(step), self.samples, self.step_samples)
        steady = last.step if self.settings.phases[self.phase].pacing == "step" else last.step + last.length
        if step >= steady:
            places = self._passed(position - steady * self.step_samples, count)
        else:
            offset = position - step * self.step_samples
            places = self._drawn(step, count)[offset : offset + self.batch_size]
        indices = self._ordered[places]
        batch = collate(self.data, indices)
        if self.augmentation is not None:
            batch["pixel_values"] = self.augmentation(batch["pixel_values"], torch.full_like(indices, step), indices)
        return batch

    def _passed(self, start: int, count: int) -> Tensor:
        """Return places of a batch in shuffled passes over the easiest samples."""
        pieces, end = [], start + self.batch_size
        while start < end:
            number, offset = divmod(start, count)
            if self._shuffled is None or self._shuffled[0] != (number, count):
                seed = derive_seed(self.seed, "curriculum pass", self.phase, number)
                order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
                self._shuffled = ((number, count), order)
            pieces.append(self._shuffled[1][offset : offset + end - start])
            start += len(pieces[-1])
        return torch.cat(pieces)

    def _drawn(self, step: int, count: int) -> Tensor:
        """Return the places of a step, drawn at random from the easiest samples, each at most once if they suffice.

        They are those of the whole step, so that it takes the same samples in batches of any size.
        """
        wanted = self.step_samples
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "curriculum", step))
        if count <= 64 * wanted:
            return torch.randperm(count, generator=generator).repeat(-(-wanted // count))[:wanted]
        # Shuffling a large data set for each batch would take longer than the step.
        found: dict[int, None] = {}
        while len(found) < wanted:
            found |= dict.fromkeys(torch.randint(count, (wanted,), generator=generator).tolist())
        return torch.tensor(list(found)[:wanted])

    def state_dict(self) -> dict[str, Any]:
        """Return the position, when the phases began, and the difficulty of the samples."""
        return {
            **super().state_dict(),
            "began": [one.to_dict() for one in self.began],
            "difficulty": torch.zeros(0) if self.scores is None else self.scores,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        super().load_state_dict(state)
        self.began = [Began(**one) for one in state["began"]]
        self._shuffled = None
        if len(state["difficulty"]):
            self.put_in_order(state["difficulty"])
