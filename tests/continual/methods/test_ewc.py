import pytest
import torch

from tests.continual.methods.plain_loop import distance, doubled, killed_at, labelled, plain, run_of, same_weights
from tests.continual.toys import net, settings
from utils.continual.accuracy_matrix import read_matrix
from utils.runtime.errors import ConfigError
from utils.training.resume import open_run

LIMITED = {"samples_per_task": 20}


def state_of(folder, name):
    return open_run(folder, model=net())[1]["continual"]["methods"][name]


def fisher_by_hand(model, images):
    """Go through samples and classes one by one."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for image in images:
        logs = model(image[None])[0].log_softmax(-1)
        for log in logs:
            found = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
            for one, gradient in zip(total, found, strict=True):
                one += log.detach().exp() * gradient**2 / len(images)
    return total


@pytest.mark.parametrize("options", [{}, {"penalty": 300.0}])
def test_a_stream_ends_like_a_plain_loop_with_one_penalty_for_each_task(tmp_path, digits, options):
    digits = doubled(digits)
    run = run_of(tmp_path / "run", digits, "ewc", continual={**LIMITED, **options}, max_steps=50)
    penalties, strength = [], options.get("penalty", 30.0)

    def loss(model, number, batch, tasks):
        held = sum(
            (fisher * (p - anchor) ** 2).sum()
            for fishers, anchors in penalties
            for p, fisher, anchor in zip(model.parameters(), fishers, anchors, strict=True)
        )
        return labelled(model, number, batch, tasks) + strength / 2 * held

    def end_task(model, task):
        images = digits.train["pixel_values"][task.train]
        penalties.append((fisher_by_hand(model, images), [p.detach().clone() for p in model.parameters()]))

    config = settings("ewc", continual=LIMITED)
    assert distance(run, plain(digits, config, loss, end_task)) < 1e-6
    assert distance(run, plain(digits, config, labelled)) > 1e-3


def test_memory_does_not_grow_with_tasks_and_the_record_says_how_it_was_computed(tmp_path, digits):
    run = run_of(tmp_path / "run", digits, "ewc")
    state = state_of(tmp_path / "run", "ewc")
    held = sum(value.numel() for kept in state["anchors"].values() for value in kept.values())
    assert held == 2 * run.adapter.num_parameters
    assert [one["kind"] for one in state["computed"]] == ["exact"] * 5
    assert [one["way"] for one in state["computed"]] == ["layers"] * 5
    assert [cost.stored_floats for cost in read_matrix(tmp_path / "run").costs] == [held] * 5


@pytest.mark.parametrize("step", [20, 24])
def test_a_run_that_is_killed_ends_bit_for_bit_like_one_that_is_not(tmp_path, digits, step):
    whole = run_of(tmp_path / "whole", digits, "ewc", checkpoint_every_steps=4, val_every_steps=7)
    assert same_weights(whole, killed_at(step, tmp_path / "whole", tmp_path / "part"))


@pytest.mark.parametrize("operator", [("depth", 1), ("channels", 8)])
def test_it_follows_growth_in_the_middle_of_a_task_also_when_killed_after_it(tmp_path, digits, operator):
    growth = {"schedule": [{"at": 25, "operator": operator[0], "amount": operator[1]}]}
    whole = run_of(tmp_path / "whole", digits, "ewc", growth=growth, checkpoint_every_steps=4)
    assert whole.adapter.num_parameters > 2410
    assert same_weights(whole, killed_at(28, tmp_path / "whole", tmp_path / "part"))
    held = state_of(tmp_path / "whole", "ewc")["anchors"]["importance"]
    assert {name: v.shape for name, v in held.items()} == {n: p.shape for n, p in whole.model.named_parameters()}


def test_accumulated_passes_are_held_as_one_step(tmp_path, digits):
    whole = run_of(tmp_path / "whole", digits, "ewc", continual=LIMITED)
    parts = run_of(tmp_path / "parts", digits, "ewc", continual=LIMITED, batch_size=8, accumulate=2)
    assert distance(whole, parts.model) < 1e-4


def test_it_goes_with_replay_and_not_without_boundaries(tmp_path, digits):
    both = run_of(tmp_path / "both", digits, "ewc+replay")
    alone = run_of(tmp_path / "alone", digits, "ewc")
    assert both.finished
    assert distance(both, alone.model) > 1e-3
    with pytest.raises(ConfigError, match=r"'ewc' and boundaries is False.*ewc acts where a task ends"):
        run_of(tmp_path / "none", digits, "ewc", continual={"boundaries": False})
