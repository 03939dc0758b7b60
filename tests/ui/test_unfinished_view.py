import json
import shutil

import pytest

import utils
from utils.runtime.errors import RunError
from utils.tier3_training_utilities import train_or_resume
from utils.training.config import TrainingConfig
from utils.training.resume import train
from utils.training.unfinished import unfinished_runs
from utils.ui.setup_wizard import SetupWizard, set_up
from utils.ui.unfinished_view import ContinuedRun, UnfinishedRuns

SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
CONFIG = TrainingConfig(max_steps=400, batch_size=2, context_length=16, checkpoint_every_steps=2, val_every_steps=500)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run that its time budget stopped, and a finished one."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder.parent / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400)))
    for name, changes in (("one", {"time_budget_minutes": 0.002}), ("done", {"max_steps": 2})):
        loaded = utils.load_model("example:gpt", config=SMALL)
        train(loaded, f"file:{text}", CONFIG.with_changes(**changes), folder / name, progress=False)
    return folder


@pytest.fixture
def runs(stopped, tmp_path):
    """A copy of that folder that a test may change."""
    return shutil.copytree(stopped, tmp_path / "runs")


def test_nothing_to_continue(tmp_path):
    found = UnfinishedRuns([tmp_path / "runs", None])
    assert found.chosen is None and found.choice is None and found.mirror is None
    assert str(found) == "No unfinished run was found."


def test_a_stopped_run_is_offered_and_goes_on_when_it_is_chosen(runs):
    found = UnfinishedRuns([runs])
    assert [run.directory.name for run in found.runs] == ["one"]
    assert found.chosen is None, "nobody has chosen yet: Run all goes on with the form"
    assert isinstance(set_up("example:gpt", found, max_steps=5), SetupWizard)
    found.choice.value = 0
    going = set_up("example:vit", found)
    assert isinstance(going, ContinuedRun)
    assert going.run_dir == runs / "one" and going.mirror is None
    assert "goes on at step" in going._repr_html_() and "of the run that is continued" in going._repr_html_()
    estimate = going.estimate()
    assert estimate.possible and estimate.steps == 400 - going.step
    config = going.settings.config
    run = train_or_resume(going.loaded, going.data, config, going.run_dir, mirror=going.mirror, progress=False)
    assert run.sessions == 2 and run.step > going.step


def test_a_run_that_is_only_on_drive_is_brought_back(runs, tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    shutil.move(runs / "one", drive / "one")
    found = UnfinishedRuns([runs, drive])
    found.choice.value = 0
    assert found.mirror == drive / "one"
    assert found.chosen == runs / "one"
    assert (runs / "one" / "run.json").is_file()


def test_of_two_copies_the_farther_one_counts(runs, tmp_path):
    drive = tmp_path / "drive"
    shutil.copytree(runs, drive)
    newest = max((runs / "one" / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    found = UnfinishedRuns([runs, drive])
    assert [run.directory for run in found.runs] == [drive / "one"]


def test_what_cannot_be_read_is_told(runs, tmp_path):
    (runs / "one" / "run.json").write_text("{")
    found = UnfinishedRuns([runs, tmp_path / "gone" / "Seedbed"])
    assert found.runs == []
    assert "one is left out" in found.problems[0]
    assert "There is no folder" in found.problems[1]
    assert "left out" in str(found)


def test_a_run_without_its_source_is_refused(runs):
    shutil.rmtree(runs / "one" / "model")
    with pytest.raises(RunError, match=r"bare GPT and has no source.*utils.resume\(run_dir, model="):
        ContinuedRun(runs / "one")


def test_it_is_shown(runs, monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    found = UnfinishedRuns([runs])
    found._ipython_display_()
    UnfinishedRuns([runs / "none"])._ipython_display_()
    assert found.choice in shown[0].children and "1 unfinished run." in shown[0].children[0].value
    assert "No unfinished run" in shown[1].data


def other(runs, name):
    """Make a run another one of the same name."""
    record = json.loads((runs / name / "run.json").read_text())
    (runs / name / "run.json").write_text(json.dumps({**record, "id": "0123456789abcdef"}))


def test_two_runs_of_the_same_name_can_both_be_chosen(runs, tmp_path):
    drive = tmp_path / "drive"
    shutil.copytree(runs, drive)
    other(drive, "one")
    found = UnfinishedRuns([runs, drive])
    assert {run.directory for run in found.runs} == {runs / "one", drive / "one"}
    chosen = {}
    for number, run in enumerate(found.runs):
        found.choice.value = number
        chosen[run.directory] = (found.chosen, found.mirror)
    assert chosen == {
        runs / "one": (runs / "one", None),
        drive / "one": (runs / "one-01234567", drive / "one"),
    }
    again = UnfinishedRuns([runs, drive])
    assert len(again.runs) == 2, "the one that was brought back and its copy are one"
    again.choice.value = next(n for n, run in enumerate(again.runs) if run.id.startswith("0123"))
    assert (again.chosen, again.mirror) == (runs / "one-01234567", drive / "one")


def test_a_finished_copy_is_the_copy_of_a_run_that_is_behind(runs, tmp_path, monkeypatch):
    drive = tmp_path / "drive"
    shutil.copytree(runs, drive)
    monkeypatch.setattr(UnfinishedRuns, "_look", lambda self, folder: unfinished_runs(runs) if folder == runs else [])
    found = UnfinishedRuns([runs, drive, None])
    found.choice.value = 0
    assert (found.chosen, found.mirror) == (runs / "one", drive / "one")
