"""The axis of softmaxes and the scale of attention, on broken models and on sound ones that look alike."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.attention_arithmetic import check_attention_arithmetic
from utils.validation.check import Budget, Finding, Skipped

LENGTHS = 64


class Attend(nn.Module):
    """Self-attention whose scores, weights and sums are given as functions."""

    def __init__(self, attend: Any, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.attend, self.heads = attend, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Token ids in, logits out; the second of two blocks is the one under test."""

    def __init__(self, attention: nn.Module, vocabulary: int = 50, width: int = 32) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(LENGTHS, width)
        self.layers = nn.ModuleList([Attend(sound, width), attention])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(self.norm(x))


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def sound(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (causal(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))).softmax(-1) @ v


def root(x: Tensor) -> float:
    return math.sqrt(x.shape[-1])


def findings(model: nn.Module, **spec: Any) -> list[Finding]:
    adapter = ModelAdapter(model.eval(), spec=ModelSpec(**spec) if spec else None)
    assert adapter.failure is None
    return list(check_attention_arithmetic(adapter, Budget(10)).findings)


def written_out(scores: Tensor, dim: int) -> Tensor:
    grown = torch.exp(scores - scores.amax(dim, keepdim=True))
    return grown / grown.sum(dim, keepdim=True)


def flat(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).flatten(0, 1) / root(q)


WRONG_AXIS = {
    "queries": lambda q, k, v: (q @ k.mT / root(q)).softmax(-2) @ v,
    "queries, masked": lambda q, k, v: causal(q @ k.mT / root(q)).softmax(-2).nan_to_num() @ v,
    "heads": lambda q, k, v: torch.softmax(q @ k.mT / root(q), dim=1) @ v,
    "batch": lambda q, k, v: F.softmax(q @ k.mT / root(q), dim=0) @ v,
    "not given, 4-D": lambda q, k, v: F.softmax(q @ k.mT / root(q), dim=None) @ v,
    "not given, 3-D": lambda q, k, v: (F.softmax(flat(q, k), dim=None) @ v.flatten(0, 1)).view_as(v),
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).div(root(q)).softmax(2), v
    ),
    "einsum, other order": lambda q, k, v: torch.einsum(
        "bqkh,bhkd->bhqd", torch.einsum("bhqd,bhkd->bqkh", q, k).mul(q.shape[-1] ** -0.5).softmax(1), v
    ),
    "transposed weights": lambda q, k, v: (q @ k.mT / root(q)).softmax(-1).transpose(-2, -1) @ v,
    "all pairs": lambda q, k, v: (q @ k.mT / root(q)).flatten(2).softmax(-1).view(*q.shape[:3], -1) @ v,
    "written out": lambda q, k, v: written_out(q @ k.mT / root(q), -2) @ v,
    "in float32, cast back": lambda q, k, v: F.softmax(q @ k.mT / root(q), dim=-2, dtype=torch.float32).to(q.dtype) @ v,
    "with dropout": lambda q, k, v: F.dropout((q @ k.mT / root(q)).softmax(-2), 0.1, False) @ v,
    "baddbmm": lambda q, k, v: (
        torch.baddbmm(torch.zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=root(q) ** -1).softmax(1)
        @ v.flatten(0, 1)
    ).view_as(v),
}

UNSCALED = {
    "matmul": lambda q, k, v: causal(q @ k.mT).softmax(-1) @ v,
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0),
    "multiplied": lambda q, k, v: causal(q @ k.mT * root(q)).softmax(-1) @ v,
    "multiplied queries": lambda q, k, v: F.scaled_dot_product_attention(q * q.shape[-1], k, v, is_causal=True),
    "scaled after the softmax": lambda q, k, v: causal(q @ k.mT).softmax(-1) / root(q) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", causal(torch.einsum("bhqd,bhkd->bhqk", q, k)).softmax(-1), v
    ),
    "bmm": lambda q, k, v: (
        causal(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)).softmax(-1) @ v.flatten(0, 1)
    ).view_as(v),
    "scores in float32": lambda q, k, v: causal((q @ k.mT).float()).softmax(-1).type_as(v) @ v,
    "ALiBi": lambda q, k, v: causal(q @ k.mT - torch.arange(q.shape[2]).abs()).softmax(-1) @ v,
    "additive mask": lambda q, k, v: (q @ k.mT + torch.full((q.shape[2],) * 2, -math.inf).triu(1)).softmax(-1) @ v,
    "rotated": lambda q, k, v: causal(rotated(q) @ rotated(k).mT).softmax(-1) @ v,
    "written out": lambda q, k, v: written_out(causal(q @ k.mT), -1) @ v,
    "products written out": lambda q, k, v: causal((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)).softmax(-1) @ v,
    "scaled twice, wrongly": lambda q, k, v: causal((q / root(q)) @ k.mT * root(q)).softmax(-1) @ v,
}


def rotated(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2])[:, None] * 10.0 ** -torch.arange(x.shape[-1] // 2).repeat(2)
    half = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    return x * angles.cos() + half * angles.sin()


@pytest.mark.parametrize("name", WRONG_AXIS)
def test_wrong_axis(name: str) -> None:
    found = findings(Model(Attend(WRONG_AXIS[name])))
    assert [(f.code, f.severity, f.where) for f in found] == [("wrong_softmax_dim", "fail", "layers.1")]
    assert "sum" in found[0].message or "batch" in found[0].message


@pytest.mark.parametrize("name", UNSCALED)
@pytest.mark.parametrize("small", [False, True])
def test_missing_scale(name: str, small: bool) -> None:
    """Small initial weights hide the fault from every statistic of the scores."""
    model = Model(Attend(UNSCALED[name]))
    if small:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    found = findings(model)
    assert [(f.code, f.severity, f.where) for f in found] == [("missing_attention_scale", "fail", "layers.1")]


def test_evidence() -> None:
    found = findings(Model(Attend(UNSCALED["matmul"])))[0]
    assert found.message == (
        "nothing scales the product of queries and keys (factor 1, expected 1/sqrt(8) = 0.354): with inputs of unit "
        "variance the scores have a standard deviation of 2.83"
    )
    found = findings(Model(Attend(WRONG_AXIS["heads"])))[0]
    assert found.message.startswith("softmax along axis -3 of (3, 4, 17, 17), but the values are summed along axis -1")


class Pooled(nn.Module):
    """Features in, classes out; attention pools over time with weights made by `weigh` from scores (batch, time, 1)."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.enter, self.score, self.out = nn.Linear(6, 16), nn.Linear(16, 1), nn.Linear(16, 4)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).tanh()
        return self.out(self.pool(x, self.score(x)))


POOLING_FAULTS = {
    "single element": lambda x, s: (s.softmax(-1) * x).sum(1),
    "batch": lambda x, s: (s.softmax(0) * x).sum(1),
    "batch, matmul": lambda x, s: (s.squeeze(-1).softmax(0).unsqueeze(1) @ x).squeeze(1),
    "not given": lambda x, s: (F.softmax(s, dim=None) * x).sum(1),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("name", POOLING_FAULTS)
def test_pooling_along_the_wrong_axis(name: str) -> None:
    found = findings(Pooled(POOLING_FAULTS[name]), example_inputs={"x": torch.randn(2, 7, 6)})
    assert [(f.code, f.severity, f.where) for f in found] == [("wrong_softmax_dim", "fail", "Pooled")]


class Output(nn.Module):
    """Classes out, as probabilities along the axis `dim`."""

    def __init__(self, dim: int | None, log: bool = False, tokens: bool = False) -> None:
        super().__init__()
        self.enter = nn.Embedding(30, 8) if tokens else nn.Linear(6, 8)
        self.head = nn.Linear(8, 30 if tokens else 5)
        self.last = (nn.LogSoftmax if log else nn.Softmax)(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.enter(x)))


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        (Output(0), True),
        (Output(0, log=True), True),
        (Output(1), False),
        (Output(None), False),
        (Output(1, tokens=True), True),
        (Output(0, tokens=True), True),
        (Output(None, tokens=True), True),
        (Output(2, tokens=True), False),
    ],
)
def test_output_probabilities(model: Output, wrong: bool) -> None:
    """nn.Softmax is configured by its owner, so that is the module named."""
    found = findings(model)
    assert [(f.code, f.where) for f in found] == ([("wrong_softmax_dim", "Output")] if wrong else [])


class Gate(nn.Module):
    """Mixture of experts; the router's softmax runs along `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(self.dim)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (share.unsqueeze(-1) * every).sum(-2)


class Mixture(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tok, self.gate, self.head = nn.Embedding(30, 8), Gate(dim), nn.Linear(8, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.gate(self.tok(input_ids)))


def test_router() -> None:
    assert findings(Mixture(-1)) == []
    for dim in (0, 1):
        found = findings(Mixture(dim))
        assert [(f.code, f.severity, f.where) for f in found] == [("wrong_softmax_dim", "fail", "gate")]


class Normalised(Attend):
    """Queries and keys of unit length; a learned temperature takes the place of the scale."""

    def __init__(self) -> None:
        super().__init__(self.cosine)
        self.temperature = nn.Parameter(torch.full((4, 1, 1), 10.0).log())

    def cosine(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature.exp()
        return causal(scores).softmax(-1) @ v


def split_evenly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    quarter = q.shape[-1] ** -0.25
    return causal((q * quarter) @ (k * quarter).mT).softmax(-1) @ v


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(torch.tanh(q @ k.mT / 50.0) * 50.0).softmax(-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in slot attention: queries compete for keys."""
    weights = (q @ k.mT / root(q)).softmax(-2)
    return weights / weights.sum(-1, keepdim=True) @ v


def quiet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An extra score that is no key, as in models with attention sinks."""
    scores = causal(q @ k.mT / root(q))
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1] @ v


def swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys times queries: the other layout of the same attention."""
    return (v.mT @ (k @ q.mT / root(q)).softmax(-2)).mT


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT - 3.0).sigmoid() @ v


def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-covariance attention mixes features, not positions."""
    return v @ (F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1).mT


SOUND = {
    "plain": lambda: Attend(sound),
    "fused": lambda: Attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "scaled queries": lambda: Attend(lambda q, k, v: causal(q.mul(q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v),
    "scaled half and half": lambda: Attend(split_evenly),
    "scaled after the mask": lambda: Attend(lambda q, k, v: (causal(q @ k.mT) / root(q)).softmax(-1) @ v),
    "one over d": lambda: Attend(lambda q, k, v: causal(q @ k.mT / q.shape[-1]).softmax(-1) @ v),
    "by the whole width": lambda: Attend(lambda q, k, v: causal(q @ k.mT / 32**0.5).softmax(-1) @ v),
    "active dropout": lambda: Attend(lambda q, k, v: F.dropout(causal(q @ k.mT / root(q)).softmax(-1), 0.2, True) @ v),
    "cosine": Normalised,
    "soft cap": lambda: Attend(soft_capped),
    "linear": lambda: Attend(linear_attention),
    "renormalised": lambda: Attend(renormalised),
    "sink": lambda: Attend(quiet),
    "swapped": lambda: Attend(swapped),
    "sigmoid": lambda: Attend(sigmoid),
    "channels": lambda: Attend(channels),
    "masked rows": lambda: Attend(
        lambda q, k, v: (q @ k.mT / root(q)).masked_fill(torch.ones(17, 17).triu().bool()[: q.shape[2], : q.shape[2]],
                                                         -math.inf).softmax(-1).nan_to_num() @ v
    ),
    "library": lambda: Library(),
}  # fmt: skip


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("name", SOUND)
def test_sound_attention(name: str) -> None:
    assert findings(Model(SOUND[name]())) == []


class Capsules(nn.Module):
    """Routing by agreement (Sabour et al., 2017): the outputs compete for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.vote = nn.Linear(6, 24), nn.Linear(4, 5 * 4)

    def forward(self, x: Tensor) -> Tensor:
        votes = self.vote(self.enter(x).unflatten(-1, (6, 4))).unflatten(-1, (5, 4))
        agreement = torch.zeros(votes.shape[:3])
        for _ in range(3):
            result = torch.tanh((agreement.softmax(-1).unsqueeze(-1) * votes).sum(1))
            agreement = agreement + (votes * result.unsqueeze(1)).sum(-1)
        return result.norm(dim=-1)


class Recurrent(nn.Module):
    """Unscaled dot products of recurrent states (Luong et al., 2015), which are bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn, self.head = nn.Embedding(30, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(32, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.rnn(self.tok(input_ids))[0]
        context = causal(states @ states.mT).softmax(-1) @ states
        return self.head(torch.cat((states, context), -1))


class NonLocal(nn.Module):
    """Unscaled embedded Gaussian of a non-local block (Wang et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(3, 8, 1) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        q, k, v = (part(pixel_values).flatten(2) for part in (self.theta, self.phi, self.g))
        mixed = (q.mT @ k).softmax(-1) @ v.mT
        return self.head(mixed.mean(1))


@pytest.mark.parametrize(
    "build", [Capsules, Recurrent, NonLocal, lambda: Pooled(lambda x, s: (s.softmax(1) * x).sum(1))]
)
def test_sound_models_of_other_kinds(build: Any) -> None:
    model = build()
    examples = {Capsules: {"x": (2, 6)}, Pooled: {"x": (2, 7, 6)}, NonLocal: {"pixel_values": (2, 3, 6, 6)}}
    shapes = examples.get(type(model))
    spec = {"example_inputs": {name: torch.randn(shape) for name, shape in shapes.items()}} if shapes else {}
    assert findings(model, **spec) == []


def test_initialization_may_absorb_the_scale() -> None:
    model = Model(Attend(UNSCALED["matmul"]))
    with torch.no_grad():
        for layer in model.layers:
            layer.q.weight.mul_(8**-0.5)
            layer.q.bias.mul_(8**-0.5)
    assert findings(model) == []


def test_doubt_only_warns() -> None:
    class Biased(Attend):
        def __init__(self) -> None:
            super().__init__(
                lambda q, k, v: causal(q @ k.mT + self.bias[:, : q.shape[2], : q.shape[2]]).softmax(-1) @ v
            )
            self.bias = nn.Parameter(torch.zeros(4, LENGTHS, LENGTHS))

    def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v

    for attention in (Biased(), Attend(upcast)):
        assert [(f.code, f.severity) for f in findings(Model(attention))] == [("missing_attention_scale", "warn")]


def test_a_stated_scale_is_on_purpose() -> None:
    model = Model(Attend(UNSCALED["fused"]))
    model.config = {"attention_multiplier": 1.0}  # type: ignore[assignment]
    assert findings(model) == []
    model.config = {"dropout": 1.0}  # type: ignore[assignment]
    assert len(findings(model)) == 1


def test_one_finding_for_one_line_of_code() -> None:
    model = Model(Attend(UNSCALED["matmul"]))
    model.layers[0] = Attend(UNSCALED["matmul"])
    found = findings(model)
    assert [f.where for f in found] == ["layers.0"]
    assert found[0].message.endswith("(and 1 more like it)")


def test_reproductions_run(capsys: pytest.CaptureFixture[str]) -> None:
    for attend in (WRONG_AXIS["queries"], UNSCALED["matmul"]):
        model = Model(Attend(attend)).eval()
        exec(findings(model)[0].reproduction, {"model": model})
        assert "layers.1" in capsys.readouterr().out or attend is WRONG_AXIS["queries"]


def test_nothing_to_judge() -> None:
    with pytest.raises(Skipped, match="no softmax and no attention"):
        check_attention_arithmetic(ModelAdapter(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), Budget(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    assert findings(Model(Attend(sound)).to(dtype)) == []
    assert [f.code for f in findings(Model(Attend(WRONG_AXIS["queries"])).to(dtype))] == ["wrong_softmax_dim"]
    assert [f.code for f in findings(Model(Attend(UNSCALED["matmul"])).to(dtype))] == ["missing_attention_scale"]


@pytest.mark.parametrize(("factor", "codes"), [(12 / 4, []), (16**0.5, ["missing_attention_scale"])])
def test_a_temperature_is_no_forgotten_scale(factor: float, codes: list[str]) -> None:
    """Width 16: twelve times the usual scale was chosen, a multiplication by the root was not."""

    class Sharp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(50, 16))
            self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
            self.out = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table[input_ids]
            weights = (torch.einsum("bqd,bkd->bqk", self.query(x), self.key(x)) * factor).softmax(-1)
            # The values, and the projection after them, in one product of three.
            return torch.einsum("bqk,bkd,de->bqe", weights, x, self.out)

    torch.manual_seed(0)
    found = findings(Sharp())
    assert [(f.code, f.severity, f.where) for f in found] == [(code, "fail", "Sharp") for code in codes]
