"""Is token content drowned by another embedding that is added to it?

Measured where the first layer reads the sum, so that any norm on the way has done what it can: it cannot undo this. The
stream is split as in an analysis of variance over many random inputs: what follows the position, what is the same
everywhere, and the rest, which is content. Thirty times more position than content leaves a model that starts as a
unigram model and learns only as fast as it undoes that. The reverse, content over position, is usual and fine.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe, unfused_attention
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.dependence import Enough
from utils.validation.probing import has_length
from utils.validation.residuals import block_families
from utils.validation.untrained import looks_untrained
from utils.validation.weight_scales import as_configured

DROWNED, SHADED = 35.0, 25.0
"""Ratios of position to content that fail and warn."""
CONSTANT_DROWNED = 45.0
"""As `DROWNED`, for what is added equally at every position."""
FEWEST_WAVES, WAVES_DROWNED = 12.0, 25.0
"""For slow waves, the ratio of position from which they count, and that of position and constant together that fails.

Sinusoids of height 1 over content at 0.02 reach 15 to 20 and 28; some families state both as their default.
"""
SAMPLES = 16
LENGTH = 16
HINT = (
    "Initialise both embeddings at the same scale (0.02 is usual), or multiply the token embedding by sqrt(width) "
    "before adding sinusoids."
)


@dataclass(frozen=True)
class Shares:
    """Root mean squares of the parts of a stream ``(samples, positions, width)``."""

    content: float
    position: float
    constant: float


def check_embedding_scale(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Compare how much of the first layer's input follows the content with how much follows the position.

    Codes: ``embedding_scale``.
    """
    if adapter.modality == "features" or (adapter.modality == "tokens" and adapter.readable_ids() < SAMPLES // 4):
        raise Skipped("no tokens or patches")
    if not looks_untrained(adapter.module):
        # Training gives positions the scale that serves them.
        raise Skipped("the model is trained")
    if adapter.failure is not None:
        raise AdapterError(adapter.failure)
    inputs = adapter.example_inputs(SAMPLES, adapter.legal_length(LENGTH)) if has_length(adapter) else _images(adapter)
    streams = _first_streams(adapter, inputs)
    if not streams:
        raise Skipped("no layer reads one vector per position")
    shares = max((split(stream) for stream in streams), key=lambda part: part.position / max(part.content, 1e-30))
    if shares.content <= 1e-6 * (shares.position + shares.constant):
        raise Skipped("no content reaches the first layer (see initialization)")
    position, constant = shares.position / shares.content, shares.constant / shares.content
    if adapter.modality == "image":
        # A bias or the mean colour is no embedding.
        constant = 0.0
    # Slow waves hardly change over a few positions, so most of them counts as constant here.
    slow = position > FEWEST_WAVES and constant > position / 2
    waves = math.hypot(position, constant) if slow and not as_configured(adapter) else 0.0
    details = {"content": shares.content, "position": shares.position, "constant": shares.constant, "waves": waves}
    # The ratio that is furthest beyond its limit, or nearest to it, decides.
    ratio, limit, what = max(
        (position, DROWNED, "position"),
        (waves, WAVES_DROWNED, "position (slow waves, their mean included)"),
        (constant, CONSTANT_DROWNED, "a constant vector"),
        key=lambda part: part[0] / part[1],
    )
    drowned = ratio > limit
    if not drowned and position > SHADED:
        ratio, limit, what = position, SHADED, "position"
    if ratio <= limit:
        why = f"what the first layer reads holds {ratio:.2g} times as much {what} as content, {limit:g} at most"
        return Outcome(ratio, limit, why, (), details)
    # A scale that the config's class states is a choice, however slow a start it gives.
    severity = "fail" if drowned and not as_configured(adapter) else "warn"
    message = f"what the first layer reads holds {ratio:.3g} times as much {what} as content; the limit is {limit:g}"
    where = _loudest(adapter, inputs, stream_width=streams[0].shape[-1])
    reproduction = "for name, p in model.named_parameters():\n    if p.dim() > 1: print(name, tuple(p.shape), p.std())"
    finding = Finding("embedding_scale", severity, where, message, HINT, reproduction)
    return Outcome(ratio, limit, "", [finding], details)


def split(stream: Tensor) -> Shares:
    """Split a stream ``(samples, positions, width)`` into content, position and constant.

    Means over samples are corrected for the content that is left in them.
    """
    values = stream.detach().float()
    samples = len(values)
    mean = values.mean(0)
    content = float((values - mean).square().sum(0).mean()) / (samples - 1)
    common = mean.mean(0)
    position = float((mean - common).square().mean()) * len(mean) / max(1, len(mean) - 1) - content / samples
    constant = float(common.square().mean()) - content / samples / len(mean) - max(position, 0.0) / len(mean)
    return Shares(math.sqrt(content), math.sqrt(max(position, 0.0)), math.sqrt(max(constant, 0.0)))


def _images(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return images, fewer of large ones."""
    size = adapter.example_inputs(1)[adapter.main_input][0].numel()
    return adapter.example_inputs(SAMPLES if size <= 3 * 64 * 64 else 4)


def _first_streams(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return what the first layers read, up to the first layer inside a repeated block.

    Only layers with a matrix of their own count, and only input of one vector per position.
    """
    members = {name for family in block_families(adapter.module) for name in family}
    found: list[Tensor] = []

    def hook_for(name: str) -> Any:
        inside = any(name == member or name.startswith(f"{member}.") for member in members)

        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_tensor((*args, *kwargs.values()))
            if tensor is None or not tensor.is_floating_point() or tensor.dim() != 3 or tensor.shape[1] < 4:
                return
            if len(tensor) != SAMPLES and len(tensor) != len(inputs[adapter.main_input]):
                return
            found.append(tensor.detach())
            if inside or not members:
                raise Enough

        return hook

    handles = [
        child.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name, child in adapter.module.named_modules()
        if not isinstance(child, nn.Embedding) and any(p.dim() > 1 for p in child.parameters(recurse=False))
    ]
    try:
        seed_streams(0, "forward")
        with torch.no_grad(), unfused_attention():
            adapter.forward(inputs)
    except Enough:
        pass
    except AdapterError:
        raise
    finally:
        for handle in handles:
            handle.remove()
    return found[-2:]


def _loudest(adapter: ModelAdapter, inputs: dict[str, Tensor], stream_width: int) -> str:
    """Return the table or parameter of the largest scale among those that are added and do not read the content."""
    tables: dict[str, tuple[nn.Module, float]] = {}

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        ids = first_tensor(given)
        if isinstance(child, nn.Embedding) and ids is not None:
            content = ids.dim() > 1 and ids.shape == inputs[adapter.main_input].shape and bool((ids != ids[:1]).any())
            if not content:
                tables[name] = (child, float(child.weight.detach().float().std()))

    with observe(adapter.module, note), torch.no_grad():
        adapter.forward(inputs)
    scales = {name: scale for name, (_, scale) in tables.items()}
    for name, parameter in adapter.module.named_parameters():
        owner = adapter.module.get_submodule(name.rpartition(".")[0])
        bare = not isinstance(owner, (nn.Embedding, nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention))
        if bare and parameter.dim() > 1 and parameter.shape[-1] == stream_width and parameter.numel() > stream_width:
            scales[name] = float(parameter.detach().float().std())
    for name, buffer in adapter.module.named_buffers():
        if buffer.dim() > 1 and buffer.shape[-1] == stream_width and buffer.is_floating_point():
            owner_name = name.rpartition(".")[0] or adapter.name
            scales[owner_name] = float(buffer.float().std())
    return max(scales, key=lambda name: scales[name]) if scales else adapter.name
