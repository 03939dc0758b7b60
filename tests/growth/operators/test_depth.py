"""New blocks: exact before a norm, bounded behind one, gated else; counted, numbered, alive, refused where shared."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.growth.toys import Block, Toy, adapted, answer, assert_undone, grown, planned, shapes, tensors
from utils.adapters.structure import structure
from utils.growth.edits import Gate, GrowthRefusedError, InsertBlock, Number, Plan
from utils.growth.gated_block import GatedBlock
from utils.growth.operators.depth import plan_depth, writers
from utils.growth.request import Request
from utils.growth.scratch import Scratch
from utils.growth.surgery import Surgery

LAST = ("attention.out.weight", "attention.out.bias", "down.weight", "down.bias")


@pytest.mark.parametrize("where", [None, 0, "blocks.0", -1])
@pytest.mark.parametrize("tied", [True, False])
def test_pre_norm_blocks_are_exact_to_the_bit(where, tied):
    model = Toy(tied=tied)
    known = tensors(model)
    ids = torch.arange(24).reshape(2, 12)
    model.eval()
    with torch.no_grad():
        before = model(ids)
        plan = planned(model, "depth", amount=2, where=where)
        surgery = Surgery(model, plan)
        after = model(ids)
    assert plan.promise == "exact"
    assert torch.equal(before, after)
    assert (len(model.blocks), model.config.n_layer) == (4, 4)
    surgery.undo()
    assert_undone(model, known)
    assert (len(model.blocks), model.config.n_layer) == (2, 2)


def test_what_is_zero_are_the_last_writers_and_all_of_them_learn():
    model = Toy()
    plan = planned(model, "depth", amount=1)
    insert = next(edit for edit in plan.edits if isinstance(edit, InsertBlock))
    assert insert == InsertBlock("blocks", 2, 1, LAST)
    Surgery(model, plan)
    model(torch.arange(24).reshape(2, 12)).square().mean().backward()
    for name in LAST:
        assert model.blocks[2].get_parameter(name).grad.abs().sum() > 0


def test_a_bias_that_is_zero_just_now_is_a_writer_all_the_same():
    model = Toy()
    with torch.no_grad():
        for block in model.blocks:
            block.down.bias.zero_()
    insert = planned(model, "depth", amount=1).edits[0]
    assert set(insert.zeroed) == set(LAST)


def test_one_module_with_both_sides_of_a_branch_zeroes_only_one():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.inner = nn.Parameter(torch.randn(24, 16))
            self.outer = nn.Parameter(torch.randn(16, 24))

        def forward(self, x):
            return x + (self.norm(x) @ self.inner.T).tanh() @ self.outer.T

    assert writers(Pair(), (torch.randn(2, 5, 16),), {}) == ["outer"]
    assert writers(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), (torch.randn(2, 16),), {}) == []


def test_new_blocks_know_their_place():
    model = Toy(blocks=3)
    plan = planned(model, "depth", amount=2, where=0)
    Surgery(model, plan)
    assert [block.index for block in model.blocks] == [0, 1, 2, 3, 4]


def test_a_single_block_can_be_followed_by_others():
    model = Toy(blocks=1)
    _, _, old, new = grown(model, "depth", amount=3)
    assert torch.allclose(old, new, atol=1e-12)
    assert [block.index for block in model.blocks] == [0, 1, 2, 3]
    assert model.config.n_layer == 4


@pytest.mark.parametrize("where", [0, 1])
def test_post_norm_blocks_stay_within_the_norms_epsilon(where):
    model = Toy(post=True)
    plan, _, old, new = grown(model, "depth", amount=2, where=where)
    assert plan.promise == "bounded"
    assert "post-norm" in plan.reasons[-1]
    # A norm of what is normalized already divides by sqrt(1 + eps), twice in each of the two new blocks.
    assert float((new - old).detach().abs().max()) < 4 * 1e-5 * float(old.abs().max())


def test_post_norm_blocks_are_exact_without_an_epsilon():
    model = Toy(post=True)
    for child in model.modules():
        if isinstance(child, nn.LayerNorm):
            child.eps = 0.0
    _, _, old, new = grown(model, "depth", amount=1)
    assert torch.allclose(old, new, atol=1e-12)


class Normed(nn.Module):
    """Ends in a norm without parameters over its whole stream, and has no other norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return torch.tanh(x + self.b(self.a(x).tanh())) * 1.5


def test_what_no_zero_makes_the_identity_gets_a_gate():
    model = Toy()
    model.blocks = nn.ModuleList(Normed() for _ in range(2))
    plan = planned(model, "depth", amount=2)
    assert plan.promise == "gated"
    assert [type(edit) for edit in plan.edits[:4]] == [InsertBlock, InsertBlock, Gate, Gate]
    known, old = tensors(model), None
    model.eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        old = model(ids)
    surgery = Surgery(model, plan)
    assert torch.equal(model(ids), old)
    assert isinstance(model.blocks[2], GatedBlock)
    model(ids).square().mean().backward()
    assert bool(model.blocks[2].gate.grad != 0)
    surgery.undo()
    assert_undone(model, known)
    with pytest.raises(GrowthRefusedError, match=r"No block can be inserted behind blocks\.1"):
        planned(model, "depth", amount=1, gated=False)


def test_drawn_blocks_copy_no_matrix():
    model = Toy()
    plan = planned(model, "depth", amount=1, drawn=True)
    Surgery(model, plan, seed=4)
    new, old = model.blocks[2], model.blocks[1]
    assert not torch.equal(new.up.weight, old.up.weight)
    assert 0.7 < float(new.up.weight.detach().std() / old.up.weight.detach().std()) < 1.4
    assert not new.down.weight.any()
    again = Toy()
    Surgery(again, plan, seed=4)
    assert torch.equal(again.blocks[2].up.weight, new.up.weight)


def test_a_replay_gives_the_same_names_shapes_and_numbers():
    first, second = Toy(), Toy()
    plan = planned(first, "depth", amount=2, where=0)
    Surgery(first, plan)
    Surgery(second, Plan.from_dict(plan.to_dict()))
    assert shapes(first) == shapes(second)
    second.load_state_dict(first.state_dict())
    assert torch.equal(answer(first), answer(second))


def test_frozen_blocks_are_followed_by_frozen_ones():
    model = Toy()
    model.blocks[1].attention.q.weight.requires_grad_(False)
    Surgery(model, planned(model, "depth", amount=1))
    assert not model.blocks[2].attention.q.weight.requires_grad
    assert model.blocks[2].attention.k.weight.requires_grad


def test_a_list_with_an_entry_per_block_follows():
    class Kinds(Toy):
        def __init__(self):
            super().__init__()
            self.config.layer_kinds = ["plain", "other"]
            self.config.image = [4, 4]

        def forward(self, input_ids, labels=None):
            assert [self.config.layer_kinds[n] for n in range(len(self.blocks))]
            return super().forward(input_ids)

    model = Kinds()
    held = model.config.layer_kinds
    surgery = Surgery(model, planned(model, "depth", amount=2, where=0))
    assert model.config.layer_kinds == ["plain", "plain", "plain", "other"]
    assert model.config.image == [4, 4]
    surgery.undo()
    assert model.config.layer_kinds is held


class Two(nn.Module):
    """An encoder and a decoder of equal length with one config."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_encoder_layers=2, num_decoder_layers=2)
        self.tokens = nn.Embedding(37, 16)
        self.encoder = nn.ModuleList(Block(hidden=24) for _ in range(2))
        self.decoder = nn.ModuleList(Block(hidden=48, gate=True) for _ in range(2))
        self.head = nn.Linear(16, 37)

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        for number in range(self.config.num_encoder_layers):
            x = self.encoder[number](x)
        for block in self.decoder:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_count_of_another_stack_of_the_same_length_stays(side):
    model = Two()
    plan = planned(model, "depth", amount=1, where=f"{side}.1")
    other = {"encoder": "decoder", "decoder": "encoder"}[side]
    Surgery(model, plan)
    assert getattr(model.config, f"num_{side}_layers") == 3
    assert getattr(model.config, f"num_{other}_layers") == 2
    assert len(model.get_submodule(side)) == 3


def test_a_config_that_blocks_share_stays_shared():
    settings = SimpleNamespace(kv_heads=4)
    model = Toy(layout="fused", config=settings)
    Surgery(model, planned(model, "depth", amount=1))
    assert model.blocks[2].attention.config is settings


def test_buffers_of_a_block_are_copied():
    model = Toy()
    for block in model.blocks:
        block.register_buffer("seen", torch.tensor([3.0]))
    surgery = Surgery(model, planned(model, "depth", amount=1))
    assert torch.equal(model.blocks[2].seen, torch.tensor([3.0]))
    assert model.blocks[2].seen is not model.blocks[1].seen
    assert surgery.change.changes["blocks.2.seen"].like == "blocks.1.seen"


def test_one_block_in_several_places_is_refused():
    model = Toy()
    model.blocks = nn.ModuleList([Block()] * 2)
    with pytest.raises(GrowthRefusedError, match="blocks holds one block several times"):
        planned(model, "depth", amount=1)
    model.blocks = nn.ModuleList([*(Block() for _ in range(2)), model.blocks[0], model.blocks[0]])
    model.config.n_layer = 4
    with pytest.raises(GrowthRefusedError, match="blocks holds one block several times|runs 2 times"):
        planned(model, "depth", amount=1)


def test_a_block_that_runs_twice_is_refused():
    class Again(Toy):
        def forward(self, input_ids, labels=None):
            x = self.tokens(input_ids)
            for block in (*self.blocks, *self.blocks):
                x = block(x)
            return self.head(x)

    with pytest.raises(GrowthRefusedError, match=r"The block blocks\.1 runs 2 times in one forward pass"):
        planned(Again(), "depth", amount=1)


def test_blocks_that_are_named_attributes_are_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(37, 16), nn.Linear(16, 37)
            self.first, self.second = Block(), Block()

        def forward(self, input_ids):
            return self.head(self.second(self.first(self.tokens(input_ids))))

    with pytest.raises(
        GrowthRefusedError, match=r"are attributes with their own names \(tokens, head, first, second\)"
    ):
        planned(Named(), "depth", amount=1)


def test_a_loop_that_never_reaches_new_blocks_is_refused():
    class Fixed(Toy):
        def forward(self, input_ids, labels=None):
            x = self.tokens(input_ids)
            for number in (0, 1):
                x = self.blocks[number](x)
            return self.head(x)

    with pytest.raises(GrowthRefusedError, match=r"blocks\.2 is never run"):
        planned(Fixed(), "depth", amount=1)


def test_errors_of_a_wish_that_makes_no_sense():
    model = Toy()
    adapter = adapted(model)
    scratch, found = Scratch(adapter), structure(adapter)
    for wish, message in {
        Request("depth", amount=1, where=5): "Block 5 was asked for, and there are 2. Expected a number from 0 to 1",
        Request("depth", amount=1, where="head"): "There is no block 'head'. Expected one of blocks.0, blocks.1",
        Request("depth", to=2): "depth was to grow to 2, and the model has 2 blocks",
    }.items():
        with pytest.raises(GrowthRefusedError, match=message):
            plan_depth(scratch, found, wish)


def test_a_model_without_blocks_is_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(37, 16), nn.Linear(16, 37)

        def forward(self, input_ids):
            return self.head(self.tokens(input_ids))

    with pytest.raises(GrowthRefusedError, match="There are no repeated blocks"):
        planned(Flat(), "depth", amount=1)


def test_the_number_of_blocks_in_a_config_is_an_edit_like_others():
    plan = planned(Toy(), "depth", amount=1)
    assert Number("", ("config", "n_layer"), 2, 3) in plan.edits


def test_a_tensor_that_only_the_first_block_reads_is_not_copied_to_be_dead():
    class First(Block):
        def __init__(self, index, **options):
            super().__init__(index=index, **options)
            if index == 0:
                self.table = nn.Parameter(torch.randn(16))

    class Shared(Toy):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(First(index=number) for number in range(3))
            self.config.n_layer = 3

        def forward(self, input_ids):
            x = self.tokens(input_ids) + self.places[: input_ids.shape[1]]
            x = x * self.blocks[0].table
            for number in range(self.config.n_layer):
                x = self.blocks[number](x)
            return self.head(self.norm(x))

    assert planned(Shared(), "depth", amount=1).promise == "exact"
    with pytest.raises(GrowthRefusedError, match=r"table of the new block would never be read"):
        planned(Shared(), "depth", amount=1, where=0)
