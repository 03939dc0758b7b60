"""The setup of a run as a form: model, data, preset, budget, second copy, tracking, and every setting below.

The form only describes a run; the cells after it read `settings`, `data` and `run_dir` from it and train. A widget's
handlers run only while the kernel is idle, so a form that trained by itself would neither show its progress nor survive
a reconnect. Nothing has to be touched: as it appears it describes a run that works.

No handler raises. What is wrong stands beside the field that is wrong; only the cell that asks for `settings` while
something is wrong gets the error.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from utils.adapters import ModelAdapter
from utils.loading import LoadedModel, load_model
from utils.runtime.errors import ConfigError, SeedbedError
from utils.runtime.resources import format_count
from utils.training.config import AUTO, TrainingConfig
from utils.training.dataset_utilities import PreparedData, prepare_data
from utils.training.references import IMAGE_BUILTINS, TABLE_BUILTINS, TEXT_BUILTINS
from utils.ui.compat import clear_upload, folded, uploaded_files, widgets
from utils.ui.estimates import Estimate, estimate_run
from utils.ui.fields import ERROR, HELP, UP_FRONT, Row, SettingRow, fields_in, grouped, shown_fields
from utils.ui.presets import in_samples, merged, preset, preset_about, preset_names
from utils.ui.session import DETECT, SessionSettings, keep_upload, run_folder, session_settings
from utils.ui.unfinished_view import ContinuedRun, UnfinishedRuns

DATA_FIELDS = ("context_length", "validation_share", "seed")
"""Settings that decide how data is prepared."""


def set_up(
    model: str | LoadedModel, unfinished: UnfinishedRuns | None = None, *, trust: bool = False, **form: Any
) -> "SetupWizard | ContinuedRun":
    """Return what the next cells train: the run that was chosen to be continued, or else a form for a run.

    Args:
        model: The model of the form, or a reference for it.
        unfinished: Where the user may have chosen a run.
        trust: Run a model's code even though the audit finds something in it.
        **form: Further arguments of `SetupWizard`.

    Raises:
        SeedbedError: The model, a setting or the chosen run cannot be used.
    """
    directory = unfinished.chosen if unfinished is not None else None
    if unfinished is not None and directory is not None:
        return ContinuedRun(directory, unfinished.mirror, trust=trust)
    return SetupWizard(model, trust=trust, **form)


class SetupWizard:
    """The form; the last line of a cell shows it.

    Example:
        >>> wizard = SetupWizard("example:gpt", max_steps=20)  # doctest: +SKIP

    Attributes:
        loaded: The model.
        adapter: What is known about it.
        form: The widget.
        rows: The rows of the form by name.
    """

    def __init__(
        self,
        model: str | LoadedModel = "example:gpt",
        *,
        trust: bool = False,
        data: str = DETECT,
        preset: str = "fast",
        run_name: str = "",
        mirror: str | Path | None = None,
        limit_minutes: float | None = None,
        **settings: Any,
    ) -> None:
        """Show a form that describes a run which works.

        Args:
            model: The model, or a reference for it.
            trust: Run the model's code even though the audit finds something in it.
            data: A data reference, or ``"detect"``.
            preset: Where the settings start from.
            run_name: Name of the run; empty makes one.
            mirror: A folder, such as one on Drive, that keeps a second copy of the run.
            limit_minutes: How long the whole run may take; None for as long as it needs.
            **settings: Fields of `TrainingConfig` that differ from the preset.

        Raises:
            SeedbedError: The model or a setting cannot be used; a form that starts with a fault helps nobody.
        """
        preset_about(preset)
        self.loaded = model if isinstance(model, LoadedModel) else load_model(model, trust=trust)
        self.adapter = ModelAdapter(self.loaded)
        self.trust = trust
        self.changes = dict(settings)
        self.last_estimate: Estimate | None = None
        self._data: tuple[str, PreparedData] | None = None
        self._filling = False
        self.rows: dict[str, Row] = {}
        self.form = self._build(data, preset, run_name, mirror, limit_minutes)
        self._fill(preset)
        _ = self.settings
        self._check()

    def _build(
        self, data: str, chosen: str, run_name: str, mirror: str | Path | None, limit_minutes: float | None
    ) -> Any:
        """Make all widgets."""
        kit = widgets()
        known = [DETECT, *TEXT_BUILTINS, *IMAGE_BUILTINS, *TABLE_BUILTINS]
        top: Sequence[tuple[str, str, Any, str]] = (
            ("model", "model", kit.Text(self.loaded.reference, continuous_update=False),
             "A Gist, GitHub or Hub link, a file, a folder or example:gpt. Code that the audit objects to is refused "
             "here: consent to it in the cell above."),
            ("data", "data", kit.Combobox(value=data, options=known, continuous_update=False),
             "detect takes built-in data that fits the model. Else builtin:NAME, file:PATH or hub:owner/name, with "
             "?text=COLUMN&label=COLUMN where columns must be named."),
            ("upload", "or upload a file", kit.FileUpload(multiple=False),
             "Stays in the folder uploads beside this notebook, and becomes the data."),
            ("preset", "preset", kit.Dropdown(options=preset_names(), value=chosen), preset_about(chosen)),
            ("limit_minutes", "minutes for the whole run", kit.Text(continuous_update=False, placeholder="no limit"),
             "The estimate refuses a run that takes longer. It does not stop one: time budget minutes does."),
            ("run_name", "name of the run",
             kit.Text(run_name, continuous_update=False, placeholder="made from the rest"),
             "The run is kept in runs/NAME; equal settings give an equal name, so that a cell can be run again."),
            ("mirror", "second copy in", kit.Text(str(mirror or ""), continuous_update=False, placeholder="nowhere"),
             "A folder that outlives this machine, such as one on a mounted Drive, brought up to date at checkpoints."),
        )  # fmt: skip
        for name, label, widget, text in top:
            self.rows[name] = Row(label, widget, text)
        self.rows["limit_minutes"].widget.value = "" if limit_minutes is None else f"{limit_minutes:g}"
        for name in shown_fields():
            self.rows[name] = SettingRow(name, self._changed)
        for name in ("data", "run_name", "mirror", "limit_minutes"):
            self.rows[name].widget.observe(lambda change: self._changed(), names="value")
        self.rows["batch_size"].widget.observe(self._rebatch, names="value")
        self.rows["model"].widget.observe(lambda change: self._load(change["new"]), names="value")
        self.rows["preset"].widget.observe(lambda change: self._choose(change["new"]), names="value")
        self.rows["upload"].widget.observe(lambda change: self._upload(change["new"]), names="value")
        self._button = kit.Button(description="Estimate", button_style="primary")
        self._button.on_click(lambda button: self._show_estimate())
        self._status, self._shown = kit.HTML(""), kit.HTML("")
        self._status.layout.margin = "0 0 0 10px"
        groups = [(title, kit.VBox([self.rows[name].box for name in names])) for title, names in grouped().items()]
        front = [self.rows[name].box for name in (*(name for name, *_ in top), *UP_FRONT)]
        intro = kit.HTML(
            f'<div style="{HELP}">The cells below train what stands here. Changed something? Run them again.</div>'
        )
        self._accordion = folded(groups)
        bottom = kit.HBox([self._button, self._status])
        bottom.layout.align_items = "center"
        box = kit.VBox([intro, *front, self._accordion, bottom, self._shown])
        box.layout.max_width = "900px"
        return box

    def _fill(self, name: str) -> None:
        """Show the settings of a preset, with what the caller changed."""
        config = TrainingConfig.from_dict(merged(preset(name).to_dict(), self.changes))
        with self._quietly():
            for field in shown_fields():
                row = self.rows[field]
                assert isinstance(row, SettingRow)
                row.put(getattr(config, field))
        row = self.rows["preset"]
        row._help.value = f'<div style="{HELP}">{escape(preset_about(name))}</div>'

    def _choose(self, name: str) -> None:
        """Start from another preset; what the caller changed stays, what the user typed goes."""
        try:
            self._fill(name)
        except SeedbedError as error:
            self.rows["preset"].complain(str(error))
            return
        self._changed()

    def _rebatch(self, change: dict[str, Any]) -> None:
        """Keep the samples of a step when the batch size becomes auto, and forget them when it is a number again."""
        automatic = [str(change[name]).strip().lower() == AUTO for name in ("old", "new")]
        if self._filling or automatic[0] == automatic[1]:
            return
        said: dict[str, Any] = {"step_samples": None}
        if automatic[1]:
            texts = {"batch_size": change["old"], "accumulate": self.rows["accumulate"].widget.value}
            said |= in_samples({name: int(text) if text.strip().isdigit() else text for name, text in texts.items()})
        with self._quietly():
            for name, value in said.items():
                row = self.rows[name]
                assert isinstance(row, SettingRow)
                row.put(value)
        self._changed()

    def _load(self, reference: str) -> None:
        """Take another model; the present one stays when it cannot be loaded."""
        try:
            loaded = load_model(reference.strip(), trust=self.trust)
            adapter = ModelAdapter(loaded)
        except Exception as error:
            self.rows["model"].complain(_told(error))
            self._say()
            return
        self.loaded, self.adapter, self._data = loaded, adapter, None
        self.rows["model"].complain()
        self._changed()

    def _upload(self, value: Any) -> None:
        """Keep an uploaded file and take it as the data."""
        files = uploaded_files(value)
        if not files:
            return
        name, content = files[-1]
        try:
            path = keep_upload(name, content)
        except OSError as error:
            self.rows["upload"].complain(f"{name} cannot be kept ({error.strerror or error}).")
            return
        self.rows["upload"].complain()
        clear_upload(self.rows["upload"].widget)
        self._data = None
        if self.rows["data"].widget.value == f"file:{path}":
            self._changed()
        self.rows["data"].widget.value = f"file:{path}"

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Change widgets without checking each time."""
        before, self._filling = self._filling, True
        try:
            yield
        finally:
            self._filling = before

    def _changed(self) -> None:
        """Check everything after a change; an estimate of other settings is taken away."""
        if self._filling:
            return
        self.last_estimate = None
        self._shown.value = ""
        self._check()

    def _check(self) -> bool:
        """Show beside each field what is wrong with it; return whether all is well."""
        for name, row in self.rows.items():
            # These two stay wrong until another model or file was chosen.
            if name not in ("model", "upload"):
                row.complain()
        for name, read in (("limit_minutes", self._limit), ("mirror", self._mirror_folder)):
            try:
                read()
            except SeedbedError as error:
                self.rows[name].complain(str(error))
        config = self._complain_of_settings()
        if config is not None:
            try:
                settings = self._session(config)
            except SeedbedError as error:
                self.rows["data"].complain(str(error))
            else:
                try:
                    run_folder(self.rows["run_name"].widget.value, self.loaded, settings)
                except SeedbedError as error:
                    self.rows["run_name"].complain(str(error))
        self._say()
        return not self.faults

    def _complain_of_settings(self) -> dict[str, Any] | None:
        """Show what is wrong with the settings of the run beside each; return them when nothing is."""
        values, unreadable = {}, False
        for name in shown_fields():
            row = self.rows[name]
            assert isinstance(row, SettingRow)
            try:
                values[name] = row.value()
            except ConfigError as error:
                row.complain(str(error))
                unreadable = True
        if unreadable:
            return None
        try:
            TrainingConfig.from_dict(values)
        except ConfigError as error:
            named = fields_in(error.found) or ["preset"]
            for name in named:
                self.rows[name].complain(str(error))
            for title, names in grouped().items():
                if set(named) & set(names):
                    self._accordion.selected_index = list(grouped()).index(title)
                    break
            return None
        return values

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong, by the name of the row."""
        return {name: row.error for name, row in self.rows.items() if row.error}

    def _say(self, text: str = "") -> None:
        """Show one line beside the button."""
        if not text and self.faults:
            text = f'<span style="{ERROR}">{len(self.faults)} field(s) to correct</span>'
        elif not text:
            count = format_count(self.loaded.num_parameters)
            text = escape(f"{self.loaded.name}, {count} parameters, {self.adapter.task.value.replace('_', ' ')}")
        self._status.value = text

    def _session(self, values: dict[str, Any]) -> SessionSettings:
        """Return the settings with the data that fits."""
        return session_settings(self.adapter, self.rows["data"].widget.value.strip() or DETECT, **values)

    @property
    def settings(self) -> SessionSettings:
        """What the next cell trains on, and how.

        Raises:
            ConfigError: A field holds something that cannot be used.
        """
        values = self._complain_of_settings()
        faults = self.faults
        if values is None or faults:
            raise ConfigError(
                " ".join(dict.fromkeys(faults.values())),
                "Expected every field of the form to be right.",
                "Correct it there, and run this cell again.",
            )
        return self._session(values)

    @property
    def data(self) -> PreparedData:
        """The data, prepared for the model; made once for equal settings.

        Raises:
            SeedbedError: It cannot be read, or does not fit the model.
        """
        settings = self.settings
        config = settings.config.to_dict()
        key = json.dumps([self.loaded.sha256, settings.data, [config[name] for name in DATA_FIELDS]], default=str)
        if self._data is None or self._data[0] != key:
            self._data = (key, prepare_data(self.adapter, settings.data, settings.config))
        return self._data[1]

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return run_folder(self.rows["run_name"].widget.value, self.loaded, self.settings)

    @property
    def mirror(self) -> Path | None:
        """The folder of the run's second copy; None when there is to be none.

        Raises:
            ConfigError: The place where it should be is not there, or another field has a fault.
        """
        folder = self._mirror_folder()
        return None if folder is None else folder / self.run_dir.name

    def _mirror_folder(self) -> Path | None:
        """Return the folder that holds second copies."""
        text = self.rows["mirror"].widget.value.strip()
        if not text:
            return None
        folder = Path(text).expanduser()
        if not folder.is_dir() and not folder.parent.is_dir():
            raise ConfigError(
                f"There is no folder {folder.parent}.",
                "Expected a place that is there now.",
                "Mount Drive with the box in the cell of unfinished runs, or leave this empty.",
            )
        return folder

    def _limit(self) -> float | None:
        """Return the minutes for the whole run."""
        text = self.rows["limit_minutes"].widget.value.strip()
        try:
            minutes = float(text) if text else None
        except ValueError:
            minutes = -1.0
        if minutes is not None and not minutes > 0:
            raise ConfigError(f"The minutes for the whole run are {text!r}.", "Expected a number above 0, or nothing.")
        return minutes

    def estimate(self) -> Estimate:
        """Measure a few steps and say what the run takes.

        Raises:
            SeedbedError: The form or the data has a fault.
        """
        settings, data = self.settings, self.data
        if self.last_estimate is None:
            self.last_estimate = estimate_run(
                self.adapter, data, settings.config, self.run_dir, mirror=self.mirror, limit_minutes=self._limit()
            )
        return self.last_estimate

    def _show_estimate(self) -> None:
        """Answer the button."""
        if not self._check():
            return
        self._button.disabled = True
        self._say("Preparing the data and measuring a few steps ...")
        try:
            self._shown.value = self.estimate()._repr_html_()
            self._say()
        except Exception as error:
            # The model's own code runs here, and may raise anything.
            where = "" if isinstance(error, SeedbedError) else " (wizard.estimate() in a cell shows where)"
            self._shown.value = f'<div style="{ERROR}">{escape(_told(error) + where)}</div>'
            self._say()
        finally:
            self._button.disabled = False

    def fresh_model(self) -> LoadedModel:
        """Return the model as it was loaded, whatever has been trained since."""
        return replace(self.loaded, module=self.loaded.factory()) if self.loaded.can_rebuild else self.loaded

    def to_dict(self) -> dict[str, Any]:
        """Return what the form describes, as plain values."""
        return {"model": self.loaded.reference, **self.settings.to_dict(), "run_dir": str(self.run_dir)}

    def _ipython_display_(self) -> None:
        """Show the form in a notebook."""
        from IPython.display import display

        display(self.form)


def _told(error: Exception) -> str:
    """Return what a handler shows of an error; one that is not Seedbed's own is named with its kind."""
    return str(error) if isinstance(error, SeedbedError) else f"{type(error).__name__}: {error}"
