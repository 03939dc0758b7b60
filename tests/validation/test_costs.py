"""Operations and bytes against hand counts, time by module, and the picture."""

import time
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.isolation import preserved
from utils.validation.check import Budget
from utils.validation.costs import check_costs, module_costs, operations
from utils.validation.svg import bar_list


def costs_of(model, length=None, spec=None):
    adapter = ModelAdapter(model, spec=spec)
    with preserved(model, 0):
        model.eval()
        return {cost.name: cost for cost in module_costs(adapter, length, Budget(1))}


def test_a_linear_layer_by_hand():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False))
    costs = costs_of(model)
    assert [costs[name].flops for name in ("0", "1", "2")] == [2 * 8 * 16, 0, 2 * 16 * 3]
    assert costs["0"].bytes == 4 * (8 + 8 * 16 + 16)
    assert costs["1"].bytes == 4 * (16 + 16)
    assert {cost.kind for cost in costs.values()} == {"Linear", "ReLU", "Sequential"}


class Fused(nn.Module):
    """Attention on its input, 2 heads of width 8."""

    def forward(self, x):
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_by_hand(fused):
    """Both products cost 2 * length^2 * width, whatever kernel does them."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), Fused())
    spec = ModelSpec(task="regression", example_inputs={"input": torch.randn(2, 12, 16)})
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION if fused else
                                         torch.nn.attention.SDPBackend.MATH]):  # fmt: skip
        costs = costs_of(model, spec=spec)
    assert costs["1"].flops == 2 * 2 * 12 * 12 * 16


def test_a_recurrent_layer_by_hand():
    """Four gates, each with the input and the hidden state, at every step."""
    spec = ModelSpec(task="regression", example_inputs={"x": torch.randn(2, 12, 8)})

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    assert costs_of(Recurrent(), spec=spec)["rnn"].flops == 12 * 2 * 4 * 16 * (8 + 16)


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


def test_the_slowest_module_comes_first_in_text_and_picture(tiny):
    model = nn.Sequential(nn.Linear(8, 16), Slow(), nn.Linear(16, 3))
    adapter = ModelAdapter(model)
    with preserved(model, 0):
        model.eval()
        outcome = check_costs(adapter, Budget(1))
    assert "1 takes" in outcome.why and "% of the time" in outcome.why
    first = outcome.details["modules"][0]
    assert (first["name"], first["kind"]) == ("1", "Slow")
    assert 0.02 <= first["seconds"] < 0.2
    assert outcome.details["training_flops"] == 3 * outcome.value
    picture = outcome.pictures[0]
    assert "1 (Slow)" in picture.html() and "memory and not arithmetic is the limit" in picture.caption


def test_any_model_has_costs(tiny):
    for model in (tiny.GPT(), tiny.LSTM(), tiny.ConvNet(), tiny.Experts()):
        adapter = ModelAdapter(model)
        with preserved(model, 0):
            model.eval()
            outcome = check_costs(adapter, Budget(1))
        assert outcome.value > 0 and outcome.details["arithmetic_intensity"] > 0
        assert not outcome.findings


def test_operations_in_words():
    assert [operations(n) for n in (12, 1500, 16e9, 2e13)] == ["12 FLOP", "1.5 KFLOP", "16.0 GFLOP", "20.0 TFLOP"]


def test_bar_list_is_well_formed():
    names = ["short", "very.long." * 8, "<&>"]
    root = ET.fromstring(bar_list(names, [1.0, 0.5, 0.0], ["1 s", "half", "none"], "Times"))
    bars = root.findall("rect")
    assert [float(bar.get("width")) for bar in bars] == [170.0, 85.0, 1.0]
    assert bars[1].find("title").text == f"{names[1]}: half"
    assert root.findall("text")[4].text == "<&>"


def test_fused_encoder_layers_by_hand():
    """In eval mode torch runs a whole layer as one operator, whose products count all the same."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    spec = ModelSpec(task="regression", example_inputs={"src": torch.randn(2, 12, 16)})
    costs = costs_of(model, spec=spec)
    projections, attention = 2 * 12 * 16 * 4 * 16, 2 * 2 * 12 * 12 * 16
    assert sum(cost.flops for cost in costs.values()) == 2 * (projections + attention + 2 * 2 * 12 * 16 * 32)
    assert costs["layers.1.linear1"].flops == 2 * 12 * 16 * 32
    assert torch.backends.mha.get_fastpath_enabled()


def test_one_pass_is_timed_where_no_time_is_left():
    adapter = ModelAdapter(nn.Linear(8, 4))
    budget = Budget(0)
    assert check_costs(adapter, budget).details["flops"] == 2 * 8 * 4
    assert budget.reduced == ["times of one pass"]
