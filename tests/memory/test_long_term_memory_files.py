import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.memory.references import WAYS, points
from utils.memory import memory_files, saved_folder
from utils.memory.long_term_memory import LongTermMemory
from utils.memory.memory_files import KIND
from utils.memory.saved_folder import MANIFEST
from utils.memory.vector_index import IndexConfig
from utils.runtime.errors import CheckpointError, ConfigError, DataError
from utils.runtime.files import own_hash, sha256_file

HELD = {MANIFEST, ".lock"}


def filled(config=None, metric="cosine", count=90, **options):
    memory = LongTermMemory(metric=metric, config=config or IndexConfig("torch"), **options)
    table = points(count)
    memory.add(table[:30], [{"row": row, "text": "é 🙂 \ud800 \n"} for row in range(30)], domain="a b")
    memory.add(table[30:], ids=np.arange(count, 30, -1) * 10**15)
    memory.delete([4, 7])
    return memory


def same(one, other):
    queries = points(5, seed=1)
    a, b = one.search(queries, 20), other.search(queries, 20)
    keys = one.ids()
    assert keys.tolist() == other.ids().tolist() and one.domains == other.domains
    assert np.array_equal(one.get(keys).vectors, other.get(keys).vectors)
    assert one.get(keys).metadata == other.get(keys).metadata and one.get(keys).domains == other.get(keys).domains
    return a.ids.tolist() == b.ids.tolist() and np.allclose(a.scores, b.scores, atol=1e-6)


@pytest.mark.parametrize("written", WAYS)
@pytest.mark.parametrize("read", WAYS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_what_is_loaded_is_what_was_saved(tmp_path, written, read, metric):
    memory = filled(WAYS[written], metric)
    memory.save(tmp_path / "deep" / "memory")
    again = LongTermMemory.load(tmp_path / "deep" / "memory", config=WAYS[read])
    assert same(memory, again) or "lists" in (written, read)
    assert again.add(points(1)).tolist() == [90 * 10**15 + 1], "ids of what was deleted are not chosen again"
    if written == read == "lists":
        assert again.recall == memory.recall and again.method == memory.method
        assert same(memory, LongTermMemory.load(tmp_path / "deep" / "memory")), "it searches as it was saved to"


def test_the_files_are_safetensors_and_json(tmp_path):
    memory = filled(WAYS["lists"])
    memory.save(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert {path.name for path in tmp_path.iterdir()} == HELD | {"vectors-1.safetensors", "metadata-1.jsonl"}
    tensors = load_file(tmp_path / "vectors-1.safetensors")
    assert set(tensors) == {"ids", "domains", "vectors", "centroids", "list_sizes", "trained_on"}
    for key, vector in zip(tensors["ids"], tensors["vectors"], strict=True):
        assert np.array_equal(memory.get([key]).vectors[0], vector)
    lines = [json.loads(line) for line in (tmp_path / "metadata-1.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [key for key in range(30) if key not in (4, 7)]
    assert manifest["format"] == KIND.format and manifest["count"] == 88 and manifest["metric"] == "cosine"


def test_an_empty_memory_and_one_of_no_width(tmp_path):
    for config in WAYS.values():
        memory = LongTermMemory(5, config=config)
        memory.save(tmp_path / "m", overwrite=True)
        again = LongTermMemory.load(tmp_path / "m")
        assert len(again) == 0 and again.dimension == 5 and again.search(np.ones(5)).found == 0
        again.add(np.ones((2, 5)))
        again.delete(again.ids())
        again.save(tmp_path / "m")
        assert LongTermMemory.load(tmp_path / "m").add(np.ones(5)).tolist() == [2]
    with pytest.raises(DataError, match="the width of its vectors is not known"):
        LongTermMemory().save(tmp_path / "n")


def test_a_second_save_replaces_the_first_and_its_files(tmp_path):
    memory = filled()
    memory.save(tmp_path)
    memory.add(points(1), {"new": True})
    memory.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == HELD | {"vectors-2.safetensors", "metadata-2.jsonl"}
    assert same(memory, LongTermMemory.load(tmp_path))


def files_of(place):
    manifest = json.loads((place / MANIFEST).read_text())
    return {role: place / entry["name"] for role, entry in manifest["files"].items()} | {"manifest": place / MANIFEST}


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("vectors", cut, "is torn: it has .* bytes of"),
        ("metadata", cut, "is torn: it has .* bytes of"),
        ("manifest", cut, "cannot be read"),
        ("vectors", flip, "was changed or torn after it was written: its hash is another"),
        ("metadata", flip, "was changed or torn after it was written: its hash is another"),
        ("vectors", lambda path: path.unlink(), "is missing"),
        ("metadata", lambda path: path.unlink(), "is missing"),
        ("manifest", lambda path: path.unlink(), "There is no long-term memory in"),
        ("manifest", lambda path: path.write_text("{}"), "is no manifest of a long-term memory"),
        ("manifest", lambda path: path.write_text("[" * 100_000), "cannot be read"),
        (
            "manifest",
            lambda path: path.write_text(path.read_text().replace('"cosine"', '"l2"')),
            "was changed after it was written",
        ),
        (
            "manifest",
            lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')),
            "is of version 2. Expected version 1. Load it with the Seedbed that wrote it",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, role, change, message):
    filled().save(tmp_path)
    change(files_of(tmp_path)[role])
    with pytest.raises(CheckpointError, match=message):
        LongTermMemory.load(tmp_path)


def forged(place, **changes):
    """Write a manifest with right hashes that says something else."""
    manifest = json.loads((place / MANIFEST).read_text()) | changes
    for role, entry in manifest["files"].items():
        if isinstance(entry, dict) and (place / str(entry["name"])).is_file():
            path = place / entry["name"]
            entry.update(bytes=path.stat().st_size, sha256=sha256_file(path))
            manifest["files"][role] = entry
    manifest["sha256"] = own_hash(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 7}, "holds no ids of the shape"),
        ({"dimension": 4}, "holds no vectors of the shape"),
        ({"count": "7"}, "says nothing usable about 'count'"),
        ({"count": True}, "says nothing usable about 'count'"),
        ({"files": {}}, "names no file for the vectors"),
        ({"files": {"vectors": {"name": "../x"}}}, "names no file for the vectors"),
        ({"described": 3}, "is out of step with the vectors"),
        ({"domains": ["a b"]}, "memories belong to domains that it does not name"),
        ({"domains": ["a b", 7]}, "Expected a name"),
        ({"config": {"new": 1}}, "its settings make no memory"),
        ({"config": {"backend": "gpu"}}, "The backend of the index is 'gpu'"),
        ({"metric": "dot"}, "The metric of the memory is 'dot'"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files(tmp_path, changes, message):
    filled().save(tmp_path)
    forged(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        LongTermMemory.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["vectors"].__setitem__((3, 1), np.nan), "not finite"),
        (lambda t: t["vectors"].__imul__(2), "its vectors are not of norm 1"),
        (lambda t: t["ids"].__setitem__(1, t["ids"][2]), "some twice"),
        (lambda t: t["ids"].__setitem__(1, -1), "Expected whole numbers from 0"),
        (lambda t: t["list_sizes"].__setitem__(0, 500), "the lists hold more or fewer vectors"),
        (lambda t: t["centroids"].__setitem__((0, 0), np.inf), "the centres are no vectors of this memory"),
        (lambda t: t.pop("centroids"), "KeyError: 'centroids'"),
        (lambda t: t.pop("ids"), "holds no ids of the shape"),
    ],
)
def test_tensors_that_do_not_hold_together(tmp_path, change, message):
    from safetensors.numpy import save_file

    memory = filled(WAYS["lists"])
    memory.delete(memory.ids()[:2])
    memory.save(tmp_path)
    path = files_of(tmp_path)["vectors"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    forged(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        LongTermMemory.load(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"no json",
        b'{"ids": 3}',
        b'{"ids": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"ids": {"dtype": "I64", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"ids": {"dtype": "I64", "shape": [-1], "data_offsets": [8, 0]}}',
        b'{"ids": {"dtype": "I64", "shape": [99], "data_offsets": [0, 792]}}',
        b'{"ids": {"dtype": "I64", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        b'{"ids": {"dtype": "I64", "shape": [36893488147419103232], "data_offsets": [0, 0]}}',
        b'{"ids": {"dtype": "I64", "shape": [1e999], "data_offsets": [0, 0]}}',
        b'{"ids": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}',
        b'{"ids": {"dtype": "I64", "shape": [8, 0], "data_offsets": [0, 0]}}',
    ],
)
def test_files_that_are_no_safetensors(tmp_path, header):
    filled().save(tmp_path)
    files_of(tmp_path)["vectors"].write_bytes(len(header).to_bytes(8, "little") + header)
    forged(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no safetensors file of a memory|holds no ids of the shape"):
        LongTermMemory.load(tmp_path)


@pytest.mark.parametrize("line", ['{"id": 1}', '{"id": "1", "metadata": {}}', '{"id": 1, "metadata": 3}', "[", "7"])
def test_lines_that_are_no_metadata(tmp_path, line):
    filled().save(tmp_path)
    files_of(tmp_path)["metadata"].write_text(line)
    forged(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        LongTermMemory.load(tmp_path)


def test_no_file_of_the_user_is_deleted(tmp_path):
    own = ["metadata-survey.csv", "vectors-2024.npy", "vectors-7.safetensors.bak", "vectors-a.safetensors", "my-9.txt"]
    memory = filled()
    memory.save(tmp_path)
    for name in own:
        (tmp_path / name).write_text(name)
    for generation in (2, 3):
        memory.save(tmp_path)
        saved = {f"vectors-{generation}.safetensors", f"metadata-{generation}.jsonl"}
        assert {path.name for path in tmp_path.iterdir()} == HELD | saved | {*own}
    assert all((tmp_path / name).read_text() == name for name in own)


def test_files_that_look_like_ours_are_not_deleted_unasked(tmp_path):
    other = tmp_path / "vectors-7.safetensors"
    other.write_text("mine")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="holds no long-term memory but other things: vectors-7.safetensors"):
            filled().save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [other.name] and other.read_text() == "mine"
    filled().save(tmp_path, overwrite=True)
    assert other.read_text() == "mine" and (tmp_path / "vectors-8.safetensors").exists()
    later = tmp_path / "metadata-2023.jsonl"
    later.write_text("mine")
    again = LongTermMemory.load(tmp_path)
    for generation in (2024, 2025):
        again.save(tmp_path)
        saved = {f"vectors-{generation}.safetensors", f"metadata-{generation}.jsonl"}
        assert {path.name for path in tmp_path.iterdir()} == HELD | saved | {other.name, later.name}
    assert other.read_text() == later.read_text() == "mine"


@pytest.mark.parametrize("content", ['{"name": "my web app"}', "[]", '{"format": 1}', "3"])
def test_json_of_something_else_is_never_replaced(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is no manifest of a long-term memory"):
            filled().save(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST] and (tmp_path / MANIFEST).read_text() == content


@pytest.mark.parametrize("content", ["", "{", f'{{"format": "{KIND.format}"}}', "[" * 100_000])
def test_a_damaged_manifest_is_replaced_when_asked(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match="Load "):
        filled().save(tmp_path)
    filled().save(tmp_path, overwrite=True)
    assert len(LongTermMemory.load(tmp_path)) == 88


def test_names_with_half_a_surrogate_pair(tmp_path):
    memory = LongTermMemory(config=IndexConfig("torch"))
    memory.add(points(3), domain="a\ud800 é")
    memory.save(tmp_path)
    assert LongTermMemory.load(tmp_path).domains == memory.domains == {"a\ud800 é": 3}


def run_folder(place):
    """What the folder of a training run looks like from outside."""
    (place / "checkpoints").mkdir(parents=True)
    for name in ("run.json", ".lock", "metrics.jsonl"):
        (place / name).write_text("{}")
    return place


def other_memory(place):
    place.mkdir()
    (place / MANIFEST).write_text('{"format": "seedbed nearest-neighbour datastore"}')
    (place / "datastore-0123456789abcdef.safetensors").write_text("")
    return place


@pytest.mark.parametrize("made", [run_folder, other_memory])
def test_no_save_mixes_with_something_else(tmp_path, made):
    place = made(tmp_path / "other")
    before = {path: path.read_text() for path in place.iterdir() if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(
            CheckpointError, match="holds no long-term memory but other things|is no manifest of a long"
        ):
            filled().save(place, overwrite=overwrite)
    assert {path: path.read_text() for path in place.iterdir() if path.is_file()} == before
    filled().save(place / "memory")
    assert len(LongTermMemory.load(place / "memory")) == 88


def test_places_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in (None, 5, "", b"folder"):
        for call in (lambda wrong=wrong: filled().save(wrong), lambda wrong=wrong: LongTermMemory.load(wrong)):
            with pytest.raises(
                CheckpointError, match="The path of the long-term memory is .* Expected a path.* Give one"
            ):
                call()
    with pytest.raises(
        CheckpointError, match="cannot be saved .*Expected a folder that can be written.* Choose another"
    ):
        filled().save(tmp_path / "file" / "below")
    for place, how in (
        ("file", "which is a file"),
        ("none", "which does not exist"),
        (".", "which has no manifest.json"),
    ):
        with pytest.raises(CheckpointError, match=f"There is no long-term memory in .*{how}. Expected a folder with"):
            LongTermMemory.load(tmp_path / place)
    for place in ("file", "x" * 5000):
        with pytest.raises(CheckpointError, match="The long-term memory cannot be saved"):
            filled().save(tmp_path / place)
        with pytest.raises(CheckpointError, match=r"which is a file|cannot be read .*File name too long"):
            LongTermMemory.load(tmp_path / place)
    with pytest.raises(ConfigError, match="overwrite is 'no'. Expected True or False. True replaces another memory"):
        filled().save(tmp_path / "new", overwrite="no")
    filled().save(tmp_path / "memory")
    with pytest.raises(ConfigError, match="The settings are of the type str"):
        LongTermMemory.load(tmp_path / "memory", config="torch")


def test_two_writers(tmp_path):
    filled().save(tmp_path)
    one, other = LongTermMemory.load(tmp_path), LongTermMemory.load(tmp_path)
    one.add(points(1))
    one.save(tmp_path)
    with pytest.raises(CheckpointError, match="saved by another writer since.*Load what is there and add to it"):
        other.save(tmp_path)
    with pytest.raises(CheckpointError, match="that this one was not loaded from"):
        LongTermMemory(3).save(tmp_path)
    assert same(one, LongTermMemory.load(tmp_path))
    other.save(tmp_path, overwrite=True)
    assert same(other, LongTermMemory.load(tmp_path))
    (tmp_path / MANIFEST).write_text("broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        other.save(tmp_path)
    other.save(tmp_path, overwrite=True)
    assert same(other, LongTermMemory.load(tmp_path))


def test_a_save_under_way_keeps_others_out(tmp_path):
    memory = filled()
    with KIND.locked(tmp_path), pytest.raises(CheckpointError, match="Another process is saving a long-term memory"):
        memory.save(tmp_path)
    memory.save(tmp_path)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_disk_that_is_full_leaves_the_last_save(tmp_path, monkeypatch, moment):
    memory = filled()
    memory.save(tmp_path)
    before = LongTermMemory.load(tmp_path)
    memory.add(points(1))

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, fails)
        with pytest.raises(CheckpointError, match="No space left on device.*what was saved there before is untouched"):
            memory.save(tmp_path)
    assert same(before, LongTermMemory.load(tmp_path))
    memory.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 and same(memory, LongTermMemory.load(tmp_path))


def test_a_killed_save_leaves_the_last_one(tmp_path, root):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(root)!r})
from utils.memory import saved_folder
from utils.memory.long_term_memory import LongTermMemory
memory = LongTermMemory.load({str(tmp_path)!r})
memory.add([[1.0] * 8] * 5)
saved_folder.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
memory.save({str(tmp_path)!r})
"""
    memory = filled()
    memory.save(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "vectors-2.safetensors").exists()
    again = LongTermMemory.load(tmp_path)
    assert same(memory, again)
    again.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == HELD | {"vectors-3.safetensors", "metadata-3.jsonl"}


def test_a_reader_sees_the_save_that_ended_meanwhile(tmp_path, monkeypatch):
    memory = filled()
    memory.save(tmp_path)
    opened, saves = memory_files._opened, []

    def late(directory, manifest):
        if not saves:
            memory.add(points(1))
            saves.append(memory.save(tmp_path))
        return opened(directory, manifest)

    monkeypatch.setattr(memory_files, "_opened", late)
    assert len(LongTermMemory.load(tmp_path)) == 89


def test_mounts_without_locks_are_written_to(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(95, "Operation not supported")

    (tmp_path / ".lock").write_text("vectors-9.safetensors")
    (tmp_path / "vectors-9.safetensors").write_text("of another that is writing now")
    monkeypatch.setattr(saved_folder.fcntl, "flock", fails)
    with pytest.warns(RuntimeWarning, match="knows no locks .*: nothing keeps two processes") as told:
        filled().save(tmp_path)
    assert len(told) == 1 and (tmp_path / "vectors-9.safetensors").exists()
    assert len(LongTermMemory.load(tmp_path)) == 88


def test_no_second_copy_of_the_vectors_is_made(tmp_path):
    import tracemalloc

    memory = LongTermMemory(config=IndexConfig("torch"))
    table = points(40_000, 64)
    memory.add(table)
    tracemalloc.start()
    memory.save(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < table.nbytes / 4


def test_faults_of_the_benchmark_lead_to_no_wrong_answer():
    from benchmarks.memory_faults import FAULTS

    for name, config in WAYS.items():
        outcomes = {fault.name: fault.outcome(config) for fault in FAULTS}
        assert [fault for fault, outcome in outcomes.items() if outcome == "WRONG"] == [], name
    assert len(FAULTS) > 30
