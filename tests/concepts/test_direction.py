"""Directions of concepts: they agree with scikit-learn, and meaningless ones are not accepted."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.direction import LEAST, concept_direction, find_direction, group_halves
from utils.concepts.ranking import auroc, auroc_interval
from utils.runtime.errors import ConfigError, DataError


def sides(n=60, m=80, width=16, shift=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    moved = torch.zeros(width)
    moved[:2] = torch.tensor([0.6, 0.8]) * shift
    return torch.randn(n, width, generator=g) + moved, torch.randn(m, width, generator=g)


def test_auroc_is_that_of_scikit_learn_with_ties():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        first, second = (torch.randint(0, 6, (size,), generator=g).float() for size in (13, 29))
        wanted = roc_auc_score([1] * 13 + [0] * 29, torch.cat([first, second]).numpy())
        assert auroc(first, second) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("shift", "n"), [(0.0, 20), (1.0, 20), (2.5, 20), (1.0, 60)])
def test_the_interval_covers_the_true_auroc(shift, n):
    """Binormal scores, whose AUROC is known: Phi(shift / sqrt(2))."""
    true = float(torch.special.ndtr(torch.tensor(shift / 2**0.5)))
    g = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(1000):
        value = auroc(torch.randn(n, generator=g) + shift, torch.randn(n + 10, generator=g))
        low, high = auroc_interval(value, n, n + 10)
        assert 0 <= low <= value <= high <= 1
        covered += low <= true <= high
    assert covered >= 930


def test_the_interval_has_a_width_at_the_ends():
    low = auroc_interval(1.0, 20, 20)[0]
    # Hanley & McNeil's variance at the end itself, term by term.
    first, second = low / (2 - low) - low**2, 2 * low**2 / (1 + low) - low**2
    variance = (low * (1 - low) + 19 * first + 19 * second) / 400
    assert 1 - low == pytest.approx(1.96 * variance**0.5, rel=1e-3)
    assert auroc_interval(1.0, 20, 20)[1] == 1.0
    assert auroc_interval(0.0, 20, 20)[0] == 0.0
    assert auroc_interval(0.0, 20, 20)[1] == pytest.approx(1 - auroc_interval(1.0, 20, 20)[0])


def test_a_real_concept_is_accepted_and_points_where_it_should():
    positive, negative = sides(200, 300, shift=4.0)
    found = concept_direction(positive, negative)
    difference = positive.mean(0) - negative.mean(0)
    assert torch.allclose(found.vector, difference / difference.norm(), atol=1e-6)
    assert found.found, found
    assert found.interval[0] <= found.auroc <= found.interval[1]
    assert len(found.controls) == len(found.random) == 20
    # Zero lies midway between the means.
    middle = (positive.mean(0) + negative.mean(0))[None] / 2
    assert float(found.score(middle)) == pytest.approx(0, abs=1e-5)
    assert float((found.score(positive) > 0).float().mean()) > 0.9
    assert "random direction" in found.reasons[0] and "not measured" in found.reasons[2]
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert kept["found"] and not kept["accepted"] and len(kept["vector"]) == 16 and len(kept["reasons"]) == 3


def test_the_verdict_follows_the_effect():
    found = concept_direction(*sides(200, 300, shift=4.0))
    # What was not measured does not count as held.
    assert found.found and not found.accepted and found.groups == (0, 0)
    assert str(found).startswith("Concept found, effect not measured.")
    assert found.with_effect(0.004).accepted
    refused = found.with_effect(0.2)
    assert not refused.accepted
    assert "is not shown to lower the behaviour" in refused.reasons[2]
    assert str(refused).startswith("Concept not accepted.")


@pytest.mark.parametrize("method", ["mean_difference", "logistic"])
def test_random_labels_are_not_accepted(method):
    for seed in range(20):
        values = torch.randn(120, 24, generator=torch.Generator().manual_seed(seed))
        found = concept_direction(values[:50], values[50:], method, seed)
        assert not found.found and found.verdict == "not accepted", found


def copies(sources, count=20, width=32, seed=0):
    """Return near-copies of sources of noise on either side, and the source of each."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * sources, width, generator=g).repeat_interleave(count, 0)
    rows = rows + 0.02 * torch.randn(rows.shape, generator=g)
    own = [number // count for number in range(2 * sources * count)]
    half = sources * count
    return (rows[:half], rows[half:]), (own[:half], own[half:])


@pytest.mark.parametrize("method", ["mean_difference", "logistic"])
def test_near_copies_of_noise_are_not_found_where_their_groups_are_known(method):
    for seed in range(5):
        given, groups = copies(6, seed=seed)
        assert concept_direction(*given, method, seed).found  # each half has copies of every source
        found = concept_direction(*given, method, seed, groups=groups)
        assert not found.found, found
        assert found.groups == (6, 6) and "counted by 6 and 6 groups" in found.reasons[0]
        assert found.interval[0] < 0.5 < max(found.controls) and found.stability < 0.5


def test_groups_of_one_change_nothing_and_large_groups_count_once():
    given = sides(60, 80, shift=4.0)
    plain = concept_direction(*given)
    sole = concept_direction(*given, groups=(range(60), range(60, 140)))
    assert sole.found and sole.interval[1] - sole.interval[0] == pytest.approx(
        plain.interval[1] - plain.interval[0], abs=0.03
    )
    by_six = concept_direction(*given, groups=([n % 10 for n in range(60)], [f"n{n % 10}" for n in range(80)]))
    assert by_six.interval[0] < plain.interval[0]
    # The same as numbers, as tensors and in any order.
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    told = torch.arange(60)[order] % 10, [f"n{n % 10}" for n in range(80)]
    assert concept_direction(given[0][order], given[1], groups=told).to_dict() == by_six.to_dict()


@settings(max_examples=60, deadline=None)
@drawn(st.lists(st.integers(0, 8), min_size=2, max_size=20), st.lists(st.integers(4, 12), min_size=2, max_size=20))
def test_no_group_is_in_both_halves_and_both_halves_have_both_sides(first, second):
    ids = torch.tensor(first), torch.tensor(second)
    generator = torch.Generator().manual_seed(0)
    if min(len(set(first)), len(set(second))) < 2:
        with pytest.raises(DataError, match="examples are of one group. Expected two"):
            group_halves(ids, generator)
        return
    halves = group_halves(ids, generator)
    assert all(len(rows) for half in halves for rows in half)
    held = [{*ids[0][half[0]].tolist(), *ids[1][half[1]].tolist()} for half in halves]
    assert not held[0] & held[1]
    assert [sorted(torch.cat([half[side] for half in halves]).tolist()) for side in (0, 1)] == [
        list(range(len(first))), list(range(len(second))),
    ]  # fmt: skip


def test_groups_with_both_sides_swap_their_labels():
    """A strong difference between pairs, and a shift in each pair: the pairs are never torn, and the shift is found."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(60, 16, generator=g)
    given = base + torch.eye(16)[0] * 5, base + 0.1 * torch.randn(60, 16, generator=g)
    found = concept_direction(*given, groups=(range(60), range(60)))
    assert found.found and found.groups == (60, 60), found


def test_bad_groups():
    given = sides(20, 30)
    for groups, message in (
        ((range(3), range(30)), "There are 3 groups for 20 positive examples"),
        (range(50), "of the type range and not a pair"),
        (([0] * 20, range(30)), "All positive examples are of one group"),
    ):
        with pytest.raises(DataError, match=message):
            concept_direction(*given, groups=groups)


def test_the_logistic_direction_is_that_of_scikit_learn():
    positive, negative = sides(70, 90, 12, shift=2.0)
    # One feature varies a thousand times as much, and one not at all.
    for side in (positive, negative):
        side[:, 5] *= 1000
        side[:, 7] = 2.5
    found = concept_direction(positive, negative, "logistic")
    rows = torch.cat([positive, negative]).double().numpy()
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    model.fit(scaler.transform(rows), [1] * 70 + [0] * 90)
    weights = model.coef_[0] / scaler.scale_
    size = np.linalg.norm(weights)
    assert np.allclose(found.vector.numpy(), weights / size, atol=1e-4)
    bias = (model.intercept_[0] - scaler.mean_ @ weights) / size
    assert found.bias == pytest.approx(bias, abs=1e-3)


def test_held_out_means_held_out():
    """With more numbers than examples any labels can be told apart on themselves, and no held-out ones."""
    values = torch.randn(40, 300, generator=torch.Generator().manual_seed(3))
    found = concept_direction(values[:20], values[20:])
    fitted = auroc(found.score(values[:20]), found.score(values[20:]))
    assert fitted == 1.0
    assert found.auroc < 0.75


def test_the_same_for_the_same_seed_and_any_order_and_repetition():
    positive, negative = sides()
    found = concept_direction(positive, negative, seed=5)
    again = concept_direction(positive.flip(0).repeat(2, 1), negative[torch.randperm(80)], seed=5)
    assert again.to_dict() == found.to_dict()
    assert again.examples == (60, 80)
    assert concept_direction(positive, negative, seed=6).controls != found.controls


def test_stability_is_the_cosine_of_halves():
    strong, weak = concept_direction(*sides(shift=6.0)), concept_direction(*sides(shift=0.1))
    assert strong.stability > 0.9 > weak.stability


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (torch.randn(1, 4), torch.randn(20, 4), "There is 1 different positive example."),
        (torch.ones(1, 4).repeat(30, 1), torch.randn(20, 4), "1 different of 30 positive"),
        (torch.randn(20, 4), torch.randn(LEAST - 1, 4), "9 different negative examples"),
        (torch.ones(20, 4), torch.ones(20, 4), "All examples have the same values"),
        (torch.full((20, 4), float("nan")), torch.randn(20, 4), "20 of 20 positive examples hold values"),
        (torch.randn(20, 4), torch.randn(20, 5), "4 wide and the negative ones 5"),
        (torch.randn(20), torch.randn(20, 5), "the shape (20,)"),
        ([1.0], torch.randn(20, 5), "The positive examples are of the type list."),
    ],
)
def test_bad_examples_are_named(positive, negative, message):
    with pytest.raises(DataError) as caught:
        concept_direction(positive, negative)
    assert message in str(caught.value)


def test_the_same_examples_on_both_sides():
    values = torch.randn(30, 4)
    for other in (values, values.flip(0), torch.cat([values, torch.randn(5, 4)])):
        with pytest.raises(DataError, match="are the same, or those of one side are all on the other"):
            concept_direction(values, other)


def test_bad_settings():
    with pytest.raises(ConfigError, match="The method is 'svm'"):
        concept_direction(*sides(), "svm")
    with pytest.raises(ConfigError, match="controls is 0"):
        concept_direction(*sides(), controls=0)
    with pytest.raises(ConfigError, match="the direction is for the width 16"):
        concept_direction(*sides()).score(torch.randn(3, 5))


def adapter(module):
    return ModelAdapter(module, spec=ModelSpec(example_inputs={"input": torch.rand(2, 6)}))


def test_a_layer_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    positive, negative = sides(40, 50, 6)
    model.train()
    found = find_direction(adapter(model), positive, [{"input": negative[:20]}, {"input": negative[20:]}], batch_size=7)
    assert model.training
    assert (found.layer, found.side, found.pool) == ("2", "input", "mean")
    with torch.no_grad():
        made = concept_direction(model[:2](positive), model[:2](negative))
    assert torch.allclose(found.vector, made.vector, atol=1e-5)
    assert find_direction(adapter(model), positive, negative, "0").side == "output"
    # Repeated samples drop out with their groups.
    twice, own = torch.cat([positive, positive]), [n % 8 for n in range(40)]
    told = own + [n + 100 for n in own], [200 + n % 10 for n in range(50)]
    grouped = find_direction(adapter(model), twice, negative, groups=told)
    assert grouped.groups == (8, 10) and grouped.examples == (40, 50)


def test_errors_of_a_layer():
    model = adapter(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
    positive, negative = sides(40, 50, 6)
    with pytest.raises(ConfigError, match="has no layer 'head'"):
        find_direction(model, positive, negative, "head")
    with pytest.raises(ConfigError, match="one row for each example"):
        find_direction(model, positive, negative, pool="positions")
    with pytest.raises(DataError, match="3 of 40 positive examples are negative ones too"):
        find_direction(model, positive, torch.cat([negative, positive[:3]]))
    with pytest.raises(DataError, match="1 different positive"):
        find_direction(model, positive[:1], negative)
    broken = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    torch.nn.init.constant_(broken[0].bias, float("nan"))
    with pytest.raises(DataError, match="not finite"):
        find_direction(adapter(broken), positive, negative)


def test_a_feature_that_hardly_varies_is_not_the_direction():
    """A unit that is all but dead is active, by a little, in one example: standardised it would outweigh the others."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(60, 6, generator=generator) + shift for shift in (1.0, -1.0))
    plain = concept_direction(positive, negative, "logistic")
    dead = torch.zeros(60, 1)
    dead[0] = 1e-4
    found = concept_direction(torch.cat([positive, dead], 1), torch.cat([negative, 0 * dead], 1), "logistic")
    assert float(found.vector[:6] @ plain.vector) > 0.99
    assert abs(float(found.vector[6])) < 0.1
    rows = torch.cat([positive, dead], 1)
    assert float((found.score(rows) - plain.score(positive)).abs().max()) < 0.5
