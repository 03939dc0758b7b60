import errno
import fractions
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from utils.runtime.errors import CheckpointError
from utils.runtime.files import sha256_file
from utils.training import checkpoint_manager
from utils.training.checkpoint_manager import MANIFEST, STATE, WEIGHTS, CheckpointManager
from utils.training.migrations import FORMAT_VERSION
from utils.training.weights import weights_sha256


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 4)


@pytest.fixture
def manager(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints", keep=2)


def names(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.directory.iterdir())


def test_what_is_saved_comes_back(manager, model):
    state = {"progress": {"step": 3, "pending": torch.arange(2.0)}, "optimizer": {"param_groups": [{"lr": 1e-3}]}}
    manager.save(3, model, state)
    other = nn.Linear(4, 4)
    checkpoint = manager.latest()
    loaded = checkpoint.load_into(other)
    assert checkpoint.step == 3
    assert weights_sha256(other) == weights_sha256(model)
    assert loaded["optimizer"] == state["optimizer"]
    assert torch.equal(loaded["progress"]["pending"], state["progress"]["pending"])


def test_the_newest_are_kept(manager, model):
    for step in (1, 2, 3):
        manager.save(step, model, {})
    assert names(manager) == ["step-00000002", "step-00000003"]


def test_a_good_checkpoint_is_never_pruned_for_newer_ones_that_are_damaged(manager, model):
    for step in (200, 300):
        (manager.save(step, model, {}) / STATE).write_bytes(b"torn")
    fresh = CheckpointManager(manager.directory, keep=2)
    fresh.save(100, model, {"a": 1})
    target = fresh.save(150, model, {"a": 2})
    assert target.is_dir()
    again = CheckpointManager(manager.directory, keep=2)
    with pytest.warns(UserWarning, match="does not verify"):
        assert again.latest().step == 150
    again.save(200, model, {"a": 3})
    assert names(manager) == ["step-00000150", "step-00000200", "step-00000300"]


def test_saving_a_step_again_keeps_the_good_one_and_replaces_a_damaged_one(manager, model):
    target = manager.save(1, model, {"a": 1})
    manager.save(1, model, {"a": 2})
    assert manager.latest().load_into(model) == {"a": 1}
    (target / STATE).write_bytes(b"torn")
    manager.save(1, model, {"a": 3})
    assert manager.latest().load_into(model) == {"a": 3}
    assert names(manager) == ["step-00000001"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda d: (d / WEIGHTS).write_bytes(bytes(len((d / WEIGHTS).read_bytes()))), "does not match its SHA-256"),
        (lambda d: (d / STATE).unlink(), "state.pt is missing"),
        (lambda d: (d / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda d: (d / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda d: (d / MANIFEST).write_text("[1]"), "manifest.json cannot be read"),
        (
            lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace(f": {FORMAT_VERSION},", ": 99,", 1)),
            "format version 99",
        ),
        (
            lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace('"step": 2', '"step": 5')),
            "of step 5",
        ),
        (
            lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace(STATE, "other")),
            "not in the manifest",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(manager, model, damage, words):
    manager.save(1, model, {"a": 1})
    damage(manager.save(2, model, {"a": 2}))
    with pytest.warns(UserWarning, match=f"step-00000002 does not verify .*{words}.*next older one is used"):
        checkpoint = manager.latest()
    assert checkpoint.step == 1
    assert "step-00000002" in names(manager), "what cannot be read is never deleted"


def test_no_usable_checkpoint_is_an_error_that_lists_what_is_there(manager, model):
    with pytest.raises(CheckpointError, match="No usable checkpoint in .*there is none"):
        manager.latest()
    (manager.save(1, model, {}) / STATE).unlink()
    with (
        pytest.warns(UserWarning, match=r"does not verify \(state.pt is missing\)\. It is left on disk"),
        pytest.raises(CheckpointError, match="step-00000001: state.pt is missing"),
    ):
        manager.latest()


def test_a_full_disk_leaves_the_earlier_checkpoint_alone(manager, model, monkeypatch):
    manager.save(1, model, {"a": 1})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_manager, "write_tensors", full)
    with pytest.raises(
        CheckpointError, match=r"disk is full: the checkpoint of step 2 .*step-00000001 is untouched.*Free"
    ):
        manager.save(2, model, {"a": 2})
    assert names(manager) == ["step-00000001"]
    assert manager.latest().load_into(model) == {"a": 1}


def test_another_write_error_is_passed_on_in_words(manager, model, monkeypatch):
    def broken(*args):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(checkpoint_manager, "write_tensors", broken)
    with pytest.raises(
        CheckpointError, match="step 1 could not be written: .*Transport endpoint.*no earlier checkpoint"
    ):
        manager.save(1, model, {})


def test_what_a_killed_writer_left_is_ignored_and_removed(manager, model):
    manager.save(1, model, {})
    torn = manager.directory / ".step-00000002.tmp-12345"
    torn.mkdir()
    (torn / WEIGHTS).write_bytes(b"half")
    assert manager.latest().step == 1
    manager.save(3, model, {})
    assert not torn.exists()


def test_a_state_that_needs_pickle_is_refused(manager, model):
    target = manager.save(1, model, {})
    torch.save({"x": fractions.Fraction(1, 3)}, target / STATE)
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["files"][STATE] = {"bytes": (target / STATE).stat().st_size, "sha256": sha256_file(target / STATE)}
    (target / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="state.pt cannot be read"):
        manager.latest().load_into(model)


def test_the_best_and_those_of_every_so_many_steps_stay_beside_the_newest(tmp_path, model):
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2, keep_best=1, keep_every_steps=4)
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 1.0, 6: float("inf"), 7: None, 8: None, 9: 5.0}
    for step, loss in losses.items():
        manager.save(step, model, {"step": step}, loss)
    assert names(manager) == [f"step-{step:08d}" for step in (2, 4, 8, 9)]
    best = manager.best()
    assert best.step == 2, "the earlier of equal ones"
    assert best.load_into(model) == {"step": 2}
    (best.directory / STATE).write_bytes(b"torn")
    assert manager.best().step == 4
    assert CheckpointManager(tmp_path / "none").best() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_orders_nothing(tmp_path, model, bad):
    manager = CheckpointManager(tmp_path / "checkpoints", keep=1, keep_best=1)
    for step, loss in {1: bad, 2: 1.0, 3: 2.0, 4: bad}.items():
        target = manager.save(step, model, {}, loss)
    assert names(manager) == ["step-00000002", "step-00000004"]
    assert manager.best().step == 2
    manifest = target / MANIFEST
    assert json.loads(manifest.read_text())["validation_loss"] is None
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "validation_loss": bad}))
    assert manager.best().step == 2, "an earlier version wrote the number as it was"
    shutil.rmtree(manager.directory / "step-00000002")
    assert manager.best() is None


def test_the_first_state_does_not_stay_for_ever(tmp_path, model):
    manager = CheckpointManager(tmp_path / "checkpoints", keep=1, keep_every_steps=2)
    for step in range(4):
        manager.save(step, model, {})
    assert names(manager) == ["step-00000002", "step-00000003"]


def test_what_is_being_read_is_not_removed(manager, model):
    held = manager.save(1, model, {})
    with manager.holding(held):
        for step in (2, 3, 4):
            manager.save(step, model, {})
        assert names(manager) == ["step-00000001", "step-00000003", "step-00000004"]
    manager.save(5, model, {})
    assert names(manager) == ["step-00000004", "step-00000005"]


def test_a_trusted_checkpoint_that_was_cut_short_counts_for_nothing_when_old_ones_are_removed(manager, model):
    for step in (1, 2, 3):
        target = manager.save(step, model, {})
    (target / WEIGHTS).write_bytes(b"cut")
    manager.save(4, model, {})
    assert names(manager) == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_nothing_torn_under_a_final_name(manager, model, monkeypatch):
    manager.save(1, model, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manager.shutil, "rmtree", lambda *arguments, **named: None)
        checkpoint_manager.discard(manager.directory / "step-00000001")
    assert [path.name for path in manager.directory.iterdir()] == [".step-00000001.tmp-removed"]
    manager.save(2, model, {})
    assert names(manager) == ["step-00000002"]


def test_a_type_that_the_format_does_not_know_is_named(manager):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))

    with pytest.raises(CheckpointError, match="'wave' is of type torch.complex128.*Expected one of float64"):
        manager.save(1, Odd(), {})
    assert names(manager) == []


def test_the_manifest_is_of_what_is_on_disk(manager, model):
    torch.manual_seed(0)
    big = {"x": torch.randn(700_000), "small": torch.ones(3), "nothing": torch.zeros(0)}
    target = manager.save(1, model, big)
    described = json.loads((target / MANIFEST).read_text())["files"]
    for name in (WEIGHTS, STATE):
        assert described[name] == {"bytes": (target / name).stat().st_size, "sha256": sha256_file(target / name)}
    loaded = manager.latest().load_into(model)
    assert all(torch.equal(big[name], loaded[name]) for name in big)


def test_disks_that_are_gone_altogether(manager, model, monkeypatch):
    manager.save(1, model, {})

    def gone(*arguments):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(checkpoint_manager, "write_tensors", gone)
    monkeypatch.setattr(manager, "_directories", gone)
    with pytest.raises(CheckpointError, match="step 2 could not be written.*Earlier checkpoints cannot be seen either"):
        manager.save(2, model, {})


def test_checksums_that_nothing_reads_are_left_out_of_this_file_only(manager, model, monkeypatch):
    from torch.serialization import get_crc32_options

    seen, original = [], torch.save

    def watched(*arguments):
        with ThreadPoolExecutor(1) as pool:
            seen.append((get_crc32_options(), pool.submit(get_crc32_options).result()))
        original(*arguments)

    monkeypatch.setattr(torch, "save", watched)
    manager.save(1, model, {"a": torch.ones(2)})
    assert seen == [(False, True)]
    assert get_crc32_options()
    assert torch.equal(manager.latest().load_into(model)["a"], torch.ones(2))


def test_a_pytorch_without_the_setting_writes_checksums(manager, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.serialization", None)
    with checkpoint_manager._without_checksums():
        pass


def test_weights_that_cannot_be_written_wait_for_the_state(manager, model, monkeypatch):
    """The file of the state is still on its way to the disk when that of the weights fails."""
    manager.save(1, model, {"a": 1})
    forced = []

    def slow(file):
        time.sleep(0.2)
        forced.append(file.path.name)

    def broken(*arguments):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(checkpoint_manager.HashedFile, "_force", slow)
    monkeypatch.setattr(checkpoint_manager, "write_tensors", broken)
    with pytest.raises(CheckpointError, match="disk is full: the checkpoint of step 2"):
        manager.save(2, model, {"a": torch.zeros(1000)})
    assert forced == [STATE]
    assert names(manager) == ["step-00000001"]
