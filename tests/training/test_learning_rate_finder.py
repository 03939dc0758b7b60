import math
import random

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import RunError
from utils.training import TrainingConfig, learning_rate_finder, trial_steps
from utils.training.dataset_utilities import load_data
from utils.training.learning_rate_finder import find_learning_rate, smoothed, suggestion
from utils.training.prepared_data import PreparedData
from utils.training.weights import weights_sha256

RATES = [1e-6 * 1e6 ** (number / 99) for number in range(100)]
PLAIN = TrainingConfig(batch_size=2, weight_decay=0.0, clip_norm=1e9)


class Distance(nn.Module):
    """Its loss is the squared distance of its weights, all alike, from the targets: a quadratic."""

    def __init__(self, outputs=4):
        super().__init__()
        self.layer = nn.Linear(1, outputs, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, features):
        return self.layer(features)


def quadratic(distance, features=1.0):
    example = {"features": torch.ones(2, 1)}
    adapter = ModelAdapter(Distance(), spec=ModelSpec(task="regression", example_inputs=example))
    samples = {"features": torch.full((8, 1), features), "labels": torch.full((8, 4), distance * features)}
    return adapter, PreparedData("test", "regression", samples, samples)


@pytest.mark.parametrize("distance", [0.02, 0.2])
def test_on_a_quadratic_it_is_the_rate_that_crosses_half_the_distance(distance):
    """AdamW moves each weight by about the rate in each step, on whatever curvature.

    While the rate rises by a factor of r in each step, the steps up to a rate add up to it divided by ln r. The loss
    falls fastest, per step, where they have crossed half the distance to the minimum; with a constant rate of twice the
    distance, the limit of stability, every step would end as far on the other side.
    """
    found = find_learning_rate(*quadratic(distance), PLAIN, progress=False)
    expected = distance / 2 * math.log(RATES[1] / RATES[0])
    assert found.clear
    assert expected / 2 < found.learning_rate < 2 * expected
    assert found.learning_rate < 2 * distance
    steep = find_learning_rate(*quadratic(distance, features=30.0), PLAIN, progress=False)
    assert steep.learning_rate == pytest.approx(found.learning_rate, rel=0.15)


def test_the_model_and_the_random_streams_are_left_as_they_are(text_file, tiny_gpt):
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=32)
    before, mode = weights_sha256(tiny_gpt.module), tiny_gpt.module.training
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    config = TrainingConfig(batch_size=4, accumulate=2)
    found = find_learning_rate(tiny_gpt, data, config, progress=False)
    assert weights_sha256(tiny_gpt.module) == before
    assert tiny_gpt.module.training is mode
    assert all(parameter.grad is None for parameter in tiny_gpt.module.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert 3e-4 < found.learning_rate < 3e-2
    assert found.losses[0] == pytest.approx(math.log(300), abs=0.4)
    again = find_learning_rate(tiny_gpt, data, config, progress=False)
    assert again == found
    assert found.check() is found
    assert found.to_dict()["learning_rate"] == found.learning_rate
    assert len(found.to_dict()["losses"]) == len(found.rates) <= 100
    assert "falls fastest at" in str(found)
    shown = found._repr_html_()
    assert "<svg" in shown and "suggestion" in shown and "log10 of the learning rate" in shown


def curve(fall=1.0, noise=0.0, seed=0, rises=True):
    """A loss that falls around a rate of 1e-3 and rises from 2e-2 on."""
    draws = random.Random(seed)
    fallen = [5 - fall / (1 + math.exp(-4 * (math.log10(rate) + 3))) for rate in RATES]
    risen = [max(0.0, math.log10(rate) + 1.7) * 2 * rises for rate in RATES]
    return [a + b + draws.gauss(0, noise) for a, b in zip(fallen, risen, strict=True)]


def test_it_is_where_the_loss_falls_fastest():
    found = suggestion(RATES, curve())
    assert 7e-4 < found.learning_rate < 1.5e-3
    assert found.ended == "ended at a rate of 1"


def test_noise_never_becomes_a_number():
    answers = [suggestion(RATES, curve(0.0, 0.3, seed, rises)) for seed in range(150) for rises in (False, True)]
    assert not any(answer.clear for answer in answers)
    noisy = [suggestion(RATES, curve(1.0, 0.15, seed)).learning_rate for seed in range(150)]
    assert all(rate is not None and 2e-4 < rate < 5e-3 for rate in noisy)


@pytest.mark.parametrize(
    ("losses", "diverged", "words"),
    [
        ([5.0] * 100, False, "the loss fell by 0 from 5, which may be chance"),
        (curve(0.0), False, "which may be chance"),
        ([3.0, float("nan")], True, "the loss diverged within 1 steps, at 1e-06 or less"),
        ([float("inf")], True, "the loss diverged within 0 steps"),
        ([5 - math.log10(1 + rate) for rate in RATES], False, "still falling at 1, the largest rate that was tried"),
        ([*([5.0] * 5), *([1.0] * 5), *([9.0] * 90)], False, "with no step below to look at"),
    ],
)
def test_what_is_not_clear_is_said_and_gives_no_number(losses, diverged, words):
    found = suggestion(RATES[: len(losses)], losses, diverged)
    assert found.learning_rate is None and not found.clear
    assert words in found.reason
    assert "not found" in str(found) and "not found" in found._repr_html_()
    with pytest.raises(
        RunError, match=r"No learning rate was found: .*Expected a loss that falls.*Set learning_rate to"
    ):
        found.check()


def test_a_trained_model_gets_no_number():
    assert "may be chance" in find_learning_rate(*quadratic(0.0), PLAIN, progress=False).reason
    found = find_learning_rate(*quadratic(1e-5), PLAIN, progress=False)
    assert not found.clear
    assert len(found.losses) < 100, "the test ends where the loss has diverged"
    assert found.ended == "ended where the loss diverged"


def test_a_gradient_that_is_not_finite_ends_the_test():
    class Overflows(Distance):
        def forward(self, features):
            return self.layer(features) + torch.where(self.layer.weight.abs().max() > 0.01, torch.inf, 0.0)

    adapter, data = quadratic(0.2)
    adapter.module = Overflows()
    found = find_learning_rate(adapter, data, PLAIN, progress=False)
    assert found.ended == "ended where the loss diverged"
    assert 8 < len(found.losses) < 80


def test_smoothing_keeps_straight_lines_straight():
    line = [3.0 - 0.1 * number for number in range(20)]
    assert smoothed(line) == pytest.approx(line)


def test_a_model_that_cannot_be_copied_is_told():
    adapter, data = quadratic(0.2)
    adapter.module.lock = open(__file__)  # noqa: SIM115
    with adapter.module.lock, pytest.raises(RunError, match=r"Distance cannot be copied \(TypeError.*to numbers\."):
        find_learning_rate(adapter, data, PLAIN, progress=False)


def test_several_processes_cannot_look_together(monkeypatch):
    monkeypatch.setattr(trial_steps, "rank_and_world", lambda: (0, 2))
    with pytest.raises(RunError, match=r"several processes train together.*one process.*in a single process"):
        find_learning_rate(*quadratic(0.2), PLAIN, progress=False)


def test_an_interrupt_ends_it(monkeypatch):
    import signal

    def interrupt(losses):
        signal.raise_signal(signal.SIGINT)
        return False

    monkeypatch.setattr(learning_rate_finder, "_diverged", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(*quadratic(0.2), PLAIN, progress=False)


def test_it_takes_references_and_finds_the_batch_too():
    found = find_learning_rate(*quadratic(0.2), PLAIN.with_changes(batch_size="auto", step_samples=4), progress=False)
    assert found.clear
    from utils import tier3_training_utilities as facade

    assert facade.find_learning_rate is find_learning_rate
    assert utils.TrainingConfig(learning_rate="auto").unresolved == ("learning_rate",)
