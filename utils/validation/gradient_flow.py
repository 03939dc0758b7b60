"""Does every trainable parameter get a finite gradient from the task's loss?

One forward and backward pass in eval mode, so that dropout and stochastic depth cannot hide a part, and one in train
mode. A gradient of zero is no fault here: key biases have none by arithmetic, and neither have parts behind a
zero-initialised branch or gate. Only when all are zero is it one.
"""

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.structure import blocks
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.probing import (
    crash_site,
    first_line,
    has_length,
    is_finite,
    is_out_of_memory,
    logits,
    short_length,
)
from utils.validation.rectifiers import dead_rectifiers, watch_rectifiers
from utils.validation.train_mode import check_train_mode

LARGEST_NORM = 1e6
LARGEST_BLOCK_RATIO = 1e4
SHOWN = 6
ADAPTER_NAME = re.compile(r"lora|adapter|ia3|prompt|prefix|(^|[._])(lm_)?(head|classifier|fc|score|out)s?[._]", re.I)
ZERO_HINT = "Look for a multiplication by zero, round(), sign() or a clamp that cuts everything off before the loss."
DETACHED_HINT = "Remove detach(), .data, no_grad(), argmax or numpy from the path between this part and the loss."
UNUSED_HINT = (
    "Call it in forward(), or delete it: it takes memory, confuses the optimizer and breaks DistributedDataParallel."
)
FROZEN_HINT = "Set requires_grad = True, or list its prefix in ModelSpec(frozen=(...,)) if it is frozen on purpose."


def check_gradient_flow(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Run one forward and backward pass on random labels and look at every parameter's gradient.

    A second pass runs in train mode, which is the mode that counts; see `utils.validation.train_mode`.

    Codes: ``detached_submodule``, ``unused_parameter``, ``frozen_parameter``, ``backward_crash``,
    ``exploding_gradient``, ``zero_gradient``, ``dead_relu``, ``nan_output``.
    """
    parameters = dict(adapter.module.named_parameters())
    if not parameters:
        raise Skipped("the model has no parameters")
    ran: dict[str, int] = {}
    in_eval: list[Finding] = []
    try:
        with watch_rectifiers(adapter.module) as rectified:
            loss = _backward(adapter, ran)
    except _BackwardError as error:
        hint = "Avoid in-place operations on tensors that autograd needs, and outputs that carry no gradient."
        findings = [Finding("backward_crash", "fail", error.where, str(error), hint)]
        if check_train_mode(adapter, training_inputs(adapter)):
            return Outcome("crash", "a gradient", "", findings)
        # Caches that eval mode fills in place break its backward pass; training is none the worse for it.
        message = f"in eval mode {error}; in train mode it works"
        in_eval = [replace(findings[0], severity="warn", message=message)]
        loss = None
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    norms = {name: float(p.grad.float().norm()) for name, p in trainable.items() if p.grad is not None}
    findings = in_eval + _explosions(adapter, trainable, norms, loss)
    findings += dead_rectifiers(adapter, rectified)
    if norms and not any(norms.values()):
        findings.append(Finding("zero_gradient", "fail", adapter.name, _all_zero(norms), ZERO_HINT))
    missing = [name for name, p in trainable.items() if p.grad is None]
    if missing:
        missing = _still_missing(adapter, missing)
    findings += _without_gradient(adapter, missing, ran, norms)
    findings += _frozen(adapter, parameters)
    # A loss that is not finite, or a graph that is cut, would only be found a second time.
    if loss is not None and math.isfinite(loss) and not any(f.code == "exploding_gradient" for f in findings):
        findings += check_train_mode(adapter, training_inputs(adapter))
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    zero = [name for name, norm in norms.items() if norm == 0]
    details: dict[str, Any] = {
        "loss": loss,
        "norms": norms,
        "without_gradient": missing,
        "zero_gradient": zero,
        "frozen": [name for name, p in parameters.items() if not p.requires_grad],
    }
    why = f"all {len(norms)} trainable tensors get a finite gradient (norm {total:.3g})"
    return Outcome(total, LARGEST_NORM, why, findings, details)


class _BackwardError(Exception):
    """A pass with gradients failed although the pass without gradients works, or no gradient exists at all."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


def training_inputs(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return a small batch as training would use it."""
    return adapter.example_inputs(2, short_length(adapter) if has_length(adapter) else None)


def _backward(adapter: ModelAdapter, ran: dict[str, int] | None = None) -> float | None:
    """Run forward and backward of the task's loss; returns the loss, or None when nothing carries a gradient."""
    inputs = training_inputs(adapter)
    # Without this the pass below could not tell a crash in forward() from one that only gradients cause.
    logits(adapter, inputs)
    for child in adapter.module.modules():
        # CUDA's recurrent kernels refuse a backward pass in eval mode.
        if isinstance(child, nn.RNNBase) and adapter.device.type == "cuda":
            child.train()
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


def _still_missing(adapter: ModelAdapter, missing: list[str]) -> list[str]:
    """Return which parameters get no gradient in train mode and from the model's other outputs either.

    Auxiliary heads run in training only, and a pooled output beside the logits has no part in the task's loss.
    """
    parameters = dict(adapter.module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    adapter.module.train()
    seed_streams(0, "forward")
    try:
        output = adapter.forward(training_inputs(adapter))
        outputs = [t for _, t in named_tensors(output) if t.is_floating_point() and t.requires_grad]
        if outputs:
            torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return missing
    finally:
        adapter.module.eval()
    return [name for name in missing if parameters[name].grad is None]


def _explosions(
    adapter: ModelAdapter, parameters: dict[str, nn.Parameter], norms: dict[str, float], loss: float | None
) -> list[Finding]:
    """Find gradients that are not finite or extreme."""
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    hint = "Normalise before each block, scale attention by 1/sqrt(d), initialise with a standard deviation near 0.02."
    if bad:
        # A norm of finite numbers can overflow; the place is where a number itself is not finite.
        truly = [name for name in bad if (grad := parameters[name].grad) is not None and not is_finite(grad)]
        message = (
            f"{len(bad)} of {len(norms)} gradients are not finite (loss {loss:.4g}); the last layer with one is this"
        )
        return [Finding("exploding_gradient", "fail", (truly or bad)[-1], message, hint)] if loss is not None else []
    if not norms:
        return []
    largest = max(norms, key=lambda name: norms[name])
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    if total > LARGEST_NORM:
        message = f"the gradient's norm is {total:.2g}, most of it here ({norms[largest]:.2g}); usual is 0.1 to 100"
        return [Finding("exploding_gradient", "fail", largest, message, hint)]
    names = blocks(adapter.module).value
    sizes = [math.sqrt(sum(n**2 for key, n in norms.items() if key.startswith(f"{block}."))) for block in names]
    if len(sizes) > 2 and sizes[-1] > 0 and sizes[0] / sizes[-1] > LARGEST_BLOCK_RATIO:
        message = f"the gradient grows {sizes[0] / sizes[-1]:.2g} times from {names[-1]} back to {names[0]}"
        return [Finding("exploding_gradient", "fail", names[0], message, hint)]
    return []


def _without_gradient(
    adapter: ModelAdapter, missing: list[str], ran: dict[str, int], norms: dict[str, float]
) -> list[Finding]:
    """Describe parameters without a gradient, one finding per part that is wholly without."""
    findings = []
    groups = [
        (where, names) for where, names in _groups(adapter, missing) if not _unrouted_expert(adapter, where, norms)
    ]
    # The part that ran last stands next to the cut.
    groups.sort(key=lambda group: -ran.get(group[0], -1))
    for where, names in groups:
        count = sum(adapter.module.get_parameter(name).numel() for name in names)
        size = f"{len(names)} parameter{'s' if len(names) > 1 else ''} ({count:,} numbers)"
        if _influences(adapter, names):
            message = f"{size} change the output but get no gradient, so they never train"
            findings.append(Finding("detached_submodule", "fail", where, message, DETACHED_HINT))
        else:
            module_ran = where in ran or (where.rpartition(".")[0] in ran and where in names)
            message = f"{size} have no influence on the output" + ("" if module_ran else ": the module never runs")
            # A single learned vector that only some other objective uses (a mask token) costs nothing; a part that
            # runs and is not asked for its result (a pooler under a language model's head) is waste, not a fault.
            shape = adapter.module.get_parameter(names[0]).shape
            token = len(names) == 1 and where == names[0] and sum(size > 1 for size in shape) <= 1
            findings.append(
                Finding("unused_parameter", "warn" if token or module_ran else "fail", where, message, UNUSED_HINT)
            )
    if len(findings) > SHOWN:
        rest = len(findings) - SHOWN
        last = findings[SHOWN - 1]
        shortened = Finding(last.code, last.severity, last.where, f"{last.message}; and {rest} more parts", last.hint)
        findings = [*findings[: SHOWN - 1], shortened]
    return findings


def _groups(adapter: ModelAdapter, missing: list[str]) -> list[tuple[str, list[str]]]:
    """Group parameters by the largest module all of whose trainable parameters are among them."""
    lost = set(missing)
    covered: set[str] = set()
    groups: list[tuple[str, list[str]]] = []
    for name, module in adapter.module.named_modules():
        prefix = f"{name}." if name else ""
        own = [prefix + key for key, p in module.named_parameters() if p.requires_grad]
        if own and lost.issuperset(own) and not covered.issuperset(own):
            groups.append((name or adapter.name, own))
            covered.update(own)
    groups += [(name, [name]) for name in missing if name not in covered]
    return groups


def _unrouted_expert(adapter: ModelAdapter, where: str, norms: dict[str, float]) -> bool:
    """Tell whether a module has siblings of its own kind that were used: then this batch did not choose it."""
    parent_name, _, leaf = where.rpartition(".")
    try:
        parent, module = adapter.module.get_submodule(parent_name), adapter.module.get_submodule(where)
    except AttributeError:
        return False
    if not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        return False
    siblings = [key for key, child in parent.named_children() if key != leaf and type(child) is type(module)]
    return any(name.startswith(f"{parent_name}.{key}.") for key in siblings for name in norms) and not _is_block(
        adapter, where
    )


def _is_block(adapter: ModelAdapter, where: str) -> bool:
    """Tell whether a module is one of the model's repeated blocks, which must all run."""
    return where in blocks(adapter.module).value


def _influences(adapter: ModelAdapter, names: list[str]) -> bool:
    """Tell whether the output changes when these parameters do; the parameters themselves are not touched."""
    inputs = training_inputs(adapter)
    before = logits(adapter, inputs)
    wanted = {id(adapter.module.get_parameter(name)) for name in names}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    for module in adapter.module.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                noise = torch.randn_like(parameter) * (parameter.detach().float().std(unbiased=False) + 0.1)
                swapped.append((module._parameters, key, parameter))
                module._parameters[key] = nn.Parameter((parameter.detach() + noise).to(parameter.dtype))
    try:
        after = logits(adapter, inputs)
    finally:
        for owner, key, parameter in swapped:
            owner[key] = parameter
    return before.shape != after.shape or not torch.equal(before.nan_to_num(), after.nan_to_num())


def _frozen(adapter: ModelAdapter, parameters: dict[str, nn.Parameter]) -> list[Finding]:
    """Find parameters with ``requires_grad=False`` that no usual purpose explains."""
    frozen = [
        name
        for name, p in parameters.items()
        if not p.requires_grad and not name.startswith(tuple(adapter.spec.frozen)) and p.is_floating_point()
    ]
    fixed = sum(parameters[name].numel() for name in frozen)
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    rest = sum(p.numel() for p in trainable.values())
    if fixed and not trainable:
        message = f"requires_grad is False for all {fixed:,} numbers: there is nothing to train"
        return [Finding("frozen_parameter", "fail", adapter.name, message, FROZEN_HINT)]
    if fixed > rest and not _is_adapter(adapter, trainable):
        largest = max(frozen, key=lambda name: parameters[name].numel())
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in trainable))
        message = (
            f"{fixed:,} of {fixed + rest:,} numbers are frozen, this the largest tensor of them; "
            f"only {parts} train, and that is no adapter and no head"
        )
        return [Finding("frozen_parameter", "warn", largest, message, FROZEN_HINT)]
    stray = [name for name in frozen if not _frozen_on_purpose(adapter, name, parameters)]
    findings = []
    for index, name in enumerate(stray[:SHOWN]):
        more = f"; {len(stray) - SHOWN} more like it" if index == SHOWN - 1 and len(stray) > SHOWN else ""
        count = parameters[name].numel()
        message = f"requires_grad is False for {count:,} numbers while the rest of the model trains{more}"
        findings.append(Finding("frozen_parameter", "warn", name, message, FROZEN_HINT))
    return findings


def _is_adapter(adapter: ModelAdapter, trainable: dict[str, nn.Parameter]) -> bool:
    """Tell whether what trains is what one trains on top of a frozen model: adapters, prompts, vectors, the head."""
    head = last_wide_module(adapter)
    return all(
        ADAPTER_NAME.search(name) or p.dim() < 2 or (head and name.startswith(f"{head}."))
        for name, p in trainable.items()
    )


def last_wide_module(adapter: ModelAdapter) -> str | None:
    """Return the last module to finish whose output is as wide as the logits and that has no parts."""
    found: list[str] = []
    width = logits(adapter, training_inputs(adapter)).shape[-1:]

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1:] == width and next(child.children(), None) is None:
            found.append(name)

    with observe(adapter.module, note):
        logits(adapter, training_inputs(adapter))
    return found[-1] if found else None


def _all_zero(norms: dict[str, float]) -> str:
    return f"all {len(norms)} gradients are exactly zero"


def _frozen_on_purpose(adapter: ModelAdapter, name: str, parameters: dict[str, nn.Parameter]) -> bool:
    """Recognise freezing that follows a plan: most of the model, a whole part of it, an embedding, a fixed table."""
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    fixed = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    if fixed > trainable:
        return True
    owner_name, _, leaf = name.rpartition(".")
    owner = adapter.module.get_submodule(owner_name)
    if isinstance(owner, nn.Embedding) or re.search(r"pos|embed|rope|freq|sin|temperature|scale", leaf):
        return True
    # Whole top-level parts, or the first blocks of the stack, are frozen together when somebody means it.
    top = name.split(".")[0]
    part = [p for key, p in parameters.items() if key.split(".")[0] == top]
    if len(part) > 2 and not any(p.requires_grad for p in part):
        return True
    for block in blocks(adapter.module).value:
        if name.startswith(f"{block}."):
            return not any(p.requires_grad for key, p in parameters.items() if key.startswith(f"{block}."))
    return False
