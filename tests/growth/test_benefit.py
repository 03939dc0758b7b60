"""Gradient scores against closed forms, random search and neurons that are really added."""

import copy
import math

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.structure import structure
from utils.growth.benefit import LayerBenefit, benefit, largest_gradient, total_benefit, where_to_grow
from utils.growth.capacity import LayerCapacity


class Pair(nn.Module):
    """x + down(act(up(x))) between an input and a head."""

    def __init__(self, act=torch.tanh, hidden=8, width=6):
        super().__init__()
        self.first, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = act

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(x + self.down(self.act(self.up(x))))


class Block(nn.Module):
    def __init__(self, width, act):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 16), act, nn.Linear(16, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Tokens(nn.Module):
    """Two pre-norm blocks on tokens, each halved afterwards; `after` may add to what a block returns."""

    def __init__(self, in_place=False):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block(8, nn.GELU()) for _ in range(2))
        self.head = nn.Linear(8, 11)
        self.after, self.in_place = {}, in_place

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for number, block in enumerate(self.blocks):
            x = block(x)
            x = x.mul_(0.5) if self.in_place else x * 0.5
            if number in self.after:
                x = x + 0.5 * x.detach() / x.detach().square().mean(-1, keepdim=True).sqrt() @ self.after[number].T
        return self.head(x)


def made(model, **spec):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    adapter = ModelAdapter(model, spec=ModelSpec(**spec) if spec else None)
    inputs = adapter.example_inputs(16, seed=3)
    with torch.no_grad():
        labels = adapter.random_labels(adapter.logits(inputs))
    return adapter, inputs, labels


def pair_setting(act=torch.tanh):
    return made(Pair(act), task="tabular_classification", example_inputs={"x": torch.randn(4, 5)})


def products(model, inputs, labels):
    """M of the pair: the gradient of a linear map from its input to its output that is zero."""
    skip = torch.zeros(6, 6, requires_grad=True)
    x = torch.tanh(model.first(inputs["x"]))
    logits = model.head(x + model.down(model.act(model.up(x))) + x @ skip.T)
    return torch.autograd.grad(nn.functional.cross_entropy(logits, labels), skip)[0]


def grown(model, outgoing):
    """The model with new neurons whose incoming weights are zero and whose outgoing ones are given, (width, k)."""
    larger, k = copy.deepcopy(model), outgoing.shape[1]
    larger.up, larger.down = nn.Linear(6, 8 + k), nn.Linear(8 + k, 6)
    with torch.no_grad():
        larger.up.weight.zero_()[:8], larger.up.bias.zero_()[:8]
        larger.up.weight[:8], larger.up.bias[:8] = model.up.weight, model.up.bias
        larger.down.weight[:, :8], larger.down.weight[:, 8:] = model.down.weight, outgoing
        larger.down.bias.copy_(model.down.bias)
    return larger


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize(("act", "slope"), [(torch.tanh, 1.0), (nn.functional.gelu, 0.5)])
def test_the_score_is_reached_by_adding_neurons_and_by_nothing_better(k, act, slope):
    adapter, inputs, labels = pair_setting(act)
    model = adapter.module
    [found] = benefit(adapter, inputs, labels, k)
    m = products(model, inputs, labels)
    assert (found.kind, found.score) == ("feed_forward", pytest.approx(largest_gradient(m, k), rel=1e-5))

    def attained(outgoing):
        larger = grown(model, outgoing)
        logits = larger(inputs["x"])
        assert torch.allclose(logits, model(inputs["x"]), atol=1e-6)
        nn.functional.cross_entropy(logits, labels).backward()
        return float(larger.up.weight.grad[8:].norm())

    best = torch.linalg.svd(m)[0][:, :k]
    assert attained(best) == pytest.approx(slope * found.score, rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        outgoing = torch.linalg.qr(torch.randn(6, k, generator=generator))[0]
        assert attained(outgoing) <= slope * found.score * (1 + 1e-4)


def test_the_other_side_zero_is_bounded_by_the_same_number():
    """Incoming weights U and an activation that is linear: the outgoing weights get the gradient M U."""
    m = products(*(lambda a, i, y: (a.module, i, y))(*pair_setting()))
    for k in (1, 3):
        score = largest_gradient(m, k)
        assert float((m @ torch.linalg.svd(m)[2][:k].T).norm()) == pytest.approx(score, rel=1e-5)
        for seed in range(200):
            incoming = torch.linalg.qr(torch.randn(6, k, generator=torch.Generator().manual_seed(seed)))[0]
            assert float((m @ incoming).norm()) <= score * (1 + 1e-5)
    assert largest_gradient(torch.diag(torch.tensor([3.0, 4.0, 1.0])), 2) == pytest.approx(5)
    assert largest_gradient(torch.eye(2), 9) == pytest.approx(math.sqrt(2))
    assert math.isnan(largest_gradient(torch.tensor([[float("inf")]]), 1))


def test_present_is_the_gradient_norm_of_the_pair():
    adapter, inputs, labels = pair_setting()
    [found] = benefit(adapter, inputs, labels)
    model = copy.deepcopy(adapter.module)
    nn.functional.cross_entropy(model(inputs["x"]), labels).backward()
    assert found.score == pytest.approx(float(products(adapter.module, inputs, labels).norm()), rel=1e-5)
    present = math.hypot(float(model.up.weight.grad.norm()), float(model.down.weight.grad.norm()))
    assert found.present == pytest.approx(present, rel=1e-5)
    assert found.relative == pytest.approx(found.score / present, rel=1e-5)
    assert found.to_dict() == {
        "where": found.where, "kind": "feed_forward", "score": found.score, "present": found.present,
        "relative": found.relative,
    }  # fmt: skip


def test_a_new_block_is_scored_by_the_gradient_of_a_branch_behind_the_block():
    adapter, inputs, labels = made(Tokens(), task="causal_lm")
    found = {layer.where: layer for layer in benefit(adapter, inputs, labels, 3) if layer.kind == "block"}
    assert list(found) == ["blocks.0", "blocks.1"]
    for number in (0, 1):
        model = copy.deepcopy(adapter.module)
        model.after = {number: torch.zeros(8, 8, requires_grad=True)}
        adapter.loss(model(**inputs), labels).backward()
        assert found[f"blocks.{number}"].score == pytest.approx(largest_gradient(model.after[number].grad, 3), rel=1e-4)
        present = torch.cat([p.grad.flatten() for p in model.blocks[number].parameters()]).norm()
        assert found[f"blocks.{number}"].present == pytest.approx(float(present), rel=1e-4)


def test_code_behind_a_block_may_change_its_output_in_place():
    plain, in_place = (benefit(*made(Tokens(kind), task="causal_lm"), k=2) for kind in (False, True))
    assert [(a.where, a.kind) for a in plain] == [(a.where, a.kind) for a in in_place]
    assert [a.score for a in in_place] == pytest.approx([a.score for a in plain], rel=1e-5)


def test_the_model_comes_back_as_it_was():
    adapter, inputs, labels = made(Tokens(), task="causal_lm")
    module = adapter.module.train()
    adapter.loss(module(**inputs), labels).backward()
    grads = [p.grad for p in module.parameters()]
    values = [g.clone() for g in grads]
    weights = [p.detach().clone() for p in module.parameters()]
    state = torch.get_rng_state()
    first = benefit(adapter, inputs, labels, 2)
    with torch.no_grad():
        assert benefit(adapter, inputs, labels, 2, structure(adapter)) == first
    assert module.training and torch.equal(torch.get_rng_state(), state)
    for p, grad, value, weight in zip(module.parameters(), grads, values, weights, strict=True):
        assert p.grad is grad and torch.equal(grad, value) and torch.equal(p, weight)
    assert not any(child._forward_hooks for child in module.modules())


def test_shared_weights_add_up_over_their_calls():
    class Twice(Pair):
        def forward(self, x):
            x = torch.tanh(self.first(x))
            for _ in range(2):
                x = x + self.down(self.act(self.up(x)))
            return self.head(x)

    adapter, inputs, labels = made(Twice(), task="tabular_classification", example_inputs={"x": torch.randn(4, 5)})
    model, skip = adapter.module, torch.zeros(6, 6, requires_grad=True)
    x = torch.tanh(model.first(inputs["x"]))
    for _ in range(2):
        x = x + model.down(model.act(model.up(x))) + x @ skip.T
    m = torch.autograd.grad(nn.functional.cross_entropy(model.head(x), labels), skip)[0]
    [found] = benefit(adapter, inputs, labels, 2)
    assert found.score == pytest.approx(largest_gradient(m, 2), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gate_passes_on_as_much_as_the_present_gates_do(fused):
    class Gated(Pair):
        def __init__(self):
            super().__init__(hidden=10)
            self.gate = nn.Linear(6, 10)
            if fused:
                self.up, self.gate = nn.Linear(6, 20), None

        def inside(self, x):
            if fused:
                gate, up = self.up(x).chunk(2, dim=-1)
            else:
                gate, up = self.gate(x), self.up(x)
            return nn.functional.silu(gate) * up

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.head(x + self.down(self.inside(x)))

    adapter, inputs, labels = made(Gated(), task="tabular_classification", example_inputs={"x": torch.randn(4, 5)})
    model, skip = adapter.module, torch.zeros(6, 6, requires_grad=True)
    x = torch.tanh(model.first(inputs["x"]))
    hidden = model.inside(x)
    logits = model.head(x + model.down(hidden) + x @ skip.T)
    m = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), skip)[0]
    passed = float((hidden.square().mean() / model.up(x).square().mean()).sqrt().detach())
    [found] = benefit(adapter, inputs, labels, 2)
    assert found.score == pytest.approx(passed * largest_gradient(m, 2), rel=1e-4)


def test_what_does_not_train_has_no_score():
    adapter, inputs, labels = made(Tokens(), task="causal_lm")
    adapter.module.blocks[1].requires_grad_(False)
    assert [(layer.where, layer.kind) for layer in benefit(adapter, inputs, labels)] == [
        ("blocks.0.mlp", "feed_forward"), ("blocks.0", "block"),
    ]  # fmt: skip
    adapter.module.requires_grad_(False)
    assert benefit(adapter, inputs, labels) == []
    assert total_benefit([]) is None


def test_weights_that_are_applied_by_functions_and_transposed_ones():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=31, n_positions=16)
    adapter = ModelAdapter(transformers.GPT2LMHeadModel(config))
    inputs = adapter.example_inputs(2, 8)
    labels = adapter.random_labels(adapter.logits(inputs))
    found = benefit(adapter, inputs, labels, 4)
    assert [layer.kind for layer in found] == ["feed_forward"] * 2 + ["block"] * 2
    assert all(layer.score > 0 and layer.present > 0 for layer in found)


def test_no_neuron_is_an_error():
    with pytest.raises(ValueError, match="k is 0; expected at least one new neuron"):
        benefit(*pair_setting(), k=0)


def test_total_and_ranking():
    scored = [
        LayerBenefit("a", "feed_forward", 3.0, 1.0),
        LayerBenefit("b", "feed_forward", 4.0, 0.0),
        LayerBenefit("x", "block", 1.0, 2.0),
        LayerBenefit("y", "block", 5.0, 2.0),
    ]
    assert total_benefit(scored) == pytest.approx(5.0)
    assert total_benefit(scored, "block") == pytest.approx(math.sqrt(26 / 8))
    assert scored[1].relative == 0.0
    capacities = [LayerCapacity("a", "feed_forward", 8, 4.0, 0.5, 0.0), LayerCapacity("z", "block", 8, 4.0, 0.9, 0.0)]
    depth = where_to_grow("depth", scored, capacities)
    assert [place.where for place in depth] == ["y", "x", "z"]
    assert depth[2].why == "no gradient score, effective rank 90% of the width"
    wide = where_to_grow("feed_forward", scored, capacities)
    assert [place.where for place in wide] == ["b", "a"]
    assert wide[1].why == "gradient score 3, effective rank 50% of the width" and wide[1].share == 0.5
    equal = [LayerBenefit(name, "block", 1.0, 1.0) for name in "pqr"]
    full = [LayerCapacity("q", "block", 8, 4.0, 0.5, 0.0)]
    assert [place.where for place in where_to_grow("depth", equal, full)] == ["q", "p", "r"]
