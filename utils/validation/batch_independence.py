"""Does one sample influence another at inference? Proof: change every second sample and look at the rest.

Half of the samples change and the others must keep every output exactly; that finds means and softmaxes over the batch,
normalisation by the batch, swapped axes, and capacity that early samples take from late ones. A sample alone must also
give what it gives in a batch, up to rounding; that finds what depends on the place in the batch and not on the others.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.adapters.capture import named_tensors
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.isolation import preserved
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.dependence import (
    bounded_length,
    first_leak,
    is_real,
    least_plain,
    measures,
    other_content,
    outputs,
    relative,
    sample_inputs,
)
from utils.validation.probing import ModelCrash, compares_samples, has_length

LENGTH = 9
HINT = (
    "Keep the batch out of every mean, softmax, norm and reshape: check dim= and the order of axes "
    "(batch_first=True for nn.LSTM, nn.GRU, nn.MultiheadAttention and nn.Transformer on batch-first data), "
    "and let normalisation use running statistics in eval mode."
)
ALONE_HINT = (
    "Use nothing that depends on the batch's size or a sample's place in it: index positions by time, not by row."
)


def check_batch_independence(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Replace every second sample and require all outputs of the others to stay as they are.

    Code: ``batch_leakage``.
    """
    if not adapter.batched:
        raise Skipped(f"no axis of samples: {adapter.input_reason}")
    size, inputs, base = _base(adapter)
    changed = {name: _odd_replaced(adapter, name, value, size) for name, value in inputs.items()}
    if all(changed[name] is inputs[name] or bool((changed[name] == inputs[name]).all()) for name in inputs):
        raise Skipped("no other content for the input is known")
    other = outputs(adapter, changed)
    alone = _alone(adapter, inputs, size)
    logits_path = adapter.output.value or ""
    largest, allowed, tested = 0.0, 0.0, []
    for path in sorted(base, key=lambda path: path != logits_path):
        rows = _rows(base[path], alone.get(path), size)
        if rows is None or path not in other or other[path].shape != base[path].shape:
            continue
        first, second = rows(base[path])[::2], rows(other[path])[::2]
        if not bool(torch.isfinite(first).all()) or not bool(torch.isfinite(second).all()):
            continue
        tested.append(path or "the output")
        change = float((second - first).abs().max()) if first.numel() else 0.0
        largest, allowed = max(largest, change), max(allowed, _tolerance(first))
        if change > 0 and _leaks(adapter, inputs, changed, path, rows, first, second):
            details = {"batch": size, "output": path or "the output", "change": change}
            finding = _finding(adapter, inputs, changed, path, first, second, size)
            return Outcome(change, _tolerance(first), "", [finding], details)
    if not tested and compares_samples(adapter):
        raise Skipped("the output compares each sample with each other one, so every number belongs to two of them")
    if not tested:
        raise Skipped("no finite output has one row per sample")
    details = {"batch": size, "outputs": tested, "change": largest}
    for path in tested:
        path = "" if path == "the output" else path
        if path in alone and (found := _judge_alone(adapter, inputs, base[path], alone[path], path, size)) is not None:
            return Outcome(found[0], found[1], "", [found[2]], details)
    why = f"no sample changes another's output ({', '.join(tested[:4])}), and alone each gives the same"
    return Outcome(largest, allowed, why, (), details)


def mixes_samples(adapter: ModelAdapter) -> bool:
    """Tell whether samples influence one another; other checks ask so that one fault gets one code."""
    try:
        return bool(check_batch_independence(adapter, Budget(5.0)).findings)
    except (Skipped, ModelCrash):
        return False


def _base(adapter: ModelAdapter) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Return a batch size that runs with its inputs and outputs, four if possible."""
    length = bounded_length(adapter, LENGTH)
    for size in (4, 2):
        inputs = sample_inputs(adapter, size, length)
        try:
            return size, inputs, outputs(adapter, inputs)
        except ModelCrash as crash:
            reason = str(crash)
    raise Skipped(f"neither four nor two samples run together ({reason}); see shape_robustness")


def _odd_replaced(adapter: ModelAdapter, name: str, value: Any, size: int) -> Any:
    """Return an input of which every second sample has other content."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != size or name in measures(adapter):
        # Other lengths may break the order, or the longest, that belongs to the whole batch.
        return value
    odd = (torch.arange(size, device=value.device) % 2 == 1).view(-1, *[1] * (value.dim() - 1))
    return torch.where(odd, other_content(adapter, name, value), value)


def _alone(adapter: ModelAdapter, inputs: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """Return the outputs for the last sample alone; empty when one sample does not run."""
    try:
        return outputs(adapter, _last(inputs, size))
    except ModelCrash:
        return {}


def _last(inputs: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the inputs of the last sample alone."""
    return {
        name: value[-1:] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value
        for name, value in inputs.items()
    }


class _Rows:
    """Puts the axis of samples first; two such axes, as in a table of similarities, leave the diagonal."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes

    def __call__(self, tensor: Tensor) -> Tensor:
        if len(self.axes) == 2:
            return tensor.diagonal(dim1=self.axes[0], dim2=self.axes[1]).movedim(-1, 0)
        return tensor.movedim(self.axes[0], 0)


def _rows(together: Tensor, alone: Tensor | None, size: int) -> _Rows | None:
    """Find the axis of samples: the one that shrinks to 1 for a sample alone, else the first; None if there is none."""
    if alone is None or alone.dim() != together.dim():
        return _Rows((0,)) if together.dim() and together.shape[0] == size else None
    pairs = list(zip(together.shape, alone.shape, strict=True))
    axes = tuple(axis for axis, (many, one) in enumerate(pairs) if (many, one) == (size, 1))
    same = all(many == one for axis, (many, one) in enumerate(pairs) if axis not in axes)
    if not same and axes == (0,):
        # One text alone may have fewer positions than the longest of several.
        return _Rows(axes)
    return _Rows(axes) if same and len(axes) in (1, 2) else None


def _tolerance(tensor: Tensor) -> float:
    return 64 * torch.finfo(tensor.dtype).eps * max(float(tensor.abs().amax()), 1e-30) if tensor.numel() else 0.0


def _leaks(
    adapter: ModelAdapter, inputs: dict[str, Tensor], changed: dict[str, Tensor], path: str, rows: _Rows,
    first: Tensor, second: Tensor,
) -> bool:  # fmt: skip
    """Decide whether a change is a sample's influence: no rounding, no memory of other calls, no other draw."""
    fresh, other = (rows(_fresh(adapter, given)[path])[::2] for given in (inputs, changed))
    if torch.equal(fresh, other):
        # What the call before left behind is no sample of this batch.
        return False
    change = float((second - first).abs().max())
    plain = relative(change, first, second) > least_plain(first.dtype)
    if not plain:
        real = is_real(adapter, inputs, changed, lambda a, x: rows(outputs(a, x)[path])[::2], second - first)
        if real is False or (real is None and change <= _tolerance(first)):
            return False
    noise = float((rows(_fresh(adapter, inputs)[path])[::2] - fresh).abs().max())
    return change > 20 * noise


def _fresh(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the outputs of a call that leaves the model as it was."""
    with preserved(adapter.module):
        return outputs(adapter, inputs)


def _finding(
    adapter: ModelAdapter, inputs: dict[str, Tensor], changed: dict[str, Tensor], path: str, first: Tensor,
    second: Tensor, size: int,
) -> Finding:  # fmt: skip
    """Describe a leak by the module where it starts."""

    def part(tensor: Tensor, given: bool) -> Tensor | None:
        samples = _by_sample(tensor, size)
        return None if samples is None else samples[::2]

    change = float((second - first).abs().max())
    per_row = (second - first).abs().reshape(len(first), -1).amax(1)
    row = 2 * int(per_row.argmax())
    size_of = relative(change, first, second)
    where = first_leak(adapter, inputs, changed, part, size_of)
    what = f"`{path}`" if path else "the output"
    message = (
        f"replacing samples 1, 3, ... of {size} changes {what} of sample {row} "
        f"(|change| {change:.2g}, largest value {change / size_of:.2g})"
    )
    reach = f"[{path!r}]" if path else ""
    return Finding("batch_leakage", "fail", where, message, HINT, _reproduction(adapter, reach, inputs))


def _by_sample(tensor: Tensor, size: int) -> Tensor | None:
    """Return a tensor inside the model with samples first, also where they are second or folded into the first axis."""
    for axis in range(min(2, tensor.dim())):
        if tensor.shape[axis] == size:
            return tensor.movedim(axis, 0)
    if tensor.dim() and tensor.shape[0] and tensor.shape[0] % size == 0:
        return tensor.unflatten(0, (size, -1))
    return None


def _reproduction(adapter: ModelAdapter, reach: str, inputs: dict[str, Tensor]) -> str:
    """Return three lines that show the fault; only for models with one plain input, others need their own inputs."""
    if len(inputs) != 1 or reach:
        return ""
    (value,) = inputs.values()
    made = (
        f"torch.randn{tuple(value.shape)}"
        if value.is_floating_point()
        else f"torch.randint({adapter.readable_ids()}, {tuple(value.shape)})"
    )
    return (
        f"import torch; model.eval(); a = {made}; b = a.clone(); b[1::2] = b[1::2].roll(1, -1)\n"
        "first, second = model(a), model(b)\n"
        "print((first[::2] - second[::2]).abs().max())"
    )


def _judge_alone(
    adapter: ModelAdapter, inputs: dict[str, Tensor], together: Tensor, alone: Tensor, path: str, size: int
) -> tuple[float, float, Finding] | None:
    """Compare a sample alone with itself in a batch; only what no rounding explains counts."""
    rows = _rows(together, alone, size)
    if rows is None:
        return None
    inside, single = rows(together)[-1], rows(alone)[-1]
    if inside.shape != single.shape or not inside.numel() or not bool(torch.isfinite(single).all()):
        return None
    allowed = 10 * least_plain(inside.dtype) * float(inside.abs().max())
    change = float((inside - single).abs().max())
    if change <= allowed or _is_random(adapter, inputs, together, path):
        return None
    whole, last = (_fresh(adapter, given).get(path) for given in (inputs, _last(inputs, size)))
    if whole is None or last is None or float((rows(whole)[-1] - rows(last)[-1]).abs().max()) <= allowed:
        return None
    # A tie in a choice among experts or codes may fall either way; it does not do so again with other content.
    other = sample_inputs(adapter, size, inputs[adapter.main_input].shape[1] if has_length(adapter) else None, seed=2)
    again = _fresh(adapter, other)[path]
    repeated = _alone(adapter, other, size).get(path)
    if repeated is None or float((rows(again)[-1] - rows(repeated)[-1]).abs().max()) <= allowed:
        return None

    def part(tensor: Tensor, given: bool) -> Tensor | None:
        samples = _by_sample(tensor, size)
        return None if samples is None else samples[-1]

    def part_alone(tensor: Tensor, given: bool) -> Tensor | None:
        axis = next((axis for axis in range(min(2, tensor.dim())) if tensor.shape[axis] == 1), None)
        return tensor if axis is None else tensor.select(axis, 0)

    where = first_leak(adapter, inputs, _last(inputs, size), part, relative(change, inside), part_alone)
    message = f"the last of {size} samples gives another output alone (|change| {change:.2g}, allowed {allowed:.2g})"
    return change, allowed, Finding("batch_leakage", "fail", where, message, ALONE_HINT)


def _is_random(adapter: ModelAdapter, inputs: dict[str, Tensor], base: Tensor, path: str) -> bool:
    """Tell whether the model draws random numbers: then other shapes get other draws."""
    seed_streams(1, "another forward")
    with torch.no_grad():
        output = adapter.forward(inputs)
    found = dict(named_tensors(output)).get(path)
    return found is None or found.shape != base.shape or not torch.allclose(found, base, rtol=1e-3, atol=1e-6)
