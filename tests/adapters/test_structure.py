"""Blocks, embeddings, heads, attentions, feed-forward pairs, norms and stages of models of many kinds."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils
from utils.adapters import ModelAdapter
from utils.adapters.structure import Structure, block_stacks, blocks, structure, tied_parameters

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


def found_in(model: nn.Module) -> Structure:
    torch.manual_seed(0)
    return structure(ModelAdapter(model.eval()))


def transformer(name: str, settings: dict[str, Any], **more: Any) -> nn.Module:
    """Build a model of transformers small."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(getattr(transformers, settings.pop("config"))(**settings, **more))
    return model


def test_ties(small: Any) -> None:
    assert tied_parameters(small.Nano()) == [("wte.weight", "head.weight")]
    assert tied_parameters(nn.Linear(2, 2)) == []


def test_blocks() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
    found = blocks(nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 2)}))
    assert found.value == ["layers.0", "layers.1", "layers.2"]
    assert found.reason == "3 children of `layers` have the same parameter shapes"
    assert blocks(nn.Linear(2, 2)).value == []
    assert "no container" in blocks(nn.Linear(2, 2)).reason


def test_stacks_in_order_and_not_inside_each_other() -> None:
    def stack(count: int) -> nn.ModuleList:
        inner = [nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))) for _ in range(count)]
        return nn.ModuleList(nn.Sequential(nn.ModuleList([block, block[1]]), nn.Linear(4, 4)) for block in inner)

    found = block_stacks(nn.ModuleDict({"encoder": stack(2), "decoder": stack(3)}))
    assert found.value == [["encoder.0", "encoder.1"], ["decoder.0", "decoder.1", "decoder.2"]]


def test_a_first_block_with_a_small_extra_is_one_of_them() -> None:
    def block(extra: bool) -> nn.Module:
        parts = [nn.Sequential(nn.Linear(4, 4)) for _ in range(4)] + ([nn.Embedding(8, 2)] if extra else [])
        return nn.ModuleList(parts)

    assert len(blocks(nn.ModuleList([block(True), block(False), block(False)])).value) == 3


def test_gpt2_whose_weights_are_transposed() -> None:
    found = found_in(
        transformer("GPT2LMHeadModel", {"config": "GPT2Config"}, n_layer=2, n_embd=32, n_head=4, vocab_size=99)
    )
    first = found.attentions.value[0]
    assert (first.name, first.block, first.heads, first.kv_heads, first.head_dim) == (
        "transformer.h.0.attn", "transformer.h.0", 4, 4, 8
    )  # fmt: skip
    for part, start in ((first.query, 0), (first.key, 32), (first.value, 64)):
        assert part is not None
        assert (part.weight, part.bias) == ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias")
        assert (part.axis, part.exact) == (1, True)
        assert part.groups == tuple(tuple(range(start + 8 * h, start + 8 * h + 8)) for h in range(4))
    assert first.out is not None
    assert (first.out.weight, first.out.axis) == ("transformer.h.0.attn.c_proj.weight", 0)
    pair = found.feed_forwards.value[1]
    assert (pair.name, pair.block, pair.hidden, pair.width) == ("transformer.h.1.mlp", "transformer.h.1", 128, 32)
    assert (pair.up.weight, pair.up.axis) == ("transformer.h.1.mlp.c_fc.weight", 1)
    assert (pair.down.weight, pair.down.axis, pair.gate) == ("transformer.h.1.mlp.c_proj.weight", 0, None)
    assert [(e.name, e.kind, e.rows) for e in found.embeddings.value] == [
        ("transformer.wte", "token", 99), ("transformer.wpe", "position", 1024)
    ]  # fmt: skip
    assert (found.head.value, found.width.value, len(found.norms.value)) == ("lm_head", 32, 5)
    assert found.ties.value == [("transformer.wte.weight", "lm_head.weight")]


def test_llama_with_grouped_queries_gates_and_its_own_norm() -> None:
    found = found_in(transformer("LlamaForCausalLM", {"config": "LlamaConfig", **SIZES}, num_key_value_heads=2))
    first = found.attentions.value[0]
    assert (first.heads, first.kv_heads) == (4, 2)
    assert first.query is not None
    assert first.key is not None
    assert first.value is not None
    assert [len(part.groups) for part in (first.query, first.key, first.value)] == [4, 2, 2]
    assert first.key.groups[1] == tuple(range(8, 16))
    assert first.key.exact
    pair = found.feed_forwards.value[0]
    assert pair.gate is not None
    assert pair.up.weight.endswith("up_proj.weight")
    assert pair.gate.weight.endswith("gate_proj.weight")
    assert len(found.norms.value) == 5


def test_interleaved_heads_are_matched_by_value() -> None:
    found = found_in(transformer("GPTNeoXForCausalLM", {"config": "GPTNeoXConfig", **SIZES}))
    first = found.attentions.value[0]
    assert first.query is not None
    assert first.value is not None
    assert first.query.groups[1] == tuple(range(24, 32))
    assert first.value.groups[1] == tuple(range(40, 48))


def test_gate_and_up_in_one_weight() -> None:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    found = found_in(transformer("Phi3ForCausalLM", {"config": "Phi3Config", **SIZES}, **special))
    pair = found.feed_forwards.value[0]
    assert (pair.hidden, pair.gate) == (64, None)
    assert pair.up.groups == (tuple(range(64)), tuple(range(64, 128)))
    assert pair.reason.startswith("gated")


def test_bert() -> None:
    found = found_in(transformer("BertForMaskedLM", {"config": "BertConfig", **SIZES}))
    assert {e.name.rpartition(".")[2]: e.kind for e in found.embeddings.value} == {
        "word_embeddings": "token", "position_embeddings": "position", "token_type_embeddings": "other"
    }  # fmt: skip
    assert [pair.name for pair in found.feed_forwards.value] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert found.attentions.value[0].out is not None
    assert found.attentions.value[0].out.module == "bert.encoder.layer.0.attention.output.dense"
    assert found.head.value == "cls.predictions.decoder"


def test_t5_has_two_stacks_and_cross_attention() -> None:
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 99}
    found = found_in(transformer("T5ForConditionalGeneration", {"config": "T5Config", **sizes}))
    assert found.stacks.value == [["encoder.block.0", "encoder.block.1"], ["decoder.block.0", "decoder.block.1"]]
    names = [attention.name.rpartition(".")[2] for attention in found.attentions.value]
    assert names == ["SelfAttention"] * 2 + ["SelfAttention", "EncDecAttention"] * 2
    assert len(found.feed_forwards.value) == 4
    assert found.attentions.value[-1].block == "decoder.block.1"


def test_vit() -> None:
    sizes = {**SIZES, "image_size": 32, "patch_size": 8}
    del sizes["vocab_size"]
    found = found_in(transformer("ViTForImageClassification", {"config": "ViTConfig", **sizes}))
    assert [(e.name, e.kind, e.rows) for e in found.embeddings.value] == [
        ("vit.embeddings.position_embeddings", "position", 17)
    ]
    assert (found.head.value, len(found.attentions.value), len(found.feed_forwards.value)) == ("classifier", 2, 2)
    assert [stage.resolution for stage in found.stages.value] == [(4, 4)]


@pytest.mark.parametrize(("name", "heads"), [("gpt", 4), ("bert", 4), ("vit", 4)])
def test_examples(name: str, heads: int) -> None:
    found = found_in(utils.load_model(f"example:{name}").module)
    assert len(found.blocks.value) == len(found.attentions.value) == len(found.feed_forwards.value) == 4
    assert all(attention.heads == heads and attention.out is not None for attention in found.attentions.value)
    assert all(part.exact for a in found.attentions.value for part in (a.query, a.key, a.value) if part is not None)
    assert found.head.value == "head"


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.tok, self.body = nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.body(self.tok(input_ids)))


def test_library_layers() -> None:
    found = found_in(Library())
    first = found.attentions.value[0]
    assert first.value is not None
    assert (first.value.weight, first.value.bias) == (
        "body.layers.0.self_attn.in_proj_weight", "body.layers.0.self_attn.in_proj_bias"
    )  # fmt: skip
    assert first.value.groups == (tuple(range(32, 40)), tuple(range(40, 48)))
    assert [pair.hidden for pair in found.feed_forwards.value] == [32, 32]


class Residual(nn.Module):
    """A small residual network: two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.ModuleList(self.block(8) for _ in range(2))
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.second = nn.ModuleList(self.block(16) for _ in range(2))
        self.fc = nn.Linear(16, 5)

    @staticmethod
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for block in self.first:
            x = x + block(x)
        x = self.down(x)
        for block in self.second:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def test_convolutional_stages() -> None:
    found = found_in(Residual())
    assert [stage.channels for stage in found.stages.value] == [8, 16]
    assert found.stages.value[0].modules == ("stem", "first.0.0", "first.1.0")
    assert (found.head.value, found.width.value) == ("fc", 16)
    assert len(found.norms.value) == 4
    assert found.attentions.value == []


def test_plain_layers_are_no_feed_forward_pair() -> None:
    found = found_in(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)))
    assert found.feed_forwards.value == []
    assert found.head.value == "2"
    assert found.width.value is None
    assert found.width.reason == "there are no repeated blocks that return a tensor"


class Adapted(nn.Module):
    """A low-rank pair without an activation, and a pair whose ends differ, beside a real pair."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.back = nn.Linear(8, 2), nn.Linear(2, 8)
        self.up, self.down, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.back(self.low(x))
        return self.out(F.gelu(x + self.down(0.5 * self.up(x) * (1 + torch.tanh(self.up(x))))))


def test_only_pairs_with_an_activation_that_return_to_the_width() -> None:
    pairs = found_in(Adapted()).feed_forwards.value
    assert [(pair.up.weight, pair.down.weight) for pair in pairs] == [("up.weight", "down.weight")]


def test_growing_by_the_answer_leaves_the_function_as_it_was() -> None:
    """The axes are those that later features change: permuting hidden units and heads by them changes nothing."""
    model = utils.load_model("example:gpt").module.eval()
    found = structure(ModelAdapter(model))
    ids = torch.arange(12).unsqueeze(0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        before = model(ids)
        pair = found.feed_forwards.value[0]
        order = torch.arange(pair.hidden).flip(0)
        for part in (pair.up, pair.down):
            parameters[part.weight].copy_(parameters[part.weight].index_select(part.axis, order))
            if part.bias is not None:
                parameters[part.bias].copy_(parameters[part.bias][order])
        attention = found.attentions.value[0]
        for projection in (attention.query, attention.key, attention.value, attention.out):
            assert projection is not None
            weight = parameters[projection.weight]
            places = torch.tensor(projection.groups)
            old = weight.clone()
            weight.index_copy_(
                projection.axis, places.flatten(), old.index_select(projection.axis, places.flip(0).flatten())
            )
        after = model(ids)
    logits = [out if isinstance(out, Tensor) else out.logits for out in (before, after)]
    torch.testing.assert_close(logits[1], logits[0])


def test_describe() -> None:
    rows = {row["name"]: row for row in found_in(Library()).describe()}
    assert rows["attentions"]["value"] == 2
    assert rows["head"]["value"] == "out"
    assert all(row["reason"] for row in rows.values())
