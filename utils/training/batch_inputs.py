"""A batch under the names of a model's arguments, and how far a packed window's documents see each other.

Unusual: what a model does with masks and positions is tried with weights that were moved at random. Layers whose last
weights are zero at first, as many residual branches are, would otherwise seem to keep apart what they mix later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.roles import role_of
from utils.runtime.isolation import COPY_BYTES
from utils.runtime.seeding import derive_seed
from utils.tokenization import document_positions
from utils.training.prepared_data import PreparedData

CONTENT = ("input_ids", "pixel_values", "features")
"""Entries of a batch that are a model's main input."""
PROBED = 8
"""Tokens of each of the two documents with which it is tried whether one sees the other."""
SAME = 1e-5
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOVED = 0.3
"""Deviation by which vectors and scalars are moved; matrices by the inverse root of their inputs."""
APART = "documents are packed into windows; positions begin anew at each document, and no token sees another document"
TOGETHER = (
    "documents are packed into windows with a separator between them; a token also sees the end of the document "
    "before, because the model takes no positions that would tell it where a document begins"
)


def model_inputs(
    adapter: ModelAdapter, batch: dict[str, Tensor], data: PreparedData | None = None
) -> dict[str, Tensor]:
    """Name a batch's content as the model's forward does.

    Args:
        adapter: The model.
        batch: ``input_ids`` ``(batch, seq)``, ``pixel_values`` ``(batch, channels, height, width)`` or ``features``
            ``(batch, columns)``; where texts differ in length also ``attention_mask``, for pairs ``decoder_input_ids``.
        data: What the batch is from; says whether positions begin anew at each document, and which optional mask
            is given.
    """
    content = next(batch[name] for name in CONTENT if name in batch)
    mask, answers = batch.get("attention_mask"), batch.get("decoder_input_ids")
    inputs = {adapter.main_input: content}
    for name in adapter.input_names[1:]:
        inputs |= _other_input(adapter, name, content, mask, answers)
    facts = data.facts if data is not None else {}
    optional = facts.get("mask_argument")
    if mask is not None and optional is not None and optional not in inputs:
        inputs |= _other_input(adapter, optional, content, mask, answers)
    if facts.get("positions_argument"):
        assert data is not None
        assert data.tokenizer is not None
        assert data.tokenizer.eos_id is not None
        inputs[facts["positions_argument"]] = document_positions(content, data.tokenizer.eos_id)
    return inputs


def _other_input(
    adapter: ModelAdapter, name: str, content: Tensor, mask: Tensor | None, answers: Tensor | None
) -> dict[str, Tensor]:
    """Return one input beside the main one; empty for one that nothing is known about."""
    role = role_of(name)
    if answers is not None and role in (None, "labels") and name == adapter.content_input:
        return {name: answers}
    of_decoder = name.rsplit(".", 1)[-1].startswith(("decoder", "tgt", "target"))
    shape_of = answers if of_decoder and answers is not None else content
    known = torch.ones_like(shape_of) if mask is None or shape_of is not content else mask
    if role == "mask":
        return {name: known}
    if role == "padding":
        return {name: known == 0}
    if role == "lengths":
        return {name: known.sum(1)}
    if role == "segments":
        return {name: torch.zeros_like(shape_of)}
    if role == "positions":
        return {name: torch.arange(shape_of.shape[1], device=shape_of.device).expand_as(shape_of)}
    return {}


def boundary_facts(adapter: ModelAdapter, data: PreparedData) -> dict[str, Any]:
    """Find out, by trying, which mask and which positions the model takes beside the content.

    Returns:
        ``mask_argument`` for texts of different lengths: the optional argument that gets their mask, or None.
        ``positions_argument`` and ``boundaries`` for packed text: positions that begin anew at each document are given
        only to models in which they keep documents apart, as transformers' decoders do; told in words.
    """
    if "lengths" in data.train:
        names = [n for n in adapter.argument_names if role_of(n) in ("mask", "padding") and not n.startswith("decoder")]
        given = next((name for name in names if name in adapter.input_names), None)
        if given is None:
            given = next((name for name in names if _takes_mask(adapter, name)), None)
        return {"mask_argument": given, "boundaries": _padding_in_words(given, data)}
    if data.task not in ("causal_lm", "masked_lm"):
        return {}
    for name in adapter.argument_names:
        if role_of(name) == "positions" and _keeps_apart(adapter, name):
            return {"positions_argument": name, "boundaries": APART}
    return {"positions_argument": None, "boundaries": TOGETHER}


def _padding_in_words(name: str | None, data: PreparedData) -> str:
    if name is not None:
        return f"texts are filled up to the longest of their batch, and `{name}` tells the model where each ends"
    assert data.tokenizer is not None
    return (
        f"texts are filled up to the longest of their batch with id {data.tokenizer.fill_id}, which the model reads: "
        "it takes no mask"
    )


def _takes_mask(adapter: ModelAdapter, name: str) -> bool:
    """Tell whether an optional mask ``(batch, seq)`` is accepted and hides what it covers."""
    # What the adapter finds out when it is first asked is found on the weights as they are.
    ids, inputs = adapter.readable_ids(), adapter.example_inputs()
    with moved(adapter.module), adapter.isolated():
        content = inputs[adapter.main_input]
        if content.dim() != 2 or content.shape[1] < 2:
            return False
        mask = torch.ones_like(content)
        mask[:, -1] = 0
        changed = content.clone()
        changed[:, -1] = (changed[:, -1] + 1) % ids
        value = mask == 0 if role_of(name) == "padding" else mask
        try:
            first = adapter.logits({**inputs, name: value}).float()
            second = adapter.logits({**inputs, name: value, adapter.main_input: changed}).float()
        except Exception:  # a mask of another form, whatever the model says about it
            return False
        # A decoder that answers per position may answer differently where nobody looks.
        if first.dim() == 3:
            first, second = first[:, :-1], second[:, :-1]
        return bool(torch.allclose(first, second, atol=SAME))


def _keeps_apart(adapter: ModelAdapter, name: str) -> bool:
    """Tell whether positions that begin anew keep a document from seeing the one before it."""
    limit, ids = adapter.max_length.value, adapter.readable_ids()
    if limit is not None and limit < 2 * PROBED:
        return False
    with moved(adapter.module), adapter.isolated():
        try:
            inputs = adapter.example_inputs(1, 2 * PROBED)
            content = inputs[adapter.main_input]
            positions = torch.arange(PROBED, device=content.device).repeat(2)[None]
            changed = content.clone()
            changed[:, :PROBED] = (changed[:, :PROBED] + 1) % ids
            inputs = {n: value for n, value in inputs.items() if role_of(n) != "mask"} | {name: positions}
            first = adapter.logits(inputs).float()
            second = adapter.logits({**inputs, adapter.main_input: changed}).float()
        except Exception:  # no such positions, or not this many tokens
            return False
        apart = torch.allclose(first[:, PROBED:], second[:, PROBED:], atol=SAME)
        return apart and not torch.allclose(first[:, :PROBED], second[:, :PROBED], atol=SAME)


@contextmanager
def moved(module: nn.Module) -> Iterator[None]:
    """Move a model's parameters at random while the block runs, the same way each time.

    Of models above `utils.runtime.isolation.COPY_BYTES` only vectors and what is the same everywhere, such as all zero,
    are moved: a second copy of the rest might not fit into memory.
    """
    generator = torch.Generator().manual_seed(derive_seed("moved"))
    parameters = [p for p in module.parameters() if type(p.data) is Tensor and p.dtype in PLAIN and not p.is_meta]
    small = sum(p.nbytes for p in parameters) <= COPY_BYTES
    kept = []
    try:
        for parameter in parameters:
            data = parameter.data
            if data.numel() and (small or data.dim() < 2 or bool((data == data.flatten()[0]).all())):
                scale = MOVED if data.dim() < 2 else (data.numel() / len(data)) ** -0.5
                noise = torch.randn(data.shape, generator=generator) * scale
                kept.append((parameter, data))
                parameter.data = data + noise.to(data.device, data.dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
