import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.concepts.transfer_toys import samples, student
from utils.concepts.readout import ConceptReadout, calibration, fit_readout
from utils.runtime.errors import ConfigError


def drawn():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(120, 5, generator=generator) * torch.tensor([1, 10, 0.1, 1, 0]) + 3
    return rows, rows[:, 0] + torch.randn(120, generator=generator) > 3


def test_a_readout_is_the_logistic_regression_of_standardised_features():
    rows, labels = drawn()
    vector, bias = fit_readout(rows, labels.float())
    scaled = (rows - rows.mean(0))[:, :4] / rows.std(0, correction=0)[:4]
    expected = LogisticRegression(C=1.0, tol=1e-8).fit(scaled.numpy(), labels.numpy())
    np.testing.assert_allclose(rows @ vector + bias, expected.decision_function(scaled.numpy()), atol=2e-3)
    assert vector[4] == 0


def test_soft_targets_count_as_shares_of_both_labels():
    rows, labels = drawn()
    soft = torch.where(labels, 0.8, 0.3)
    vector, bias = fit_readout(rows, soft)
    scaled = ((rows - rows.mean(0))[:, :4] / rows.std(0, correction=0)[:4]).numpy()
    both = np.repeat([True, False], len(rows))
    weights = np.concatenate([soft, 1 - soft])
    expected = LogisticRegression(C=1.0, tol=1e-8).fit(np.concatenate([scaled] * 2), both, weights)
    np.testing.assert_allclose(rows @ vector + bias, expected.decision_function(scaled), atol=2e-3)


def test_calibration_matches_how_often_it_is_right():
    generator = torch.Generator().manual_seed(0)
    odds = 2 * torch.randn(20_000, generator=generator)
    labels = torch.rand(20_000, generator=generator) < odds.sigmoid()
    scale, offset = calibration(3 * odds + 7, labels)
    assert scale == pytest.approx(1 / 3, rel=0.05)
    assert offset == pytest.approx(-7 / 3, rel=0.05)


def test_scores_that_separate_have_a_calibration():
    scale, offset = calibration(torch.tensor([1.0, 2, -1, -2]), torch.tensor([True, True, False, False]))
    assert 0 < scale < 100
    assert abs(offset) < 1e-3


def test_scores_that_are_the_wrong_way_round_say_nothing():
    scale, offset = calibration(torch.tensor([-1.0, -2, 1, 2, 3]), torch.tensor([True, True, False, False, False]))
    assert (scale, offset) == (0, pytest.approx(np.log(3 / 4)))


def test_a_readout_of_another_width_is_refused():
    readout = ConceptReadout(student(), "out", "input", "mean", torch.zeros(3), 0.0)
    with pytest.raises(ConfigError, match="is 16 wide, and the concept's readout 3"):
        readout.score(samples(4)[0])
    assert readout.to_dict()["vector"] == [0, 0, 0]
