import json

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.certificate import Answers, Certificate, answers, certify


def test_equal_answers_are_equal_bit_for_bit():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    certificate = certify(Answers(logits, logits.double(), 2.0), Answers(logits.clone(), logits.double(), 2.0), 1e-5)
    assert certificate.passed
    assert certificate.equal
    assert certificate.difference == certificate.double_difference == certificate.jump == 0
    assert certificate.describe() == (
        "kept: bit-equal, 0.0e+00 in float64 (bound 1e-05); loss 2.000000 -> 2.000000"
    )  # fmt: skip
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


def test_a_difference_is_a_share_of_the_answers_deviation():
    before = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])
    after = before + torch.tensor([[0.0, 0.0, 0.0, 0.5]])
    certificate = certify(Answers(before, None, None), Answers(after, None, None), 0.1)
    assert certificate.difference == pytest.approx(0.5)
    assert not certificate.passed
    assert certificate.jump is None
    assert certificate.double_difference is None
    assert certificate.describe() == "NOT KEPT: largest change 5.0e-01 of the answers' size (bound 1e-01)"


def test_what_only_float64_shows_counts():
    logits = torch.ones(1, 2)
    wrong = certify(Answers(logits, torch.tensor([[1.0, 2.0]]).double(), None),
                    Answers(logits, torch.tensor([[1.0, 2.1]]).double(), None), 1e-5)  # fmt: skip
    assert wrong.equal
    assert not wrong.passed


def test_of_more_answers_the_old_ones_are_compared():
    before, after = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0, 9.0]])
    assert certify(Answers(before, None, None), Answers(after, None, None), 1e-5, outputs=2).equal
    assert not certify(Answers(before, None, None), Answers(after, None, None), 1e-5).passed


def test_masked_answers_compare_and_new_infinities_do_not_pass():
    before = torch.tensor([[1.0, float("-inf"), 2.0]])
    assert certify(Answers(before, None, None), Answers(before.clone(), None, None), 1e-5).equal
    after = torch.tensor([[1.0, 2.0, float("-inf")]])
    assert not certify(Answers(before, None, None), Answers(after, None, None), 1e-5).passed


def test_a_model_is_asked_in_eval_mode_and_comes_back():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    adapter = ModelAdapter(module, spec=ModelSpec(example_inputs={"input": torch.randn(6, 3)}))
    inputs = adapter.example_inputs(6)
    modes = []
    first = answers(adapter, inputs, lambda: modes.append(module.training) or 1.5)
    second = answers(adapter, inputs)
    assert modes == [False]
    assert module.training
    assert first.loss == 1.5
    assert second.loss is None
    assert torch.equal(first.logits, second.logits)
    assert first.double.dtype == torch.float64
    assert len(first.logits) == 4


def test_a_model_that_cannot_compute_in_float64_is_compared_in_its_own_precision():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x).float() + torch.mm(torch.ones(len(x), 2), torch.eye(2))

    adapter = ModelAdapter(Single(), spec=ModelSpec(example_inputs={"x": torch.randn(4, 3)}))
    assert answers(adapter, adapter.example_inputs(4)).double is None
