"""What each operation does to lanes: what keeps them, what joins them, and what cannot grow, with the reason."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.adapters.lane_models import Between, adapted, free, grown_change, named
from utils.adapters.lane_labels import Slots
from utils.adapters.lanes import LaneNorm, Member, lane_groups, permutes


def test_slots_are_united_and_fixed_by_lane() -> None:
    slots = Slots()
    rows, columns = slots.add("weight", (3, 4))
    (bias,) = slots.add("bias", (3,))
    assert [(e.name, e.axis, e.size) for e in slots.entries] == [("weight", 0, 3), ("weight", 1, 4), ("bias", 0, 3)]
    slots.unite(rows.flatten(), bias)
    assert slots.same(rows, bias)
    assert not slots.same(rows[:2], bias[1:])
    # Of labels that meet numbers without a lane, those lanes are fixed.
    slots.unite(torch.tensor([0, *columns.flatten()[1:].tolist()]), columns.flatten())
    assert [(slots.roots(labels).tolist(), reason) for labels, reason in slots.reasons] == [
        ([int(columns[0, 0])], "only some of its lanes are combined with lanes that are known")
    ]
    assert slots.compressed(rows.expand(3, 4)).shape == (3, 1)
    assert np.array_equal(slots.roots(0), 0)


def centred(x: Tensor) -> Tensor:
    deviations = x - x.mean(-1, keepdim=True)
    return deviations / (deviations.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def held_out(x: Tensor) -> Tensor:
    return x * float(x.mean())


def written(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:] = x
    return made


def grouped(x: Tensor) -> Tensor:
    return F.group_norm(x, 2)


def divided(x: Tensor, parts: Any) -> Tensor:
    return x.relu() * (parts[0](x).pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def uneven(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first.relu(), second.tanh()], -1)


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (lambda x: x.softmax(-1), "`softmax` runs over its lanes"),
        (lambda x: x * x.sum(-1, keepdim=True), "`sum` runs over its lanes"),
        (lambda x: x * x.mean(-1, keepdim=True), "`mean` is taken across its lanes"),
        (lambda x: x - x.mean(-1, keepdim=True), "`mean` is taken across its lanes"),
        (lambda x: F.normalize(x, dim=-1), "`normalize` runs over its lanes"),
        (lambda x: x.cumsum(-1), "`cumsum` runs over its lanes"),
        (lambda x: x.sort(-1).values, "`sort` touches it"),
        (lambda x: x.topk(8).values, "`topk` touches it"),
        (lambda x: x[:, :8].relu() + x[:, 1:2], "cut by `getitem`"),
        (lambda x: x.view(-1, 2, 4).relu().flatten(1), "split into (2, 4)"),
        (lambda x: x + torch.arange(8.0), "combined with 8 numbers of constants"),
        (lambda x: x @ torch.ones(8, 8), "multiplied with 8 numbers of constants"),
        (lambda x: F.pad(x, (0, 0), value=1.0).view(-1, 2, 4).transpose(1, 2).flatten(1), "split into (2, 4)"),
        (uneven, "`chunk` cuts it into 2 equal parts"),
        (grouped, "`group_norm` takes statistics over 2 groups"),
        (held_out, "`mean` is taken across its lanes"),
        (written, "`setitem` touches it"),
        (lambda x: torch.zeros(len(x), 8), "nothing was seen that reads its lanes"),
    ],
)  # fmt: skip
def test_what_cannot_grow_says_why(inner: Any, reason: str) -> None:
    groups = lane_groups(adapted(Between(inner))).value
    group = named(groups, "first.weight", 0)
    assert group.fixed is not None
    assert reason in group.fixed
    assert not free(groups)


@pytest.mark.parametrize(
    "inner",
    [
        torch.relu,
        lambda x: F.layer_norm(x, (8,)),
        lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-6).rsqrt(),
        lambda x: (lambda m: (x - m) / ((x - m).square().mean(-1, keepdim=True) + 1e-6).sqrt())(
            x.mean(-1, keepdim=True)
        ),
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5,
        lambda x: x.unsqueeze(1).expand(-1, 3, -1).mean(1),
        lambda x: torch.stack([x, x.relu()], 1).amax(1),
        lambda x: torch.cat([x, x], 0)[: len(x)],
        lambda x: x.movedim(0, 1).contiguous().mT.clamp(-1, 1).masked_fill(torch.zeros(()).bool(), 0.0),
    ],
)
def test_what_keeps_lanes(inner: Any) -> None:
    adapter = adapted(Between(inner))
    (group,) = free(lane_groups(adapter).value)
    assert group.size == 8


def test_numbers_divided_by_a_statistic_of_other_lanes_are_not_normalised() -> None:
    adapter = adapted(Between(divided, parts=nn.ModuleList([nn.Linear(8, 5)])))
    groups = lane_groups(adapter).value
    assert "`mean` is taken across its lanes" in str(named(groups, "parts.0.weight", 0).fixed)
    assert [group.size for group in free(groups)] == [8]
    assert free(groups)[0].norms == ()


KEEPING = {
    "act": lambda x: F.silu(x),
    "turn": lambda x: x.unsqueeze(1).transpose(1, 2).contiguous().flatten(1),
    "there and back": lambda x: x.mT.clone().permute(1, 0),
    "skip": lambda x: x + x.tanh(),
    "gate": lambda x: x * x.sigmoid(),
    "root": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "copies": lambda x: torch.stack([x, 2 * x], 1).mean(1),
    "halves": lambda x: torch.cat(x.chunk(2, 0), 0),
    "turned": lambda x: torch.einsum("bc,bd->bc", x, torch.ones(len(x), 2)),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(sorted(KEEPING)), min_size=1, max_size=6))
def test_any_chain_of_operations_that_keep_lanes(names: list[str]) -> None:
    def inner(x: Tensor) -> Tensor:
        for name in names:
            x = KEEPING[name](x)
        return x

    adapter = adapted(Between(inner))
    (group,) = free(lane_groups(adapter).value)
    assert group.size == 8
    assert permutes(adapter, group, seed=1) < 1e-12
    wanted = {kind for name, kind in (("root", "rms"), ("norm", "layer")) if name in names}
    assert {norm.kind for norm in group.norms} == wanted


def test_norms_in_code_without_a_module_have_no_name() -> None:
    groups = free(lane_groups(adapted(Between(lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()))).value)
    assert groups[0].norms == (LaneNorm("", "rms", 8),)


def test_statistics_over_groups_written_by_hand() -> None:
    def by_two(x: Tensor) -> Tensor:
        parts = x.view(-1, 2, 4)
        mean, deviation = parts.mean(-1, keepdim=True), parts.std(-1, keepdim=True)
        return ((parts - mean) / (deviation + 1e-6)).flatten(1)

    group = named(lane_groups(adapted(Between(by_two))).value, "first.weight", 0)
    assert group.norms == (LaneNorm("", "group", 8),)
    assert group.fixed == "split into (2, 4)"


def test_concatenation_has_offsets() -> None:
    def both(x: Tensor, parts: Any) -> Tensor:
        return torch.cat([x.relu(), parts[0](x)], -1)

    adapter = adapted(Between(both, after=13, parts=nn.ModuleList([nn.Linear(8, 5)])))
    groups = free(lane_groups(adapter).value)
    assert Member("last.weight", 1, "reader", 1, 8) in groups[1].members
    assert {m for m in groups[0].members if m.role == "reader"} == {
        Member("last.weight", 1, "reader"), Member("parts.0.weight", 1, "reader")
    }  # fmt: skip
    assert all(grown_change(adapter, group) < 1e-12 for group in groups)


def test_a_norm_over_two_widths_says_how_many_lanes_it_covers() -> None:
    def both(x: Tensor, parts: Any) -> Tensor:
        return F.layer_norm(torch.cat([x.relu(), parts[0](x)], -1), (13,))

    groups = free(lane_groups(adapted(Between(both, after=13, parts=nn.ModuleList([nn.Linear(8, 5)])))).value)
    assert [(g.size, g.norms) for g in groups] == [(8, (LaneNorm("", "layer", 13),)), (5, (LaneNorm("", "layer", 13),))]

    def constants(x: Tensor, parts: Any) -> Tensor:
        return F.layer_norm(torch.cat([x.relu(), torch.ones(len(x), 3)], -1), (11,))

    group = named(lane_groups(adapted(Between(constants, after=11, parts=0))).value, "first.weight", 0)
    assert group.fixed == "`layer_norm` is taken across it and numbers that are no lanes"


@pytest.mark.parametrize("equation", ["bi,oi->bo", "bi,oi"])
def test_products_written_out(equation: str) -> None:
    weight = nn.ParameterList([nn.Parameter(torch.randn(5, 8))])

    def inner(x: Tensor, parts: Any) -> Tensor:
        return torch.einsum(equation, x, parts[0]) if "->" in equation else x @ parts[0].T

    groups = free(lane_groups(adapted(Between(inner, after=5, parts=weight))).value)
    assert [g.size for g in groups] == [8, 5]
    assert Member("parts.0", 1, "reader") in groups[0].members
    assert Member("parts.0", 0, "writer") in groups[1].members


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_operators_that_no_call_announces_are_noticed() -> None:
    @torch.jit.script
    def scripted(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    # The mean is the same in any order, so that no permutation could show that a wider model has another one.
    groups = lane_groups(adapted(Between(lambda x: x.relu() + scripted(x)))).value
    assert named(groups, "first.weight", 0).fixed == "`mean` touches it, an operation that is not followed"


def test_convolution_in_groups_and_weight_norm_and_recurrence_are_fixed() -> None:
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1, groups=2), nn.Conv2d(6, 4, 1), nn.Flatten(2), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    groups = lane_groups(adapted(convolutions)).value
    assert "2 groups" in str(named(groups, "0.weight", 0).fixed)
    assert "2 groups" in str(named(groups, "1.weight", 0).fixed)
    assert [g.size for g in free(groups)] == [4]

    normed = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 2))
    groups = lane_groups(adapted(normed)).value
    assert not free(groups)
    assert named(groups, "0.weight", 0).fixed is not None

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.inner, self.head = nn.Embedding(20, 8), nn.LSTM(8, 7, batch_first=True), nn.Linear(7, 20)

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.inner(self.tokens(input_ids))[0])
            return out

    groups = lane_groups(adapted(Recurrent())).value
    assert not free(groups)
    assert named(groups, "tokens.weight", 1).fixed == "`lstm` touches it, an operation that is not followed"


def test_lanes_that_do_not_reach_the_output_prove_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Hardtanh(1e6, 2e6), nn.Linear(6, 3))
    groups = lane_groups(adapted(model)).value
    assert not free(groups)
    assert "does not reach the output" in str(groups[0].fixed)


class Idle(nn.Module):
    """A part that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x).relu()
        return (self.last(hidden), self.other(hidden)) if self.training else self.last(hidden)


def test_parameters_that_did_not_run_may_have_the_same_lanes() -> None:
    group = lane_groups(adapted(Idle())).value[0]
    assert group.fixed == "other.weight, which took no part in the pass, may have the same lanes"


class Queries(nn.Module):
    """Learned vectors that layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.q, self.k = nn.Parameter(torch.randn(3, 6)), nn.Linear(6, 5), nn.Linear(6, 5)
        self.v, self.head = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        weights = torch.sigmoid(self.q(self.queries) @ self.k(x).transpose(1, 2))
        out: Tensor = self.head((weights @ self.v(x)).mean(1))
        return out


def test_learned_queries_are_read_as_activations() -> None:
    groups = lane_groups(adapted(Queries())).value
    assert [g.size for g in free(groups)] == [6, 7]
    assert set(free(groups)[0].members) == {Member("queries", 1, "writer"), Member("q.weight", 1, "reader")}
    assert named(groups, "q.weight", 0).fixed == "two activations are multiplied along it, as queries and keys are"


class Added(nn.Module):
    """A low-rank matrix is added to a weight; zero at first, as in LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.last.weight + self.up @ self.down)


def test_products_of_parameters_are_fixed() -> None:
    groups = lane_groups(adapted(Added())).value
    assert named(groups, "first.weight", 0).fixed == "two parameters are multiplied with each other"
    assert not free(groups)


def test_two_widths_in_one_axis_are_fixed() -> None:
    def outer(x: Tensor, parts: Any) -> Tensor:
        return (x.unsqueeze(-1) * parts[0](x).unsqueeze(-2)).flatten(1)

    groups = lane_groups(adapted(Between(outer, after=40, parts=nn.ModuleList([nn.Linear(8, 5)])))).value
    assert named(groups, "parts.0.weight", 0).fixed == "its lanes and others are flattened into one axis"
    assert not free(groups)


def test_an_unknown_branch_that_is_zero_at_first_is_no_constant() -> None:
    def unknown(x: Tensor, parts: Any) -> Tensor:
        return x + torch.renorm(parts[0](x.relu()) * 0, 2, 0, 1)

    model = Between(unknown, parts=nn.ModuleList([nn.Linear(8, 8)]))
    groups = lane_groups(adapted(model)).value
    assert "combined with" in str(named(groups, "first.weight", 0).fixed)
