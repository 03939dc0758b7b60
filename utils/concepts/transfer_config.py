"""The settings of teaching a concept to a student."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from utils.concepts.checks import SIDES, check_choice
from utils.runtime.errors import ConfigError
from utils.runtime.settings import Range, check_names, check_ranges, shown
from utils.training.config import LARGEST, MOST

RANGES: dict[str, Range] = {
    "steps": (0, LARGEST, True, False),
    "batch_size": (1, LARGEST, True, False),
    "learning_rate": (0, 10, False, True),
    "alignment": (0, MOST, False, False),
    "retention": (0, MOST, False, False),
    "temperature": (0, MOST, False, True),
    "ridge": (0, MOST, False, True),
    "budget": (0, 1, False, False),
    "channels": (-LARGEST, LARGEST, True, False),
}
"""Of each number, see `utils.runtime.settings.check_ranges`."""


@dataclass(frozen=True)
class TransferConfig:
    """How a student learns a concept package; checked when it is made."""

    steps: int = 400
    """Steps of training; 0 only reads the concept off the student as it is."""
    batch_size: int = 64
    """Exemplars in each step, and as many of the student's own samples."""
    learning_rate: float = 1e-3
    """Of AdamW, without weight decay; it falls on a straight line to nothing, so that the last steps settle."""
    alignment: float = 0.1
    """Weight of how unlike the student's relations between exemplars are to the teacher's."""
    retention: float = 4.0
    """Weight of how far the student's outputs on its own data move from what they were."""
    temperature: float = 2.0
    """Softness of the outputs that are kept."""
    budget: float | None = 0.01
    """Most answers on held-out samples of the student's own data that may change, as a share; weights go back towards
    the old ones until it holds. For outputs that are numbers: the squared change as a share of their variance. None
    sets no limit."""
    ridge: float = 1.0
    """Penalty of the readout, see `utils.concepts.readout.fit_readout`."""
    layer: str | None = None
    """The student's layer that the concept is read from; None takes what the layer that makes its logits reads."""
    side: str = "output"
    """The layer's output or input; for the default layer the input."""
    pool: str = "auto"
    """What becomes of a sample's positions: mean, last or flat; auto is the mean."""
    channels: int | None = None
    """The axis of features, where the layer's shape leaves it open."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, allowed in (("side", SIDES), ("pool", ("auto", "mean", "last", "flat"))):
            check_choice(f"TransferConfig.{name}", getattr(self, name), allowed)
        if self.layer is not None and not isinstance(self.layer, str):
            raise ConfigError(
                f"TransferConfig.layer is {shown(self.layer)}.", "Expected the name of a layer, or None.",
                "Leave it out to read what the layer that makes the logits reads.",
            )  # fmt: skip
        check_ranges(self, RANGES)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "TransferConfig":
        """Make a config from a dict.

        Raises:
            ConfigError: A name is unknown (the nearest known one is suggested) or a value is invalid.
        """
        check_names(cls, settings)
        return cls(**settings)
