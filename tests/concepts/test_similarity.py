"""Similarity: known values, what must not change it, and its error of the first kind."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.similarity import model_similarity, similarity, together
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.files import null_nonfinite


def drawn(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unbiased_hsic(first, second):
    """Song et al. 2012, equation 5, term by term."""
    n = len(first)
    k, l = (rows @ rows.T for rows in (first, second))  # noqa: E741
    k, l = (gram - torch.diag(gram.diag()) for gram in (k, l))  # noqa: E741
    last = float((k @ l).sum()) * 2 / (n - 2)
    return (float((k * l).sum()) + float(k.sum() * l.sum()) / ((n - 1) * (n - 2)) - last) / (n * (n - 3))


def test_cka_is_the_quotient_of_unbiased_terms():
    first, second = drawn(30, 7), drawn(30, 5, 1)
    second[:, :3] += first[:, :3]
    wanted = unbiased_hsic(first, second) / math.sqrt(unbiased_hsic(first, first) * unbiased_hsic(second, second))
    found = similarity(first, second)
    assert found.score == pytest.approx(wanted, abs=1e-9)
    assert found.significant and found.p_value == 1 / 200
    centred = [rows - rows.mean(0) for rows in (first, second)]
    grams = [rows.T @ other for rows, other in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)]
    usual = grams[0].norm() ** 2 / (grams[1].norm() * grams[2].norm())
    assert found.uncorrected == pytest.approx(float(usual), abs=1e-9)


def test_neighbours_are_those_of_a_plain_loop():
    first, second = drawn(25, 6), drawn(25, 4, 1)
    shared = 0
    for i in range(25):
        near = []
        for rows in (first, second):
            cosines = torch.nn.functional.cosine_similarity(rows[i : i + 1], rows)
            others = [j for j in cosines.argsort(descending=True).tolist() if j != i]
            near.append(set(others[:5]))
        shared += len(near[0] & near[1])
    assert similarity(first, second, "neighbours", neighbours=5).score == pytest.approx(shared / 125)


@pytest.mark.parametrize("measure", ["cka", "neighbours"])
def test_of_itself_it_is_one(measure):
    rows = drawn(40, 6)
    found = similarity(rows, rows, measure)
    assert found.score == pytest.approx(1) and found.calibrated == pytest.approx(1)
    assert 0 < found.critical < 0.5
    assert math.isnan(found.uncorrected) == (measure == "neighbours")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), n=st.integers(12, 40), widths=st.tuples(st.integers(2, 50), st.integers(2, 50)),
    factor=st.floats(1e-3, 1e3), measure=st.sampled_from(["cka", "neighbours"]),
)  # fmt: skip
def test_turned_mirrored_scaled_and_exchanged_it_stays(seed, n, widths, factor, measure):
    first, second = drawn(n, widths[0], seed), drawn(n, widths[1], seed + 1)
    turn = torch.linalg.qr(drawn(widths[0], widths[0], seed + 2)).Q
    settings = {"permutations": 19, "neighbours": 3}
    found = similarity(first, second, measure, **settings)
    assert -1 <= found.score <= 1 + 1e-9
    for other in (similarity(factor * first @ turn, second, measure, **settings),
                  similarity(second, first, measure, **settings)):  # fmt: skip
        assert other.score == pytest.approx(found.score, abs=1e-8)
    if measure == "cka":
        moved = similarity(first + 10, second, measure, **settings)
        assert moved.score == pytest.approx(found.score, abs=1e-7)
        assert moved.p_value == found.p_value


@pytest.mark.parametrize("measure", ["cka", "neighbours"])
@pytest.mark.parametrize("width", [16, 256])
def test_unrelated_pairs_seldom_count_as_alike(measure, width):
    """24 samples, fewer than numbers in the wider vectors; the usual CKA of these pairs is far from 0."""
    alike, usual = 0, []
    for seed in range(300):
        found = similarity(drawn(24, width, 2 * seed), drawn(24, width, 2 * seed + 1), measure, seed=seed, neighbours=5)
        assert (found.calibrated > 0) == found.significant
        alike += found.significant
        usual.append(found.uncorrected)
    # Within three standard errors of 5%.
    assert 0.012 <= alike / 300 <= 0.088
    if measure == "cka":
        assert min(usual) > 0.2


def test_related_representations_are_found():
    shared = drawn(80, 5)
    first = torch.cat([shared, drawn(80, 60, 1)], 1)
    second = torch.cat([shared @ drawn(5, 5, 2), drawn(80, 60, 3)], 1)
    for measure in ("cka", "neighbours"):
        assert similarity(first, second, measure).p_value < 0.02


def test_the_same_for_the_same_seed_and_plain_values():
    first, second = drawn(20, 5), drawn(20, 5, 1)
    found = similarity(first, second, seed=3)
    assert similarity(first, second, seed=3) == found
    assert similarity(first, second, seed=4).null != found.null
    plain = similarity(first, second, "neighbours", neighbours=4).to_dict()
    kept = json.loads(json.dumps(null_nonfinite(plain), allow_nan=False))
    assert kept["uncorrected"] is None and kept["widths"] == [5, 5] and len(kept["null"]) == 199
    assert "chance reaches" in str(found)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (drawn(20, 3), drawn(21, 3), "of 20 samples and the second of 21"),
        (drawn(5, 3), drawn(5, 3), "There are 5 samples"),
        (drawn(1, 3), drawn(1, 3), "There is 1 sample"),
        (
            drawn(20, 3) * math.nan,
            drawn(20, 3),
            "20 of 20 vectors of the first representation hold values that are not finite",
        ),
        (drawn(20, 3), torch.ones(20, 3), "All samples are equal in the second"),
        (drawn(20, 3)[0], drawn(20, 3), "have the shape (3,)"),
        ([1.0], drawn(20, 3), "The vectors of the first representation are of the type list"),
    ],
)
def test_bad_values_are_named(first, second, message):
    with pytest.raises(DataError) as caught:
        similarity(first, second)
    assert message in str(caught.value)


def test_bad_settings():
    rows = drawn(20, 3)
    with pytest.raises(ConfigError, match="The measure is 'svcca'"):
        similarity(rows, rows, "svcca")
    with pytest.raises(ConfigError, match="5 permutations"):
        similarity(rows, rows, permutations=5)
    with pytest.raises(ConfigError, match="11 neighbours to compare among 20"):
        similarity(rows, rows, "neighbours", neighbours=11)


def test_layers_of_two_architectures():
    torch.manual_seed(0)
    spec = ModelSpec(example_inputs={"input": torch.rand(2, 6)})
    first = ModelAdapter(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), spec=spec)
    second = ModelAdapter(nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 8), nn.Linear(8, 3)), spec=spec)
    rows = torch.randn(50, 6)
    found = model_similarity(first, second, rows, layers=["0", None], second_layers=["0", "1", "2"])
    assert [[pair.layers for pair in row] for row in found][1] == [("2", "0"), ("2", "1"), ("2", "2")]
    assert [len(row) for row in found] == [3, 3]
    with torch.no_grad():
        wanted = similarity(first.module[0](rows), second.module[:2](rows))
    assert found[0][1].score == pytest.approx(wanted.score, abs=1e-5)
    assert found[0][0].significant
    # The same samples in another order for the second model are other samples.
    other = model_similarity(first, second, rows, rows.flip(0), layers=["0"], second_layers=["0"])
    assert other[0][0].score < found[0][0].score
    with pytest.raises(ConfigError, match="Put a single name into a list"):
        model_similarity(first, second, rows, layers="0")
    with pytest.raises(ConfigError, match="no independent samples"):
        model_similarity(first, second, rows, pool="positions")
    with pytest.raises(ConfigError, match="no layer 'x'"):
        model_similarity(first, second, rows, layers=["x"])
    with pytest.raises(DataError, match="of 50 samples and the second of 40"):
        model_similarity(first, second, rows, rows[:40])


def test_a_table_of_unrelated_layers_seldom_has_one_that_counts_as_alike():
    """Nine pairs of 24 samples; without the correction about a third of the tables would have one."""
    alike = single = 0
    for seed in range(80):
        sides = [
            [drawn(24, width, 10 * seed + 3 * side + n) for n, width in enumerate((4, 20, 200))] for side in (0, 1)
        ]
        plain = [[similarity(a, b, permutations=99, seed=seed) for b in sides[1]] for a in sides[0]]
        rows = together(plain)
        assert all((one.calibrated > 0) == one.significant for row in rows for one in row)
        assert all(one.p_value >= before.p_value - 0.05 for row, was in zip(rows, plain, strict=True)
                   for one, before in zip(row, was, strict=True))  # fmt: skip
        alike += any(one.significant for row in rows for one in row)
        single += any(one.significant for row in plain for one in row)
    # Within three standard errors of 5%.
    assert alike / 80 <= 0.124 < single / 80


def test_one_pair_is_not_corrected_and_several_say_so():
    shared = drawn(40, 5)
    pair = similarity(shared, shared)
    assert together([[pair]]) == [[pair]] and pair.compared == 1
    both = together([[pair, similarity(shared, drawn(40, 5, 1))]])
    assert both[0][0].significant and both[0][0].compared == 2
    assert "for the best of 2 pairs" in str(both[0][0]) and "best of" not in str(pair)
    with pytest.raises(ConfigError, match="different numbers of samples or permutations"):
        together([[pair, similarity(shared, shared, permutations=99)]])
