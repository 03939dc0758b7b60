"""Causality: every leak found with its module, no look-alike flagged."""

import pytest
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.test_functions import check_causality

CAUSAL = ModelSpec(task="causal_lm")


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"mask": "none"}, "blocks.1.attn"),
        ({"mask": "none", "fault_at": 0}, "blocks.0.attn"),
        ({"mask": "off_by_one"}, "blocks.1.attn"),
        ({"mask": "until_32"}, "blocks.1.attn"),
        ({"fault": "time_mean"}, "blocks.1"),
    ],
)
def test_leak_is_found_where_it_starts(tiny, settings, where):
    """Missing, shifted and partial masks and a mean over time."""
    result = check_causality(tiny.GPT(**settings), spec=CAUSAL)
    assert result.status == "fail"
    assert [(f.code, f.where) for f in result.findings] == [("future_leakage", where)]
    assert "|change|" in result.findings[0].message and "noise" in result.findings[0].message


def test_leak_only_beyond_a_length_names_that_length(tiny):
    """The mask covers 32 positions; short inputs are sound."""
    result = check_causality(tiny.GPT(mask="until_32"), spec=CAUSAL)
    assert "length 64" in result.findings[0].message
    assert result.details["tried"][0]["change"] == 0


def test_convolution_padded_on_both_sides_leaks(tiny):
    """The convolution sees one token ahead."""
    result = check_causality(tiny.Conv(causal=False), spec=CAUSAL)
    assert result.findings[0].code == "future_leakage"


@pytest.mark.parametrize(
    "build",
    [
        lambda tiny: tiny.GPT(),
        lambda tiny: tiny.GPT(tied=True),
        lambda tiny: tiny.GPT(bias="alibi"),
        lambda tiny: tiny.LSTM(),
        lambda tiny: tiny.Conv(),
    ],
)
def test_sound_models_pass(tiny, build):
    """Tied weights, ALiBi, recurrence and left-padded convolution do not leak."""
    result = check_causality(build(tiny), spec=CAUSAL)
    assert (result.status, result.findings) == ("pass", ())
    assert result.value <= result.threshold


def test_encoder_may_see_the_future(tiny):
    """A masked language model is skipped with the reason, and that is no gap in the verdict."""
    result = check_causality(tiny.GPT(mask="none"), spec=ModelSpec(task="masked_lm"))
    assert result.status == "skip" and not result.could_not_run
    assert "not a causal model (masked_lm" in result.why


def test_images_are_skipped(tiny):
    """No positions, no question."""
    assert "not a causal model" in check_causality(tiny.ConvNet()).why


def test_decoder_of_seq2seq(tiny):
    """The decoder leaks or does not; the encoder is left out of it."""

    class Seq2Seq(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.source, self.decoder = nn.Embedding(50, 16), tiny.GPT(mask=mask)

        def forward(self, input_ids, decoder_input_ids):
            return self.decoder(decoder_input_ids) + self.source(input_ids).mean(dim=(1, 2))[:, None, None]

    sound, broken = Seq2Seq("causal"), Seq2Seq("none")
    assert ModelAdapter(sound).task.value == "seq2seq"
    assert check_causality(sound).status == "pass"
    assert check_causality(broken).findings[0].where == "decoder.blocks.1.attn"


def unmasked(name, tiny, **settings):
    """A model without any mask under a class name."""
    settings = {"mask": "none", **settings}
    return type(
        name, (tiny.GPT,), {"__init__": lambda self: tiny.GPT.__init__(self, layers=1, fault_at=0, **settings)}
    )()


@pytest.mark.parametrize("name", ["Model", "CustomTransformer"])
def test_a_forgotten_mask_is_a_fault(tiny, name):
    """Nothing says encoder: the commonest silent fault, and the way out is in the hint."""
    result = check_causality(unmasked(name, tiny))
    assert result.status == "fail" and result.findings[0].code == "future_leakage"
    assert "say ModelSpec(task='masked_lm')" in result.findings[0].hint


@pytest.mark.parametrize(
    ("name", "config"),
    [("TextEncoderDecoder", {}), ("ProteinModel", {}), ("Model", {"mask_token_id": 3}), ("Model", {"mask_token": "x"})],
)
def test_a_sign_of_an_encoder_makes_it_a_warning(tiny, name, config):
    """Full sight and a sign: the task was assumed, and the message says so."""
    model = unmasked(name, tiny)
    result = check_causality(model, config)
    assert [(f.code, f.severity) for f in result.findings] == [("future_leakage", "warn")]
    assert "only assumed to be causal" in result.why
    assert "ModelSpec(task='causal_lm')" in result.findings[0].hint


@pytest.mark.parametrize("settings", [{"mask": "off_by_one"}, {"mask": "until_32"}])
def test_a_partial_leak_is_no_encoders(tiny, settings):
    """One token ahead, or only beyond a length: a fault despite the sign."""
    assert check_causality(unmasked("ProteinModel", tiny, **settings)).status == "fail"


def test_stated_task_is_not_softened(tiny):
    """Whoever says causal means it."""
    assert check_causality(unmasked("ProteinModel", tiny), spec=CAUSAL).status == "fail"
