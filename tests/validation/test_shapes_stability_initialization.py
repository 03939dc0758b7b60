"""Shape robustness, numerical stability and initialization: faults named, look-alikes passed."""

import pytest
import torch
from torch import nn

from utils.test_functions import (
    check_output_stability,
    check_parameter_initialization,
    check_shape_robustness,
)


def codes(result):
    """Return (code, where) of each finding."""
    return [(finding.code, finding.where) for finding in result.findings]


def test_position_table_shorter_than_declared(tiny):
    """The declared maximum crashes."""
    model = tiny.GPT(longest=32)
    model.config["max_position_embeddings"] = 64
    result = check_shape_robustness(model)
    assert codes(result) == [("shape_crash", "pos")]
    assert "length 64 (the maximum)" in result.findings[0].message


def test_squeeze_breaks_batch_size_one(tiny):
    """A squeeze without a dimension."""
    result = check_shape_robustness(tiny.GPT(fault="squeeze"))
    assert result.findings[0].code == "shape_crash"
    assert "batch size 1" in result.findings[0].message and "expected (1, 17, 50)" in result.findings[0].message


@pytest.mark.parametrize("width", [49, 51, 64])
def test_head_of_another_width(tiny, width):
    """Logits wider or narrower than the vocabulary."""
    result = check_shape_robustness(tiny.GPT(head_width=width))
    assert codes(result) == [("vocab_mismatch", "head")] and result.status == "fail"
    assert f"logits are {width} wide, the vocabulary has 50" in result.why


def test_padded_head_only_warns(tiny):
    """A width padded to a multiple of 64 is a habit."""
    assert check_shape_robustness(tiny.GPT(vocab=62, head_width=64)).status == "warn"


def test_embedding_smaller_than_vocabulary(tiny):
    """The last legal id has no row."""
    model = tiny.GPT(vocab=40, head_width=50)
    model.config["vocab_size"] = 50
    # Random ids below 40 only, so that the plain calls succeed.
    result = check_shape_robustness(model)
    assert result.status == "fail"
    assert {finding.code for finding in result.findings} <= {"vocab_mismatch", "shape_crash"}


def test_model_that_never_runs(tiny):
    """The reason is the evidence, and the other checks say that they could not run."""
    result = check_shape_robustness(tiny.broken())
    assert codes(result) == [("shape_crash", "TinyGPT")] and "No forward pass of TinyGPT succeeded" in result.why


@pytest.mark.parametrize("build", ["GPT", "LSTM", "Conv", "ConvNet", "MLP", "Experts"])
def test_sound_models(tiny, build):
    """No finding in the three checks."""
    model = getattr(tiny, build)()
    for check in (check_shape_robustness, check_output_stability, check_parameter_initialization):
        result = check(model)
        assert (result.status, result.findings) == ("pass", ()), result.why


def test_nan_names_the_module(tiny):
    """The logarithm of negative numbers in the second block."""
    result = check_output_stability(tiny.GPT(fault="nan"))
    assert codes(result) == [("nan_output", "blocks.1")] and "logits are not finite" in result.why


def test_nan_only_for_long_input(tiny):
    """Short input is fine, so the code says long."""
    result = check_output_stability(tiny.GPT(fault="nan_long"))
    assert codes(result) == [("nan_long_sequence", "blocks.1")] and "length 64" in result.why


def test_columns_switched_off_with_minus_infinity(tiny):
    """Ids that may never be predicted are masked on purpose."""

    class Masked(tiny.GPT):
        def forward(self, input_ids):
            off = torch.zeros(50)
            off[-3:] = float("-inf")
            return super().forward(input_ids) + off

    assert check_output_stability(Masked()).status == "pass"


def test_exploding_init(tiny):
    """Weights of every layer far too large."""
    model = tiny.GPT(width=32)
    for child in model.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=10.0)
    result = check_parameter_initialization(model)
    assert result.findings[0].code == "exploding_init" and result.status == "fail"


def test_trained_scales_are_not_held_to_the_same(tiny):
    """A model whose norms have moved counts as trained; a signal of 150 is nothing special there."""
    model = tiny.GPT()
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight.add_(torch.randn(16) * 0.1)
            block.mlp[2].weight.mul_(300)
    assert check_parameter_initialization(model).status != "fail"
    assert not check_parameter_initialization(model).details["looks_untrained"]


def test_default_embedding_tied_to_the_head(tiny):
    """N(0, 1) embeddings under a tied head start far above chance: worth a look, no failure."""
    model = tiny.GPT(width=64, tied=True)
    nn.init.normal_(model.tok.weight, std=1.0)
    result = check_parameter_initialization(model)
    assert result.status in ("pass", "warn")


def test_vanishing_init():
    """Ten layers that each shrink the signal a hundredfold, no residual path."""
    layers = []
    for _ in range(6):
        layer = nn.Linear(16, 16)
        nn.init.normal_(layer.weight, std=1e-3)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    result = check_parameter_initialization(nn.Sequential(*layers, nn.Linear(16, 3)))
    assert result.findings[0].code == "vanishing_init" and result.status == "fail"


def test_input_lost_under_the_biases():
    """Default biases keep the scale up while tiny weights drown the input."""
    layers = [nn.Linear(16, 16) for _ in range(8)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=1e-3)
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())], nn.Linear(16, 3))
    result = check_parameter_initialization(model)
    assert result.findings[0].code == "vanishing_init" and "two samples give the same output" in result.why


def test_symmetric_init(tiny):
    """All units of a layer start equal."""
    model = tiny.GPT()
    nn.init.constant_(model.blocks[0].mlp[0].weight, 0.01)
    assert codes(check_parameter_initialization(model)) == [("symmetric_init", "blocks.0.mlp.0.weight")]


@pytest.mark.parametrize("where", ["tok.weight", "norm.weight"])
def test_zero_that_cuts_the_signal(tiny, where):
    """A zero token embedding or final norm leaves nothing of the input."""
    model = tiny.GPT()
    nn.init.zeros_(model.get_parameter(where))
    assert codes(check_parameter_initialization(model)) == [("zero_init", where)]


@pytest.mark.parametrize("where", ["blocks.0.attn.proj.weight", "blocks.1.mlp.2.weight", "head.weight", "pos.weight"])
def test_zero_that_is_legitimate(tiny, where):
    """Residual branches, heads and position tables may start at zero."""
    model = tiny.GPT()
    nn.init.zeros_(model.get_parameter(where))
    assert check_parameter_initialization(model).findings == ()
