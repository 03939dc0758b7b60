"""Do attention weights choose among keys, from scores of the right size? Read off the arithmetic, not off results.

A softmax along the wrong axis is proved by the product that follows: weights that sum to one along one axis are summed
with values along another. A missing scale is proved by following constants: queries and keys leave linear layers, and
nothing divides their product by the root of their length (Vaswani et al., 2017, section 3.2.1). At initialization small
weights hide that, so the size of the scores proves nothing by itself.
"""

import math
import re
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from utils.adapters.attention import AttentionCall, describe_attention
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.provenance import traced
from utils.adapters.traces import Contraction, Softmax
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.probing import has_length, logits, short_length

BATCH = 3
SMALLEST_WIDTH = 3
LARGEST_SCALE = 0.9
"""A product that is multiplied by this or more is not scaled at all."""
STATED_SCALE = re.compile(r"scal|multiplier|temperature|alpha", re.IGNORECASE)
SINGLE = "which has a single element"
SCALE_HINT = (
    "Divide the scores by the square root of the head's width before the softmax: q @ k.transpose(-2, -1) / "
    "math.sqrt(q.shape[-1]), or leave out scale= in scaled_dot_product_attention."
)
AXIS_HINT = "Take the softmax along the axis of the keys, which is the one that is then summed with the values: dim=-1."
SCALE_REPRODUCTION = """\
from utils.adapters import ModelAdapter; from utils.adapters.attention import record_attention
adapter = ModelAdapter(model)
print([(a.where, a.scale) for a in record_attention(model, lambda: adapter.logits(adapter.example_inputs()))])"""
AXIS_REPRODUCTION = """\
from utils.adapters import ModelAdapter; from utils.adapters.attention import record_attention
adapter = ModelAdapter(model)
print([a.weights.sum(-1) for a in record_attention(model, lambda: adapter.logits(adapter.example_inputs()))])"""


def check_attention_arithmetic(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Follow one forward pass and judge the axis of every softmax and the scale of every attention.

    Codes: ``wrong_softmax_dim`` and ``missing_attention_scale``. The scale is not judged where queries or keys are
    normalised, scores are bounded, a temperature is learned, the config states it, the operands do not both leave
    linear layers (as in attention over recurrent states), or the initialization absorbs it (T5). It only warns where
    the scores carry a learned bias, or where queries and keys are cast up for the product, as GPT-Neo does on purpose.
    """
    length = short_length(adapter) if has_length(adapter) else None
    inputs = adapter.example_inputs(BATCH, length)
    sizes = {BATCH, *(t.shape[1] for t in inputs.values() if isinstance(t, Tensor) and t.dim() in (2, 3))}
    misplaced: dict[str, str] = {}
    scales: dict[str, dict[str, Any]] = {}
    judged: WeakSet[Softmax] = WeakSet()

    def report(contraction: Contraction) -> None:
        softmax = contraction.softmax
        if softmax.where not in misplaced and (message := misplacement(contraction, sizes)):
            misplaced[softmax.where] = message
        if softmax in judged:
            return
        judged.add(softmax)
        if (call := describe_attention(softmax, BATCH)) is not None:
            verdict = scale_fault(call, adapter.config)
            if call.where not in scales or verdict[0]:
                scales[call.where] = {"scale": call.scale, "head_dim": call.head_dim, "fault": verdict}

    with traced(adapter.module, report) as tracer:
        output = logits(adapter, inputs)
        final = tracer.trace(output)
    if not tracer.softmaxes and not scales:
        raise Skipped("no softmax and no attention was seen in a forward pass")
    last = None if final is None else final.softmax or final.logarithm
    if last is not None and (message := output_misplacement(last, output)):
        misplaced.setdefault(last.where, message)
    for where, message in over_batch(adapter, tracer.softmaxes, length).items():
        misplaced.setdefault(where, message)
    # Pooling over a single element happens once, at the end. Inside repeated blocks it is odd, but SwiftFormer, which
    # others use with success, has it.
    single = [where for where, message in misplaced.items() if SINGLE in message]
    findings = [
        Finding(
            "wrong_softmax_dim", "warn" if where in single and len(single) > 1 else "fail", where or adapter.name,
            message, AXIS_HINT, AXIS_REPRODUCTION,
        )
        for where, message in misplaced.items()
    ]  # fmt: skip
    findings += _scale_findings(adapter, scales)
    ratios = [row["scale"] * row["head_dim"] ** 0.5 for row in scales.values() if row["scale"] and row["head_dim"]]
    why = f"{len(scales)} attentions and {len(tracer.softmaxes)} softmaxes: each along the axis that is then summed"
    details = {where or adapter.name: {key: row[key] for key in ("scale", "head_dim")} for where, row in scales.items()}
    return Outcome(max(ratios, default=None), 1.0, why, findings, {"attentions": details})


def misplacement(contraction: Contraction, sizes: set[int]) -> str:
    """Describe a softmax along another axis than the one that is summed with values; empty if it is the same.

    Args:
        contraction: Weights as they are used. Weights that were changed since their softmax prove nothing.
        sizes: Sizes of the batch and of the sequences. Outside of attention with projected queries and keys, only a
            softmax along one of these, or along a single element, is certainly a mistake: in capsules and slots,
            others compete on purpose.
    """
    softmax, weights = contraction.softmax, contraction.weights.float()
    if not contraction.exact or not bool(torch.isfinite(weights).all()):
        return ""
    tolerance = 1e-3 if contraction.weights.dtype in (torch.float32, torch.float64) else 0.05
    for axes in {contraction.axes, *((axis,) for axis in contraction.axes)}:
        sums = weights.sum(axes)
        if bool((((sums - 1).abs() < tolerance) | (sums.abs() < tolerance)).all()):
            return ""
    size = softmax.weights.shape[softmax.dim]
    product = softmax.scores.product
    attention = product is not None and product.projected and not contraction.multiplied
    if size != 1 and not attention and size not in sizes:
        return ""
    sums = weights.sum(contraction.axes)
    summed = " and ".join(str(axis) for axis in contraction.axes)
    alone = f", {SINGLE}" if size == 1 else ""
    return (
        f"softmax along axis {softmax.dim} of {tuple(softmax.weights.shape)}{alone}, but the values are summed along "
        f"axis {summed} of {tuple(weights.shape)}, where the weights sum to {float(sums.min()):.3g} to "
        f"{float(sums.max()):.3g} instead of 1"
    )


def output_misplacement(softmax: Softmax, output: Tensor) -> str:
    """Describe probabilities that sum to one over samples or positions instead of classes; empty if they do not."""
    shape, axis = tuple(softmax.weights.shape), softmax.dim
    time = len(shape) == 3 and axis == -2 and output.shape[-1:] == shape[-1:] and output.shape[1:2] == shape[1:2]
    if axis == -len(shape) and len(shape) > 1 and shape[0] % BATCH == 0:
        over = "samples"
    elif time and shape[1] != shape[2] and output.shape[0] == BATCH:
        over = "positions"
    else:
        return ""
    return f"the output {tuple(output.shape)} is a softmax along axis {axis} of {shape}: it sums to one over {over}"


def over_batch(
    adapter: ModelAdapter, seen: list[tuple[str, int, tuple[int, ...]]], length: int | None
) -> dict[str, str]:
    """Return modules that take a softmax along the batch, proved by a second pass with fewer samples."""
    suspects = {
        (where, index): shape[0]
        for index, (where, axis, shape) in enumerate(seen)
        if len(shape) > 1 and axis == -len(shape) and shape[0] % BATCH == 0
    }
    if not suspects:
        return {}
    with traced(adapter.module, lambda contraction: None) as tracer:
        logits(adapter, adapter.example_inputs(BATCH - 1, length))
    found: dict[str, str] = {}
    for (where, index), size in suspects.items():
        again = tracer.softmaxes[index] if len(tracer.softmaxes) == len(seen) else None
        if again is not None and again[0] == where and again[2][0] * BATCH == size * (BATCH - 1):
            found[where] = (
                f"softmax along axis 0 of {seen[index][2]}, which is the batch: with {BATCH - 1} samples instead of "
                f"{BATCH} it has {again[2][0]} entries instead of {size}"
            )
    return found


def scale_fault(call: AttentionCall, config: dict[str, Any]) -> tuple[str, str]:
    """Judge the constant that scores are multiplied with.

    Returns:
        Severity and message; both empty when the scale is as it should be or cannot be judged.
    """
    scale, width = call.scale, call.head_dim
    if scale is None or width is None or width < SMALLEST_WIDTH or call.bounded or not call.projected:
        return "", ""
    if scale < LARGEST_SCALE or not _forgotten(scale, width) or _stated(scale, config) or _absorbed(call, width):
        return "", ""
    wanted = f"1/sqrt({width}) = {width**-0.5:.3g}"
    if scale > 1.1:
        found = f"the product of queries and keys is multiplied by {scale:.3g} where {wanted} is expected"
    else:
        found = f"nothing scales the product of queries and keys (factor {scale:.3g}, expected {wanted})"
    message = f"{found}: with inputs of unit variance the scores have a standard deviation of {scale * width**0.5:.3g}"
    if call.biased:
        return "warn", f"{message}; a learned bias is added to them, as in T5, which scales its initial weights instead"
    if call.upcast:
        return "warn", f"{message}; both are cast to float32 first, so it may be on purpose"
    return "fail", message


def _forgotten(scale: float, width: int) -> bool:
    """Tell whether a factor is a scale left out or turned round; any other is a temperature that somebody chose.

    Turned round is a multiplication by the root of a width: of the head, or of the model, a multiple of it.
    """
    heads = scale * scale / width
    return scale < 1.1 or (heads > 0.9 and abs(heads - round(heads)) < 0.01 * heads) or math.isclose(scale, width)


def _absorbed(call: AttentionCall, width: int) -> bool:
    """Tell whether queries leave their layer smaller than keys by about the root of their width, as in a fresh T5.

    That is, by a factor that is nearer to one over the root than to one, in proportion and within a tenth: biases, and
    few positions, let it vary.
    """
    if call.query is None or call.key is None or call.scale != call.late_scale:
        return False
    # Padding of keys and queries, as in local attention, has length zero and says nothing.
    lengths = (part.norm(dim=-1) for part in (call.query, call.key))
    sizes = sorted(float(length[length > 0].median()) if bool(length.any()) else 0.0 for length in lengths)
    return sizes[0] <= 1.1 * width**-0.25 * sizes[1]


def _stated(scale: float, config: dict[str, Any]) -> bool:
    """Tell whether the config, or a part of it, states this factor."""
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(
        STATED_SCALE.search(str(key)) and isinstance(value, (int, float)) and not isinstance(value, bool)
        and math.isclose(value, scale, rel_tol=1e-3)
        for place in places for key, value in place.items()
    )  # fmt: skip


def _scale_findings(adapter: ModelAdapter, scales: dict[str, dict[str, Any]]) -> list[Finding]:
    """Make one finding of all modules with the same fault: it is one line of code."""
    findings = []
    for severity in ("fail", "warn"):
        rows = [(where, row["fault"][1]) for where, row in scales.items() if row["fault"][0] == severity]
        if rows:
            where, message = rows[0]
            more = f" (and {len(rows) - 1} more like it)" if len(rows) > 1 else ""
            findings.append(
                Finding(
                    "missing_attention_scale", severity, where or adapter.name, message + more, SCALE_HINT,
                    SCALE_REPRODUCTION,
                )
            )  # fmt: skip
    return findings
