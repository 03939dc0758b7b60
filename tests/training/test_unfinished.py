import json
import os
import shutil

import pytest

from utils.runtime.errors import RunError
from utils.training.resume import resume, train
from utils.training.unfinished import unfinished_runs


@pytest.fixture
def stopped(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9)
    folder = tmp_path / "runs"
    train(tiny_gpt, f"file:{text_file}", short, folder / "first", progress=False)
    return folder


def test_runs_that_can_be_continued_are_found_without_loading_them(stopped):
    (stopped / "notes").mkdir()
    (stopped / "readme.txt").write_text("mine")
    (run,) = unfinished_runs(stopped)
    assert (run.directory, run.model, run.step, run.total_steps) == (stopped / "first", "GPT", 1, 24)
    assert run.status == "stopped by its time budget"
    assert "GPT on file:" in str(run)
    assert "step 1 of 24" in str(run)
    assert unfinished_runs(stopped / "first") == [run]
    resume(run.directory, time_budget_minutes=60, progress=False)
    assert unfinished_runs(stopped) == []


def test_a_killed_run_is_told_from_one_that_stopped_and_the_newest_is_first(stopped):
    shutil.copytree(stopped / "first", stopped / "second")
    (stopped / "second" / "summary.json").unlink()
    newest = stopped / "second" / "checkpoints" / "step-00000001"
    os.utime(newest, (2e9, 2e9))
    found = unfinished_runs(stopped)
    assert [(run.directory.name, run.status) for run in found] == [
        ("second", "killed"),
        ("first", "stopped by its time budget"),
    ]


def test_early_stopping_and_epochs_are_understood(stopped):
    path = stopped / "first" / "run.json"
    record = json.loads(path.read_text())
    record["config"] |= {"max_steps": None, "max_epochs": 1.0}
    path.write_text(json.dumps(record))
    (run,) = unfinished_runs(stopped)
    assert run.total_steps == round(record["data"]["train_samples"] / 4)
    summary = stopped / "first" / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "status": "finished early"}))
    assert unfinished_runs(stopped) == []


def test_what_cannot_be_read_is_left_out_with_a_warning(stopped):
    shutil.copytree(stopped / "first", stopped / "broken")
    (stopped / "broken" / "run.json").write_text("{")
    shutil.copytree(stopped / "first", stopped / "empty")
    shutil.rmtree(stopped / "empty" / "checkpoints")
    with pytest.warns(UserWarning, match="is left out") as caught:
        found = unfinished_runs(stopped)
    assert [run.directory.name for run in found] == ["first"]
    texts = " ".join(str(warning.message) for warning in caught)
    assert "broken is left out" in texts
    assert "has no checkpoint" in texts


def test_no_folder_is_no_run_and_no_drive_is_an_error(tmp_path, monkeypatch):
    assert unfinished_runs(tmp_path / "runs") == []
    with pytest.raises(RunError, match="There is no folder .*MyDrive.*mount Drive"):
        unfinished_runs(tmp_path / "drive" / "MyDrive" / "runs")

    def gone(path):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(type(tmp_path), "is_dir", gone)
    with pytest.raises(RunError, match="cannot be read .Transport endpoint.*Mount Drive again"):
        unfinished_runs(tmp_path)
