"""Erasure in closed form: the closed form, what no linear classifier can find, and rules for any data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from utils.concepts.erasure import fit_eraser, random_erasers
from utils.runtime.errors import ConfigError, DataError


def covariance(values, targets):
    return (values - values.mean(0)).T @ (targets - targets.mean(0)) / len(values)


def data(n=300, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, generator=g) < 0.4
    mixed = torch.randn(n, width, generator=g, dtype=torch.float64) @ torch.randn(width, width, generator=g).double()
    return mixed + labels[:, None] * torch.randn(width, generator=g), labels


def test_it_is_the_closed_form_of_theorem_4_3():
    values, labels = data()
    z = torch.stack([~labels, labels], 1).double()
    sizes, axes = torch.linalg.eigh(covariance(values, values))
    whitening = axes @ torch.diag(sizes**-0.5) @ axes.T
    whitened = whitening @ covariance(values, z)
    projection = torch.linalg.inv(whitening) @ whitened @ torch.linalg.pinv(whitened) @ whitening
    wanted = values - (values - values.mean(0)) @ projection.T
    eraser = fit_eraser(values, labels)
    assert eraser.rank == 1
    assert torch.allclose(eraser.apply(values), wanted, atol=1e-9)
    assert eraser.to_dict() == {"rank": 1, "width": 12}


def test_no_linear_classifier_is_left_and_the_change_is_the_least():
    values, labels = data(400, 20)
    eraser = fit_eraser(values, labels)
    erased = eraser.apply(values)
    before, after = (LogisticRegression(C=1e6, max_iter=5000, tol=1e-10) for _ in range(2))
    assert roc_auc_score(labels, before.fit(values, labels).decision_function(values)) > 0.8
    # It can do no better than to say the same of every row, the share of the concept.
    said = after.fit(erased, labels).predict_proba(erased)[:, 1]
    assert abs(said - float(labels.double().mean())).max() < 1e-4
    # Projecting the difference of means away also equalises the means, at a larger change.
    unit = torch.nn.functional.normalize(values[labels].mean(0) - values[~labels].mean(0), dim=0)
    projected = values - torch.outer((values - values.mean(0)) @ unit, unit)
    assert torch.allclose(projected[labels].mean(0), projected[~labels].mean(0))
    assert eraser.change(values) < float((values - projected).square().sum(1).mean().sqrt())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), n=st.integers(2, 40), width=st.integers(1, 14), rank=st.integers(1, 14),
    kinds=st.integers(2, 5), spread=st.floats(0, 3), offset=st.floats(-1e3, 1e3),
    shrinkage=st.sampled_from([0.0, 0.0, 0.3, 0.9]), real=st.booleans(),
)  # fmt: skip
def test_for_any_data_nothing_is_left_and_erasing_twice_is_erasing_once(
    seed, n, width, rank, kinds, spread, offset, shrinkage, real
):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, width, generator=g).double()
    values = values * 10 ** (spread * (torch.rand(width, generator=g, dtype=torch.float64) - 0.5)) + offset
    classes = torch.randint(0, kinds, (n,), generator=g)
    classes[:2] = torch.tensor([0, 1])
    targets = torch.randn(n, 2, generator=g).double() if real else torch.nn.functional.one_hot(classes).double()
    eraser = fit_eraser(values, targets if real else classes, shrinkage)
    erased = eraser.apply(values)
    size = float(values.std(0, correction=0).max()) + 1e-9 * abs(offset) + 1e-12
    assert float(covariance(erased, targets).abs().max()) <= 1e-8 * size
    assert torch.allclose(eraser.apply(erased), erased, atol=1e-7 * size)
    assert torch.allclose(erased.mean(0), values.mean(0), atol=1e-8 * size)
    assert eraser.rank <= min(kinds - 1 if not real else 2, width)


def test_it_keeps_type_and_shape_and_takes_positions():
    values, labels = data()
    eraser = fit_eraser(values, labels)
    assert eraser.apply(values.float()).dtype == torch.float32
    assert eraser.apply(values.bfloat16()).dtype == torch.bfloat16
    folded = values.reshape(30, 10, 12)
    assert torch.allclose(eraser.apply(folded).reshape(300, 12), eraser.apply(values))
    # The mean of erased positions is the erased mean of positions: pooling and erasing change places.
    assert torch.allclose(eraser.apply(folded).mean(1), eraser.apply(folded.mean(1)))


def test_nothing_to_erase_changes_nothing():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(5, 1)
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0, 0])
    eraser = fit_eraser(values, labels)
    assert eraser.rank == 0
    assert torch.equal(eraser.apply(values), values)
    assert fit_eraser(torch.full((10, 3), 0.1), labels).rank == 0


def test_shrinkage_finds_the_concept_in_new_rows_where_there_are_few():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    values = torch.randn(400, 100, generator=g) + 2 * labels[:, None] * torch.eye(100)[0]
    lost = []
    for shrinkage in (0.0, 100 / 160):
        erased = fit_eraser(values[:60], labels[:60], shrinkage).apply(values[60:])
        left = erased[labels[60:] == 1].mean(0) - erased[labels[60:] == 0].mean(0)
        lost.append(float(left.norm()))
    assert lost[1] < lost[0]


def test_random_changes_are_as_large_and_of_as_many_dimensions():
    values, labels = data()
    for shrinkage in (0.0, 0.5):
        eraser = fit_eraser(values, labels, shrinkage)
        others = random_erasers(values, eraser, 20, torch.Generator().manual_seed(1), shrinkage)
        assert len(others) == 20
        for other in others:
            assert other.rank == eraser.rank
            assert other.change(values) == pytest.approx(eraser.change(values))
        assert not torch.allclose(others[0].writing, others[1].writing)


def test_bad_input_is_named():
    values, labels = data()
    eraser = fit_eraser(values, labels)
    with pytest.raises(ConfigError, match="the eraser is for the width 12"):
        eraser.apply(torch.randn(3, 5))
    with pytest.raises(ConfigError, match="shrinkage is 1"):
        fit_eraser(values, labels, 1.0)
    with pytest.raises(DataError, match="300 vectors, and the labels are of the shape \\(299,\\)"):
        fit_eraser(values, labels[:-1])
    with pytest.raises(DataError, match="the labels are a list"):
        fit_eraser(values, [0, 1])
    with pytest.raises(DataError, match="All labels are equal"):
        fit_eraser(values, torch.ones(300, dtype=torch.long))
    with pytest.raises(DataError, match="300 of 300 vectors hold values that are not finite"):
        fit_eraser(values * torch.inf, labels)
    with pytest.raises(DataError, match="There is 1 vector. Expected two"):
        fit_eraser(values[:1], labels[:1])
