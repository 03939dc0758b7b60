"""Inputs made up for a plan: token ids, images, features, and what follows from them; a user's own, looked into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, named_tensors
from utils.adapters.detection import LABEL_INPUTS, ForwardSignature, config_number, kind_by_name
from utils.adapters.inputs import stretched
from utils.adapters.nesting import flattened, rebuilt
from utils.adapters.plans import InputPlan
from utils.adapters.roles import are_twins, may_be_labels, role_of
from utils.adapters.spec import ModelSpec
from utils.runtime.errors import ConfigError
from utils.runtime.seeding import seed_streams

if TYPE_CHECKING:
    from utils.adapters.model_adapter import ModelAdapter

STEPS = 10
"""Time steps of a diffusion model that certainly exist."""


def made_up(
    plan: InputPlan,
    name: str,
    batch_size: int,
    length: int,
    draw_ids: Callable[[str, tuple[int, ...]], Tensor],
    real: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Make one input.

    Args:
        plan: How the model is called.
        name: The input.
        batch_size: Number of samples.
        length: Tokens per sample, where there are tokens.
        draw_ids: Draws legal token ids of a shape for an input.
        real: Dtype of real values.
        generator: Draws them.
    """
    main, last = plan.names[0], name.rsplit(".", 1)[-1]
    tokens = plan.modality == "tokens"
    shape = (batch_size, *plan.shape.value, length) if tokens else (batch_size, *plan.shape.value)
    steps = length if tokens else plan.shape.value[0] if len(plan.shape.value) == 2 else length
    role = role_of(name) if name != main else None
    if role == "mask":
        return torch.ones(shape if tokens else (batch_size, steps), dtype=torch.long)
    if role == "padding":
        return torch.zeros(shape if tokens else (batch_size, steps), dtype=torch.bool)
    if role == "segments":
        return torch.zeros(shape, dtype=torch.long)
    if role == "positions":
        return torch.arange(steps).expand((*shape[:-1], steps) if tokens else (batch_size, steps))
    if role == "lengths":
        return torch.full((batch_size,), steps, dtype=torch.long)
    if role == "steps":
        return torch.randint(STEPS, (batch_size,), generator=generator)
    if role == "labels":
        text = name if name in plan.names else main
        return draw_ids(text, shape) if tokens and plan.labels_per_token else torch.zeros(batch_size, dtype=torch.long)
    if name in plan.other_shapes:
        return torch.randint(2, (batch_size, *plan.other_shapes[name]), generator=generator)
    if tokens or (last.endswith("_ids") and not are_twins(main, name)) or kind_by_name(last) == "tokens":
        return draw_ids(name, shape if tokens else (batch_size, length))
    return torch.randn((batch_size, *plan.shape.value), generator=generator, dtype=real)


def call_arguments(plan: InputPlan, inputs: Mapping[str, Any], real: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a call, in an order that serves a call by position too.

    Args:
        plan: How the model is called.
        inputs: Inputs by name.
        real: Dtype of real values.
    """
    absent = [name for name in plan.aside if name not in inputs]
    labels = {name: value for name, value in example_labels(plan, inputs, real).items() if name in plan.filled}
    template = plan.template or {}
    return rebuilt(template, {**inputs, **labels}, [name for name in absent if name not in labels])


def training_labels(
    adapter: ModelAdapter, plan: InputPlan, signature: ForwardSignature, inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return labels that a model may ask for in train mode: the user's own, or ones made up; empty if it takes none.

    Args:
        adapter: The model.
        plan: How it is called.
        signature: Of its forward.
        inputs: Its inputs.
    """
    if plan.aside:
        return example_labels(plan, inputs, adapter.real_dtype)
    name = next((name for name in LABEL_INPUTS if name in signature.optional and not signature.positional), None)
    if name is None:
        return {}
    labels = adapter.example_inputs(len(inputs[plan.names[0]]), seed=1)[plan.names[0]]
    if adapter.modality != "tokens":
        labels = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    return {name: labels}


def example_labels(plan: InputPlan, inputs: Mapping[str, Any], real: torch.dtype) -> dict[str, Tensor]:
    """Return the example of everything that only the loss reads, in the size of inputs that lack it.

    Args:
        plan: How the model is called.
        inputs: Its inputs.
        real: Dtype of real values.
    """
    absent = [name for name in plan.aside if name not in inputs]
    return {name: _filled(plan, name, inputs[plan.names[0]], real) for name in absent}


def _filled(plan: InputPlan, name: str, main: Tensor, real: torch.dtype) -> Tensor:
    """Return the example of some labels in the size of a main input."""
    value, content = plan.aside[name], plan.names[0]
    tokens = plan.modality == "tokens" and main.dim() > 1
    given = {content: torch.empty(plan.beside), name: value.to(real if value.is_floating_point() else value.dtype)}
    size = len(main) if plan.batched else None
    length = main.shape[1] if tokens else None
    return stretched(given, content, plan.modality, size, length, None, torch.Generator(), main.device)[name]


def set_aside(
    plan: InputPlan,
    spec: ModelSpec,
    make: Callable[[int], dict[str, Any]],
    follow: Callable[[InputPlan], None],
    call: Callable[[Mapping[str, Any]], Any],
) -> InputPlan:
    """Take labels out of the inputs, where trials show that only the loss reads them.

    Other labels must leave every score as it is and change the loss; or a call without them must return the same
    scores and no loss. What the scores depend on is an input, whatever its name: the class of an image to be made, the
    text that a decoder reads.

    Args:
        plan: A way of calling the model that works.
        spec: What the user said.
        make: Makes inputs of a number of samples.
        follow: Sets the adapter up for a plan.
        call: Calls the model.

    Returns:
        The plan without them as inputs; labels stay in every call that does not run, or has other scores, without.
    """
    if plan.labels is not None:
        return _read_by_scores(plan, plan.labels, make(2), call)
    named = [name for name in plan.names[1:] if may_be_labels(name)]
    if not named:
        return plan
    # All samples of an example, for they tell the range of its labels; two at least, so that no score stands alone.
    inputs = make(max(len(flattened(spec.example_inputs or {}).get(plan.names[0], ())), 2))
    beside = tuple(inputs[plan.names[0]].shape)
    without = replace(plan, aside={name: inputs[name] for name in named}, beside=beside)

    follow(without)

    tried = partial(_tried, call)
    full = tried(inputs)
    alone: list[str] = []
    filled: list[str] = []
    for name in named if full else ():
        assert full is not None
        varied = tried({**inputs, name: _other_labels(inputs[name])})
        if varied is not None and not _equal(full[0], varied[0]):
            continue
        left = tried({other: value for other, value in inputs.items() if other != name})
        heard = varied is not None and not _equal(full[1], varied[1])
        same = left is not None and _same_scores(left[0], full[0])
        if not heard and not (same and left is not None and len(left[1]) < len(full[1])):
            continue
        if same:
            alone.append(name)
        elif full[0]:
            filled.append(name)
    if full and alone:
        left = tried({name: value for name, value in inputs.items() if name not in alone})
        if left is None or not _same_scores(left[0], full[0]):
            filled, alone = filled + alone, []
    aside = [name for name in named if name in alone or name in filled]
    return replace(
        plan,
        names=tuple(name for name in plan.names if name not in aside),
        aside={name: inputs[name] for name in aside},
        filled=tuple(filled),
        beside=beside,
    )


def _read_by_scores(
    plan: InputPlan, name: str, inputs: Mapping[str, Any], call: Callable[[Mapping[str, Any]], Any]
) -> InputPlan:
    """Make an input of labels that forward insists on, where the scores depend on them."""
    main = inputs[plan.names[0]]
    labels = main if plan.labels_per_token else torch.zeros(len(main), dtype=torch.long, device=main.device)
    runs = [_tried(call, {**inputs, name: value}) for value in (labels, _other_labels(labels))]
    if runs[0] is None or runs[1] is None or _equal(runs[0][0], runs[1][0]):
        return plan
    return replace(plan, names=(*plan.names, name), labels=None)


def _tried(
    call: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the scores and the single numbers that a call returns; None where it raises."""
    seed_streams(0, "forward")
    try:
        output = call(inputs)
    except Exception:
        return None
    found = [tensor for _, tensor in named_tensors(output) if tensor.is_floating_point()]
    single = [tensor.numel() == 1 and tensor.dim() < 2 for tensor in found]
    parts = [[tensor for tensor, one in zip(found, single, strict=True) if one is kind] for kind in (False, True)]
    return parts[0], parts[1]


def _other_labels(labels: Tensor) -> Tensor:
    """Return legal labels that differ from some: the same ones in other places, or others where all are equal."""
    moved = labels.flatten().roll(1).view(labels.shape)
    if not torch.equal(moved, labels):
        return moved
    if labels.dtype == torch.bool:
        return ~labels
    if labels.is_floating_point():
        return 1 - labels
    return torch.where(labels > 0, labels - 1, labels + 1)


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Tell whether two calls returned the same numbers; NaN equals itself."""
    same = len(first) == len(second) and all(a.shape == b.shape for a, b in zip(first, second, strict=True))
    return same and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


def _same_scores(without: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    """Tell whether a call without labels returned the scores of the call with labels, whole or for the last position.

    A call with labels may return nothing but the loss.
    """
    if not given:
        return bool(without)
    known = 0
    for tensor in without:
        alike = [other for other in given if other.numel() == tensor.numel()]
        if tensor.dim() == 3:
            length = tensor.shape[1]
            longer = [t for t in given if t.dim() == 3 and t.shape[::2] == tensor.shape[::2] and t.shape[1] > length]
            alike += [other[:, -length:] for other in longer]
        if alike and not any(_close(tensor, other) for other in alike):
            return False
        known += bool(alike)
    return known > 0


def _close(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers up to rounding, in whatever arrangement."""
    a, b = (tensor.detach().float().nan_to_num().flatten() for tensor in (first, second))
    limit = 64 * torch.finfo(first.dtype).eps * float(b.abs().max()) if b.numel() else 0.0
    return any(bool(((x - y).abs() <= limit).all()) for x, y in ((a, b), (a.sort().values, b.sort().values)))


def check_examples(module: nn.Module, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Look for what is wrong with a user's inputs that do not run: ids that no table has, or that are no ids.

    Args:
        module: The model.
        spec: What the user said.
        config: The model's settings; ids that they promise are the model's to read.

    Raises:
        ConfigError: A table is asked for what one of these inputs holds and no table can have.
    """
    if spec.example_inputs is None:
        return
    tensors = {name: value for name, value in flattened(spec.example_inputs).items() if isinstance(value, Tensor)}
    stated = config_number(config, "vocab_size")
    promised = max(spec.vocab_size or 0, stated.value if stated else 0)
    asked: list[tuple[str, int, Tensor]] = []
    handles, rows = [], 0
    for name, child in module.named_modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
            rows = max(rows, child.num_embeddings)

            def hook(table: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                ids = first_tensor((*args, *kwargs.values()))
                if ids is not None:
                    asked.append((name, table.num_embeddings, ids.detach().clone()))

            handles.append(child.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        # Only the model's own code may fail here, as it is known to; what it asked for is judged afterwards.
        with suppress(Exception), torch.no_grad():
            module(**spec.example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, size, ids in asked:
        if wrong := _wrong_ids(tensors, name, max(size, promised), ids):
            raise ConfigError(
                f"{wrong}.",
                f"Expected whole numbers from 0 on, below the rows of the table (the largest has {rows}).",
                "Correct example_inputs, or the table if it should have more rows.",
            )


def _wrong_ids(tensors: Mapping[str, Tensor], table: str, size: int, ids: Tensor) -> str | None:
    """Say what is wrong with ids that a table of a size was asked for; None if nothing, or if no input holds them."""
    own = next((key for key, value in tensors.items() if _same(value, ids)), None)
    if own is None or not ids.numel():
        return None
    if ids.is_floating_point():
        return f"ModelSpec.example_inputs[{own!r}] is {str(ids.dtype)[6:]}, and `{table}` looks rows up by it"
    low, high = int(ids.min()), int(ids.max())
    if low >= 0 and high < size:
        return None
    return f"ModelSpec.example_inputs[{own!r}] holds the id {low if low < 0 else high}, and `{table}` reads it"


def _same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, whatever their shapes."""
    if first.numel() != second.numel() or first.device != second.device or first.is_meta:
        return False
    return bool((first.reshape(-1) == second.reshape(-1)).all())
