"""Content against what is added to it, for tokens and patches."""

import math

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.embedding_scale import check_embedding_scale, split
from utils.validation.runner import run_check


def check(model, config=None):
    return run_check(ModelAdapter(model, config), Check("scale", 1, "?", check_embedding_scale), 20.0)


class Tokens(nn.Module):
    """Token and position embeddings under a transformer encoder."""

    def __init__(self, token=0.02, position=0.02, kind="table", multiplier=1.0, types=None, width=32):
        super().__init__()
        self.tok, self.multiplier, self.kind = nn.Embedding(50, width), multiplier, kind
        nn.init.normal_(self.tok.weight, std=token)
        if kind == "table":
            self.pos = nn.Embedding(64, width)
            nn.init.normal_(self.pos.weight, std=position)
        elif kind == "parameter":
            self.pos = nn.Parameter(torch.randn(1, 64, width) * position)
        else:
            angles = torch.arange(64)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
            self.register_buffer("pos", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        self.types = nn.Embedding(2, width) if types else None
        if types:
            nn.init.normal_(self.types.weight, std=types)
        layer = nn.TransformerEncoderLayer(width, 2, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(width, 50)

    def forward(self, input_ids):
        length = input_ids.shape[1]
        x = self.tok(input_ids) * self.multiplier
        if self.types is not None:
            x = x + self.types(torch.zeros_like(input_ids))
        position = {"table": lambda: self.pos(torch.arange(length)), "parameter": lambda: self.pos[:, :length]}
        return self.head(self.encoder(x + position.get(self.kind, lambda: self.pos[:length])()))


class Patches(nn.Module):
    """A vision transformer's beginning."""

    def __init__(self, patch=None, position=0.02):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 5)
        if patch:
            nn.init.normal_(self.patch.weight, std=patch)
        self.pos = nn.Parameter(torch.randn(1, 16, 32) * position)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.config = {"image_size": 32}

    def forward(self, pixel_values):
        return self.head(self.block(self.patch(pixel_values).flatten(2).mT + self.pos).mean(1))


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (lambda: Tokens(position=1.0), "pos"),
        (lambda: Tokens(position=1.0, kind="parameter"), "pos"),
        (lambda: Tokens(kind="sinusoids"), "Tokens"),
        (lambda: Tokens(types=2.0), "types"),
        (lambda: Patches(patch=1e-3, position=1.0), "pos"),
    ],
)
def test_drowned_content(model, where):
    """An embedding at N(0, 1) and more over content at 0.02: the ratio is about 50."""
    torch.manual_seed(0)
    result = check(model())
    assert [(f.code, f.where, f.severity) for f in result.findings] == [("embedding_scale", where, "fail")]
    assert "times as much" in result.why
    assert result.value > result.threshold


@pytest.mark.parametrize(
    "model",
    [
        lambda: Tokens(),
        lambda: Tokens(token=1.0, position=1.0),
        lambda: Tokens(token=1.0, position=0.02),
        lambda: Tokens(token=1.0, position=1e-9),
        lambda: Tokens(kind="sinusoids", token=0.1),
        lambda: Tokens(kind="sinusoids", multiplier=math.sqrt(32)),
        lambda: Tokens(types=0.02),
        lambda: Patches(),
        lambda: Patches(position=1.0),
    ],
)
def test_sound_scales(model):
    """Equal scales, content over position, sinusoids as the original transformer and its heirs use them."""
    torch.manual_seed(0)
    result = check(model())
    assert result.findings == () and result.value <= result.threshold


def test_twenty_eight_times_warns():
    """Between the usual and the harmful."""
    torch.manual_seed(0)
    result = check(Tokens(position=0.6))
    assert [(f.code, f.severity) for f in result.findings] == [("embedding_scale", "warn")]
    assert result.value > result.threshold == 25.0


def test_the_number_that_decides_is_shown():
    """Slow waves have a limit of their own, and count with their mean."""
    torch.manual_seed(0)
    result = check(Tokens(kind="sinusoids"))
    assert result.value > result.threshold == 25.0
    assert f"{result.value:.3g} times" in result.why and "the limit is 25" in result.why


def test_split_of_known_parts():
    """Independent parts of known scale come out as they went in."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(64, 32, 256, generator=generator) * 0.5
    position = torch.randn(1, 32, 256, generator=generator) * 3.0
    shares = split(content + position + 2.0)
    assert shares.content == pytest.approx(0.5, rel=0.02)
    assert shares.position == pytest.approx(3.0, rel=0.02)
    assert shares.constant == pytest.approx(2.0, rel=0.05)


def test_where_it_does_not_apply():
    """Features have no embeddings; trained positions have the scale that serves them; a vector has no positions."""
    assert "no tokens or patches" in check(nn.Sequential(nn.Linear(8, 4))).why
    trained = Tokens(position=1.0)
    nn.init.normal_(trained.encoder.layers[0].norm1.weight)
    assert "trained" in check(trained).why

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.head = nn.Embedding(50, 8), nn.Linear(8, 4)

        def forward(self, input_ids):
            return self.head(self.tok(input_ids).mean(1))

    assert "no layer reads one vector per position" in check(Bag()).why
    silent = Tokens()
    nn.init.zeros_(silent.tok.weight)
    assert "no content reaches" in check(silent).why


def test_a_model_that_no_call_can_run_is_not_judged():
    """Its first layer may have been reached before the pass failed, which proves nothing."""
    model = Patches()
    model.head = nn.Linear(3, 4)
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"pixel_values": torch.randn(2, 3, 32, 32)}))
    assert adapter.failure is not None
    result = run_check(adapter, Check("scale", 1, "?", check_embedding_scale), 5.0)
    assert result.status == "skip" and result.could_not_run
