"""A folder whose file operations fail as those of a mount do, and what a run makes of it."""

import builtins
import contextlib
import errno
import io
import json
import os
import random
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.runtime.errors import CheckpointError, RunError
from utils.training.checkpoint_manager import CheckpointManager
from utils.training.mirror import is_at_work, mirror_run, newest_step
from utils.training.resume import open_run, resume, train
from utils.training.weights import weights_sha256

NUMBERS = {
    "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "ENOTCONN": errno.ENOTCONN, "EDQUOT": errno.EDQUOT,
}  # fmt: skip
OPERATIONS = ("stat", "mkdir", "rename", "replace", "unlink", "rmdir", "listdir", "scandir", "open", "utime")


class Mount:
    """Makes what is done below one folder fail.

    Attributes:
        count: Operations so far.
        faults: What happens at which operation: a name in `NUMBERS`, ``truncate`` (the next write loses its end without
            an error) or ``vanish`` (the next file that gets its name is gone).
        seconds: How long each write takes.
    """

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.folder, self.count, self.faults, self.seconds = str(folder), 0, {}, 0.0
        self.armed: set[str] = set()
        self.resting = False
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.failing(name, getattr(os, name)))
        for name in ("writev", "fsync"):
            monkeypatch.setattr(os, name, self.failing_on_descriptor(getattr(os, name)))
        opened = self.failing("open", builtins.open)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        # Copies made inside the kernel would pass by.
        for name in ("_USE_CP_SENDFILE", "_USE_CP_COPY_FILE_RANGE"):
            monkeypatch.setattr(shutil, name, False, raising=False)

    def is_here(self, path) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)

    def step(self) -> None:
        fault = self.faults.get(self.count)
        self.count += 1
        if fault in NUMBERS:
            raise OSError(NUMBERS[fault], os.strerror(NUMBERS[fault]))
        if fault is not None:
            self.armed.add(fault)

    def failing(self, name: str, original):
        def operation(path, *arguments, **named):
            other = arguments[0] if name in ("rename", "replace") else path
            if self.resting or not (self.is_here(path) or self.is_here(other)):
                return original(path, *arguments, **named)
            self.step()
            result = original(path, *arguments, **named)
            if name in ("rename", "replace") and "vanish" in self.armed:
                self.armed.discard("vanish")
                with self.rest():
                    shutil.rmtree(other) if os.path.isdir(other) else os.unlink(other)
            mode = (arguments[0] if arguments else named.get("mode", "r")) if name == "open" else "r"
            return Written(result, self) if isinstance(mode, str) and set(mode) & set("wxa") else result

        return operation

    def failing_on_descriptor(self, original):
        def operation(descriptor, *pieces):
            if self.resting or not self.is_here(os.readlink(f"/proc/self/fd/{descriptor}")):
                return original(descriptor, *pieces)
            self.step()
            if not pieces:
                return original(descriptor)
            time.sleep(self.seconds)
            data = b"".join(pieces[0])
            if "truncate" in self.armed and len(data) > 1:
                self.armed.discard("truncate")
                original(descriptor, [data[: len(data) // 2]])
                return len(data)
            return original(descriptor, *pieces)

        return operation

    @contextlib.contextmanager
    def rest(self):
        """Let everything work for a while."""
        before, self.resting = self.resting, True
        try:
            yield
        finally:
            self.resting = before


class Written:
    """A file that is written to the mount."""

    def __init__(self, stream, mount: Mount) -> None:
        self.stream, self.mount = stream, mount

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.stream.close()

    def write(self, data):
        if not self.mount.resting:
            self.mount.step()
            time.sleep(self.mount.seconds)
            if "truncate" in self.mount.armed and len(data) > 1:
                self.mount.armed.discard("truncate")
                self.stream.write(data[: len(data) // 2])
                return len(data)
        return self.stream.write(data)


def loads(directory: Path) -> int:
    """Load the newest checkpoint that verifies and return its step."""
    model = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = CheckpointManager(directory).latest()
    state = checkpoint.load_into(model)
    assert state["step"] == checkpoint.step
    assert torch.equal(model.weight, torch.full((8, 8), float(checkpoint.step)))
    return checkpoint.step


def saved(manager: CheckpointManager, step: int) -> None:
    """Write the checkpoint of a step of something like a run."""
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.fill_(float(step))
    manager.save(step, model, {"step": step, "filling": torch.zeros(100)}, loss=1.0 / (step + 1))


def drawn(draw: random.Random, operations: int) -> dict[int, str]:
    """Return a random sequence of faults: single ones, and outages of some length."""
    faults: dict[int, str] = {}
    for _ in range(draw.randint(1, 4)):
        kind, start = draw.choice([*NUMBERS, "truncate", "vanish"]), draw.randrange(operations)
        length = 1 if kind in ("truncate", "vanish") else draw.choice([1, 1, 2, 10, 60])
        faults |= dict.fromkeys(range(start, start + length), kind)
    return faults


@pytest.mark.parametrize("seed", range(12))
def test_after_any_faults_the_newest_local_checkpoint_that_verifies_loads(tmp_path, monkeypatch, seed):
    for number in range(8):
        draw = random.Random(seed * 100 + number)
        folder = tmp_path / str(number) / "checkpoints"
        manager = CheckpointManager(folder, keep=draw.randint(1, 3), keep_best=draw.randint(0, 1))
        saved(manager, 0)
        with monkeypatch.context() as patch:
            mount = Mount(patch, folder)
            mount.faults = drawn(draw, 250)
            done = 0
            for step in range(1, 9):
                with contextlib.suppress(CheckpointError):
                    saved(manager, step)
                    done = step
                with mount.rest():
                    assert loads(folder) >= done, "a checkpoint that was written is lost"
            assert mount.count > 8
        saved(manager, 20)
        assert loads(folder) == 20
        assert not list(folder.glob(".*")), "nothing half-written stays"


@pytest.mark.parametrize("seed", range(12))
def test_after_any_faults_the_copy_loads_and_in_the_end_verifies(tmp_path, monkeypatch, seed):
    for number in range(6):
        draw = random.Random(seed * 1000 + number)
        run, drive = tmp_path / str(number) / "run", tmp_path / str(number) / "drive"
        (run / "model").mkdir(parents=True)
        (run / "model" / "model.py").write_text("# a model")
        (run / "run.json").write_text(json.dumps({"id": number}))
        manager = CheckpointManager(run / "checkpoints", keep=draw.randint(1, 2))
        saved(manager, 0)
        with monkeypatch.context() as patch:
            mount = Mount(patch, drive)
            mount.faults = drawn(draw, 600)
            copied = -1
            for step in range(1, 7):
                saved(manager, step)
                (run / "metrics.csv").write_text("step\n" * step)
                try:
                    mirror_run(run, drive, manager)
                    copied = step
                except (OSError, RunError):
                    pass
                with mount.rest():
                    assert loads(run / "checkpoints") == step
                    if copied >= 0:
                        assert (drive / "run.json").exists()
                        assert loads(drive / "checkpoints") >= copied
        mirror_run(run, drive, manager)
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert sorted(path.name for path in (drive / "checkpoints").iterdir()) == names
        assert all(manager.problem(drive / "checkpoints" / name) is None for name in names)
        for name in ("run.json", "metrics.csv", "model/model.py"):
            assert (drive / name).read_bytes() == (run / name).read_bytes(), name
        assert not list(drive.rglob(".*")), "nothing half-written stays"


class FailsFrom:
    """Lets a mount fail from a step of the training on, for some operations."""

    def __init__(self, mount: Mount, kind: str, operations: int, step: int = 5) -> None:
        self.mount, self.kind, self.operations, self.step_number = mount, kind, operations, step

    def start(self, run):
        pass

    def update(self, rows):
        if rows[-1]["step"] == self.step_number and not self.mount.faults:
            # Between two copies: what fails while one removes the old is not missed.
            while is_at_work(Path(self.mount.folder)):
                time.sleep(0.005)
            first = self.mount.count
            self.mount.faults = dict.fromkeys(range(first, first + self.operations), self.kind)

    def close(self, rows):
        pass


@pytest.mark.parametrize("kind", NUMBERS)
def test_training_goes_on_while_the_mount_fails_with_one_warning_for_each_outage(
    tmp_path, text_file, tiny_gpt, quick, monkeypatch, kind
):
    drive = tmp_path / "drive"
    with monkeypatch.context() as patch:
        mount = Mount(patch, drive)
        outage = FailsFrom(mount, kind, 2)
        with pytest.warns(UserWarning, match="drive cannot be written .*Training goes on.*tried again") as caught:
            run = train(
                tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", mirror=drive, progress=False, observers=[outage]
            )
    assert run.finished
    assert len([warning for warning in caught if "drive" in str(warning.message)]) == 1
    whole_and_equal(run, drive)


@pytest.mark.parametrize("kind", ["truncate", "vanish"])
def test_what_a_mount_loses_without_a_word_is_written_again(tmp_path, text_file, tiny_gpt, quick, monkeypatch, kind):
    drive = tmp_path / "drive"
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outage = FailsFrom(Mount(patch, drive), kind, 1)
        run = train(
            tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", mirror=drive, progress=False, observers=[outage]
        )
    assert run.finished
    whole_and_equal(run, drive)


def whole_and_equal(run, drive: Path) -> None:
    """Compare a run with its copy."""
    assert newest_step(drive) == 24
    copied, _ = open_run(drive)
    assert weights_sha256(copied.model) == weights_sha256(run.model)
    assert all(run.checkpoints.problem(path) is None for path in (drive / "checkpoints").iterdir())


def test_a_run_on_a_slow_mount_that_loses_its_disk_for_a_while_is_not_lost(
    tmp_path, text_file, tiny_gpt, quick, monkeypatch
):
    """The run directory itself is on the mount."""
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        mount = Mount(patch, directory / "checkpoints")
        mount.seconds = 0.001
        outage = FailsFrom(mount, "ENOTCONN", 8)
        with pytest.warns(UserWarning, match="could not be written.*Training goes on"):
            run = train(tiny_gpt, f"file:{text_file}", quick, directory, progress=False, observers=[outage])
    assert run.status in ("finished", "finished, but not saved")
    assert run.lost_checkpoints >= 1
    again = resume(directory, progress=False)
    assert again.finished
    assert weights_sha256(again.model) == weights_sha256(run.model)


def test_a_quota_is_found_before_anything_is_written(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path / "checkpoints")
    saved(manager, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with (
        Counting(monkeypatch) as written,
        pytest.raises(
            CheckpointError, match=r"disk is full: the checkpoint of step 2 .*1.0 kB free.*step-00000001 is untouched"
        ),
    ):
        saved(manager, 2)
    assert written.names == []
    assert loads(manager.directory) == 1


class Counting:
    """Notes the names of the files that are opened for writing."""

    def __init__(self, monkeypatch) -> None:
        self.names: list[str] = []
        original = builtins.open

        def noting(path, mode="r", *arguments, **named):
            if "w" in mode:
                self.names.append(str(path))
            return original(path, mode, *arguments, **named)

        monkeypatch.setattr(builtins, "open", noting)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        pass


def test_metrics_that_cannot_be_written_at_a_resume_are_kept(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    short = quick.with_changes(time_budget_minutes=1e-9, log_every_steps=1)
    train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)
    with monkeypatch.context() as patch:
        mount = Mount(patch, tmp_path / "run" / ".metrics.csv")
        mount.faults = dict.fromkeys(range(1, 3), "ENOSPC")
        with pytest.warns(UserWarning, match=r"metrics.csv cannot be written .No space left.*kept in memory"):
            run = resume(tmp_path / "run", progress=False)
    assert [row["step"] for row in run.metrics if row["split"] == "train"] == [1, 2]
