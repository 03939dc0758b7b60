from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.continual.methods.plain_loop import distance, doubled, killed_at, labelled, plain, run_of, same_weights
from tests.continual.toys import settings
from utils.continual.methods.si import DAMPING, SI
from utils.runtime.errors import ConfigError
from utils.training.state import Insertion, ModelChange, TensorChange

LIMITED = {"samples_per_task": 20}


@pytest.mark.parametrize(("options", "clip"), [({}, 1.0), ({"penalty": 50.0}, 0.05)])
def test_a_stream_ends_like_a_plain_loop_over_the_equations(tmp_path, digits, options, clip):
    digits = doubled(digits)
    run = run_of(tmp_path / "run", digits, "si", continual={**LIMITED, **options}, clip_norm=clip)
    strength, memory = options.get("penalty", 1.0), {}

    def loss(model, number, batch, tasks):
        if "start" not in memory:
            memory["start"] = [p.detach().clone() for p in model.parameters()]
            memory["importance"] = [torch.zeros_like(p) for p in model.parameters()]
            memory["path"] = [torch.zeros_like(p) for p in model.parameters()]
        held = sum(
            (importance * (p - start) ** 2).sum()
            for p, importance, start in zip(model.parameters(), memory["importance"], memory["start"], strict=True)
        )
        return labelled(model, number, batch, tasks) + strength * held

    def after_step(model, gradients, before):
        for path, gradient, p, old in zip(memory["path"], gradients, model.parameters(), before, strict=True):
            path -= gradient * (p.detach() - old)

    def end_task(model, task):
        new = [p.detach().clone() for p in model.parameters()]
        for importance, path, p, start in zip(memory["importance"], memory["path"], new, memory["start"], strict=True):
            importance += path / ((p - start) ** 2 + DAMPING)
            importance.clamp_(min=0)
            path.zero_()
        memory["start"] = new

    config = settings("si", continual=LIMITED, clip_norm=clip)
    model = plain(digits, config, loss, end_task, after_step, labelled)
    assert distance(run, model) < 1e-6
    assert distance(run, plain(digits, config, labelled)) > 1e-3
    assert max(float(one.max()) for one in memory["importance"]) > 0


@pytest.mark.parametrize("step", [4, 20, 24])
def test_a_run_that_is_killed_ends_bit_for_bit_like_one_that_is_not(tmp_path, digits, step):
    whole = run_of(tmp_path / "whole", digits, "si", checkpoint_every_steps=4, val_every_steps=7)
    assert same_weights(whole, killed_at(step, tmp_path / "whole", tmp_path / "part"))


@pytest.mark.parametrize("operator", [("depth", 1), ("channels", 8)])
def test_it_follows_growth_in_the_middle_of_a_task_also_when_killed_after_it(tmp_path, digits, operator):
    growth = {"schedule": [{"at": 25, "operator": operator[0], "amount": operator[1]}]}
    whole = run_of(tmp_path / "whole", digits, "si", growth=growth, checkpoint_every_steps=4)
    assert whole.adapter.num_parameters > 2410
    assert same_weights(whole, killed_at(28, tmp_path / "whole", tmp_path / "part"))


def test_accumulated_passes_are_one_step(tmp_path, digits):
    whole = run_of(tmp_path / "whole", digits, "si", continual=LIMITED)
    parts = run_of(tmp_path / "parts", digits, "si", continual=LIMITED, batch_size=8, accumulate=2)
    assert distance(whole, parts.model) < 1e-4
    with pytest.raises(ConfigError, match=r"'si' and boundaries is False.*si acts where a task ends"):
        run_of(tmp_path / "none", digits, "si", continual={"boundaries": False})


def stepped(method, learner, gradient):
    """Make a step of a tenth of the gradient, as far as the weights have changed."""
    weight = learner.parameters["weight"]
    weight.grad = gradient.clone()
    method.change_gradient(learner)
    with torch.no_grad():
        weight -= 0.1 * gradient


def learner_of(values, **settings):
    parameters = {"weight": nn.Parameter(values.clone())}
    return SimpleNamespace(parameters=parameters, settings=SimpleNamespace(penalty=None, **settings))


def test_the_path_is_what_each_weight_took_from_the_loss_and_never_counts_below_zero():
    method, learner = SI(), learner_of(torch.tensor([1.0, 2.0]))
    method.begin_task(learner)
    stepped(method, learner, torch.tensor([1.0, 0.5]))
    method.after_step(learner)
    method.after_step(learner)
    torch.testing.assert_close(method.path["weight"], torch.tensor([0.1, 0.025]))
    # A weight that was pushed uphill has a negative path.
    weight = learner.parameters["weight"]
    weight.grad = torch.tensor([0.0, 1.0])
    method.change_gradient(learner)
    with torch.no_grad():
        weight[1] += 1.0
    method.after_step(learner)
    method.end_task(learner)
    torch.testing.assert_close(method.anchors.importance["weight"], torch.tensor([0.1 / (0.01 + DAMPING), 0.0]))
    assert float(method.path["weight"].abs().max()) == 0
    assert method.stored_floats == 6


def test_a_step_that_has_just_been_made_counts_when_the_model_grows_before_it_is_noted():
    method, learner = SI(), learner_of(torch.tensor([1.0, 2.0]))
    method.begin_task(learner)
    stepped(method, learner, torch.tensor([1.0, 0.5]))
    old = learner.parameters["weight"]
    grown = nn.Parameter(torch.cat([2 * old.detach(), torch.zeros(1)]))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    how = {
        "weight": TensorChange("weight", None, (Insertion(0, ((2, 1),)),), factor=2.0),
        "new": TensorChange(None, "weight"),
        "frozen": TensorChange(None),
    }
    parameters = {"weight": grown, "new": nn.Parameter(torch.ones(3)), "frozen": frozen}
    undo = method.migrate(ModelChange("width", 1, parameters, {}, how, {"weight": old}))
    torch.testing.assert_close(method.path["weight"], torch.tensor([0.1, 0.025, 0.0]))
    torch.testing.assert_close(method.anchors.anchor["weight"], torch.tensor([2.0, 4.0, 0.0]))
    assert torch.equal(method.anchors.anchor["new"], torch.ones(3))
    assert "frozen" not in method.path
    learner.parameters = {"weight": grown, "new": parameters["new"]}
    method.after_step(learner)
    torch.testing.assert_close(method.path["weight"], torch.tensor([0.1, 0.025, 0.0]))
    undo()
    learner.parameters = {"weight": old}
    method.after_step(learner)
    torch.testing.assert_close(method.path["weight"], torch.tensor([0.1, 0.025]))
