"""One finding, reproduced with its evidence."""

import numpy as np
import pytest
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError
from utils.tier1_critical_validation import TIER1
from utils.validation.codes import MEANING
from utils.validation.show import PICTURES


def test_influence_matrix_of_a_leak(tiny):
    """The future of the leaking model is bright, that of the sound one is dark."""
    spec = ModelSpec(task="causal_lm")
    leaking, sound = (utils.show("future_leakage", tiny.GPT(mask=mask), spec) for mask in ("none", "causal"))
    matrix = np.array(sound.numbers["influence"])
    assert matrix.shape == (24, 24) and np.diag(matrix).min() > 1e-4
    assert sound.numbers["largest_from_future"] < 1e-6 < leaking.numbers["largest_from_future"]
    assert leaking.found and leaking.text.startswith("blocks.1.attn: ") and "changes the logits" in leaking.text
    assert not sound.found and str(sound) == "future_leakage: not found in this model"


def test_evidence_renders_and_is_plain_data(tiny):
    """Picture and finding in a notebook, numbers for machines."""
    shown = utils.show("future_leakage", tiny.GPT(mask="none"), ModelSpec(task="causal_lm"))
    assert 'src="data:image/png;base64,' in shown._repr_html_() and "is-fail" in shown._repr_html_()
    plain = shown.to_dict()
    assert plain["code"] == "future_leakage" and plain["found"] and "causality" in plain["numbers"]


def test_scale_by_depth(tiny):
    """The signal after each block, drawn."""
    shown = utils.show("exploding_init", tiny.GPT())
    assert list(shown.numbers["scale_by_depth"]) == ["blocks.0", "blocks.1"]
    assert "blocks.0 to blocks.1" in shown.pictures[0].caption


def test_model_comes_back_as_it_was(tiny):
    """Showing is looking."""
    model = tiny.GPT().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    utils.show("dead_relu", ModelAdapter(model))
    assert model.training and all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_unknown_code(tiny):
    """The error lists what there is."""
    with pytest.raises(ConfigError, match=r"No check looks for 'nonsense'. The codes are .*future_leakage, "):
        utils.show("nonsense", tiny.GPT())


def test_the_name_of_a_check_and_a_slip_are_told_what_was_meant(tiny):
    """Nobody has to read all codes to find one."""
    with pytest.raises(ConfigError, match="'causality'. It is the name of a check. Its codes are future_leakage."):
        utils.show("causality", tiny.GPT())
    with pytest.raises(ConfigError, match="Did you mean 'future_leakage'?"):
        utils.show("future_leak", tiny.GPT())


def test_a_code_that_any_pass_can_meet(tiny):
    """No check looks for it, so all of them run."""
    shown = utils.show("timed_out", tiny.GPT())
    assert not shown.found and len(shown.results) == len(TIER1)


class Chatty(nn.Module):
    """Prints in every pass."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids):
        print("a word from the model")
        return self.head(self.embed(input_ids))


def test_what_a_model_prints_is_caught(capfd):
    """By the adapter, its facts and the evidence alike."""
    adapter = ModelAdapter(Chatty())
    assert "Chatty" in repr(adapter) and adapter._repr_html_()
    assert not utils.show("future_leakage", adapter).found
    assert capfd.readouterr().out == ""


def test_every_code_has_a_meaning_and_a_check():
    """What a check can find is explained, and what is drawn can be found."""
    known = {code for check in TIER1 for code in check.codes}
    assert known <= set(MEANING) and set(PICTURES) <= known
