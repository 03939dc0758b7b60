"""Tier 3: train, continue, search, compare and ship, with the curves shown when this runs in a notebook.

The verbs of `utils.training` with a live view; `fine_tune` is the historical name of `train`.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel, load_model
from utils.training.baseline import Comparison, benchmark
from utils.training.batch_size_finder import BatchSizeSuggestion, find_batch_size
from utils.training.config import TrainingConfig
from utils.training.export_utilities import export
from utils.training.learning_rate_finder import LearningRateSuggestion, find_learning_rate
from utils.training.search import hyperparameter_search
from utils.training.search_result import SearchResult, read_search
from utils.training.search_space import Choice, Integers, LogUniform, SearchSpace, Uniform
from utils.ui.views import LiveCurve, in_notebook

if TYPE_CHECKING:
    from utils.training.run import Run
    from utils.training.session_callback import Observer

__all__ = [
    "BatchSizeSuggestion", "Choice", "Comparison", "Integers", "LearningRateSuggestion", "LogUniform", "SearchResult",
    "SearchSpace", "Uniform", "benchmark", "export", "find_batch_size", "find_learning_rate", "fine_tune",
    "hyperparameter_search", "read_search", "resume", "train", "train_or_resume",
]  # fmt: skip


def train(
    model: LoadedModel | ModelAdapter | nn.Module | str,
    data: Any = "builtin:python-docs",
    config: TrainingConfig | None = None,
    run_dir: str | Path = "runs/latest",
    *,
    spec: ModelSpec | None = None,
    mirror: str | Path | None = None,
    progress: bool = True,
) -> "Run":
    """Train a model; everything needed to continue is kept in the run directory.

    Example:
        >>> run = train("example:gpt", config=TrainingConfig(max_steps=100), run_dir="runs/first")  # doctest: +SKIP

    Args:
        model: What `utils.load_model` returns or a reference for it (such a run can be continued from its directory
            alone), an adapter or a module.
        data: ``builtin:python-docs``, ``builtin:python-code``, ``builtin:digits``, ``file:PATH``, or prepared data.
        config: How to train.
        run_dir: A new or empty directory.
        spec: Facts about the model that override detection.
        mirror: Where a second copy of the run is kept, such as a folder on Drive; brought up to date at checkpoints.
        progress: Show a progress bar, and curves in a notebook.

    Returns:
        The run. Its model is `model`, trained in place.

    Raises:
        SeedbedError: The model, the data, the settings or the directory cannot be used; the message says why.
    """
    from utils.training import resume as verbs

    return verbs.train(
        model, data, config, run_dir, spec=spec, mirror=mirror, progress=progress, observers=_observers(progress)
    )


def resume(
    run_dir: str | Path,
    *,
    model: nn.Module | None = None,
    trust: bool = False,
    time_budget_minutes: float | None = None,
    devices: int | None = None,
    strategy: str | None = None,
    batch_size: int | None = None,
    mirror: str | Path | None = None,
    progress: bool = True,
) -> "Run":
    """Continue a run exactly where it stopped; see `utils.training.resume.resume`."""
    from utils.training import resume as verbs

    return verbs.resume(
        run_dir,
        model=model,
        trust=trust,
        time_budget_minutes=time_budget_minutes,
        devices=devices,
        strategy=strategy,
        batch_size=batch_size,
        mirror=mirror,
        progress=progress,
        observers=_observers(progress),
    )


def train_or_resume(
    model: LoadedModel | ModelAdapter | nn.Module | str,
    data: Any,
    config: TrainingConfig | None,
    run_dir: str | Path,
    *,
    trust: bool = False,
    mirror: str | Path | None = None,
    progress: bool = True,
) -> "Run":
    """Start a run, or continue it: a notebook's cell that can be run again and again.

    The run is continued when the directory holds it, or when its second copy does: then that is brought back first.
    A new run starts from the model as it was loaded, not from what an earlier cell trained.

    Args:
        model: As for `train`.
        data: As for `train`.
        config: As for `train`.
        run_dir: The run's directory.
        trust: As for `resume`.
        mirror: As for `train`.
        progress: As for `train`.

    Raises:
        RunError: The directory holds a run of another model, other data or other settings.
    """
    from utils.training.mirror import restore_run
    from utils.training.resume import check_same

    config = config or TrainingConfig()
    if isinstance(model, str):
        model = load_model(model, trust=trust)
    if mirror is not None:
        restore_run(Path(mirror), Path(run_dir))
    if not (Path(run_dir) / "run.json").exists():
        if isinstance(model, LoadedModel) and model.can_rebuild:
            # The cell may run a second time with other settings, and a new run must not begin with trained weights.
            model = _as_loaded(model)
        return train(model, data, config, run_dir, mirror=mirror, progress=progress)
    check_same(run_dir, model, data, config)
    module = None if (Path(run_dir) / "model").is_dir() else ModelAdapter(model).module
    return resume(run_dir, model=module, trust=trust, mirror=mirror, progress=progress)


def _as_loaded(model: LoadedModel) -> LoadedModel:
    """Return a model with the weights that its source begins with, grown through the same events."""
    from utils.growth.lineage import lineage_of, rebuild

    fresh = replace(model, module=model.factory())
    rebuild(fresh.module, lineage_of(model.module))
    return fresh


fine_tune = train


def _observers(progress: bool) -> list["Observer"]:
    """Show curves where they can be seen."""
    return [LiveCurve()] if progress and in_notebook() else []
