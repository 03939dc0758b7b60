"""Widths of models of many kinds: found, permuted, grown by hand, or fixed with the reason."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import utils
from tests.adapters.lane_models import (
    Between,
    Centred,
    Convolutions,
    Decoder,
    Mixer,
    ResNet,
    Root,
    Separable,
    adapted,
    free,
    grown_change,
    named,
    places,
)
from utils.adapters import ModelAdapter
from utils.adapters.lanes import LaneGroup, LaneNorm, Member, lane_groups, permutes
from utils.runtime.errors import AdapterError

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


def multilayer() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)
    )


OURS: dict[str, Callable[[], nn.Module]] = {
    "mlp": multilayer,
    "cnn": Convolutions,
    "resnet": ResNet,
    "separable": Separable,
    "mixer": Mixer,
    "layer norm": Decoder,
    "rms norm": lambda: Decoder(Root, gated=True),
    "torch's rms norm": lambda: Decoder(nn.RMSNorm),
    "centred": lambda: Decoder(Centred),
}


def transformer(name: str, config: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    return model.eval()


@pytest.mark.parametrize("name", OURS)
def test_lanes_that_can_change_are_interchangeable_and_can_grow(name: str) -> None:
    adapter = adapted(OURS[name])
    groups = lane_groups(adapter).value
    assert free(groups)
    for group in free(groups):
        assert permutes(adapter, group, seed=3) < 1e-12
        assert {"writer", "reader"} <= {member.role for member in group.members}
    for group in free(groups):
        repeated_filters = any(m.name.startswith(("depth", "twofold")) for m in group.members)
        # Group norms and depthwise convolutions also keep the width as a number of their module.
        if not group.norms and not repeated_filters:
            assert grown_change(adapter, group) < 1e-12


def test_mlp_with_batch_norm() -> None:
    groups = lane_groups(adapted(multilayer)).value
    assert [(g.size, g.fixed is None) for g in groups] == [(8, True), (5, False), (6, True), (3, False)]
    batch = [(f"1.{n}", 0, "pointwise", 1, 0) for n in ("running_mean", "running_var", "weight", "bias")]
    assert places(groups[0]) == {
        ("0.weight", 0, "writer", 1, 0), ("0.bias", 0, "pointwise", 1, 0), *batch, ("3.weight", 1, "reader", 1, 0)
    }  # fmt: skip
    assert groups[0].norms == ()
    assert groups[2].norms == (LaneNorm("4", "layer", 6),)
    assert "raw input" in str(groups[1].fixed)
    assert groups[3].fixed == "it is the model's output"
    assert "changes the output by" in groups[0].reason
    assert groups[0].to_dict()["members"][0] == {
        "name": "0.weight",
        "axis": 0,
        "role": "writer",
        "repeat": 1,
        "offset": 0,
    }
    assert groups[0].role("reader") == (Member("3.weight", 1, "reader"),)


def test_channels_that_are_flattened() -> None:
    group = named(lane_groups(adapted(Convolutions)).value, "head.weight", 1)
    assert places(group) == {
        ("second.weight", 0, "writer", 1, 0), ("second.bias", 0, "pointwise", 1, 0), ("head.weight", 1, "reader", 16, 0)
    }  # fmt: skip


def test_a_residual_stream_is_one_group() -> None:
    groups = lane_groups(adapted(ResNet)).value
    assert sorted(g.size for g in free(groups)) == [6, 6, 10, 10, 10]
    stream = named(groups, "stem.0.weight", 0)
    assert {m.name for m in stream.role("writer")} == {"stem.0.weight", "body.0.conv2.weight"}
    assert {m.name for m in stream.role("reader")} == {
        "body.0.conv1.weight", "body.1.conv1.weight", "body.1.down.weight"
    }  # fmt: skip
    assert {m.name for m in named(groups, "head.weight", 1).role("writer")} == {
        "body.1.conv2.weight", "body.1.down.weight", "body.2.conv2.weight"
    }  # fmt: skip


def test_depthwise_filters_go_with_their_channels() -> None:
    groups = lane_groups(adapted(Separable)).value
    assert [g.size for g in free(groups)] == [6, 5, 4, 7]
    assert ("depth.weight", 0, "pointwise", 1, 0) in places(named(groups, "stem.weight", 0))
    doubled = places(named(groups, "point.weight", 0))
    assert {("twofold.weight", 0, "pointwise", 2, 0), ("up.weight", 0, "reader", 2, 0)} <= doubled
    assert {("squeeze.weight", 1, "reader", 2, 0), ("excite.weight", 0, "writer", 2, 0)} <= doubled
    assert ("act.weight", 0, "pointwise", 1, 0) in places(named(groups, "up.weight", 1))


def test_mixer_has_lanes_of_channels_and_of_places() -> None:
    groups = lane_groups(adapted(Mixer)).value
    assert [g.size for g in free(groups)] == [12, 9, 20]
    assert [n.kind for n in free(groups)[0].norms] == ["layer"] * 3
    assert "raw input" in str(named(groups, "places.0.weight", 1).fixed)


@pytest.mark.parametrize(
    ("norm", "gated", "kind"),
    [(nn.LayerNorm, False, "layer"), (Centred, False, "layer"), (Root, True, "rms"), (nn.RMSNorm, True, "rms")],
)
def test_residual_stream_of_a_transformer(norm: Any, gated: bool, kind: str) -> None:
    groups = lane_groups(adapted(lambda: Decoder(norm, gated))).value
    assert [g.size for g in free(groups)] == [8, 22, 22]
    stream = free(groups)[0]
    names = ("layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm")
    assert stream.norms == tuple(LaneNorm(name, kind, 8) for name in names)
    writers = {f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("o", "down")}
    assert {(m.name, m.axis) for m in stream.role("writer")} == {("tokens.weight", 1), *((w, 0) for w in writers)}
    readers = {f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("q", "kv", "up")}
    assert {(m.name, m.axis) for m in stream.role("reader")} == {("tokens.weight", 1), *((r, 1) for r in readers)}
    assert Member("places", 2, "pointwise") in stream.members
    assert stream.places.count(("tokens.weight", 1, 1, 0)) == 1
    hidden = places(free(groups)[1])
    assert (("layers.0.up.weight", 0, "writer", 1, 22) in hidden) == gated
    assert named(groups, "layers.0.q.weight", 0).fixed == "split into (2, 4)"
    assert named(groups, "layers.0.o.weight", 1).fixed is not None
    assert named(groups, "tokens.weight", 0).fixed == "rows of the table are chosen by number"


SMALL = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
         "decoder_start_token_id": 0},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes", "kind", "norms"),
    [
        ("gpt2", [32, 128, 128], "layer", 5),
        ("llama", [32, 64, 64], "rms", 5),
        ("bert", [32, 64, 64], "layer", 6),
        ("t5", [32, 64, 64, 64, 64], "rms", 12),
        ("vit", [32, 64, 64], "layer", 5),
        ("phi3", [32, 64, 64], "rms", 5),
    ],
)
def test_models_of_transformers(name: str, sizes: list[int], kind: str, norms: int) -> None:
    model, config, settings = SMALL[name]
    adapter = ModelAdapter(transformer(model, config, **settings))
    groups = free(lane_groups(adapter).value)
    assert [group.size for group in groups] == sizes
    assert [norm.kind for norm in groups[0].norms] == [kind] * norms
    for group in groups:
        assert permutes(adapter, group, seed=5) < 1e-12


@pytest.mark.parametrize(("name", "width", "hidden"), [("gpt", 128, 512), ("bert", 128, 512), ("vit", 64, 256)])
def test_examples(name: str, width: int, hidden: int) -> None:
    adapter = ModelAdapter(utils.load_model(f"example:{name}"))
    groups = free(lane_groups(adapter).value)
    assert [group.size for group in groups] == [width] + [hidden] * 4
    assert len(groups[0].norms) == 9


def test_attention_and_encoder_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(
        nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 20)
    )
    groups = lane_groups(adapted(model)).value
    assert [g.size for g in free(groups)] == [8, 12, 12]
    assert Member("1.layers.0.self_attn.in_proj_weight", 1, "reader") in free(groups)[0].members
    assert named(groups, "1.layers.0.self_attn.out_proj.weight", 1).fixed is not None


def test_a_wrong_trace_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the order of the lanes were understood to survive a sort.
    monkeypatch.setattr("utils.adapters.lane_tracing.ELEMENTWISE", frozenset({"flip", "relu"}))
    monkeypatch.setattr("utils.adapters.lane_tracing.MOVING", frozenset())
    group = named(lane_groups(adapted(Between(lambda x: x.flip(-1)))).value, "first.weight", 0)
    assert str(group.fixed).startswith("lanes are not interchangeable: permuting them changes the output by ")


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock = multilayer(), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize("model", [multilayer, Locked, Decoder])
def test_the_model_stays_as_it_was(model: Any) -> None:
    adapter = adapted(model)
    adapter.module.train()
    before = {name: value.clone() for name, value in adapter.module.state_dict().items()}
    groups = lane_groups(adapter).value
    change = permutes(adapter, free(groups)[0])
    assert change < (1e-5 if model is Locked else 1e-12)
    after = adapter.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert adapter.module.training
    assert adapter.changed is None
    assert not adapter.module._forward_hooks


def test_permuting_one_axis_alone_changes_the_output() -> None:
    adapter = adapted(multilayer)
    group = lane_groups(adapter).value[0]
    partial = LaneGroup(group.size, group.members[:1], (), "", None)
    assert permutes(adapter, partial) > 1e-3


def test_a_group_of_another_model_is_refused() -> None:
    groups = lane_groups(adapted(multilayer)).value
    with pytest.raises(AdapterError, match=r"no 0\.weight with 8 entries along axis 0.*Call lane_groups"):
        permutes(adapted(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))), groups[0])


def test_a_model_that_does_not_run_is_refused() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("never")

    with pytest.raises(AdapterError):
        lane_groups(adapted(Broken()))
