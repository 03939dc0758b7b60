"""Models of several domains: what is routed where, what a further domain changes, and what does not belong together."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.growth.domain_models import answer, docs, gpt, loss_of, plays
from tests.growth.toys import Toy, adapted
from utils.adapters import ModelAdapter
from utils.growth.clone_files import load_clone, save_clone
from utils.growth.clone_record import CloneError, thaw
from utils.growth.cloning import clone_for_domain
from utils.growth.multi_domain import MultiDomainModel
from utils.training.weights import load_weights, save_weights, weights_sha256

IDS = torch.randint(37, (6, 12), generator=torch.Generator().manual_seed(0))


def stirred(clone, seed):
    """Change what is the clone's own."""
    with torch.no_grad():
        for parameter in clone.own_tensors().values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    return clone


def three(model=None, modes=("partial", "partial", "full")):
    model = Toy(blocks=2) if model is None else model
    adapter = adapted(model)
    return [stirred(clone_for_domain(adapter, f"d{n}", mode), n) for n, mode in enumerate(modes)]


def fitted(clones, route_by="hard", **wish):
    """A model whose router's rows hold something."""
    model = MultiDomainModel(clones, route_by, **wish)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for row in model.router_rows():
            row.weight.copy_(torch.randn(row.weight.shape, generator=generator))
    return model.eval()


def test_a_named_domain_is_its_clone_bit_for_bit():
    clones = three()
    model = MultiDomainModel(clones)
    assert model.domains == ["d0", "d1", "d2"]
    for clone in clones:
        assert torch.equal(answer(model, IDS, domain=clone.domain), answer(clone.module, IDS))
    assert torch.equal(model(input_ids=IDS, domain="d1"), model(IDS, domain="d1"))


def test_each_sample_is_answered_by_the_clone_of_its_domain():
    clones = three()
    model = MultiDomainModel(clones).eval()
    names = ["d2", "d0", "d0", "d1", "d2", "d0"]
    calls = {clone.domain: [] for clone in clones}
    for clone in clones:
        clone.module.register_forward_hook(lambda m, args, out, name=clone.domain: calls[name].append(len(args[0])))
    mixed = answer(model, IDS, domain=names)
    assert calls == {"d0": [3], "d1": [1], "d2": [2]}
    for number, name in enumerate(names):
        alone = answer(model, IDS[number : number + 1], domain=name)
        torch.testing.assert_close(mixed[number : number + 1], alone, rtol=1e-5, atol=1e-5)


def test_hard_routing_follows_the_largest_logit():
    model = fitted(three())
    names = model.route(IDS)
    assert len(set(names)) > 1
    logits = model.router_logits(IDS)
    assert logits.shape == (6, 3)
    assert names == [model.domains[number] for number in logits.argmax(-1).tolist()]
    assert torch.equal(answer(model, IDS), answer(model, IDS, domain=names))


def test_soft_routing_is_the_mean_by_probability():
    clones = three()
    model = fitted(clones, "soft")
    shares = model.router_logits(IDS).softmax(-1)
    expected = sum(shares[:, n, None, None] * answer(clone.module, IDS) for n, clone in enumerate(clones))
    torch.testing.assert_close(answer(model, IDS), expected)
    model(IDS).square().mean().backward()
    assert all(row.weight.grad.abs().sum() > 0 for row in model.router_rows())
    assert all(clone.module.head.weight.grad.abs().sum() > 0 for clone in clones)
    assert model.parent.tokens.weight.grad is None


def test_features_are_those_of_the_parents_trunk():
    clones = three(modes=("partial", "partial"))
    model = MultiDomainModel(clones)
    assert model.features_at == "blocks.0"
    parent, seen = clones[0].parent, []
    handle = parent.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    ran = []
    late = parent.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    made = model.train().features(IDS)
    handle.remove()
    late.remove()
    expected = nn.functional.layer_norm(seen[0].mean(1), (16,))
    assert torch.equal(made, expected) and not ran and not made.requires_grad
    assert parent.training and parent.blocks[0].training


def test_the_router_reads_the_last_block_or_what_the_head_is_given():
    assert MultiDomainModel(three()).features_at == "blocks.1"
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    model = MultiDomainModel([clone_for_domain(mlp, "law")])
    x = torch.randn(4, 8)
    assert torch.equal(model.features(x), nn.functional.layer_norm(mlp[:2](x), (16,)))
    assert MultiDomainModel([clone_for_domain(mlp, "law")], features_at="0").features_at == "0"


def test_padding_does_not_count():
    class Masked(Toy):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    model = MultiDomainModel([clone_for_domain(adapted(Masked()), "law", "partial")])
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[:, 8:] = 0
    # Causal: the first eight places do not see the others.
    torch.testing.assert_close(model.features(IDS, attention_mask=mask), model.features(IDS[:, :8]))
    assert torch.equal(model.features(IDS, attention_mask=mask), model.features(IDS, mask))


def test_a_further_domain_leaves_the_others_as_they_are():
    clones = three()
    model = fitted(clones[:2])
    logits, answers, rows = model.router_logits(IDS), answer(model, IDS), [id(row) for row in model.rows]
    size = sum(p.numel() for row in model.rows for p in row.parameters())
    state = torch.get_rng_state()
    model.add_domain(clones[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for row in model.rows for p in row.parameters()) == size * 3 // 2
    assert [id(row) for row in model.rows][:2] == rows
    assert torch.equal(model.router_logits(IDS)[:, :2], logits)
    # Nobody has told the router of it yet.
    assert torch.equal(answer(model, IDS), answers)
    assert float(model.router_logits(IDS).detach().softmax(-1)[:, 2].max()) == 0
    added = model.lineage[2]
    assert (added.domain, added.row, added.fitted_before) == ("d2", 2, True)
    assert added.to_dict()["record"] == clones[2].record.to_dict()
    assert not model.lineage[0].fitted_before


def test_the_parent_may_have_a_domain_of_its_own():
    parent = Toy()
    clone = stirred(clone_for_domain(adapted(parent), "law", "partial"), 0)
    model = MultiDomainModel([clone], parent_domain="all")
    assert model.domains == ["all", "law"] and model.lineage[0].record is None
    assert torch.equal(answer(model, IDS, domain="all"), answer(parent, IDS))
    assert parent.head.weight.requires_grad


def test_what_only_makes_features_is_not_trained():
    clones = three(modes=("partial", "partial"))
    model = MultiDomainModel(clones)
    assert not any(p.requires_grad for p in model.parent.parameters())
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"experts", "rows"}
    thaw(model.parent)
    assert all(p.requires_grad for p in model.parent.parameters())


def test_adapters_and_loops_take_it_as_they_take_the_parent():
    loaded = gpt()
    clones = [clone_for_domain(loaded, name, "partial", untie=True) for name in ("docs", "plays")]
    model = fitted(clones)
    adapter, parent = ModelAdapter(model, spec=model.spec), ModelAdapter(loaded)
    assert adapter.failure is None and adapter.task.value == parent.task.value == "causal_lm"
    assert adapter.vocab_size.value == parent.vocab_size.value
    assert adapter.input_names == parent.input_names
    inputs = parent.example_inputs(4)
    assert adapter.logits(inputs).shape == parent.logits(inputs).shape
    texts = torch.cat([docs(16), plays(16)])
    domain = ["docs"] * 16 + ["plays"] * 16
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    before = weights_sha256(loaded.module)
    for _ in range(8):
        loss = loss_of(model.train(), texts, domain=domain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert weights_sha256(loaded.module) == before


def test_its_state_makes_a_round_trip(tmp_path):
    model = fitted(three(modes=("partial", "full")))
    save_weights(model, tmp_path / "all.safetensors")
    other = MultiDomainModel(three(Toy(blocks=2), modes=("partial", "full"))).eval()
    with torch.no_grad():
        other.experts[0].head.weight.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(answer(other, IDS), answer(model, IDS))
    with torch.no_grad():
        other.experts[0].head.weight.zero_()
    load_weights(other, tmp_path / "all.safetensors")
    assert torch.equal(answer(other, IDS), answer(model, IDS))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(answer(twin, IDS), answer(model, IDS))
    assert twin.experts[0].tokens.weight is twin.parent.tokens.weight
    with torch.no_grad():
        twin.experts[0].head.weight.zero_()
    assert not torch.equal(answer(twin, IDS, domain="d0"), answer(model, IDS, domain="d0"))


def test_clones_from_disk_are_put_together(tmp_path):
    clones = three(modes=("partial", "partial"))
    for clone in clones:
        save_clone(clone, tmp_path / clone.domain)
    parent = Toy(blocks=2)
    model = MultiDomainModel([load_clone(tmp_path / name, parent) for name in ("d0", "d1")])
    assert torch.equal(answer(model, IDS, domain="d1"), answer(clones[1].module, IDS))
    assert model.experts[0].tokens.weight is model.experts[1].tokens.weight is parent.tokens.weight


def test_light_clones_are_routed():
    pytest.importorskip("peft")
    clones = three(modes=("light", "light"))
    model = fitted(clones)
    assert torch.equal(answer(model, IDS, domain="d1"), answer(clones[1].module, IDS))
    assert not torch.equal(answer(model, IDS, domain="d0"), answer(model, IDS, domain="d1"))


def test_an_unfitted_router_says_so():
    model = MultiDomainModel(three())
    with pytest.warns(UserWarning, match=r"router between d0, d1, d2 is not fitted .* call fit_router"):
        model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, domain="d0")
        MultiDomainModel(three()[:1])(IDS)
        fitted(three())(IDS)


class Named(Toy):
    def forward(self, input_ids, domain=None):
        return super().forward(input_ids)


class TimeFirst(Toy):
    """Computes with the positions on the first axis."""

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.places[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.turn(self.turn(self.norm(x))))

    def turn(self, x):
        return self.turning(x)

    def __init__(self):
        super().__init__()
        self.turning = Turn()


class Turn(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


def test_what_does_not_belong_together_is_refused():
    clones = three()
    model = MultiDomainModel(clones)
    with pytest.raises(CloneError, match=r"The domain 'd7' is unknown. Expected one of d0, d1, d2\. Add a clone"):
        model(IDS, domain="d7")
    with pytest.raises(CloneError, match=r"2 domains were given for 6 samples"):
        model(IDS, domain=["d0", "d1"])
    with pytest.raises(CloneError, match=r"The domain 'd1' is there already. Expected a name beside d0, d1, d2"):
        model.add_domain(clones[1])
    with pytest.raises(CloneError, match=r"No clone was given"):
        MultiDomainModel([])
    with pytest.raises(CloneError, match=r"route_by is 'firm'. Expected one of hard, soft"):
        MultiDomainModel(clones, "firm")
    with pytest.raises(CloneError, match=r"The domain '' is no name. Expected a name beside none yet"):
        MultiDomainModel(clones, parent_domain="")
    with pytest.raises(CloneError, match=r"Toy has no module 'blocks.8' for the router to read"):
        MultiDomainModel(clones, features_at="blocks.8")
    with pytest.raises(CloneError, match=r"The adapter is of another Toy"):
        MultiDomainModel(clones, adapter=adapted(Toy()))
    with pytest.raises(CloneError, match=r"Named.forward\(\) has an argument `domain` of its own"):
        MultiDomainModel([clone_for_domain(adapted(Named()), "law")])


def test_clones_of_another_parent_are_refused_with_both_hashes():
    other = Toy()
    with torch.no_grad():
        other.norm.bias += 1
    clone = clone_for_domain(adapted(other), "law")
    model = MultiDomainModel(three())
    with pytest.raises(CloneError, match=r"The clone for 'law' has another parent") as refused:
        model.add_domain(clone)
    assert weights_sha256(other) in str(refused.value) and weights_sha256(model.parent) in str(refused.value)
    assert model.domains == ["d0", "d1", "d2"] and len(model.rows) == 3


def test_clones_with_another_vocabulary_are_refused():
    parent = Toy()
    clone = clone_for_domain(adapted(parent), "law")
    clone.module.head = nn.Linear(16, 40)
    with pytest.raises(CloneError, match=r"clone for 'law' answers the parent's example with \(3, \d+, 40\)\. .* 37\)"):
        MultiDomainModel([clone])
    clone.module.head = nn.Linear(15, 37)
    with pytest.raises(CloneError, match=r"answers the parent's example with RuntimeError: mat1 and mat2"):
        MultiDomainModel([clone])


def test_features_must_be_there_for_each_sample():
    clone = clone_for_domain(adapted(TimeFirst()), "law")
    with pytest.raises(CloneError, match=r"turning returns the shapes \(\d+, 2, 16\) and .* samples on the first axis"):
        MultiDomainModel([clone], features_at="turning")
    parent = Toy()
    parent.idle = nn.Linear(2, 2)
    clone = clone_for_domain(adapted(parent), "law")
    with pytest.raises(CloneError, match=r"idle did not run, or has no tensor of numbers to read"):
        MultiDomainModel([clone], features_at="idle")


def test_answers_of_another_structure_are_refused():
    clone = clone_for_domain(adapted(Toy()), "law")
    model = MultiDomainModel([clone])
    clone.module.register_forward_hook(lambda m, args, out: {"scores": out})
    with pytest.raises(CloneError, match=r"A clone returned dict without ``"):
        model(IDS, domain="law")
