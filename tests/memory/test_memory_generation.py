"""Text written with a memory and with the model's own cache: the same tokens, and the same memories, as without."""

import pytest
import torch

from tests.memory.test_nearest_neighbour_head import TORCH, make_gpt, make_text
from tests.training.test_generation import WrongCache
from utils.adapters import ModelAdapter, ModelSpec
from utils.memory.datastore import build_datastore
from utils.memory.memory_generation import generate_with_memory
from utils.memory.nearest_neighbour_head import NearestNeighbourHead
from utils.memory.neighbour_mixture import NeighbourConfig


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    return ModelAdapter(LlamaForCausalLM(config).eval())


def head_of(adapter, layer=None):
    store = build_datastore(adapter, make_text(40, 1), layer=layer)
    return NearestNeighbourHead(adapter, store, NeighbourConfig(8, 2.0, 0.5), index=TORCH)


def same(one, other):
    for first, second in zip(one.tokens, other.tokens, strict=True):
        assert first.log_probability == pytest.approx(second.log_probability, abs=1e-4)
        assert [memory.row for memory in first.memories] == [memory.row for memory in second.memories]
    return one.ids == other.ids


@pytest.mark.parametrize("layer", [None, "model.layers.0"])
def test_the_cache_gives_the_same_tokens_and_memories(llama, layer):
    head = head_of(llama, layer)
    for options in ({"temperature": 0}, {"temperature": 0.9, "seed": 4}):
        cached = generate_with_memory(llama, head, [5, 7, 9], 16, **options)
        whole = generate_with_memory(llama, head, [5, 7, 9], 16, use_cache=False, **options)
        assert cached.cached and cached.how == "with the model's cache" and cached.to_dict()["cached"]
        assert not whole.cached and whole.how == "from the window of the last tokens"
        assert same(cached, whole)


def test_the_text_outgrows_the_cache(llama):
    head = head_of(llama)
    cached, whole = (generate_with_memory(llama, head, [5, 7, 9], 30, seed=2, use_cache=use) for use in (True, False))
    assert "up to 24 tokens, then from the window of the last ones" in cached.how
    assert same(cached, whole)


def test_without_a_cache_it_says_so():
    gpt = make_gpt()
    made = generate_with_memory(gpt, head_of(gpt), [5, 7], 4)
    assert not made.cached and made.how.endswith("because the model has no cache")


def test_a_cache_that_is_wrong_is_found_out():
    torch.manual_seed(0)
    adapter = ModelAdapter(WrongCache(), spec=ModelSpec(task="causal_lm"))
    head = NearestNeighbourHead(adapter, build_datastore(adapter, make_text(4, 1) % 20), index=TORCH)
    made = generate_with_memory(adapter, head, [1, 2, 3], 8, temperature=0)
    assert not made.cached and "the model's cache failed" in made.how
    assert same(made, generate_with_memory(adapter, head, [1, 2, 3], 8, temperature=0, use_cache=False))
