"""Do the weights start, or stand, where training can work? First loss, signal scale by depth, symmetry, zeros.

Thresholds come from chance level and are wide: whether a model trains well is no question for statistics of weights.
A model whose normalisation layers and biases have left their starting values counts as trained and is held to less.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.structure import blocks
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.gradient_reach import training_inputs
from utils.validation.probing import logits
from utils.validation.rectifiers import watch_rectifiers
from utils.validation.statistics import thinned
from utils.validation.symmetry import stays_equal
from utils.validation.untrained import looks_untrained, normalise_batches
from utils.validation.weight_scales import (
    LARGEST_SOUND_GAIN,
    as_configured,
    exploding_head,
    largest_gain,
    largest_weight,
    loud_head,
    weight_faults,
)
from utils.validation.zero_weights import zero_weights

EXPLODING_HINT = (
    "Initialise with a standard deviation near 1/sqrt(fan-in) (0.02 is usual), residual outputs smaller still."
)
STRUCTURE_HINT = "Normalise before or after each block, and remove constant factors above 1 from forward()."
VANISHING_HINT = "Initialise with a standard deviation near 1/sqrt(fan-in), and keep a residual path around each block."
SYMMETRIC_HINT = (
    "Initialise with random numbers: units that start equal stay equal, so the layer has the power of one unit."
)
RECOVERED = 1e-3
"""Scale of a later place that tells a faint branch from a faint stream."""
SUDDEN = 1e-3
"""Share of the signal that differs between samples, from which on a step to nothing is a cut."""
LOUD = 60.0
"""Scale of a signal that no untrained model needs."""
LARGE_LOSS = 6.0
"""First loss in units of chance that is worth a look."""
LOUD_LOSS = 2.5
"""First loss in units of chance that a head of ordinary scale does not reach."""
CERTAIN, NEAR_CHANCE = 3.0, 1.0
"""Nats above chance: from the first on, a head is certain of wrong answers before it has seen any.

Three nats give the right class a twentieth of what guessing would. With few classes twice chance is less than that, and
a few steps undo it. A head of gain 1 over a normalised stream adds half a nat by its random logits alone.
"""
CLASSIFYING = ("causal_lm", "masked_lm", "seq2seq", "text_classification", "image_classification",
               "audio_classification", "tabular_classification")  # fmt: skip


def check_initialization(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Compare the first loss with chance, follow the signal through the blocks, look for equal and zero weights.

    Codes: ``exploding_init``, ``vanishing_init``, ``symmetric_init``, ``zero_init``.
    """
    if not any(True for _ in adapter.module.parameters()):
        raise Skipped("the model has no parameters")
    inputs = training_inputs(adapter)
    scales: dict[str, float] = {}
    variations: dict[str, float] = {}
    loud: set[str] = set()
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
            entering = next((t for t in given if isinstance(t, Tensor) and t.is_floating_point()), None)
            if name not in followed and entering is not None and float(entering.detach().float().std()) > LOUD:
                loud.add(name)
            if values.shape[0] == 2:
                variations[name] = float((values[0] - values[1]).square().mean().sqrt())

    fresh = looks_untrained(adapter.module)
    normalise_batches(adapter)
    with watch_rectifiers(adapter.module) as rectified, observe(adapter.module, follow):
        result = logits(adapter, inputs)
    if not bool(torch.isfinite(result).all()):
        raise Skipped("the logits are not finite (see numerical_stability)")
    findings = weight_faults(adapter) if fresh else []
    findings += [] if findings else _signal(adapter, scales, variations, fresh, loud)
    if findings and as_configured(adapter):
        # The library's own choice, at a width that does not suit it: odd, but no accident.
        findings = [replace(finding, severity="warn") for finding in findings]
    head = _head(adapter, output_of, tuple(result.shape))
    loss: float | None = None
    chance: float | None = None
    if adapter.task.value in CLASSIFYING and result.shape[-1] > 1:
        loss = float(adapter.loss(result, adapter.random_labels(result)))
        chance = math.log(result.shape[-1])
        findings += _first_loss(adapter, result, loss, chance, fresh, bool(findings))
        matrix = exploding_head(adapter) if fresh and len(findings) == 1 else None
        if matrix and findings[0].code == "exploding_init" and findings[0].message.startswith("the first loss"):
            # One matrix, drawn beyond what any family draws, is to blame.
            findings = [replace(findings[0], severity="fail", where=matrix)]
        far = LOUD_LOSS * chance + 1
        quiet = any(finding.severity == "fail" for finding in findings) or not fresh or not loss > far
        if not quiet and (tamed := loud_head(adapter, head, inputs)) is not None and tamed[1] < far / 2:
            # With the head at an ordinary scale, the loss is an ordinary one.
            blamed = loss >= max(2 * chance, chance + CERTAIN) and tamed[1] <= chance + NEAR_CHANCE
            message = (
                f"the first loss is {loss:.1f}, chance is ln({result.shape[-1]}) = {chance:.2f}: the head is too loud; "
                f"with {tamed[0]} at a gain of 1 it is {tamed[1]:.1f}"
            )
            findings = [
                Finding("exploding_init", "fail" if blamed else "warn", tamed[0], message, EXPLODING_HINT),
            ]
    findings += _symmetric(adapter) or stays_equal(adapter)
    findings += zero_weights(adapter, inputs, head)
    if not findings and all(rectified.alive.values()):
        findings += _lost_input(scales, variations, result, fresh)
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


def _signal(
    adapter: ModelAdapter, scales: dict[str, float], variations: dict[str, float], fresh: bool, loud: set[str]
) -> list[Finding]:
    """Judge the root mean square of the signal after each block, `variations` being what tells two samples apart.

    What is too large as it enters a layer, one of `loud`, became so in the code that calls it.
    """
    if not scales:
        return []
    path = " -> ".join(f"{scale:.2g}" for scale in thinned(list(scales.values())))
    fail_above, warn_above = (200.0, LOUD) if fresh else (1e6, 1e5)
    for name, scale in scales.items():
        if scale > warn_above:
            severity = "fail" if max(scales.values()) > fail_above else "warn"
            message = f"the signal's scale (root mean square) by depth is {path}; here it passes {warn_above:g}"
            if fresh and largest_gain(adapter) <= LARGEST_SOUND_GAIN:
                message += "; no weights are large, so something multiplies or adds up on the way"
                place = name.rpartition(".")[0] or adapter.name if name in loud else name
                return [Finding("exploding_gradient", severity, place, message, STRUCTURE_HINT)]
            return [Finding("exploding_init", severity, name, message, EXPLODING_HINT)]
    plain = [name for name, scale in scales.items() if variations.get(name, scale) > RECOVERED]
    last = max((index for index, name in enumerate(scales) if name in plain), default=-1)
    for index, (name, scale) in enumerate(scales.items()):
        # A faint branch beside a stream of ordinary scale is bypassed.
        if 0 < scale < 1e-5 and index > last:
            severity = "fail" if min(s for s in scales.values() if s > 0) < 1e-7 else "warn"
            message = f"the signal's scale (root mean square) by depth is {path}; here it falls below 1e-05"
            return [Finding("vanishing_init", severity, name, message, VANISHING_HINT)]
    return []


def _lost_input(scales: dict[str, float], variations: dict[str, float], result: Tensor, fresh: bool) -> list[Finding]:
    """Find where two different samples become the same to the last digit, if they do so in the output."""
    if not fresh or result.shape[0] != 2 or bool((result[0] != result[1]).any()) or not bool(result.any()):
        return []
    before = 1.0
    for name, variation in variations.items():
        share = variation / scales[name] if scales[name] > 0 else before
        if share <= 1e-7:
            if before > SUDDEN:
                # Cut off in one step, which input_influence reports: nothing died away.
                return []
            path = " -> ".join(f"{value:.2g}" for value in thinned(list(variations.values())))
            message = f"two samples give the same output; the difference between them by depth is {path}"
            return [Finding("vanishing_init", "fail", name, message, VANISHING_HINT)]
        before = share
    return []


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
        return [Finding("exploding_init", "fail", largest_weight(adapter) or adapter.name, message, EXPLODING_HINT)]
    if loss > (LARGE_LOSS * chance + 2 if fresh else limit):
        return [Finding("exploding_init", "warn", largest_weight(adapter) or adapter.name, message, EXPLODING_HINT)]
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
            # One number per unit is a gain.
            if weight.dim() < 2 or weight.shape[0] < 2 or weight[0].numel() < 2 or id(weight) in seen:
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
