"""Which lengths a token model takes: all, from a shortest on, multiples of a number, or a single one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.adapters.detection import Detection

if TYPE_CHECKING:
    from utils.adapters.model_adapter import ModelAdapter

STEPS = (2, 3, 4, 6, 8, 12, 16, 32, 64)


@dataclass(frozen=True)
class Lengths:
    """The legal lengths below the maximum."""

    shortest: int = 1
    """The shortest legal length."""
    step: int = 1
    """Legal lengths are multiples of this."""
    fixed: bool = False
    """Only `shortest` is legal."""

    def legal(self, wanted: int) -> int:
        """Return the longest legal length that is not above `wanted`, or the shortest there is."""
        return self.shortest if self.fixed else max(self.shortest, wanted // self.step * self.step)

    def __str__(self) -> str:
        """Say it in words."""
        if self.fixed:
            return f"{self.shortest} only"
        step = f"multiples of {self.step}" if self.step > 1 else ""
        least = f"from {self.shortest} on" if self.shortest > self.step else ""
        return ", ".join(part for part in (step, least) if part) or "all"


def legal_lengths(adapter: ModelAdapter, fixed: bool) -> Detection[Lengths]:
    """Return the legal lengths of a model and how they are known.

    Args:
        adapter: The model.
        fixed: Its output has as many positions as the first pass, however long the input is.
    """
    length = adapter.probe_length
    if adapter.modality != "tokens" or adapter.failure is not None:
        return Detection(Lengths(), "not asked: no sequence of tokens, or no forward pass succeeded")
    if adapter.example_inputs(1)[adapter.main_input].dim() != 2:
        return Detection(Lengths(), "the token ids have no length")
    if fixed:
        return Detection(Lengths(length, fixed=True), f"the output has {length} positions, however long the input is")
    with adapter.isolated():
        found = find_lengths(adapter.run_length, length)
    return Detection(found, "found by trying")


def find_lengths(run: Callable[[int], None], probe: int) -> Lengths:
    """Find out by trying.

    Args:
        run: Runs one forward pass at a length and raises when that fails.
        probe: A length that runs.
    """

    def runs(length: int) -> bool:
        try:
            run(length)
        except Exception:
            return False
        return True

    if probe == 1:
        return Lengths()
    # One token runs by broadcasting even where a table is added that has a row per position of one fixed length.
    neighbours = runs(probe - 1) or runs(probe + 1)
    if neighbours and runs(1):
        return Lengths()
    if not neighbours:
        step = next((n for n in STEPS if probe % n == 0 and runs(probe + n)), None)
        if step is None:
            # The probe may itself be the shortest or the longest.
            return Lengths(probe, fixed=True)
        return Lengths(step if runs(step) else probe, step)
    short, enough = 1, probe
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if runs(middle) else (middle, enough)
    return Lengths(enough)
