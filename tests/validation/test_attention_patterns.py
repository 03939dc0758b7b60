"""What heads look at: measures against closed forms, copies of heads, pictures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError
from utils.validation.attention_patterns import attention_figure, check_attention_patterns, measures, similarity
from utils.validation.check import Budget, Outcome, Skipped


def run(model: nn.Module) -> Outcome:
    adapter = ModelAdapter(model.eval())
    with torch.no_grad():
        return check_attention_patterns(adapter, Budget(20))


def test_measures_of_known_maps() -> None:
    length = 6
    first = torch.zeros(length, length)
    first[:, 0] = 1
    previous = torch.eye(length).roll(1, 0)
    previous[0] = torch.eye(length)[0]
    uniform = torch.full((length, length), 1 / length)
    found = measures(torch.stack((first, previous, uniform))[None], causal=False, square=True)
    assert found["entropy"][0].tolist() == pytest.approx([0, 0, 1])
    assert found["sink"][0].tolist() == pytest.approx([1, 1 / 5, 1 / 6])
    assert found["previous"][0].tolist() == pytest.approx([1 / 5, 1, 1 / 6])
    expected = np.abs(np.subtract.outer(np.arange(6), np.arange(6))).mean()
    assert found["distance"][0].tolist() == pytest.approx([2.5, 5 / 6, expected])


def test_entropy_of_causal_maps_is_relative_to_what_is_visible() -> None:
    visible = torch.ones(5, 5).tril()
    uniform = (visible / visible.sum(-1, keepdim=True))[None, None]
    assert measures(uniform, causal=True, square=True)["entropy"].item() == pytest.approx(1.0)
    expected = np.mean([math.log(n) / math.log(5) for n in range(1, 6)])
    assert measures(uniform, causal=False, square=False)["entropy"].item() == pytest.approx(expected)
    assert set(measures(uniform, causal=False, square=False)) == {"entropy"}


def test_similarity_is_about_what_differs_from_uniform() -> None:
    peak = torch.eye(4)
    other = torch.eye(4).flip(1)
    uniform = torch.full((4, 4), 0.25)
    found = similarity(torch.stack((peak, peak / 2 + uniform / 2, other, uniform)), causal=False)
    assert found[0].tolist() == pytest.approx([1, 1, -1 / 3, 0], abs=1e-6)
    assert found[3].tolist() == [0, 0, 0, 0]


class Heads(nn.Module):
    """Causal attention in four heads; the weights of some are copied or set to zero."""

    def __init__(self, copied: bool = False, zero: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.q.weight.mul_(6)
            if copied:
                for layer in (self.q, self.k):
                    layer.weight[8:12] = layer.weight[0:4]
                    layer.bias[8:12] = layer.bias[0:4]
            if zero:
                self.q.weight.zero_()
                self.q.bias.zero_()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids)
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + mixed.transpose(1, 2).flatten(2))


def test_table_and_pictures(tiny: Any) -> None:
    outcome = run(tiny.GPT())
    rows = outcome.details["heads"]
    assert [(row["layer"], row["module"], row["head"]) for row in rows] == [
        (0, "blocks.0.attn", 0), (0, "blocks.0.attn", 1), (1, "blocks.1.attn", 0), (1, "blocks.1.attn", 1)
    ]  # fmt: skip
    assert {"entropy", "distance", "sink", "previous", "redundancy", "kind"} <= set(rows[0])
    assert outcome.findings == []
    assert "4 heads in 2 attentions" in outcome.why
    assert [picture.title for picture in outcome.pictures] == [
        "attention 0: blocks.0.attn", "attention 1: blocks.1.attn", "likeness of heads", "relative entropy of heads"
    ]  # fmt: skip
    assert sum(len(picture.content) for picture in outcome.pictures) < 100_000


def test_the_same_numbers_again() -> None:
    assert run(Heads()).details == run(Heads()).details


def test_copied_heads_warn_and_uniform_ones_do_not() -> None:
    (finding,) = run(Heads(copied=True)).findings
    assert (finding.code, finding.severity, finding.where) == ("symmetric_init", "warn", "Heads")
    assert finding.message == "1 of 4 heads (2) give exactly the weights of another head of the same layer"
    assert run(Heads()).findings == []
    zero = run(Heads(zero=True))
    assert zero.findings == []
    assert [row["kind"] for row in zero.details["heads"]] == ["uniform"] * 4


def test_no_attention(tiny: Any) -> None:
    with pytest.raises(Skipped, match="no attention was seen"):
        run(tiny.LSTM())
    with pytest.raises(Skipped, match="no attention was seen"):
        attention_figure(ModelAdapter(tiny.LSTM()))


def test_cross_attention_and_images() -> None:
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 4, 16))
            self.patch, self.mix, self.out = nn.Conv2d(3, 16, 8, 8), nn.MultiheadAttention(16, 2), nn.Linear(16, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            tokens = self.patch(pixel_values).flatten(2).permute(2, 0, 1)
            queries = self.queries.expand(len(pixel_values), -1, -1).transpose(0, 1)
            return self.out(self.mix(queries, tokens, tokens)[0].mean(0))

    model = Latent()
    model.config = {"image_size": 32}  # type: ignore[assignment]
    rows = run(model).details["heads"]
    assert [row["module"] for row in rows] == ["mix", "mix"]
    assert "distance" not in rows[0]


def test_figure(tiny: Any) -> None:
    adapter = ModelAdapter(tiny.GPT())
    figure = attention_figure(adapter)
    assert len(figure.axes) == 4
    figure = attention_figure(adapter, layer=1)
    assert figure.get_suptitle().startswith("blocks.1.attn")
    assert [axis.get_title() for axis in figure.axes] == ["head 0", "head 1"]
    with pytest.raises(ConfigError, match="layer 2"):
        attention_figure(adapter, layer=2)
