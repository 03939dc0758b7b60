"""Saved clones come back as they were, with their parent and with no other."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.growth.domain_models import answer, gpt, plays, train
from tests.growth.toys import Toy, adapted
from utils.growth.clone_files import RECORD, WEIGHTS, load_clone, save_clone
from utils.growth.clone_record import CloneError
from utils.growth.cloning import clone_for_domain
from utils.growth.low_rank import LowRank
from utils.training.weights import weights_sha256

IDS = torch.arange(24).reshape(2, 12) % 37
WISHES = {
    "full": {},
    "partial": {},
    "partial, untied": {"untie": True},
    "light": {"low_rank": LowRank(rank=2)},
}


def saved(folder, kind="partial", model=None, change=True):
    """Save a clone after its own values have changed."""
    if kind == "light":
        pytest.importorskip("peft")
    model = Toy(blocks=3, tied=True) if model is None else model
    clone = clone_for_domain(adapted(model), "law", kind.partition(",")[0], **WISHES[kind])
    with torch.no_grad():
        for tensor in clone.own_tensors().values() if change else ():
            tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    return clone, save_clone(clone, folder / "clone")


@pytest.mark.parametrize("kind", WISHES)
def test_clones_come_back(tmp_path, kind):
    clone, folder = saved(tmp_path, kind)
    again = load_clone(folder, clone.parent)
    assert again.record == clone.record and again.certificate is None and again.parent is clone.parent
    assert torch.equal(answer(again.module, IDS), answer(clone.module, IDS))
    assert not torch.equal(answer(again.module, IDS), answer(clone.parent, IDS))
    theirs = {id(p) for p in clone.parent.parameters()}
    shared = {name for name, p in again.module.named_parameters() if id(p) in theirs}
    assert shared == {name for name, p in clone.module.named_parameters() if id(p) in theirs}
    flags = {name: p.requires_grad for name, p in clone.module.named_parameters()}
    assert {name: p.requires_grad for name, p in again.module.named_parameters()} == flags


def test_only_what_is_the_clones_own_is_written(tmp_path):
    clone, folder = saved(tmp_path)
    with safe_open(str(folder / WEIGHTS), framework="pt") as stream:
        assert set(stream.keys()) == set(clone.record.own) == set(clone.own_tensors())
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, WEIGHTS]
    assert json.loads((folder / RECORD).read_text())["record"] == clone.record.to_dict()


def test_buffers_are_written_where_they_differ(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    clone = clone_for_domain(model, "law", "partial", cut="2")
    save_clone(clone, tmp_path / "same")
    clone.module.train()(torch.randn(16, 8))
    save_clone(clone, tmp_path / "other")
    for name, expected in (("same", set()), ("other", {"1.running_mean", "1.running_var", "1.num_batches_tracked"})):
        with safe_open(str(tmp_path / name / WEIGHTS), framework="pt") as stream:
            assert set(stream.keys()) == {"3.weight", "3.bias"} | expected
    again = load_clone(tmp_path / "other", model)
    assert torch.equal(again.module[1].running_mean, clone.module[1].running_mean)
    assert not torch.equal(again.module[1].running_mean, model[1].running_mean)


def test_another_process_loads_it_with_the_same_parent(tmp_path):
    loaded = gpt()
    clone = clone_for_domain(loaded, "plays", "partial", untie=True)
    train(clone.module, plays(40), steps=3)
    save_clone(clone, tmp_path)
    fresh = gpt()
    again = load_clone(tmp_path, fresh)
    assert again.parent is fresh.module and not fresh.module.embed.weight.requires_grad
    assert torch.equal(answer(again.module, plays(4)), answer(clone.module, plays(4)))


def test_the_parent_of_a_joint_clone_is_the_one_at_saving(tmp_path):
    model = Toy()
    with pytest.warns(UserWarning, match="jointly"):
        clone = clone_for_domain(adapted(model), "law", "partial", trunk="joint")
    train(clone.module, IDS, steps=2)
    save_clone(clone, tmp_path)
    again = load_clone(tmp_path, model)
    assert torch.equal(answer(again.module, IDS), answer(clone.module, IDS))
    assert all(p.requires_grad for p in again.module.parameters())
    with pytest.raises(CloneError, match=clone.record.parent_sha256):
        load_clone(tmp_path, Toy())


def test_another_parent_is_refused_with_both_hashes(tmp_path):
    clone, folder = saved(tmp_path)
    other = Toy(blocks=3, tied=True)
    with torch.no_grad():
        other.norm.bias += 1
    with pytest.raises(CloneError) as refused:
        load_clone(folder, other)
    said = str(refused.value)
    assert weights_sha256(other) in said and clone.record.parent_sha256 in said
    assert "The clone for 'law' was saved with Toy" in said
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("damage", ["weights", "record", "missing", "no json"])
def test_damaged_files_are_refused(tmp_path, damage):
    clone, folder = saved(tmp_path)
    if damage == "weights":
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (folder / WEIGHTS).write_bytes(content)
    elif damage == "record":
        values = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({"record": values["record"]}))
    elif damage == "missing":
        (folder / WEIGHTS).unlink()
    else:
        (folder / RECORD).write_text("{")
    with pytest.raises(CloneError, match=rf"No clone can be read from .* Expected {RECORD} and the {WEIGHTS}"):
        load_clone(folder, clone.parent)


def test_clones_that_have_grown_are_refused(tmp_path):
    clone, _ = saved(tmp_path)
    clone.module.extra = nn.Linear(2, 2)
    with pytest.raises(CloneError, match=r"The clone for 'law' has another extra.bias than when it was made"):
        save_clone(clone, tmp_path)
    del clone.module.extra
    clone.module.norm.weight = nn.Parameter(torch.ones(17))
    with pytest.raises(CloneError, match=r"another norm.weight than .* Save the whole model with utils.export"):
        save_clone(clone, tmp_path)


def test_a_parent_of_another_class_is_refused(tmp_path):
    clone, folder = saved(tmp_path)
    values = json.loads((folder / RECORD).read_text())
    values["record"]["shared"] = [name for name in values["record"]["shared"] if name != "places"]
    (folder / RECORD).write_text(json.dumps(values))
    with pytest.raises(CloneError, match=r"has another places than the one that was saved"):
        load_clone(folder, clone.parent)
