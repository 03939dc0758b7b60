"""The runs that wait to be continued, as a notebook shows them: a list to choose from, or a sentence."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from utils.adapters import ModelAdapter
from utils.loading import load_model
from utils.runtime.errors import RunError, SeedbedError
from utils.training.config import TrainingConfig
from utils.training.mirror import newest_step, restore_run
from utils.training.prepared_data import PreparedData, load_prepared
from utils.training.run import read_record, spec_of
from utils.training.unfinished import UnfinishedRun, unfinished_runs
from utils.ui.compat import widgets
from utils.ui.estimates import Estimate, estimate_run
from utils.ui.fields import ERROR, HELP
from utils.ui.session import SessionSettings

MARK = 8
"""Letters of a run's id behind its name, where another run has the same name."""
Key = tuple[str, str]
NEW = "start, or continue what the form below describes"


class UnfinishedRuns:
    """Runs that can be continued; shows itself as a list to choose from.

    Attributes:
        runs: What was found, the one saved last first; of a run that is there twice, the copy that is farther.
        problems: Folders that could not be read, and why.
        copies: The second copy of a run, by the run's id and name.
        choice: The widget; None when there is nothing to choose.
    """

    def __init__(self, folders: Sequence[str | Path | None]) -> None:
        """Look into some folders of runs; one that is None or not there is passed over.

        Args:
            folders: The first is on this machine's disk; the others hold second copies, such as a folder on Drive.
        """
        self.local = Path(folders[0] or "runs")
        self.problems: list[str] = []
        self.copies: dict[Key, Path] = {}
        self._here: dict[Key, Path] = {}
        found: dict[Key, UnfinishedRun] = {}
        for folder in folders:
            if folder is None:
                continue
            for run in self._look(Path(folder)):
                key = _key(run)
                known = found.get(key)
                if known is None or run.step > known.step:
                    found[key] = run
                if Path(folder) == self.local:
                    self._here[key] = run.directory
                else:
                    self.copies[key] = run.directory
        for key in found.keys() - self.copies.keys():
            number, name = key
            # A copy that is finished is on no list.
            for copy in (Path(folder) / name for folder in folders[1:] if folder is not None):
                if _id_of(copy) == number:
                    self.copies[key] = copy
        self.runs = sorted(found.values(), key=lambda run: run.saved, reverse=True)
        self.choice: Any = None
        if self.runs:
            options = [(NEW, -1), *((str(run), index) for index, run in enumerate(self.runs))]
            self.choice = widgets().Dropdown(options=options, value=-1)
            self.choice.layout.width = "96%"

    def _look(self, folder: Path) -> list[UnfinishedRun]:
        """Return what a folder holds; what cannot be read is noted."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = unfinished_runs(folder)
            except SeedbedError as error:
                self.problems.append(str(error))
                found = []
        self.problems += [str(one.message) for one in told]
        return found

    @property
    def _selected(self) -> UnfinishedRun | None:
        number = self.choice.value if self.choice is not None else -1
        return self.runs[number] if number >= 0 else None

    @property
    def chosen(self) -> Path | None:
        """The directory of the run to continue, on this machine's disk; None to go on with the form.

        A run that is only on Drive, or farther there, is brought back first.
        """
        run = self._selected
        if run is None:
            return None
        directory = self._here.get(_key(run)) or self._place(run)
        if (copy := self.copies.get(_key(run))) is not None:
            restore_run(copy, directory)
        return directory

    def _place(self, run: UnfinishedRun) -> Path:
        """Return where a run is or comes to be on this machine's disk: under its name, or that and its number."""
        name = _key(run)[1]
        plain = self.local / name
        return plain if _id_of(plain) in (None, run.id) else self.local / f"{name}-{run.id[:MARK]}"

    @property
    def mirror(self) -> Path | None:
        """The second copy of the chosen run; None when it has none."""
        run = self._selected
        return self.copies.get(_key(run)) if run is not None else None

    def __str__(self) -> str:
        """List the runs."""
        lines = [str(run) for run in self.runs] or ["No unfinished run was found."]
        return "\n".join([*lines, *self.problems])

    __repr__ = __str__

    def _ipython_display_(self) -> None:
        """Show the list."""
        from IPython.display import HTML, display

        troubles = "".join(f'<div style="{ERROR}">{escape(one)}</div>' for one in self.problems)
        if self.choice is None:
            display(HTML(f"<p>No unfinished run was found.</p>{troubles}"))
            return
        kit = widgets()
        count = f"{len(self.runs)} unfinished run{'s' if len(self.runs) > 1 else ''}"
        head = kit.HTML(
            f"<b>{count}.</b> <span style='{HELP}'>Choose one and run the cells below, or leave it: a run whose "
            f"settings are those of the form continues by itself.</span>{troubles}"
        )
        display(kit.VBox([head, self.choice]))


def _id_of(directory: Path) -> str | None:
    """Return the id of the run in a directory; None when there is none that can be read."""
    try:
        return str(read_record(directory)["id"])
    except (SeedbedError, OSError):
        return None


def _key(run: UnfinishedRun) -> Key:
    """Return a run's id, and its name without what was added because another run had the same."""
    return run.id, run.directory.name.removesuffix(f"-{run.id[:MARK]}")


class ContinuedRun:
    """A run that is to go on, with the same attributes as the form that would have described it.

    Attributes:
        run_dir: Its directory.
        mirror: Its second copy, if it has one.
        loaded: Its model, as it was before the first step; the training loads its weights.
        adapter: What is known about the model.
        settings: What it is trained on, and how.
    """

    def __init__(self, run_dir: Path, mirror: Path | None = None, *, trust: bool = False) -> None:
        """Read what describes the run.

        Raises:
            SeedbedError: The directory holds no run, or its model cannot be loaded.
        """
        record = read_record(run_dir)
        self.run_dir, self.mirror = run_dir, mirror
        if not (run_dir / "model").is_dir():
            raise RunError(
                f"The run in {run_dir} was started with a bare {record['model']['class']} and has no source of it.",
                "Expected a run whose model can be loaded from its directory.",
                "Continue it with utils.resume(run_dir, model=...).",
            )
        origin = record["model"]
        # Kept with the run are the same model's files with its final config: it is the model that the record names.
        self.loaded = replace(
            load_model(run_dir / "model", trust=trust),
            reference=origin["reference"], sha256=origin["sha256"], config=origin["config"],
        )  # fmt: skip
        self.adapter = ModelAdapter(self.loaded, spec=spec_of(record))
        config = TrainingConfig.from_dict(record["config"])
        self.settings = SessionSettings(record["data"]["reference"], config, "of the run that is continued")
        self._data: PreparedData | None = None
        self.step = newest_step(run_dir)

    @property
    def data(self) -> PreparedData:
        """The samples that are kept with the run.

        Raises:
            DataError: They are missing or damaged.
        """
        if self._data is None:
            self._data = load_prepared(self.run_dir / "data")
        return self._data

    def estimate(self) -> Estimate:
        """Measure a few steps and say what the rest of the run takes."""
        return estimate_run(
            self.adapter, self.data, self.settings.config, self.run_dir, mirror=self.mirror, done=max(0, self.step)
        )

    def _repr_html_(self) -> str:
        """Say what goes on."""
        total = self.settings.config.total_steps(self.data.pass_samples)
        where = f"{self.run_dir} goes on at step {self.step:,} of {total:,}: {self.loaded.name}"
        return f"<p><b>{escape(where)}</b></p>{self.settings._repr_html_()}"
