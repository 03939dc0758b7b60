"""Run directories of older and newer versions."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from utils.runtime.errors import CheckpointError, RunError
from utils.training import migrations
from utils.training.checkpoint_manager import MANIFEST, CheckpointManager
from utils.training.migrations import FORMAT_VERSION, RECORDS, STATES, is_known, migrated
from utils.training.mirror import mirror_run
from utils.training.resume import open_run, resume
from utils.training.run import RECORD, read_record

# Made by the version before layout 2: a tiny GPT, stopped at step 7 of 12.
OLD = Path(__file__).parent / "data" / "run-format-1.zip"


@pytest.fixture
def old_run(tmp_path):
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "run-format-1"


def test_a_run_of_layout_1_opens_resumes_and_finishes(old_run):
    before = {path: path.read_bytes() for path in old_run.rglob("*") if path.is_file()}
    run, state = open_run(old_run)
    assert (run.step, run.total_steps, run.sessions, run.status) == (7, 12, 7, "stopped")
    assert run.config.beta2 == 0.95
    assert run.config.keep_best == 0
    assert state["progress"]["since_best"] == 0
    assert {path: path.read_bytes() for path in before} == before, "opening changes nothing"
    finished = resume(old_run, time_budget_minutes=60, progress=False)
    assert finished.finished
    assert (finished.step, finished.sessions) == (12, 8)
    assert [row["step"] for row in finished.metrics if row["split"] == "validation"] == [4, 8, 12]
    assert (old_run / RECORD).read_bytes() == before[old_run / RECORD], "the record of the start stays as it was"
    newest = json.loads((old_run / "checkpoints/step-00000012" / MANIFEST).read_text())
    assert newest["format_version"] == FORMAT_VERSION
    again, _ = open_run(old_run)
    assert again.finished


def test_the_copy_of_an_old_run_stays_its_copy(old_run, tmp_path):
    shutil.copytree(old_run, tmp_path / "drive")
    resume(old_run, time_budget_minutes=60, mirror=tmp_path / "drive", progress=False)
    mirror_run(old_run, tmp_path / "drive")
    assert open_run(tmp_path / "drive")[0].step == 12


def test_newer_layouts_are_refused_in_words(old_run):
    record = json.loads((old_run / RECORD).read_text())
    (old_run / RECORD).write_text(json.dumps({**record, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(
        RunError, match=rf"has format version {FORMAT_VERSION + 1}.*reads up to {FORMAT_VERSION}.*newer"
    ):
        open_run(old_run)
    (old_run / RECORD).write_text(json.dumps(record))
    manifest = old_run / "checkpoints/step-00000007" / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format_version": FORMAT_VERSION + 1}))
    with (
        pytest.warns(UserWarning, match=f"format version {FORMAT_VERSION + 1}; this Seedbed reads up to"),
        pytest.raises(CheckpointError, match="No usable checkpoint"),
    ):
        open_run(old_run)
    assert manifest.exists()


@pytest.mark.parametrize("version", [0, -1, FORMAT_VERSION + 1, "1", True, None, 1.0])
def test_versions_that_are_none(version):
    assert not is_known(version)


def test_each_step_of_the_migration_is_taken_and_nothing_is_changed_in_place(monkeypatch):
    monkeypatch.setattr(migrations, "FORMAT_VERSION", 4)
    table = {n: lambda value, n=n: {**value, "path": [*value["path"], n]} for n in (1, 2, 3)}
    value = {"path": []}
    assert migrated(value, 1, table) == {"path": [1, 2, 3]}
    assert migrated(value, 3, table) == {"path": [3]}
    assert migrated(value, 4, table) == {"path": []}
    assert value == {"path": []}


def test_there_is_a_migration_for_each_older_version():
    assert set(RECORDS) == set(STATES) == set(range(1, FORMAT_VERSION))


def test_a_damaged_old_record_is_no_crash(old_run):
    (old_run / RECORD).write_text('{"format_version": 1}')
    with pytest.raises(RunError, match="cannot be read .KeyError"):
        read_record(old_run)


def test_the_first_checkpoint_of_layout_1_has_no_counters(tmp_path):
    states = {"memory": {"buffers": {}, "attributes": {}}}
    now = {"memory": {"buffers": {}, "attributes": {}, "objects": {}}}
    assert migrated(states, 1, STATES) == now
    manager = CheckpointManager(tmp_path)
    manager.save(0, torch.nn.Linear(2, 2), states)
    manifest = tmp_path / "step-00000000" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 1}))
    assert manager.latest().load_into(torch.nn.Linear(2, 2)) == now


def test_losses_of_batches_become_losses_of_steps():
    """Layout 2 kept one loss for each batch; what an earlier session left may be of other batches."""
    progress = {"step": 4, "batches": 8, "pending": torch.tensor([9.0, 1.0, 3.0, 2.0, 6.0])}
    states = {"progress": progress, "memory": {"buffers": {}, "attributes": {}}}
    now = migrated(states, 2, STATES)
    assert now["progress"]["pending"].tolist() == [9.0, 2.0, 4.0]
    assert now["memory"]["objects"] == {}
    empty = migrated({"progress": {**progress, "pending": torch.zeros(0)}}, 2, STATES)
    assert empty["progress"]["pending"].tolist() == []
    assert len(progress["pending"]) == 5
