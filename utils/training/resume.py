"""The two verbs of training: start a run, and continue one from its directory alone."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel, load_model
from utils.runtime.errors import CheckpointError, RunError
from utils.runtime.optional import require
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.figures import save_training_figure
from utils.training.metrics import read_metrics
from utils.training.prepared_data import PreparedData, load_prepared
from utils.training.run import FIGURE, METRICS, RECORD, Run, create_run, read_record, source_hashes, spec_of

if TYPE_CHECKING:
    from utils.training.training_core import View


def train(
    model: "LoadedModel | ModelAdapter | nn.Module | str",
    data: Any = "builtin:python-docs",
    config: TrainingConfig | None = None,
    run_dir: str | Path = "runs/latest",
    *,
    spec: ModelSpec | None = None,
    progress: bool = True,
    view: "View | None" = None,
) -> Run:
    """Train a model and keep everything needed to continue in a run directory.

    Args:
        model: A loaded model (the run can then be continued from its directory alone), a reference for
            `utils.load_model`, an adapter or a module.
        data: A data reference such as ``builtin:python-docs``, ``builtin:digits`` or ``file:PATH``, or prepared data.
        config: How to train.
        run_dir: A new or empty directory.
        spec: Facts about the model that override detection.
        progress: Show progress bars.
        view: Shows the metrics while they come.

    Returns:
        The run, finished or stopped by its time budget or a signal. Its model is `model`, trained in place.

    Raises:
        SeedbedError: The model, the data, the settings or the directory cannot be used; the message says why.
    """
    _require_packages()
    from utils.training.training_core import fit

    config = config or TrainingConfig()
    loaded = load_model(model) if isinstance(model, str) else model if isinstance(model, LoadedModel) else None
    adapter = ModelAdapter(loaded or model, spec=spec)
    _check_trainable(adapter)
    prepared = data if isinstance(data, PreparedData) else prepare_data(adapter, data, config)
    run = create_run(Path(run_dir), adapter, loaded, prepared, config)
    return _conclude(fit(run, progress=progress, view=view))


def resume(
    run_dir: str | Path,
    *,
    model: nn.Module | None = None,
    trust: bool = False,
    time_budget_minutes: float | None = None,
    progress: bool = True,
    view: "View | None" = None,
) -> Run:
    """Continue a run exactly where its newest usable checkpoint is; a finished run is returned as it is.

    On the same kind of machine the result is bitwise the one of an uninterrupted run.

    Args:
        run_dir: The run's directory, wherever it is now.
        model: The model, for runs that were started with a bare module and so have no source.
        trust: Run the model's source even though the audit finds something in it (see `utils.load_model`).
        time_budget_minutes: Budget of this session; None keeps the run's own.
        progress: Show progress bars.
        view: Shows the metrics while they come.

    Returns:
        The run.

    Raises:
        RunError: The directory holds no run, or the model does not belong to it.
        CheckpointError: No checkpoint verifies.
    """
    _require_packages()
    from utils.training.training_core import fit

    run, state = open_run(run_dir, model=model, trust=trust)
    if time_budget_minutes is not None:
        run.config = run.config.with_changes(time_budget_minutes=time_budget_minutes)
    if run.finished:
        return run
    return _conclude(fit(run, resumed=state, progress=progress, view=view))


def open_run(run_dir: str | Path, *, model: nn.Module | None = None, trust: bool = False) -> tuple[Run, dict[str, Any]]:
    """Read a run with the weights of its newest usable checkpoint, without training it.

    Returns:
        The run, and the states of the checkpoint's other parts.

    Raises:
        RunError: The directory holds no run, or the model does not belong to it.
        CheckpointError: No checkpoint verifies.
    """
    directory = Path(run_dir)
    record = read_record(directory)
    config = TrainingConfig.from_dict(record["config"])
    loaded: LoadedModel | None = None
    if model is None:
        if not (directory / "model").is_dir():
            raise RunError(
                f"The run in {directory} was started with a bare {record['model']['class']} and has no source of it.",
                "Expected the model itself.",
                "Pass it: utils.resume(run_dir, model=...).",
            )
        expected, found = record["model"]["files"], source_hashes(directory)
        changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if changed:
            raise RunError(
                f"{', '.join(changed)} in {directory / 'model'} is not what the run started with (SHA-256 differs).",
                "Expected the model's source as it was: its code is run and its weights are loaded into it.",
                f"Restore the folder from a copy; {RECORD} names the original reference.",
            )
        loaded = load_model(directory / "model", trust=trust)
    adapter = ModelAdapter(loaded or model, spec=spec_of(record))
    if adapter.name != record["model"]["class"]:
        raise RunError(
            f"The run in {directory} trains a {record['model']['class']}, and the model given is a {adapter.name}.",
            "Expected the model of this run.",
        )
    run = Run(directory, adapter, load_prepared(directory / "data"), config, loaded)
    checkpoint = run.checkpoints.latest()
    state = checkpoint.load_into(adapter.module)
    try:
        run.step, run.sessions = (state["progress"]["step"], state["progress"]["sessions"]) if state else (0, 0)
    except (KeyError, TypeError):
        raise CheckpointError(
            f"The state in {checkpoint.directory.name} has no progress.",
            "Expected the states of all parts of a run.",
            "Delete this checkpoint to resume from the one before it.",
        ) from None
    run.total_steps = config.total_steps(run.data.train_samples)
    if (directory / METRICS).exists():
        run.metrics = read_metrics(directory / METRICS)
    run.status = "finished" if run.step >= run.total_steps else "stopped"
    adapter.module.eval()
    return run, state


def _check_trainable(adapter: ModelAdapter) -> None:
    """Refuse models that no optimizer could change."""
    if adapter.failure is not None:
        raise RunError(adapter.failure)
    if not any(parameter.requires_grad for parameter in adapter.module.parameters()):
        raise RunError(
            f"{adapter.name} has no parameter that can be trained.",
            "Expected at least one with requires_grad=True.",
            "Unfreeze what should learn.",
        )


def _conclude(run: Run) -> Run:
    """Write the figure and the summary of a run that finished or stopped."""
    try:
        save_training_figure(run.metrics, run.directory / FIGURE, run.data.facts.get("zlib_bits_per_byte"))
        run.save_summary()
    except OSError as error:
        warnings.warn(
            f"The figure and the summary of {run.directory} cannot be written: {error.strerror or error}.", stacklevel=3
        )
    return run


def _require_packages() -> None:
    """Say at the call what is missing."""
    require("pytorch_lightning", "train", "pytorch-lightning")
    require("torchmetrics", "measure while training")
    require("safetensors", "save checkpoints")
