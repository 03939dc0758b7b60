"""The settings of continual learning: the stream of tasks, the method against forgetting, and what it may store."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from utils.runtime.errors import ConfigError
from utils.runtime.settings import Range, check_names, check_ranges
from utils.training.config import LARGEST, MOST

SPLITS = ("labels", "permutation", "parts")
"""How the data becomes tasks: by class, by a new order of each sample's entries, or by the parts that it has."""
SETTINGS = ("class", "task", "domain")
"""What a model is told when it answers (van de Ven & Tolias, arXiv:1904.07734): nothing, the task, or nothing and
every task has the same outputs."""
POLICIES = ("balanced", "reservoir", "priority")
RANGES: dict[str, Range] = {
    "tasks": (1, LARGEST, True, False),
    "samples_per_task": (1, LARGEST, True, False),
    "buffer": (1, LARGEST, True, False),
    "replayed": (1, LARGEST, True, False),
    "fisher_samples": (1, LARGEST, True, False),
    "column_width": (1, LARGEST, True, False),
    "label_weight": (0, MOST, False, False),
    "logit_weight": (0, MOST, False, False),
    "penalty": (0, MOST, False, False),
    "buffer_mb": (0, MOST, False, True),
    "temperature": (0, MOST, False, True),
    "kept_share": (0, 1, False, True),
    "blur": (0, 1, False, False),
}
"""Of each number, see `utils.runtime.settings.check_ranges`."""


@dataclass(frozen=True)
class ContinualConfig:
    """How a stream of tasks is made and learned; checked when it is made."""

    method: str = "consolidation"
    """What is done against forgetting, or several joined by +, such as ewc+replay; docs/continual.md has the table."""
    split: str = "labels"
    """How the data becomes tasks: labels, permutation, or parts (data given as several references, or ?task=COLUMN)."""
    setting: str = "class"
    """What is known when the model answers: class (nothing), task (which it is), or domain (tasks share outputs)."""
    tasks: int | None = None
    """How many tasks; None makes one of every two classes, one of every part, and five of permutations."""
    shuffle_classes: bool = False
    """Deal the classes to the tasks in a random order, drawn from the run's seed."""
    samples_per_task: int | None = None
    """Training samples of each task at most; None takes all that it has."""
    boundaries: bool = True
    """Tell the method where tasks begin and end; False is a stream that changes without notice."""
    blur: float = 0.0
    """Share of each task, half of it at either end, in which samples change places with those of its neighbours."""
    restart_schedule: bool = True
    """Let the learning rate's schedule begin anew with each task; never where nobody is told of tasks."""
    buffer: int = 500
    """Samples that the memory holds at most."""
    buffer_mb: float | None = None
    """Megabytes that the memory holds at most, logits included; None sets no limit beside `buffer`."""
    policy: str | None = None
    """What stays in a full memory: balanced (classes alike), reservoir (samples alike), priority; None chooses."""
    replayed: int | None = None
    """Remembered samples in each batch; None takes as many as new ones, and consolidation twice as many."""
    label_weight: float | None = None
    """Weight of the labels of remembered samples; None takes the method's own."""
    logit_weight: float | None = None
    """Weight of the logits of remembered samples, or of what distillation keeps; None takes the method's own."""
    penalty: float | None = None
    """Weight of what holds important weights in place (EWC, SI); None takes the method's own."""
    fisher_samples: int = 1000
    """Samples of each task from which the importance of weights is computed."""
    temperature: float = 2.0
    """Softness of the answers that LwF keeps."""
    kept_share: float | None = None
    """Share of the still free weights that PackNet keeps for each task; None divides them evenly."""
    column_width: int = 16
    """Features of what progressive columns add to each layer for a task."""

    def __post_init__(self) -> None:
        """Check every field and every pair that can contradict.

        Raises:
            ConfigError: A value is out of range, or two values contradict.
        """
        for name, allowed in (("split", SPLITS), ("setting", SETTINGS), ("policy", POLICIES)):
            value = getattr(self, name)
            if value not in allowed and not (name == "policy" and value is None):
                raise ConfigError(f"ContinualConfig.{name} is {value!r}.", f"Expected one of {', '.join(allowed)}.")
        for name in ("shuffle_classes", "boundaries", "restart_schedule"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"ContinualConfig.{name} is {getattr(self, name)!r}.", "Expected true or false.")
        check_ranges(self, RANGES)
        if not isinstance(self.method, str) or not self.method:
            raise ConfigError(f"ContinualConfig.method is {self.method!r}.", "Expected a name, or several joined by +.")
        if self.split == "permutation" and self.setting == "class":
            raise ConfigError(
                "ContinualConfig.split is 'permutation' and setting is 'class'.",
                "Expected domain or task: permuted tasks have the same classes.",
                "Set setting='domain'.",
            )
        if self.blur and self.boundaries:
            raise ConfigError(
                f"ContinualConfig.blur is {self.blur} and boundaries is True.",
                "Expected boundaries=False: where tasks flow into each other, nobody can say where one ends.",
                "Set boundaries=False, or blur=0.0.",
            )
        if not self.boundaries and self.setting == "task":
            raise ConfigError(
                "ContinualConfig.boundaries is False and setting is 'task'.",
                "Expected class or domain: where nobody says that the task changes, nobody says which one it is.",
                "Set boundaries=True, or another setting.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "ContinualConfig":
        """Make a config from a dict.

        Raises:
            ConfigError: A name is unknown (the nearest known one is suggested) or a value is invalid.
        """
        check_names(cls, settings)
        return cls(**settings)
