"""The two verbs of training: start a run, and continue one from its directory alone."""

import json
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel, load_model
from utils.runtime.errors import CheckpointError, MissingPackageError, RunError
from utils.runtime.files import tag_nonfinite
from utils.runtime.optional import require
from utils.training.automatic_settings import asked_for, resolved
from utils.training.background import copy_at_the_end, within
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import prepare_data, reference_of
from utils.training.extensions import adopted, check_sources, extensions_of
from utils.training.figures import save_training_figure
from utils.training.growth_rows import read_growth
from utils.training.metrics import read_metrics
from utils.training.mirror import claim
from utils.training.module_memory import ModuleMemory, freeze
from utils.training.out_of_memory import in_batches_of
from utils.training.prepared_data import PreparedData, load_prepared
from utils.training.processes import (
    adapted,
    agreed,
    devices_here,
    is_started_here,
    launch,
    rank_and_world,
    wait_for_run,
)
from utils.training.run import (
    FIGURE,
    LOCK,
    METRICS,
    PROCESSES_LOCK,
    RECORD,
    SPEC_FIELDS,
    SUMMARY,
    Run,
    check_free,
    create_run,
    read_record,
    session_lock,
    source_hashes,
    spec_of,
    warn_if_elsewhere,
)
from utils.training.run_report import run_report
from utils.training.sharding import check_sharding
from utils.training.state import Undo
from utils.training.tracking import check_trackers, tracked

if TYPE_CHECKING:
    from utils.training.session_callback import Observer


CLAIM_PATIENCE = 30.0
"""Seconds that the start of a session waits for the folder of the second copy."""


def train(
    model: "LoadedModel | ModelAdapter | nn.Module | str",
    data: Any = "builtin:python-docs",
    config: TrainingConfig | None = None,
    run_dir: str | Path = "runs/latest",
    *,
    spec: ModelSpec | None = None,
    mirror: str | Path | None = None,
    progress: bool = True,
    observers: "list[Observer] | None" = None,
) -> Run:
    """Train a model and keep everything needed to continue in a run directory.

    Processes that torchrun started may all call this: the first makes the run, and the others open it.

    Args:
        model: A loaded model (the run can then be continued from its directory alone), a reference for
            `utils.load_model`, an adapter or a module.
        data: A data reference such as ``builtin:python-docs``, ``builtin:digits`` or ``file:PATH``, a list of them or a
            dict from names to them (one domain after the other, see ``config.continual``), or prepared data.
        config: How to train.
        run_dir: A new or empty directory.
        spec: Facts about the model that override detection.
        mirror: Where a second copy of the run is kept, such as a folder on Drive.
        progress: Show progress bars.
        observers: Follow the metrics while they come.

    Returns:
        The run, finished or stopped by its time budget or a signal. Its model is `model`, trained in place.

    Raises:
        SeedbedError: The model, the data, the settings or the directory cannot be used; the message says why.
    """
    _require_packages()
    config = config or TrainingConfig()
    check_trackers(config)
    extensions_of(config)
    rank, world = rank_and_world()
    if world > 1 and world != config.devices:
        raise RunError(
            f"TrainingConfig.devices is {config.devices}, and torchrun started {world} processes.",
            "Expected one process for each device.",
            f"Set devices to {world}, or start without torchrun.",
        )
    if rank:
        wait_for_run(Path(run_dir) / RECORD)
        return resume(run_dir, trust=True, mirror=mirror, progress=progress, observers=observers)
    if isinstance(model, str):
        model = load_model(model)
    loaded = _loaded_of(model)
    adapter = ModelAdapter(model, spec=spec)
    _check_trainable(adapter)
    config = adopted(config, adapter.module)
    extensions = extensions_of(config)
    check_sources(adapter)
    prepared = prepare_data(adapter, data, config)
    for extension in extensions.values():
        prepared = extension.arrange(adapter, prepared)
    check_free(Path(run_dir))
    _check_devices(config, loaded, adapter)
    with session_lock(Path(run_dir)):
        # Before blocks are taken away: what is found has to fit the model that they come back to.
        config, found = resolved(adapter, prepared, config, progress)
        undos: list[Undo | None] = []
        try:
            total = config.total_steps(prepared.pass_samples)
            undos += [extension.begin(adapter, total) for extension in extensions.values()]
            states = {name: extension.state_dict() for name, extension in extensions.items()}
            run = create_run(Path(run_dir), adapter, loaded, prepared, config, found, states)
        except BaseException:
            for undo in reversed(undos):
                if undo is not None:
                    undo()
            raise
        run = _session(run, states, mirror, progress, observers)
        run.notes = [*(finding.text() for finding in found.values()), *run.notes]
        return run


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
    observers: "list[Observer] | None" = None,
) -> Run:
    """Continue a run exactly where its newest usable checkpoint is; a finished run is returned as it is.

    On the same kind of machine the result is bitwise the one of an uninterrupted run; on another kind, or on another
    number of devices, a warning says that it agrees within rounding, but for what is drawn for each batch, such as
    dropout. A step takes the same samples everywhere.

    Args:
        run_dir: The run's directory, wherever it is now.
        model: The model, for runs that were started with a bare module and so have no source.
        trust: Run the model's source even though the audit finds something in it (see `utils.load_model`).
        time_budget_minutes: Budget of this session; None keeps the run's own.
        devices: Number of devices; None takes as many as the run was started with, or as this machine has.
        strategy: How several devices share the work from now on (auto, ddp or fsdp); None keeps the run's own.
        batch_size: Samples per forward pass from now on, such as fewer after memory ran out; the steps stay the same.
        mirror: Where a second copy of the run is kept.
        progress: Show progress bars.
        observers: Follow the metrics while they come.

    Returns:
        The run.

    Raises:
        RunError: The directory holds no run, the model does not belong to it, or so many devices cannot share a step.
        CheckpointError: No checkpoint verifies.
    """
    _require_packages()
    record = read_record(Path(run_dir))
    rank, _ = rank_and_world()
    name = PROCESSES_LOCK if is_started_here() else LOCK
    with nullcontext() if rank else session_lock(Path(run_dir), name):
        run, state = open_run(run_dir, model=model, trust=trust)
        if time_budget_minutes is not None:
            run.config = run.config.with_changes(time_budget_minutes=time_budget_minutes)
        if run.finished:
            if mirror is not None or _summary(run).get("step") != run.step:
                _conclude(run, mirror)
            return run
        run.config = adapted(run.config, devices_here(run.config, devices), strategy)
        extensions_of(run.config)
        if batch_size is not None:
            run.config = in_batches_of(run.config, batch_size)
        _check_devices(run.config, run.loaded, run.adapter)
        if not rank and not is_started_here():
            warn_if_elsewhere(record, run.config)
        return _session(run, state, mirror, progress, observers)


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

    began: list[bool] = []

    def as_it_began() -> None:
        if not began:
            freeze(adapter.module, record["model"]["frozen"])
            began.append(True)

    states = checkpoint.states()
    for name, extension in extensions_of(config).items():
        if name in states:
            extension.restore(adapter, states[name], as_it_began)
    as_it_began()
    state = checkpoint.load_into(adapter.module)
    try:
        ModuleMemory(adapter.module).load_state_dict(state["memory"])
        progress = state["progress"] if checkpoint.step else {"step": 0, "sessions": 0}
        run.step, run.sessions = progress["step"], progress["sessions"]
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise CheckpointError(
            f"The state in {checkpoint.directory.name} is not that of a run.",
            "Expected the states of all parts of a run.",
            "Delete this checkpoint to resume from the one before it.",
        ) from None
    run.total_steps = config.total_steps(run.data.pass_samples)
    if (directory / METRICS).exists():
        try:
            run.metrics = read_metrics(directory / METRICS)
        except (ValueError, OSError) as error:
            raise RunError(
                f"{directory / METRICS} cannot be read ({error}).",
                "Expected the numbers of the run, one line each.",
                "Move the file away to continue without them.",
            ) from error
    run.status = "finished" if run.step >= run.total_steps else "stopped"
    patience = config.early_stopping_patience
    if patience is not None and progress.get("since_best", 0) >= patience:
        run.status = "finished early"
    adapter.module.eval()
    return run, state


def _comparable(config: Any) -> Any:
    """Return a config as ``run.json`` has it; what is not a number there equals itself."""
    return tag_nonfinite(json.loads(json.dumps(config, default=str)))


def check_same(
    run_dir: str | Path, model: Any, data: Any, config: TrainingConfig, *, spec: ModelSpec | None = None
) -> None:
    """Make sure that a run is of this model, this data and these settings; the time budget may differ.

    What was stated about the model when the run was started is compared with `spec`, or with what the adapter holds
    that is given as the model; where neither is given, it goes on as it was.

    Raises:
        RunError: It is not; the message names the differences.
    """
    record = read_record(Path(run_dir))
    differences = []
    loaded = _loaded_of(model)
    if loaded is not None and loaded.sha256 != record["model"]["sha256"]:
        differences.append(
            f"the model is {record['model']['reference']} ({record['model']['class']}), not {loaded.reference}"
        )
    elif loaded is not None and _comparable(loaded.config) != _comparable(record["model"]["config"]):
        differences.append("the model has another config")
    elif loaded is None and ModelAdapter(model, spec=spec).name != record["model"]["class"]:
        differences.append(f"the model is a {record['model']['class']}")
    if spec is None and isinstance(model, ModelAdapter):
        spec = model.spec
    if spec is not None:
        before, now = ({n: getattr(one, n) for n in SPEC_FIELDS} for one in (spec_of(record), spec))
        differences += [f"ModelSpec.{n} is {before[n]!r}, not {now[n]!r}" for n in before if before[n] != now[n]]
    reference = reference_of(data)
    if reference != record["data"]["reference"]:
        differences.append(f"the data is {record['data']['reference']}, not {reference}")
    elif _is_other_file(data, record):
        differences.append(f"the samples of {reference} are not the same")
    module = loaded.module if loaded is not None else ModelAdapter(model, spec=spec).module
    settings = asked_for(adopted(config, module).to_dict(), record)
    differences += [
        f"{name} is {value!r}, not {settings[name]!r}"
        for name, value in record["config"].items()
        if name != "time_budget_minutes" and settings.get(name) != value
    ]
    if differences:
        raise RunError(
            f"{run_dir} holds another run: {'; '.join(differences)}.",
            "Expected a run with this model, data and settings.",
            "Choose another run_dir, or continue that run with utils.resume.",
        )


def _session(
    run: Run, state: dict[str, Any], mirror: str | Path | None, progress: bool, observers: "list[Observer] | None"
) -> Run:
    """Train until the run ends or stops."""
    from utils.training.training_core import fit

    rank, world = rank_and_world()
    if world == 1 and run.config.devices > 1:
        return _session_of_several(run, mirror, progress)
    target = Path(mirror) if mirror is not None else None
    if target is not None:
        # Another run in that folder is an error now; a mount that fails now may work at the first checkpoint.
        with suppress(OSError):
            within(CLAIM_PATIENCE, lambda: claim(run.directory, target))
    with tracked(run, observers, first=not rank) as watching:
        fit(run, state, progress, watching, target, extensions_of(run.config))
    if not rank:
        _conclude(run, target)
    # The first process writes for all. One that left before it would have torchrun end them both.
    if world > 1:
        agreed(True)
    return run


def _session_of_several(run: Run, mirror: str | Path | None, progress: bool) -> Run:
    """Let one process for each device train the run, and take over what they reached."""
    arguments = ["--strategy", run.config.strategy, "--batch-size", str(run.config.batch_size)]
    arguments += [] if progress else ["--quiet"]
    if mirror is not None:
        arguments += ["--mirror", str(mirror)]
    if run.config.time_budget_minutes is not None:
        arguments += ["--time-budget-minutes", str(run.config.time_budget_minutes)]
    before = _summary(run)
    status = launch(run.directory, run.config.devices, [*arguments, "--trust"])
    reached, _ = open_run(run.directory, model=run.model, trust=True)
    after = _summary(run)
    if status in (0, 1) and (reached.finished or (after and after != before)):
        if not reached.finished:
            reached.status = str(after["status"])
        reached.lost_checkpoints = int(after.get("lost_checkpoints", 0))
        reached.notes = [*run.notes, *(str(note) for note in after.get("notes", []) if note not in run.notes)]
        return reached
    raise RunError(
        f"A process that trained the run in {run.directory} failed with exit status {status}.",
        f"Expected the {run.config.devices} processes to end by themselves; the run stands at step {reached.step}.",
        "Read their messages above, and continue with utils.resume.",
    )


def _loaded_of(model: Any) -> LoadedModel | None:
    """Return the loaded model behind what the user gave, if there is one whose source is known."""
    origin = model.origin if isinstance(model, ModelAdapter) else model
    return origin if isinstance(origin, LoadedModel) else None


def _is_other_file(data: Any, record: dict[str, Any]) -> bool:
    """Tell whether a user's file gives other samples now; built-in texts may, with another Python, and are kept."""
    known = isinstance(data, PreparedData) and data.reference.startswith("file:")
    return known and data.facts.get("sha256") != record["data"]["facts"].get("sha256")


def _summary(run: Run) -> dict[str, Any]:
    """Return what summary.json says; empty when there is none that can be read."""
    try:
        return dict(json.loads((run.directory / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _check_devices(config: TrainingConfig, loaded: LoadedModel | None, adapter: ModelAdapter) -> None:
    """Refuse several devices for a model that only this process has, or that cannot be shared as the settings say."""
    check_sharding(config, adapter.module)
    if config.devices > 1 and loaded is None:
        raise RunError(
            f"TrainingConfig.devices is {config.devices}, and the model is a bare {adapter.name}.",
            "Expected a model that each of the processes can load by itself from the run's directory.",
            "Load it with utils.load_model, or set devices=1.",
        )


def _check_trainable(adapter: ModelAdapter) -> None:
    """Refuse models that no optimizer could change or no data could feed."""
    if adapter.failure is not None:
        raise RunError(adapter.failure)
    if adapter.lazy:
        raise RunError(
            f"The parameter {adapter.lazy[0]} has no shape yet (a lazy module).",
            "Expected a model whose parameters all exist, for the optimizer to hold.",
            "Run one forward pass on real input first, or give the layer its input size.",
        )
    if adapter.spec.example_inputs is not None:
        raise RunError(
            "ModelSpec.example_inputs is set.",
            "Training feeds the one main input of a model, which must be found without an example in this version.",
            "Train a module whose forward takes token ids or images alone.",
        )
    if not any(parameter.requires_grad for parameter in adapter.module.parameters()):
        raise RunError(
            f"{adapter.name} has no parameter that can be trained.",
            "Expected at least one with requires_grad=True.",
            "Unfreeze what should learn.",
        )


def _conclude(run: Run, mirror: str | Path | None) -> Run:
    """Write summary, report and figure of a run that finished or stopped, and bring its second copy up to date."""

    def draw() -> None:
        parameters = read_record(run.directory)["model"].get("parameters")
        marks = [step for step, _ in read_growth(run.directory, parameters).marks]
        baseline = run.data.facts.get("zlib_bits_per_byte")
        save_training_figure(run.metrics, run.directory / FIGURE, baseline, marks=marks)

    # What was trained is safe by now: one thing that cannot be written keeps none of the others from it.
    for write in (run.save_summary, lambda: run_report(run.directory), draw):
        try:
            write()
        except (OSError, MissingPackageError) as error:
            warnings.warn(f"The end of the run in {run.directory} cannot be written everywhere: {error}", stacklevel=3)
    if mirror is not None:
        try:
            copy_at_the_end(run.directory, Path(mirror))
        except OSError as error:
            warnings.warn(f"The second copy of {run.directory} in {mirror} is not up to date: {error}", stacklevel=3)
    return run


def _require_packages() -> None:
    """Say at the call what is missing."""
    require("pytorch_lightning", "train", "pytorch-lightning")
    require("torchmetrics", "train with Lightning")
    require("safetensors", "save checkpoints")
