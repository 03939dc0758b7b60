"""Does the model give the same answer in bfloat16 and float16, as far as their digits go?

Parameters and buffers stand as copies of the lower precision for one pass each, and the logits are held against those
of float32. Infinite values, NaN and constants that float16 cannot hold are faults; so is an error far beyond what the
digits explain. A model that refuses other types altogether is another check's finding, and so is one that is already
unstable in float32: mixed precision by autocast serves then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.adapters.capture import first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.resources import LARGE_MODEL
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.probing import (
    ModelCrash,
    all_finite,
    content_input,
    first_line,
    first_nonfinite,
    forward_seconds,
    has_length,
    is_finite,
    logits,
)
from utils.validation.substitution import parameters_as, refreshed
from utils.validation.untrained import enough_samples, looks_untrained, normalise_batches
from utils.validation.weight_scales import weight_faults

LENGTH = 9
RANDOM, CONSTANT, ZEROS = "random input", "constant input", "input of zeros"
LARGEST_ERROR = {torch.float16: 0.3, torch.bfloat16: 0.6}
"""Relative error of half of the rows of logits that fails; sound models reach 0.01 and 0.1."""
PRODUCTS = {
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    functional.linear, torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm,
}  # fmt: skip
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
HINT = (
    "Subtract the maximum before exp(), keep squares and sums below 65504, use torch.finfo(x.dtype).min in masks and "
    "epsilons of 1e-5 or more, or compute that part in float32."
)


def check_low_precision(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Run the same inputs in float32, bfloat16 and float16 and compare the logits.

    Codes: ``low_precision_unsafe``.
    """
    real = {p.dtype for p in adapter.module.parameters() if p.is_floating_point()}
    if not real or real - {torch.float32, torch.float64}:
        raise Skipped("the model has no parameters, or holds lower precision already")
    length = adapter.legal_length(LENGTH) if has_length(adapter) else None
    seconds = forward_seconds(adapter, length)
    batches = normalise_batches(adapter)
    cases = _cases(adapter, length, batches)
    references = {name: logits(adapter, inputs).float() for name, inputs in cases.items()}
    usable = {name: inputs for name, inputs in cases.items() if is_finite(references[name])}
    if not usable:
        raise Skipped("the logits are not finite in float32 (see numerical_stability)")
    if looks_untrained(adapter.module) and weight_faults(adapter):
        raise Skipped("the weights leave the range of any small type (see initialization)")
    if all(len(result) > 1 and torch.equal(result[0], result[1]) for result in references.values()):
        raise Skipped("the output does not depend on the input (see input_influence)")
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    findings: list[Finding] = []
    for dtype in (torch.float16, torch.bfloat16):
        # The first sight of a type compiles its kernels, and CPUs emulate float16.
        if dtype == torch.bfloat16 and not budget.afford(8 * seconds, "bfloat16 was not tried"):
            break
        # Constant input is there for small denominators, and bfloat16 has the range of float32.
        situations = [name for name in usable if dtype == torch.float16 or name == RANDOM]
        for situation in situations:
            inputs = usable[situation]
            try:
                off, found = _compare(adapter, inputs, references[situation], dtype, situation)
            except _Refused as refusal:
                refused[NAMES[dtype]] = str(refusal)
                break
            errors[f"{NAMES[dtype]}, {situation}"] = off
            findings += [found] if found is not None else []
            if findings:
                break
        if findings:
            break
    details = {"errors": errors, "refused": refused}
    if not errors and not findings:
        raise Skipped(f"the model does not run in lower precision: {next(iter(refused.values()), 'not tried')}")
    worst = max(errors.values(), default=0.0)
    why = f"logits in lower precision differ by at most {worst:.2g} of their spread"
    return Outcome(worst, LARGEST_ERROR[torch.float16], why, findings, details)


class _Products(TorchFunctionMode):
    """Sums the products of float16 in float32 and rounds the result, as GPUs do.

    CPUs without instructions for float16 take ten to a hundred times longer for the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call."""
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if func not in PRODUCTS or any(t.dtype != torch.float16 or t.device.type != "cpu" for t in tensors):
            return func(*args, **kwargs)
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        named = {key: value.float() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        return func(*wide, **named).half()


class _Refused(Exception):
    """The model does not run in this type, for reasons other than its numbers."""


def _cases(adapter: ModelAdapter, length: int | None, batches: bool) -> dict[str, dict[str, Tensor]]:
    """Return random input, and constant input where an epsilon may be all that is left of a denominator.

    Numbers are constant at a half and at zero: biases that start at zero keep vectors of all zeros as they are, which
    training ends, so what fails at zero alone is worth a look and no more.
    """
    if batches:
        # A constant batch leaves batch normalisation only rounding errors to divide by.
        return {RANDOM: enough_samples(adapter)}
    large = adapter.num_parameters > LARGE_MODEL
    random = adapter.example_inputs(3 if large else 2, length)
    names = {adapter.main_input, content_input(adapter)}
    # Each input has a table of its own, and two languages have two vocabularies.
    tokens = adapter.modality == "tokens"
    value = {key: float((adapter.readable_ids(key) - 1) // 2) if tokens else 0.0 for key in names}
    if large:
        # Weights cost more than samples: one pass for both, most rows of it random.
        for key in names:
            random[key] = torch.cat((random[key][:2], torch.full_like(random[key][2:], value[key])))
        return {RANDOM: random}

    def filled(values: dict[str, float]) -> dict[str, Tensor]:
        return {key: torch.full_like(item, values[key]) if key in names else item for key, item in random.items()}

    if tokens:
        return {RANDOM: random, CONSTANT: filled(value)}
    return {RANDOM: random, CONSTANT: filled(dict.fromkeys(names, 0.5)), ZEROS: filled(dict.fromkeys(names, 0.0))}


def _compare(
    adapter: ModelAdapter, inputs: dict[str, Tensor], reference: Tensor, dtype: torch.dtype, situation: str
) -> tuple[float, Finding | None]:
    """Run one input in one type; return the relative error of the logits and the fault, if it is one."""
    name = NAMES[dtype]
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with cast(adapter.module, dtype):
        if not all_finite(adapter.module.parameters()):
            bad = next(key for key, p in adapter.module.named_parameters() if not is_finite(p))
            message = f"the parameter does not fit into {name}, whose largest number is {torch.finfo(dtype).max:.3g}"
            return float("inf"), _finding(bad, message)
        try:
            result = logits(adapter, given).float()
        except ModelCrash as crash:
            text = first_line(crash.error)
            if "without overflow" in text:
                return float("inf"), _finding(crash.where, f"in {name}: {text}")
            raise _Refused(text) from crash
        except AdapterError as error:
            raise _Refused(first_line(error)) from error
        minus = torch.isneginf(result) if bool(torch.isneginf(reference).any()) else torch.zeros((), dtype=torch.bool)
        bad_values = ~torch.isfinite(result) & ~minus
        if bool(bad_values.any()):
            message = (
                f"{int(bad_values.sum()):,} of {result.numel():,} logits are not finite in {name} for {situation}; "
                "in float32 all are"
            )
            severity = "warn" if situation == ZEROS else "fail"
            return float("inf"), _finding(first_nonfinite(adapter, given), message, severity)
    off = relative_error(result, reference)
    # Equal inputs may leave differences of rounding errors; only what is not finite counts there.
    alike = situation != RANDOM
    if off <= LARGEST_ERROR[dtype] or alike or _is_chaotic(adapter, inputs, reference):
        return 0.0 if alike else off, None
    message = f"logits in {name} differ from those in float32 by {off:.2g} of their spread for {situation}"
    return off, _finding(_first_far_off(adapter, inputs, given, dtype), message)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return the median over rows of the error's norm over the norm of the row without its mean; 0 for flat rows.

    The median, because a choice among experts or buckets may tip in single rows of a sound model.
    """
    width = reference.shape[-1]
    target = reference.reshape(-1, width).nan_to_num(neginf=0.0)
    difference = result.reshape(-1, width).nan_to_num(neginf=0.0) - target
    # One number per sample has no spread of its own.
    spread = (target - target.mean(-1, keepdim=True) if width > 1 else target).norm(dim=-1)
    size = spread.clamp(min=1e-3 * float(target.norm(dim=-1).max()) + 1e-30)
    return float((difference.norm(dim=-1) / size).median())


@contextmanager
def cast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let all real parameters and buffers stand as copies of another type inside the block; none of them is touched."""
    made: dict[int, Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    for child in module.modules():
        owners: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for owner in owners:
            for key, value in owner.items():
                if value is None or not value.is_floating_point():
                    continue
                if id(value) not in made:
                    copy = value.detach().to(dtype)
                    made[id(value)] = nn.Parameter(copy, False) if isinstance(value, nn.Parameter) else copy
                swapped.append((owner, key, value))
                owner[key] = made[id(value)]
    with refreshed(module), _Products():
        try:
            yield
        finally:
            for owner, key, value in swapped:
                owner[key] = value


def _is_chaotic(adapter: ModelAdapter, inputs: dict[str, Tensor], reference: Tensor) -> bool:
    """Tell whether rounding the weights alone already loses the answer: then no type is to blame."""
    names = [name for name, p in adapter.module.named_parameters() if p.is_floating_point()]
    with parameters_as(adapter, names, lambda p: p.to(torch.bfloat16)):
        result = logits(adapter, inputs).float()
    return relative_error(result, reference) > 0.5 * LARGEST_ERROR[torch.float16]


def _first_far_off(
    adapter: ModelAdapter, inputs: dict[str, Tensor], given: dict[str, Tensor], dtype: torch.dtype
) -> str:
    """Return the module whose output's error grows most over that of its input."""

    def followed(arguments: dict[str, Tensor]) -> dict[str, tuple[Tensor | None, Tensor]]:
        found: dict[str, tuple[Tensor | None, Tensor]] = {}

        def note(name: str, child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            before, after = first_tensor(args), first_tensor(output)
            if name not in found and after is not None and after.is_floating_point():
                kept = before.float() if before is not None and before.is_floating_point() else None
                found[name] = (kept, after.float())

        with observe(adapter.module, note):
            logits(adapter, arguments)
        return found

    plain = followed(inputs)
    with cast(adapter.module, dtype):
        low = followed(given)
    for name, (before, after) in low.items():
        if name not in plain or plain[name][1].shape != after.shape:
            continue
        entered = plain[name][0]
        off = 0.0 if before is None or entered is None or before.shape != entered.shape else _off(before, entered)
        if _off(after, plain[name][1]) > 0.2 and off < 0.05:
            return name or adapter.name
    return adapter.name


def _off(value: Tensor, target: Tensor) -> float:
    return float((value - target).norm() / target.norm().clamp(min=1e-30))


def _finding(where: str, message: str, severity: str = "fail") -> Finding:
    return Finding("low_precision_unsafe", severity, where, message, HINT)
