from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils.continual.anchors import Anchors, gradients_for
from utils.training.state import Insertion, ModelChange, TensorChange

SHAPES = {"a": (3, 4), "b": (4,)}


def drawn(seed, sparse=False):
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: value * (value > 0.5) for name, value in values.items()} if sparse else values


def learner_with(values):
    return SimpleNamespace(parameters={name: nn.Parameter(value.clone()) for name, value in values.items()})


def penalty(parameters, quadratics):
    return sum(
        (importance[name] * (parameters[name] - anchor[name]) ** 2).sum() / 2
        for importance, anchor in quadratics
        for name in parameters
    )


@given(st.integers(1, 6), st.integers(0, 1000))
def test_one_quadratic_is_the_sum_of_all_but_for_a_constant(count, seed):
    quadratics = [(drawn(seed + 10 * k, sparse=True), drawn(seed + 10 * k + 1)) for k in range(count)]
    anchors = Anchors()
    for importance, anchor in quadratics:
        anchors.add(importance, anchor)
    assert anchors.stored_floats == 2 * 16
    places = [drawn(seed + 7), drawn(seed + 8)]
    merged = [penalty(place, [(anchors.importance, anchors.anchor)]) for place in places]
    separate = [penalty(place, quadratics) for place in places]
    assert float(merged[0] - merged[1]) == pytest.approx(float(separate[0] - separate[1]), abs=1e-9)


def test_the_pull_is_the_gradient_of_the_written_out_sum():
    quadratics = [(drawn(k, sparse=True), drawn(k + 50)) for k in range(3)]
    anchors = Anchors()
    for importance, anchor in quadratics:
        anchors.add(importance, anchor)
    learner = learner_with(drawn(99))
    before = torch.ones(3, 4, dtype=torch.float64)
    learner.parameters["a"].grad = before.clone()
    anchors.pull(learner, 30.0)
    free = {name: p.detach().clone().requires_grad_() for name, p in learner.parameters.items()}
    (30.0 * penalty(free, quadratics)).backward()
    torch.testing.assert_close(learner.parameters["a"].grad, free["a"].grad + before)
    # A parameter without a gradient is held too.
    torch.testing.assert_close(learner.parameters["b"].grad, free["b"].grad)


def test_nothing_is_pulled_without_importance_or_strength():
    learner = learner_with(drawn(0))
    Anchors().pull(learner, 1.0)
    anchors = Anchors()
    anchors.add(drawn(1), drawn(2))
    anchors.pull(learner, 0.0)
    assert all(p.grad is None for p in learner.parameters.values())
    assert all(float(g.abs().max()) == 0 for g in gradients_for(list(learner.parameters.values())))


def test_half_precision_weights_are_held_in_single_precision():
    learner = learner_with({name: value.bfloat16() for name, value in drawn(3).items()})
    anchors = Anchors()
    anchors.add({name: value.float() for name, value in drawn(4).items()}, learner_with(drawn(5)).parameters)
    anchors.pull(learner, 2.0)
    for name, p in learner.parameters.items():
        assert p.grad.dtype == torch.bfloat16
        wanted = 2.0 * anchors.importance[name] * (p.detach().float() - anchors.anchor[name])
        torch.testing.assert_close(p.grad.float(), wanted, rtol=1e-2, atol=1e-2)


def test_a_change_is_followed_and_taken_back():
    anchors = Anchors()
    anchors.add(drawn(1), drawn(2))
    state = anchors.state_dict()
    old, other = drawn(2), drawn(3)
    grown = torch.cat([2 * old["a"], torch.full((1, 4), 9.0, dtype=torch.float64)])
    how = {
        "c": TensorChange("a", None, (Insertion(0, ((3, 1),)),), factor=2.0),
        "new": TensorChange(None, "a"),
        "b": TensorChange("b", None, (Insertion(0, ((0, 1),)),)),
    }
    wrong = torch.zeros(9, dtype=torch.float64)
    undo = anchors.migrate(ModelChange("width", 1, {"c": grown, "new": other["a"], "b": wrong}, {}, how))
    # What does not fit its weight any more holds nothing.
    assert anchors.importance.keys() == anchors.anchor.keys() == {"c"}
    torch.testing.assert_close(anchors.importance["c"][:3], state["importance"]["a"] / 4)
    assert float(anchors.importance["c"][3].abs().max()) == 0
    torch.testing.assert_close(anchors.anchor["c"][:3], 2 * state["anchor"]["a"])
    torch.testing.assert_close(anchors.anchor["c"][3], grown[3])
    undo()
    assert anchors.state_dict() == state
    again = Anchors()
    again.load_state_dict(state)
    assert all(torch.equal(again.anchor[name], value) for name, value in anchors.anchor.items())
    assert again.anchor["a"] is not anchors.anchor["a"]
