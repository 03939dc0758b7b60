"""A search for better settings that can be killed at any moment and shared between processes.

What is unusual here:

- A trial is a run with a directory of its own. The one that a kill interrupts keeps its number and settings, and its
  run continues from the newest checkpoint: a search that was killed ends exactly like one that was not.
- What the sampler proposes depends on (seed, number of the trial, name of the setting) and on the trials before it,
  never on how often a process was started.
- Whether a trial is still at work is asked of the system: its process holds a lock that ends with it.
- A line of the journal that a kill tore is cut off before anything is appended to it.
"""

import fcntl
import json
import logging
import math
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel
from utils.runtime.errors import ConfigError, RunError
from utils.runtime.files import tag_nonfinite, write_json
from utils.runtime.optional import require
from utils.runtime.progress import progress_bar
from utils.runtime.seeding import derive_seed
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.fresh_model import NO_BUDGET, buildable, fresh_model, module_of
from utils.training.prepared_data import PreparedData
from utils.training.run import RECORD, SPEC_FIELDS, Run
from utils.training.search_result import JOURNAL, SEARCH, TRIALS, SearchResult, read_search, storage_of
from utils.training.search_space import SearchSpace

if TYPE_CHECKING:
    from optuna.study import Study

PRUNERS = ("median", "hyperband", "none")
STUDY = "search"
CLAIM, LOCKS = ".claim", "locks"
HOST, FAULT = "host", "fault"
DATA_FIELDS = ("context_length",)
"""Settings of a trial that the prepared samples depend on."""
HOPELESS = 3
"""So many trials that fail before any succeeds end the search."""


def hyperparameter_search(
    model: Any,
    data: Any = "builtin:python-docs",
    space: SearchSpace | Mapping[str, Any] | None = None,
    trials: int = 20,
    folder: str | Path = "runs/search",
    *,
    config: TrainingConfig | None = None,
    spec: ModelSpec | None = None,
    pruner: str = "median",
    seed: int = 0,
    storage: str | None = None,
    trust: bool = False,
    progress: bool = True,
) -> SearchResult:
    """Search for the settings with the lowest held-out loss; a call on the same folder continues the search.

    Several processes that make the same call share the trials. They may be on several machines when `storage` is the
    address of a database and `folder` is on each of them.

    Args:
        model: A loaded model, a reference for `utils.load_model`, or a function that returns a new module.
        data: A data reference or prepared data.
        space: What may change; the learning rate from 1e-4 to 1e-2 when nothing is said.
        trials: How many settings to try, in all calls and processes together.
        folder: Where the journal, the runs of the trials and the pictures are kept.
        config: All other settings; its time budget is that of this call.
        spec: Facts about the model that override detection.
        pruner: Which trials end early: ``median`` those worse than half of the others at the same step, ``hyperband``
            all but the best third at several steps, ``none`` none.
        seed: Seed of the proposals.
        storage: Address of a database such as ``postgresql://...``; a journal in the folder when None.
        trust: As for `utils.load_model`.
        progress: Show a progress bar.

    Returns:
        All trials, the best one, and what mattered.

    Raises:
        RunError: The folder holds another search, or the first trials all failed.
        SeedbedError: Model, data or settings cannot be used.
    """
    optuna: Any = require("optuna", "search for settings")
    space = _space_of(space)
    config = config or TrainingConfig()
    _check(trials, pruner, config)
    space.check(config)
    source = buildable(model, spec, trust)
    folder = Path(folder)
    search = _Search(source, data, space, trials, folder, config, spec, pruner, seed, storage)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet(optuna):
        with _locked(folder / CLAIM):
            search.claim_folder()
            study = search.open(optuna)
        with progress_bar(trials, f"Searching {search.name}", progress, initial=search.done(study)) as bar:
            search.work(optuna, study, bar)
    result = read_search(folder, storage=storage)
    result.save_pictures()
    return result


class _Search:
    """One process at work on a study."""

    def __init__(
        self, source: Any, data: Any, space: SearchSpace, trials: int, folder: Path, config: TrainingConfig,
        spec: ModelSpec | None, pruner: str, seed: int, storage: str | None,
    ) -> None:  # fmt: skip
        self.source, self.data, self.space, self.trials = source, data, space, trials
        self.folder, self.config, self.spec = folder, config, spec
        self.pruner, self.seed, self.storage = pruner, seed, storage
        probe = fresh_model(source, config.seed)
        self.adapter = ModelAdapter(probe, spec=spec)
        self.name = self.adapter.name
        self.prepared: PreparedData | None = None
        budget = config.time_budget_minutes
        self.deadline = None if budget is None else time.monotonic() + 60 * budget

    def claim_folder(self) -> None:
        """Write what is searched, or make sure that the folder holds this very search.

        Raises:
            RunError: It holds another one.
        """
        origin = self.source if isinstance(self.source, LoadedModel) else None
        record = {
            "format_version": 1,
            "model": {"class": self.name, "reference": origin.reference if origin else None,
                      "sha256": origin.sha256 if origin else None},
            "spec": {name: getattr(self.adapter.spec, name) for name in SPEC_FIELDS},
            "data": self.data.reference if isinstance(self.data, PreparedData) else str(self.data),
            "space": self.space.to_dict(),
            "config": self.config.with_changes(time_budget_minutes=None).to_dict(),
            "pruner": self.pruner,
            "seed": self.seed,
        }  # fmt: skip
        record = tag_nonfinite(json.loads(json.dumps(record)))
        path = self.folder / SEARCH
        if not path.exists():
            foreign = {p.name for p in self.folder.iterdir()} - {CLAIM, JOURNAL, f"{JOURNAL}.lock"}
            if foreign:
                raise RunError(
                    f"{self.folder} is not empty and holds no search.",
                    "Expected a new or empty folder: nothing of yours is ever overwritten.",
                    "Choose another folder.",
                )
            write_json(path, record)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{name} was {before[name]!r}, not {value!r}" for name, value in record.items()
            # A search of an earlier version does not say what was stated about the model.
            if name in before and name not in ("config", "format_version") and before[name] != value
        ]  # fmt: skip
        differences += [
            f"{name} was {before['config'].get(name)!r}, not {value!r}"
            for name, value in record["config"].items()
            if before["config"].get(name) != value
        ]
        if differences:
            raise RunError(
                f"{self.folder} holds another search: {'; '.join(differences)}.",
                "Expected one of this model, data, space and config; only the number of trials may grow.",
                "Choose another folder.",
            )

    def open(self, optuna: Any) -> "Study":
        """Open the study, with its sampler and pruner."""
        steps = self.config.max_steps or 0
        pruners = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(
                min_resource=self.config.val_every_steps, max_resource=steps or "auto", reduction_factor=3
            ),
            "none": optuna.pruners.NopPruner,
        }
        study: Study = optuna.create_study(
            storage=storage_of(optuna, self.folder, self.storage), sampler=_sampler(optuna, self.seed),
            pruner=pruners[self.pruner](), study_name=STUDY, direction="minimize", load_if_exists=True,
        )  # fmt: skip
        return study

    def done(self, study: "Study") -> int:
        """Return how many trials have ended."""
        return sum(_counts(trial) and trial.state.is_finished() for trial in study.get_trials(deepcopy=False))

    def work(self, optuna: Any, study: "Study", bar: Any) -> None:
        """Take trials until all are taken, the time is over or something interrupts."""
        shown = self.done(study)
        while self.deadline is None or time.monotonic() < self.deadline:
            with ExitStack() as held:
                with _locked(self.folder / CLAIM):
                    trial = self._next(optuna, study, held)
                if trial is None:
                    return
                params = self.space.suggest(trial)
                with _heartbeat(study, trial):
                    ended = self._run(optuna, study, trial, params)
            if not ended:
                return
            shown, before = self.done(study), shown
            bar.update(shown - before)
            self._stop_if_hopeless(study)

    def _next(self, optuna: Any, study: "Study", held: ExitStack) -> Any:
        """Return a trial that a kill interrupted, else a new one, else None; `held` keeps others from taking it."""
        self._release_others(optuna, study)
        running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        for left in running:
            mine = self.storage is None or left.user_attrs.get(HOST) == socket.gethostname()
            if mine and _hold(self.folder, left.number, held):
                # The same trial goes on, number, settings and reports included; Optuna has no verb for that.
                return optuna.trial.Trial(study, left._trial_id)
        taken = sum(_counts(trial) for trial in study.get_trials(deepcopy=False))
        if taken >= self.trials:
            return None
        trial = study.ask()
        _hold(self.folder, trial.number, held)
        trial.set_user_attr(HOST, socket.gethostname())
        self.space.suggest(trial)
        return trial

    def _release_others(self, optuna: Any, study: "Study") -> None:
        """Fail the trials of other machines that have fallen silent, and queue their settings again."""
        if self.storage is None:
            return
        running = (optuna.trial.TrialState.RUNNING,)
        before = {trial.number for trial in study.get_trials(deepcopy=False, states=running)}
        optuna.storages.fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False):
            if trial.number in before and trial.state == optuna.trial.TrialState.FAIL:
                study.enqueue_trial(trial.params)

    def _run(self, optuna: Any, study: "Study", trial: Any, params: dict[str, Any]) -> bool:
        """Train one trial and tell the study how it went; return false when it was interrupted and stays open."""
        states, observer = optuna.trial.TrialState, _Pruning(trial)
        try:
            run = self._train(trial, params, observer)
            if not (observer.pruned or run.finished):
                return False
            loss = None if observer.pruned else _final_loss(run)
        except Exception as error:
            # The reason is what makes it one of the trials asked for; without one it would be tried again for ever.
            trial.set_user_attr(FAULT, f"{type(error).__name__}: {error}"[:1000])
            study.tell(trial, state=states.FAIL)
        else:
            study.tell(trial, loss, state=states.PRUNED if loss is None else states.COMPLETE)
        return True

    def _train(self, trial: Any, params: dict[str, Any], observer: "_Pruning") -> Run:
        """Start the trial's run from a fresh model, or continue it."""
        from utils.training.resume import check_same, resume, train

        left = None if self.deadline is None else max(1e-3, (self.deadline - time.monotonic()) / 60)
        config = self.config.with_changes(**params, keep_checkpoints=1, keep_best=0, time_budget_minutes=left)
        directory = self.folder / TRIALS / f"{trial.number:04d}"
        model = fresh_model(self.source, config.seed)
        if (directory / RECORD).exists():
            check_same(directory, model, self._data(config, params), config, spec=self.spec)
            given = None if config.devices > 1 else module_of(model)
            return resume(
                directory,
                model=given,
                trust=True,
                time_budget_minutes=left or NO_BUDGET,
                progress=False,
                observers=[observer],
            )
        return train(model, self._data(config, params), config, directory, spec=self.spec, progress=False,
                     observers=[observer])  # fmt: skip

    def _data(self, config: TrainingConfig, params: dict[str, Any]) -> PreparedData:
        """Prepare the data, once for all trials unless their samples differ."""
        if isinstance(self.data, PreparedData):
            return self.data
        if set(params) & set(DATA_FIELDS):
            return prepare_data(self.adapter, self.data, config)
        if self.prepared is None:
            self.prepared = prepare_data(self.adapter, self.data, config)
        return self.prepared

    def _stop_if_hopeless(self, study: "Study") -> None:
        """Stop when nothing has ever worked.

        Raises:
            RunError: The first trials all failed; the message has the last reason.
        """
        ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
        faults = [trial.user_attrs.get(FAULT) for trial in ended]
        if len(ended) >= min(HOPELESS, self.trials) and all(faults):
            raise RunError(
                f"All {len(ended)} trials failed; the last one with {faults[-1]}",
                "Expected at least one that trains.",
                "Try the settings with utils.train first; a new search needs a new folder.",
            )


class _Pruning:
    """Reports each held-out loss of a run to its trial, and stops the run when the pruner says so.

    Attributes:
        pruned: Whether it did.
    """

    def __init__(self, trial: Any) -> None:
        self.trial, self.pruned = trial, False
        self.reported = {int(step) for step in trial._cached_frozen_trial.intermediate_values}

    def start(self, run: Run) -> None:
        """Catch up with what a killed session had measured."""
        self.run = run
        self._report(run.metrics)

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Report what is new."""
        self._report(rows[-1:])

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Nothing is left to do."""

    def _report(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["split"] != "validation" or self.pruned:
                continue
            if row["step"] not in self.reported:
                self.trial.report(row["loss"], row["step"])
                self.reported.add(row["step"])
            # After the last step there is nothing left to save.
            if row["step"] < self.run.total_steps and self.trial.should_prune():
                self.pruned = True
                self.run.stop_requested = "pruned"


def _sampler(optuna: Any, seed: int) -> Any:
    """Return a sampler whose proposals are a function of (seed, trial, setting) and the trials before."""

    class Derived(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            drawn = derive_seed(seed, "search", trial.number, param_name) % 2**32
            # Constant liar: what other processes are trying now counts as tried.
            tpe = optuna.samplers.TPESampler(seed=drawn, multivariate=False, constant_liar=True)
            return tpe.sample_independent(study, trial, param_name, param_distribution)

    return Derived()


def _final_loss(run: Run) -> float:
    """Return the held-out loss at the end of a run.

    Raises:
        RunError: It is not finite, so that the trial can be compared with no other.
    """
    loss = float(run.last("validation").get("loss", math.nan))
    if not math.isfinite(loss):
        raise RunError(
            f"The held-out loss at the end of the run in {run.directory} is {loss}.",
            "Expected a finite number.",
            "Lower the learning rate, and run utils.validate on the model.",
        )
    return loss


def _counts(trial: Any) -> bool:
    """Tell whether a trial is one of those asked for; one that another machine abandoned is queued again instead."""
    return trial.state.name in ("COMPLETE", "PRUNED", "RUNNING") or FAULT in trial.user_attrs


def _space_of(space: SearchSpace | Mapping[str, Any] | None) -> SearchSpace:
    if space is None:
        return SearchSpace.from_dict({"learning_rate": {"log_uniform": [1e-4, 1e-2]}})
    return space if isinstance(space, SearchSpace) else SearchSpace.from_dict(space)


def _check(trials: int, pruner: str, config: TrainingConfig) -> None:
    """Check the search's own settings."""
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ConfigError(f"The search has trials={trials!r}.", "Expected a whole number above 0.")
    if pruner not in PRUNERS:
        raise ConfigError(f"The search has pruner={pruner!r}.", f"Expected one of {', '.join(PRUNERS)}.")
    if pruner == "hyperband" and config.max_steps is None:
        raise ConfigError(
            "The search has pruner='hyperband' and a config with max_epochs.",
            "Expected max_steps: hyperband divides the steps of the longest trial.",
            "Set max_steps, or pruner='median'.",
        )


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna's line per trial out of the notebook."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            # `_heartbeat` beats instead of `Study.optimize`.
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock between processes; it ends with the process. Folders that know no locks are not locked."""
    with open(path, "w") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _hold(folder: Path, number: int, held: ExitStack) -> bool:
    """Take a trial's lock until a stack of contexts is left; false when another process has it."""
    (folder / LOCKS).mkdir(exist_ok=True)
    stream: IO[str] = open(folder / LOCKS / f"{number:04d}", "w")  # noqa: SIM115 (held until the stack is left)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return False
    except OSError:
        pass
    held.callback(stream.close)
    return True


@contextmanager
def _heartbeat(study: "Study", trial: Any) -> Iterator[None]:
    """Tell a database every minute that this trial is alive; a journal needs no telling."""
    backend: Any = getattr(study._storage, "_backend", study._storage)
    interval = backend.get_heartbeat_interval() if hasattr(backend, "get_heartbeat_interval") else None
    if interval is None:
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while True:
            with suppress(Exception):
                backend.record_heartbeat(trial._trial_id)
            if ended.wait(interval):
                return

    thread = threading.Thread(target=beat, name=f"heartbeat of trial {trial.number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(interval)
