"""A nearest-neighbour datastore on disk: what is loaded is what was saved, or is refused."""

import json

import pytest
import torch

from tests.memory.test_nearest_neighbour_head import TORCH, make_gpt, make_text
from utils.memory import datastore_files
from utils.memory.datastore import build_datastore
from utils.memory.datastore_files import load_datastore, save_datastore
from utils.memory.nearest_neighbour_head import NearestNeighbourHead
from utils.memory.neighbour_mixture import NeighbourConfig
from utils.runtime.errors import CheckpointError, ConfigError
from utils.runtime.files import own_hash


@pytest.fixture(scope="module")
def adapter():
    return make_gpt()


@pytest.fixture(scope="module")
def store(adapter):
    return build_datastore(adapter, make_text(40, 1))


@pytest.fixture(scope="module")
def head(adapter, store):
    return NearestNeighbourHead(adapter, store, NeighbourConfig(16, 0.5, 0.3), index=TORCH)


def test_saved_and_loaded(adapter, store, head, tmp_path):
    ids = make_text(2, 6)
    save_datastore(store, tmp_path / "memory")
    loaded = load_datastore(tmp_path / "memory")
    assert loaded.to_dict() == store.to_dict()
    again = NearestNeighbourHead(adapter, loaded, head.config, index=TORCH)
    assert torch.equal(again.log_probabilities(ids), head.log_probabilities(ids))
    own = {"datastore-mine.safetensors", "datastore-2024.npy"}
    for name in own:
        (tmp_path / "memory" / name).write_text(name)
    save_datastore(store.shuffled(), tmp_path / "memory")
    held = {path.name for path in (tmp_path / "memory").iterdir()}
    assert held > own | {"manifest.json", ".lock"} and len(held) == 5
    assert torch.equal(load_datastore(tmp_path / "memory").values, store.shuffled().values)


def test_files_that_cannot_be_trusted(store, tmp_path):
    with pytest.raises(CheckpointError, match="There is no nearest-neighbour datastore"):
        load_datastore(tmp_path)
    save_datastore(store, tmp_path)
    manifest, (data,) = tmp_path / "manifest.json", tmp_path.glob("*.safetensors")
    whole, about = data.read_bytes(), json.loads(manifest.read_text())
    data.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="hash is another"):
        load_datastore(tmp_path)
    data.write_bytes(whole)
    manifest.write_text(json.dumps({**about, "scaling": "standardise"}))
    for call in (lambda: load_datastore(tmp_path), lambda: save_datastore(store, tmp_path)):
        with pytest.raises(CheckpointError, match="manifest.json was changed after it was written"):
            call()
    for change, message in (
        ({"version": 99}, "is of version 99"),
        ({"format": "other"}, "no manifest of a nearest-neighbour datastore"),
        ({"keys": 3}, "wrong: keys"),
        ({"layer": None}, "wrong: layer"),
        ({"file": {**about["file"], "name": "../x"}}, "names no file for the tensors"),
        ({"file": data.name}, "names no file for the tensors"),
    ):
        changed = {**about, **change}
        manifest.write_text(json.dumps({**changed, "sha256": own_hash(changed)}))
        with pytest.raises(CheckpointError, match=message):
            load_datastore(tmp_path)
    manifest.write_text("{")
    for call in (lambda: load_datastore(tmp_path), lambda: save_datastore(store, tmp_path)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            call()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no manifest"):
        save_datastore(store, tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save_datastore(store, tmp_path / "file" / "below")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match="holds no nearest-neighbour datastore but other things: run.json. Expected"
    ):
        save_datastore(store, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    for call in (lambda: load_datastore(None), lambda: save_datastore(store, 5)):
        with pytest.raises(CheckpointError, match="The path of the nearest-neighbour datastore is .*Expected a path"):
            call()
    with pytest.raises(CheckpointError, match="There is no nearest-neighbour datastore in .*which is a file"):
        load_datastore(tmp_path / "file")
    with pytest.raises(ConfigError, match="The datastore to save is None. Expected what build_datastore returns"):
        save_datastore(None, tmp_path / "new")


def test_a_save_that_was_killed_is_in_nobodys_way(store, tmp_path):
    for name in (".datastore-77.tmp", ".manifest.json.tmp-77", "datastore-0123456789abcdef.safetensors"):
        (tmp_path / name).write_text("half")
    save_datastore(store, tmp_path)
    assert load_datastore(tmp_path).to_dict() == store.to_dict()
    saved = {path.name for path in tmp_path.iterdir()}
    assert not saved & {".datastore-77.tmp", ".manifest.json.tmp-77"}, "nobody else writes them"
    assert "datastore-0123456789abcdef.safetensors" in saved, "it may be a user's"


def test_what_a_killed_save_noted_is_deleted_by_the_next(store, tmp_path, monkeypatch):
    save_datastore(store, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="killed"):
        patch.setattr(datastore_files, "sync_file", lambda _: (_ for _ in ()).throw(OSError("killed")))
        save_datastore(store.shuffled(), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert load_datastore(tmp_path).to_dict() == store.to_dict()
    save_datastore(store, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 and load_datastore(tmp_path).to_dict() == store.to_dict()


def test_a_second_writer_is_told(store, tmp_path, monkeypatch):
    sync, told = datastore_files.sync_file, []

    def late(place):
        sync(place)
        with pytest.raises(CheckpointError, match="Another process is saving a nearest-neighbour datastore") as error:
            save_datastore(store.shuffled(), tmp_path)
        told.append(error)

    monkeypatch.setattr(datastore_files, "sync_file", late)
    save_datastore(store, tmp_path)
    assert told and torch.equal(load_datastore(tmp_path).values, store.values)


def test_a_datastore_that_lost_its_manifest_stays(store, tmp_path):
    save_datastore(store, tmp_path)
    (tmp_path / "manifest.json").unlink()
    (kept,) = tmp_path.glob("*.safetensors")
    for _ in range(2):
        save_datastore(store.shuffled(), tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == 2 and kept.exists()


def test_a_manifest_that_names_others_files_deletes_none(store, tmp_path):
    save_datastore(store, tmp_path / "in")
    manifest, kept = tmp_path / "in" / "manifest.json", tmp_path / "precious"
    (tmp_path / "in" / "notes").write_text("mine")
    kept.write_text("mine")
    about = json.loads(manifest.read_text())
    for entry in ({"name": "../precious"}, {"name": "notes"}, {"name": str(kept)}, {"name": 3}, "notes", None):
        changed = {**about, "file": entry}
        manifest.write_text(json.dumps({**changed, "sha256": own_hash(changed)}))
        save_datastore(store.shuffled(), tmp_path / "in")
        assert kept.exists() and (tmp_path / "in" / "notes").exists()
