"""What a layer of any model makes of samples, as one table of vectors.

Unusual: where positions and features lie in an output is read from its shape beside that of the input, and the reason
is kept with the vectors, because a table that mixes them up looks like any other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, unfused_attention
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.roles import role_of
from utils.adapters.structure import structure
from utils.adapters.troubles import first_line
from utils.runtime.errors import AdapterError, ConfigError, DataError
from utils.runtime.isolation import preserved

Place = tuple[str, str]
"""Qualified name of a layer, and its ``"output"`` or ``"input"``."""
POOLS = ("auto", "mean", "last", "positions", "flat")
"""How the positions of a sample become vectors."""


@dataclass(frozen=True, eq=False)
class Representation:
    """Vectors that a layer made of samples."""

    values: Tensor
    """float32 on the CPU, ``(rows, width)``."""
    layer: str
    """Qualified name of the layer."""
    side: str
    """``"output"`` of the layer, or its ``"input"``."""
    pool: str
    """``"mean"`` or ``"last"`` of the positions of a sample, ``"positions"`` each on its own, or ``"flat"``."""
    samples: Tensor
    """int64 ``(rows,)``: which sample a row is of, in the order given."""
    positions: Tensor
    """int64 ``(rows,)``: its position in the sample; -1 where a row stands for a whole sample."""
    reason: str
    """Why this layer, and how its output was read."""


def layer_names(module: nn.Module) -> list[str]:
    """Return the qualified names of all submodules, in registration order."""
    return [name for name, _ in module.named_modules() if name]


def layer_named(module: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its qualified name.

    Raises:
        ConfigError: There is none; the nearest names are given.
    """
    layers = dict(module.named_modules())
    if not isinstance(name, str) or not name or name not in layers:
        names = layer_names(module)
        near = get_close_matches(str(name), names, n=3, cutoff=0.4) or names[:3]
        raise ConfigError(
            f"{type(module).__name__} has no layer {name!r}.",
            f"Expected one of its {len(names)} modules, such as {', '.join(near) or 'none: it has no submodules'}.",
            "Give a name as `model.named_modules()` lists it.",
        )
    return layers[name]


def default_layer(adapter: ModelAdapter) -> tuple[str, str, str]:
    """Return the layer that stands for what a model knows of a sample, the side of it, and why.

    Raises:
        AdapterError: No module makes the logits, and there are no blocks.
    """
    parts = structure(adapter)
    head, blocks = parts.head, parts.blocks.value
    if head.value:
        return head.value, "input", f"what `{head.value}` reads, whose output is the logits"
    if blocks:
        return blocks[-1], "output", f"no layer's output is the logits, so what the last block `{blocks[-1]}` makes"
    raise AdapterError(
        f"{adapter.name} has no layer whose output is its logits ({head.reason}), and no repeated blocks.",
        "Expected either, to take a sample's representation from it.",
        "Name a layer, for example one of `adapter.module.named_modules()`.",
    )


def representations(
    adapter: ModelAdapter,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    layer: str | None = None,
    pool: str = "auto",
    *,
    side: str = "output",
    channels: int | None = None,
) -> Representation:
    """Run a model on samples and keep what one layer makes of them; the model is left as it was.

    Args:
        adapter: The model.
        batches: Inputs by the names of forward's arguments, or the main input alone, batch first.
        layer: Qualified name; None takes what the layer that makes the logits reads.
        pool: What becomes of the positions of a sample, tokens or places of an image: their ``"mean"``, the ``"last"``,
            ``"positions"`` for a row each, or ``"flat"`` for all in one row. ``"auto"`` is the mean. Positions that the
            attention mask hides count for nothing, except in ``"flat"``.
        side: The layer's ``"output"`` or its ``"input"``; for its default the input.
        channels: The axis of features, where the shape leaves it open.

    Raises:
        ConfigError: No such layer, pool or side, or samples that are not of equal size where that is needed.
        AdapterError: Inputs that do not fit, a layer that was not called, or one that does not keep samples apart.
        DataError: A mask hides positions, and does not fit those of the layer.
    """
    if pool not in POOLS or side not in ("output", "input"):
        raise ConfigError(
            f"The pool is {pool!r} and the side {side!r}.",
            f"Expected one of {', '.join(POOLS)}, and output or input.",
            "Choose among them.",
        )
    reason = f"`{layer}` was asked for"
    if layer is None:
        layer, side, reason = default_layer(adapter)
    rows: list[Tensor] = []
    numbers: list[Tensor] = []
    places: list[Tensor] = []
    count = 0
    how = ""
    place = layer, side
    with preserved(adapter.module, 0, "representations"), torch.no_grad(), captured(adapter.module, [place]) as held:
        adapter.module.eval()
        for batch in batches:
            inputs = {adapter.main_input: batch} if isinstance(batch, Tensor) else dict(batch)
            inputs = {name: v.to(adapter.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
            held.clear()
            run_given(adapter, inputs)
            table, how = as_table(taken(held, place, adapter), inputs[adapter.main_input], layer, channels)
            values, samples, positions = pooled_rows(table, counted_positions(inputs, table, layer, pool), pool)
            rows.append(values.float().cpu())
            numbers.append(samples.cpu() + count)
            places.append(positions.cpu())
            count += len(table)
    if not rows:
        raise ConfigError(
            "There are no samples to represent.", "Expected one batch at least.", "Give batches of model inputs."
        )
    if len({part.shape[1] for part in rows}) > 1:
        raise ConfigError(
            f"Rows of `{layer}` are {sorted({part.shape[1] for part in rows})} wide.",
            "Expected one width for all samples.",
            'Choose pool="mean", or give samples of one size.',
        )
    pooled = "mean" if pool == "auto" else pool
    return Representation(
        torch.cat(rows),
        layer,
        side,
        pooled,
        torch.cat(numbers),
        torch.cat(places),
        "; ".join(filter(None, (reason, how))),
    )


@contextmanager
def captured(module: nn.Module, places: Sequence[Place]) -> Iterator[dict[Place, Tensor]]:
    """Yield what the last call of each place made, or read, while the block runs; clear it between forward passes.

    Raises:
        ConfigError: No such layer.
    """
    held: dict[Place, Tensor] = {}

    def hook_for(place: Place) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            found = first_tensor(output if place[1] == "output" else (*args, *kwargs.values()))
            if found is not None:
                held[place] = found

        return hook

    with ExitStack() as stack:
        stack.enter_context(unfused_attention())
        for place in places:
            child = layer_named(module, place[0])
            register = child.register_forward_hook if place[1] == "output" else child.register_forward_pre_hook
            stack.callback(register(hook_for(place), with_kwargs=True).remove)
        yield held


def taken(held: Mapping[Place, Tensor], place: Place, adapter: ModelAdapter) -> Tensor:
    """Return what a place made or read.

    Raises:
        AdapterError: It was not called.
    """
    if place not in held:
        raise AdapterError(
            f"The layer `{place[0]}` of {adapter.name} was not called, or its {place[1]} holds no tensor.",
            "Expected a layer that every sample passes.",
            "Name another one.",
        )
    return held[place]


def run_given(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Any:
    """Call a model on inputs that a user gave and return its raw output.

    Raises:
        AdapterError: It does not run on them.
    """
    try:
        return adapter.forward(inputs)
    except Exception as error:
        raise AdapterError(
            f"{adapter.name} does not run on a batch of {_told(inputs)}: {first_line(error)}.",
            f"Expected what it takes: {_told(adapter.example_inputs())}.",
            "Give inputs of these types, and of shapes that the model was made for.",
        ) from error


def _told(inputs: Mapping[str, Any]) -> str:
    """Describe inputs."""
    return ", ".join(
        f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    )


def as_table(tensor: Tensor, content: Tensor, layer: str, channels: int | None) -> tuple[Tensor, str]:
    """Return a layer's tensor as ``(batch, positions, features)``, and how it was read.

    Args:
        tensor: What the layer made or read.
        content: The main input of that forward pass.
        layer: Its name, for errors.
        channels: The axis of features, where the shape leaves it open.

    Raises:
        AdapterError: The samples are not its first axis, or second after positions.
        ConfigError: There is no such axis of features.
    """
    batch = content.shape[0]
    how = "samples come first"
    if tensor.ndim > 2 and tensor.shape[0] != batch and tensor.shape[1] == batch:
        tensor, how = tensor.transpose(0, 1), "positions come before samples"
    if tensor.ndim < 2 or tensor.shape[0] != batch:
        raise AdapterError(
            f"`{layer}` gives a tensor of shape {tuple(tensor.shape)} for {batch} samples.",
            "Expected the samples as its first axis.",
            "Name a layer that keeps samples apart.",
        )
    if tensor.ndim == 2:
        return tensor[:, None], f"{how}, then features"
    if channels is None:
        channels, found = _feature_axis(tensor.shape, content.shape)
        how += f"; axis {channels} holds the features: {found}"
    elif not -tensor.ndim < channels < tensor.ndim or channels == 0:
        raise ConfigError(
            f"The axis of features of `{layer}` is given as {channels}, and its shape is {tuple(tensor.shape)}.",
            f"Expected an axis from 1 to {tensor.ndim - 1}.",
            "Give another one, or none to have it found.",
        )
    return tensor.movedim(channels, -1).flatten(1, -2), how


def _feature_axis(shape: tuple[int, ...], content: tuple[int, ...]) -> tuple[int, str]:
    """Return which axis of ``(batch, ...)`` holds features, and why."""
    if len(shape) == 3:
        length = content[1] if len(content) == 2 else None
        if shape[2] == length != shape[1]:
            return 1, "the last one is as long as the input"
        return 2, "it is the last of three"
    spatial = content[2:] if len(content) == len(shape) else ()
    first, last = shape[2:], shape[1:-1]

    def scaled(axes: tuple[int, ...]) -> bool:
        # An image shrinks alike in all directions, up to rounding.
        ratios = [axis / side for axis, side in zip(axes, spatial, strict=True)]
        return max(ratios) - min(ratios) <= 0.51 / min(spatial) + 1e-9

    if spatial and scaled(last) and not scaled(first):
        return len(shape) - 1, "the axes before it keep the proportions of the input"
    if not spatial and len(set(last)) == 1 and len(set(first)) > 1:
        return len(shape) - 1, "the axes before it are of one size"
    return 1, "channels follow samples"


def counted_positions(inputs: Mapping[str, Any], table: Tensor, layer: str, pool: str = "mean") -> Tensor:
    """Return which positions of a layer are real, bool ``(batch, positions)``.

    Args:
        inputs: What the model was given.
        table: What the layer made of it, ``(batch, positions, width)``.
        layer: Its name.
        pool: What becomes of the positions; ``"flat"`` reads no mask.

    Raises:
        DataError: A mask hides some positions of the input, and does not fit those of the layer: nobody can say which
            of them are hidden.
    """
    masks = {
        name: value
        for name, value in inputs.items()
        if role_of(name) in ("mask", "padding") and isinstance(value, Tensor)
    }
    for name, value in masks.items():
        if value.shape == table.shape[:2]:
            return value.bool() if role_of(name) == "mask" else ~value.bool()
    hiding = [
        f"`{name}` of shape {tuple(value.shape)}" for name, value in masks.items() if _hides(name, value, len(table))
    ]
    # Where a layer has put the positions of a sample together, no mask is wanted.
    if hiding and pool != "flat" and table.shape[1] > 1:
        raise DataError(
            f"In `{layer}` {', '.join(hiding)} does not fit {len(table)} x {table.shape[1]} positions.",
            "Expected a mask with one entry for each position, or one that hides nothing.",
            'Name a layer with a position for each input, or give samples of one length without a mask; pool="flat" '
            "reads no mask.",
        )
    return torch.ones(table.shape[:2], dtype=torch.bool, device=table.device)


def _hides(name: str, value: Tensor, batch: int) -> bool:
    """Return whether an input is a mask ``(batch, positions)`` that hides something.

    One with more axes says which positions see which, and hides none of them for all.
    """
    if value.ndim != 2 or len(value) != batch:
        return False
    return bool((~value.bool() if role_of(name) == "mask" else value.bool()).any())


def pooled_rows(table: Tensor, real: Tensor, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows ``(rows, width)``, the sample of each and its position."""
    batch = torch.arange(table.shape[0], device=table.device)
    whole = torch.full_like(batch, -1)
    if pool == "positions":
        samples, positions = real.nonzero(as_tuple=True)
        return table[samples, positions], samples, positions
    if pool == "flat":
        return table.flatten(1), batch, whole
    if pool == "last":
        steps = torch.arange(table.shape[1], device=table.device)
        last = torch.where(real, steps, -1).amax(1).clamp_min(0)
        return table[batch, last], batch, last
    total = table.masked_fill(~real.unsqueeze(-1), 0).sum(1)
    return total / real.sum(1, keepdim=True).clamp_min(1), batch, whole
