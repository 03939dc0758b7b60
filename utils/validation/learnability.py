"""Can the model learn one small batch by heart?

The oldest test of all (Karpathy, "A Recipe for Training Neural Networks", 2019), on a copy. It judges mildly: a few
dozen steps on tiny data say little about how well a model learns, but a loss that no step size moves says that nothing
does, whatever the reason.
"""

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.objectives import distinct_labels
from utils.runtime.resources import is_out_of_memory
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.costs import CostCounter, operations
from utils.validation.frozen_parameters import last_wide_module
from utils.validation.probing import all_finite, has_length, logits
from utils.validation.watching import Running

LARGEST = 5_000_000
"""Parameters beyond which a copy and its optimizer cost more than the answer is worth."""
LEARNING_RATES = (1e-2, 1e-3, 1e-1)
STEPS = 40
"""Steps with each step size before nothing counts as learned; only the end of the time budget makes them fewer."""
BETAS, EPSILON = (0.9, 0.999), 1e-6
ENOUGH = 0.7
"""Share of the first loss at which learning is proven, and training stops."""
STUCK = 0.99
"""Share of the first loss above which nothing was learned at any step size."""
SLOW = 0.95
MOST_FLOPS, MOST_OPERATORS = 4e9, 8000
"""Floating-point operations and operators of a forward pass beyond which no copy is trained."""
LENGTH, BATCH = 8, 2
HALVES = (torch.float16, torch.bfloat16)
HINT = (
    "Train on one batch by hand and print the loss. Look for gradients that hooks change, for outputs that no weight "
    "can move, and for weights that forward() writes."
)


def check_learnability(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Train a copy on one batch with Adam until the loss has clearly fallen, with up to three step sizes.

    Codes: ``cannot_learn``, a fail where no step size moves the loss and a warning where the best moves it hardly.
    """
    trainable = [p for p in adapter.module.parameters() if p.requires_grad]
    if not trainable:
        raise Skipped("no parameter is trainable")
    if adapter.num_parameters > LARGEST:
        raise Skipped(f"{adapter.num_parameters:,} parameters; only models below {LARGEST:,} are trained on a copy")
    if adapter.task.value == "embedding":
        raise Skipped("the task has no labels")
    inputs = adapter.example_inputs(BATCH, adapter.legal_length(LENGTH) if has_length(adapter) else None)
    result = logits(adapter, inputs)
    if not all_finite([result]):
        raise Skipped("the output is not finite, which the check of finite numbers reports")
    counter = _Work()
    with counter:
        logits(adapter, inputs)
    flops = sum(counter.flops.values())
    if flops > MOST_FLOPS or counter.operators > MOST_OPERATORS:
        work = f"{operations(flops)} in {counter.operators:,} operators"
        raise Skipped(f"one forward pass is {work}; training a copy would take too long")
    labels = _labels(adapter, result)
    if not _ready(adapter, inputs, labels):
        raise Skipped("no gradient reaches any parameter, which the check of gradients reports")
    curves: dict[str, list[float]] = {}
    best, complete = 1.0, True
    for rate in LEARNING_RATES:
        if curves and not budget.afford(1e-6, f"{len(curves)} of 3 step sizes tried"):
            complete = False
            break
        losses, whole = _train(adapter, inputs, labels, rate, budget)
        complete = complete and whole
        curves[f"{rate:g}"] = losses
        finite = [loss for loss in losses[1:] if loss == loss]
        if finite and losses[0] > 0:
            best = min(best, min(finite) / losses[0])
        if best < ENOUGH:
            break
    first = next(iter(curves.values()))[0]
    steps = sum(len(losses) - 1 for losses in curves.values())
    details = {"losses": curves}
    if steps == 0 and not complete:
        raise Skipped("the time for this check was over before the first step of training was judged")
    words = f"the loss of one batch went from {first:.3g} to {best * first:.3g} at best"
    threshold = f"below {ENOUGH:g} of the first loss"
    tried = f"{steps} steps of Adam with step sizes {', '.join(curves)}"
    # Fewer steps because time was short prove nothing, and the report says that there were fewer.
    # What a small trained part can reach through a model that stays as it is, is little by nature.
    reached = STUCK if _mostly_frozen(adapter) else SLOW
    if best > reached and complete:
        severity = "fail" if best > STUCK else "warn"
        finding = Finding("cannot_learn", severity, adapter.name, f"{words} in {tried}", HINT, _reproduction())
        return Outcome(best, threshold, words, [finding], details)
    return Outcome(best, threshold, f"{words} ({tried})", [], details)


def _mostly_frozen(adapter: ModelAdapter) -> bool:
    """Tell whether more numbers are frozen than train, the head's among them."""
    sizes = {True: 0, False: 0}
    for parameter in adapter.module.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    head = last_wide_module(adapter)
    fixed = head is not None and not any(p.requires_grad for p in adapter.module.get_submodule(head).parameters())
    return fixed and sizes[False] > sizes[True]


def _labels(adapter: ModelAdapter, result: Tensor) -> Tensor:
    """Return labels for the batch, different for different samples."""
    if adapter.task.value == "regression" or result.dim() < 2:
        return adapter.random_labels(result)
    return distinct_labels(tuple(result.shape[:-1]), result.shape[-1]).to(result.device)


def _ready(adapter: ModelAdapter, inputs: dict[str, Tensor], labels: Tensor) -> bool:
    """Put the model in a mode in which a gradient arrives; False where there is none.

    Eval mode comes first, in which dropout and statistics of a tiny batch cannot blur the loss. But batch norms that
    have seen nothing need train mode, and caches that eval mode fills in place break its backward pass.
    """
    normed = any(name.endswith("running_mean") for name, _ in adapter.module.named_buffers())
    crashed = False
    for mode in (True, False) if normed else (False, True):
        adapter.module.train(mode)
        try:
            if _has_gradient(adapter, inputs, labels):
                return True
        except Exception as error:
            if is_out_of_memory(error):
                raise
            crashed = True
    if crashed:
        raise Skipped("the backward pass crashes, which the check of gradients reports")
    return False


def _has_gradient(adapter: ModelAdapter, inputs: dict[str, Tensor], labels: Tensor) -> bool:
    """Tell whether the first step could move anything."""
    seed_streams(0, "forward")
    loss = adapter.loss(adapter.logits(inputs), labels)
    if not loss.requires_grad:
        return False
    trainable = [p for p in adapter.module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
    return any(gradient is not None and bool(_dense(gradient).any()) for gradient in gradients)


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient in the one layout that everything here takes."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _train(
    adapter: ModelAdapter, inputs: dict[str, Tensor], labels: Tensor, rate: float, budget: Budget
) -> tuple[list[float], bool]:
    """Train a copy in the mode that the model is in; return the losses and whether no step was left out."""
    try:
        module = copy.deepcopy(adapter.module)
    except Exception as error:
        raise Skipped(f"the model cannot be copied ({type(error).__name__})") from None
    if any(p.dtype in HALVES for p in module.parameters()):
        # Adam in pure half precision loses its own small numbers; that is no fault of the model.
        module.float()
        inputs = {name: value.float() if value.dtype in HALVES else value for name, value in inputs.items()}
        labels = labels.float() if labels.dtype in HALVES else labels
    twin = copy.copy(adapter)
    twin.module = module
    if module.__class__ is adapter.module.__class__ and not _runs_alone(adapter, twin, inputs):
        raise Skipped("a copy of the model calls the original")
    parameters = [p for p in module.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses: list[float] = []
    slowest = 0.0
    for step in range(STEPS + 1):
        started = time.perf_counter()
        seed_streams(0, "forward")
        loss = twin.loss(twin.logits(inputs), labels)
        losses.append(float(loss.detach()))
        if losses[-1] < ENOUGH * losses[0] or losses[-1] != losses[-1] or step == STEPS:
            break
        module.zero_grad()
        loss.backward()
        _adam(parameters, moments, rate, step + 1)
        slowest = max(slowest, time.perf_counter() - started)
        if not budget.afford(slowest, f"{step + 1} of {STEPS} steps of training with step size {rate:g}"):
            return losses, False
    return losses, True


class _Work(CostCounter):
    """Counts what a pass costs, the same on every machine.

    Attributes:
        operators: How many operators ran.
    """

    def __init__(self) -> None:
        super().__init__(Running())
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def _adam(parameters: list[nn.Parameter], moments: list[tuple[Tensor, Tensor]], rate: float, step: int) -> None:
    """Take a step of Adam (Kingma and Ba, 2015, algorithm 1); torch's own imports its compiler, which takes seconds."""
    with torch.no_grad():
        for parameter, (mean, square) in zip(parameters, moments, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient * gradient.conj(), 1 - BETAS[1])
            scale = (square / (1 - BETAS[1] ** step)).real.sqrt() + EPSILON
            parameter.sub_(rate / (1 - BETAS[0] ** step) * mean / scale)


def _runs_alone(adapter: ModelAdapter, twin: ModelAdapter, inputs: dict[str, Tensor]) -> bool:
    """Tell whether a copy computes with its own weights; a forward bound to the original would not."""
    seed_streams(0, "forward")
    own = {id(p) for p in twin.module.parameters()}
    loss = twin.logits(inputs).float().square().sum()
    return not loss.requires_grad or _leaves(loss) & own != set()


def _leaves(loss: Tensor) -> set[int]:
    """Return the ids of the parameters that a tensor was computed from."""
    found: set[int] = set()
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        nodes.extend(parent for parent, _ in node.next_functions)
    return found


def _reproduction() -> str:
    return (
        "from utils.validation.learnability import check_learnability\n"
        "from utils.adapters import ModelAdapter; from utils.validation.check import Budget\n"
        "print(check_learnability(ModelAdapter(model.eval()), Budget(10)).details['losses'])"
    )
