import json

import pytest
import torch
from torch import nn

from tests.memory.buffers import POLICIES, add, batch_of
from utils.memory.embedding import function_embedder
from utils.memory.episodic_buffer import EpisodicBuffer
from utils.memory.long_term_memory import LongTermMemory
from utils.memory.memory_consolidation import consolidate, recalled
from utils.memory.vector_index import IndexConfig
from utils.runtime.errors import CheckpointError, ConfigError, DataError

TORCH = IndexConfig("torch")


def rehearsed(policy="reservoir", draws=9):
    buffer = EpisodicBuffer(20, policy=policy)
    add(buffer, 20, time=5)
    for draw in range(draws):
        buffer.sample(6, draw)
    return buffer


def memory_of(**options):
    return LongTermMemory(
        embedder=function_embedder(lambda samples: samples["logits"], "logits"), config=TORCH, **options
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_rehearsed_often_moves(policy, tmp_path):
    buffer, memory = rehearsed(policy), memory_of()
    about, numbers = buffer.about(), buffer.read(buffer.slots)["number"]
    often = about["rehearsals"] >= 3
    expected = sorted(numbers[often].tolist())
    assert 0 < len(expected) < 20
    done = consolidate(buffer, memory, 3, directory=tmp_path)
    assert (done.moved, done.known, done.left) == (len(expected), 0, 20 - len(expected)) and done.ids == tuple(
        memory.ids()
    )
    assert sorted(memory.ids(where=lambda entry: entry["number"] in expected).tolist()) == sorted(done.ids)
    assert not set(buffer.read(buffer.slots)["number"].tolist()) & set(expected)
    for loaded in (memory, LongTermMemory.load(tmp_path)):
        back = recalled(loaded, done.ids)
        true = batch_of(20)
        for name, field in back.items():
            assert field.dtype == true[name].dtype and torch.equal(field, true[name][back["number"]])
    for entry in memory.metadata(done.ids):
        row = int((numbers == entry["number"]).nonzero())
        assert entry["time"] == 5 and entry["arrival"] == about["arrivals"][row] and entry["group"] == entry["labels"]
        assert entry["priority"] == about["priorities"][row] and entry["rehearsals"] == about["rehearsals"][row] >= 3
    assert memory.domains == {"consolidated": done.moved} and str(tmp_path) in str(done)
    assert json.loads(json.dumps(done.to_dict()))["moved"] == done.moved


def test_nothing_is_stored_twice_after_a_resume(tmp_path):
    buffer, memory = rehearsed(), memory_of()
    before = buffer.state_dict()
    first = consolidate(buffer, memory, 3)
    buffer.load_state_dict(before)
    second = consolidate(buffer, memory, 2)
    assert second.known == first.moved and f"{first.moved} were there already" in str(second)
    assert len(memory) == first.moved + second.moved == 20 - second.left
    assert consolidate(buffer, memory, 2).moved == 0
    other = EpisodicBuffer(20)
    other.add({name: values + 1 for name, values in batch_of(20).items()})
    other.sample(20, 0)
    assert consolidate(other, memory, 1).moved == 20, "numbers in another stream are others, whatever they are"


def test_a_save_that_fails_moves_nothing(tmp_path):
    buffer, memory = rehearsed(), memory_of()
    add_before = len(buffer)
    LongTermMemory(3, config=TORCH).save(tmp_path)
    with pytest.raises(CheckpointError, match="that this one was not loaded from"):
        consolidate(buffer, memory, 3, directory=tmp_path)
    assert len(buffer) == add_before and len(memory) == 0


def test_samples_that_make_no_vectors_stay():
    buffer, memory = rehearsed(), memory_of()
    with pytest.raises(DataError, match="hold entries that are not finite"):
        consolidate(buffer, memory, 3, inputs=lambda samples: {"logits": samples["logits"] * float("nan")})
    assert len(buffer) == 20 and len(memory) == 0


def test_a_model_reads_its_inputs_and_vectors_may_be_given():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2))
    buffer = EpisodicBuffer(10)
    buffer.add({"input": torch.randn(10, 4, 4), "labels": torch.arange(10) % 2})
    buffer.sample(10, 0)
    memory = LongTermMemory(embedder=model, config=TORCH)
    kept = buffer.read(buffer.slots)["input"]
    done = consolidate(buffer, memory, 1, keep=["labels"], domain="seen")
    assert done.moved == 10 and not len(buffer) and memory.domains == {"seen": 10}
    assert memory.search(kept, 1).ids.ravel().tolist() == list(done.ids)
    assert set(recalled(memory, done.ids)) == {"labels"} and len(memory.ids(where={"labels": 1})) == 5
    plain = LongTermMemory(config=TORCH)
    buffer.add({"input": kept, "labels": torch.arange(10)})
    buffer.sample(10, 1)
    assert consolidate(buffer, plain, 1, inputs=lambda samples: samples["input"].flatten(1)).moved == 10
    assert plain.dimension == 16


def test_what_cannot_be_consolidated_or_recalled():
    buffer, memory = rehearsed(), memory_of()
    for wrong in (0, 1.5, True):
        with pytest.raises(
            ConfigError, match="The number of rehearsals is .*. Expected a whole number, at least 1. Give how often"
        ):
            consolidate(buffer, memory, wrong)
    with pytest.raises(DataError, match="The buffer has no field pixels. Expected some of images, labels"):
        consolidate(buffer, memory, keep=["pixels"])
    none = consolidate(EpisodicBuffer(5), memory, directory="never written")
    assert none.moved == 0 and none.saved_to is None
    ids = memory.add({"logits": torch.ones(1, 3)}, {"fields": {"x": {"dtype": "no", "shape": [1], "base64": ""}}})
    with pytest.raises(DataError, match="The fields of the memories make no tensors"):
        recalled(memory, ids)
    with pytest.raises(DataError, match="hold no samples, or samples with unlike fields"):
        recalled(memory, memory.add({"logits": torch.ones(1, 3)}))
    with pytest.raises(DataError, match="The 0 memories hold no samples"):
        recalled(memory, [])
