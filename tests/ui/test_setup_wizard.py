import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.runtime.errors import ConfigError, DataError, ModelReferenceError
from utils.runtime.settings import field_help
from utils.training.config import TrainingConfig
from utils.training.resume import train
from utils.ui import setup_wizard
from utils.ui.compat import major_version, uploaded_files
from utils.ui.fields import grouped, shown_fields
from utils.ui.presets import preset
from utils.ui.setup_wizard import SetupWizard

MODEL = '''
import torch
from torch import nn

class Model(nn.Module):
    """A tiny language model."""

    def __init__(self, vocab_size=300, d_model=16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.mixer = nn.GRU(d_model, d_model, batch_first=True)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, input_ids):
        return self.head(self.mixer(self.embedding(input_ids))[0])
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a tiny model and a text."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "config.json").write_text('{"vocab_size": 300, "d_model": 16}')
    text = "\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


@pytest.fixture
def wizard(place):
    return SetupWizard("tiny", data="file:text.txt", max_steps=4, batch_size=2, context_length=16)


def put(wizard, name, value):
    """What the browser does when a user has changed a field."""
    wizard.rows[name].widget.value = value


def test_untouched_it_describes_a_run_that_works(wizard):
    settings = wizard.settings
    assert settings.data == "file:text.txt"
    assert settings.config == preset("fast", max_steps=4, batch_size=2, context_length=16)
    assert wizard.faults == {}
    assert wizard.run_dir.parent == Path("runs")
    assert wizard.mirror is None
    estimate = wizard.estimate()
    assert estimate.possible
    run = train(wizard.fresh_model(), wizard.data, settings.config, wizard.run_dir, progress=False)
    assert run.finished


def test_every_setting_has_a_row_with_the_help_of_the_dataclass(wizard):
    texts = field_help(TrainingConfig)
    names = [name for group in grouped().values() for name in group]
    assert sorted([*names, "tracking"]) == sorted(shown_fields())
    for name in shown_fields():
        row = wizard.rows[name]
        held = row.widget.description_tooltip if major_version() == 7 else row.widget.tooltip
        assert held == texts[name]
        assert row._help.value.endswith("</div>")
    assert set(wizard.rows) >= {"model", "data", "preset", "limit_minutes", "mirror", "tracking"}


def test_values_go_through_a_row_unchanged(wizard):
    config = TrainingConfig(
        max_steps=None, max_epochs=1.5, learning_rate=1e-4, tracking="wandb,tensorboard", augment=True, schedule="wsd",
        ema_decay=0.999, session_limit_minutes=720,
    )  # fmt: skip
    for name in shown_fields():
        wizard.rows[name].put(getattr(config, name))
    assert wizard.settings.config == config
    put(wizard, "batch_size", " 1_000 ")
    assert wizard.settings.config.batch_size == 1000


def test_a_preset_fills_the_form_and_keeps_what_the_caller_changed(wizard):
    put(wizard, "preset", "tiny-gpu")
    assert wizard.settings.config == preset("tiny-gpu", max_steps=4, batch_size=2, context_length=16)
    assert "little memory" in wizard.rows["preset"]._help.value


def test_bad_values_are_told_beside_the_field_and_do_not_raise(wizard):
    put(wizard, "learning_rate", "fast")
    assert wizard.faults == {"learning_rate": "TrainingConfig.learning_rate is 'fast'. Expected a number, or auto."}
    assert "1 field(s) to correct" in wizard._status.value
    put(wizard, "learning_rate", "1e9")
    assert "Expected at most 1" in wizard.rows["learning_rate"]._error.value
    with pytest.raises(ConfigError, match=r"learning_rate is 1000000000.0.*every field of the form.*run this cell"):
        wizard.settings  # noqa: B018
    put(wizard, "learning_rate", "0.001")
    assert wizard.faults == {}
    assert wizard.settings.config.learning_rate == 0.001


def test_auto_is_a_value_and_keeps_the_samples_of_a_step(wizard):
    put(wizard, "accumulate", "3")
    put(wizard, "batch_size", "auto")
    put(wizard, "learning_rate", " Auto ")
    assert wizard.faults == {}
    config = wizard.settings.config
    assert (config.batch_size, config.accumulate, config.step_samples, config.learning_rate) == ("auto", 1, 6, "auto")
    wizard.rows["learning_rate"].put(config.learning_rate)
    assert wizard.rows["learning_rate"].widget.value == "auto"
    put(wizard, "batch_size", "4")
    assert wizard.faults == {}
    assert wizard.settings.config.step_samples is None
    put(wizard, "batch_size", "x")
    put(wizard, "batch_size", "auto")
    assert wizard.settings.config.step_samples is None
    put(wizard, "accumulate", "auto")
    assert "or nothing for none" in wizard.faults["accumulate"]


def test_two_fields_that_contradict_are_both_marked_and_shown(wizard):
    put(wizard, "max_epochs", "2")
    assert set(wizard.faults) == {"max_steps", "max_epochs"}
    assert list(grouped())[wizard._accordion.selected_index] == "How long"
    put(wizard, "max_steps", "")
    assert wizard.faults == {}
    assert wizard.settings.config.max_steps is None


def test_the_button_shows_the_estimate_and_a_change_takes_it_away(wizard):
    wizard._button.click()
    assert "This run fits." in wizard._shown.value
    assert not wizard._button.disabled
    assert wizard.estimate() is wizard.last_estimate
    put(wizard, "batch_size", "3")
    assert wizard._shown.value == ""
    assert wizard.last_estimate is None
    put(wizard, "limit_minutes", "0.000001")
    wizard._button.click()
    assert "the whole run may take" in wizard._shown.value
    with pytest.raises(ConfigError, match=r"4 steps take about .* steps would fit"):
        wizard.estimate().check()


def test_the_button_tells_what_is_wrong_with_the_data(wizard):
    put(wizard, "data", "file:nothing.txt")
    wizard._button.click()
    assert "nothing.txt" in wizard._shown.value
    with pytest.raises(DataError):
        wizard.data  # noqa: B018
    put(wizard, "batch_size", "x")
    wizard._button.click()
    assert wizard._shown.value == ""


def test_a_model_that_fails_is_told_and_raises_only_in_a_cell(wizard, place, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes <differ>")

    monkeypatch.setattr(wizard.adapter.module.mixer, "forward", fail)
    wizard._button.click()
    assert "RuntimeError: mat1 and mat2 shapes &lt;differ&gt; (wizard.estimate() in a cell" in wizard._shown.value
    assert not wizard._button.disabled
    assert "parameters" in wizard._status.value, "no longer measuring"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        wizard.estimate()
    monkeypatch.setattr(setup_wizard, "load_model", fail)
    put(wizard, "model", "example:vit")
    assert wizard.faults == {"model": "RuntimeError: mat1 and mat2 shapes <differ>"}


def test_data_is_prepared_once_for_equal_settings(wizard, monkeypatch):
    calls = []
    prepare = setup_wizard.prepare_data
    monkeypatch.setattr(setup_wizard, "prepare_data", lambda *args: calls.append(1) or prepare(*args))
    assert wizard.data is wizard.data
    put(wizard, "learning_rate", "0.002")
    assert wizard.data.reference == "file:text.txt"
    assert len(calls) == 1
    put(wizard, "context_length", "8")
    assert wizard.data.facts["length"] == 8
    assert len(calls) == 2


def test_another_model_is_loaded_and_one_that_cannot_be_is_told(wizard):
    before = wizard.loaded
    put(wizard, "model", "example:none")
    assert "no example named 'none'" in wizard.faults["model"]
    assert wizard.loaded is before
    with pytest.raises(ConfigError, match="no example named 'none'"):
        wizard.settings  # noqa: B018
    put(wizard, "model", "example:vit")
    assert wizard.loaded.name != before.name
    assert "model" not in wizard.faults
    put(wizard, "data", "")
    assert wizard.settings.data == "builtin:digits"
    with pytest.raises(ModelReferenceError):
        SetupWizard("example:none")


def test_an_uploaded_file_becomes_the_data(wizard, place):
    content = (place / "text.txt").read_bytes()
    for value in (({"name": "../mine.txt", "content": memoryview(content)},), {"mine.txt": {"content": content}}):
        assert uploaded_files(value)[0][1] == content
        wizard._upload(value)
        assert (place / "uploads" / "mine.txt").read_bytes() == content
        assert wizard.settings.data == "file:uploads/mine.txt"
    wizard._upload({"mine.txt": {"content": content + b"more"}})
    assert wizard.settings.data == "file:uploads/mine-2.txt", "a run may have been made from the first"
    assert (place / "uploads" / "mine.txt").read_bytes() == content
    wizard._upload(())
    (place / "uploads" / "mine-2.txt").unlink()
    (place / "uploads" / "mine.txt").unlink()
    (place / "uploads").rmdir()
    (place / "uploads").write_text("in the way")
    wizard._upload({"mine.txt": {"content": content}})
    assert "cannot be kept" in wizard.faults["upload"]


def test_the_second_copy_and_the_name(wizard, place):
    (place / "drive").mkdir()
    put(wizard, "mirror", str(place / "drive" / "Seedbed"))
    put(wizard, "run_name", "mine")
    assert wizard.mirror == place / "drive" / "Seedbed" / "mine"
    assert wizard.to_dict()["run_dir"] == "runs/mine"
    put(wizard, "mirror", str(place / "gone" / "Seedbed"))
    assert "There is no folder" in wizard.faults["mirror"]
    put(wizard, "mirror", "")
    put(wizard, "run_name", "a/b")
    assert "is a path" in wizard.faults["run_name"]
    put(wizard, "run_name", "")
    put(wizard, "limit_minutes", "-1")
    assert "Expected a number above 0" in wizard.faults["limit_minutes"]


def test_a_form_does_not_start_with_a_fault(place):
    with pytest.raises(ConfigError, match="no preset 'x'"):
        SetupWizard("tiny", preset="x", data="file:text.txt")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        SetupWizard("tiny", data="file:text.txt", batch_size=0)
    with pytest.raises(ConfigError, match="no setting 'batchsize'"):
        SetupWizard("tiny", data="file:text.txt", batchsize=1)


def test_it_is_shown_as_a_widget(wizard, monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    wizard._ipython_display_()
    assert shown == [wizard.form]


@pytest.mark.replica
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_this_with_the_widgets_of_colab(root, tmp_path):
    """The same tests under ipywidgets 7.7.1, in the environment with Colab's versions."""
    from tools import environment

    python = Path(environment.ensure("replica")) / "bin" / "python"
    overlay = tmp_path / "overlay"
    names = (
        "pytest",
        "pluggy",
        "iniconfig",
        "pytest-timeout",
        "pytorch-lightning",
        "torchmetrics",
        "lightning-utilities",
    )
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(overlay)]
    subprocess.run([*command, "-c", str(root / "constraints.txt"), *names], check=True, timeout=600)
    environ = {**os.environ, "PYTHONPATH": f"{root}:{overlay}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ui/test_setup_wizard.py"],
        cwd=root, env=environ, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
