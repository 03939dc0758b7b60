"""Attention captured from fused, library and eager code, against weights computed independently."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.adapters.attention import AttentionCall, record_attention
from utils.adapters.contractions import factors
from utils.adapters.provenance import traced


class Attend(nn.Module):
    """Projections around a function of queries, keys and values ``(batch, heads, seq, dim)``."""

    def __init__(self, attend: Any, heads: int = 2, kv_heads: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 4 * heads), nn.Linear(8, 4 * kv_heads), nn.Linear(8, 4 * kv_heads)
        self.attend = attend

    def operands(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, ...]:
        memory = x if memory is None else memory
        return tuple(
            layer(given).unflatten(-1, (-1, 4)).transpose(1, 2)
            for layer, given in ((self.q, x), (self.k, memory), (self.v, memory))
        )

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        return self.attend(*self.operands(x, memory))


def record(model: nn.Module, *inputs: Tensor) -> list[AttentionCall]:
    return record_attention(model, lambda: model(*inputs))


def reference(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2.0
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
    grown = scores.exp()
    return grown / grown.sum(-1, keepdim=True)


def bias(q: Tensor) -> Tensor:
    return torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1)


def cut(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


WAYS = {
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "fused, boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias(q) == 0),
    "fused, additive mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias(q), 0.0, False),
    "fused, own scale": lambda q, k, v: F.scaled_dot_product_attention(2 * q, k, v, is_causal=True, scale=0.25),
    "softmax": lambda q, k, v: (q @ k.mT / 2 + bias(q)).softmax(-1) @ v,
    "scaled queries": lambda q, k, v: F.softmax((q * 0.5) @ k.transpose(2, 3) + bias(q), dim=-1) @ v,
    "in place": lambda q, k, v: nn.Softmax(-1)((q @ k.mT).div_(2.0).add_(bias(q))) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) / 2 + bias(q)).softmax(-1), v
    ),
    "einsum, heads last": lambda q, k, v: torch.einsum(
        "bqkh,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bqkh", q, k) / 2 + bias(q)[None, :, :, None]).softmax(2), v
    ),
    "batch and heads in one": lambda q, k, v: torch.bmm(
        (torch.bmm(cut(q), cut(k).mT) / 2 + bias(q)).softmax(-1), cut(v)
    ).view_as(q),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(bias(q).expand(len(cut(q)), -1, -1), cut(q), cut(k).mT, alpha=0.5).softmax(-1), cut(v)
    ).view_as(q),
    "written out": lambda q, k, v: written_out(q @ k.mT / 2 + bias(q)) @ v,
    "logarithm": lambda q, k, v: (q @ k.mT / 2 + bias(q)).log_softmax(-1).exp() @ v,
    "elementwise": lambda q, k, v: ((q[:, :, :, None] * k[:, :, None]).sum(-1) / 2 + bias(q)).softmax(-1) @ v,
}


def written_out(scores: Tensor) -> Tensor:
    grown = (scores - scores.amax(-1, keepdim=True)).exp()
    return grown / grown.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", WAYS)
def test_weights(name: str) -> None:
    torch.manual_seed(0)
    model, x = Attend(WAYS[name]), torch.randn(3, 5, 8)
    (call,) = record(model, x)
    q, k, _ = model.operands(x)
    assert call.weights.shape == (3, 2, 5, 5)
    torch.testing.assert_close(call.weights, reference(q, k, causal=True).detach())
    assert call.scale == pytest.approx(0.5)
    assert (call.head_dim, call.projected, call.bounded, call.causal) == (4, True, False, True)
    assert call.kind == ("scaled_dot_product_attention" if name.startswith("fused") else "softmax")
    assert call.scores is not None
    torch.testing.assert_close(call.scores, (q @ k.mT / 2).detach())


@pytest.mark.parametrize("eager", [False, True])
def test_cross_and_grouped(eager: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not eager:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
        return (q @ k.mT * 0.5).softmax(-1) @ v

    torch.manual_seed(0)
    model, x, memory = Attend(attend, heads=4), torch.randn(2, 3, 8), torch.randn(2, 7, 8)
    (call,) = record(model, x, memory)
    q, k, _ = model.operands(x, memory)
    torch.testing.assert_close(call.weights, reference(q, k.repeat_interleave(2, 1)).detach())
    assert call.weights.shape == (2, 4, 3, 7)
    assert not call.causal


@pytest.mark.parametrize("fast", [False, True])
def test_library_layers(fast: bool) -> None:
    """The kernel that runs a whole layer is turned off meanwhile, and turned on again."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            calls = record(model, x)
            expected = model.layers[0].self_attn(x, x, x, average_attn_weights=False)[1]
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [call.where for call in calls] == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(calls[0].weights, expected)


def test_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model, x = Attend(WAYS["softmax"]), torch.randn(2, 5, 8)
    before = model(x)
    outputs: list[Tensor] = []
    record_attention(model, lambda: outputs.append(model(x)))
    assert torch.equal(outputs[0], before)
    assert outputs[0].requires_grad
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_streaming_keeps_nothing() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(8, 8), Attend(WAYS["softmax"]))
    assert record_attention(model, lambda: model(torch.randn(2, 5, 8)), lambda call: seen.append(call.where)) == []
    assert seen == ["1"]


class Router(nn.Module):
    """A softmax over experts, one over classes, and one with sigmoids instead."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.out, self.parts = nn.Linear(8, 3), nn.Linear(8, 4), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        share = self.route(x).softmax(-1)
        mixed = torch.einsum("bte,bted->btd", share, self.parts(x).unflatten(-1, (3, 8)))
        mixed = mixed + (mixed @ mixed.mT).sigmoid() @ mixed
        return self.out(mixed).softmax(-1)


def test_what_is_no_attention() -> None:
    assert record(Router(), torch.randn(2, 5, 8)) == []
    assert record(nn.Linear(8, 8), torch.randn(2, 5, 8)) == []


def test_signs_of_care() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1) @ v

    def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.square().mean(-1, keepdim=True).rsqrt()) @ k.mT).softmax(-1) @ v

    def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.float() @ k.float().mT).softmax(-1) @ v

    for attend in (capped, normalised, by_hand):
        assert record(Attend(attend), torch.randn(2, 5, 8))[0].bounded
    call = record(Attend(upcast), torch.randn(2, 5, 8))[0]
    assert call.upcast
    assert not call.bounded


def test_unprojected_and_biased() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT + self.table).softmax(-1) @ x

    call = record(Biased(), torch.randn(2, 5, 8))[0]
    assert (call.projected, call.biased, call.scale, call.where) == (False, True, 1.0, "")
    assert call.weights.shape == (2, 1, 5, 5)


def test_a_crash_passes_through_and_hooks_go() -> None:
    def crash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise ValueError("inside")

    model = Attend(crash)
    with pytest.raises(ValueError, match="inside"):
        record(model, torch.randn(2, 5, 8))
    assert not model.q._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_no_note_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the notes cannot follow must not show: errors are kept, and there are none for ordinary code."""
    x = torch.randn(2, 5, 8)
    for attend in WAYS.values():
        model = Attend(attend)
        with traced(model, lambda contraction: None) as tracer:
            model(x)
        assert tracer.errors == []
    model = nn.Linear(8, 8)
    with traced(model, lambda contraction: None) as tracer:
        monkeypatch.setattr(tracer, "_describe", lambda *_: 1 / 0)
        assert model(x).shape == (2, 5, 8)
    assert tracer.errors


@pytest.mark.parametrize(
    ("equation", "left", "right", "labels"),
    [
        ("bqd,bkd->bqk", (2, 3, 4), (2, 5, 4), ("bqd", "bkd", "bqk")),
        ("...qd,...kd->...qk", (2, 3, 4), (2, 5, 4), ("aqd", "akd", "aqk")),
        ("ij,jk", (3, 4), (4, 5), ("ij", "jk", "ik")),
    ],
)
def test_einsum_labels(equation: str, left: Any, right: Any, labels: Any) -> None:
    found = factors("einsum", (equation, torch.ones(left), torch.ones(right)), {})
    assert found is not None
    assert (found.labels.left, found.labels.right, found.labels.out) == labels
    assert len(found.labels.contracted) == 1


def test_what_is_no_product() -> None:
    ones = torch.ones(2, 2)
    assert factors("add", (ones, ones), {}) is None
    assert factors("einsum", ("ij->ji", ones), {}) is None
    assert factors("einsum", ("ii,ij->j", ones, ones), {}) is None
    assert factors("matmul", (ones, 2.0), {}) is None
    found = factors("matmul", (torch.ones(3, 2, 4), torch.ones(4)), {})
    assert found is not None
    assert found.labels.own(False) == ""
