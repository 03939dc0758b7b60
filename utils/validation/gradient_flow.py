"""Does every trainable parameter get a finite gradient from the task's loss?

One forward and backward pass in eval mode, so that dropout and stochastic depth cannot hide a part, and one in train
mode. A gradient of zero is no fault here: key biases have none by arithmetic, and neither have parts behind a
zero-initialised branch or gate. Only when all are zero is it one.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from utils.adapters.capture import observe
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.dependence import as_double, double_twin
from utils.validation.frozen_parameters import frozen_parameters
from utils.validation.gradient_reach import still_missing, training_inputs, waiting, without_gradient
from utils.validation.hidden import hidden_items
from utils.validation.probing import crash_site, first_line, has_length, is_finite, is_out_of_memory, logits
from utils.validation.rectifiers import dead_rectifiers, watch_rectifiers
from utils.validation.train_mode import check_train_mode
from utils.validation.untrained import normalise_batches

LARGEST_NORM = 1e6
NAN_HINT = "Look behind it for sqrt, norm, log or a division at exactly zero: finite itself, its slope is not."
LONGEST_TRAINED = 1024
"""Longest length that is tried where a step at a short one fails."""
ZERO_HINT = "Look for a multiplication by zero, round(), sign() or a clamp that cuts everything off before the loss."


def check_gradient_flow(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Run one forward and backward pass on random labels and look at every parameter's gradient.

    A second pass runs in train mode, which is the mode that counts; see `utils.validation.train_mode`.

    Codes: ``detached_submodule``, ``unused_parameter``, ``frozen_parameter``, ``backward_crash``,
    ``exploding_gradient``, ``zero_gradient``, ``dead_relu``, ``nan_output``.
    """
    parameters = dict(adapter.module.named_parameters())
    if not parameters:
        items = hidden_items(adapter.module)
        hidden = [item for item in items if item.tensors and (item.trains or isinstance(item.item, nn.Module))]
        if not hidden:
            raise Skipped("the model has no parameters: nothing to train")
        message = f"the model has no parameters, and `{hidden[0].where}` holds weights that torch does not see"
        hint = "Assign layers to self in __init__; lists and dicts hide them from torch."
        finding = Finding("frozen_parameter", "warn", adapter.name, message, hint)
        return Outcome("0 parameters", "at least 1", "", [finding])
    ran: dict[str, int] = {}
    in_eval: list[Finding] = []
    try:
        with watch_rectifiers(adapter.module) as rectified:
            loss = _backward(adapter, ran)
    except _BackwardError as error:
        hint = "Avoid in-place operations on tensors that autograd needs, and outputs that carry no gradient."
        findings = [Finding("backward_crash", "fail", error.where, str(error), hint)]
        if not _trains(adapter):
            return Outcome("crash", "a gradient", "", findings)
        # Caches that eval mode fills in place break its backward pass; training is none the worse for it.
        message = f"in eval mode {error}; in train mode it works"
        in_eval = [replace(findings[0], severity="warn", message=message)]
        loss = None
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    for parameter in trainable.values():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
    norms = {name: float(p.grad.float().norm()) for name, p in trainable.items() if p.grad is not None}
    findings = in_eval + _explosions(adapter, trainable, norms, loss)
    findings += dead_rectifiers(adapter, rectified)
    if norms and not any(norms.values()) and not _explained(adapter):
        findings.append(
            Finding("zero_gradient", "fail", adapter.name, f"all {len(norms)} gradients are exactly zero", ZERO_HINT)
        )
    missing = [name for name, p in trainable.items() if p.grad is None]
    if missing:
        missing = still_missing(adapter, missing)
    findings += without_gradient(adapter, missing, ran, norms)
    findings += frozen_parameters(adapter, parameters, ran)
    # A loss that is not finite, or a graph that is cut, would only be found a second time.
    if (
        loss is not None
        and math.isfinite(loss)
        and not any(f.code in ("exploding_gradient", "nan_output") for f in findings)
    ):
        findings += check_train_mode(adapter, training_inputs(adapter))
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    zero = [name for name, norm in norms.items() if norm == 0]
    details: dict[str, Any] = {
        "loss": loss,
        "norms": norms,
        "without_gradient": missing,
        "waiting_for_input": {"parts": waiting(adapter, missing, ran), "inputs": list(adapter.unfilled_inputs)},
        "zero_gradient": zero,
        "frozen": [name for name, p in parameters.items() if not p.requires_grad],
    }
    why = f"all {len(norms)} trainable tensors get a finite gradient (norm {total:.3g})"
    if not findings and loss is not None and not math.isfinite(loss):
        raise Skipped("the loss is not finite, and neither is a gradient of it (see numerical_stability)")
    return Outcome(total, LARGEST_NORM, why, findings, details)


def _explained(adapter: ModelAdapter) -> bool:
    """Tell whether gradients of zero follow from what other checks report.

    These are an output that is the same for any input, and a signal so faint that float32 cannot hold its gradient
    although float64 can.
    """
    inputs = training_inputs(adapter)
    result = logits(adapter, inputs)
    if len(result) > 1 and torch.equal(result[0], result[1]):
        return True
    if (twin := double_twin(adapter)) is None:
        return False
    normalise_batches(twin)
    seed_streams(0, "forward")
    try:
        exact = twin.logits(as_double(inputs))
        loss = twin.loss(exact, adapter.random_labels(result).to(exact.device))
        trainable = [p for p in twin.module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
    except (AdapterError, RuntimeError, TypeError, ValueError):
        return False
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _trains(adapter: ModelAdapter) -> bool:
    """Tell whether a step in train mode works, at a short length or at the longest, which some models ask for."""
    tried = [training_inputs(adapter)]
    longest = adapter.max_length.value
    if has_length(adapter) and longest is not None and longest <= LONGEST_TRAINED:
        tried.append(adapter.example_inputs(2, longest))
    return any(not check_train_mode(adapter, inputs) for inputs in tried)


class _BackwardError(Exception):
    """A pass with gradients failed although the pass without gradients works, or no gradient exists at all."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


def _backward(adapter: ModelAdapter, ran: dict[str, int] | None = None) -> float | None:
    """Run forward and backward of the task's loss; returns the loss, or None when nothing carries a gradient."""
    inputs = training_inputs(adapter)
    # Without this the pass below could not tell a crash in forward() from one that only gradients cause.
    logits(adapter, inputs)
    for child in adapter.module.modules():
        # CUDA's recurrent kernels refuse a backward pass in eval mode.
        if isinstance(child, nn.RNNBase) and adapter.device.type == "cuda":
            child.train()
    normalise_batches(adapter)
    order: dict[str, int] = {} if ran is None else ran

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        order.setdefault(name, len(order))

    seed_streams(0, "forward")
    try:
        with observe(adapter.module, note):
            result = adapter.logits(inputs)
        loss = adapter.loss(result, adapter.random_labels(result))
        del result
        if not loss.requires_grad:
            return None
        loss.backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        stage = "the backward pass" if "loss" in locals() else "a forward pass with gradients"
        where = adapter.name if "loss" in locals() else crash_site(adapter, inputs)
        raise _BackwardError(f"{stage} raises {type(error).__name__}: {first_line(error)}", where) from error
    return float(loss.detach())


def _explosions(
    adapter: ModelAdapter, parameters: dict[str, nn.Parameter], norms: dict[str, float], loss: float | None
) -> list[Finding]:
    """Find gradients that are not finite or extreme."""
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    hint = "Normalise before each block, scale attention by 1/sqrt(d), initialise with a standard deviation near 0.02."
    if bad and loss is not None and not math.isfinite(loss):
        # Logits that are not finite, or a loss of them, are numerical_stability's finding.
        return []
    if bad:
        # A norm of finite numbers can overflow; the place is where a number itself is not finite.
        truly = [name for name in bad if (grad := parameters[name].grad) is not None and not is_finite(grad)]
        message = (
            f"{len(bad)} of {len(norms)} gradients are not finite (loss {loss:.4g}); the last layer with one is this"
        )
        grads = [grad for name in truly if (grad := parameters[name].grad) is not None]
        if loss is not None and math.isfinite(loss) and grads and all(bool(torch.isnan(grad).any()) for grad in grads):
            return [Finding("nan_output", "fail", truly[-1], message, NAN_HINT)]
        return [Finding("exploding_gradient", "fail", (truly or bad)[-1], message, hint)] if loss is not None else []
    if not norms:
        return []
    largest = max(norms, key=lambda name: norms[name])
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    if total > LARGEST_NORM:
        message = f"the gradient's norm is {total:.2g}, most of it here ({norms[largest]:.2g}); usual is 0.1 to 100"
        return [Finding("exploding_gradient", "fail", largest, message, hint)]
    return []
