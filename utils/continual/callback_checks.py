"""What `ContinualCallback` refuses, before it has done any harm."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from utils.adapters import TASKS, ModelAdapter
from utils.adapters.capture import tensor_at
from utils.continual.accuracy_matrix import AccuracyMatrix
from utils.continual.callback_parts import replaced, shapes_of
from utils.continual.config import ContinualConfig
from utils.continual.method import method_classes
from utils.continual.methods.consolidation import OUT
from utils.runtime.errors import CheckpointError, ConfigError

STREAM = (
    "split", "tasks", "shuffle_classes", "samples_per_task", "blur", "restart_schedule", "kept_share", "column_width",
)  # fmt: skip
"""Settings that only `utils.train` can keep, which makes the stream."""
ELSEWHERE = "Train with utils.train(..., config=TrainingConfig(continual=...))."


def check_settings(settings: ContinualConfig, task: str) -> None:
    """Refuse what only `utils.train` can do.

    Raises:
        ConfigError: A setting, a method or a task needs a run's own stream, loop or tokenizer.
    """
    if task not in TASKS or task == "masked_lm":
        raise ConfigError(
            f"ContinualCallback was given task={task!r}.",
            f"Expected one of {', '.join(one for one in TASKS if one != 'masked_lm')}"
            f"{'; which words are hidden is decided in a training step' if task == 'masked_lm' else ''}.",
            ELSEWHERE if task == "masked_lm" else "Say what the model is for.",
        )
    given = {one.name: value for one in fields(settings) if (value := getattr(settings, one.name)) != one.default}
    if strange := [f"{name}={given[name]!r}" for name in STREAM if name in given]:
        raise ConfigError(
            f"ContinualCallback was given {', '.join(strange)}.",
            "Expected settings of the method and its memory: your loaders are the stream.",
            ELSEWHERE,
        )
    for kind in method_classes(settings.method):
        if kind.needs_task or kind.name == "joint":
            why = "weights of its own for each task, and how many steps and tasks there will be" if kind.needs_task \
                else "the samples of all tasks at once"  # fmt: skip
            raise ConfigError(
                f"ContinualCallback was given method={settings.method!r}.",
                f"Expected a method that takes tasks as they come; {kind.name} needs {why}.",
                ELSEWHERE if kind.needs_task else "Fit once, without this callback, to a loader of all samples.",
            )


def check_begin(settings: ContinualConfig, name: str, classes: tuple[int, ...]) -> None:
    """Refuse a task that cannot begin.

    Raises:
        ConfigError: The stream has no boundaries, or nobody knows what may answer.
    """
    if not settings.boundaries:
        raise ConfigError(
            f"Task {name!r} was to begin, and ContinualConfig.boundaries is False.",
            "Expected a stream in which nobody says where a task begins.",
            "Leave out begin(), or set boundaries=True.",
        )
    if settings.setting == "task" and len(classes) < 2:
        raise ConfigError(
            f"Task {name!r} has {len(classes)} classes, and ContinualConfig.setting is 'task'.",
            "Expected two at least, which alone answer in the task.",
            "Call begin(name, classes=(0, 1)) before each fit.",
        )


def check_answers(name: str, classes: tuple[int, ...], outputs: int) -> None:
    """Refuse classes of a task that the model has no scores for; 0 are of unknown number.

    Raises:
        ConfigError: It has fewer.
    """
    if outputs and classes and (classes[0] < 0 or classes[-1] >= max(2, outputs)):
        raise ConfigError(
            f"Task {name!r} has the classes {', '.join(map(str, classes))}, and the model gives {outputs} scores.",
            "Expected a score for each class, counted from 0.",
            f"Build the model with {classes[-1] + 1} outputs.",
        )


def check_same(state: Mapping[str, Any], method: str, seed: int) -> None:
    """Refuse a state that another callback made.

    Raises:
        CheckpointError: Its method or seed is another.
    """
    given = state["settings"]["method"], state["seed"]
    if given != (method, seed):
        raise CheckpointError(
            f"The checkpoint was made with method={given[0]!r} and seed={given[1]}.",
            f"Expected {method!r} and {seed}, those of this callback.",
            "Make the callback as it was made then, or begin anew without ckpt_path.",
        )


def check_names(matrix: AccuracyMatrix, names: Iterable[str]) -> None:
    """Refuse to measure other tasks than before.

    Raises:
        ConfigError: They are others.
    """
    if matrix.tasks != tuple(names):
        raise ConfigError(
            f"The tasks {', '.join(names)} were to be measured.",
            f"Expected {', '.join(matrix.tasks)}, as before.",
            "Give measure() the batches of all tasks of the stream each time.",
        )


def check_trainer(trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> None:
    """Refuse, before training begins, a way of training in which methods cannot act.

    Raises:
        ConfigError: Manual optimization, several processes, or a model that is not the module's or was compiled.
    """
    kind = type(model).__name__
    if not any(child is model for child in pl_module.modules()):
        raise ConfigError(
            f"The {kind} of ContinualCallback is no part of {type(pl_module).__name__}.",
            "Expected the model that the LightningModule trains.",
            "Give it: ContinualCallback(settings, model=module.net, task=...).",
        )
    if not pl_module.automatic_optimization:
        raise ConfigError(
            f"{type(pl_module).__name__} optimizes manually.",
            "Expected automatic optimization: only there is it known which gradients make a step.",
            "Leave automatic_optimization True, or call utils.train.",
        )
    if trainer.world_size > 1:
        raise ConfigError(
            f"{trainer.world_size} processes train together.",
            "Expected one: memories of several processes would hold different samples.",
            "Set devices=1 and num_nodes=1.",
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigError(
            f"The {kind} was compiled in place.",
            "Expected a model whose scores can be seen on their way to the loss.",
            "Leave out model.compile(), or give both the module and the callback torch.compile(model).",
        )


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse gradients that are still scaled when a step is made.

    Raises:
        ConfigError: A fused optimizer takes the scale out itself.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and any(getattr(one, "_step_supports_amp_scaling", False) for one in trainer.optimizers):
        raise ConfigError(
            "A fused optimizer takes the scaled gradients of precision='16-mixed'.",
            "Expected gradients in their own unit when a step is made: methods add to them.",
            "Set precision='bf16-mixed', or leave fused=True out of the optimizer.",
        )


def check_shapes(before: Mapping[str, tuple[int, ...]] | None, model: nn.Module) -> None:
    """Refuse a model that has other parameters than at the end of the last fit, None for none.

    Raises:
        ConfigError: It has.
    """
    present = shapes_of(model)
    if before is not None and before != present:
        name = next(name for name in {**before, **present} if before.get(name) != present.get(name))
        raise ConfigError(
            f"The {type(model).__name__} has changed since the last fit, in {name}.",
            "Expected the parameters to which belongs what is kept of earlier tasks.",
            "Let it grow during a fit, with GrowthCallback in the same Trainer, or begin with another callback.",
        )


def check_scores(adapter: ModelAdapter) -> None:
    """Make sure that scores can be found in what the model returns, and others put in their place.

    Raises:
        ConfigError: They lie deep in it, or their axes are in another order.
    """
    path = adapter.output.value or ""
    seen: list[Any] = []
    with adapter.isolated(), torch.no_grad():
        handle = adapter.module.register_forward_hook(lambda module, given, output: seen.append(output))
        try:
            logits = adapter.logits(adapter.example_inputs(2))
        finally:
            handle.remove()
    raw = tensor_at(seen[-1], path)
    if raw.shape != logits.shape or replaced(seen[-1], path, raw) is None:
        where = f" at `{path}`" if path else ""
        raise ConfigError(
            f"{adapter.name} returns a {type(seen[-1]).__name__} with scores of shape {tuple(raw.shape)}{where}.",
            "Expected a tensor, or a mapping or tuple with one, whose axes are (batch, ..., outputs).",
            "Return such scores from forward, or set method to ewc or si.",
        )


def check_pull(gradient: Tensor | None, left_out: Tensor | None, model: str, method: str) -> None:
    """Make sure that the loss is made of the changed scores, and makes nothing of outputs that are left out.

    Args:
        gradient: Of the loss by the changed scores; None when it does not depend on them.
        left_out: Which outputs play no part, ``(outputs,)``; None for none.
        model: Its name.
        method: As the settings call it.

    Raises:
        ConfigError: It is not, or does.
    """
    instead = f"Make the loss in training_step of the scores that {model} returns, or set method to replay or ewc."
    if gradient is None:
        raise ConfigError(
            f"The loss of training_step does not depend on the scores that {model} returned.",
            f"Expected a loss made of them: {method!r} changes the scores of new samples, which a model that computes "
            "its loss itself does not notice.",
            instead,
        )
    if left_out is not None and bool(gradient[..., left_out.to(gradient.device)].any()):
        raise ConfigError(
            "The loss of training_step moves scores of classes that have not come up, or may not answer.",
            f"Expected a cross-entropy without label smoothing: {method!r} leaves classes out by a score of {OUT:g} or "
            "less.",
            instead,
        )
