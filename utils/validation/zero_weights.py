"""Weights that are zero where zero does harm.

Zero is a good start for a head, a gate or the last layer of a bypassed branch. It is a fault where it cuts the output
off from the input, and where two zeros in a row keep each other's gradient at zero for ever. Both are decided by
running the model, with noise in place of the zeros that the first step moves.
"""

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.seeding import seed_streams
from utils.validation.check import Finding
from utils.validation.probing import guarded, logits
from utils.validation.substitution import noise, parameters_as

HINT = "Initialise with small random numbers; zero is right only on a branch that a residual path bypasses."
ROUNDS = 3
SHOWN = 12


def zero_weights(adapter: ModelAdapter, inputs: dict[str, Tensor], head: str | None) -> list[Finding]:
    """Find zero weights that cut the output off from the input, or that no gradient will ever move.

    Codes: ``zero_init``.

    Args:
        adapter: The model.
        inputs: Two samples.
        head: Name of the layer that puts out the logits; zero is right there, because it moves with the first step.
    """
    zeros = _zeros(adapter)
    suspects = [name for name in zeros if head is None or not name.startswith(f"{head}.")]
    matrices = [n for n in suspects if not n.endswith("bias") and adapter.module.get_parameter(n).numel() > 1]
    if not matrices:
        return []
    if _is_lone_head(adapter, inputs, zeros, matrices):
        # It moves with the first step, unless another zero holds it and is held by it.
        return _trapped(adapter, inputs, zeros, matrices)
    return _cutting(adapter, inputs, [n for n in zeros if not n.endswith("bias")], matrices) or _trapped(
        adapter, inputs, zeros, matrices
    )


def _is_lone_head(adapter: ModelAdapter, inputs: dict[str, Tensor], zeros: list[str], names: list[str]) -> bool:
    """Tell whether the only zero matrix beside the head is itself one, with noise in whatever else is zero."""
    with parameters_as(adapter, [other for other in zeros if other not in names], noise):
        return _is_last(adapter, inputs, names)


def _is_last(adapter: ModelAdapter, inputs: dict[str, Tensor], names: list[str]) -> bool:
    """Tell whether a lone zero matrix is a head that no module stands for: the logits are linear in it."""
    if len(names) != 1 or adapter.module.get_parameter(names[0]).dim() < 2:
        return False
    drawn = torch.randn_like(adapter.module.get_parameter(names[0]))
    results = []
    for factor in (0.0, 1.0, -1.0):
        with parameters_as(adapter, names, lambda parameter, factor=factor: factor * drawn):  # type: ignore[misc]
            results.append(logits(adapter, inputs).double())
    zero, there, back = results
    # A rectifier after it would keep one sign only.
    moved = float((there - back).abs().max())
    return moved > 0 and float((there + back - 2 * zero).abs().max()) <= 1e-5 * moved


def _is_head(adapter: ModelAdapter, inputs: dict[str, Tensor], zeros: list[str], name: str) -> bool:
    """Tell whether a zero matrix beside others moves with the first step, and the logits are linear in it."""
    if name in _without_gradient(adapter, inputs, [name], []):
        return False
    with parameters_as(adapter, [other for other in zeros if other != name], noise):
        return _is_last(adapter, inputs, [name])


def _zeros(adapter: ModelAdapter) -> list[str]:
    """Return the names of the parameters of two numbers or more that are all zero."""
    found: list[str] = []
    for name, parameter in adapter.module.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        flat = parameter.detach().flatten()
        # The cheap look spares large tensors the full one.
        if float(flat[0]) == 0 and float(flat[-1]) == 0 and not bool(flat.any()):
            found.append(name)
    return found


def _cutting(adapter: ModelAdapter, inputs: dict[str, Tensor], zeros: list[str], suspects: list[str]) -> list[Finding]:
    """Find those that alone, or else together, make the logits the same for two samples."""
    if _tells_apart(adapter, inputs, zeros, keep=suspects):
        return []
    findings = []
    lone = [name for name in suspects[:SHOWN] if not _tells_apart(adapter, inputs, zeros, keep=[name])]
    heads = [name for name in lone if _is_head(adapter, inputs, zeros, name)]
    if heads and _tells_apart(adapter, inputs, zeros, keep=[name for name in suspects if name not in heads]):
        return []
    for name in lone:
        if name not in heads:
            count = adapter.module.get_parameter(name).numel()
            message = f"all {count:,} numbers are zero, and the output no longer depends on the input"
            findings.append(Finding("zero_init", "fail", name, message, HINT))
    if not findings:
        message = f"{len(suspects)} weights are zero and together cut the output off from the input"
        findings.append(Finding("zero_init", "fail", suspects[0], message, HINT))
    return findings


def _tells_apart(adapter: ModelAdapter, inputs: dict[str, Tensor], zeros: list[str], keep: list[str]) -> bool:
    """Tell whether the logits differ between samples when all `zeros` but `keep` hold noise instead."""
    with parameters_as(adapter, [name for name in zeros if name not in keep], noise):
        result = logits(adapter, inputs).float()
    scale = float(result.abs().max())
    # Positions alone can make a row of logits vary, so samples are compared at equal positions.
    return float((result[0] - result[-1]).abs().max()) > 1e-6 * max(scale, 1e-12)


def _trapped(adapter: ModelAdapter, inputs: dict[str, Tensor], zeros: list[str], suspects: list[str]) -> list[Finding]:
    """Find matrices whose gradient stays exactly zero however often the other zeros move."""
    moved: set[str] = set()
    for _ in range(ROUNDS):
        still = _without_gradient(adapter, inputs, [name for name in zeros if name not in moved], sorted(moved))
        if not any(name in still for name in suspects):
            return []
        new = {name for name in zeros if name not in still} - moved
        if not new:
            break
        moved |= new
    trapped = [name for name in suspects if name in still]
    # An expert that this batch did not choose has no gradient either, and no influence.
    with parameters_as(adapter, [name for name in zeros if name in moved], noise):
        before = logits(adapter, inputs)
    with parameters_as(adapter, [*moved, *still], noise):
        after = logits(adapter, inputs)
    if not trapped or torch.equal(before, after):
        return []
    if len(trapped) == 1:
        return _held_by_gate(adapter, inputs, trapped[0], [name for name in still if name != trapped[0]])
    more = f"; so do {len(trapped) - 1} more like it" if len(trapped) > 1 else ""
    message = f"the numbers are all zero and their gradient is exactly zero too, so they stay as they are{more}"
    # The pair that lies closest together: blocks have one each.
    nearest = max(trapped[1:], key=lambda name: len(_common([trapped[0], name])))
    where = (_common([trapped[0], nearest]) if len(trapped) <= 4 else "") or trapped[0]
    return [Finding("zero_init", "fail", where, message, HINT)]


def _held_by_gate(adapter: ModelAdapter, inputs: dict[str, Tensor], matrix: str, others: list[str]) -> list[Finding]:
    """Find a gate or vector at zero that keeps a zero matrix without gradient, and is kept so by it in turn."""
    for gate in others:
        if matrix in _without_gradient(adapter, inputs, [matrix], [gate]):
            continue
        if gate in _without_gradient(adapter, inputs, [gate], [matrix]):
            continue
        message = f"all its numbers are zero, and so is {gate}: each keeps the other's gradient at zero for ever"
        return [Finding("zero_init", "fail", matrix, message, HINT)]
    return []


def _without_gradient(
    adapter: ModelAdapter, inputs: dict[str, Tensor], asked: list[str], moved: list[str]
) -> list[str]:
    """Return which of the zero parameters get a gradient of exactly zero, with noise in those that have moved."""

    def call() -> Tensor:
        seed_streams(0, "forward")
        return adapter.logits(inputs)

    with parameters_as(adapter, moved, noise):
        parameters = [adapter.module.get_parameter(name) for name in asked]
        trained = [(name, p) for name, p in zip(asked, parameters, strict=True) if p.requires_grad]
        result: Tensor = guarded(adapter, inputs, "a forward pass with gradients", call)
        loss = adapter.loss(result, adapter.random_labels(result))
        if not trained or not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
    # No gradient at all is a cut, which gradient_flow reports.
    return [name for (name, _), g in zip(trained, gradients, strict=True) if g is not None and not bool(g.any())]


def _common(names: list[str]) -> str:
    """Return the innermost module that holds all these parameters; empty for the model itself."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
