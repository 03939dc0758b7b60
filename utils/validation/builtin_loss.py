"""Which loss does a model return when it is given labels: of which scores, paired with which labels, how averaged?

The gradient of the loss by the scores answers all three at once. Cross-entropy's is ``w (softmax(z) - onehot(label))``
in each row that counts (Bishop, Pattern Recognition and Machine Learning, eq. 4.109): its least entry is the label, so
labels that are all different show the pairing; the rows' weights ``w`` add up to one for a mean, and to the number of
rows for a sum. Added losses that do not pass through the scores, such as the balancing of experts, are not in it.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters.capture import named_tensors
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.nesting import flattened
from utils.adapters.objectives import IGNORED, OBJECTIVES, OwnLoss, distinct_labels, labels_input, own_loss
from utils.validation.probing import guarded, logits

SHIFTS = (0, 1, 2, -1, 3, -2, -3)
AGREEMENT = 0.9
"""Share of the rows that a pairing must explain; labels that differ leave no doubt, two classes need the slack."""
COMPARED_ROWS = 6
"""Rows in which gradients are compared; one would do, were there no accident."""
BINARY_DRAWS = 4
FAINT = 0.01
"""Pull on a row's scores, relative to the strongest, below which the row does not count."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Largest deviation of a gradient from that of a known loss, relative to its norm."""


@dataclass(frozen=True)
class Pairing:
    """Which label each row of the scores is trained on."""

    shift: int | None
    """Row t is paired with label t + shift; None when no one shift explains the rows."""
    reversed: bool
    """The loss pushes the score of the label down."""
    rows: Tensor
    """Mask of the rows that count, shaped as the labels."""
    foreign: int
    """Rows paired with a label of another sample, or of another distance than most."""


@dataclass(frozen=True)
class Recognised:
    """The known loss that a model's own loss is."""

    name: str | None
    """A key of `OBJECTIVES`, or None."""
    weight: float
    """Sum of the rows' weights: 1 for a mean."""


@dataclass(frozen=True)
class Trial:
    """One call with labels and what the gradient says."""

    labels: Tensor
    scores: Tensor
    gradient: Tensor
    pairing: Pairing
    known: Recognised


def trial(adapter: ModelAdapter, inputs: Mapping[str, Any], labels: Tensor, scores: Tensor, gradient: Tensor) -> Trial:
    """Read pairing and kind off the gradient of one call."""
    pairing = find_pairing(gradient, labels)
    return Trial(labels, scores, gradient, pairing, recognise(scores, gradient, labels, pairing))


def find_pairing(gradient: Tensor, labels: Tensor) -> Pairing:
    """Find which label pulls at which row of the scores.

    Args:
        gradient: Of the loss by the scores, ``(batch, seq, classes)`` or ``(batch, classes)``.
        labels: ``(batch, seq)`` or ``(batch,)``, `IGNORED` where a position does not count.
    """
    gradient = gradient.reshape(*labels.shape, gradient.shape[-1])
    counted = pulled_rows(gradient)
    lowest, highest = gradient.argmin(-1), gradient.argmax(-1)
    best: tuple[float, int, bool, int] = (0.0, 0, False, 0)
    for shift in SHIFTS if labels.dim() == 2 else (0,):
        if labels.dim() == 2 and abs(shift) >= labels.shape[1]:
            continue
        moved = shifted_labels(labels, shift)
        valid = counted & (moved >= 0)
        if not bool(valid.any()):
            continue
        for reverse, extreme in ((False, lowest), (True, highest)):
            hits = int((extreme == moved)[valid].sum())
            share = hits / int(counted.sum())
            if share > best[0] + 1e-9:
                best = (share, shift, reverse, int(counted.sum()) - hits)
    share, shift, reverse, missed = best
    # Labels that are rolled come back at the other end, and a penalty on the scores reaches rows without a label.
    ends = abs(shift) * len(labels)
    if share >= AGREEMENT or (share > 0.5 and missed <= max(1, ends)):
        return Pairing(shift, reverse, counted, 0)
    known = torch.isin(lowest, labels[labels >= 0]) & counted
    return Pairing(None, False, counted, int(known.sum()))


def pulled_rows(gradient: Tensor, against: float = 0.0) -> Tensor:
    """Mask the rows with a pull worth the name; a penalty on large scores (z-loss) reaches all rows, but faintly.

    Args:
        gradient: By the scores, classes last.
        against: The largest pull of another call, if that says what is large.
    """
    pull = gradient.abs().amax(-1)
    return pull > FAINT * max(float(pull.max()), against)


def shifted_labels(labels: Tensor, shift: int) -> Tensor:
    """Return for each position t the label at t + shift, and `IGNORED` where there is none."""
    if shift == 0 or labels.dim() < 2:
        return labels
    moved = torch.full_like(labels, IGNORED)
    if shift > 0:
        moved[:, :-shift] = labels[:, shift:]
    else:
        moved[:, -shift:] = labels[:, :shift]
    return moved


def recognise(scores: Tensor, gradient: Tensor, labels: Tensor, pairing: Pairing) -> Recognised:
    """Find the known loss whose gradient has the same direction in every row."""
    if pairing.shift is None:
        return Recognised(None, 0.0)
    wanted = shifted_labels(labels, pairing.shift)
    rows = pairing.rows & (wanted >= 0)
    classes = gradient.shape[-1]
    z = scores.reshape(*labels.shape, classes)[rows].float()
    given = gradient.reshape(*labels.shape, classes)[rows].float()
    wanted = wanted[rows]
    found: list[tuple[float, str]] = []
    few = slice(0, COMPARED_ROWS)
    for name in OBJECTIVES:
        if "of the output" not in name or bool((z > 0).all()):
            found.append((_weights(name, z[few], given[few], wanted[few])[1], name))
    tolerance = TOLERANCE.get(scores.dtype, 1e-3)
    close = [entry for entry in found if entry[0] < tolerance]
    if not close:
        smoothed = _smoothed(z[few], given[few], wanted[few])
        return Recognised("cross-entropy", smoothed * len(z)) if smoothed else Recognised(None, 0.0)
    # Flat scores give several losses one direction; then the one that is a plain mean is the likelier.
    exact = [name for error, name in close if error < 10 * min(close)[0] + 1e-6]
    totals = {name: float(_weights(name, z, given, wanted)[0].sum()) for name in exact}
    name = min(exact, key=lambda name: abs(math.log(abs(totals[name]) + 1e-30)))
    return Recognised(name, totals[name])


def _weights(name: str, z: Tensor, given: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Fit a known loss's gradient to the given one; return each row's weight and the largest relative error."""
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        reference = torch.autograd.grad(OBJECTIVES[name](leaf, labels).sum(), leaf)[0]
    weights = (given * reference).sum(-1) / reference.square().sum(-1).clamp_min(1e-30)
    error = (given - weights[:, None] * reference).norm(dim=-1) / given.norm(dim=-1).clamp_min(1e-30)
    return weights, float(error.max())


def _smoothed(z: Tensor, given: Tensor, labels: Tensor) -> float | None:
    """Fit cross-entropy with label smoothing and a z-loss: ``a softmax(z) - b onehot - c``; None where it is neither.

    Sources: Szegedy et al. 2016, section 7; de Brebisson and Vincent 2016 for the logarithm of the normaliser.

    Returns:
        The mean weight of a row.
    """
    hot = functional.one_hot(labels, z.shape[-1]).float()
    basis = torch.stack([z.softmax(-1), hot, torch.ones_like(hot)], dim=-1)
    fit = torch.linalg.pinv(basis) @ given[..., None]
    error = ((basis @ fit)[..., 0] - given).norm(dim=-1) / given.norm(dim=-1).clamp_min(1e-30)
    a, b = fit[:, 0, 0], -fit[:, 1, 0]
    # Smoothing of at most a half; a softmax alone or a constant alone is another loss.
    if float(error.max()) > TOLERANCE[torch.float32] or not bool(((a > 0) & (b > 0.4 * a) & (b < 1.6 * a)).all()):
        return None
    return float(a.mean())


@dataclass(frozen=True)
class LabelExample:
    """What a user's example of labels tells about them."""

    whole: bool
    """There is one label for each number of the output: several may hold at once, or they are real."""
    fits: bool
    """They are shaped as labels usually are."""
    moved: bool
    """They are the input's tokens, moved by one already."""


def label_example(adapter: ModelAdapter, result: Tensor) -> LabelExample:
    """Look at the user's example of labels; without one, they are as usual."""
    name = labels_input(adapter)
    example = adapter.loss_inputs.get(name or "")
    given = flattened(adapter.spec.example_inputs or {})
    if example is None or name not in given:
        return LabelExample(False, True, False)
    text = adapter.content_input if adapter.task.value == "seq2seq" else adapter.main_input
    labels, ids = given[name], given[text]
    whole = example.dim() == result.dim() and example.shape[1:] == result.shape[1:]
    fits = example.dim() == 1 or example.shape[1:] == (ids.shape[1:] if result.dim() == 3 else (1,))
    moved = False
    if labels.shape == ids.shape and labels.dim() == 2:
        counted = labels[:, :-1] != IGNORED
        moved = bool((labels[:, :-1] == ids[:, 1:])[counted].all()) and not torch.equal(labels, ids)
    return LabelExample(whole, fits, moved)


def like_the_example(adapter: ModelAdapter, rows: int, seed: int) -> Tensor | None:
    """Draw labels out of the values of the user's example; None where there is none, or one value only."""
    example = adapter.loss_inputs.get(labels_input(adapter) or "")
    if example is None or not example.dim() or example.unique().numel() < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, *example.shape[1:])
    drawn = torch.randint(example.numel(), shape, generator=generator).to(example.device)
    return example.flatten()[drawn]


def torn_rows(tried: Trial) -> str | None:
    """Say how the scores were turned before they were cut into rows, where the loss is the cross-entropy of those.

    ``(batch, classes, time)`` viewed as rows of classes mixes positions and classes in each row; None where no such
    view has the loss's gradient.
    """
    scores, labels = tried.scores, tried.labels
    if scores.dim() != 3 or labels.dim() != 2:
        return None
    steps, classes = scores.shape[1:]
    tolerance = TOLERANCE.get(scores.dtype, 1e-3)
    given = tried.gradient.float()
    for order in [axes for axes in itertools.permutations(range(3)) if axes[2] != 2]:
        for shift in (0, 1) if steps > 1 else (0,):
            for turned in (False, True):
                wanted = labels[:, shift:].T if turned else labels[:, shift:]
                with torch.enable_grad():
                    leaf = scores.float().clone().requires_grad_()
                    rows = leaf[:, : steps - shift].permute(order).reshape(-1, classes)
                    loss = functional.cross_entropy(rows, wanted.flatten(), ignore_index=IGNORED)
                    reference = torch.autograd.grad(loss, leaf)[0]
                weight = (given * reference).sum() / reference.square().sum().clamp_min(1e-30)
                error = float((given - weight * reference).norm() / given.norm().clamp_min(1e-30))
                if float(weight) > 0 and error < tolerance:
                    return (
                        f"their axes are put in the order {order} before they are viewed as rows of {classes}, so that "
                        f"no row is the scores of one position (gradient equal within {error:.0e})"
                    )
    return None


def by_value(
    adapter: ModelAdapter, inputs: Mapping[str, Any], scores: Tensor, classes: int
) -> tuple[str | None, int, bool]:
    """Recognise a loss that is not made from the returned scores, by its values for several labels.

    Returns:
        The name in `OBJECTIVES` or None, the shift, and whether the labels had any influence.
    """
    drawn = [distinct_labels(tuple(scores.shape[:-1]), classes, seed).to(scores.device) for seed in range(4)]
    values = []
    for labels in drawn:
        with torch.no_grad():
            got = own_loss(adapter, inputs, labels, scores)
        if got is None:
            return None, 0, True
        values.append(float(got.loss))
    if max(values) == min(values):
        return None, 0, False
    own = torch.tensor(values, dtype=torch.float64).diff()
    noise = 16 * torch.finfo(scores.dtype).eps * max(abs(value) for value in values)
    flat = scores.reshape(-1, scores.shape[-1]).double()
    for name, objective in OBJECTIVES.items():
        if "of the output" in name and not bool((flat > 0).all()):
            continue
        for shift in SHIFTS if scores.dim() == 3 else (0,):
            references = []
            for labels in drawn:
                wanted = shifted_labels(labels, shift).reshape(-1)
                references.append(float(objective(flat[wanted >= 0], wanted[wanted >= 0]).mean()))
            theirs = torch.tensor(references, dtype=torch.float64).diff()
            scale = float((own @ theirs) / (theirs @ theirs).clamp_min(1e-30))
            if float((own - scale * theirs).abs().max()) <= max(2e-3 * float(own.abs().max()), noise) and scale > 0:
                return name, shift, True
    return None, 0, True


@dataclass(frozen=True)
class BinaryLoss:
    """What a model's own loss makes of yes-or-no labels, one for each number of its output."""

    labels: Tensor
    """The last that were tried."""
    twice: bool
    """The loss is binary cross-entropy of a sigmoid of the output."""
    by_element: bool
    """Labels have influence, and none on what the loss says about another number of the output."""


def binary_loss(adapter: ModelAdapter, inputs: Mapping[str, Any], result: Tensor) -> BinaryLoss | None:
    """Call a model with yes-or-no labels and tell its loss by its gradient, or else by its values; None without one."""
    shapes = [tuple(result.shape)]
    shapes += [shapes[0][:-1]] if result.dim() > 1 and result.shape[-1] == 1 else []
    for shape in shapes:
        try:
            tried = [_with_binary(adapter, inputs, result, shape, seed) for seed in range(BINARY_DRAWS)]
        except Exception:
            # The model wants labels of another shape or kind.
            continue
        calls = [(labels, got) for labels, got in tried if got is not None and bool(torch.isfinite(got.loss))]
        if len(calls) < BINARY_DRAWS:
            return None
        heard = len({float(got.loss.detach()) for _, got in calls}) > 1
        return BinaryLoss(calls[-1][0], _is_twice(calls, result), heard and _is_by_element(calls))
    return None


def _with_binary(
    adapter: ModelAdapter, inputs: Mapping[str, Any], result: Tensor, shape: tuple[int, ...], seed: int
) -> tuple[Tensor, OwnLoss | None]:
    """Call a model with labels of 1 in other places and of another number for each seed."""
    order = torch.randperm(result.numel(), generator=torch.Generator().manual_seed(seed))
    # Were there equally many, scores that are all equal would give one loss for all of them.
    labels = (order % (2 + seed) == 0).view(shape).to(result)
    with torch.enable_grad():
        return labels, own_loss(adapter, inputs, labels, result)


def _is_twice(calls: list[tuple[Tensor, OwnLoss]], result: Tensor) -> bool:
    """Tell whether losses are those of `binary_cross_entropy_with_logits` of the output, in every call.

    A loss made from the numbers before the sigmoid has no gradient by the output and other values; binary cross-entropy
    and squared error of the output itself have gradients of another direction.
    """
    flat, tolerance = result.detach().flatten().double(), TOLERANCE.get(result.dtype, 1e-3)
    factors: set[float] = set()
    for labels, got in calls:
        wanted = labels.flatten().double()
        if got.scores is not None and not torch.allclose(got.scores.double().flatten(), flat, rtol=tolerance):
            return False
        if got.gradient is not None and bool(got.gradient.any()):
            given, reference = got.gradient.flatten().double(), flat.sigmoid() - wanted
            weight = (given @ reference) / (reference @ reference)
            if float(weight) <= 0 or float((given - weight * reference).norm() / given.norm()) > tolerance:
                return False
            continue
        loss = float(got.loss.detach())
        mean = float(functional.binary_cross_entropy_with_logits(flat, wanted))
        sums = {1.0, float(len(flat)), len(flat) / len(result)}
        factors |= {factor for factor in sums if abs(loss - factor * mean) <= 0.1 * tolerance * abs(loss)} or {0.0}
    return len(factors) <= 1 and 0.0 not in factors


def _is_by_element(calls: list[tuple[Tensor, OwnLoss]]) -> bool:
    """Tell whether the gradient by a number of the output follows its own label alone, or there is none."""
    (labels, first), *others = calls
    for other, got in others:
        if first.gradient is None or got.gradient is None:
            continue
        same = (labels == other).flatten()
        moved = (first.gradient - got.gradient).flatten()[same].abs()
        if moved.numel() and float(moved.max()) > 1e-3 * float(first.gradient.abs().max()):
            return False
    return True


def untrained_parameters(adapter: ModelAdapter, inputs: Mapping[str, Any], labels: Tensor, scores: Tensor) -> list[str]:
    """Return the trainable parameters that make the logits and get no gradient from the model's own loss."""
    named = [(name, p) for name, p in adapter.module.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        output = adapter.logits(inputs)
        made = torch.autograd.grad(output.float().square().sum(), [p for _, p in named], allow_unused=True)
        got = own_loss(adapter, inputs, labels, scores)
        assert got is not None
        reached = torch.autograd.grad(got.loss, [p for _, p in named], allow_unused=True)
    return [name for (name, _), m, r in zip(named, made, reached, strict=True) if m is not None and r is None]


def called(adapter: ModelAdapter, inputs: Mapping[str, Any], labels: Tensor, expected: Tensor) -> Any:
    """Call the model with labels; an exception becomes a `ModelCrash`."""
    name = labels_input(adapter)
    words = f"{name} {tuple(labels.shape)} of {str(labels.dtype).removeprefix('torch.')}"
    return guarded(adapter, {**inputs, str(name): labels}, words, lambda: own_loss(adapter, inputs, labels, expected))


def looks_causal(adapter: ModelAdapter, inputs: Mapping[str, Any], before: Tensor) -> bool:
    """Tell whether the first position is blind to the last token, up to the model's noise."""
    ids = inputs[adapter.main_input].clone()
    ids[:, -1] = (ids[:, -1] + 1) % adapter.readable_ids()
    after = logits(adapter, {**inputs, adapter.main_input: ids}, whole=True)
    noise = 64 * torch.finfo(before.dtype).eps * float(before.abs().max())
    return bool((after[:, 0] - before[:, 0]).abs().max() <= noise)


def shift_of_own_targets(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> int | None:
    """Return by how many positions the targets are moved that a model makes from its own tokens; None without such.

    That is a single number in the output whose gradient by the scores pairs each row with one token of the input.
    """
    ids = inputs[adapter.main_input]
    with torch.enable_grad():
        found = dict(named_tensors(adapter.forward(inputs)))
        single = [t for t in found.values() if t.numel() == 1 and t.requires_grad]
        scores = [t for t in found.values() if t.dim() == 3 and t.shape[:2] == ids.shape and t.requires_grad]
        if len(single) != 1 or len(scores) != 1:
            return None
        gradient = torch.autograd.grad(single[0].sum(), scores[0], allow_unused=True)[0]
    if gradient is None or not bool(gradient.any()):
        return None
    pairing = find_pairing(gradient, ids)
    return None if pairing.reversed else pairing.shift
