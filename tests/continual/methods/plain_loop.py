"""The stream of a run as a plain loop, and a run that is killed: what methods are compared with."""

import shutil
from dataclasses import replace

import torch
from torch.nn import functional

from tests.continual.toys import SPEC, net, settings
from utils.continual.config import ContinualConfig
from utils.continual.scenario import make_tasks
from utils.continual.task_stream import TaskStream
from utils.training.resume import resume, train


def run_of(folder, digits, method, model=None, **changes):
    """Train a stream of five tasks of digits and return the run."""
    return train(
        model or net().to(digits.train["pixel_values"].dtype),
        digits,
        settings(method, **changes),
        folder,
        spec=SPEC,
        progress=False,
    )


def doubled(digits):
    """Return the data in double precision, so that rounding is too small for an optimizer to enlarge."""
    sides = ({**rows, "pixel_values": rows["pixel_values"].double()} for rows in (digits.train, digits.validation))
    train, validation = sides
    return replace(digits, train=train, validation=validation)


def plain(digits, config, loss, end_task=None, after_step=None, unpenalised=None):
    """Train a `Net` on the stream of some settings, ten steps for each of five tasks, and return it.

    Args:
        digits: The data.
        config: The run's settings.
        loss: Given the model, the number of the task, a batch and the tasks, the loss with its penalty.
        end_task: Called with the model and the task.
        after_step: Called with the model, the gradients without penalty and the weights before the step.
        unpenalised: Like `loss`, for the gradients that `after_step` gets.
    """
    continual = ContinualConfig.from_dict(config.continual)
    tasks = make_tasks(digits, continual, config.seed)
    ends = [10 * config.batch_size * (number + 1) for number in range(5)]
    stream = TaskStream(digits.train, tasks, ends, config.batch_size, config.seed)
    model = net().to(digits.train["pixel_values"].dtype)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, config.beta2), weight_decay=0.0)
    for step in range(50):
        batch, number = stream.batch_at(step * config.batch_size), step // 10
        before = [p.detach().clone() for p in model.parameters()]
        gradients = None
        if unpenalised is not None:
            gradients = torch.autograd.grad(unpenalised(model, number, batch, tasks), list(model.parameters()))
        optimizer.zero_grad()
        loss(model, number, batch, tasks).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        if after_step is not None:
            after_step(model, gradients, before)
        if step % 10 == 9 and end_task is not None:
            end_task(model, tasks[number])
    return model


def labelled(model, number, batch, tasks):
    """Return the loss of the labels alone."""
    return functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])


def distance(run, model):
    """Return the largest difference between two models' weights."""
    pairs = zip(run.model.parameters(), model.parameters(), strict=True)
    return max(float((first - second).detach().abs().max()) for first, second in pairs)


def killed_at(step, folder, copy):
    """Copy a run's folder as it was when the checkpoint of a step had just been written, and let it go on."""
    shutil.copytree(folder, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name.startswith("step") and int(checkpoint.name.split("-")[-1]) > step:
            shutil.rmtree(checkpoint)
    run = resume(copy, model=net(seed=1), progress=False)
    assert run.sessions == 2
    return run


def same_weights(first, second):
    """Tell whether two runs have the same weights, bit for bit."""
    pairs = zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True)
    return all(one == two and torch.equal(a, b) for (one, a), (two, b) in pairs)
