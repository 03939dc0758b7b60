"""The settings of a training run: one frozen object for notebook, command line and checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from utils.runtime.errors import ConfigError
from utils.runtime.settings import check_names

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
STRATEGIES = ("auto", "ddp", "fsdp")
AUTO = "auto"
AUTOMATIC = ("batch_size", "learning_rate")
"""Settings that a run may find out at its start; its own record then holds the number."""
STEP_SAMPLES = 32
"""Samples of a step when neither batch_size nor step_samples says how many."""
Automatic = Any
"""The text ``auto``, which stands for a number until a run starts; from then on there are only numbers."""
TRACKERS = ("wandb", "tensorboard")
OPTIONAL = (
    "max_steps", "max_epochs", "context_length", "time_budget_minutes", "validation_share", "ema_decay",
    "early_stopping_patience", "keep_every_steps", "session_limit_minutes", "step_samples",
)  # fmt: skip
LARGEST = 2**31 - 1
"""Bound of whole numbers: any number of batches and samples that follows from them fits into 64 bits."""
MOST = 1e300
"""Bound of other numbers, infinity excluded: JSON has none, and arithmetic with one fails in the middle of a run."""
BOUNDS = {"max_epochs": (-LARGEST, LARGEST), "workers": (0, 1024), "seed": (-(2**63), 2**64 - 1)}
"""Other bounds, by setting; a seed is what random streams take."""
NESTED = {
    "growth": "{'schedule': [{'at': 0.5, 'operator': 'depth', 'amount': 1}]}",
    "continual": "{'method': 'consolidation', 'tasks': 5}",
    "curriculum": "{'phases': [{'name': 'easy', 'share': 0.3, 'steps': 0.2}, {'name': 'all'}]}",
}
"""Settings that hold settings of their own, with an example; the layer that they belong to checks what is in them."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; checked when it is made."""

    max_steps: int | None = 300
    """Optimizer steps in all; None when max_epochs says it."""
    max_epochs: float | None = None
    """Passes over the training data; None when max_steps says it."""
    batch_size: int | Automatic = 16
    """Samples per forward pass, or auto: as many as fit into memory at the start, accumulated to step_samples."""
    accumulate: int = 1
    """Forward passes per optimizer step; found together with a batch_size of auto."""
    step_samples: int | None = None
    """Samples of an optimizer step on each device when batch_size is auto; None takes 32."""
    learning_rate: float | Automatic = 2e-3
    """Peak learning rate of AdamW, or auto: found by a test of about 100 steps on a copy at the start."""
    weight_decay: float = 0.1
    """Decay of weight matrices; norms, biases and other vectors are never decayed."""
    beta2: float = 0.95
    """AdamW's memory of squared gradients; 0.999 averages longer."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine, linear, wsd (stays, then falls at the end) or constant."""
    warmup_share: float = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    final_learning_rate_share: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    decay_share: float = 0.2
    """Share of the steps over which the wsd schedule falls at the end."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes while training; measurements are without."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is then measured and exported; None keeps none."""
    early_stopping_patience: int | None = None
    """Stop after so many measurements without a better held-out loss; None never does."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile: slow to start, then faster on a GPU."""
    augment: bool = False
    """Shift and flip training images at random."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them between the steps."""
    seed: int = 0
    """Seed of data order, dropout and masking."""
    precision: str = "auto"
    """Number format: auto (mixed on a GPU, float32 on a CPU), 32-true, bf16-mixed or 16-mixed."""
    context_length: int | None = None
    """Tokens per training sample; None takes the model's own length, at most 256."""
    validation_share: float | None = None
    """Share of the data held out to measure; None takes 0.05 of a text and 0.2 of images."""
    checkpoint_every_steps: int = 100
    """Steps between checkpoints."""
    checkpoint_every_minutes: float = 5.0
    """Minutes after which a checkpoint is written even if fewer steps were done."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: int = 1
    """How many of the checkpoints with the lowest held-out loss stay too."""
    keep_every_steps: int | None = None
    """Checkpoints of every multiple of this step stay for ever; None keeps none for that reason."""
    val_every_steps: int = 50
    """Steps between measurements on the held-out data; the last step is always measured."""
    log_every_steps: int = 10
    """Steps per row of the training metrics."""
    time_budget_minutes: float | None = None
    """Stop cleanly, with a checkpoint, after so many minutes in this session."""
    session_limit_minutes: float | None = None
    """Minutes that the machine lasts, such as 720 on Colab: stop cleanly 15 minutes before; None knows no end."""
    strategy: str = "auto"
    """How several devices share the work: auto or ddp (the whole model on each), or fsdp (a part of it on each)."""
    devices: int = 1
    """Number of devices, one process each; batch_size counts the samples of one device."""
    growth: Mapping[str, Any] | None = None
    """When, where and how the model grows while it trains, see docs/growth.md; None never grows it."""
    continual: Mapping[str, Any] | None = None
    """The stream of tasks and the method against forgetting, see docs/continual.md; None trains on all data alike."""
    curriculum: Mapping[str, Any] | None = None
    """Which samples come first, how fast harder ones join them, and when: phases and gates; None mixes all alike."""
    tracking: str | None = None
    """Outside tracking beside the CSV file: wandb, tensorboard, both with a comma, or None."""

    def __post_init__(self) -> None:
        """Check every field and every pair that can contradict.

        Raises:
            ConfigError: A value is out of range, or two values contradict.
        """
        if (self.max_steps is None) == (self.max_epochs is None):
            raise ConfigError(
                f"max_steps is {self.max_steps} and max_epochs is {self.max_epochs}.",
                "Expected exactly one of them.",
                "Set the other to None.",
            )
        positive = ("max_steps", "max_epochs", "batch_size", "accumulate", "learning_rate", "clip_norm",
                    "context_length", "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints",
                    "val_every_steps", "log_every_steps", "time_budget_minutes", "devices",
                    "early_stopping_patience", "keep_every_steps", "session_limit_minutes",
                    "step_samples")  # fmt: skip
        counts = ("keep_best", "workers")
        whole = ("max_steps", "batch_size", "accumulate", "context_length", "checkpoint_every_steps",
                 "keep_checkpoints", "val_every_steps", "log_every_steps", "seed", "devices",
                 "early_stopping_patience", "keep_every_steps", "step_samples", *counts)  # fmt: skip
        shares = ("warmup_share", "final_learning_rate_share", "validation_share", "weight_decay", "decay_share",
                  "label_smoothing", "ema_decay", "beta2")  # fmt: skip
        for name in (*positive, *counts, *shares, "seed"):
            value = getattr(self, name)
            if (value is None and name in OPTIONAL) or (name in AUTOMATIC and value == AUTO):
                continue
            if isinstance(value, bool) or not isinstance(value, (int,) if name in whole else (int, float)):
                kind = "a whole number" if name in whole else "a number"
                kind += " or 'auto'" if name in AUTOMATIC else ""
                raise ConfigError(f"TrainingConfig.{name} is {value!r}.", f"Expected {kind}.")
            if name in positive and not value > 0:
                raise ConfigError(f"TrainingConfig.{name} is {value!r}.", "Expected a number above 0.")
            if name in counts and value < 0:
                raise ConfigError(f"TrainingConfig.{name} is {value!r}.", "Expected 0 or more.")
            if name in shares and not 0 <= value <= 1:
                raise ConfigError(f"TrainingConfig.{name} is {value!r}.", "Expected a number from 0 to 1.")
            if name != "learning_rate":
                self._check_size(name, name in whole)
        for name in ("gradient_checkpointing", "compile", "augment"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"TrainingConfig.{name} is {getattr(self, name)!r}.", "Expected true or false.")
        for name, allowed in (("precision", PRECISIONS), ("schedule", SCHEDULES), ("strategy", STRATEGIES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"TrainingConfig.{name} is {getattr(self, name)!r}.", f"Expected one of {', '.join(allowed)}."
                )
        if self.warmup_share + (self.decay_share if self.schedule == "wsd" else 0) > 1:
            raise ConfigError(
                f"TrainingConfig.warmup_share is {self.warmup_share} and decay_share is {self.decay_share}.",
                "Expected at most 1 together: both are shares of the same steps.",
            )
        if self.beta2 == 1:
            raise ConfigError(
                f"TrainingConfig.beta2 is {self.beta2!r}.",
                "Expected a number from 0 to below 1: with 1 no squared gradient would ever count.",
                "Usual values are 0.95 to 0.999.",
            )
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ConfigError(
                f"TrainingConfig.validation_share is {self.validation_share!r}.",
                "Expected a number between 0 and 1: without held-out data nothing could be measured.",
            )
        if self.learning_rate != AUTO and self.learning_rate > 1:
            raise ConfigError(
                f"TrainingConfig.learning_rate is {self.learning_rate!r}.",
                "Expected at most 1: AdamW moves every weight by about the learning rate in each step.",
                "Usual values are 1e-4 to 3e-3.",
            )
        if self.session_limit_minutes is not None and self.session_limit_minutes <= 15:
            raise ConfigError(
                f"TrainingConfig.session_limit_minutes is {self.session_limit_minutes!r}.",
                "Expected more than 15: training stops 15 minutes before the end.",
            )
        self._check_samples()
        self._check_tracking()
        for name in NESTED:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                if not hasattr(value, "to_dict"):
                    raise ConfigError(
                        f"TrainingConfig.{name} is {value!r}.",
                        f"Expected names and values, such as {NESTED[name]}, or None.",
                    )
                # The settings of a layer above, kept as what JSON and a checkpoint can hold.
                object.__setattr__(self, name, value.to_dict())

    def _check_size(self, name: str, whole: bool) -> None:
        """Check that a number can be computed with: a run recorded with one that cannot would fail for ever."""
        value = getattr(self, name)
        least, most = BOUNDS.get(name, (-LARGEST, LARGEST) if whole else (-MOST, MOST))
        if least <= value <= most:
            return
        long = isinstance(value, int) and value.bit_length() > 128
        raise ConfigError(
            f"TrainingConfig.{name} is {f'a number of {value.bit_length()} bits' if long else repr(value)}.",
            f"Expected at most {most:,}." if value > 0 else f"Expected at least {least:,}.",
            "Set it to None for no limit." if name in OPTIONAL and not name.startswith("max_") else "",
        )

    def _check_samples(self) -> None:
        """Check that the samples of a step are said once."""
        if self.batch_size == AUTO and self.accumulate != 1:
            raise ConfigError(
                f"TrainingConfig.batch_size is 'auto' and accumulate is {self.accumulate}.",
                "Expected accumulate=1: how many passes make a step is found together with their size.",
                "Say with step_samples how many samples a step should take.",
            )
        if self.batch_size != AUTO and self.step_samples is not None:
            raise ConfigError(
                f"TrainingConfig.step_samples is {self.step_samples} and batch_size is {self.batch_size}.",
                "Expected step_samples only with batch_size='auto': a step takes batch_size * accumulate samples.",
                "Set step_samples to None.",
            )

    def _check_tracking(self) -> None:
        """Check the names of outside trackers."""
        unknown = set(self.trackers) - set(TRACKERS)
        if unknown:
            raise ConfigError(
                f"TrainingConfig.tracking is {self.tracking!r}.",
                f"Expected None or some of {', '.join(TRACKERS)}, separated by commas.",
            )

    @property
    def unresolved(self) -> tuple[str, ...]:
        """The settings that are still to be found."""
        return tuple(name for name in AUTOMATIC if getattr(self, name) == AUTO)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of the outside trackers."""
        if self.tracking is None:
            return ()
        return tuple(name.strip() for name in str(self.tracking).split(","))

    @property
    def resolved_precision(self) -> str:
        """Lightning's name of the number format on this machine.

        ``auto`` is mixed precision on a GPU, in bfloat16 where that is native, and float32 on a CPU.

        Raises:
            ConfigError: float16 was asked for on a machine without a GPU.
        """
        import torch

        on_gpu = torch.cuda.is_available()
        if self.precision == "16-mixed" and not on_gpu:
            raise ConfigError(
                "TrainingConfig.precision is '16-mixed', and this machine has no GPU.",
                "Expected auto, 32-true or bf16-mixed on a CPU.",
                "Leave precision at 'auto'.",
            )
        if self.precision != "auto":
            return self.precision
        if not on_gpu:
            return "32-true"
        return "bf16-mixed" if torch.cuda.get_device_capability()[0] >= 8 else "16-mixed"

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "TrainingConfig":
        """Make a config from a dict.

        Raises:
            ConfigError: A name is unknown (the nearest known one is suggested) or a value is invalid.
        """
        check_names(cls, settings)
        return cls(**settings)

    def with_changes(self, **changes: Any) -> "TrainingConfig":
        """Return a copy with some settings changed, checked again."""
        return replace(self, **changes)

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all devices."""
        if self.batch_size == AUTO:
            return (self.step_samples or STEP_SAMPLES) * self.devices
        return self.batch_size * self.accumulate * self.devices

    def total_steps(self, samples: int) -> int:
        """Return the number of optimizer steps over a training set of `samples` samples."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_epochs is not None
        return max(1, round(self.max_epochs * samples / self.samples_per_step))
