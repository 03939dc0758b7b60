"""More attention heads: every order of rows, whole groups, what has an entry per head, and what is refused."""

import pytest
import torch
from torch import nn

from tests.growth.toys import Attention, Toy, answer, assert_undone, grown, planned, shapes, tensors
from utils.growth.edits import GrowthRefusedError, Number, Plan, Widen
from utils.growth.surgery import Surgery

LAYOUTS = {
    "apart": {},
    "without bias": {"bias": False},
    "grouped": {"kv_heads": 2},
    "one key": {"kv_heads": 1},
    "fused": {"layout": "fused"},
    "fused and grouped": {"layout": "fused", "kv_heads": 2},
    "interleaved": {"layout": "interleaved"},
    "interleaved and grouped": {"layout": "interleaved", "kv_heads": 2},
    "temperature": {"extra": "temperature"},
    "strided": {"layout": "strided"},
    "one head": {"heads": 1, "kv_heads": 1, "layout": "fused"},
    "one head interleaved": {"heads": 1, "kv_heads": 1, "layout": "interleaved"},
}


def rows_of(attention, x):
    """Return queries, keys and values by head."""
    with torch.no_grad():
        return attention.parts(x)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_old_heads_see_and_say_what_they_did_before(options):
    model = Toy(**options).double()
    attention = model.blocks[0].attention
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = rows_of(attention, x)
    plan, surgery, old, new = grown(model, "heads", amount=2)
    assert torch.allclose(new, old, atol=1e-12)
    assert (plan.before, plan.after) == (before[0].shape[1], before[0].shape[1] + 2)
    for part, was in zip(rows_of(attention, x), before, strict=True):
        assert torch.allclose(part[:, : was.shape[1]], was, atol=1e-14)
    assert rows_of(attention, x)[0].shape[1] == plan.after
    surgery.undo()
    assert torch.equal(answer(model), old)


def test_a_group_grows_as_a_whole_and_one_key_head_serves_all():
    grouped = Toy(kv_heads=2)
    Surgery(grouped, planned(grouped, "heads", amount=2))
    assert grouped.blocks[1].attention.k.weight.shape == (12, 16)
    assert grouped.blocks[1].attention.q.weight.shape == (24, 16)
    single = Toy(kv_heads=1)
    Surgery(single, planned(single, "heads", amount=3))
    assert single.blocks[1].attention.k.weight.shape == (4, 16)
    assert single.blocks[1].attention.q.weight.shape == (28, 16)


def test_part_of_a_group_is_refused():
    with pytest.raises(GrowthRefusedError, match="3 more heads were asked for, and each key and value head serves 2"):
        planned(Toy(kv_heads=2), "heads", amount=3)


def test_new_rows_are_drawn_and_new_columns_zero():
    model = Toy()
    old = model.blocks[0].attention.q.weight.detach().clone()
    Surgery(model, planned(model, "heads", amount=1))
    attention = model.blocks[0].attention
    assert torch.equal(attention.q.weight[:16], old)
    assert 0.5 < float(attention.q.weight[16:].detach().std() / old.std()) < 1.5
    assert not attention.q.bias[16:].any()
    assert not attention.out.weight[:, 16:].any()
    assert attention.q.out_features == 20
    assert attention.out.in_features == 20


def test_what_has_an_entry_per_head_gets_the_mean_of_the_others():
    model = Toy(extra="temperature")
    plan = planned(model, "heads", amount=2)
    assert "blocks.0.attention.temperature" in plan.reasons[-1]
    Surgery(model, plan)
    added = model.blocks[0].attention.temperature.flatten()[4:]
    assert torch.allclose(added, torch.ones(2))


def test_numbers_of_the_module_follow():
    model = Toy(layout="fused")
    plan = planned(model, "heads", amount=1)
    Surgery(model, plan)
    assert [block.attention.heads for block in model.blocks] == [5, 5]
    assert [block.attention.kv_heads for block in model.blocks] == [5, 5]
    # How long a head's vectors are is 4 too, and stays.
    assert model.blocks[0].attention.head_dim == 4


def test_one_attention_grows_alone():
    model = Toy(layout="fused")
    plan, surgery, old, new = grown(model.double(), "heads", amount=1, where="blocks.1")
    assert plan.where == ("blocks.1.attention",)
    assert [block.attention.heads for block in model.blocks] == [4, 5]
    assert torch.allclose(new, old, atol=1e-12)
    surgery.undo()
    assert plan == planned(model, "heads", amount=1, where=1)
    assert plan == planned(model, "heads", amount=1, where="blocks.1.attention")


def test_a_config_that_other_blocks_read_does_not_change_for_one():
    class Settings:
        kv_heads = 4

        def __init__(self):
            self.kv_heads = 4

    settings = Settings()
    alone = Toy(layout="fused", config=settings)
    with pytest.raises(GrowthRefusedError, match="does not keep the function"):
        planned(alone, "heads", amount=1, where=0)
    plan = planned(alone, "heads", amount=1)
    assert [edit.after for edit in plan.edits if isinstance(edit, Number) and edit.path[-2:] == ("config", "kv_heads")]
    Surgery(alone, plan)
    assert settings.kv_heads == 5


def test_undo_gives_back_the_very_same_tensors():
    model = Toy(layout="interleaved", kv_heads=2)
    known = tensors(model)
    numbers = {name: dict(vars(child)) for name, child in model.named_modules()}
    Surgery(model, planned(model, "heads", amount=2)).undo()
    assert_undone(model, known)
    assert all(
        vars(child)[key] == value for name, child in model.named_modules() for key, value in numbers[name].items()
    )


def test_a_replay_on_a_fresh_instance_gives_the_same_names_and_shapes():
    first, second = Toy(layout="fused", kv_heads=2), Toy(layout="fused", kv_heads=2)
    plan = planned(first, "heads", amount=2)
    Surgery(first, plan)
    Surgery(second, Plan.from_dict(plan.to_dict()))
    assert shapes(first) == shapes(second)
    second.load_state_dict(first.state_dict())
    assert torch.equal(answer(first), answer(second))


def test_new_heads_learn_after_one_step():
    model = Toy(layout="interleaved")
    Surgery(model, planned(model, "heads", amount=1))
    attention = model.blocks[0].attention
    ids = torch.arange(24).reshape(2, 12)
    rate = torch.optim.SGD(model.parameters(), 0.5)
    model(ids).square().mean().backward()
    assert attention.out.weight.grad[:, 16:].abs().sum() > 0
    assert not attention.qkv.weight.grad[48:].any()
    rate.step()
    rate.zero_grad()
    model(ids).square().mean().backward()
    assert attention.qkv.weight.grad[48:].abs().sum() > 0


def test_frozen_projections_stay_frozen():
    model = Toy()
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    model.blocks[0].attention.out.weight.requires_grad_(True)
    Surgery(model, planned(model, "heads", amount=1))
    assert not model.blocks[0].attention.q.weight.requires_grad
    assert model.blocks[0].attention.out.weight.requires_grad


class Torchs(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(37, 16)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2)
        self.head = nn.Linear(16, 37)

    def forward(self, input_ids):
        return self.head(self.blocks(self.tokens(input_ids)))


def test_what_cannot_grow_is_refused_with_the_reason():
    with pytest.raises(GrowthRefusedError, match=r"a head's width is embed_dim / num_heads \(4 now\)"):
        planned(Torchs(), "heads", amount=1)
    with pytest.raises(GrowthRefusedError, match="Sizes written into forward"):
        planned(Toy(layout="written"), "heads", amount=1)
    with pytest.raises(GrowthRefusedError, match=r"blocks.0.attention.whole normalizes all heads together"):
        planned(Toy(extra="norm"), "heads", amount=1)
    with pytest.raises(GrowthRefusedError, match="There is no attention in 'head'"):
        planned(Toy(), "heads", amount=1, where="head")
    with pytest.raises(GrowthRefusedError, match="Block 7 was asked for, and there are 2"):
        planned(Toy(), "heads", amount=1, where=7)
    with pytest.raises(GrowthRefusedError, match="heads was to grow to 3, and the model has 4 heads"):
        planned(Toy(), "heads", to=3)


def test_attentions_of_different_sizes_are_named_one_by_one():
    model = Toy()
    model.blocks[1].attention = Attention(heads=2, kv_heads=2)
    with pytest.raises(GrowthRefusedError, match="The attentions have 2 heads of 4, 4 heads of 4"):
        planned(model, "heads", amount=1)
    assert planned(model, "heads", amount=1, where="blocks.1").after == 3


def test_a_model_without_attention_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(37, 16), nn.Linear(16, 37)

        def forward(self, input_ids):
            return self.head(self.tokens(input_ids))

    with pytest.raises(GrowthRefusedError, match="There is no attention"):
        planned(Plain(), "heads", amount=1)


def test_no_linear_layer_for_the_keys_is_refused():
    class Bare(Attention):
        def parts(self, x):
            batch, length, _ = x.shape
            q, v = (layer(x).view(batch, length, -1, 4).transpose(1, 2) for layer in (self.q, self.v))
            return [q, x.tanh().view(batch, length, -1, 4).transpose(1, 2), v]

    model = Toy()
    for block in model.blocks:
        block.attention = Bare()
    with pytest.raises(GrowthRefusedError, match="No linear layer was seen to make the keys of blocks.0.attention"):
        planned(model, "heads", amount=1)


def transformer(kind, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(kind, num_attention_heads=4, **sizes, **options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gpt_neox", {}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bos_token_id": 0, "eos_token_id": 0}),
        ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}),
    ],
)
def test_models_of_others_keep_their_function_and_their_config_follows(kind, options):
    model = transformer(kind, **options).eval().double()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        Surgery(model, planned(model, "heads", amount=2))
        after = model(ids).logits
    assert torch.allclose(after, before, atol=1e-12)
    assert model.config.num_attention_heads == 6
    assert getattr(model.config, "num_key_value_heads", 3) in (3, 6)


def test_of_two_sides_the_larger_ones_self_attentions_grow_with_their_table_of_biases():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=37, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval().double()
    ids = torch.arange(24).reshape(2, 12)
    plan = planned(model, "heads", "seq2seq", amount=1)
    assert plan.where == tuple(f"decoder.block.{n}.layer.0.SelfAttention" for n in range(2))
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        Surgery(model, plan)
        after = model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.allclose(after, before, atol=1e-12)
    first, cross = model.decoder.block[0].layer[0].SelfAttention, model.decoder.block[0].layer[1].EncDecAttention
    table = first.relative_attention_bias
    assert (table.embedding_dim, tuple(table.weight.shape)) == (5, (32, 5))
    assert torch.allclose(table.weight[:, 4], table.weight[:, :4].mean(1))
    assert (first.n_heads, cross.n_heads, model.config.num_heads) == (5, 4, 4)
    everything = planned(model, "heads", "seq2seq", amount=1, where="encoder")
    assert all(name.startswith("encoder.") for name in everything.where)
    with pytest.raises(GrowthRefusedError, match="does not keep the function"):
        planned(model, "heads", "seq2seq", amount=1, where="decoder.block.1")


def test_alibi_slopes_that_depend_on_the_number_of_heads_are_never_silently_wrong():
    model = transformer("bloom", n_layer=2, n_head=4).eval().double()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = model(ids).logits
    try:
        plan = planned(model, "heads", amount=2)
    except GrowthRefusedError:
        return
    Surgery(model, plan)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, before, atol=1e-12)


def test_a_fused_weight_grows_in_one_edit():
    plan = planned(Toy(layout="fused"), "heads", amount=1)
    wide = [edit for edit in plan.edits if isinstance(edit, Widen) and edit.name == "blocks.0.attention.qkv.weight"]
    assert wide == [Widen("blocks.0.attention.qkv.weight", 0, ((16, 4), (32, 4), (48, 4)), "like")]
    plan = planned(Toy(layout="interleaved"), "heads", amount=1)
    wide = [edit for edit in plan.edits if isinstance(edit, Widen) and edit.name == "blocks.0.attention.qkv.weight"]
    assert wide == [Widen("blocks.0.attention.qkv.weight", 0, ((48, 12),), "like")]
