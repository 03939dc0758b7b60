"""How the gradient fares on its way back through the model, and whether blocks have their skip connections.

The gradient is compared only between places that everything flows through, found in the autograd graph itself: the
stream after each block, every layer of a plain chain, never the inside of a branch. So a branch that starts at zero
(ReZero, LayerScale, zero-initialised projections) cannot look like a vanishing gradient, and no block need be known by
name. The measure is the gradient with respect to the signal there. In a sound model it stays within a few powers of
ten at any depth: residual paths carry it whole, and plain chains are kept near one by initialisation (Glorot and Bengio
2010; He et al. 2015).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.dependence import as_double, double_twin
from utils.validation.gradient_reach import training_inputs
from utils.validation.probing import ModelCrash, forward_seconds, guarded, has_length, is_out_of_memory, logits
from utils.validation.residuals import missing_residuals
from utils.validation.statistics import thinned
from utils.validation.substitution import faint_gains, parameters_as
from utils.validation.untrained import BATCH_NORM, enough_samples, looks_untrained, normalise_batches
from utils.validation.weight_scales import weight_faults

VANISHED = 2e-5
"""Share of the gradient that must arrive at the first place; a plain tanh net of default weights keeps 0.58 a layer."""
EXPLODED = 1e4
CHAOTIC, CHAOTIC_STEPS = 8.0, 3
"""Gain of a layer, in so many layers one after another, at which neighbours part; sound models of all sets reach 2."""
ROUNDED = 1e-13
"""Difference in float64, beside the values, that is no more than rounding."""
FEWEST_STEPS = 8
"""Calls of one module from which they are a loop."""
TINY = 1e-45
"""The smallest number above zero in float32."""
RECURRENT_LENGTH = 128
LARGEST_RECURRENT = 5_000_000
"""Parameters up to which the gradient is also followed over a long sequence, if nothing says the model is recurrent."""
VANISHING_HINT = (
    "Use ReLU or GELU instead of sigmoid or tanh, add skip connections and normalisation, "
    "and initialise for the activation (nn.init.kaiming_normal_, xavier_normal_)."
)
EXPLODING_HINT = "Normalise before each block, remove constant factors above 1, and initialise near 1/sqrt(fan-in)."
CONSTANT_HINT = (
    "Average over axes that the norm before it does not centre, or drop that norm: the mean of centred numbers is zero."
)
CHAOTIC_HINT = (
    "Draw weights so that each layer passes small differences on at their size: for sin(w x) within sqrt(6 / fan_in) / "
    "w of zero in all layers but the first (Sitzmann et al. 2020), else near 1/sqrt(fan-in)."
)
RECURRENT_HINT = (
    "Initialise recurrent weights orthogonally (nn.init.orthogonal_), use an LSTM or GRU, and clip gradients."
)


@dataclass(frozen=True)
class Place:
    """A tensor that everything flows through."""

    name: str
    """The module that put it out."""
    gradient: float
    """Norm of the loss's gradient with respect to it."""
    signal: float = 1.0
    """Its own norm."""


def check_signal_propagation(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Follow the gradient back through depth and, for recurrent models, time; look for missing skip connections.

    Codes: ``vanishing_gradient``, ``exploding_gradient``, ``missing_residual``, ``constant_output``.
    """
    if not any(p.dim() > 1 for p in adapter.module.parameters()):
        raise Skipped("the model has no layers")
    inputs = enough_samples(adapter)
    with parameters_as(adapter, faint_gains(adapter), torch.ones_like):
        loss, places, steps = _follow(adapter, inputs)
    findings = missing_residuals(adapter, training_inputs(adapter)) if _two_samples(adapter) else []
    # Batch norms over few samples scale single gradients down by any factor, and keep streams from growing.
    batches = any(isinstance(child, BATCH_NORM) for child in adapter.module.modules())
    if math.isfinite(loss):
        # Blocks without skip connections lose the gradient for that reason.
        tiny = [fault for fault in weight_faults(adapter) if fault.code == "vanishing_init"]
        known = {"vanishing_gradient": bool(findings or tiny), "exploding_gradient": batches}
        findings += [_unless_constant(adapter, inputs, f, places) for f in _by_depth(places) if not known[f.code]]
    if not findings and math.isfinite(loss):
        findings += _by_step(adapter, steps) or _by_time(adapter, budget, loss)
    if not findings and not batches and looks_untrained(adapter.module):
        findings += _chaotic(places)
    details = {"loss": loss, "gradient_by_depth": {place.name: place.gradient for place in places}}
    if len(places) < 2 or not places[-1].gradient:
        return Outcome(None, VANISHED, "no two places that everything flows through", findings, details)
    kept = places[0].gradient / places[-1].gradient
    why = f"the gradient at {places[0].name} is {kept:.2g} times that at {places[-1].name}"
    return Outcome(kept, VANISHED, why, findings, details)


def gradient_by_depth(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> tuple[float, list[Place]]:
    """Return the loss and the gradient's norm at every place that everything flows through, the first one first.

    The logits themselves and what follows the last hidden layer are left out.
    """
    loss, places, _ = _follow(adapter, inputs)
    return loss, places


def _follow(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> tuple[float, list[Place], list[tuple[Place, Place]]]:
    """Return what `gradient_by_depth` does, and the first and the last call of each module called time and again."""
    outputs: dict[Any, tuple[str, Tensor]] = {}

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if name and tensor is not None and tensor.grad_fn is not None and tensor.is_floating_point():
            outputs.setdefault(tensor.grad_fn, (name, tensor))

    def call() -> Tensor:
        seed_streams(0, "forward")
        with observe(adapter.module, note):
            return adapter.logits(inputs)

    normalise_batches(adapter)
    result: Tensor = guarded(adapter, inputs, "a forward pass with gradients", call)
    loss = adapter.loss(result, adapter.random_labels(result))
    if loss.grad_fn is None or not outputs:
        return float(loss.detach()), [], []
    # A table read before a norm may hold numbers of any scale, and its gradient has the inverse.
    tables = {name for name, child in adapter.module.named_modules() if isinstance(child, nn.Embedding)}
    passed = [
        node
        for node in bottlenecks(loss.grad_fn, outputs)
        if node is not result.grad_fn and outputs[node][0] not in tables
    ]
    calls: dict[str, list[Tensor]] = {}
    for name, tensor in outputs.values():
        calls.setdefault(name, []).append(tensor)
    looped = [(name, made[0], made[-1]) for name, made in calls.items() if len(made) >= FEWEST_STEPS]
    tensors = [outputs[node][1] for node in passed] + [tensor for _, *ends in looped for tensor in ends]
    gradients: Sequence[Tensor | None]
    try:
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True) if tensors else ()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A backward pass that raises is the business of gradient_flow.
        gradients = [None] * len(tensors)
    norms = [None if gradient is None else float(gradient.float().norm()) for gradient in gradients]
    places = [
        Place(outputs[node][0], norm, float(outputs[node][1].detach().float().norm()))
        for node, norm in zip(passed, norms, strict=False)
        if norm is not None
    ]
    ends = iter(norms[len(passed) :])
    steps = [
        (Place(name, first), Place(name, last))
        for (name, _, _), first, last in zip(looped, ends, ends, strict=True)
        if first is not None and last is not None
    ]
    return float(loss.detach()), places, steps


def bottlenecks(end: Any, marked: Any) -> list[Any]:
    """Return the marked nodes of an autograd graph that every path from its deepest marked node to `end` passes.

    Nodes are visited from `end` in topological order. Where exactly one node is discovered and not yet visited, no path
    can go around it. Only nodes from which the start can be reached are counted.

    Args:
        end: The node of the loss.
        marked: Nodes of interest, in the order in which they were made; the first that `end` reaches is the start.

    Returns:
        The marked bottlenecks in the order of the forward pass, the start first.
    """
    order = _topological(end)
    reached = set(order)
    start = next((node for node in marked if node in reached), None)
    if start is None:
        return []
    leading = {start}
    for node in reversed(order):
        if any(before in leading for before, _ in node.next_functions):
            leading.add(node)
    open_nodes, passed = {end}, []
    for node in order:
        if node not in leading:
            continue
        open_nodes.discard(node)
        if not open_nodes and node in marked:
            passed.append(node)
        if node is start:
            break
        open_nodes.update(before for before, _ in node.next_functions if before in leading)
    return passed[::-1]


def _topological(end: Any) -> list[Any]:
    """Return the nodes of an autograd graph, each before those it depends on."""
    done: list[Any] = []
    seen = {end}
    stack = [(end, iter([before for before, _ in end.next_functions if before is not None]))]
    while stack:
        node, following = stack[-1]
        step = next((before for before in following if before not in seen), None)
        if step is None:
            done.append(node)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter([before for before, _ in step.next_functions if before is not None])))
    return done[::-1]


def _two_samples(adapter: ModelAdapter) -> bool:
    """Tell whether two samples of an input can differ at all."""
    return adapter.modality != "tokens" or adapter.readable_ids() > 1


def _by_depth(places: list[Place]) -> list[Finding]:
    """Compare the gradient at the first place with the one at the last."""
    if len(places) < 2 or not all(math.isfinite(place.gradient) for place in places) or not places[-1].gradient:
        return []
    first, last = places[0], places[-1]
    kept = first.gradient / last.gradient
    if not kept:
        # Exactly nothing arrives where something is zero, dead or cut off, which is found by name elsewhere.
        return []
    path = " <- ".join(f"{place.gradient:.2g}" for place in thinned(places))
    between = f"the gradient's norm from {first.name} to {last.name} is {path}"
    if kept < VANISHED:
        steps = [math.log(max(b.gradient, TINY) / max(a.gradient, TINY)) for a, b in pairwise(places)]
        worst = max(range(len(steps)), key=lambda index: steps[index])
        alone = steps[worst] > 0.5 * math.log(1 / max(kept, TINY))
        where = places[worst + 1].name if alone else first.name
        message = f"{between}: only {kept:.1g} of it arrives"
        return [Finding("vanishing_gradient", "fail", where, message, VANISHING_HINT, _reproduction(first, last))]
    # A last norm takes the scale of a stream that has grown off the gradient again.
    grown = first.gradient / max(min(place.gradient for place in places[1:]), TINY)
    sudden = max(a.gradient / max(b.gradient, TINY) for a, b in pairwise(places))
    # A single step is one change of scale, as a norm over few samples makes; growth by depth takes many.
    if grown > EXPLODED and sudden < math.sqrt(grown):
        message = f"{between}: on the way back it grows {grown:.1g} times"
        return [Finding("exploding_gradient", "fail", first.name, message, EXPLODING_HINT, _reproduction(first, last))]
    return []


def _chaotic(places: list[Place]) -> list[Finding]:
    """Find layers that each part neighbouring inputs, though the signal keeps its size (Poole et al. 2016).

    Counted is the gradient times the signal, which a change of scale leaves as it is: how many per cent the loss moves
    for each per cent of what flows there.
    """
    shares = [place.gradient * place.signal for place in places]
    if not all(math.isfinite(share) and share > 0 for share in shares):
        return []
    gains = [before / after for before, after in pairwise(shares)]
    for start in range(len(gains) - CHAOTIC_STEPS + 1):
        steps = gains[start : start + CHAOTIC_STEPS]
        if min(steps) < CHAOTIC:
            continue
        first, last = places[start], places[start + CHAOTIC_STEPS]
        path = ", ".join(f"{gain:.2g}" for gain in steps)
        message = (
            f"from {last.name} back to {first.name} the gradient grows {path} times, layer by layer, and the signal "
            f"does not shrink: inputs that hardly differ end {math.prod(steps):.1g} times further apart, and unrelated"
        )
        return [Finding("exploding_gradient", "fail", first.name, message, CHAOTIC_HINT, _reproduction(first, last))]
    return []


def _unless_constant(
    adapter: ModelAdapter, inputs: dict[str, Tensor], finding: Finding, places: list[Place]
) -> Finding:
    """Return the finding, or another one where the gradient is lost in one step that leaves rounding alone.

    A mean over what a norm has just centred is zero by arithmetic. Only its rounding reaches the logits: as much of it
    as the number type has, while a faint signal is equally faint in any type.
    """
    samples = inputs[adapter.main_input]
    alike = len(samples) < 2 or torch.equal(samples[0], samples[1])
    if finding.code != "vanishing_gradient" or finding.where == places[0].name or alike:
        return finding
    if (twin := double_twin(adapter)) is None:
        return finding
    normalise_batches(twin)
    try:
        exact = logits(twin, as_double(inputs))
    except ModelCrash:
        return finding
    size = float(exact.abs().max())
    if exact.dtype != torch.float64 or len(exact) < 2 or not _gap(exact) <= ROUNDED * size:
        return finding
    message = (
        f"the output is the same for any input: {finding.where} leaves nothing but rounding (the logits of two samples "
        f"differ by {_gap(exact):.1g} beside {size:.2g} in float64), so no gradient passes it"
    )
    return Finding("constant_output", "fail", finding.where, message, CONSTANT_HINT)


def _gap(result: Tensor) -> float:
    """Return the largest difference between two samples' logits."""
    return float((result[0] - result[1]).abs().max())


def _by_step(adapter: ModelAdapter, steps: list[tuple[Place, Place]]) -> list[Finding]:
    """Compare the gradient at the first call of a module with the one at its last, where a loop calls it."""
    for first, last in steps:
        if last.gradient and math.isfinite(first.gradient) and first.gradient > EXPLODED * last.gradient:
            message = (
                f"the gradient's norm at {first.name} is {last.gradient:.2g} in the last step and {first.gradient:.2g} "
                "in the first: it grows with every step back in time"
            )
            where = first.name.rpartition(".")[0] or adapter.name
            return [Finding("exploding_gradient", "fail", where, message, RECURRENT_HINT)]
    return []


def _by_time(adapter: ModelAdapter, budget: Budget, loss: float) -> list[Finding]:
    """Compare the gradient for a long sequence with that for a short one, where time may be walked step by step."""
    recurrent = any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in adapter.module.modules())
    if not has_length(adapter) or not (recurrent or adapter.num_parameters <= LARGEST_RECURRENT):
        return []
    length = adapter.legal_length(min(RECURRENT_LENGTH, adapter.max_length.value or RECURRENT_LENGTH))
    short = adapter.legal_length(max(1, length // 8))
    seconds = 4 * forward_seconds(adapter, short) * length / short if budget.remaining() else math.inf
    if not budget.afford(seconds, f"the gradient over {length} tokens was not followed") or short == length:
        return []
    try:
        sizes = [_gradient_norm(adapter, size) for size in (short, length)]
    except ModelCrash:
        if adapter.max_length.value is not None:
            raise
        # Nobody said that so many tokens are legal.
        return []
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A backward pass that raises is the business of gradient_flow.
        return []
    if not all(math.isfinite(size) for size in sizes) or sizes[1] <= max(EXPLODED, 1000 * sizes[0]):
        return []
    message = (
        f"the gradient's norm is {sizes[0]:.2g} for {short} tokens and {sizes[1]:.2g} for {length}: "
        "it grows with every step back in time"
    )
    return [Finding("exploding_gradient", "fail", _recurrent_part(adapter), message, RECURRENT_HINT)]


def _gradient_norm(adapter: ModelAdapter, length: int) -> float:
    """Return the norm of the loss's gradient for one sequence of a length."""
    parameters = [p for p in adapter.module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    inputs = adapter.example_inputs(1, length)

    def call() -> Tensor:
        seed_streams(0, "forward")
        return adapter.logits(inputs)

    result: Tensor = guarded(adapter, inputs, "a forward pass with gradients", call)
    loss = adapter.loss(result, adapter.random_labels(result))
    if loss.requires_grad:
        loss.backward()
    return math.sqrt(sum(float(p.grad.float().norm()) ** 2 for p in parameters if p.grad is not None))


def _recurrent_part(adapter: ModelAdapter) -> str:
    """Return the layer of recurrence, or the matrix with the largest gradient where the model's own code loops."""
    for name, module in adapter.module.named_modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return name or adapter.name
    calls: dict[str, int] = {}

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    with observe(adapter.module, note), torch.no_grad():
        adapter.forward(training_inputs(adapter))
    looped = [name for name, count in calls.items() if count > 2]
    return looped[0].rpartition(".")[0] or adapter.name if looped else adapter.name


def _reproduction(first: Place, last: Place) -> str:
    """Return three lines that print the gradient's norm at two modules."""
    return (
        "from utils import ModelAdapter; a = ModelAdapter(model); f = lambda n: lambda m, x, y: print(n, y[0].norm())\n"
        f"m = a.module.get_submodule; names = {first.name!r}, {last.name!r}\n"
        "hooks = [m(n).register_full_backward_hook(f(n)) for n in names]; "
        "a.logits(a.example_inputs()).square().mean().backward()"
    )
