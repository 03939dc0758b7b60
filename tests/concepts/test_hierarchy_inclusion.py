import math

import numpy as np
import pytest
import torch

from utils.concepts.hierarchy_discovery import discover_hierarchy
from utils.concepts.hierarchy_inclusion import Spread, Witnesses
from utils.concepts.hierarchy_noise import RIDGE, moments, spread_of_product

RATE = 0.05
NAMES = ["p", "a", "b", "c", "other"]


def dice(seed):
    return torch.Generator().manual_seed(seed)


def siblings(count, seed, most=0.95, rate=RATE):
    """Labels of a parent, of three concepts each of which has most of its samples, and of something else."""
    generator = dice(seed)

    def some(share):
        return torch.rand(count, generator=generator) < share

    parent = some(0.3)
    held = torch.stack([parent, *(parent & some(most - step) for step in (0, 0.05, 0.1)), some(0.4)], 1)
    return held ^ (torch.rand(held.shape, generator=generator) < rate)


def pair(parent, child):
    return torch.tensor([parent]), torch.tensor([child])


def witnesses(values, rate=RATE):
    width = values.shape[1]
    return Witnesses(values.double(), torch.full((width,), rate).double(), torch.full((width,), 1 - rate).double())


def test_the_weighted_coefficient_and_its_error_agree_with_repeated_sampling():
    seen, told, plain = [], [], []
    for seed in range(200):
        values = siblings(1500, seed)
        value, error = witnesses(values).coefficients(*pair(0, 2), torch.zeros(2, 5).double())
        seen.append(float(value))
        told.append(float(error))
        held = moments(values)
        above, below = 1 - RATE - held.mean[[0]], held.mean[[2]] - RATE
        plain.append(float(spread_of_product(held, *pair(0, 2), above, below, torch.ones(1)) / (above * below)))
    assert np.mean(seen) == pytest.approx(1, abs=3 * np.std(seen) / 200**0.5)
    assert np.mean(told) == pytest.approx(np.std(seen), rel=0.2)
    assert np.mean(told) < 0.75 * np.mean(plain), "what all other concepts say counts"


def test_the_weights_are_a_ridge_regression_on_the_other_half():
    values = siblings(400, 0)
    made = witnesses(values)
    fitted, read = made.halves
    others = [1, 3, 4]
    unit = made.unit.numpy()
    centre = unit[fitted].mean(0)
    away = unit[fitted] - centre
    covariance = away.T @ away / len(fitted)
    ridge = RIDGE + np.diag(covariance).mean() * 5 / len(fitted)
    slope = np.linalg.solve(covariance[np.ix_(others, others)] + ridge * np.eye(3), covariance[others, 2])
    expected = (centre[2] + (unit[read][:, others] - centre[others]) @ slope).clip(0, 1)
    assert made.weights(*pair(0, 2))[read, 0].numpy() == pytest.approx(expected, abs=1e-9)


def test_the_weights_of_a_pair_do_not_look_at_the_pair():
    values = siblings(400, 1)
    made = witnesses(values)
    read, changed = made.halves[1], values.clone()
    changed[read[:, None], torch.tensor([0, 2])] ^= True
    after = witnesses(changed)
    assert torch.equal(made.halves[1], after.halves[1])
    torch.testing.assert_close(after.weights(*pair(0, 2))[read], made.weights(*pair(0, 2))[read])


def test_two_concepts_alone_have_the_same_weight_everywhere():
    made = witnesses(siblings(300, 2)[:, :2])
    for half in made.halves:
        assert float(made.weights(*pair(0, 1))[half].std()) < 1e-9


def test_pairs_in_pieces_give_the_same(monkeypatch):
    made = witnesses(siblings(300, 3))
    parents, children = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 3, 2])
    whole = made.coefficients(parents, children, torch.full((2, 5), 0.01).double())
    monkeypatch.setattr("utils.concepts.hierarchy_inclusion.CELLS", 1)
    pieces = made.coefficients(parents, children, torch.full((2, 5), 0.01).double())
    torch.testing.assert_close(whole[0], pieces[0])
    torch.testing.assert_close(whole[1], pieces[1])
    assert (whole[1] > made.coefficients(parents, children, torch.zeros(2, 5).double())[1]).all()


def test_the_probability_of_an_inclusion_learns_how_many_there_are():
    errors = torch.full((200,), 0.08).double()
    noise = 0.08 * torch.randn(200, generator=dice(0)).double()
    inclusions, overlaps = Spread(1 + noise, errors), Spread(torch.linspace(0, 1, 200).double() + noise, errors)
    doubtful = torch.tensor([0.9]).double(), torch.tensor([0.08]).double()
    assert float(inclusions.chance(*doubtful)) > 0.8 > 0.3 > float(overlaps.chance(*doubtful))
    assert float(inclusions.shares[0]) > 0.9 and float(overlaps.shares[0]) < 0.1
    assert float(inclusions.shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("coarse", "trust"), [(True, 1), (False, 10)])
def test_the_probability_without_any_pair_is_that_of_bayes(coarse, trust):
    """Bayes' factor of a point against a flat alternative, times the prior odds."""
    empty = torch.zeros(0).double()
    value, error = 0.95, 0.1
    point = math.exp(-0.5 * ((value - 1) / error) ** 2) / (error * math.sqrt(2 * math.pi))
    flat = 0.5 * (math.erf(value / error / 2**0.5) + math.erf((1 - value) / error / 2**0.5))
    told = Spread(empty, empty, coarse).chance(torch.tensor([value]).double(), torch.tensor([error]).double())
    assert float(told) == pytest.approx(trust * point / (trust * point + flat), rel=1e-6)


def test_estimates_beyond_the_ends_and_without_error_are_judged():
    spread = Spread(torch.tensor([1.0, 0.5]).double(), torch.tensor([0.05, 0.05]).double())
    told = spread.chance(torch.tensor([1.6, -0.4, 0.5, 1.0]).double(), torch.tensor([0.05, 0.05, 1e-9, 1e-9]).double())
    assert told.isfinite().all() and told[0] > 0.9 and told[1] < 1e-6 and told[2] < 1e-6 and told[3] > 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_siblings_that_all_but_include_one_another_are_told_apart_in_spite_of_noise(seed):
    discovered = discover_hierarchy(siblings(20_000, seed, most=0.9), NAMES, noise=RATE, controls=1)
    assert {(one.concept, one.parent) for one in discovered.evidence} == {("a", "p"), ("b", "p"), ("c", "p")}
    assert discovered.controls == (0,)


def test_the_samples_that_an_undecided_pair_needs_decide_most_such_pairs():
    decided, total = 0, 0
    for seed in range(10):
        few = discover_hierarchy(siblings(700, seed), NAMES, noise=RATE, controls=0)
        for one in few.undecided:
            if one.samples_needed is not None and one.samples_needed < 30_000:
                more = siblings(one.samples_needed, 1000 + seed)
                after = discover_hierarchy(more, NAMES, noise=RATE, controls=0).undecided
                decided += (one.concept, one.parent) not in {(two.concept, two.parent) for two in after}
                total += 1
        if few.undecided:
            assert "Undecided for want of samples" in str(few)
            assert few.to_dict()["undecided"][0]["samples_needed"] == few.undecided[0].samples_needed
    assert total >= 10 and decided >= 0.7 * total


@pytest.mark.parametrize(("most", "seed"), [(0.99, 0), (0.97, 1)])
def test_a_direction_that_frequencies_cannot_tell_is_undecided(most, seed):
    """A concept with nearly all samples of its parent may be the parent's equal, or even include it."""
    discovered = discover_hierarchy(siblings(2500, seed, most=most), NAMES, noise=RATE, controls=0)
    related = {(one.concept, one.parent) for one in discovered.evidence}
    told = {frozenset(pair) for pair in discovered.equivalent}
    undecided = {frozenset((one.concept, one.parent)): one for one in discovered.undecided}
    assert not {("a", "p"), ("p", "a")} & related
    assert {"a", "p"} in told | set(undecided)
    if {"a", "p"} not in told:
        one = undecided[frozenset("ap")]
        assert one.samples_needed is not None and 2500 < one.samples_needed < 25_000


def test_what_follows_from_other_relations_is_not_undecided():
    unsure = 0
    for seed in range(6):
        discovered = discover_hierarchy(siblings(700, seed), NAMES, noise=RATE, controls=0)
        above = {name: set(discovered.hierarchy.ancestors(name, "is-a")) for name in NAMES}
        assert not [one for one in discovered.undecided if one.parent in above[one.concept]]
        unsure += len(discovered.undecided)
    assert unsure, "there is something to leave out"
