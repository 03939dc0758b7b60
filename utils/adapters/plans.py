"""Ways to call a model, the likeliest first: which inputs, of what kind and shape. A forward pass decides."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from utils.adapters.detection import (
    DECODER_INPUTS,
    LABEL_INPUTS,
    Detection,
    ForwardSignature,
    config_number,
    kind_by_name,
)
from utils.adapters.inputs import candidate_kinds, feature_shapes, image_shapes, main_example, sound_shapes
from utils.runtime.errors import AdapterError

PROBE_LENGTHS = (12, 16, 32, 64, 128)
LONGEST_STATED = 4096
FILLABLE = (*DECODER_INPUTS, "attention_mask", "token_type_ids", "position_ids")


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
    """Shape of one sample of the main input; empty for token ids."""
    length: int = PROBE_LENGTHS[0]
    """Tokens per sample."""
    labels: str | None = None
    """Name of the input for labels that forward insists on."""
    labels_per_token: bool = True
    """These labels have the shape of the token ids; else there is one per sample."""


def example_plan(examples: Mapping[str, Any]) -> InputPlan:
    """Read the plan off inputs that the user gave.

    Raises:
        AdapterError: There is no tensor with a batch dimension among them.
    """
    name = main_example(examples)
    if name is None:
        raise AdapterError(
            "ModelSpec.example_inputs holds no tensor with at least one sample.",
            "Expected a dict of keyword arguments, batch first.",
            "Give the tensors with which model(**example_inputs) is a valid call.",
        )
    main = examples[name]
    modality = "tokens" if not main.is_floating_point() else "image" if main.dim() == 4 else "features"
    others = (key for key, value in examples.items() if isinstance(value, Tensor) and key != name)
    return InputPlan(
        "ModelSpec.example_inputs",
        modality,
        (name, *others),
        Detection(tuple(main.shape[1:]), "ModelSpec.example_inputs"),
        main.shape[1] if modality == "tokens" and main.dim() > 1 else PROBE_LENGTHS[0],
    )


def input_names(model: str, signature: ForwardSignature) -> tuple[tuple[str, ...], str | None]:
    """Return the inputs to fill, the main one first, and the labels that forward insists on.

    Raises:
        AdapterError: Forward takes nothing, or requires inputs whose content cannot be guessed.
    """
    if not signature.positional and not signature.names:
        if signature.keywords:
            raise AdapterError(
                f"forward() of {model} takes **kwargs and names no argument.",
                "Expected at least one named tensor, batch first.",
                "Pass ModelSpec(example_inputs={...}) with the keyword arguments it accepts.",
            )
        raise AdapterError(
            f"forward() of {model} takes no arguments.",
            "Expected at least one tensor, batch first.",
            "Give forward() its input as an argument.",
        )
    content = [name for name in signature.names if name not in LABEL_INPUTS] or [*signature.names, "input"]
    # What forward requires and names as usual is the content, wherever it stands in the signature.
    main = next((name for name in signature.required if kind_by_name(name)), content[0])
    extra = [name for name in signature.required if name != main]
    decoder = next((name for name in DECODER_INPUTS if name in signature.names and name != main), None)
    if decoder and decoder not in extra:
        extra.insert(0, decoder)
    unknown = [name for name in extra if name not in FILLABLE and name not in LABEL_INPUTS]
    if unknown:
        raise AdapterError(
            f"forward() of {model} requires {', '.join(unknown)} beside {main}.",
            f"Expected one main input, and of others only {', '.join(FILLABLE)}.",
            f"Pass ModelSpec(example_inputs={{{main!r}: ..., {unknown[0]!r}: ...}}) with tensors it accepts.",
        )
    labels = next((name for name in extra if name in LABEL_INPUTS), None)
    return (main, *(name for name in extra if name not in LABEL_INPUTS)), labels


def input_plans(
    module: nn.Module, model: str, config: Mapping[str, Any], signature: ForwardSignature
) -> Iterator[InputPlan]:
    """Yield one way of calling the model after another.

    Raises:
        AdapterError: As `input_names`.
    """
    names, labels = input_names(model, signature)
    for kind in candidate_kinds(module, config, names[0]):
        if kind == "tokens":
            reason = f"`{names[0]}` takes token ids (batch, seq): a forward pass succeeded"
            # A model for one fixed length takes only that, and a config may say which.
            stated = config_number(config, "max_length")
            lengths = (*PROBE_LENGTHS[:1], stated.value, *PROBE_LENGTHS[1:]) if stated else PROBE_LENGTHS
            for length in dict.fromkeys(n for n in lengths if n <= LONGEST_STATED):
                for per_token in (True, False) if labels else (True,):
                    description, shape = f"token ids (2, {length})", Detection[tuple[int, ...]]((), reason)
                    yield InputPlan(description, "tokens", names, shape, length, labels, per_token)
        elif kind == "image":
            for image_shape, reason in image_shapes(module, config):
                shape = Detection[tuple[int, ...]](image_shape, reason)
                yield InputPlan(
                    f"images {(2, *image_shape)}", "image", names, shape, labels=labels, labels_per_token=False
                )
        else:
            sound = kind in ("wave", "frames")
            shapes = sound_shapes(config, kind) if sound else feature_shapes(module, config)
            for feature_shape, reason in shapes:
                found = Detection(feature_shape, reason)
                yield InputPlan(
                    f"features {(2, *feature_shape)}", "features", names, found, labels=labels, labels_per_token=False
                )
