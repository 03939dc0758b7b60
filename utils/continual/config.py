"""The settings of continual learning: the stream of tasks, the method against forgetting, and what it may store."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from utils.runtime.errors import ConfigError
from utils.runtime.settings import check_names
from utils.training.config import LARGEST, MOST

SPLITS = ("labels", "permutation", "parts")
"""How the data becomes tasks: by class, by a new order of each sample's entries, or by the parts that it has."""
SETTINGS = ("class", "task", "domain")
"""What a model is told when it answers (van de Ven & Tolias, arXiv:1904.07734): nothing, the task, or nothing and
every task has the same outputs."""
POLICIES = ("balanced", "reservoir", "priority")


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
        for name in ("tasks", "samples_per_task", "buffer", "replayed", "fisher_samples",
                     "column_width"):  # fmt: skip
            self._check(name, 1, LARGEST, whole=True)
        for name in ("label_weight", "logit_weight", "penalty"):
            self._check(name, 0, MOST)
        for name in ("buffer_mb", "temperature"):
            self._check(name, 0, MOST, above=True)
        self._check("kept_share", 0, 1, above=True)
        self._check("blur", 0, 1)
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

    def _check(self, name: str, least: float, most: float, whole: bool = False, above: bool = False) -> None:
        """Check a number; None is one of no limit or of the method's own choice."""
        value = getattr(self, name)
        optional = type(self).__dataclass_fields__[name].default is None
        if optional and value is None:
            return
        number = isinstance(value, (int,) if whole else (int, float)) and not isinstance(value, bool)
        if not number or not (least < value if above else least <= value) or not value <= most:
            kind = "a whole number" if whole else "a number"
            bound = f"above {least:g}" if above else f"from {least:g}"
            raise ConfigError(
                f"ContinualConfig.{name} is {value!r}.", f"Expected {kind} {bound}{' or None' if optional else ''}."
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
