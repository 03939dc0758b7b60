"""Ways to call a model, the likeliest first: which inputs, of what kind and shape. A forward pass decides."""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.detection import (
    DECODER_INPUTS,
    Detection,
    ForwardSignature,
    config_number,
    kind_by_name,
)
from utils.adapters.inputs import (
    candidate_kinds,
    categorical_sizes,
    feature_shapes,
    image_shapes,
    main_example,
    sound_shapes,
)
from utils.adapters.nesting import flattened
from utils.adapters.roles import are_twins, role_of, string_keys
from utils.adapters.spec import ModelSpec
from utils.runtime.errors import AdapterError

PROBE_LENGTHS = (12, 16, 32, 64, 128)
LONGEST_STATED = 4096
CHOICES = 4
"""Texts per sample that a multiple-choice model is tried with."""
GUESSED = "attention_mask, lengths, token_type_ids, position_ids, flags, initial states"


@dataclass(frozen=True)
class InputPlan:
    """One way of calling a model."""

    description: str
    """In words, for the list of attempts."""
    modality: str
    """``"tokens"``, ``"image"`` or ``"features"``."""
    names: tuple[str, ...]
    """Names of the inputs, the main one first."""
    shape: Detection[tuple[int, ...]]
    """Shape of one sample of the main input; of token ids what stands before their length."""
    length: int = PROBE_LENGTHS[0]
    """Tokens per sample."""
    labels: str | None = None
    """Name of the input for labels that forward insists on."""
    labels_per_token: bool = True
    """These labels have the shape of the token ids; else there is one per sample."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are the same in every call: flags, empty states, caches switched off."""
    template: Mapping[str, Any] | None = None
    """The call's nested structure, if it has one; see `utils.adapters.nesting`."""
    other_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of one sample of an input that is neither like the main one nor told by its name."""
    aside: Mapping[str, Tensor] = field(default_factory=dict)
    """What only the loss reads, by name, with an example of each: labels, which are no input."""
    filled: tuple[str, ...] = ()
    """Those among them that forward does not run without, or not alike; they are given as in the example."""
    beside: tuple[int, ...] = ()
    """Shape of the main input that these examples belong to."""
    batched: bool = True
    """The first axis of the inputs is the samples; else the inputs are the user's own, and are only ever used whole."""


@dataclass(frozen=True)
class Arguments:
    """What forward is given."""

    names: tuple[str, ...]
    """Inputs to fill, the main one first."""
    labels: str | None
    """The labels that forward insists on."""
    constants: Mapping[str, Any]
    """As in `InputPlan`."""
    template: Mapping[str, Any] | None = None
    """As in `InputPlan`."""


def all_plans(
    module: nn.Module, model: str, config: Mapping[str, Any], signature: ForwardSignature, spec: ModelSpec
) -> Iterator[InputPlan]:
    """Yield the user's own way of calling a model, or one likely way after another.

    Raises:
        AdapterError: As `example_plans` and `find_arguments`.
    """
    if spec.example_inputs is not None:
        return example_plans(spec)
    return input_plans(module, model, config, signature)


def example_plans(spec: ModelSpec) -> Iterator[InputPlan]:
    """Yield the plan that a user's inputs tell: batch first, or whole where they have no axis of samples.

    Raises:
        AdapterError: There is no tensor with a batch dimension among them.
    """
    plan = example_plan(spec)
    flat = {name: value for name, value in flattened(spec.example_inputs or {}).items() if isinstance(value, Tensor)}
    rows = indexed_rows(flat)
    if rows is None:
        yield plan
        main = flat[plan.names[0]]
        shapes = [value.shape for value in flat.values() if value.dim()]
        others = [shape for shape in shapes if shape[0] != len(main)]
        square = any(value.shape == (len(main), len(main)) for value in flat.values() if value is not main)
        if not others and not square:
            return
    name = rows or plan.names[0]
    reason = "ModelSpec.example_inputs, used whole: they have no axis of samples"
    names = (name, *(other for other in flat if other != name))
    shape = Detection(tuple(flat[name].shape[1:]), reason)
    yield replace(plan, modality="features", names=names, shape=shape, batched=False)


def indexed_rows(examples: Mapping[str, Tensor]) -> str | None:
    """Return the name of the tensor into whose rows another one points in pairs, as the edges of a graph do."""
    for key, pairs in examples.items():
        if pairs.dim() != 2 or 2 not in pairs.shape or pairs.is_floating_point() or not pairs.numel():
            continue
        if pairs.dtype == torch.bool or int(pairs.min()) < 0:
            continue
        for name, value in examples.items():
            if name != key and value.dim() and int(pairs.max()) < len(value) != len(pairs):
                return name
    return None


def example_plan(spec: ModelSpec) -> InputPlan:
    """Read the plan off inputs that the user gave.

    Raises:
        AdapterError: There is no tensor with a batch dimension among them.
    """
    examples = spec.example_inputs or {}
    flat = flattened(examples)
    name = main_example(flat)
    if name is None:
        raise AdapterError(
            "ModelSpec.example_inputs holds no tensor with at least one sample.",
            "Expected a dict of keyword arguments, batch first.",
            "Give the tensors with which model(**example_inputs) is a valid call.",
        )
    main = flat[name]
    # One id per sample is a column of a table, not a text.
    column = main.dim() < 2 or (main.shape[1:] == (1,) and spec.task is None and spec.vocab_size is None)
    tokens = not main.is_floating_point() and not column
    modality = "tokens" if tokens else "image" if main.dim() == 4 else "features"
    others = (key for key, value in flat.items() if isinstance(value, Tensor) and key != name)
    return InputPlan(
        "ModelSpec.example_inputs",
        modality,
        (name, *others),
        Detection(tuple(main.shape[1:]), "ModelSpec.example_inputs"),
        main.shape[1] if modality == "tokens" and main.dim() > 1 else PROBE_LENGTHS[0],
        template=examples,
    )


def find_arguments(module: nn.Module, model: str, signature: ForwardSignature) -> Arguments:
    """Find out which inputs to fill.

    Raises:
        AdapterError: Forward takes nothing, or requires inputs whose content cannot be guessed.
    """
    keys: tuple[str, ...] = ()
    if not signature.positional and not signature.names:
        keys = string_keys(module, signature.keywords_name) if signature.keywords_name else ()
        if signature.keywords and not keys:
            raise AdapterError(
                f"forward() of {model} takes **kwargs and names no argument.",
                "Expected at least one named tensor, batch first.",
                "Pass ModelSpec(example_inputs={...}) with the keyword arguments it accepts.",
            )
        if not signature.keywords:
            raise AdapterError(
                f"forward() of {model} takes no arguments.",
                "Expected at least one tensor, batch first.",
                "Give forward() its input as an argument.",
            )
    required, optional = (keys, ()) if keys else (signature.required, signature.optional)
    annotations = _annotations(module)
    main = _main_argument(required, optional, annotations)
    if not keys and (inner := string_keys(module, main)):
        # A dict of tensors: the keys that forward reads are the inputs.
        found = _fill(model, module, inner, _main_argument(inner, (), {}), {})
        read = (*found.names, found.labels) if found.labels else found.names
        rest = _fill(model, module, required, main, annotations)
        nested = {main: {key: torch.empty(0) for key in inner}}
        return Arguments((*(f"{main}.{name}" for name in read), *rest.names[1:]), None, rest.constants, nested)
    decoder = next((name for name in DECODER_INPUTS if name in required + optional and name != main), None)
    return _fill(model, module, required, main, annotations, decoder)


def _main_argument(required: tuple[str, ...], optional: tuple[str, ...], annotations: Mapping[str, Any]) -> str:
    """Return the argument that carries the content: a required one of a usual name, else the first that may."""

    def content(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if role_of(name, annotations.get(name)) is None]

    named = [name for name in required if kind_by_name(name)]
    return next(iter([*named, *content(required), *required, *content(optional), *optional, "input"]))


def _fill(
    model: str,
    module: nn.Module,
    required: tuple[str, ...],
    main: str,
    annotations: Mapping[str, Any],
    decoder: str | None = None,
) -> Arguments:
    """Sort required arguments into inputs, labels and constants.

    Raises:
        AdapterError: One of them cannot be guessed.
    """
    inputs: list[str] = [main]
    constants: dict[str, Any] = {}
    labels: str | None = None
    extra = [name for name in required if name != main]
    if decoder and decoder not in extra:
        extra.insert(0, decoder)
    unknown: list[str] = []
    for name in extra:
        role = role_of(name, annotations.get(name))
        if role == "labels" and name not in DECODER_INPUTS:
            labels = labels or name
        elif role == "flag":
            constants[name] = False
        elif role == "state":
            constants[name] = None
        elif name.endswith("_ids") and not main.endswith("ids"):
            # A question about an image, say: ids 0 and 1 exist in every table.
            inputs.append(name)
        elif role is not None or name in DECODER_INPUTS or are_twins(main, name) or _is_mixed(module, main, name):
            inputs.append(name)
        elif re.search(r"Optional|None", str(annotations.get(name, ""))):
            constants[name] = None
        else:
            unknown.append(name)
    if unknown:
        needed = dict.fromkeys(name for name in (main, *required) if name in (*inputs, *unknown))
        example = ", ".join(f"{name!r}: ..." for name in needed)
        raise AdapterError(
            f"forward() of {model} requires {', '.join(unknown)} beside {main}.",
            f"Expected one main input, and of others only what follows from it: {GUESSED}.",
            f"Pass ModelSpec(example_inputs={{{example}}}) with tensors it accepts.",
        )
    return Arguments(tuple(inputs), labels, constants)


def _annotations(module: nn.Module) -> dict[str, Any]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.annotation for p in parameters if p.annotation is not p.empty}


def _is_mixed(module: nn.Module, main: str, name: str) -> bool:
    """Tell whether two inputs are the numbers and the categories of a table."""
    kinds = {kind_by_name(main), kind_by_name(name)}
    return kinds == {"numbers", "categories"} and bool(categorical_sizes(module))


def input_plans(
    module: nn.Module, model: str, config: Mapping[str, Any], signature: ForwardSignature
) -> Iterator[InputPlan]:
    """Yield one way of calling the model after another.

    Raises:
        AdapterError: As `find_arguments`.
    """
    given = find_arguments(module, model, signature)
    names, labels, main = given.names, given.labels, given.names[0].rsplit(".", 1)[-1]
    constants = dict(given.constants)
    if "use_cache" in signature.optional and not signature.positional:
        # A cache is for generating; some models leave their causal mask out where they keep one.
        constants["use_cache"] = False
    common: dict[str, Any] = {"labels": labels, "constants": constants, "template": given.template}
    yield from _plans(module, config, names, main, common)
    if masks := [name for name in names[1:] if role_of(name) in ("mask", "padding")]:
        # A mask of another form than (batch, seq); most models also take none.
        common["constants"] = constants | dict.fromkeys(masks)
        yield from _plans(module, config, tuple(name for name in names if name not in masks), main, common)


def _plans(
    module: nn.Module, config: Mapping[str, Any], names: tuple[str, ...], main: str, common: Mapping[str, Any]
) -> Iterator[InputPlan]:
    """Yield plans for inputs of every kind and shape."""
    if {kind_by_name(name) for name in names} == {"numbers", "categories"}:
        yield from _mixed_plans(module, names, common)
        return
    for kind in candidate_kinds(module, config, main):
        if kind == "tokens":
            reason = f"`{names[0]}` takes token ids (batch, seq): a forward pass succeeded"
            # A model for one fixed length takes only that, and a config may say which.
            stated = config_number(config, "max_length")
            lengths = (*PROBE_LENGTHS[:1], stated.value, *PROBE_LENGTHS[1:]) if stated else PROBE_LENGTHS
            for length in dict.fromkeys(n for n in lengths if n <= LONGEST_STATED):
                labelled = common["labels"] or any(role_of(name) == "labels" for name in names[1:])
                for per_token in (True, False) if labelled else (True,):
                    description, shape = f"token ids (2, {length})", Detection[tuple[int, ...]]((), reason)
                    yield InputPlan(description, "tokens", names, shape, length, labels_per_token=per_token, **common)
            reason = f"`{names[0]}` takes token ids (batch, choices, seq): a forward pass succeeded"
            yield InputPlan(
                f"token ids (2, {CHOICES}, {PROBE_LENGTHS[0]})",
                "tokens",
                names,
                Detection((CHOICES,), reason),
                **common,
            )
            continue
        shapes: Iterator[tuple[tuple[int, ...], str]]
        if kind == "image":
            shapes = image_shapes(module, config)
        elif kind in ("wave", "frames"):
            shapes = sound_shapes(config, kind)
        else:
            shapes = feature_shapes(module, config)
        modality = "image" if kind == "image" else "features"
        for sample, reason in shapes:
            description = f"{'images' if kind == 'image' else 'features'} {(2, *sample)}"
            yield InputPlan(description, modality, names, Detection(sample, reason), labels_per_token=False, **common)


def _mixed_plans(module: nn.Module, names: tuple[str, ...], common: Mapping[str, Any]) -> Iterator[InputPlan]:
    """Yield plans for a table of numbers and categories: one category per embedding, numbers by widths of layers."""
    numbers = next(name for name in names if kind_by_name(name) == "numbers")
    categories = next(name for name in names if kind_by_name(name) == "categories")
    tables = categorical_sizes(module)
    embedded = sum(width for _, width in tables)
    widths = [width for child in module.modules() if isinstance(width := getattr(child, "in_features", None), int)]
    normed = [child.num_features for child in module.modules() if isinstance(child, nn.BatchNorm1d)]
    likely = [*normed, *(width - embedded for width in widths), *widths]
    for width in dict.fromkeys(width for width in likely if width > 0):
        reason = f"{width} numbers as `{numbers}` and {len(tables)} categories as `{categories}` run"
        yield InputPlan(
            f"{width} numbers and {len(tables)} categories",
            "features",
            (numbers, *(name for name in names if name != numbers)),
            Detection((width,), reason),
            labels_per_token=False,
            other_shapes={categories: (len(tables),)},
            **common,
        )
