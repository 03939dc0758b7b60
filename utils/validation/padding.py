"""Does padding stay outside? What lies under the mask, and how much of it there is, must not reach real positions.

The content under the mask is changed in two ways: by other ids, and, since models may read masks or positions off the
padding id itself, by another vector in the padding id's row of the token table. Both sides of the text are tried. Left
padding is held only to this: where positions are absolute it rightly moves the text. Right padding must also be without
effect as such, so a padded text is compared with the bare one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors
from utils.adapters.detection import embedding_uses
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.seeding import seed_streams
from utils.validation.batch_independence import mixes_samples
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.dependence import (
    attends,
    bounded_length,
    first_leak,
    least_plain,
    output_of,
    relative,
    replace_ids,
)
from utils.validation.padding_masks import KEEPING, Mask, Padded, masks_of, padding_lines
from utils.validation.probing import ModelCrash, content_input, first_nonfinite, guarded
from utils.validation.substitution import parameters_as

LENGTH, PADS = 13, 4
LEAST_AMOUNT, PLAIN_AMOUNT = 0.05, 0.3
"""Models that shorten or pool their text in windows move with its padded length by design: by 0.01 to 0.2."""
HINT = (
    "Use the mask wherever positions mix: scores.masked_fill(mask == 0, -inf) before the softmax, "
    "src_key_padding_mask=(mask == 0) in nn.Transformer, and sums over real positions only when pooling."
)
INVERTED_HINT = (
    "Turn the mask round: it is 1 for real tokens; masked_fill and nn.Transformer's key_padding_mask want True where "
    "nothing is to be seen (mask == 0), scaled_dot_product_attention wants True where something is."
)
NAN_HINT = (
    "Give fully masked rows something finite: use torch.finfo(dtype).min instead of -inf, or zero the result with "
    "nan_to_num before it meets a weight; divide masked means by mask.sum().clamp(min=1)."
)


def check_padding(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Change what lies under the mask and how much, and require real positions to keep their output.

    Codes: ``padding_leakage``, ``nan_padding``.
    """
    length = bounded_length(adapter, LENGTH)
    if length is None:
        raise Skipped("the input is no sequence of tokens")
    if adapter.task.value in ("image_classification", "audio_classification", "tabular_classification"):
        raise Skipped(f"tokens of a kind that is not padded ({adapter.task.value}: {adapter.task.reason})")
    pads = min(PADS, length - 2)
    if pads < 1:
        raise Skipped(f"texts of {length} tokens leave no room for padding")
    ids, filler = _texts(adapter, length)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, length - pads :] = False
    real[1, :pads] = False
    ids = torch.where(real, ids, filler)
    tried: list[tuple[Padded, float]] = []
    reasons: list[str] = []
    notes: list[str] = []
    for mask in masks_of(adapter):
        padded = Padded(_with_mask(adapter, ids, real, mask), real, mask)
        try:
            base = logits(adapter, padded.inputs)
        except ModelCrash as crash:
            reasons.append(str(crash))
            continue
        if mask.name is None and not _reads_padding(adapter, padded, base):
            raise Skipped("forward takes no mask, and the padding id is a token like any other to it")
        if not bool(torch.isfinite(_kept(adapter, base, real)).all()):
            tried.append((padded, float("nan")))
            continue
        tried.append((padded, _leak(adapter, padded, base, filler, notes)))
        if tried[-1][1] == 0:
            break
    if not tried:
        what = f"no way of passing the mask runs ({reasons[0]})" if reasons else "forward takes no mask of tokens"
        raise Skipped(what)
    return _judge(adapter, tried, filler, notes)


def logits(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits as training computes them, without their graph.

    Without gradients `nn.TransformerEncoder` takes a shorter way, whose NaN in wholly masked rows training never sees.
    """

    def call() -> Tensor:
        seed_streams(0, "forward")
        with torch.enable_grad():
            return adapter.logits(inputs).detach()

    result: Tensor = guarded(adapter, inputs, "", call)
    return result


def _judge(adapter: ModelAdapter, tried: list[tuple[Padded, float]], filler: int, notes: list[str]) -> Outcome:
    """Judge by the way of masking that the model honours, or by the usual one where it honours none."""
    first = next((item for item in tried if item[0].mask.kind != "additive"), tried[0])
    padded, leak = next((item for item in tried if item[1] == 0), first)
    name = padded.mask.name or "padding id"
    details = {"mask": name, "one_means": "real" if padded.mask.keep else "padding", "change": leak}
    inverted = leak == 0 and not padded.mask.keep and padded.mask.name in KEEPING
    if inverted:
        padded, leak = first
    if leak != leak:
        if not bool(torch.isfinite(logits(adapter, _all_real(adapter, padded))).all()):
            raise Skipped("the logits are not finite without padding either (see numerical_stability)")
        return Outcome(leak, "finite", "", [_nan_finding(adapter, padded, filler, "at real positions")], details)
    found = _padding_finding(adapter, padded, filler, leak, inverted) if leak or inverted else None
    if found is None and not inverted:
        found = _nan_anywhere(adapter, padded, filler)
        if found is None and not leak:
            found = _amount(adapter, padded, filler, notes)
    if found is not None and found.code == "padding_leakage" and mixes_samples(adapter):
        raise Skipped("samples influence one another (see batch_independence), and so does their padding")
    sense = "" if padded.mask.keep else ", where 1 means padding"
    why = "; ".join([f"nothing under `{name}`{sense} reaches a real position", *notes])
    return Outcome(leak, 0, why, [found] if found else (), details)


def _texts(adapter: ModelAdapter, length: int) -> tuple[Tensor, int]:
    """Return two texts and an id to fill them up with, which is not among their tokens."""
    ids = adapter.example_inputs(2, length)[adapter.main_input]
    top = max(2, adapter.readable_ids())
    padding = adapter.pad_token_id.value
    filler = padding if padding is not None and padding < top else 0
    return torch.where(ids == filler, (ids + 1) % top, ids), filler


def _with_mask(adapter: ModelAdapter, ids: Tensor, real: Tensor, mask: Mask) -> dict[str, Tensor]:
    """Return inputs with these ids and this mask."""
    dtype = next((p.dtype for p in adapter.module.parameters() if p.is_floating_point()), torch.float32)
    given = adapter.example_inputs(*ids.shape)
    return {**given, adapter.main_input: ids, **mask.argument(real, dtype)}


def _all_real(adapter: ModelAdapter, padded: Padded) -> dict[str, Tensor]:
    """Return the same ids with a mask that hides nothing."""
    everything = torch.ones_like(padded.real)
    return _with_mask(adapter, padded.inputs[adapter.main_input], everything, padded.mask)


def _kept(adapter: ModelAdapter, result: Tensor, real: Tensor) -> Tensor:
    """Return the part of the logits that padding must not touch.

    Where there are positions, the real ones. One answer per text may rightly be read off its first token, which left
    padding turns into padding, so there only the text padded on the right counts.
    """
    if adapter.task.value != "seq2seq":
        if result.shape[:2] == real.shape:
            return result[real.to(result.device)]
        if not bool(real[0].all()) and bool(real[0].any()):
            length, given = real.shape[1], int(real[0].sum())
            if result.dim() == 3 and 1 < result.shape[1] < length:
                # A shortened text: the first positions, which end well before the padding begins.
                return result[:1, : max(1, result.shape[1] * given // length - 1)]
            return result[:1]
    return result


def _leak(adapter: ModelAdapter, padded: Padded, base: Tensor, filler: int, notes: list[str]) -> float:
    """Return how far the content under the mask moves real outputs, beside their size; 0 for no more than rounding.

    Infinity means another shape. Notes are taken of what was not held against the model.
    """
    name = adapter.main_input
    other = replace_ids(adapter, name, padded.inputs[name])
    ids = torch.where(padded.real, padded.inputs[name], other)
    before = _kept(adapter, base, padded.real)
    if adapter.pad_token_id.value is None or padded.mask.name is not None:
        after = _kept(adapter, logits(adapter, {**padded.inputs, name: ids}), padded.real)
        if _moved(before, after) == 0:
            return 0.0
        if before.shape != after.shape:
            if _shape_follows(adapter, padded, filler):
                return math.inf
            notes.append("other ids there change the output's shape, as where texts are cut at the padding id")
    # Other ids may also have moved positions that the model counts from the padding id; another vector moves nothing.
    if (tables := _token_tables(adapter, padded.inputs)) is None:
        return _moved(before, after) if adapter.pad_token_id.value is None else 0.0
    with _other_vector(adapter, tables, filler):
        after = _kept(adapter, logits(adapter, padded.inputs), padded.real)
    if before.shape[-1] == (adapter.vocab_size.value or 0) > filler:
        # The head may share the table; the padding id's own score may then change.
        columns = torch.arange(before.shape[-1], device=before.device) != filler
        before, after = before[..., columns], after[..., columns]
    return _moved(before, after)


def _shape_follows(adapter: ModelAdapter, padded: Padded, filler: int) -> bool:
    """Tell whether the output's shape differs between ids under the mask none of which can be the padding id."""
    name, top = adapter.main_input, adapter.readable_ids()
    known = {0, 1, filler, adapter.pad_token_id.value}
    shapes = set()
    for other in [
        i for i in dict.fromkeys((top - 1, top - 2, top - 5, top // 2, top // 3)) if i > 0 and i not in known
    ]:
        ids = torch.where(padded.real, padded.inputs[name], other)
        shapes.add(tuple(logits(adapter, {**padded.inputs, name: ids}).shape))
    return len(shapes) > 1


def _moved(before: Tensor, after: Tensor) -> float:
    """Return the relative change, 0 where rounding explains it and infinity where the shape is another."""
    if before.shape != after.shape:
        return math.inf
    if not bool(torch.isfinite(after).all()):
        return float("nan")
    size = relative(float((after - before).abs().max()), before)
    return size if size > 64 * torch.finfo(before.dtype).eps else 0.0


def _token_tables(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> list[str] | None:
    """Return the weights of the tables that read the token ids; None when none was seen."""
    uses = embedding_uses(adapter.module, lambda: logits(adapter, inputs), dict(inputs), adapter.main_input)
    names = [f"{use.name}.weight" if use.name else "weight" for use in uses if use.reads_tokens]
    return names or None


def _other_vector(adapter: ModelAdapter, tables: list[str], row: int) -> Any:
    """Let a row of tables hold another vector inside a block."""

    def make(weight: Tensor) -> Tensor:
        changed = weight.clone()
        drawn = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(3)).to(weight)
        changed[row] = drawn * (2 * float(weight.float().std()) or 1.0)
        return changed

    return parameters_as(adapter, tables, make)


def _reads_padding(adapter: ModelAdapter, padded: Padded, base: Tensor) -> bool:
    """Tell whether a model treats the padding id unlike an id with the same vector: then it makes a mask from it."""
    tables = _token_tables(adapter, padded.inputs)
    pad = adapter.pad_token_id.value
    top = adapter.readable_ids()
    if tables is None or pad is None or pad >= top or top < 3:
        return False
    ids = padded.inputs[adapter.main_input]
    unused = next((i for i in range(top) if i != pad and not bool((ids == i).any())), None)
    if unused is None:
        return False

    def same_rows(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[unused] = changed[pad]
        return changed

    with parameters_as(adapter, tables, same_rows):
        first = logits(adapter, padded.inputs)
        second = logits(adapter, {**padded.inputs, adapter.main_input: torch.where(ids == pad, unused, ids)})
    first, second = (_kept(adapter, result, padded.real) for result in (first, second))
    if not bool(torch.isfinite(first).all()):
        return bool(torch.isfinite(second).all())
    return _moved(first, second) > 0


def _part(real: Tensor) -> Callable[[Tensor, bool], Tensor | None]:
    """Return what takes the real positions of a tensor, with samples or time first, folded, or channels before time."""
    batch, length = real.shape

    def part(tensor: Tensor, given: bool) -> Tensor | None:
        shape, places = tuple(tensor.shape), real.to(tensor.device)
        if shape[:2] == (batch, length):
            return tensor[places]
        if shape[:2] == (length, batch):
            return tensor.transpose(0, 1)[places]
        if shape[:1] == (batch * length,):
            return tensor[places.flatten()]
        if len(shape) > 2 and shape[0] == batch and shape[-1] == length and shape[-2] != length:
            return tensor.movedim(-1, 1)[places]
        if len(shape) == 4 and shape[0] == batch and shape[-2] == length:
            return tensor.movedim(-2, 1)[places]
        # A final state has read everything, rightly; what is made of it counts elsewhere.
        return tensor if given or shape[:1] == (batch,) else None

    return part


def _padding_finding(adapter: ModelAdapter, padded: Padded, filler: int, leak: float, inverted: bool) -> Finding | None:
    """Describe a leak by the module where it starts; None where convolution or recurrence has it by nature."""
    name, inputs = adapter.main_input, padded.inputs
    other = torch.where(padded.real, inputs[name], replace_ids(adapter, name, inputs[name]))
    if adapter.task.value != "seq2seq" and logits(adapter, inputs).shape[:2] != padded.real.shape:
        # Of one answer per text only that of the text padded on the right counts; the other must not lead astray.
        other = torch.cat([other[:1], inputs[name][1:]])
    where = first_leak(adapter, inputs, {**inputs, name: other}, _part(padded.real), leak)
    attending = attends(adapter, inputs, (padded.real.shape[1],), where)
    if not inverted and not attending and _by_nature(adapter, padded, other, where):
        return None
    argument = f"`{padded.mask.name}`" if padded.mask.name else "the mask made from the padding id"
    lines = padding_lines(adapter, padded, filler, "ids", tuple(logits(adapter, inputs).shape), leak)
    if inverted:
        message = f"{argument} is inverted: tokens where it is 0 are seen, and those where it is 1 are hidden"
        return Finding("padding_leakage", "fail", where, message, INVERTED_HINT, lines)
    moved = f"logits at real positions (by {leak:.2g} of the largest logit)" if leak < math.inf else "logits' shape"
    message = f"tokens that {argument} hides change the {moved}"
    # Recurrences and other mixers without a softmax honour a mask only with packing or zeros, which not all aim at.
    severity = "fail" if attending or where == adapter.name or _summarises(adapter, inputs, where) else "warn"
    return Finding("padding_leakage", severity, where, message, HINT, lines)


def _summarises(adapter: ModelAdapter, inputs: Mapping[str, Tensor], where: str) -> bool:
    """Tell whether a module makes one vector of a text: no output of its has positions."""
    length = inputs[adapter.main_input].shape[1]
    try:
        return length not in output_of(adapter, inputs, where).shape
    except LookupError:
        return False


def _by_nature(adapter: ModelAdapter, padded: Padded, other: Tensor, where: str) -> bool:
    """Tell whether a leak comes from a recurrence after left padding or a convolution across the border.

    Neither can honour a mask; what they carry over is known and small, and sound models are built so. Attention can,
    and so can whatever makes one vector of a text.
    """
    before, after = (logits(adapter, {**padded.inputs, adapter.main_input: ids})
                     for ids in (padded.inputs[adapter.main_input], other))  # fmt: skip
    if before.shape != after.shape:
        return False
    if adapter.task.value == "causal_lm" and before.shape[:2] == padded.real.shape:
        return _moved(before[0][padded.real[0]], after[0][padded.real[0]]) == 0
    if where == adapter.name:
        return False
    # Across a border only: the real positions farthest from the padding keep what the module gives them.
    far = torch.zeros_like(padded.real)
    far[0, 0] = far[1, -1] = True
    child = adapter.module.get_submodule(where)
    if isinstance(child, (nn.Conv1d, nn.Conv2d)):
        return True
    taken: list[list[Tensor]] = []

    def note(module: nn.Module, given: Any, output: Any) -> None:
        parts = (_part(far)(tensor, False) for _, tensor in named_tensors(output) if tensor.is_floating_point())
        taken.append([part.detach().clone() for part in parts if part is not None])

    handle = child.register_forward_hook(note)
    try:
        for ids in (padded.inputs[adapter.main_input], other):
            logits(adapter, {**padded.inputs, adapter.main_input: ids})
    finally:
        handle.remove()
    half = len(taken) // 2
    if not half or len(taken) % 2 or len(taken[0]) != len(taken[half]):
        return False
    return all(a.shape == b.shape and _moved(a, b) == 0 for a, b in zip(taken[0], taken[half], strict=True))


def _amount(adapter: ModelAdapter, padded: Padded, filler: int, notes: list[str]) -> Finding | None:
    """Compare a text padded on the right with the bare text; None where they agree."""
    length = padded.real.shape[1]
    bare = int(padded.real[0].sum())
    # A seq2seq model that makes its target from its source reads other targets here.
    own_target = adapter.task.value == "seq2seq" and content_input(adapter) == adapter.main_input
    if adapter.legal_length(bare) != bare or own_target:
        return None
    ids = padded.inputs[adapter.main_input]
    short = torch.stack([ids[0, :bare], ids[1, length - bare :]])
    bare_inputs = _with_mask(adapter, short, torch.ones_like(short, dtype=torch.bool), padded.mask)
    if adapter.task.value == "seq2seq":
        bare_inputs[content_input(adapter)] = padded.inputs[content_input(adapter)]
    try:
        alone = logits(adapter, bare_inputs)
    except ModelCrash:
        return None
    together = logits(adapter, padded.inputs)
    if alone.shape != together.shape and together.shape[1:2] == (length,):
        together = torch.stack([together[0, :bare], together[1, length - bare :]])
    if alone.shape != together.shape:
        notes.append(f"padded and bare texts, whose logits have other shapes ({tuple(together.shape)} and "
                     f"{tuple(alone.shape)}), were not compared")  # fmt: skip
        return None
    if not bool(torch.isfinite(alone).all()):
        return None
    right, left = (relative(float((alone[i] - together[i]).abs().max()), alone) for i in (0, 1))
    # A model that reads a text's last token may be made for padding on the left, where it must then change nothing.
    least = 10 * least_plain(alone.dtype)
    if right <= max(LEAST_AMOUNT, least) or (alone.dim() == 2 and left <= 256 * torch.finfo(alone.dtype).eps):
        return None
    message = (
        f"{length - bare} padding tokens on the right, hidden by the mask, change the logits by {right:.2g} of the "
        f"largest, whatever they hold"
    )
    plain = right > PLAIN_AMOUNT or not attends(adapter, padded.inputs, (length,))
    lines = padding_lines(adapter, padded, filler, "amount", tuple(logits(adapter, padded.inputs).shape))
    return Finding("padding_leakage", "fail" if plain else "warn", adapter.name, message, HINT, lines)


def _nan_anywhere(adapter: ModelAdapter, padded: Padded, filler: int) -> Finding | None:
    """Find NaN that padding makes, where it reaches another sample or the gradient of the loss over real positions."""
    blank = padded.real.clone()
    blank[0], blank[1] = False, True
    ids = padded.inputs[adapter.main_input]
    filled = torch.where(blank, ids, filler)
    whole = Padded(_with_mask(adapter, filled, blank, padded.mask), blank, padded.mask)
    for case, situation in ((padded, "by left padding"), (whole, "by a fully padded row")):
        inputs, real = case.inputs, case.real
        try:
            result = logits(adapter, inputs)
        except ModelCrash:
            continue
        if bool(torch.isfinite(result).all()):
            continue
        rows = result[1:] if real is blank else _kept(adapter, result, real)
        if not bool(torch.isfinite(rows).all()):
            return _nan_finding(adapter, case, filler, f"in real outputs, {situation}")
        if _poisons(adapter, inputs, real, real is blank):
            return _nan_finding(adapter, case, filler, f"in the gradient of the loss over real positions, {situation}")
    return None


def _poisons(adapter: ModelAdapter, inputs: Mapping[str, Tensor], real: Tensor, second_row: bool) -> bool:
    """Tell whether the gradient of a loss over real outputs alone is NaN."""
    weights = [p for p in adapter.module.parameters() if p.requires_grad]
    seed_streams(0, "forward")
    with torch.enable_grad():
        result = adapter.logits(inputs)
        kept = result[1:] if second_row else _kept(adapter, result, real)
        if not kept.requires_grad or not weights:
            return False
        gradients = torch.autograd.grad(kept.float().square().mean(), weights, allow_unused=True)
    return any(bool(torch.isnan(gradient).any()) for gradient in gradients if gradient is not None)


def _nan_finding(adapter: ModelAdapter, padded: Padded, filler: int, situation: str) -> Finding:
    """Name the first module that gives NaN for a padded batch."""
    where = first_nonfinite(adapter, padded.inputs)
    what = "gradient" if "gradient" in situation else "output"
    lines = padding_lines(adapter, padded, filler, what, tuple(logits(adapter, padded.inputs).shape))
    message = f"NaN {situation}; it first appears in `{where}`, where a whole row is masked"
    return Finding("nan_padding", "fail", where, message, NAN_HINT, lines)
