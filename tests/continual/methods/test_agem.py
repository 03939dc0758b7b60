from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from tests.continual.methods.toy_streams import (
    STEPS,
    check_equal,
    config_of,
    fresh,
    in_sessions,
    plain_loop,
    same_weights,
    train,
)
from utils.continual.methods.agem import AveragedGem, ReferenceError, project
from utils.runtime.seeding import derive_seed


def parameters_with(gradients):
    made = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = gradient.clone()
    return made


@given(st.integers(0, 10_000), st.booleans())
def test_the_projection_is_the_nearest_gradient_that_does_not_point_against_the_reference(seed, against):
    generator = torch.Generator().manual_seed(seed)
    g, r = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), (5,))] for _ in range(2))
    flat_g, flat_r = (torch.cat([one.flatten() for one in each]) for each in (g, r))
    if (float(flat_g @ flat_r) < 0) != against:
        r, flat_r = [-one for one in r], -flat_r
    parameters = parameters_with(g)
    project(parameters, [one.clone() for one in r])
    found = torch.cat([p.grad.flatten() for p in parameters])
    if against:
        assert torch.allclose(found, flat_g - (flat_g @ flat_r) / (flat_r @ flat_r) * flat_r)
        assert abs(float(found @ flat_r)) < 1e-9
    else:
        assert torch.equal(found, flat_g)


def test_a_parameter_that_only_the_reference_moves_gets_its_part():
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    one.grad = torch.tensor([1.0, 0.0])
    project([one, two], [torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 1.0])])
    assert torch.allclose(one.grad, torch.tensor([0.5, 0.0]))
    assert torch.allclose(two.grad, torch.tensor([0.0, 0.5]))
    project([one], [None])
    assert torch.allclose(one.grad, torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("boundaries", [True, False])
def test_a_stream_is_a_plain_loop_with_projections(tmp_path, boundaries):
    run = train(fresh(), config_of("agem", boundaries=boundaries), tmp_path)
    turned = []

    def reference(module, memory, step):
        if boundaries:
            # Those of earlier tasks: here a task is known by its classes.
            earlier = [slot for slot in memory.slots.tolist()
                       if int(memory.read(torch.tensor([slot]))["labels"]) // 2 < step // STEPS]  # fmt: skip
            if not earlier:
                return
            number = derive_seed(run.config.seed, "earlier tasks", step, 1)
            order = torch.randperm(len(earlier), generator=torch.Generator().manual_seed(number))
            old = memory.read(torch.tensor(earlier)[order[:8]])
        else:
            old = memory.sample(min(8, len(memory)), derive_seed(run.config.seed, "replay", step, 1))
        loss = cross_entropy(module(old["pixel_values"]), old["labels"])
        r = torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(module.parameters()))])
        g = torch.cat([p.grad.flatten() for p in module.parameters()])
        if g @ r < 0:
            turned.append(step)
            g = g - (g @ r) / (r @ r) * r
            start = 0
            for p in module.parameters():
                p.grad.copy_(g[start : start + p.numel()].view_as(p))
                start += p.numel()

    check_equal(run.model, plain_loop(run, fresh(), project=reference))
    assert turned
    assert not boundaries or min(turned) >= STEPS


def test_a_run_that_stops_in_the_middle_of_tasks_ends_like_one_that_does_not(tmp_path):
    config = config_of("agem", accumulate=2, growth={"schedule": [{"at": 20, "operator": "depth", "amount": 1}]})
    whole = train(fresh(), config, tmp_path / "whole")
    assert len(whole.model.blocks) == 2
    same_weights(in_sessions(fresh(), fresh, config, tmp_path / "parts", 3, 18, 21).model, whole.model)


def half_learner(factor):
    module = nn.Linear(4, 2)

    def loss(batch):
        return module(batch["x"]).float().square().sum() * factor, None, None

    return module, SimpleNamespace(
        settings=SimpleNamespace(replayed=3), parameters=dict(module.named_parameters()), step=6,
        adapter=SimpleNamespace(device=torch.device("cpu")), loss=loss,
        remembered=lambda count: {"x": torch.randn(count, 4, generator=torch.Generator().manual_seed(count))},
        precision=lambda: torch.autocast("cpu", torch.float16),
    )  # fmt: skip


def test_in_float16_the_reference_is_scaled_so_that_it_neither_vanishes_nor_overflows():
    found = {}
    for factor in (1e-9, 1.0, 1e3):
        torch.manual_seed(0)
        module, learner = half_learner(factor)
        method = AveragedGem()
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        along = method._reference(learner, learner.remembered(3), list(module.parameters()))
        project(list(module.parameters()), [-one for one in along])
        found[factor] = torch.cat([p.grad.flatten() for p in module.parameters()]), method.scale
    # The projection does not depend on the length of the reference.
    assert torch.allclose(found[1e-9][0], found[1.0][0], atol=1e-2)
    assert torch.allclose(found[1e3][0], found[1.0][0], atol=1e-2)
    assert found[1e-9][1] == 2.0**16 > found[1.0][1] > found[1e3][1]
    other = AveragedGem()
    other.load_state_dict({"scale": 4.0})
    assert other.state_dict() == {"scale": 4.0}


def test_a_reference_that_is_not_finite_at_any_scale_is_an_error():
    module, learner = half_learner(1e30)
    with pytest.raises(ReferenceError, match="not finite in float16 at step 7.*bf16-mixed"):
        AveragedGem()._reference(learner, learner.remembered(3), list(module.parameters()))


def test_without_float16_nothing_is_scaled():
    module, learner = half_learner(1.0)
    learner.precision = nullcontext
    batch = learner.remembered(3)
    found = AveragedGem()._reference(learner, batch, list(module.parameters()))
    expected = torch.autograd.grad(learner.loss(batch)[0], list(module.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
