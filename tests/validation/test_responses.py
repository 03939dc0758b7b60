"""What Tier 2 takes for a model's answer and its input: one place of many, ids of any shape, other inputs beside."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.tier2_advanced_analysis import TIER2
from utils.validation.attribution import PARTS, check_attribution
from utils.validation.check import Budget, Check, Finding
from utils.validation.containment import UnusableModel
from utils.validation.probing import logits
from utils.validation.responses import answers
from utils.validation.runner import run_check


def described(model, examples=None, task=None):
    """Run all of Tier 2 on a model and return the results by their check."""
    torch.manual_seed(0)
    adapter = ModelAdapter(model.eval(), spec=ModelSpec(task=task, example_inputs=examples))
    results = {check.id: run_check(adapter, check, 3.0) for check in TIER2}
    assert not [r.why for r in results.values() if r.could_not_run or r.findings]
    return results


class Bag(nn.Module):
    """The last token and the one before it through one linear layer."""

    def __init__(self, off=0):
        super().__init__()
        self.tok, self.head, self.off = nn.Embedding(11, 6), nn.Linear(6, 11), off

    def forward(self, input_ids):
        x = self.tok(input_ids)
        scores = self.head(x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))
        return scores.masked_fill(torch.arange(11) >= 11 - self.off, float("-inf"))


def bag(off=0):
    """Return a causal language model, some of whose classes may be switched off."""
    torch.manual_seed(0)
    return ModelAdapter(Bag(off).eval(), spec=ModelSpec(task="causal_lm", vocab_size=11, max_length=9))


class PictureAndText(nn.Module):
    """An image beside a text that it needs."""

    def __init__(self):
        super().__init__()
        self.conv, self.tok, self.head = nn.Conv2d(3, 8, 4, 4), nn.Embedding(20, 8), nn.Linear(16, 5)

    def forward(self, pixel_values, input_ids):
        return self.head(torch.cat([self.conv(pixel_values).relu().mean((2, 3)), self.tok(input_ids).mean(1)], -1))


class PictureAndNumbers(nn.Module):
    """An image beside a row of numbers for each sample."""

    def __init__(self):
        super().__init__()
        self.conv, self.numbers, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(4, 8), nn.Linear(16, 5)

    def forward(self, image, extra):
        return self.head(torch.cat([self.conv(image).relu().mean((2, 3)), self.numbers(extra)], -1))


@pytest.mark.parametrize(
    ("model", "examples", "main", "held"),
    [
        (PictureAndText, None, "pixel_values", "input_ids"),
        (PictureAndNumbers, {"image": torch.randn(3, 3, 16, 16), "extra": torch.randn(3, 4)}, "image", "extra"),
    ],
)
def test_other_inputs_stay_and_are_named(model, examples, main, held):
    """An image model with a second input runs in every diagnostic, and each says what it held as it is."""
    results = described(model(), examples)
    for check in ("attribution", "saliency", "sensitivity", "adversarial"):
        assert results[check].status == "pass" and results[check].details["held_fixed"] == [held]
        assert f"only `{main}` is moved, `{held}` stays as it is" in results[check].why
    assert "is moved" not in results["representation"].why


def test_a_crash_or_a_time_limit_is_no_verdict_of_a_description():
    """Tier 1 says whether an input is legal; Tier 2 could not run."""
    adapter = bag()

    def crash(adapter, budget):
        logits(adapter, {"input_ids": torch.zeros(1, 4)})

    def slow(adapter, budget):
        finding = Finding("timed_out", "fail", "Bag", "no answer within 60 s", "hint")
        raise UnusableModel(finding, adapter.module)

    for run, why in ((crash, "could not run: input_ids (1, 4): "), (slow, "could not run: no answer within 60 s")):
        found = run_check(adapter, Check("c", 2, "?", run), 1.0)
        assert found.could_not_run and not found.findings and why in found.why
    assert run_check(adapter, Check("c", 1, "?", crash), 1.0).findings[0].code == "shape_crash"
    assert run_check(adapter, Check("c", 1, "?", slow), 1.0).findings[0].code == "timed_out"


class Tagger(nn.Module):
    """Scores of three classes for each token, from the token itself and the one before it."""

    def __init__(self, pooled=False):
        super().__init__()
        self.tok, self.head, self.pooled = nn.Embedding(30, 8), nn.Linear(8, 3), pooled

    def forward(self, input_ids):
        x = self.tok(input_ids)
        scores = self.head(x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))
        return scores.mean(1) if self.pooled else scores


def test_the_answer_of_a_tagger_is_one_distribution_at_one_token():
    """Not one softmax over tokens and classes: what the tag cannot see has no influence on it."""
    torch.manual_seed(0)
    adapter = ModelAdapter(Tagger().eval())
    inputs = adapter.example_inputs(2, 12)
    assert torch.equal(answers(adapter, inputs), adapter.logits(inputs)[:, 6].detach())
    results = described(Tagger())
    parts = np.abs(results["attribution"].details["per_part"])
    assert np.flatnonzero(parts).tolist() == [7, 8]
    assert results["position_use"].value == 1
    influence = results["position_use"].details["influence"]
    assert influence[0] > 0.01 and max(influence[1:]) == 0
    assert results["adversarial"].details["margin_by_substitutions"]["gradient-guided"][0] < 5


def test_an_answer_about_the_whole_text_has_no_place():
    """So no token has a distance to it."""
    results = described(Tagger(pooled=True))
    assert "the answer has no place in the text" in results["position_use"].why
    assert results["sensitivity"].details["order shuffled"]["mean"] < 1e-2


def test_the_answer_of_a_segmentation_is_the_pixel_in_the_middle():
    """Classes come before the places, as cross_entropy takes them."""
    torch.manual_seed(0)
    spec = ModelSpec(task="image_classification", example_inputs={"x": torch.randn(2, 3, 8, 8)})
    adapter = ModelAdapter(Pixels().eval(), spec=spec)
    inputs = adapter.example_inputs(2)
    assert torch.equal(answers(adapter, inputs), adapter.logits(inputs)[:, :, 4, 4].detach())


class Pixels(nn.Module):
    """Scores of five classes for each pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return self.conv(x)


class TwoTower(nn.Module):
    """One number for a user and an item, each a single id."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(40, 6), nn.Embedding(50, 6)

    def forward(self, user, item):
        return (self.users(user) * self.items(item)).sum(-1)


def test_single_ids_are_explained_by_their_embedding():
    """The score is linear in the user's vector, so each number of it contributes its product."""
    torch.manual_seed(0)
    examples = {"user": torch.randint(0, 40, (4,)), "item": torch.randint(0, 50, (4,))}
    model = TwoTower()
    results = described(model, examples)
    one = ModelAdapter(model.eval(), spec=ModelSpec(example_inputs=examples)).example_inputs(1)
    expected = (model.users(one["user"]) * model.items(one["item"]))[0].tolist()
    assert results["attribution"].details["per_part"] == pytest.approx(expected, abs=1e-5)
    assert results["sensitivity"].details["one value"]["mean"] > 0
    assert "only `user` is moved, `item` stays as it is" in results["sensitivity"].why
    assert "nothing to flip" in results["adversarial"].why


class Columns(nn.Module):
    """A table of categories: one embedding per column, and so none that reads the table as it is."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 6) for size in (3, 9, 2))
        self.head = nn.Linear(18, 4)

    def forward(self, x):
        return self.head(torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], -1))


def test_columns_of_categories_are_replaced_within_their_range():
    """There is nothing to shift by noise, and each value is legal in its own column only."""
    torch.manual_seed(0)
    results = described(Columns(), {"x": torch.stack([torch.randint(0, k, (8,)) for k in (3, 9, 2)], 1)})
    found = results["sensitivity"]
    assert found.value == found.details["one value"]["mean"] > 0 and not found.pictures
    assert "no nn.Embedding reads the whole numbers of `x`" in found.why
    assert results["attribution"].status == results["adversarial"].status == "skip"


class Codes(nn.Module):
    """Several ids for each place, or one for each sample."""

    def __init__(self):
        super().__init__()
        self.tok, self.head = nn.Embedding(30, 6), nn.Linear(6, 4)

    def forward(self, codes):
        return self.head(self.tok(codes).flatten(1, -2).mean(1) if codes.dim() > 1 else self.tok(codes))


@pytest.mark.parametrize(("shape", "parts"), [((4,), 6), ((4, 5, 3), 15)])
def test_ids_of_any_shape(shape, parts):
    """A part is an id; where the sample is one id, a number of its embedding."""
    results = described(Codes(), {"codes": torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(0))})
    assert len(results["attribution"].details["per_part"]) == parts
    assert "can be trusted" in results["attribution"].why
    assert "embeddings' spread" in results["adversarial"].why


class Graph(nn.Module):
    """Every node gets the mean of its neighbours; there is no axis of samples."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, edge_index):
        h = self.first(x).relu()
        return self.head(h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]))


def test_a_graph_is_one_whole():
    """Rows that no edge leads to the first node have no part in its answer."""
    torch.manual_seed(0)
    edges = torch.stack([torch.tensor([3, 4, 5, 6]), torch.tensor([0, 0, 1, 2])])
    found = described(Graph(), {"x": torch.randn(9, 5), "edge_index": edges})["attribution"]
    assert np.flatnonzero(found.details["per_part"]).tolist() == [0, 3, 4]
    assert found.details["held_fixed"] == ["edge_index"] and found.details["completeness_error"] < 0.05


class OneNumber(nn.Module):
    """A score per sample without an axis of its own, from more numbers than there are parts."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(600, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1)


def test_scores_without_an_axis_and_long_inputs():
    """One number per sample is a row of one; a long input is explained in runs that add up alike."""
    results = described(OneNumber())
    assert len(results["attribution"].details["per_part"]) == PARTS
    assert results["attribution"].details["rank_correlation_with_occlusion"] > 0.9
    assert results["sensitivity"].value > 0


def test_classes_that_are_switched_off_are_left_out_everywhere():
    """Minus infinity has no place in a distance, whichever way the content is moved."""
    for check in TIER2:
        if check.id in ("attribution", "sensitivity", "adversarial"):
            assert run_check(bag(off=3), check, 3.0).status == "pass"


def test_trust_needs_occlusion_to_agree(monkeypatch):
    """Contributions that add up but rank the parts otherwise are not called trustworthy; unconfirmed ones neither."""
    adapter = bag()
    monkeypatch.setattr("utils.validation.attribution.rank_correlation", lambda first, second: 0.2)
    found = check_attribution(adapter, Budget(5))
    assert found.value < 0.05 and "do not trust their order" in found.why and "can be trusted" not in found.why
    monkeypatch.setattr("utils.validation.attribution.rank_correlation", lambda first, second: None)
    found = check_attribution(adapter, Budget(5))
    assert "nothing confirms their order; all parts rank alike" in found.why
    monkeypatch.setattr("utils.validation.attribution.forward_seconds", lambda adapter, length: 1e6)
    found = check_attribution(adapter, Budget(5))
    assert "nothing confirms their order; occlusion was not run" in found.why


def test_a_score_that_nothing_moves_has_nothing_to_explain():
    """A head that starts at zero."""
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    spec = ModelSpec(task="tabular_classification")
    assert "nothing to explain" in check_attribution(ModelAdapter(model, spec=spec), Budget(5)).why


class Cut(nn.Module):
    """Classes for a text, whose gradient is cut off in the middle or everywhere."""

    def __init__(self, everywhere):
        super().__init__()
        self.tok, self.head, self.everywhere = nn.Embedding(30, 8), nn.Linear(8, 3), everywhere

    def forward(self, input_ids):
        scores = self.head(self.tok(input_ids).mean(1).detach())
        return scores.detach() if self.everywhere else scores


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_gradient_that_is_cut_off_is_zero(everywhere):
    """The diagnostics run and tell that gradients explain nothing; that it is a fault is for Tier 1 to say."""
    results = described(Cut(everywhere))
    assert results["attribution"].value == pytest.approx(1) and "do not add up" in results["attribution"].why
    assert results["adversarial"].status == "pass"
