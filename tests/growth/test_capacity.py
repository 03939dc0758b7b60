"""Effective rank and dead units against closed forms, and where they are measured."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.structure import structure
from utils.growth.capacity import MOST_VECTORS, capacity, dead_units, effective_rank, layer_vectors


def with_spectrum(values, rows=40, width=12, seed=0):
    """A matrix with given singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, len(values), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.sampled_from([(40, 12), (12, 40)]))
@settings(max_examples=40, deadline=None)
def test_effective_rank_is_the_exponential_of_the_entropy(values, shape):
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(with_spectrum(values, *shape)) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_special_matrices():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.arange(5.0), torch.arange(9.0))) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 4)) == 0.0
    assert effective_rank(torch.zeros(0, 4)) == 0.0
    assert math.isnan(effective_rank(torch.tensor([[1.0, float("nan")]])))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\); expected \(n, d\)"):
        effective_rank(torch.zeros(2, 3, 4))


def test_dead_units_hardly_vary_compared_with_the_others():
    torch.manual_seed(0)
    activations = torch.randn(200, 8)
    activations[:, 0] = 0
    activations[:, 1] = 3.5
    activations[:, 2] *= 1e-4
    assert dead_units(activations) == 3 / 8
    assert dead_units(activations * 1e-6) == 3 / 8
    assert dead_units(torch.zeros(5, 4)) == 1.0


def test_many_vectors_are_thinned_evenly_and_copied():
    image = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    rows = layer_vectors(image, channels_first=True)
    assert rows.shape == (40, 3) and rows[0].tolist() == [0, 20, 40]
    many = torch.zeros(3 * MOST_VECTORS + 1, 2)
    assert MOST_VECTORS / 2 < len(layer_vectors(many)) <= MOST_VECTORS
    first = torch.zeros(4, 2)
    layer_vectors(first)[:] = 1
    assert not first.any()


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tokens(nn.Module):
    def __init__(self, in_place=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)
        self.blocks = nn.ModuleList(Block(8, 20) for _ in range(2))
        self.in_place = in_place

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
            if self.in_place:
                block.seen = x.detach().clone()
        return self.head(x.mul_(0) if self.in_place else x)


def tokens(**settings):
    torch.manual_seed(0)
    return ModelAdapter(Tokens(**settings), spec=ModelSpec(task="causal_lm"))


def test_hidden_units_and_blocks_are_measured():
    adapter = tokens()
    inputs = adapter.example_inputs(8, 12)
    found = capacity(adapter, inputs)
    assert [(layer.where, layer.kind, layer.width) for layer in found] == [
        ("blocks.0", "feed_forward", 20), ("blocks.1", "feed_forward", 20), ("blocks.0", "block", 8),
        ("blocks.1", "block", 8),
    ]  # fmt: skip
    model = adapter.module
    with torch.no_grad():
        x = model.embed(inputs["input_ids"])
        hidden = torch.relu(model.blocks[0].up(model.blocks[0].norm(x))).flatten(0, 1)
        out = model.blocks[0](x).flatten(0, 1)
    for layer, vectors in ((found[0], hidden), (found[2], out)):
        singular = torch.linalg.svdvals((vectors - vectors.mean(0)).double())
        share = singular / singular.sum()
        rank = float(torch.exp(-(share * share.log()).sum()))
        assert layer.effective_rank == pytest.approx(rank, rel=1e-5)
        assert layer.share == pytest.approx(rank / layer.width, rel=1e-5)
    assert found[0].to_dict()["dead"] == found[0].dead
    assert capacity(adapter, inputs, structure(adapter)) == found


def test_few_vectors_are_judged_by_the_rank_they_can_have():
    adapter = tokens()
    found = capacity(adapter, adapter.example_inputs(1, 5))
    assert all(0 < layer.share <= 1 for layer in found)
    assert max(layer.share for layer in found) > 0.5
    assert capacity(adapter, {"input_ids": torch.tensor([[3]])}) == []


def test_closed_rectifiers_are_dead():
    adapter = tokens()
    with torch.no_grad():
        adapter.module.blocks[1].up.weight[:5] = 0
        adapter.module.blocks[1].up.bias[:5] = -1
    found = capacity(adapter, adapter.example_inputs(8, 12))
    assert found[1].dead == 0.25 and found[0].dead < 0.25


def test_what_follows_may_change_an_output_in_place():
    adapter = tokens(in_place=True)
    found = capacity(adapter, adapter.example_inputs(8, 12))
    assert found[3].effective_rank > 2


def test_the_model_comes_back_as_it_was():
    adapter = tokens()
    module = adapter.module.train()
    state = torch.get_rng_state()
    capacity(adapter, adapter.example_inputs(2, 6))
    assert module.training and torch.equal(torch.get_rng_state(), state)
    assert not any(child._forward_hooks for child in module.modules())


def test_convolutions_have_a_vector_per_place():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x):
            return x + torch.relu(self.norm(self.conv(x)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Stage(), Stage(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"input": torch.randn(2, 3, 8, 8)}))
    found = capacity(adapter, adapter.example_inputs(4))
    assert [(layer.kind, layer.width) for layer in found] == [("block", 6), ("block", 6)]


def test_a_model_without_either_has_nothing_to_measure():
    adapter = ModelAdapter(nn.Linear(4, 3))
    assert capacity(adapter, adapter.example_inputs(8)) == []
