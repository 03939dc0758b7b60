"""A curriculum as a part of a run: which samples come when, and when a phase is over.

A phase ends with an optimizer step, after the measurement of that step and before its checkpoint: a run that is killed
before, at or after a gate goes on bit for bit. What the gates have seen is in the checkpoint; when the phases began and
the difficulty of every sample are a part of the stream's position.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.objectives import REAL_VALUED
from utils.continual.curriculum import CurriculumConfig
from utils.continual.curriculum_stream import CurriculumStream
from utils.continual.developmental import pool_size
from utils.continual.difficulty import check_difficulty, difficulty_of
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.seeding import derive_seed
from utils.training.config import TrainingConfig
from utils.training.evaluation import CLASSIFIERS
from utils.training.extensions import Extension
from utils.training.prepared_data import PreparedData
from utils.training.run import Run
from utils.training.state import ModelChange
from utils.training.text_stream import augmentation_of


class CurriculumExtension(Extension):
    """Lets a run begin with easy samples.

    Attributes:
        settings: The curriculum.
        held: Measurements in a row at which the present gate's metric held.
        told: A sentence for each phase that is over.
    """

    def __init__(self, settings: CurriculumConfig, config: TrainingConfig) -> None:
        """See `make_extension`."""
        self.settings, self.config = settings, config
        self.held = 0
        self.told: list[str] = []

    def arrange(self, adapter: ModelAdapter, data: PreparedData) -> PreparedData:
        """Make sure that the samples have a difficulty, and the gates a metric.

        Raises:
            SeedbedError: They have not.

        Warns:
            UserWarning: Workers were asked for, which could prepare nothing.
        """
        if data.stream is not None:
            raise DataError(
                f"{data.reference} is read while training.",
                "Expected samples that can be put in an order before the first step.",
                "Leave out ?stream=true, or TrainingConfig.curriculum.",
            )
        check_difficulty(self.settings.difficulty, data)
        if self.config.workers:
            warnings.warn(
                f"TrainingConfig.workers is {self.config.workers}, and the samples of a curriculum are not known "
                "before a phase begins: no worker is started.",
                stacklevel=4,
            )
        measured = measured_of(data)
        for phase in self.settings.phases:
            if phase.metric not in (None, *measured):
                raise ConfigError(
                    f"The gate of the phase {phase.name!r} waits for {phase.metric}, and of {data.task} this is not "
                    "measured.",
                    f"Expected one of {', '.join(measured)}.",
                    "Name another metric, with a threshold in its unit.",
                )
            if phase.metric is not None and isinstance(phase.steps, int) and phase.steps < self.config.val_every_steps:
                raise ConfigError(
                    f"The phase {phase.name!r} takes {phase.steps} steps at most, and measurements come every "
                    f"{self.config.val_every_steps}.",
                    "Expected at least one measurement for its gate.",
                    "Lower TrainingConfig.val_every_steps, or let the phase be longer.",
                )
        return data

    def begin(self, adapter: ModelAdapter, total_steps: int) -> None:
        """Make sure that a new run has steps for each phase.

        Raises:
            ConfigError: It has too few.
        """
        self.settings.lengths(total_steps)

    def open_stream(self, run: Run) -> CurriculumStream:
        """Return the training data, the easiest samples first."""
        config = run.config
        return CurriculumStream(
            run.data.train, self.settings, run.total_steps, config.samples_per_step, config.batch_size, config.seed,
            augmentation_of(run.data, config),
        )  # fmt: skip

    def start(self, session: Any) -> None:
        """Find out what is hard, at the very beginning; later it is known from the checkpoint."""
        if session.stream.scores is None:
            self._rank(session)

    def after_step(self, session: Any, batch: Mapping[str, Tensor]) -> None:
        """Go on to the next phase when this one has had its steps, or its gate opens."""
        stream: CurriculumStream = session.stream
        number = stream.phase
        phase = self.settings.phases[number]
        if number == len(self.settings.phases) - 1:
            return
        why, value = "it has had its steps", None
        if phase.metric is not None and session.progress.measured_step == session.progress.step:
            value = session.history.rows[-1].get(phase.metric)
            self.held = self.held + 1 if value is not None and phase.holds(value) else 0
        opened = phase.metric is not None and self.held >= phase.patience
        if not opened and not stream.over:
            return
        if opened:
            why = f"{phase.metric} is {value:.4g}"
        elif phase.metric is not None:
            why = f"it has had its steps, and {phase.metric} has not reached {phase.threshold:g}"
        self.held = 0
        stream.go_on()
        if self.settings.difficulty == "loss":
            self._rank(session)
        following = self.settings.phases[number + 1]
        count = pool_size(stream.share_at(stream.step), stream.samples, stream.step_samples)
        self.told.append(
            f"curriculum: {phase.name!r} ended after step {stream.step:,} ({why}); {following.name!r} begins with "
            f"{count:,} of {stream.samples:,} samples"
        )

    def end(self, session: Any) -> None:
        """Tell with the run which phases it went through."""
        session.run.notes += [text for text in self.told if text not in session.run.notes]

    def _rank(self, session: Any) -> None:
        """Put the samples in the order that the present phase begins with."""
        stream, run = session.stream, session.run
        context = session.module.trainer.precision_plugin.forward_context
        seed = derive_seed(run.config.seed, "difficulty", stream.phase)
        stream.put_in_order(
            difficulty_of(self.settings.difficulty, run.adapter, run.data, run.config.batch_size, seed, context)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the gates have seen, and what is to be told."""
        return {"held": self.held, "told": list(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.held, self.told = state["held"], list(state["told"])

    def migrate(self, change: ModelChange) -> None:
        """A change of the model leaves the samples in their order; the next phase measures their difficulty anew."""


def measured_of(data: PreparedData) -> tuple[str, ...]:
    """Return the held-out metrics of some data that a gate can wait for."""
    if data.task in REAL_VALUED:
        return ("loss", "rmse", "r2")
    if data.task in CLASSIFIERS:
        return ("loss", "accuracy")
    covered = data.task == "causal_lm" and not data.facts.get("validation_unknown")
    return ("loss", "bits_per_byte") if covered else ("loss",)


def make_extension(config: TrainingConfig) -> CurriculumExtension:
    """Return a curriculum as the settings of a run ask for it.

    Raises:
        ConfigError: The settings are wrong, or contradict others.
    """
    settings = CurriculumConfig.from_dict(config.curriculum or {})
    if config.continual is not None:
        raise ConfigError(
            "TrainingConfig.curriculum and continual are both set.",
            "Expected one of them: both say which samples come when.",
            "Set one of them to None.",
        )
    if config.devices > 1:
        raise ConfigError(
            f"TrainingConfig.curriculum is set and devices is {config.devices}.",
            "Expected one device: a gate that one process sees open must be open for all.",
            "Set devices to 1.",
        )
    return CurriculumExtension(settings, config)
