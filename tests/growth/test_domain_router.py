"""Routers that are fitted tell domains apart, on examples that they have not seen, and say against what."""

import pytest
import torch
from torch import nn

from tests.growth.domain_models import SCENES, answer, docs, gpt, plays, train
from utils.growth.cloning import clone_for_domain
from utils.growth.domain_router import RouterFit, fit_router
from utils.growth.multi_domain import MultiDomainModel
from utils.runtime.errors import ConfigError, DataError
from utils.training.weights import weights_sha256


@pytest.fixture
def model():
    loaded = gpt()
    clones = [clone_for_domain(loaded, name, "partial", untie=True) for name in ("docs", "plays")]
    return MultiDomainModel(clones)


def test_two_domains_of_real_text_are_told_apart(model):
    before = weights_sha256(model.experts)
    state = torch.get_rng_state()
    fit = fit_router(model, {"docs": docs(200), "plays": plays(100)})
    assert torch.equal(torch.get_rng_state(), state) and weights_sha256(model.experts) == before
    assert isinstance(fit, RouterFit) and fit.held_out == 75 and fit.learnt_from == 225
    assert fit.control == pytest.approx(50 / 75)
    assert fit.accuracy > fit.control + 0.15
    assert set(fit.by_domain) == {"docs", "plays"} and min(fit.by_domain.values()) > 0.6
    assert fit.to_dict()["control"] == fit.control
    assert model.fitted and set(model.route(docs(20))) | set(model.route(plays(20))) == {"docs", "plays"}


def test_lines_that_were_never_seen_are_known_for_what_they_are(model):
    fit_router(model, {"docs": docs(150), "plays": plays(150, SCENES[:8])})
    right = model.route(docs(300)[150:]).count("docs") + model.route(plays(150, SCENES[8:])).count("plays")
    assert right / 300 > 0.6


def test_without_a_difference_there_is_nothing_to_learn(model):
    same = docs(200)
    fit = fit_router(model, {"docs": same[:100], "plays": same[100:]})
    assert fit.control == 0.5 and abs(fit.accuracy - 0.5) < 0.25


def test_fits_repeat_and_depend_on_the_seed(model):
    examples = {"docs": docs(40), "plays": {"input_ids": plays(40)}}
    rows = []
    for seed in (1, 1, 2):
        fit = fit_router(model, examples, steps=20, seed=seed)
        rows.append((fit, torch.cat([row.weight.detach().clone() for row in model.router_rows()])))
    assert rows[0][0] == rows[1][0] and torch.equal(rows[0][1], rows[1][1])
    assert not torch.equal(rows[0][1], rows[2][1])
    assert all(row.weight.requires_grad and row.weight.grad is None for row in model.router_rows())


def test_it_reaches_the_optimum_of_a_softmax_regression():
    """With one step per full batch the loss goes where torch's own LBFGS brings it."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    model = MultiDomainModel([clone_for_domain(mlp, name) for name in ("a", "b")])
    x = {"a": torch.randn(120, 6), "b": torch.randn(120, 6) + 0.5}
    fit = fit_router(model, x, steps=1500, batch_size=64, held_out=0.5)
    features = {name: model.features(value) for name, value in x.items()}
    inputs, labels = torch.cat(list(features.values())), torch.arange(2).repeat_interleave(120)
    weight = torch.zeros(2, 5, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100)

    def loss():
        solver.zero_grad()
        value = nn.functional.cross_entropy(inputs @ weight.T + bias, labels)
        value.backward()
        return value

    solver.step(loss)
    best = float(loss().detach())
    with torch.no_grad():
        reached = float(nn.functional.cross_entropy(model._scores(inputs), labels))
    assert best < reached < best + 0.02
    assert abs(fit.loss - reached) < 0.1


def test_a_new_domain_is_chosen_after_another_fit(model):
    fit_router(model, {"docs": docs(60), "plays": plays(60)}, steps=50)
    numbers = torch.randint(0, 3, (60, 32), generator=torch.Generator().manual_seed(0)) + 27
    model.add_domain(clone_for_domain(model.parent, "signs", "partial"))
    assert "signs" not in model.route(numbers)
    fit = fit_router(model, {"docs": docs(60), "plays": plays(60), "signs": numbers})
    assert fit.by_domain["signs"] > 0.9 and model.route(numbers).count("signs") > 50


def test_routed_answers_are_better_than_one_clone_for_all():
    loaded, first, second = gpt(), docs(), plays()
    parent = train(loaded.module, first[:150])
    clone = clone_for_domain(loaded, "plays", "partial", untie=True)
    train(clone.module, second[:150])
    model = MultiDomainModel([clone], parent_domain="docs").eval()
    fit = fit_router(model, {"docs": first[:150], "plays": second[:150]})
    assert fit.accuracy > fit.control + 0.2
    mixed = torch.cat([first[150:], second[150:]])

    def loss(logits):
        return float(nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 37), mixed[:, 1:].reshape(-1)))

    routed = loss(answer(model, mixed))
    assert routed < loss(answer(parent, mixed)) - 0.1 and routed < loss(answer(clone.module, mixed)) - 0.1


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"docs": 4}, r"Examples were given for docs. Expected them for docs, plays, all and no others"),
        ({}, r"Examples were given for no domain"),
        ({"docs": 4, "plays": 4, "law": 4}, r"Examples were given for docs, plays, law"),
        ({"docs": 4, "plays": 0}, r"The examples for 'plays' are 0 samples. Expected tensors with two samples or more"),
        ({"docs": 4, "plays": 1}, r"The examples for 'plays' are 1 samples"),
        ({"docs": {}, "plays": 4}, r"The examples for 'docs' are no samples"),
        ({"docs": {"a": 4, "b": 3}, "plays": 4}, r"The examples for 'docs' are 3 and 4 samples"),
    ],
)
def test_examples_are_checked(model, examples, message):
    def made(count):
        return {name: made(n) for name, n in count.items()} if isinstance(count, dict) else docs(4)[:count]

    with pytest.raises(DataError, match=message):
        fit_router(model, {name: made(count) for name, count in examples.items()})


@pytest.mark.parametrize("wish", [{"steps": 0}, {"batch_size": 0}, {"held_out": 1.0}, {"learning_rate": 0.0}])
def test_settings_are_checked(model, wish):
    with pytest.raises(ConfigError, match=r"fit_router was given steps=\d+, batch_size=\d+, held_out="):
        fit_router(model, {"docs": docs(4), "plays": plays(4)}, **wish)
