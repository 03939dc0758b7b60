import errno
import sys
import threading
import time

import pytest
import torch
from torch import nn

from utils.runtime.errors import RunError
from utils.training import background, checkpoint_manager, mirror, session_callback
from utils.training.background import CheckpointWriter, Worker, copy_at_the_end, within
from utils.training.checkpoint_manager import CheckpointManager, take_snapshot
from utils.training.resume import open_run, train
from utils.training.training_module import TrainingModule
from utils.training.weights import read_weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_a_snapshot_does_not_follow_what_changes_later(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    average = {"average": {"w": model.weight.detach()}}
    snapshot = take_snapshot(1, model, {"optimizer": optimizer.state_dict(), "average": average}, 0.5)
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    moment = snapshot.state["optimizer"]["state"][0]["exp_avg"].clone()
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot.tensors.items())
    assert torch.equal(snapshot.state["optimizer"]["state"][0]["exp_avg"], moment)
    assert torch.equal(snapshot.state["average"]["average"]["w"], before["weight"])
    assert not torch.equal(model.weight, before["weight"])
    assert snapshot.nbytes >= 3 * sum(tensor.nbytes for tensor in before.values())


def test_a_slow_disk_delays_no_step_and_the_next_checkpoint_comes_later(
    tmp_path, text_file, tiny_gpt, quick, monkeypatch
):
    """While one checkpoint is being written, and that takes until training is over, all steps are done.

    Only the best state of these steps waits for its turn.
    """
    training_is_over, written = threading.Event(), []
    original = CheckpointManager.write

    def slow(self, snapshot):
        written.append(snapshot.step)
        if snapshot.step and len(written) == 2:
            assert training_is_over.wait(60), "training waited for the disk"
        return original(self, snapshot)

    class Watch:
        def start(self, run):
            pass

        def update(self, rows):
            if rows[-1]["step"] == 24:
                training_is_over.set()

        def close(self, rows):
            pass

    monkeypatch.setattr(CheckpointManager, "write", slow)
    run = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", progress=False, observers=[Watch()])
    assert run.finished
    assert written == [0, 4, 18, 24]
    assert [path.name for path in sorted(run.checkpoints.directory.iterdir())][-1] == "step-00000024"


def test_a_checkpoint_that_stays_for_ever_is_never_left_out(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    original = CheckpointManager.write

    def slow(self, snapshot):
        time.sleep(0.15)
        return original(self, snapshot)

    monkeypatch.setattr(CheckpointManager, "write", slow)
    config = quick.with_changes(keep_every_steps=3, keep_best=0, keep_checkpoints=1)
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    kept = {path.name for path in run.checkpoints.directory.iterdir()}
    assert kept == {f"step-{step:08d}" for step in range(3, 25, 3)}


def test_the_worker_replaces_what_waits_and_says_when_it_is_full():
    worker, go, done = Worker("test"), threading.Event(), []
    worker.submit(lambda: (go.wait(10), done.append(1)))
    worker.wait_for_room()
    assert worker.busy
    assert not worker.full
    worker.submit(lambda: done.append(2))
    worker.submit(lambda: done.append(3))
    assert worker.full
    assert not worker.wait(0.01)
    go.set()
    assert worker.wait(10)
    assert done == [1, 3]
    assert not worker.busy


def test_a_worker_outlives_what_its_work_raises():
    worker, done = Worker("test"), []
    worker.submit(lambda: sys.exit(1))
    assert worker.wait(10)
    assert [type(error) for error in worker.failures()] == [SystemExit]
    assert worker.failures() == []
    worker.submit(lambda: done.append(1))
    assert worker.wait(10)
    assert done == [1]


def test_work_that_has_not_begun_can_be_withdrawn():
    worker, go, done = Worker("test"), threading.Event(), []
    worker.submit(lambda: go.wait(10))
    worker.wait_for_room()
    worker.submit(lambda: done.append(1))
    assert worker.withdraw()
    assert not worker.withdraw()
    go.set()
    assert worker.wait(10)
    assert done == []


def test_a_machine_without_room_for_a_thread_saves_all_the_same(tmp_path, model, monkeypatch):
    def full(thread):
        raise RuntimeError("can't start new thread")

    writer = CheckpointWriter(CheckpointManager(tmp_path / "checkpoints"), tmp_path, tmp_path / "drive")
    monkeypatch.setattr(writer.checkpoints, "write", lambda snapshot: written.append(snapshot.step))
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        writer.write(take_snapshot(1, model, {}))
        with pytest.warns(UserWarning, match="drive cannot be written .RuntimeError: can't start new thread"):
            writer.finish()
        worker = Worker("test")
        with pytest.raises(RuntimeError, match="can't start"):
            worker.submit(lambda: None)
        assert worker.wait(0)
    assert (written, writer.saved_step) == ([1], 1)
    worker.submit(lambda: written.append(2))
    assert worker.wait(10)
    assert written == [1, 2]


def test_what_ends_a_thread_is_told(tmp_path, model, monkeypatch):
    writer = CheckpointWriter(CheckpointManager(tmp_path / "checkpoints"), tmp_path, None)
    with monkeypatch.context() as patch:
        patch.setattr(writer.checkpoints, "write", lambda snapshot: sys.exit("gone"))
        writer.write(take_snapshot(1, model, {}))
        with pytest.warns(UserWarning, match="thread for the checkpoints met SystemExit: gone. Training goes on"):
            writer.finish()
    assert writer.saved_step == 0
    writer.write(take_snapshot(2, model, {}))
    writer.finish()
    assert writer.saved_step == 2


def test_the_best_waits_for_its_turn_and_makes_way_for_a_better_one_only(tmp_path, model, monkeypatch):
    """While step 1 is written: 2 waits, 3 is better and takes its place, 4 stays for ever and is taken after 3."""
    go, written = threading.Event(), []
    writer = CheckpointWriter(CheckpointManager(tmp_path, 1, 1, keep_every_steps=4), tmp_path, None)
    monkeypatch.setattr(writer.checkpoints, "write", lambda snapshot: (go.wait(10), written.append(snapshot.step)))
    writer.write(take_snapshot(1, model, {}, 5.0))
    writer._writer.wait_for_room()
    for step, loss in ((2, 4.0), (3, 3.0)):
        writer.make_room(loss)
        writer.write(take_snapshot(step, model, {}, loss))
    waits = threading.Thread(target=writer.make_room, args=(3.5,))
    waits.start()
    waits.join(0.05)
    assert waits.is_alive(), "the better one is not given up"
    go.set()
    waits.join(10)
    go.clear()
    writer.write(take_snapshot(4, model, {}, 3.5))
    waits = threading.Thread(target=writer.make_room, args=(2.0,))
    waits.start()
    waits.join(0.05)
    go.set()
    waits.join(10)
    writer.write(take_snapshot(5, model, {}, 2.0))
    writer.finish()
    assert written == [1, 3, 4, 5]


def test_the_best_of_a_run_is_saved_while_the_disk_is_busy(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    losses = iter([3.0, 2.0, 1.0, 4.0, 5.0, 6.0])
    rows, last = threading.Event(), "validation"
    original = CheckpointManager.write

    def slow(self, snapshot):
        assert not snapshot.step or rows.wait(30)
        return original(self, snapshot)

    class Watch:
        def start(self, run):
            pass

        def update(self, seen):
            if sum(row["split"] == last for row in seen) == 4:
                rows.set()

        def close(self, seen):
            pass

    monkeypatch.setattr(CheckpointManager, "write", slow)
    monkeypatch.setattr(session_callback, "evaluate", lambda *arguments: {"loss": next(losses)})
    config = quick.with_changes(max_steps=6, val_every_steps=1, keep_checkpoints=1)
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False, observers=[Watch()])
    assert run.checkpoints.best().step == 3
    assert sorted(path.name for path in run.checkpoints.directory.iterdir()) == ["step-00000003", "step-00000006"]


def test_a_disk_that_fails_is_told_once_until_it_has_worked_again(tmp_path, model, monkeypatch):
    fails = iter([True, True, False, True])
    original = checkpoint_manager.write_tensors

    def sometimes(*arguments):
        if next(fails):
            raise OSError(errno.EIO, "Input/output error")
        original(*arguments)

    monkeypatch.setattr(checkpoint_manager, "write_tensors", sometimes)
    writer = CheckpointWriter(CheckpointManager(tmp_path / "checkpoints"), tmp_path, None)
    told = []
    for step in (1, 2, 3, 4):
        with pytest.warns() if step in (1, 4) else _silence() as caught:
            writer.write(take_snapshot(step, model, {}))
            writer.finish()
        told += [str(warning.message) for warning in caught or ()]
    assert len(told) == 2
    assert all("could not be written" in text and "Training goes on" in text for text in told)
    assert (writer.lost, writer.saved_step) == (3, 3)


def _silence():
    import warnings
    from contextlib import contextmanager

    @contextmanager
    def block():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield None

    return block()


def test_a_fault_of_our_own_does_not_end_saving(tmp_path, model, monkeypatch):
    writer = CheckpointWriter(CheckpointManager(tmp_path / "checkpoints"), tmp_path, None)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "write", lambda *arguments: {}["x"])
        writer.write(take_snapshot(1, model, {}))
        with pytest.warns(UserWarning, match="step 1 could not be written .KeyError: 'x'"):
            writer.finish()
    writer.write(take_snapshot(2, model, {}))
    writer.finish()
    assert writer.saved_step == 2


def test_a_second_copy_that_hangs_is_given_up_at_the_end(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    release, drive = threading.Event(), tmp_path / "drive"
    original = mirror._mirror

    def hangs(directory, target, checkpoints):
        release.wait(60)
        original(directory, target, checkpoints)

    monkeypatch.setattr(mirror, "_mirror", hangs)
    monkeypatch.setattr(CheckpointWriter, "PATIENCE", 0.2)
    with pytest.warns(UserWarning, match="drive is not complete after 0 s of waiting.*copy it by hand") as caught:
        run = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", mirror=drive, progress=False)
    assert run.finished
    assert len([warning for warning in caught if "not complete" in str(warning.message)]) == 2, "two ends of a session"
    with pytest.raises(OSError, match="an earlier copy has not come back"):
        mirror.mirror_run(tmp_path / "run", drive)
    release.set()
    deadline = time.monotonic() + 20
    while mirror.is_at_work(drive) and time.monotonic() < deadline:
        time.sleep(0.01)
    mirror.mirror_run(tmp_path / "run", drive)
    assert open_run(drive)[0].step == 24


def test_work_that_hangs_is_given_up_and_faults_come_through():
    assert within(10, lambda: None)
    assert not within(0.01, lambda: time.sleep(0.5))
    with pytest.raises(RunError, match="no"):
        within(10, lambda: (_ for _ in ()).throw(RunError("no")))


def test_the_end_waits_for_a_copy_and_says_when_it_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "PATIENCE", 0.05)
    monkeypatch.setattr(background, "mirror_run", lambda *arguments: time.sleep(0.5))
    with pytest.warns(UserWarning, match="is not complete"):
        copy_at_the_end(tmp_path, tmp_path / "drive")


def test_a_checkpoint_under_way_becomes_whole_when_training_fails(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    original = CheckpointManager.write

    def slow(self, snapshot):
        time.sleep(0.3 if snapshot.step else 0)
        return original(self, snapshot)

    steps = []

    def fails(self, batch):
        steps.append(batch)
        if len(steps) == 5:
            raise RuntimeError("somebody's fault")
        return step(self, batch)

    step = TrainingModule._step
    monkeypatch.setattr(TrainingModule, "_step", fails)
    monkeypatch.setattr(CheckpointManager, "write", slow)
    with pytest.raises(RuntimeError, match="somebody's fault"):
        train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    assert read_weights(tmp_path / "run/checkpoints/step-00000004/model.safetensors")
    assert open_run(tmp_path / "run")[0].step == 4
