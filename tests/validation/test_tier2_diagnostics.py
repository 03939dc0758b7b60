"""Tier 2 against closed forms: models of which every answer is known beforehand."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.tier2_advanced_analysis import TIER2, run_tier2
from utils.validation.adversarial import search_tokens
from utils.validation.attribution import check_attribution, integrated_gradients, occlusion
from utils.validation.check import Budget
from utils.validation.representation import Moments, effective_rank
from utils.validation.runner import run_check
from utils.validation.saliency import smooth_gradient

VOCABULARY, WIDTH, LENGTH = 11, 6, 9
CHECKS = {check.id: check for check in TIER2}


class Bag(nn.Module):
    """Sum of token embeddings, weighted by distance from the end, through one linear layer."""

    def __init__(self, weights=None):
        super().__init__()
        self.tok, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.weights = weights or {}

    def forward(self, input_ids):
        x = self.tok(input_ids)
        total = 0.0
        for back, weight in self.weights.items():
            shifted = torch.zeros_like(x) if back else x
            if 0 < back < x.shape[1]:
                shifted = torch.cat([torch.zeros_like(x[:, :back]), x[:, :-back]], dim=1)
            total = total + weight * shifted
        return self.head(total)


def bag(weights):
    torch.manual_seed(0)
    spec = ModelSpec(task="causal_lm", vocab_size=VOCABULARY, max_length=LENGTH)
    return ModelAdapter(Bag(weights).eval(), spec=spec)


class Quadratic(nn.Module):
    """Scores ``w_k . x^2``: integrated gradients are ``w_k x^2`` exactly."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x.square() @ self.weight.T


def result(check, adapter):
    return run_check(adapter, CHECKS[check], 5.0)


def test_integrated_gradients_of_a_quadratic_are_exact():
    """Contribution of feature i is w_i x_i^2, and they add up."""
    adapter = ModelAdapter(Quadratic(), spec=ModelSpec(example_inputs={"x": torch.randn(2, 8)}))
    inputs = adapter.example_inputs(1)
    found = integrated_gradients(adapter, inputs)
    expected = adapter.module.weight[found.target].detach().double() * inputs["x"][0].double().square()
    assert torch.allclose(found.values, expected, atol=1e-6)
    assert found.error < 1e-6 and found.steps == 16
    assert torch.allclose(occlusion(adapter, inputs, found.target).double(), expected, atol=1e-5)


def test_integrated_gradients_of_tokens_equal_the_linear_terms():
    """Where the score is linear in the embeddings, token t contributes weight(t) * head[target] . e_t."""
    weights = {0: 1.0, 2: -0.5, 5: 2.0}
    adapter = bag(weights)
    inputs = adapter.example_inputs(1, LENGTH)
    found = integrated_gradients(adapter, inputs)
    with torch.no_grad():
        terms = adapter.module.tok(inputs["input_ids"])[0] @ adapter.module.head.weight[found.target]
    expected = torch.zeros(LENGTH, dtype=torch.float64)
    for back, weight in weights.items():
        expected[LENGTH - 1 - back] = weight * float(terms[LENGTH - 1 - back])
    assert torch.allclose(found.values.sum(-1), expected, atol=1e-5)
    outcome = check_attribution(adapter, Budget(5))
    assert outcome.details["rank_correlation_with_occlusion"] == pytest.approx(1.0)
    assert "can be trusted" in outcome.why


def test_contributions_that_do_not_add_up_are_said_to():
    """A step function has no gradient anywhere: nothing is explained, and the report says so."""

    class Step(nn.Module):
        def forward(self, x):
            return torch.stack([(x > 0).float().sum(-1) + 0 * x.sum(-1), 0 * x.sum(-1)], dim=-1)

    adapter = ModelAdapter(Step(), spec=ModelSpec(example_inputs={"x": torch.ones(1, 4)}))
    outcome = check_attribution(adapter, Budget(5))
    assert outcome.value == pytest.approx(1.0) and "do not add up" in outcome.why
    assert outcome.details["path_points"] == 256


def test_ids_without_a_table_are_skipped_with_the_reason():
    """One-hot ids times a matrix: no embedding table reads them."""

    class OneHot(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(VOCABULARY, VOCABULARY)

        def forward(self, input_ids):
            return self.head(nn.functional.one_hot(input_ids, VOCABULARY).float())

    adapter = ModelAdapter(OneHot(), spec=ModelSpec(task="causal_lm", vocab_size=VOCABULARY, max_length=LENGTH))
    assert result("attribution", adapter).status == "skip"
    found = result("sensitivity", adapter)
    assert "no nn.Embedding reads the token ids" in found.why and "noise of 1%" not in found.details
    assert found.value == found.details["one token"]["mean"] > 0


def test_order_does_not_matter_to_a_bag_of_words():
    """Equal weights everywhere: shuffling moves nothing, substitution does."""
    found = result("sensitivity", bag(dict.fromkeys(range(32), 0.3))).details
    assert found["neighbours swapped"]["high"] < 1e-6 and found["order shuffled"]["high"] < 1e-6
    assert found["one token"]["low"] > 0
    levels = [found[f"noise of {level}"]["mean"] for level in ("1%", "3%", "10%", "30%")]
    assert levels == sorted(levels) and levels[0] > 0


def test_influence_is_where_the_model_looks():
    """A model that reads the token itself and the one four back."""
    found = result("position_use", bag({0: 1.0, 4: 1.0})).details
    assert found["half_within"] == 4
    assert [i for i, m in zip(found["distance"], found["influence"], strict=True) if m > 0] == [4]


def test_no_influence_is_said():
    """Only the last token counts, and that is the question itself."""
    assert "no token before the answer" in result("position_use", bag({0: 1.0})).why


def test_search_finds_what_brute_force_finds():
    """One place matters and the score is linear, so the first guided substitution is the best of all there are."""
    adapter = bag({0: 1.0, 3: 2.0})
    inputs = adapter.example_inputs(1, LENGTH)
    base = adapter.logits(inputs)[0, -1]
    target = int(base.argmax())

    def margin(ids):
        scores = adapter.logits({"input_ids": ids})[0, -1].detach().clone()
        top = float(scores[target])
        scores[target] = float("-inf")
        return top - float(scores.max())

    every = []
    for place, token in itertools.product(range(LENGTH - 1), range(VOCABULARY)):
        ids = inputs["input_ids"].clone()
        ids[0, place] = token
        every.append(margin(ids))
    with torch.enable_grad():
        history = search_tokens(adapter, inputs)
    assert history[0] == pytest.approx(margin(inputs["input_ids"]), abs=1e-5)
    assert history[1] == pytest.approx(min(every), abs=1e-5)
    assert history == sorted(history, reverse=True)


def test_guided_search_beats_chance_on_the_average():
    """Same number of trials, smaller margins."""
    found = result("adversarial", bag({0: 1.0, 1: 0.7, 2: 0.5, 3: 0.4})).details["margin_by_substitutions"]
    assert found["gradient-guided"][1] <= found["random"][1]


def test_regression_has_no_answer_to_flip():
    """A skip with its reason."""
    adapter = ModelAdapter(nn.Linear(4, 1), spec=ModelSpec(task="regression"))
    assert "nothing to flip" in result("adversarial", adapter).why


def test_signed_steps_flip_more_than_random_ones():
    """A linear classifier near its boundary."""
    torch.manual_seed(0)
    adapter = ModelAdapter(nn.Linear(64, 5), spec=ModelSpec(task="tabular_classification"))
    found = result("adversarial", adapter).details["flipped"]
    assert sum(found["gradient"]) > sum(found["random"])


@pytest.mark.parametrize(("rank", "width"), [(1, 8), (3, 8), (8, 8)])
def test_effective_rank_of_equal_directions_is_their_number(rank, width):
    """Roy and Vetterli: equal singular values give exactly their number."""
    values = torch.zeros(width, dtype=torch.float64)
    values[:rank] = 2.0
    assert effective_rank(values) == pytest.approx(rank)


def test_streamed_moments_equal_the_direct_ones():
    """Covariance and mean cosine in pieces and at once."""
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    moments = Moments(7)
    for part in rows.split(13):
        moments.add(part)
    expected = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0)
    assert torch.allclose(moments.spectrum(), expected)
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T)[~torch.eye(50, dtype=torch.bool)]
    assert moments.mean_cosine() == pytest.approx(float(cosines.mean()))


def test_collapsed_layer_has_rank_one():
    """Every token is mapped onto one direction in the second layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(8, 3))
    found = result("representation", ModelAdapter(model)).details["layers"]
    assert found["2"]["effective_rank"] == pytest.approx(1, abs=0.01)
    assert found["0"]["effective_rank"] > 4


class Corner(nn.Module):
    """An image classifier that sees only the upper left quarter."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 4)

    def forward(self, pixel_values):
        return self.head(torch.tanh(pixel_values[:, :, :8, :8]).flatten(1))


def corner():
    torch.manual_seed(0)
    examples = {"pixel_values": torch.randn(2, 3, 16, 16)}
    return ModelAdapter(Corner(), spec=ModelSpec(task="image_classification", example_inputs=examples))


def test_saliency_is_zero_where_the_model_does_not_look():
    """And the deletion test proves that the rest matters."""
    adapter = corner()
    maps = smooth_gradient(adapter, adapter.example_inputs(3))
    assert float(maps[:, :8, :8].min()) > 0 and float(maps[:, 8:].max()) == 0 and float(maps[:, :, 8:].max()) == 0
    found = result("saliency", adapter)
    assert found.value > 1.5 and "shows what matters" in found.why and found.details["gain"]["low"] > 0


def test_pixels_outside_get_no_contribution():
    """Integrated gradients and occlusion agree on an image as well."""
    found = result("attribution", corner())
    tiles = np.array(found.details["per_part"]).reshape(8, 8)
    assert np.abs(tiles[4:]).max() == 0 and np.abs(tiles[:, 4:]).max() == 0 and np.abs(tiles[:4, :4]).max() > 0
    assert found.details["rank_correlation_with_occlusion"] > 0.8
    assert found.pictures and "which pixels" in found.pictures[0].title


@pytest.mark.parametrize("reference", ["example:gpt", "example:bert", "example:vit"])
def test_tier2_describes_the_examples_and_leaves_them_alone(reference):
    """Twice the same numbers, no fault, nothing changed."""
    model = utils.load_model(reference).module
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = run_tier2(model, progress=False, time_budget=150)
    second = utils.validate(model, tiers=(2,), progress=False, time_budget=150)
    assert not first.failures and not first.incomplete
    assert [r.value for r in first.results] == [r.value for r in second.results]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(r.pictures for r in first.results if r.status == "pass")


def test_a_short_budget_samples_less_and_says_so():
    """Nothing is dropped."""
    report = run_tier2(utils.load_model("example:gpt"), progress=False, time_budget=0.3)
    assert not report.incomplete and len(report.results) == len(TIER2)
    assert any("samples instead of" in note for r in report.results for note in r.details.get("reduced", ()))
