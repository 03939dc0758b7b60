"""How a model is told what is padding, and lines to paste that show what comes through."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.probing import content_input
from utils.validation.reproduction import fitted, opening

KEEPING = ("attention_mask", "input_mask", "valid_mask", "token_mask")
EITHER = ("src_key_padding_mask", "key_padding_mask", "padding_mask", "pad_mask", "src_padding_mask", "src_pad_mask",
          "src_mask", "mask", "x_mask", "encoder_mask")  # fmt: skip
"""Names of masks whose sense differs from author to author, in the order in which they are looked for."""


@dataclass(frozen=True)
class Mask:
    """One way of telling a model what is padding."""

    name: str | None
    """The argument; None where the model reads the padding off the ids."""
    keep: bool = True
    """1 means real; else 1 means padding, as in `nn.Transformer`."""
    kind: str = "long"
    """``"long"``, ``"bool"`` or ``"additive"``."""
    shape: tuple[int, ...] = ()
    """Axes of length 1 between the batch and the positions."""

    def argument(self, real: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the argument that says what is real; `real` is ``(batch, seq)``, True for real."""
        if self.name is None:
            return {}
        shaped = real.view(real.shape[0], *self.shape, real.shape[1])
        if self.kind == "additive":
            return {self.name: torch.zeros(shaped.shape, dtype=dtype).masked_fill(~shaped.cpu(), -1e4).to(real.device)}
        value = shaped if self.keep else ~shaped
        return {self.name: value if self.kind == "bool" else value.long()}

    def code(self, real: str) -> str:
        """Return the expression for that argument, made from the name of a tensor that says what is real."""
        axes = f".view(len({real}), {', '.join(map(str, (*self.shape, -1)))})" if self.shape else ""
        if self.kind == "additive":
            return f"torch.zeros({real}.shape).masked_fill(~{real}, -1e4){axes}"
        value = f"{real}{axes}" if self.keep else f"(~{real}){axes}"
        return value if self.kind == "bool" else f"{value}.long()"


@dataclass(frozen=True)
class Padded:
    """A batch of two texts, padded on the right and on the left, and a way of masking it."""

    inputs: dict[str, Tensor]
    real: Tensor
    """``(2, seq)``, True for real tokens."""
    mask: Mask


def masks_of(adapter: ModelAdapter) -> Iterator[Mask]:
    """Yield the ways of masking that a model may understand, the likeliest first."""
    names = adapter.argument_names
    name = next((name for name in (*KEEPING, *EITHER) if name in names), None)
    if name is None:
        if adapter.pad_token_id.value is not None:
            yield Mask(None)
        return
    for keep in (False, True) if name not in KEEPING and "pad" in name else (True, False):
        for kind in ("bool", "long") if name in EITHER else ("long", "bool"):
            yield Mask(name, keep, kind)
    if name in EITHER:
        for shape in ((1,), (1, 1)):
            yield from (Mask(name, keep, "bool", shape) for keep in (True, False))
        yield from (Mask(name, True, "additive", shape) for shape in ((), (1, 1)))


def padding_lines(
    adapter: ModelAdapter, padded: Padded, filler: int, what: str, shape: tuple[int, ...], leak: float = 0.0
) -> str:
    """Return lines that pad a batch as the check does and print what the padding moves.

    Args:
        adapter: The model.
        padded: The batch; where its first text is hidden whole, the second counts.
        filler: The id that fills up.
        what: ``"ids"`` (others under the mask), ``"amount"`` (against the bare text), ``"output"`` or ``"gradient"``
            (is it finite).
        shape: Of the logits.
        leak: How much they move; infinity where they get another shape.
    """
    real, mask, name = padded.real, padded.mask, adapter.main_input
    length, given = real.shape[1], int(real[0].sum())
    blank = f"k[0, {given}:] = k[1, :{length - given}]" if given else "k[0]"
    made = f"k = (i := x[{name!r}]) >= 0; {blank} = False"
    made += f"; x[{name!r}] = torch.where(k, i, {filler})"
    made += f"; x[{mask.name!r}] = {mask.code('k')}" if mask.name else ""
    kept = _kept_code(adapter, shape, length, given)
    if what == "output":
        shown = f"print('finite:', a.logits(x){kept}.isfinite().all())"
    elif what == "gradient":
        bad = "[n for n, p in m.named_parameters() if p.grad is not None and p.grad.isnan().any()]"
        shown = f"a.logits(x){kept}.sum().backward(); print('NaN in', {bad}[:3])"
    elif what == "amount":
        shown = f"k = k[:1, :{given}]; z = {{**a.example_inputs(1, {given}), {name!r}: x[{name!r}][:1, :{given}]}}"
        shown += f"; z[{mask.name!r}] = {mask.code('k')}" if mask.name else ""
        target = content_input(adapter)
        shown += f"; z[{target!r}] = x[{target!r}][:1]" if target != name else ""
        part = f"[:1, :{given}]" if shape[1:2] == (length,) and target == name else "[:1]"
        shown += f"; print((a.logits(x){part} - a.logits(z)).abs().max())"
    elif mask.name is None:
        table = next((use.name for use in adapter.tables if use.reads_tokens), "")
        weight = f"{table}.weight" if table else "weight"
        other = f"w[{filler}] = torch.randn_like(w[{filler}])"
        # The head may share the table; the padding id's own score may then change.
        others = f"[..., torch.arange({shape[-1]}) != {filler}]" if shape[-1] == adapter.vocab_size.value else ""
        shown = f"y = a.logits(x); w = m.get_parameter({weight!r}).data; {other}"
        shown += f"; print((a.logits(x) - y){kept}{others}.abs().max())"
    else:
        hidden = f"torch.where(k, i, (i + 1) % {max(2, adapter.readable_ids())})"
        shown = f"y = a.logits({{**x, {name!r}: {hidden}}})"
        moved = "a.logits(x).shape, y.shape" if leak == math.inf else f"(a.logits(x) - y){kept}.abs().max()"
        shown += f"; print({moved})"
    return fitted(f"{opening(adapter, length)}\n{made}; {shown}")


def _kept_code(adapter: ModelAdapter, shape: tuple[int, ...], length: int, given: int) -> str:
    """Return the index of what padding must not touch in logits of a shape; see `padding._kept`."""
    if not given:
        return "[1:]"
    if adapter.task.value == "seq2seq":
        return ""
    if shape[:2] == (2, length):
        return "[k]"
    if len(shape) == 3 and 1 < shape[1] < length:
        return f"[:1, :{max(1, shape[1] * given // length - 1)}]"
    return "[:1]"
