"""Clones begin as the same function, share what they say, and learn a domain without the parent noticing."""

import copy

import pytest
import torch
from torch import nn

from tests.growth.domain_models import answer, docs, gpt, loss_of, plays, train
from tests.growth.toys import Toy, adapted
from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.clone_record import CloneError, CloneRecord, build, thaw
from utils.growth.cloning import clone_for_domain
from utils.growth.lineage import lineage_of, remember
from utils.growth.low_rank import LowRank
from utils.training.weights import weights_sha256

IDS = torch.arange(24).reshape(2, 12) % 37


def parameters(module):
    return {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["full", "partial"])
def test_clones_begin_as_the_same_function(mode, tied):
    model = Toy(blocks=3, tied=tied)
    before = answer(model, IDS)
    clone = clone_for_domain(adapted(model), "law", mode)
    assert clone.certificate.equal and clone.certificate.passed and clone.certificate.double_difference == 0
    assert torch.equal(answer(clone.module, IDS), before)
    assert clone.parent is model and clone.domain == "law"
    assert clone.record.parent_sha256 == weights_sha256(model)
    assert clone.record.parent == "Toy"
    assert CloneRecord.from_dict(clone.record.to_dict()) == clone.record
    assert clone.record.describe().startswith(f"{mode} clone of Toy (")


def test_full_clones_share_nothing():
    model = Toy(tied=True)
    clone = clone_for_domain(adapted(model), "law")
    assert set(parameters(model).values()).isdisjoint(parameters(clone.module).values())
    assert clone.module.head.weight is clone.module.tokens.weight
    count = sum(p.numel() for p in model.parameters())
    assert (clone.record.own_parameters, clone.record.shared_parameters) == (count, 0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("cut", [1, 2, 3, "blocks.1"])
def test_partial_clones_share_all_below_the_cut_and_nothing_else(cut):
    model = Toy(blocks=3)
    clone = clone_for_domain(adapted(model), "law", "partial", cut=cut)
    depth = 2 if isinstance(cut, str) else cut
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("tokens.", "places", *(f"blocks.{number}." for number in range(depth))))
    }
    mine, theirs = parameters(clone.module), parameters(model)
    assert {name for name in mine if mine[name] == theirs[name]} == expected == set(clone.record.shared)
    assert clone.record.cut == f"blocks.{depth - 1}"
    assert set(clone.record.own) == set(mine) - expected
    for name, parameter in clone.module.named_parameters():
        assert parameter.requires_grad == (name not in expected)
    own = sum(p.numel() for name, p in clone.module.named_parameters() if name not in expected)
    assert clone.record.own_parameters == own
    assert clone.record.own_parameters + clone.record.shared_parameters == clone.record.parent_parameters


def test_default_cut_is_half_of_the_blocks():
    assert clone_for_domain(adapted(Toy(blocks=4)), "law", "partial").record.cut == "blocks.1"


def test_tied_heads_stay_shared_unless_untied():
    model = Toy(tied=True)
    clone = clone_for_domain(adapted(model), "law", "partial")
    assert clone.module.head.weight is model.tokens.weight
    assert "head.weight is tied to a shared parameter and stays shared" in clone.record.notes[-1]
    free = clone_for_domain(adapted(model), "law", "partial", untie=True)
    assert free.module.tokens.weight is model.tokens.weight
    assert free.module.head.weight is not model.tokens.weight and free.module.head.weight.requires_grad
    assert "head.weight" in free.record.own and free.certificate.equal
    assert free.record.own_parameters == clone.record.own_parameters + model.head.weight.numel()


def test_later_clones_train_although_earlier_ones_froze_the_parent():
    model = Toy(blocks=3)
    model.norm.bias.requires_grad_(False)
    first = clone_for_domain(adapted(model), "law", "partial", cut=3)
    second = clone_for_domain(adapted(model), "art", "partial", cut=1)
    whole = clone_for_domain(adapted(model), "all")
    frozen = {name for name, p in second.module.named_parameters() if not p.requires_grad}
    assert frozen == {*second.record.shared, "norm.bias"}
    assert [name for name, p in whole.module.named_parameters() if not p.requires_grad] == ["norm.bias"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in first.record.shared)
    thaw(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["norm.bias"]


def test_joint_trunks_train_and_say_so():
    model = Toy()
    with pytest.warns(UserWarning, match=r"clone for 'law' trains [\d,]+ parameters jointly: that changes the parent"):
        clone = clone_for_domain(adapted(model), "law", "partial", trunk="joint")
    assert all(p.requires_grad for p in clone.module.parameters())
    before = answer(model, IDS)
    train(clone.module, IDS, steps=2)
    assert not torch.equal(answer(model, IDS), before)


def test_trunks_without_blocks_are_cut_behind_a_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    clone = clone_for_domain(model, "law", "partial", cut="2")
    assert clone.record.shared == ("0.weight", "0.bias", "1.weight", "1.bias")
    # Statistics are the clone's own: training it must not move the parent's.
    assert clone.module[1].running_mean is not model[1].running_mean
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} < set(clone.record.own)
    before = weights_sha256(model)
    clone.module.train()(torch.randn(16, 8) + 3)
    assert weights_sha256(model) == before


def test_unused_parts_of_a_shared_block_are_shared():
    model = Toy(blocks=2)
    for block in model.blocks:
        block.spare = nn.Linear(3, 3)
    clone = clone_for_domain(adapted(model), "law", "partial", cut=1)
    assert clone.module.blocks[0].spare.weight is model.blocks[0].spare.weight
    assert clone.module.blocks[1].spare.weight is not model.blocks[1].spare.weight


def test_growth_of_the_parent_is_kept():
    model = Toy()
    remember(model, ("an event",))
    clone = clone_for_domain(adapted(model), "law")
    assert lineage_of(clone.module) == ("an event",) and clone.record.growth_events == 1


def test_the_parent_is_left_as_it_was():
    model = Toy().train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    known = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    clone_for_domain(adapted(model), "law")
    for name, parameter in model.named_parameters():
        assert parameter is known[name][0] and torch.equal(parameter, known[name][1])
        assert parameter.requires_grad == known[name][2] and parameter.grad is None
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_loaded_models_are_named_by_their_reference():
    clone = clone_for_domain(gpt(), "law", "partial")
    assert clone.record.parent == "example:gpt" and clone.record.cut == "blocks.0"


def test_a_domain_is_learnt_and_the_parent_answers_the_other_as_before():
    loaded, first, second = gpt(), docs(), plays()
    parent = train(loaded.module, first)
    before = answer(parent, first)
    clone = clone_for_domain(loaded, "plays", "partial", untie=True)
    with torch.no_grad():
        start = float(loss_of(parent, second[150:]))
    train(clone.module, second[:150])
    with torch.no_grad():
        learnt = float(loss_of(clone.module, second[150:]))
    assert learnt < start - 0.3
    assert torch.equal(answer(parent, first), before)
    assert weights_sha256(parent) == clone.record.parent_sha256


class Counting(Toy):
    """Answers otherwise every time."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def __deepcopy__(self, memo):
        new = Toy()
        new.load_state_dict({name: value + 1 for name, value in self.state_dict().items()})
        return new


class Held(Toy):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


class Blind(Toy):
    def forward(self, input_ids):
        with torch.no_grad():
            x = self.blocks[0](self.tokens(input_ids))
        return self.head(self.blocks[1](x))


@pytest.mark.parametrize(
    ("model", "mode", "wish", "message"),
    [
        (Toy, "full", {"domain": " "}, r"The domain is ' '. Expected a name. Say what the clone is for\."),
        (Toy, "half", {}, r"The mode of a clone is 'half'. Expected one of full, partial, light"),
        (Toy, "partial", {"trunk": "loose"}, r"The trunk of a clone is 'loose'. Expected one of frozen, joint"),
        (Toy, "full", {"cut": 1}, r"cut was given for a full clone. Expected it for a partial clone only"),
        (Toy, "light", {"untie": True}, r"untie was given for a light clone. Expected it for a partial clone only"),
        (Toy, "full", {"low_rank": LowRank()}, r"low_rank was given for a full clone. Expected it for a light clone"),
        (Toy, "light", {"trunk": "joint"}, r"trunk='joint' was given for a light clone"),
        (Toy, "partial", {"cut": 3}, r"The cut is 3. Expected how many of the 2 blocks are shared, 1 to 2"),
        (Toy, "partial", {"cut": 0}, r"The cut is 0\."),
        (Toy, "partial", {"cut": True}, r"The cut is True\."),
        (Toy, "partial", {"cut": "blocks.7"}, r"Toy has no module 'blocks.7' to cut behind"),
        (Toy, "partial", {"cut": "head"}, r"All parameters of Toy are used up to head. .* Choose an earlier cut"),
        (Blind, "partial", {}, r"The answer of blocks.0 depends on no parameter that a gradient reaches"),
        (Held, "full", {}, r"Held cannot be copied \(TypeError: cannot pickle a lock\)"),
        (Counting, "full", {}, r"The clone does not answer as Counting does: NOT KEPT"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), "partial", {}, r"Sequential has no repeated blocks"),
    ],
)
def test_what_cannot_be_cloned_is_refused(model, mode, wish, message):
    made = model()
    adapter = adapted(made) if isinstance(made, Toy) else ModelAdapter(made)
    with pytest.raises(CloneError, match=message):
        clone_for_domain(adapter, **{"domain": "law", "mode": mode, **wish})
    assert all(p.requires_grad for p in made.parameters())


def test_lazy_models_are_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"input": torch.randn(2, 5)}))
    with pytest.raises(CloneError, match=r"The parameter 0.weight has no shape yet. .* Run one forward pass"):
        clone_for_domain(adapter, "law")


def test_records_that_are_none_are_refused():
    with pytest.raises(CloneError, match=r"The record of a clone cannot be read \(KeyError: 'low_rank'\)"):
        CloneRecord.from_dict({"domain": "law"})
    values = clone_for_domain(adapted(Toy()), "law").record.to_dict()
    with pytest.raises(CloneError, match=r"cannot be read \(TypeError: .*'more'\)"):
        CloneRecord.from_dict({**values, "more": 1})


def test_built_again_from_the_record_it_is_the_parent():
    model = Toy(tied=True, blocks=3)
    clone = clone_for_domain(adapted(model), "law", "partial", untie=True)
    again = build(model, clone.record)
    assert parameters(again).keys() == parameters(clone.module).keys()
    assert again.head.weight is not model.tokens.weight
    assert torch.equal(answer(again, IDS), answer(copy.deepcopy(model), IDS))
