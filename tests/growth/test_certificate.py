import json

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.certificate import EPSILON_BOUND, Answers, Certificate, answers, certify


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


def test_float64_has_a_bound_of_its_own_and_a_norms_epsilon_a_wider_one():
    logits = torch.ones(1, 2)
    old = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    new = torch.tensor([[-1.0, 1.0 + 4e-6]], dtype=torch.float64)
    wrong = certify(Answers(logits, old, None), Answers(logits, new, None), 1e-5)
    assert not wrong.passed
    assert wrong.describe() == "NOT KEPT: bit-equal, 4.0e-06 in float64 where 1e-09 is the bound (bound 1e-05)"
    assert certify(Answers(logits, old, None), Answers(logits, new, None), 1e-5, double_bound=EPSILON_BOUND).passed
    assert certify(Answers(logits, old, None, True), Answers(logits, new, None), 1e-5).passed
    assert Certificate.from_dict(json.loads(json.dumps(wrong.to_dict()))) == wrong


def test_a_certificate_of_an_older_version_can_be_read():
    values = certify(Answers(torch.ones(1, 2), None, None), Answers(torch.ones(1, 2), None, None), 1e-5).to_dict()
    del values["double_bound"]
    assert Certificate.from_dict(values).double_bound is None


def test_an_answer_in_float64_that_is_lost_is_not_kept():
    logits = torch.ones(1, 2)
    lost = certify(Answers(logits, logits.double(), None), Answers(logits, None, None), 1e-5)
    assert not lost.passed
    assert "inf in float64" in lost.describe()
    assert certify(Answers(logits, None, None), Answers(logits, logits.double(), None), 1e-5).passed


@pytest.mark.parametrize("narrow", [False, True])
def test_it_is_noticed_when_a_model_rounds_on_its_way(narrow):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("table", torch.ones(3), persistent=False)

        def forward(self, x):
            x = x + torch.ones(3, dtype=torch.float32).cos()
            wide = x.float() if narrow else x
            return self.layer((wide / wide.norm()).to(x.dtype))

    adapter = ModelAdapter(Norm(), spec=ModelSpec(example_inputs={"x": torch.randn(4, 3)}))
    found = answers(adapter, adapter.example_inputs(4))
    assert found.double is not None
    assert found.rounded is narrow
    assert answers(adapter, adapter.example_inputs(4), double=False).double is None


def test_only_what_is_as_long_as_the_batch_is_cut():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x, weights):
            seen.append((tuple(x.shape), tuple(weights.shape)))
            return self.layer(x * weights)

    seen = []
    example = {"x": torch.randn(6, 5), "weights": torch.ones(5)}
    adapter = ModelAdapter(Weighted(), spec=ModelSpec(example_inputs=example))
    seen.clear()
    found = answers(adapter, {"x": torch.randn(6, 5), "weights": torch.rand(5)})
    assert seen == [((4, 5), (5,))] * 2
    assert found.double is not None
