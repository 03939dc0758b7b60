"""Do the weights start, or stand, where training can work? First loss, signal scale by depth, symmetry, zeros.

Thresholds come from chance level and are wide: whether a model trains well is no question for statistics of weights.
A model whose normalisation layers and biases have left their starting values counts as trained and is held to less.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.structure import blocks
from utils.validation.causality import replace_from
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.gradient_flow import training_inputs
from utils.validation.probing import content_input, logits

EXPLODING_HINT = (
    "Initialise with a standard deviation near 1/sqrt(fan-in) (0.02 is usual), residual outputs smaller still."
)
VANISHING_HINT = "Initialise with a standard deviation near 1/sqrt(fan-in), and keep a residual path around each block."
SYMMETRIC_HINT = (
    "Initialise with random numbers: units that start equal stay equal, so the layer has the power of one unit."
)
ZERO_HINT = "Initialise with small random numbers; zero is right only on a branch that a residual path bypasses."
IGNORED_HINT = "Follow the input through forward(): it is overwritten, multiplied by zero, or never used."
CLASSIFYING = ("causal_lm", "masked_lm", "seq2seq", "text_classification", "image_classification",
               "audio_classification", "tabular_classification")  # fmt: skip


def check_initialization(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Compare the first loss with chance, follow the signal through the blocks, look for equal and zero weights.

    Codes: ``exploding_init``, ``vanishing_init``, ``symmetric_init``, ``zero_init``, ``constant_output``,
    ``ignored_input``.
    """
    if not any(True for _ in adapter.module.parameters()):
        raise Skipped("the model has no parameters")
    inputs = training_inputs(adapter)
    scales: dict[str, float] = {}
    variations: dict[str, float] = {}
    followed = set(blocks(adapter.module).value)
    output_of: dict[str, tuple[int, ...]] = {}

    def follow(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None or not tensor.is_floating_point() or not tensor.numel():
            return
        if next(child.children(), None) is None:
            output_of[name] = tuple(tensor.shape)
        if name in followed or (not followed and name and isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d))):
            values = tensor.detach().float()
            scales[name] = float(values.square().mean().sqrt())
            if values.shape[0] == 2:
                variations[name] = float((values[0] - values[1]).square().mean().sqrt())

    fresh = looks_untrained(adapter.module)
    if fresh:
        # Before training, batch normalisation only normalises in train mode: its running statistics are not real yet.
        for child in adapter.module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.train()
    with observe(adapter.module, follow):
        result = logits(adapter, inputs)
    if not bool(torch.isfinite(result).all()):
        raise Skipped("the logits are not finite (see numerical_stability)")
    findings = _signal(adapter, scales, fresh)
    loss: float | None = None
    chance: float | None = None
    if adapter.task.value in CLASSIFYING and result.shape[-1] > 1:
        loss = float(adapter.loss(result, adapter.random_labels(result)))
        chance = math.log(result.shape[-1])
        findings += _first_loss(adapter, result, loss, chance, fresh, bool(findings))
    head = _head(adapter, output_of, tuple(result.shape))
    findings += _symmetric(adapter)
    findings += _zeros(adapter, inputs, head)
    if not findings:
        findings += _lost_input(scales, variations, result, fresh)
    if not findings:
        findings += _ignored_input(adapter, inputs, result)
    details = {
        "loss": loss,
        "chance": chance,
        "scale_by_depth": scales,
        "variation_by_depth": variations,
        "looks_untrained": fresh,
    }
    value = loss if loss is not None else next(reversed(scales.values()), None)
    why = (
        f"first loss {loss:.2f}, chance is {chance:.2f}"
        if loss is not None and chance is not None
        else "signal in range"
    )
    return Outcome(value, chance, why, findings, details)


def looks_untrained(module: nn.Module) -> bool:
    """Tell whether all vectors of a model (biases, norm weights) still hold one constant each, as when just made.

    A layer's default random bias is recognised by its bound of 1/sqrt(fan-in).
    """
    vectors = 0
    for child in module.modules():
        bias = getattr(child, "bias", None)
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.numel() > 1:
            vectors += 1
            if float(weight.detach().float().std()) > 1e-6:
                return False
        if isinstance(bias, nn.Parameter) and bias.dim() == 1 and bias.numel() > 1:
            vectors += 1
            values = bias.detach().float()
            fan_in = weight[0].numel() if isinstance(weight, Tensor) and weight.dim() > 1 else 1
            if float(values.std()) > 1e-6 and float(values.abs().max()) > 1.01 / math.sqrt(fan_in):
                return False
    return vectors > 0


def _signal(adapter: ModelAdapter, scales: dict[str, float], fresh: bool) -> list[Finding]:
    """Judge the root mean square of the signal after each block."""
    if not scales:
        return []
    path = " -> ".join(f"{scale:.2g}" for scale in _thinned(list(scales.values())))
    fail_above, warn_above = (200.0, 60.0) if fresh else (1e6, 1e5)
    for name, scale in scales.items():
        if scale > warn_above:
            severity = "fail" if max(scales.values()) > fail_above else "warn"
            message = f"the signal's scale (root mean square) by depth is {path}; here it passes {warn_above:g}"
            return [Finding("exploding_init", severity, name, message, EXPLODING_HINT)]
    for name, scale in scales.items():
        if 0 < scale < 1e-5:
            severity = "fail" if min(s for s in scales.values() if s > 0) < 1e-7 else "warn"
            message = f"the signal's scale (root mean square) by depth is {path}; here it falls below 1e-05"
            return [Finding("vanishing_init", severity, name, message, VANISHING_HINT)]
    return []


def _lost_input(scales: dict[str, float], variations: dict[str, float], result: Tensor, fresh: bool) -> list[Finding]:
    """Find where two different samples become the same to the last digit, if they do so in the output."""
    if not fresh or result.shape[0] != 2 or bool((result[0] != result[1]).any()) or not bool(result.any()):
        return []
    for name, variation in variations.items():
        if scales[name] > 0 and variation <= 1e-7 * scales[name]:
            path = " -> ".join(f"{value:.2g}" for value in _thinned(list(variations.values())))
            message = f"two samples give the same output; the difference between them by depth is {path}"
            return [Finding("vanishing_init", "fail", name, message, VANISHING_HINT)]
    return []


def _ignored_input(adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor) -> list[Finding]:
    """Find a model whose output is the same whatever goes in, and not only because a head starts at zero."""
    other = {**inputs}
    for name in {adapter.main_input, content_input(adapter)}:
        ids = adapter.modality == "tokens" or not inputs[name].is_floating_point()
        other[name] = replace_from(adapter, inputs[name], 0) if ids else torch.randn_like(inputs[name]) + inputs[name]
    if (adapter.modality == "tokens" and adapter.readable_ids() < 2) or not bool(
        (logits(adapter, other) == result).all()
    ):
        return []
    # Zeros that a first step moves are replaced by noise: a head or a gate that starts there hides nothing for long.
    zeros = [n for n, p in adapter.module.named_parameters() if p.is_floating_point() and not bool(p.detach().any())]
    with noise_instead(adapter, zeros):
        first, second = logits(adapter, inputs), logits(adapter, other)
    if bool((first != second).any()):
        return []
    constant = bool((result == result.flatten()[0]).all())
    what = f"the output is {float(result.flatten()[0]):.3g} everywhere" if constant else "replacing all of the input"
    message = f"{what}, for any input" if constant else f"{what} (`{adapter.main_input}`) leaves the output as it is"
    return [Finding("constant_output" if constant else "ignored_input", "fail", adapter.name, message, IGNORED_HINT)]


def _thinned(values: list[float], count: int = 8) -> list[float]:
    """Return at most `count` values, evenly spaced, the last included."""
    step = max(1, math.ceil(len(values) / count))
    return values[::step] if (len(values) - 1) % step == 0 else [*values[::step], values[-1]]


def _first_loss(
    adapter: ModelAdapter, result: Tensor, loss: float, chance: float, fresh: bool, explained: bool
) -> list[Finding]:
    """Compare the first loss with chance level, ln(classes)."""
    if explained:
        return []
    spread = float(result.float().std())
    # Default N(0, 1) embeddings tied to the head reach about sqrt(width) * sqrt(2 ln V) and still train: those warn. So
    # does a head or an embedding scaled thirtyfold: the first steps undo it; only beyond the limit training breaks.
    limit = max(20 * chance, 100.0)
    message = (
        f"the first loss is {loss:.1f}, chance is ln({result.shape[-1]}) = {chance:.2f} (logits spread {spread:.2g})"
    )
    if fresh and loss > limit:
        return [Finding("exploding_init", "fail", adapter.name, message, EXPLODING_HINT)]
    if loss > (4 * chance + 4 if fresh else limit):
        return [Finding("exploding_init", "warn", adapter.name, message, EXPLODING_HINT)]
    return []


def _head(adapter: ModelAdapter, output_of: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> str | None:
    """Return the last leaf module whose output is as wide as the logits; `output_of` is in execution order."""
    wide = [name for name, found in output_of.items() if found[-1:] == shape[-1:] or found[1:2] == shape[-1:]]
    return wide[-1] if wide else None


def _symmetric(adapter: ModelAdapter) -> list[Finding]:
    """Find layers whose units all start equal.

    Only weights of layers that mix features count: state-space decays and per-head scales have equal rows by design.
    """
    findings = []
    kinds = (nn.Linear, nn.Bilinear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.RNNBase, nn.MultiheadAttention)
    seen: set[int] = set()
    for name, child in adapter.module.named_modules():
        if not isinstance(child, kinds) or getattr(child, "groups", 1) > 1:
            continue
        for key, weight in child.named_parameters(recurse=False):
            if weight.dim() < 2 or weight.shape[0] < 2 or id(weight) in seen or not weight.requires_grad:
                continue
            seen.add(id(weight))
            rows = weight.detach()
            # The cheap comparison spares large tensors the full one.
            if not torch.equal(rows[0], rows[1]) or not bool((rows == rows[:1]).all()) or not bool(rows.any()):
                continue
            first = float(rows.flatten()[0])
            message = f"all {len(rows)} rows of the weight {tuple(rows.shape)} are equal ({first:.3g}, ...)"
            findings.append(
                Finding("symmetric_init", "fail", f"{name}.{key}" if name else key, message, SYMMETRIC_HINT)
            )
    return findings[:6]


def _zeros(adapter: ModelAdapter, inputs: dict[str, Tensor], head: str | None) -> list[Finding]:
    """Find zero weights that alone cut the output off from the input.

    Whether a zero matters is decided by running the model: every zero weight but the one in question is replaced by
    noise, and the logits must still tell two inputs apart. A zero head passes, because it moves with the first step.
    """
    candidates: list[str] = []
    for name, parameter in adapter.module.named_parameters():
        if parameter.numel() < 2 or not parameter.is_floating_point() or name.endswith("bias"):
            continue
        flat = parameter.detach().flatten()
        if float(flat[0]) == 0 and float(flat[-1]) == 0 and not bool(flat.any()):
            candidates.append(name)
    suspects = [name for name in candidates if head is None or not name.startswith(f"{head}.")]
    if not suspects or _tells_apart(adapter, inputs, candidates, keep=suspects):
        return []
    findings = []
    for name in suspects[:12]:
        if not _tells_apart(adapter, inputs, candidates, keep=[name]):
            count = adapter.module.get_parameter(name).numel()
            message = f"all {count:,} numbers are zero, and the output no longer depends on the input"
            findings.append(Finding("zero_init", "fail", name, message, ZERO_HINT))
    if not findings:
        message = f"{len(suspects)} weights are zero and together cut the output off from the input"
        findings.append(Finding("zero_init", "fail", suspects[0], message, ZERO_HINT))
    return findings


@contextmanager
def noise_instead(adapter: ModelAdapter, names: list[str]) -> Iterator[None]:
    """Let these parameters hold noise inside the block; their own tensors are not touched."""
    replaced = {id(adapter.module.get_parameter(name)) for name in names}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    for module in adapter.module.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in replaced:
                swapped.append((module._parameters, key, parameter))
                module._parameters[key] = nn.Parameter(torch.randn_like(parameter) * 0.1, requires_grad=False)
    try:
        yield
    finally:
        for owner, key, parameter in swapped:
            owner[key] = parameter


def _tells_apart(adapter: ModelAdapter, inputs: dict[str, Tensor], zeros: list[str], keep: list[str]) -> bool:
    """Tell whether the logits differ between samples when all `zeros` but `keep` hold noise instead."""
    with noise_instead(adapter, [name for name in zeros if name not in keep]):
        result = logits(adapter, inputs).float()
    scale = float(result.abs().max())
    # Positions alone can make a row of logits vary, so samples are compared at equal positions.
    return float((result[0] - result[-1]).abs().max()) > 1e-6 * max(scale, 1e-12)
