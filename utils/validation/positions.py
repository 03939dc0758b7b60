"""Does the order of the input matter? Proof by permutation: reorder what lies between the ends and look at the answer.

A set function (attention without positions, a mean of words) gives the same answer for any order. A causal stack of two
layers and more does not quite, for the mask itself tells how much comes before a place: such models without positions
are rare but legitimate (Haviv et al. 2022, "Transformer Language Models without Positional Encodings Still Learn
Positional Information"). There the question is asked of each block by itself, and it is a fault only where the model
holds a table of positions that has no effect.

Embeddings that start at zero are replaced by noise first: they move with the first step.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, observe
from utils.adapters.detection import embedding_uses
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.structure import blocks
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.dependence import (
    PLAIN,
    as_double,
    attends,
    bounded_length,
    double_twin,
    other_content,
    outputs,
    relative,
    sample_inputs,
    without_zeros,
)  # fmt: skip
from utils.validation.probing import ModelCrash, logits
from utils.validation.reproduction import reordered

LENGTH = 11
TILES = (2, 3, 4, 5, 7)
"""Tiles per side of an image: for some of these a tile is a whole number of patches."""
TABLE_NAME = re.compile(r"pos|rope|rotary|wpe|alibi|freq|(^|[._])(cos|sin)", re.IGNORECASE)
HINT = (
    "Add positions to the embeddings (x + self.positions(torch.arange(length, device=x.device))), or rotate queries "
    "and keys by their positions; if there is such a table, follow it to where it should be added."
)
BAG_HINT = "If word order should count, mix positions before pooling: attention with positions, convolution or a GRU."


def check_positions(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Reorder tokens or image tiles and require that the output changes.

    Code: ``position_absent``.
    """
    if adapter.modality == "image":
        return _check_image(adapter)
    length = bounded_length(adapter, LENGTH)
    if length is None:
        raise Skipped("the input is neither a sequence of tokens nor an image")
    if adapter.task.value == "tabular_classification" or _is_table(adapter):
        raise Skipped("the columns of a table have no order")
    inputs = sample_inputs(adapter, 1, length)
    length = inputs[adapter.main_input].shape[1]
    if length < 4:
        raise Skipped(f"texts of {length} tokens leave nothing to reorder")
    ids = _distinct(adapter, inputs[adapter.main_input])
    inputs = {**inputs, adapter.main_input: ids}
    middle = slice(1, length - 1)
    reordered, replaced = ids.clone(), ids.clone()
    reordered[:, middle] = ids[:, middle].flip(1)
    replaced[:, middle] = other_content(adapter, adapter.main_input, ids)[:, middle]
    if bool((reordered == ids).all()):
        raise Skipped("a vocabulary this small leaves nothing to reorder")
    with without_zeros(adapter):
        answer = _Answer(adapter, length)
        moved, reach = answer.effects(inputs, reordered, replaced)
        if reach == 0 and adapter.task.value != "seq2seq":
            raise Skipped("the answer does not depend on the tokens that were reordered")
        details = {"reordering": moved, "replacing": reach, "length": length}
        if reach and moved == 0:
            return Outcome(0.0, "above 0", "", _exact_finding(adapter, inputs, replaced, length, reach), details)
        if adapter.task.value == "causal_lm" and (found := _blockwise(adapter, inputs, middle)) is not None:
            return Outcome(moved, "above 0", "", [found], details)
    return Outcome(moved, "above 0", f"reordering tokens changes the answer (by {moved:.2g} of its size)", (), details)


class _Answer:
    """How far the answer moves: the logits at the last position, which no reordering touched, or of the whole text."""

    def __init__(self, adapter: ModelAdapter, length: int) -> None:
        self.adapter, self.length = adapter, length

    def effects(self, inputs: Mapping[str, Tensor], reordered: Tensor, replaced: Tensor) -> tuple[float, float]:
        """Return the relative effect of reordering and of replacing, each 0 where it is no more than rounding."""
        found = self._effects(self.adapter, inputs, reordered, replaced)
        if min(found) > PLAIN:
            return found
        # Positions may move the answer by little at first; a copy in float64 tells little from nothing.
        if (twin := double_twin(self.adapter)) is not None:
            try:
                exact = self._effects(twin, as_double(inputs), reordered, replaced)
            except Exception:
                return found
            # What is plain in the model's own precision is no rounding, whatever its copy says.
            return (found[0] if found[0] > PLAIN / 50 else exact[0]), max(exact[1], found[1])
        return found

    def _effects(
        self, adapter: ModelAdapter, inputs: Mapping[str, Any], reordered: Tensor, replaced: Tensor
    ) -> tuple[float, float]:
        base = self._take(adapter, inputs)
        if not bool(torch.isfinite(base).all()):
            raise Skipped("the logits are not finite (see numerical_stability)")
        least = least_effect(base)
        sizes = []
        for content in (reordered, replaced):
            values = content.to(base.dtype) if content.is_floating_point() else content
            after = self._take(adapter, {**inputs, adapter.main_input: values})
            size = relative(float((after - base).abs().max()), base)
            sizes.append(size if size > least else 0.0)
        return sizes[0], sizes[1]

    def _take(self, adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
        result = logits(adapter, inputs)
        if adapter.task.value != "seq2seq" and result.dim() > 2 and result.shape[1] == self.length:
            return result[:, -1]
        return result


def least_effect(tensor: Tensor) -> float:
    """Return the relative change below which rounding may be all there is."""
    return (1e4 if tensor.dtype == torch.float64 else 8) * torch.finfo(tensor.dtype).eps


def _is_table(adapter: ModelAdapter) -> bool:
    """Tell whether whole numbers given as an example are columns of a table: no embedding reads all of them."""
    if adapter.spec.example_inputs is None:
        return False
    inputs = adapter.example_inputs()
    uses = embedding_uses(adapter.module, lambda: logits(adapter, inputs), inputs, adapter.main_input)
    return bool(uses) and not any(use.reads_tokens for use in uses)


def _distinct(adapter: ModelAdapter, ids: Tensor) -> Tensor:
    """Return ids that are all different where the vocabulary allows, so that every reordering shows."""
    top, padding = adapter.readable_ids(), adapter.pad_token_id.value
    legal = [i for i in range(min(top, 4 * ids.shape[1] + 2)) if i != padding]
    if len(legal) < ids.shape[1] or adapter.spec.example_inputs is not None:
        return ids
    drawn = torch.randperm(len(legal), generator=torch.Generator().manual_seed(0))[: ids.shape[1]]
    return torch.tensor(legal, device=ids.device)[drawn.to(ids.device)].to(ids.dtype).expand_as(ids).clone()


def _mixes(adapter: ModelAdapter, inputs: Mapping[str, Tensor], replaced: Tensor, length: int) -> bool:
    """Tell whether, anywhere inside, one position's values depend on other tokens: more than a bag of words does."""
    name = adapter.main_input
    last: list[Tensor] = []

    def keep(_: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        for _, tensor in named_tensors(output):
            if tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[1] == length:
                last.append(tensor[:, -1].detach().clone())

    with observe(adapter.module, keep):
        outputs(adapter, inputs)
    first, last = last, []
    with observe(adapter.module, keep):
        outputs(adapter, {**inputs, name: replaced})
    return any(
        a.shape == b.shape and not torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(first, last, strict=False)
    )


def _exact_finding(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], replaced: Tensor, length: int, reach: float
) -> list[Finding]:
    """Judge a model whose answer is the same for any order of the tokens."""
    message = (
        f"reordering tokens 1 to {length - 2} of {length} leaves the answer exactly as it is; replacing them changes "
        f"it by {reach:.2g} of its size"
    )
    lines = reordered(adapter, length)
    language = adapter.task.value in ("causal_lm", "masked_lm", "seq2seq")
    if language or _mixes(adapter, inputs, replaced, length) or _one_place_only(adapter, inputs, length):
        finding = Finding("position_absent", "fail", adapter.name, message, HINT, lines)
        return [_stated(adapter, finding)]
    if adapter.task.value == "text_classification" and not _bagged(adapter, inputs):
        return [Finding("position_absent", "warn", adapter.name, f"a bag of words: {message}", BAG_HINT, lines)]
    return []


def _bagged(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether the tokens are read by an `EmbeddingBag` alone: who chooses that layer asks for no order."""
    count = inputs[adapter.main_input].numel()
    readers: set[type[nn.Module]] = set()

    def look(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if any(isinstance(t, Tensor) and not t.is_floating_point() and t.numel() == count for t in given[:1]):
            readers.update(kind for kind in (nn.Embedding, nn.EmbeddingBag) if isinstance(child, kind))

    with observe(adapter.module, look):
        outputs(adapter, inputs)
    return readers == {nn.EmbeddingBag}


def _one_place_only(adapter: ModelAdapter, inputs: Mapping[str, Tensor], length: int) -> bool:
    """Tell whether a table of positions is there but every token is given the same row of it.

    Tables of languages or of the kinds of a token have fewer rows than a text has tokens.
    """
    found: list[str] = []

    def look(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        asked = next((t for t in given if isinstance(t, Tensor) and not t.is_floating_point()), None)
        if not isinstance(child, nn.Embedding) or asked is None or asked.shape[-1:] != (length,):
            return
        if child.num_embeddings >= length and bool((asked == asked.flatten()[0]).all()):
            found.append(name)

    with observe(adapter.module, look):
        outputs(adapter, inputs)
    return bool(found)


def _stated(adapter: ModelAdapter, finding: Finding) -> Finding:
    """Soften a finding where the config itself switches positions off."""
    keys = [key for key, value in adapter.config.items() if "position" in key and value in (False, "none")]
    if not keys or any(value is True for key, value in adapter.config.items() if "position" in key):
        return finding
    return replace(finding, severity="warn", message=f"{finding.message}; `{keys[0]}` in the config switches them off")


def _blockwise(adapter: ModelAdapter, inputs: Mapping[str, Tensor], middle: slice) -> Finding | None:
    """Find a causal model whose blocks each ignore the order of what they are given, despite a table of positions.

    What enters a block is reordered on its way in, and the block's output at the last position must not notice.
    """
    names = blocks(adapter.module).value
    tables = _position_tables(adapter)
    if not names or not tables:
        return None
    ids = inputs[adapter.main_input]
    reordered = ids.clone()
    reordered[:, middle] = ids[:, middle].flip(1)
    given = {**inputs, adapter.main_input: reordered}
    # The tokens are reordered for the first block, so that positions added before it show; hidden states for the rest.
    cases: list[tuple[str, Mapping[str, Tensor], bool]] = [(names[0], given, False)]
    cases += [(name, inputs, True) for name in names[1:]]
    twin = double_twin(adapter) or adapter
    try:
        for name, content, inside in cases:
            before = _last_output(twin, inputs, name)
            after = _last_output(twin, content, name, (lambda x: x.flip(1)) if inside else None)
            other = _last_output(twin, inputs, name, lambda x: x.roll(1, -1))
            if relative(float((after - before).abs().max()), before) > least_effect(before):
                return None
            if relative(float((other - before).abs().max()), before) < 1e3 * least_effect(before):
                # A block that hardly notices other content says nothing about order.
                return None
    except (LookupError, TypeError, RuntimeError, ModelCrash):
        # Blocks that return no hidden state, or that refuse float64, are not asked.
        return None
    message = (
        f"no block notices the order of what it is given: reordering leaves each block's output at the last position "
        f"as it is, and `{tables[0]}` has no effect; only the causal mask tells positions apart"
    )
    return Finding("position_absent", "fail", adapter.name, message, HINT)


def _position_tables(adapter: ModelAdapter) -> list[str]:
    """Return what looks like a table of positions: by its name, or by a row for each position of the longest text."""
    longest = adapter.max_length.value
    found = []
    for name, tensor in [*adapter.module.named_parameters(), *adapter.module.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith("bias"):
            continue
        rows = longest is not None and longest > 8 and longest in tensor.shape[:-1] and longest != tensor.shape[-1]
        if TABLE_NAME.search(name) or (rows and tensor.dim() in (2, 3)):
            found.append(name)
    return found


def _last_output(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], name: str, change: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return a block's output at the last position, its hidden input between the ends changed on the way in.

    Raises:
        LookupError: The block was given or returned nothing with positions.
    """
    length = inputs[adapter.main_input].shape[1]
    taken: list[Tensor] = []

    def flip(child: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def flipped(value: Any) -> Any:
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.dim() == 3
                and value.shape[1] == length
            ):
                assert change is not None
                return torch.cat([value[:, :1], change(value[:, 1:-1]), value[:, -1:]], 1)
            return value

        # Only the first tensor is the hidden state; what follows may be tables shared by all blocks.
        if given:
            return (flipped(given[0]), *given[1:]), named
        key = next((key for key, value in named.items() if isinstance(value, Tensor)), None)
        return given, named if key is None else {**named, key: flipped(named[key])}

    def keep(child: nn.Module, given: Any, output: Any) -> None:
        for _, tensor in named_tensors(output):
            if tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[1] == length:
                taken.append(tensor[:, -1].detach().clone())
                return

    child = adapter.module.get_submodule(name)
    handles = [child.register_forward_hook(keep)]
    if change is not None:
        handles.append(child.register_forward_pre_hook(flip, with_kwargs=True))
    try:
        outputs(adapter, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not taken:
        raise LookupError(name)
    return taken[0]


def _check_image(adapter: ModelAdapter) -> Outcome:
    """Reorder the tiles of an image; attention makes a set of them by accident, a mean over patches on purpose."""
    inputs = sample_inputs(adapter, 1, None)
    image = inputs[adapter.main_input]
    if image.dim() != 4:
        raise Skipped("the input is no image (batch, channels, height, width)")
    answer = _Answer(adapter, -1)
    replaced = other_content(adapter, adapter.main_input, image)
    if not _attends_anywhere(adapter, inputs):
        raise Skipped("no attention over an image's parts: what convolutions and linear layers see has its order")
    smallest, reach = float("inf"), 0.0
    with without_zeros(adapter):
        for count in TILES:
            if image.shape[-2] % count or image.shape[-1] % count:
                continue
            moved, reach = answer.effects(inputs, _tiles_reversed(image, count), replaced)
            if reach == 0:
                raise Skipped("the answer does not depend on the image")
            if moved:
                smallest = min(smallest, moved)
                continue
            # Shifted windows see the neighbours of every patch, and may still look the same from behind.
            moved, _ = answer.effects(inputs, _tiles_swapped(image, count), replaced)
            smallest = min(smallest, moved)
            if moved:
                continue
            message = (
                f"reversing the order of {count} x {count} tiles of the image leaves the answer exactly as it is; "
                f"another image changes it by {reach:.2g} of its size"
            )
            lines = reordered(adapter, 0, count)
            finding = _stated(adapter, Finding("position_absent", "fail", adapter.name, message, HINT, lines))
            return Outcome(0.0, "above 0", "", [finding], {"tiles": count, "replacing": reach})
    if smallest == float("inf"):
        raise Skipped(f"an image of {tuple(image.shape[-2:])} has no equal tiles to reorder")
    why = f"reordering tiles of the image changes the answer (by {smallest:.2g} of its size or more)"
    return Outcome(smallest, "above 0", why, (), {"replacing": reach})


def _tiles_reversed(image: Tensor, count: int) -> Tensor:
    """Return images whose ``count x count`` tiles stand in reverse order, each tile as it was."""
    rows = torch.cat(image.chunk(count, -2)[::-1], -2)
    return torch.cat(rows.chunk(count, -1)[::-1], -1)


def _tiles_swapped(image: Tensor, count: int) -> Tensor:
    """Return images whose first two of ``count x count`` tiles are exchanged."""
    rows = list(image.chunk(count, -2))
    tiles = rows[0].chunk(count, -1)
    rows[0] = torch.cat((tiles[1], tiles[0], *tiles[2:]), -1)
    return torch.cat(rows, -2)


def _attends_anywhere(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether a model forms attention over anything."""
    return attends(adapter, inputs, tuple(_sequence_lengths(adapter, inputs)))


def _sequence_lengths(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> list[int]:
    """Return the lengths of the sequences ``(batch, length, width)`` inside a model."""
    found: dict[int, None] = {}

    def note(_: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        found.update((tensor.shape[1], None) for _, tensor in named_tensors(output) if tensor.dim() == 3)

    with observe(adapter.module, note):
        outputs(adapter, inputs)
    return list(found)
