"""Outside trackers beside metrics.csv: wandb and TensorBoard, which may fail at any call and never stop a run.

What is unusual here:

- A tracker works in a thread of its own, fed by a queue: a service that is slow, down or broken costs a step nothing.
  The first thing that goes wrong is told once, and that tracker gets no more rows.
- Every session hands over all rows of the run, not only its own. A run that was killed logs some steps again; this way
  nothing is missing and nothing is there twice, and the files of the newest session are complete without the others.
- Everything is written below ``tracking/`` in the run directory. The key is handed to wandb in memory; it goes into no
  file, no message and no environment of another process.
"""

import os
import queue
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from utils.runtime.optional import require
from utils.runtime.secrets import find_secret
from utils.training.config import TrainingConfig
from utils.training.growth_rows import COLUMNS, LINEAGE, GrowthRows, growth_markdown, read_growth
from utils.training.run import METRICS, RECORD, Run, read_record
from utils.training.task_rows import MATRIX, TaskRows, read_tasks, tasks_markdown

if TYPE_CHECKING:
    from utils.training.session_callback import Observer

FOLDER = "tracking"
"""Where trackers write, inside the run directory."""
KEY = "WANDB_API_KEY"
INIT_SECONDS = 30.0
"""How long wandb may try to reach its server before the run is tracked offline."""
CLOSE_SECONDS = 60.0
"""How long the end of a session waits for a tracker."""
PACKAGES = {"wandb": ("wandb", "wandb"), "tensorboard": ("torch.utils.tensorboard", "tensorboard")}
OWN_FOLDERS = {"WANDB_DATA_DIR": "staging", "WANDB_CACHE_DIR": "cache", "WANDB_CONFIG_DIR": "settings"}
"""Folders that wandb would else make in the user's home."""


class Tracker(Protocol):
    """One outside service, as `Tracking` drives it; whatever it raises ends the tracking and nothing else."""

    name: str

    def open(self, run: Run) -> None:
        """Get ready."""

    def log(self, first: int, rows: list[dict[str, Any]]) -> None:
        """Take the rows from number `first` on; before the first call of a session nothing of it is known."""

    def close(self, run: Run, ended: bool) -> str:
        """Finish and return what the user should know; `ended` is false when training raised an error."""


def check_trackers(config: TrainingConfig) -> None:
    """Make sure that what the settings ask for is installed, before a run begins.

    Raises:
        MissingPackageError: It is not; the message carries the install line.
    """
    for name in config.trackers:
        module, package = PACKAGES[name]
        require(module, f"track runs with tracking={config.tracking!r}", package)


def make_trackers(config: TrainingConfig) -> "list[Tracking]":
    """Return one observer for each tracker that the settings name."""
    makers: dict[str, Callable[[], Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}
    return [Tracking(makers[name]()) for name in config.trackers]


@contextmanager
def tracked(run: Run, observers: "list[Observer] | None", first: bool = True) -> "Iterator[list[Observer]]":
    """Follow a session with the trackers that its settings name, besides other observers.

    Args:
        run: The run; what trackers have to say is added to its `notes`.
        observers: Other observers.
        first: Whether this is the first of several processes; the others track nothing.

    Yields:
        All observers. Trackers are closed at the end of the block, also when it raises.
    """
    trackers = make_trackers(run.config) if first else []
    ended = False
    try:
        yield [*(observers or []), *trackers]
        ended = True
    finally:
        for tracker in trackers:
            tracker.finish(run, ended)


class Tracking:
    """Lets one tracker follow a run from a thread of its own.

    Attributes:
        fault: What went wrong first; None as long as nothing did.
    """

    def __init__(self, tracker: Tracker, close_seconds: float = CLOSE_SECONDS) -> None:
        """Begin nothing yet."""
        self.tracker, self.close_seconds = tracker, close_seconds
        self.fault: str | None = None
        self.note = ""
        self._told = False
        self._handed = 0
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, run: Run) -> None:
        """Open the tracker, in its thread."""
        self._thread = threading.Thread(target=self._loop, name=f"tracking {self.tracker.name}", daemon=True)
        self._thread.start()
        self._work.put(lambda: self.tracker.open(run))

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Hand over the rows that are new; the first time in a session these are all of the run."""
        self._tell()
        if self.fault is not None or len(rows) <= self._handed:
            return
        first, new = self._handed, [dict(row) for row in rows[self._handed :]]
        self._handed = len(rows)
        self._work.put(lambda: self.tracker.log(first, new))

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Hand over what is left; `finish` closes the tracker, when it is known how the session ended."""
        self.update(rows)

    def finish(self, run: Run, ended: bool) -> None:
        """Close the tracker and wait a moment for it."""
        if self._thread is None:
            return

        def close() -> None:
            self.note = self.tracker.close(run, ended)

        self._work.put(close)
        self._work.put(None)
        self._thread.join(self.close_seconds)
        if self._thread.is_alive() and self.fault is None:
            self.fault = f"no answer within {self.close_seconds:g} seconds"
        self._thread = None
        self._tell()
        if self.note:
            run.notes.append(self.note)

    def _loop(self) -> None:
        """Do what is asked for, in order, until something goes wrong."""
        while (work := self._work.get()) is not None:
            if self.fault is not None:
                continue
            try:
                work()
            except BaseException as error:  # a tracker's sys.exit ends the tracking too, not the thread in silence
                self.fault = describe(error)

    def _tell(self) -> None:
        """Warn once about what went wrong."""
        if self.fault is not None and not self._told:
            self._told = True
            warnings.warn(
                f"Tracking with {self.tracker.name} failed and goes no further in this session: {self.fault}. "
                f"Training goes on, and {METRICS} in the run directory has every number.",
                stacklevel=4,
            )


def describe(error: BaseException) -> str:
    """Return an error's kind and text in one line, without the key should the text hold it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    secret = find_secret(KEY)
    if secret.value:
        text = text.replace(secret.value, "(the key)")
    return text[:300]


def architecture(run: Run) -> list[tuple[str, str, int, int]]:
    """Return name, class, own parameters and trained ones of each module that holds parameters itself."""
    table = []
    for name, module in run.model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            trained = sum(p.numel() for p in own if p.requires_grad)
            table.append((name or "(model)", type(module).__name__, sum(p.numel() for p in own), trained))
    return table


def settings_of(run: Run) -> dict[str, Any]:
    """Return what is worth comparing runs by."""
    return {
        **run.config.to_dict(),
        "model": run.adapter.name,
        "parameters": run.adapter.num_parameters,
        "task": run.adapter.task.value,
        "data": run.data.reference,
        "train_samples": run.data.train_samples,
        "total_steps": run.total_steps,
    }


class Seen(Protocol):
    """A record of a run that gets longer."""

    @property
    def rows(self) -> Sequence[dict[str, Any]]:
        """What is in it; nothing when it cannot be read."""


Record = TypeVar("Record", bound=Seen)


class News(Generic[Record]):
    """Looks from time to time whether a record in a run's directory has more rows.

    Attributes:
        told: Number of rows that it had when `new` last returned it.
    """

    def __init__(self, read: Callable[[], Record]) -> None:
        """Look at what `read` returns."""
        self._read, self.told = read, 0

    def new(self) -> Record | None:
        """Return the whole record when there are new rows."""
        record = self._read()
        if len(record.rows) <= self.told:
            return None
        self.told = len(record.rows)
        return record


def growth_news(run: Run | None = None) -> News[GrowthRows]:
    """Look whether a run's model has grown; without a run there is nothing to see."""
    if run is None:
        return News(GrowthRows)
    return News(partial(read_growth, run.directory, read_record(run.directory)["model"].get("parameters")))


def task_news(run: Run | None = None) -> News[TaskRows]:
    """Look whether a run has learned another task; without a run there is nothing to see."""
    return News(TaskRows) if run is None else News(partial(read_tasks, run.directory))


class WandbTracker:
    """Weights & Biases: online when there is a key, offline without, always under the run's own id."""

    name = "wandb"

    def __init__(self) -> None:
        """Begin nothing yet."""
        self.folder = Path()
        self.online = False
        self.trouble = ""
        self._run: Any = None
        self._skip = 0
        self._growth, self._tasks = growth_news(), task_news()

    def open(self, run: Run) -> None:
        """Begin or continue the run at wandb."""
        wandb: Any = require("wandb", "track a run with wandb")
        self._growth, self._tasks = growth_news(run), task_news(run)
        self.folder = (run.directory / FOLDER).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        secret = find_secret(KEY)
        offline = os.environ.get("WANDB_MODE", "") == "offline"
        with own_folders(self.folder):
            if secret and not offline:
                try:
                    self._begin(wandb, run, "online", secret.value)
                    self.online = True
                except Exception as error:
                    self.trouble = f"wandb could not be reached ({describe(error)}); "
                    wandb.teardown()
            if not self.online:
                self._begin(wandb, run, "offline", None)
            # A run continued online has its earlier rows; wandb says at which it goes on.
            self._skip = int(self._run.step) if self.online else 0
            self._run.define_metric("*", step_metric="step")
            if self._skip == 0:
                rows = [list(row) for row in architecture(run)]
                table = wandb.Table(columns=["module", "class", "parameters", "trained"], data=rows)
                self._run.log({"architecture": table}, step=0)

    def _begin(self, wandb: Any, run: Run, mode: str, key: str | None) -> None:
        wanted = {
            "api_key": key, "init_timeout": INIT_SECONDS, "login_timeout": INIT_SECONDS, "silent": True,
            "console": "off", "disable_git": True, "save_code": False, "x_save_requirements": False,
            "x_disable_machine_info": True, "finish_timeout": CLOSE_SECONDS, "disable_job_creation": True,
        }  # fmt: skip
        # Not every version knows every setting.
        known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            id=str(read_record(run.directory)["id"]), resume="allow" if mode == "online" else None, mode=mode,
            project=os.environ.get("WANDB_PROJECT", "seedbed"), name=run.directory.name, dir=str(self.folder),
            config=settings_of(run), settings=wandb.Settings(**known),
        )  # fmt: skip

    def log(self, first: int, rows: list[dict[str, Any]]) -> None:
        """Log rows under their number, so that what a resumed run logs again falls on itself."""
        for number, row in enumerate(rows, first):
            if number < self._skip:
                continue
            values = {f"{row['split']}/{name}": value for name, value in row.items() if name not in ("step", "split")}
            self._run.log({"step": row["step"], **values}, step=number)
        self._log_tables(first + len(rows) - 1)

    def _log_tables(self, number: int) -> None:
        """Log growth and learned tasks, under the number of the newest row, when there is something new."""
        values: dict[str, Any] = {}
        if grown := self._growth.new():
            values["growth"] = COLUMNS, [[row[name] for name in COLUMNS] for row in grown.rows]
        if learned := self._tasks.new():
            values["tasks"] = learned.columns, learned.values
        if values:
            import wandb

            values = {name: wandb.Table(columns=list(head), data=rows) for name, (head, rows) in values.items()}
            values |= {f"tasks/{name}": value for name, value in (learned.headline if learned else {}).items()}
            self._run.log(values, step=max(number, self._skip))

    def close(self, run: Run, ended: bool) -> str:
        """Add the finished run's files, and finish."""
        with own_folders(self.folder):
            # A session may stop at an event, before the next row.
            self._log_tables(len(run.metrics) - 1)
            if ended and run.finished:
                self._run.log_artifact(self._artifact(run))
            directory = Path(self._run.dir).parent
            url = self._run.url if self.online else None
            self._run.finish(exit_code=0 if ended else 1)
        if self.online:
            return f"wandb: {url}"
        return (
            f"{self.trouble}wandb tracked this run offline in {directory}. To upload it: set {KEY} and run "
            f"`wandb sync {directory}`; it holds the whole run, earlier sessions included."
        )

    def _artifact(self, run: Run) -> Any:
        """Return the weights, settings and numbers; files are referred to where they are, not copied."""
        import wandb

        made = wandb.Artifact(f"run-{self._run.id}", type="model", metadata={"step": run.step})
        newest = run.checkpoints.latest()
        places = {"weights": newest.directory, "data": run.directory / "data"}
        for path in (run.directory / RECORD, run.directory / METRICS, *places["weights"].glob("*.safetensors")):
            made.add_file(str(path), policy="mutable" if path.name == METRICS else "immutable")
        for path in (run.directory / LINEAGE, run.directory / MATRIX):
            if path.exists():
                made.add_file(str(path), policy="mutable")
        if (tokenizer := places["data"] / "tokenizer.json").exists():
            made.add_file(str(tokenizer), policy="immutable")
        return made


@contextmanager
def own_folders(folder: Path) -> Iterator[None]:
    """Let wandb keep what it would else put into the user's home in a folder; the environment is put back."""
    wanted = {name: str(folder / "wandb" / part) for name, part in OWN_FOLDERS.items()}
    # Its first words come before its settings are read.
    wanted["WANDB_SILENT"] = "true"
    before = {name: os.environ.get(name) for name in wanted}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, earlier in before.items():
            if earlier is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = earlier


class TensorBoardTracker:
    """TensorBoard's event files, written anew by each session."""

    name = "tensorboard"

    def __init__(self) -> None:
        """Begin nothing yet."""
        self.folder = Path()
        self._writer: Any = None
        self._growth, self._tasks = growth_news(), task_news()

    def open(self, run: Run) -> None:
        """Remove the files of earlier sessions: this one writes all rows."""
        tensorboard: Any = require("torch.utils.tensorboard", "track a run with TensorBoard", "tensorboard")
        self.folder = (run.directory / FOLDER / self.name).resolve()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._writer = tensorboard.SummaryWriter(str(self.folder))
        lines = [f"| {name} | {value} |" for name, value in settings_of(run).items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "| --- | --- |", *lines]))
        lines = [f"| {' | '.join(map(str, row))} |" for row in architecture(run)]
        table = ["| module | class | parameters | trained |", "| --- | --- | --- | --- |", *lines]
        self._writer.add_text("architecture", "\n".join(table))
        self._growth, self._tasks = growth_news(run), task_news(run)

    def log(self, first: int, rows: list[dict[str, Any]]) -> None:
        """Write each number as a scalar at its step."""
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "split"):
                    self._writer.add_scalar(f"{row['split']}/{name}", value, row["step"])
        self._log_tables(rows[-1]["step"])

    def close(self, run: Run, ended: bool) -> str:
        """Flush and close."""
        self._log_tables(run.step)
        self._writer.close()
        return f"TensorBoard: `tensorboard --logdir {self.folder}`"

    def _log_tables(self, step: int) -> None:
        """Write growth and learned tasks as tables, when there is something new, and how each task went."""
        if grown := self._growth.new():
            self._writer.add_text("growth", growth_markdown(grown.rows), step)
        known = self._tasks.told
        if learned := self._tasks.new():
            self._writer.add_text("tasks", tasks_markdown(learned), step)
            for number in range(known + 1, len(learned.rows) + 1):
                until = replace(learned, rows=learned.rows[:number])
                end = (until.newest or {}).get("step")
                for name, value in until.headline.items():
                    self._writer.add_scalar(f"tasks/{name}", value, step if end is None else end)
