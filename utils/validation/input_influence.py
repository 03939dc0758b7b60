"""Does every input reach the output? Each is replaced by other content, and the output must notice.

An output that is the same for any input is told apart from one in which the signal only dies away: here one step
removes a difference that was plainly there before it. Parameters that are all zero are replaced by noise first, because
a head or a gate that starts there hides nothing for longer than a step; what zero weights cut off is reported by
initialization.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.adapters.capture import named_tensors, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.roles import role_of
from utils.runtime.isolation import preserved
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.dependence import (
    LARGEST_TWIN,
    as_double,
    bounded_length,
    double_twin,
    is_real,
    other_content,
    outputs,
    relative,
    sample_inputs,
    without_zeros,
)  # fmt: skip
from utils.validation.probing import ModelCrash, content_input, logits
from utils.validation.rectifiers import FEWEST_VALUES, RECTIFIERS
from utils.validation.reproduction import ignored
from utils.validation.untrained import normalise_batches

LENGTH = 9
LARGEST_PROOF = 100_000_000
"""Parameters of the largest model copied to float64 before its output is called constant: 0.8 GB, for few models."""
PLAIN = 1e-3
"""A difference this large beside its values is no remainder of a signal that dies away."""
CONSTANT_HINT = (
    "Follow the input through forward(): it is overwritten, clamped, multiplied by zero, rounded away, or never read; "
    "and a softmax or a norm over a single number always gives the same."
)
IGNORED_HINT = "Follow this input through forward() to where it should join the others; if it is not needed, remove it."


def check_input_influence(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Replace all inputs together, then each alone, and require another output.

    Codes: ``constant_output``, ``ignored_input``.
    """
    inputs = sample_inputs(adapter, 2 if adapter.spec.example_inputs is None else 4, bounded_length(adapter, LENGTH))
    replaced = {name: _other(adapter, name, value) for name, value in inputs.items()}
    names = [name for name, value in replaced.items() if value is not inputs[name]]
    names = [name for name in names if bool((replaced[name] != inputs[name]).any())]
    if not names:
        raise Skipped("no other content for the input is known")
    base = logits(adapter, inputs)
    if not bool(torch.isfinite(base).all()):
        raise Skipped("the logits are not finite (see numerical_stability)")
    together = _reach(adapter, inputs, {name: replaced[name] for name in names}, base)
    reach = {"all": together}
    findings: list[Finding] = []
    if together == 0:
        findings = _constant(adapter, inputs, {**inputs, **{name: replaced[name] for name in names}}, base)
        why = "the output hardly depends on the input; see initialization"
        return Outcome(together, "above 0", why, findings, {"influence": reach})
    if len(names) > 1:
        for name in names:
            reach[name] = _reach(adapter, inputs, {name: replaced[name]}, base)
            if reach[name] == 0:
                # Siamese models return an answer for each of their inputs, and a loss hears its labels alone.
                reach[name] = _reach_elsewhere(adapter, inputs, {name: replaced[name]})
            if reach[name] == 0:
                findings.append(_ignored(adapter, name, inputs, replaced[name], reach))
    why = "every input changes the output: " + ", ".join(f"{name} by {size:.2g}" for name, size in reach.items())
    return Outcome(
        min((size for size in reach.values() if size == size), default=None),
        "above 0",
        why,
        findings,
        {"influence": reach},
    )


def _other(adapter: ModelAdapter, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or name in ("labels", "targets", "past_key_values", "cache_position"):
        return value
    if name not in (adapter.main_input, content_input(adapter)) and role_of(name) == "labels":
        # An answer to compare with; some models read it in train mode only.
        return value
    return other_content(adapter, name, value)


def _reach(adapter: ModelAdapter, inputs: Mapping[str, Tensor], changes: Mapping[str, Tensor], base: Tensor) -> float:
    """Return how far other content moves the output, beside its size; 0 where nothing of it moves, NaN if unknown.

    Before nothing is said to move, the same is asked in float64, and with batch norms that normalise.
    """
    try:
        other = logits(adapter, {**inputs, **changes})
    except ModelCrash:
        # What runs with some content and not with other is for shape_robustness to say.
        return float("nan")
    if other.shape != base.shape:
        return float("nan")
    size = relative(float((other - base).abs().max()), base)
    if size > 0 and size > 4 * torch.finfo(base.dtype).eps:
        return size
    changed = {**inputs, **changes}
    with without_zeros(adapter):
        first, second = logits(adapter, inputs), logits(adapter, changed)
        size = relative(float((second - first).abs().max()), first)
        if size > 4 * torch.finfo(base.dtype).eps:
            return size
        twin = double_twin(adapter, LARGEST_TWIN if size else LARGEST_PROOF)
    if twin is not None:
        try:
            first, second = logits(twin, as_double(inputs)), logits(twin, as_double(changed))
        except ModelCrash:
            return size
        # A signal that arrives faint is no signal that is cut off.
        exact = relative(float((second - first).abs().max()), first)
        size = exact if exact > 4 * torch.finfo(first.dtype).eps else 0.0
        del twin
    return size or _reach_among_batches(adapter, inputs, changed)


def _reach_among_batches(adapter: ModelAdapter, inputs: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> float:
    """Return how far other content moves the output while untrained batch norms take the statistics of the batch.

    With the statistics they start with they normalise nothing: through forty convolutions the signal fades below the
    last bit of the head's bias, in float64 too, and the first training step knows nothing of that. They also enlarge
    rounding, which falls out differently in float64; what does not is a signal. Otherwise 0.
    """
    with preserved(adapter.module), without_zeros(adapter):
        if not normalise_batches(adapter):
            return 0.0
        try:
            first, second = logits(adapter, inputs), logits(adapter, changed)
        except ModelCrash:
            return 0.0
        size = relative(float((second - first).abs().max()), first)
        real = size > PLAIN and is_real(adapter, inputs, changed, logits, second - first, LARGEST_PROOF)
        return size if real else 0.0


def _reach_elsewhere(adapter: ModelAdapter, inputs: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> float:
    """Return how far other content moves any tensor of the output beside the logits; NaN where that is unknown."""

    def tensors(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seed_streams(0, "forward")
        with torch.no_grad():
            return dict(named_tensors(adapter.forward(given)))

    def moved() -> float:
        try:
            before, after = tensors(inputs), tensors({**inputs, **changes})
        except Exception:
            return float("nan")
        return max((_difference([before[path]], [after[path]]) for path in before if path in after), default=0.0)

    found = moved()
    if found == 0:
        with without_zeros(adapter):
            found = moved()
    return found


def _constant(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], changed: Mapping[str, Tensor], base: Tensor
) -> list[Finding]:
    """Report an output that no input changes, unless something else explains it better.

    Nothing is reported where the difference dies away by degrees, where no two ids have different vectors, or where
    rectifiers let nothing through: these have codes of their own.
    """
    with _Shut() as shut:
        logits(adapter, inputs)
    where, before = _killer(adapter, inputs, changed)
    if where is None or shut.seen:
        return []
    value = float(base.flatten()[0])
    same = bool((base == base.flatten()[0]).all())
    what = f"the output is {value:.3g} everywhere" if same else f"the output starts with {value:.3g} every time"
    message = f"{what}, for any input: `{where}` was given inputs that differ by {before:.2g} and returned the same"
    if where == adapter.name:
        message = f"{what}, whatever the input is; replacing all of `{adapter.main_input}` moves no bit of it"
    reproduction = ""
    if len(inputs) == 1 and adapter.output.value == "" and inputs[adapter.main_input].is_floating_point():
        shape = tuple(inputs[adapter.main_input].shape)
        reproduction = (
            f"import torch; model.eval()\nfirst, second = (model(torch.randn{shape}) for _ in range(2))\n"
            "print((first - second).abs().max())"
        )
    return [Finding("constant_output", "fail", where, message, CONSTANT_HINT, reproduction)]


class _Shut(TorchFunctionMode):
    """Notes whether any call of a rectifier lets nothing of its input through."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watched = func in RECTIFIERS and args and args[0].numel() >= FEWEST_VALUES and bool(args[0].any())
        result = func(*args, **(kwargs or {}))
        self.seen = self.seen or (bool(watched) and not bool(result.any()))
        return result


def _killer(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], changed: Mapping[str, Tensor]
) -> tuple[str | None, float]:
    """Return the innermost module that removes the difference between two runs, and how large it was before.

    Of the modules that are given plainly different inputs and return the same, the one counts that finishes last: what
    comes after it never sees a difference. None stands for a cause with a code of its own.
    """
    calls: list[tuple[str, list[Tensor], list[Tensor]]] = []
    ends: list[tuple[str, float]] = []
    carriers: set[str] = set()
    position, dead, faint = 0, False, False

    def real(value: Any) -> list[Tensor]:
        return [tensor.detach().clone() for _, tensor in named_tensors(value)]

    def record(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        calls.append((name, real(given), real(output)))

    def compare(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal position, dead, faint
        if position >= len(calls):
            return
        known, known_inputs, known_output = calls[position]
        position += 1
        if name != known:
            return
        came, left = _difference(known_inputs, real(given)), _difference(known_output, real(output))
        if left > 0:
            carriers.add(name)
            faint = faint or left < PLAIN / 1e3
        if came > PLAIN and left == 0:
            ends.append((name, came))
            zeros = [tensor for tensor in known_output if tensor.is_floating_point()]
            dead = dead or (bool(zeros) and not any(bool(tensor.any()) for tensor in zeros))

    with without_zeros(adapter):
        with observe(adapter.module, record):
            outputs(adapter, inputs)
        with observe(adapter.module, compare):
            outputs(adapter, changed)
    if faint:
        return None, 0.0
    inner = [(name, size) for name, size in ends if name]
    if not inner:
        # Nothing inside was given a difference that it lost, so forward itself dropped it.
        return adapter.name, 1.0
    name, size = inner[0]
    child = adapter.module.get_submodule(name)
    if isinstance(child, nn.Embedding) or (dead and not any(True for _ in child.parameters(recurse=True))):
        return None, 0.0
    return name, size


def _difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest relative difference of two lists of tensors, 0 where all are equal."""
    largest = 0.0
    for a, b in zip(first, second, strict=False):
        if a.shape != b.shape or not a.numel():
            largest = max(largest, 1.0 if a.shape != b.shape else 0.0)
        elif a.is_floating_point():
            largest = max(largest, relative(float((a - b).abs().max()), a, b))
        else:
            largest = max(largest, float((a != b).any()))
    return largest


def _ignored(
    adapter: ModelAdapter, name: str, inputs: Mapping[str, Tensor], other: Tensor, reach: Mapping[str, float]
) -> Finding:
    """Describe an input without influence."""
    changed = float((inputs[name] != other).float().mean())
    message = (
        f"replacing `{name}` ({changed:.0%} of its values) leaves every bit of the output as it is; replacing all "
        f"inputs changes it by {reach['all']:.2g} of its size"
    )
    lines = ignored(adapter, name, inputs[name])
    return Finding("ignored_input", "fail", adapter.name, message, IGNORED_HINT, lines)
