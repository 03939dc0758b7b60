import errno
import shutil
from pathlib import Path

import pytest

import utils
from utils.runtime.errors import RunError
from utils.tier3_training_utilities import train_or_resume
from utils.training import mirror
from utils.training.mirror import mirror_run, newest_step
from utils.training.resume import open_run, resume, train
from utils.training.weights import weights_sha256

TINY_GPT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.1}


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock" and "__pycache__" not in path.parts
    }


def test_the_copy_is_the_run_and_follows_it(tmp_path, text_file, tiny_gpt, quick):
    run = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", mirror=tmp_path / "drive", progress=False)
    assert files(tmp_path / "drive") == files(tmp_path / "run")
    copied, _ = open_run(tmp_path / "drive")
    assert weights_sha256(copied.model) == weights_sha256(run.model)


def test_a_vanished_machine_continues_from_the_copy_bit_for_bit(tmp_path, text_file, tiny_gpt, quick):
    data = f"file:{text_file}"
    whole = train(tiny_gpt, data, quick, tmp_path / "whole", progress=False)
    short = quick.with_changes(time_budget_minutes=1e-9)
    local, drive = tmp_path / "local", tmp_path / "drive"
    train_or_resume(utils.load_model("example:gpt", config=TINY_GPT), data, short, local, mirror=drive, progress=False)
    shutil.rmtree(local)
    again = utils.load_model("example:gpt", config=TINY_GPT)
    second = train_or_resume(again, data, short, local, mirror=drive, progress=False)
    assert second.step == 2
    shutil.rmtree(local)
    train_or_resume(again, data, quick.with_changes(time_budget_minutes=60.0), local, mirror=drive, progress=False)
    rest = resume(local, time_budget_minutes=60, mirror=drive, progress=False)
    assert rest.finished
    assert weights_sha256(rest.model) == weights_sha256(whole.model)


def test_an_older_run_goes_on_from_a_copy_that_is_farther(tmp_path, text_file, tiny_gpt, quick):
    data, local, drive = f"file:{text_file}", tmp_path / "local", tmp_path / "drive"
    short = quick.with_changes(time_budget_minutes=1e-9)
    train_or_resume(tiny_gpt, data, short, local, mirror=drive, progress=False)
    shutil.copytree(local, tmp_path / "old")
    resume(local, mirror=drive, progress=False)
    shutil.rmtree(local)
    shutil.move(tmp_path / "old", local)
    mirror_run(local, drive)
    assert newest_step(drive) == 2, "a copy that is farther is not turned back"
    run = train_or_resume(tiny_gpt, data, short, local, mirror=drive, progress=False)
    assert run.step == 3


def test_a_finished_run_is_copied_when_a_folder_is_given_later(tmp_path, text_file, tiny_gpt, quick):
    data = f"file:{text_file}"
    train(tiny_gpt, data, quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    resume(tmp_path / "run", mirror=tmp_path / "drive", progress=False)
    assert files(tmp_path / "drive") == files(tmp_path / "run")


def test_no_folders_are_made_where_a_mount_vanished(tmp_path, text_file, tiny_gpt, quick):
    gone = tmp_path / "drive" / "MyDrive" / "run"
    with pytest.warns(UserWarning, match="cannot be written"):
        train(
            tiny_gpt,
            f"file:{text_file}",
            quick.with_changes(max_steps=2),
            tmp_path / "run",
            mirror=gone,
            progress=False,
        )
    assert not (tmp_path / "drive").exists()


def test_a_second_run_of_the_cell_starts_from_the_model_as_it_was_loaded(tmp_path, text_file, tiny_gpt, quick):
    data = f"file:{text_file}"
    first = train_or_resume(tiny_gpt, data, quick.with_changes(max_steps=3), tmp_path / "a", progress=False)
    second = train_or_resume(tiny_gpt, data, quick.with_changes(max_steps=3, seed=0), tmp_path / "b", progress=False)
    assert weights_sha256(first.model) == weights_sha256(second.model)


def test_a_copy_that_was_cut_short_leaves_the_older_checkpoint(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    newest = tmp_path / "run/checkpoints/step-00000024"
    older = sorted(path.name for path in newest.parent.iterdir())[:-1]
    kept = tmp_path / "kept"
    shutil.move(newest, kept)
    mirror_run(tmp_path / "run", tmp_path / "drive")
    shutil.move(kept, newest)
    original = mirror._copy_file

    def fails_on_the_manifest(path, target, known):
        if path.parent.name == newest.name and path.name == "manifest.json":
            raise OSError(errno.EIO, "Input/output error")
        original(path, target, known)

    monkeypatch.setattr(mirror, "_copy_file", fails_on_the_manifest)
    with pytest.raises(OSError, match="Input/output error"):
        mirror_run(tmp_path / "run", tmp_path / "drive")
    names = [path.name for path in (tmp_path / "drive/checkpoints").iterdir()]
    assert sorted(names) == older
    assert open_run(tmp_path / "drive")[0].step == int(older[-1].split("-")[1])


def test_the_copy_of_another_run_is_never_mixed_with_this_one(tmp_path, text_file, tiny_gpt, quick):
    data = f"file:{text_file}"
    train(tiny_gpt, data, quick.with_changes(max_steps=2), tmp_path / "a", mirror=tmp_path / "drive", progress=False)
    before = files(tmp_path / "drive")
    other = utils.load_model("example:gpt", config=TINY_GPT)
    with pytest.raises(RunError, match="drive holds a copy of another run"):
        train(other, data, quick.with_changes(seed=1), tmp_path / "b", mirror=tmp_path / "drive", progress=False)
    assert files(tmp_path / "drive") == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "data").mkdir()
    with pytest.raises(RunError, match="thesis is not empty and holds no run"):
        resume(tmp_path / "b", mirror=tmp_path / "thesis", progress=False)


def test_a_half_made_copy_is_no_run_and_is_made_anew(tmp_path, text_file, tiny_gpt, quick):
    run = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    mirror_run(run.directory, tmp_path / "drive")
    (tmp_path / "drive/run.json").unlink()
    (tmp_path / "drive/.unfinished-run").touch()
    (tmp_path / "drive/model/model.py").write_text("# half")
    with pytest.raises(RunError, match=r"without run.json"):
        open_run(tmp_path / "drive")
    (tmp_path / "drive/.metrics.csv.tmp-77").write_text("torn")
    mirror_run(run.directory, tmp_path / "drive")
    assert files(tmp_path / "drive") == files(tmp_path / "run")


def test_another_run_in_the_folder_is_refused_with_the_differences(tmp_path, text_file, tiny_gpt, quick):
    data = f"file:{text_file}"
    train(tiny_gpt, data, quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    same = utils.load_model("example:gpt", config=TINY_GPT)
    with pytest.raises(RunError, match=r"holds another run: max_steps is 2, not 3"):
        train_or_resume(same, data, quick.with_changes(max_steps=3), tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="the model has another config"):
        wider = utils.load_model("example:gpt", config={**TINY_GPT, "d_model": 64})
        train_or_resume(wider, data, quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    with pytest.raises(RunError, match=r"the model is example:gpt \(GPT\), not example:vit; the data is file:.*digits"):
        train_or_resume("example:vit", "builtin:digits", quick.with_changes(max_steps=2), tmp_path / "run")
    again = train_or_resume(same, data, quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    assert again.finished


def test_a_copy_of_another_state_of_the_same_step_is_replaced(tmp_path, text_file, tiny_gpt, quick):
    """As after a resume on another machine, whose numbers differ in their last bits."""
    run = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    mirror_run(run.directory, tmp_path / "drive")
    name = "checkpoints/step-00000002/manifest.json"
    manifest = (run.directory / name).read_text()
    (tmp_path / "drive" / name).write_text(manifest.replace('"sha256": "', '"sha256": "0', 1))
    mirror_run(run.directory, tmp_path / "drive")
    assert files(tmp_path / "drive") == files(tmp_path / "run")


def test_a_copy_that_reads_back_differently_is_no_copy(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    run = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    original = shutil.copyfile

    def flips(source, target):
        original(source, target)
        if source.name == "model.safetensors":
            content = target.read_bytes()
            target.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))

    read, real = [], mirror.sha256_file
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", flips)
        with pytest.raises(OSError, match="model.safetensors reads back differently"):
            mirror_run(run.directory, tmp_path / "drive")
    assert not (tmp_path / "drive/run.json").exists()
    monkeypatch.setattr(mirror, "sha256_file", lambda path: (read.append(path), real(path))[1])
    mirror_run(run.directory, tmp_path / "drive")
    assert files(tmp_path / "drive") == files(tmp_path / "run")
    hashed = {path.name for path in read if path.is_relative_to(run.directory)}
    assert "manifest.json" in hashed
    assert not hashed & {"model.safetensors", "state.pt", "data.safetensors"}, "their manifests hold their hashes"


def test_a_checkpoint_that_was_damaged_since_keeps_nothing_from_being_copied(tmp_path, text_file, tiny_gpt, quick):
    run = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    first, last = sorted((run.directory / "checkpoints").iterdir())
    content = (first / "state.pt").read_bytes()
    (first / "state.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    (first / "manifest.json").write_text("{")
    content = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    mirror_run(run.directory, tmp_path / "drive")
    assert files(tmp_path / "drive") == files(tmp_path / "run")
