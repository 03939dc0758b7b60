"""What a search found: its trials, what mattered, pictures, and the best settings trained fully."""

import base64
import html
import io
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.loading import load_model
from utils.runtime.errors import MissingPackageError, RunError
from utils.runtime.files import write_atomic
from utils.runtime.optional import require
from utils.training.config import TrainingConfig
from utils.training.prepared_data import load_prepared
from utils.training.run import RECORD, Run, read_record, spec_of
from utils.training.search_space import SearchSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JOURNAL, SEARCH, TRIALS, FIGURES = "study.journal", "search.json", "trials", "figures"
STUDY = "search"
ENOUGH = 4
"""Fewer trials say nothing about what mattered."""
HEARTBEAT_SECONDS = 60
SHOWN = 10


@dataclass(frozen=True)
class TrialRecord:
    """One trial."""

    number: int
    state: str
    """``complete``, ``pruned``, ``failed`` or ``running``; one that was killed is running until it is continued."""
    params: dict[str, Any]
    """The settings that were tried."""
    loss: float | None
    """Held-out loss at the end, or at the last measurement before it was pruned."""
    step: int
    """Step of that measurement."""
    directory: Path
    """Its run."""
    fault: str | None = None
    """Why it failed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as plain data."""
        return {
            "number": self.number, "state": self.state, "params": self.params, "loss": self.loss, "step": self.step,
            "directory": str(self.directory), "fault": self.fault,
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class SearchResult:
    """All trials of a search, as far as it has come."""

    folder: Path
    """Where the search is kept."""
    model: str
    """Class of the model."""
    data: str
    """Reference of the data."""
    space: SearchSpace
    """What was searched over."""
    config: TrainingConfig
    """All other settings."""
    trials: tuple[TrialRecord, ...]
    """The trials, in the order of their numbers."""
    importances: dict[str, float] = field(default_factory=dict)
    """Share of the differences between complete trials that each setting explains; empty when there are too few."""

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the lowest held-out loss; None when there is none."""
        complete = [trial for trial in self.trials if trial.state == "complete" and trial.loss is not None]
        return min(complete, key=lambda trial: (trial.loss or 0.0, trial.number), default=None)

    @property
    def best_config(self) -> TrainingConfig:
        """The settings of the best trial.

        Raises:
            RunError: No trial is complete.
        """
        return self.config.with_changes(**self._best().params)

    def train_best(
        self,
        run_dir: str | Path,
        model: Any = None,
        data: Any = None,
        *,
        trust: bool = False,
        mirror: str | Path | None = None,
        progress: bool = True,
        **changes: Any,
    ) -> Run:
        """Train a fresh model with the best settings; a second call continues the run.

        Args:
            run_dir: The run's directory.
            model: The model; None takes the source kept with the best trial.
            data: The data; None takes what is kept with the best trial. What was stated about the model for the
                search is taken from there too.
            trust: Run the model's source even though the audit finds something in it (see `utils.load_model`).
            mirror: Where a second copy of the run is kept.
            progress: Show a progress bar.
            **changes: Settings that differ from those of the search, such as ``max_steps``.

        Raises:
            RunError: No trial is complete, or the model was searched without its source and is not given.
        """
        from utils.training.fresh_model import NO_BUDGET, buildable, fresh_model, module_of
        from utils.training.resume import check_same, resume, train

        best = self._best()
        if "max_epochs" in changes:
            changes.setdefault("max_steps", None)
        config = self.best_config.with_changes(**changes)
        if model is None:
            if not (best.directory / "model").is_dir():
                raise RunError(
                    f"The search in {self.folder} was of a bare {self.model} and has no source of it.",
                    "Expected the model itself.",
                    "Pass a function that returns a new one: result.train_best(run_dir, model=...).",
                )
            model = load_model(best.directory / "model", trust=trust)
        spec = spec_of(read_record(best.directory))
        fresh = fresh_model(buildable(model, trust=trust), config.seed)
        data = load_prepared(best.directory / "data") if data is None else data
        if (Path(run_dir) / RECORD).exists():
            check_same(run_dir, fresh, data, config, spec=spec)
            budget = config.time_budget_minutes or NO_BUDGET
            return resume(run_dir, model=module_of(fresh), time_budget_minutes=budget, mirror=mirror, progress=progress)
        return train(fresh, data, config, run_dir, spec=spec, mirror=mirror, progress=progress)

    def _best(self) -> TrialRecord:
        if self.best is None:
            raise RunError(
                f"No trial of the search in {self.folder} is complete.",
                "Expected at least one.",
                "Continue the search with the same call, or look at the faults in result.trials.",
            )
        return self.best

    def _counts(self) -> str:
        states = [trial.state for trial in self.trials]
        named = [f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed", "running") if s in states]
        return ", ".join(named) or "no trial yet"

    def _sentence(self) -> str:
        begin = f"Search for {self.model} on {self.data}: {self._counts()}"
        if self.best is None:
            return f"{begin}; none is complete yet."
        settings = ", ".join(f"{name} {_shown(value)}" for name, value in self.best.params.items())
        return f"{begin}; best held-out loss {self.best.loss:.4f} with {settings} (trial {self.best.number})."

    def _ranked(self) -> list[TrialRecord]:
        order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}
        return sorted(self.trials, key=lambda t: (order[t.state], t.loss if t.loss is not None else math.inf, t.number))

    def _importance_sentence(self) -> str:
        if self.importances:
            return "Share of the differences explained: " + ", ".join(
                f"{name} {share:.0%}" for name, share in self.importances.items()
            )
        return f"What mattered is not told from fewer than {ENOUGH} complete trials with different losses."

    def text(self) -> str:
        """Return the result as aligned text, the best trials first."""
        names = list(self.space.dimensions)
        rows = [["trial", "state", "loss", "step", *names]]
        for trial in self._ranked()[:SHOWN]:
            loss = "" if trial.loss is None else f"{trial.loss:.4f}"
            values = [_shown(trial.params.get(name)) for name in names]
            rows.append([str(trial.number), trial.state, loss, str(trial.step), *values])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        rest = len(self.trials) - SHOWN
        more = [f"and {rest} more"] if rest > 0 else []
        faults = [f"trial {trial.number} failed: {trial.fault}" for trial in self.trials if trial.fault][:3]
        return "\n".join([self._sentence(), *lines, *more, *faults, self._importance_sentence()])

    __repr__ = text

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "folder": str(self.folder),
            "model": self.model,
            "data": self.data,
            "space": self.space.to_dict(),
            "config": self.config.to_dict(),
            "best": None if self.best is None else self.best.to_dict(),
            "importances": self.importances,
            "trials": [trial.to_dict() for trial in self.trials],
        }

    def figures(self) -> "dict[str, Figure]":
        """Draw what can be drawn: ``parallel`` from two complete trials on, ``importance`` when it is known."""
        complete = [trial for trial in self.trials if trial.state == "complete" and trial.loss is not None]
        drawn = {}
        if len(complete) >= 2:
            drawn["parallel"] = parallel_figure(self.space, complete)
        if self.importances:
            drawn["importance"] = importance_figure(self.importances)
        return drawn

    def save_pictures(self) -> list[Path]:
        """Write the pictures as PNG files into the search's folder; a full disk, or no Matplotlib, is told."""
        paths: list[Path] = []
        try:
            figures = self.figures()
        except MissingPackageError as error:
            warnings.warn(f"The search has no pictures: {error}", stacklevel=3)
            return paths
        for name, figure in figures.items():
            path = self.folder / FIGURES / f"{name}.png"
            try:
                write_atomic(path, _png(figure))
            except OSError as error:
                warnings.warn(f"{path} cannot be written: {error.strerror or error}.", stacklevel=3)
            else:
                paths.append(path)
        return paths

    def _repr_html_(self) -> str:
        """Show the result in a notebook."""
        names = list(self.space.dimensions)
        head = "".join(f"<th style='text-align:left'>{html.escape(n)}</th>" for n in ("trial", "state", "loss", *names))
        rows = ""
        for trial in self._ranked()[:SHOWN]:
            loss = "" if trial.loss is None else f"{trial.loss:.4f}"
            cells = [str(trial.number), trial.state, loss, *(_shown(trial.params.get(name)) for name in names)]
            rows += (
                "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            )
        try:
            pictures = "".join(
                f"<img alt='{name}' style='max-width:100%' src='data:image/png;base64,"
                f"{base64.b64encode(_png(figure)).decode()}'>"
                for name, figure in self.figures().items()
            )
        except MissingPackageError as error:
            pictures = f"<p>{html.escape(str(error))}</p>"
        return (
            f"<p><b>{html.escape(self._sentence())}</b></p><table><tr>{head}</tr>{rows}</table>"
            f"<p>{html.escape(self._importance_sentence())}</p>{pictures}"
        )


def read_search(folder: str | Path, *, storage: str | None = None) -> SearchResult:
    """Read how a search stands, also while it is at work.

    Raises:
        RunError: The folder holds none.
    """
    optuna: Any = require("optuna", "read a search")
    folder = Path(folder)
    try:
        record = json.loads((folder / SEARCH).read_text(encoding="utf-8"))
        space = SearchSpace.from_dict(record["space"])
        config = TrainingConfig.from_dict(record["config"])
        name, data = record["model"]["class"], record["data"]
    except FileNotFoundError:
        raise RunError(f"There is no search in {folder}.", f"Expected a {SEARCH}.", "Check the path.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / SEARCH} cannot be read ({error}).", "Expected JSON that Seedbed wrote.") from error
    study = optuna.load_study(study_name=STUDY, storage=storage_of(optuna, folder, storage))
    trials = tuple(
        _record(trial, folder) for trial in study.get_trials(deepcopy=False) if trial.state.name != "WAITING"
    )
    return SearchResult(folder, name, data, space, config, trials, _importances(optuna, study))


def storage_of(optuna: Any, folder: Path, url: str | None) -> Any:
    """Open the database at `url`, or the journal in a folder.

    Raises:
        RunError: The database cannot be opened.
    """
    if url is not None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT_SECONDS)
        except Exception as error:
            raise RunError(
                f"The storage of the search cannot be opened ({type(error).__name__}).",
                "Expected the address of a database, such as sqlite:///search.db or postgresql://user@host/name.",
                "Check the address and that the database's Python package is installed.",
            ) from error
    journal = optuna.storages.journal

    class WholeLines(journal.JournalFileBackend):  # type: ignore[name-defined]
        """A journal in which a line that a kill tore is cut off before the next is written."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            with _Held(self._lock):
                cut_torn_line(Path(self._file_path))
            super().append_logs(logs)

    path = str(folder / JOURNAL)
    return optuna.storages.JournalStorage(WholeLines(path, lock_obj=journal.JournalFileOpenLock(path)))


class _Held:
    """An Optuna lock as a context."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def cut_torn_line(path: Path) -> int:
    """Cut a file back to its last whole line and return how many bytes that took; its lock must be held."""
    with open(path, "r+b") as stream:
        size = end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            stream.seek(start)
            if (found := stream.read(end - start).rfind(b"\n")) >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            stream.truncate(end)
            os.fsync(stream.fileno())
    return size - end


def _record(trial: Any, folder: Path) -> TrialRecord:
    """Return an Optuna trial as plain data."""
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}[trial.state.name]
    step = max(trial.intermediate_values, default=0)
    loss = trial.value if trial.value is not None else trial.intermediate_values.get(step)
    if loss is not None and not math.isfinite(loss):
        # JSON has no name for it, and nothing sorts by it.
        loss = None
    directory = folder / TRIALS / f"{trial.number:04d}"
    return TrialRecord(trial.number, state, dict(trial.params), loss, step, directory, trial.user_attrs.get("fault"))


def _importances(optuna: Any, study: Any) -> dict[str, float]:
    """Return how much of the differences each setting explains; empty when that cannot be told."""
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < ENOUGH or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return {}
    return {name: float(share) for name, share in shares.items()}


def importance_figure(importances: dict[str, float]) -> "Figure":
    """Draw a bar for each setting."""
    require("matplotlib", "draw the search")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.9 + 0.4 * len(importances)), layout="constrained")
    axis = figure.subplots()
    names = list(reversed(importances))
    axis.barh(names, [importances[name] for name in names], color="#1f6f8b")
    axis.set(xlabel="share of the differences explained", title="What mattered", xlim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def parallel_figure(space: SearchSpace, trials: list[TrialRecord]) -> "Figure":
    """Draw each complete trial as a line through its settings to its loss; the best are the darkest."""
    require("matplotlib", "draw the search")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = [*space.dimensions, "loss"]
    figure = Figure(figsize=(2.2 + 1.7 * len(names), 3.8), layout="constrained")
    axis = figure.subplots()
    columns, ticks = [], []
    for name in names:
        values = [trial.loss if name == "loss" else trial.params[name] for trial in trials]
        heights, marks = _heights(values, name != "loss" and "log_uniform" in space.dimensions[name].to_dict())
        columns.append(heights)
        ticks.append(marks)
    order = sorted(range(len(trials)), key=lambda i: -(trials[i].loss or 0.0))
    for rank, i in enumerate(order):
        shade = colormaps["Blues"](0.25 + 0.7 * (rank + 1) / len(order))
        last = rank == len(order) - 1
        axis.plot(range(len(names)), [column[i] for column in columns], color="#c05746" if last else shade,
                  lw=2.2 if last else 1.1)  # fmt: skip
    for x, marks in enumerate(ticks):
        axis.axvline(x, color="#808890", lw=0.8)
        for height, label in marks:
            axis.annotate(label, (x, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center",
                          bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8})  # fmt: skip
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks([])
    axis.set(title="Complete trials; the best in red", xlim=(-0.15, len(names) - 0.6), ylim=(-0.06, 1.06))
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return figure


def _heights(values: list[Any], logarithmic: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the values on a scale from 0 to 1, and its marks."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        scaled = [math.log(value) if logarithmic else float(value) for value in values]
        low, high = min(scaled), max(scaled)
        width = (high - low) or 1.0
        marks = [(0.0, _shown(min(values))), (1.0, _shown(max(values)))] if high > low else [(0.0, _shown(values[0]))]
        return [(value - low) / width for value in scaled], marks
    options = sorted({repr(value) for value in values})
    places = {option: i / max(1, len(options) - 1) for i, option in enumerate(options)}
    return [places[repr(value)] for value in values], [(place, option) for option, place in places.items()]


def _png(figure: "Figure") -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
