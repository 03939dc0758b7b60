"""Loops over positions, samples and heads are found with their module; recurrences, layers and experts are none."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.runtime.isolation import preserved
from utils.validation.probing import has_length
from utils.validation.python_loops import find_loops


class Layer(nn.Module):
    """One way of mixing ``(batch, length, 16)``."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.one, self.two, self.qkv = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 48)
        self.cell, self.lstm = nn.GRUCell(16, 16), nn.LSTM(16, 16, batch_first=True)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.route = nn.Linear(16, 4)
        self.decay = nn.Parameter(torch.rand(16))

    def forward(self, x):
        return getattr(self, self.how)(x)

    def heads(self, x):
        batch, length, _ = x.shape
        return (part.view(batch, length, 4, 4).transpose(1, 2) for part in self.qkv(x).split(16, -1))

    # Needless loops.
    def positions_by_index(self, x):
        return torch.stack([self.one(x[:, t]).relu() for t in range(x.shape[1])], dim=1)

    def positions_unbound(self, x):
        outputs = []
        for step in x.unbind(1):
            outputs.append(self.one(step))
        return torch.stack(outputs, 1)

    def positions_assigned(self, x):
        out = torch.zeros_like(x)
        for t in range(x.shape[1]):
            out[:, t] = functional.gelu(x[:, t] @ self.one.weight)
        return out

    def positions_averaged(self, x):
        return torch.stack([x[:, : t + 1].mean(1) for t in range(x.shape[1])], 1)

    def queries(self, x):
        q, k, v = self.heads(x)
        rows = []
        for t in range(x.shape[1]):
            scores = q[:, :, t : t + 1] @ k[:, :, : t + 1].transpose(-1, -2) / 2
            rows.append(scores.softmax(-1) @ v[:, :, : t + 1])
        return torch.cat(rows, 2).transpose(1, 2).flatten(2)

    def samples(self, x):
        return torch.stack([self.two(self.one(row)) for row in x])

    def samples_and_positions(self, x):
        return torch.stack([torch.stack([self.one(token) for token in row]) for row in x])

    def tokens_to_experts(self, x):
        flat = x.flatten(0, 1)
        choice = self.route(flat).argmax(-1).tolist()
        return torch.stack([self.experts[e](token) for e, token in zip(choice, flat, strict=True)]).view_as(x)

    def head_by_head(self, x):
        q, k, v = self.heads(x)
        outputs = [(q[:, h] @ k[:, h].mT / 2).softmax(-1) @ v[:, h] for h in range(4)]
        return torch.cat(outputs, -1)

    def head_by_head_fused(self, x):
        q, k, v = (t.chunk(4, -1) for t in self.qkv(x).chunk(3, -1))
        return torch.cat([functional.scaled_dot_product_attention(*qkv) for qkv in zip(q, k, v, strict=True)], -1)

    def head_by_head_projected(self, x):
        outputs = []
        for h in range(4):
            q, k, v = (part[..., 4 * h : 4 * h + 4] for part in self.qkv(x).split(16, -1))
            outputs.append((q @ k.mT / 2).softmax(-1) @ v)
        return torch.cat(outputs, -1)

    def feature_by_feature(self, x):
        return torch.stack([self.one(x)] * 1 + [torch.tanh(x)], 0).sum(0) + torch.stack(
            [torch.tanh(x[..., j]) * 2 for j in range(16)], -1
        )

    # Sound ones.
    def batched(self, x):
        q, k, v = self.heads(x)
        return ((q @ k.mT / math.sqrt(4)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def recurrent_module(self, x):
        return self.lstm(x)[0]

    def recurrent_cell(self, x):
        state, outputs = x[:, 0], []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state)
        return torch.stack(outputs, 1)

    def recurrent_by_hand(self, x):
        state, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.tanh(self.one(x[:, t]) + self.two(state))
            outputs.append(state)
        return torch.stack(outputs, 1)

    def scan(self, x):
        state, outputs, gates = torch.zeros_like(x[:, 0]), [], self.one(x)
        for t in range(x.shape[1]):
            state = self.decay * state + gates[:, t]
            outputs.append(state * x[:, t])
        return torch.stack(outputs, 1)

    def routed(self, x):
        flat = x.flatten(0, 1)
        choice, out = self.route(flat).argmax(-1), torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            chosen = (choice == index).nonzero()[:, 0]
            if len(chosen):
                out[chosen] = expert(flat[chosen])
        return out.view_as(x)

    def averaged_dropout(self, x):
        return sum(self.one(functional.dropout(x, 0.5, self.training)) for _ in range(5)) / 5

    def gated(self, x):
        i, f, g, o = torch.cat([self.qkv(x), self.one(x)], -1).chunk(4, -1)
        return torch.sigmoid(i) * torch.sigmoid(f) * torch.tanh(g) * torch.sigmoid(o)


class Language(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.layers = nn.ModuleList([Layer("batched"), Layer(how), Layer("batched")])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Patches(nn.Module):
    """An image classifier: the number of positions never changes."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 16, 8, 8), Layer(how), nn.Linear(16, 5)

    def forward(self, pixel_values):
        return self.head(self.mix(self.conv(pixel_values).flatten(2).mT).mean(1))


def loops(model):
    torch.manual_seed(0)
    adapter = ModelAdapter(model)
    with preserved(model, 0):
        model.eval()
        return find_loops(adapter, has_length(adapter))


NEEDLESS = {
    "positions_by_index": "per position", "positions_unbound": "per position", "positions_assigned": "per position",
    "positions_averaged": "per position", "queries": "per position", "samples": "per sample",
    "samples_and_positions": "per sample", "tokens_to_experts": "per sample", "head_by_head": "matmul is called on 4",
    "head_by_head_fused": "scaled_dot_product_attention is called on 4",
    "head_by_head_projected": "linear is called 4 times on the very same tensors",
    "feature_by_feature": "tanh is called on 16 slices",
}  # fmt: skip
SOUND = (
    "batched",
    "recurrent_module",
    "recurrent_cell",
    "recurrent_by_hand",
    "scan",
    "routed",
    "gated",
    "averaged_dropout",
)


@pytest.mark.parametrize("how", NEEDLESS)
def test_needless_loops(how):
    findings, counts = loops(Language(how))
    assert {(f.code, f.severity, f.where) for f in findings} == {("slow_python_loop", "warn", "layers.1")}
    assert NEEDLESS[how] in findings[0].message
    assert counts["batch 2, length 8"] > 0


@pytest.mark.parametrize("how", SOUND)
def test_no_loops(how):
    assert loops(Language(how))[0] == []
    assert loops(Patches(how))[0] == []


@pytest.mark.parametrize("how", ["positions_by_index", "samples", "head_by_head", "head_by_head_fused"])
def test_loops_over_a_fixed_number_of_patches(how):
    assert [(f.code, f.where) for f in loops(Patches(how))[0]] == [("slow_python_loop", "mix")]


class Experts(nn.Module):
    """Each token takes one of eight experts; those without tokens are skipped."""

    def __init__(self):
        super().__init__()
        self.words, self.gate = nn.Embedding(60, 16), nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.SiLU()) for _ in range(8))

    def forward(self, input_ids):
        x = self.words(input_ids).flatten(0, 1)
        best, chosen = self.gate(x).softmax(-1).max(-1)
        y = x
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if rows.numel():
                y = y.index_add(0, rows, expert(x[rows]) * best[rows, None])
        return y.view(*input_ids.shape, 16)


class TwoLayers(nn.Module):
    """Its own forward runs two layers, each a loop over time."""

    def __init__(self):
        super().__init__()
        self.words, self.weight = nn.Embedding(60, 16), nn.Parameter(torch.randn(2, 16, 16) / 4)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for weight in self.weight:
            x = torch.stack([torch.tanh(x[:, t] @ weight) for t in range(x.shape[1])], 1)
        return x


class Mapped(nn.Module):
    """Makes its mask inside of torch.vmap, where tensors have no storage of their own."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(60, 16)

    def forward(self, input_ids):
        x = self.words(input_ids)
        steps = torch.arange(x.shape[1])
        seen = torch.vmap(lambda row: row.mul(1).ge(steps))(steps)
        return (x @ x.mT).masked_fill(~seen, -1e9).softmax(-1) @ x


class Sorted(nn.Module):
    """Every expert gets the rows that were sorted to it; only for some of them the counts agree."""

    def __init__(self, counts):
        super().__init__()
        self.words, self.counts = nn.Embedding(60, 16), counts
        self.weights = nn.Parameter(torch.randn(len(counts), 16, 16))

    def forward(self, input_ids):
        x = self.words(input_ids)
        rows = x.flatten(0, 1)
        taken = rows[: sum(self.counts)].split(self.counts)
        made = [functional.linear(part, weight) for part, weight in zip(taken, self.weights, strict=True)]
        return torch.cat([*made, rows[sum(self.counts) :]]).view_as(x)


class Numbers(nn.Module):
    """Reads many numbers one after another, which is no work on them; or works on each."""

    def __init__(self, work):
        super().__init__()
        self.words, self.work = nn.Embedding(60, 32), work

    def forward(self, input_ids):
        x = self.words(input_ids)
        mean = x.mean((0, 1))
        read = [mean[i].exp() if self.work else mean[i].item() for i in range(32)]
        return x + (torch.stack(read) if self.work else sum(read))


class TwoScans(nn.Module):
    """A recurrence that runs once for each of two heads, over one tensor."""

    def __init__(self):
        super().__init__()
        self.words, self.weight = nn.Embedding(60, 16), nn.Parameter(torch.randn(8, 8) / 4)

    def forward(self, input_ids):
        parts, heads = self.words(input_ids).unflatten(-1, (2, 8)), []
        for head in range(2):
            state, steps = parts[:, 0, head] * 0, []
            for step in range(parts.shape[1]):
                state = state * 0.9 + parts[:, step, head]
                steps.append(torch.matmul(parts[:, step, head], self.weight) * state)
            heads.append(torch.stack(steps, 1))
        return torch.cat(heads, -1)


@pytest.mark.parametrize(
    "build", [Mapped, lambda: Sorted([2, 2, 2, 3, 1]), lambda: Numbers(False), TwoScans],
    ids=["vmap", "ragged experts", "numbers", "two scans"],
)  # fmt: skip
def test_what_only_looks_like_a_loop_over_slices(build):
    torch.manual_seed(0)
    assert find_loops(ModelAdapter(build()), True)[0] == []


@pytest.mark.parametrize("build", [lambda: Sorted([2, 2, 2, 2, 2]), lambda: Numbers(True)])
def test_equal_slices_and_work_on_numbers_are_loops(build):
    torch.manual_seed(0)
    assert [f.code for f in find_loops(ModelAdapter(build()), True)[0]] == ["slow_python_loop"]


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_more_tokens_wake_are_no_loop(seed):
    torch.manual_seed(seed)
    assert find_loops(ModelAdapter(Experts()), True)[0] == []


def test_layers_one_after_another_hide_no_loop():
    (finding,), _ = find_loops(ModelAdapter(TwoLayers()), True)
    assert (finding.code, finding.severity, finding.where) == ("slow_python_loop", "warn", "TwoLayers")
