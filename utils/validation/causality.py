"""Can a position see later tokens? Proof by perturbation: change the suffix, and nothing before it may change."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.probing import content_input, has_length, logits, longest_length, short_length

SIGHT_LENGTH = 12
HINT = (
    "Mask the future where positions mix: scaled_dot_product_attention(..., is_causal=True) or a triangular mask; "
    "pad convolutions on the left only; never normalise or pool over time."
)


def check_causality(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Replace all tokens from a position on, and require the logits before it to stay as they are.

    Tried are the second, the middle and the last position at a short length and, as time permits, the middle and the
    last at the longest. The tolerance is the model's own numerical noise.
    """
    if adapter.task.value not in ("causal_lm", "seq2seq"):
        raise Skipped(f"not a causal model ({adapter.task.value}: {adapter.task.reason}); it may see every position")
    if not has_length(adapter):
        raise Skipped("the input is no sequence of tokens")
    if (adapter.vocab_size.value or 0) < 2:
        raise Skipped("a vocabulary of fewer than two tokens leaves nothing to replace")
    short = short_length(adapter)
    if short < 2:
        raise Skipped("the maximum length is 1, so there is no later position")
    tried: list[dict[str, Any]] = []
    cuts = tuple(sorted({1, short // 2, short - 1}))
    finding = _test_length(adapter, short, cuts, tried)
    if finding is None:
        longest = longest_length(adapter, budget, passes=3)
        lengths = [n for n in (adapter.legal_length(longest // 4),) if n > 2 * short and longest <= 512]
        for length in [*lengths, longest] if longest > short else []:
            finding = finding or _test_length(adapter, length, (length - 1, length // 2), tried)
    largest = max(entry["change"] for entry in tried)
    if finding is not None and adapter.task_assumed:
        finding = _weigh(adapter, finding)
    findings = [finding] if finding else []
    why = f"no token changes an earlier logit, up to length {max(entry['length'] for entry in tried)}"
    return Outcome(largest, tried[-1]["tolerance"], why, findings, {"tried": tried})


def _weigh(adapter: ModelAdapter, finding: Finding) -> Finding:
    """Soften a leak where the task is only assumed and the model may well be an encoder.

    A decoder whose mask was forgotten is the commonest silent fault, and without a mask it looks exactly like an
    encoder: scores over the vocabulary, every position sees every other. So full sight alone excuses nothing. Only
    together with a sign of its own (a mask token in the config, an encoder's name) does it make an encoder the likelier
    reading; and a partial leak (one token ahead, from some length on, weak beside the past) is no encoder's doing.
    """
    if adapter.encoder_sign is None or not sees_everything(adapter):
        hint = f"{finding.hint} If it is meant to see later tokens, say ModelSpec(task='masked_lm')."
        return replace(finding, hint=hint)
    message = (
        f"every position sees every other; the task is only assumed to be causal, and {adapter.encoder_sign} "
        f"speaks for an encoder: {finding.message}"
    )
    hint = "State the task: ModelSpec(task='masked_lm') if it may see later tokens, ModelSpec(task='causal_lm') if not."
    return replace(finding, severity="warn", message=message, hint=hint)


def sees_everything(adapter: ModelAdapter) -> bool:
    """Tell whether every position is influenced by later tokens as it is by earlier ones."""
    matrix = influence(adapter, adapter.legal_length(min(SIGHT_LENGTH, adapter.max_length.value or SIGHT_LENGTH)))
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1)
    future, past = matrix[rows, columns], matrix[columns, rows]
    if not future.numel():
        return False
    seen = float((future > 1e-6 * matrix.max()).float().mean())
    return seen > 0.95 and float(future.median()) > 0.1 * float(past.median())


def influence(adapter: ModelAdapter, length: int) -> Tensor:
    """Return how much changing each token changes each position's logits.

    Returns:
        ``(seq, seq)`` on the CPU; entry ``[i, j]`` is the largest change of the logits at position i when token j is
        replaced.
    """
    inputs = adapter.example_inputs(1, length)
    name = content_input(adapter)
    base = logits(adapter, inputs)
    replaced = replace_from(adapter, inputs[name], 0)
    columns = []
    for token in range(length):
        changed = inputs[name].clone()
        changed[:, token] = replaced[:, token]
        difference = (logits(adapter, {**inputs, name: changed}) - base).abs()
        columns.append(difference.amax(dim=(0, *range(2, difference.dim()))).float())
    return torch.stack(columns, dim=1).cpu()


def _test_length(
    adapter: ModelAdapter, length: int, cuts: Iterable[int], tried: list[dict[str, Any]]
) -> Finding | None:
    """Test one length at several cut positions and return the first leak."""
    name = content_input(adapter)
    inputs = adapter.example_inputs(1, length)
    base = logits(adapter, inputs)
    if base.dim() < 3 or base.shape[1] != length:
        raise Skipped(
            f"the logits have shape {tuple(base.shape)} for length {length}: no logit per position to compare"
        )
    # Rounding is not leakage: mixing through a Fourier transform, say, spreads errors of this size over all positions.
    tolerance = 64 * torch.finfo(base.dtype).eps * max(float(base.abs().amax()), 1e-30)
    for cut in cuts:
        changed = {**inputs, name: replace_from(adapter, inputs[name], cut)}
        per_position = (logits(adapter, changed)[:, :cut] - base[:, :cut]).abs().amax(dim=(0, *range(2, base.dim())))
        change, position = float(per_position.max()), int(per_position.argmax())
        if change != change:
            raise Skipped("could not tell: the logits are not finite (see numerical_stability)")
        entry = {"length": length, "from": cut, "change": change, "position": position, "tolerance": tolerance}
        tried.append(entry)
        if change <= tolerance:
            continue
        del per_position
        noise = measure_noise(adapter, inputs, base)
        entry["noise"], entry["tolerance"] = noise, max(tolerance, 20 * noise)
        if change > entry["tolerance"]:
            return _finding(adapter, inputs, cut, position, change, noise, length)
    return None


def replace_from(adapter: ModelAdapter, ids: Tensor, cut: int) -> Tensor:
    """Return ids of which those from `cut` on are replaced by others, legal and not padding."""
    # Ids that the config promises and the table lacks would crash here; shape_robustness reports them.
    vocabulary = max(2, adapter.readable_ids(content_input(adapter)))
    padding = adapter.pad_token_id.value
    other = (ids + 1 + torch.arange(ids.shape[1], device=ids.device) % max(1, vocabulary - 1)) % vocabulary
    if padding is not None and vocabulary > 2:
        other = torch.where(other == padding, (other + 1) % vocabulary, other)
        other = torch.where(other == ids, (other + 1) % vocabulary, other)
    return torch.cat([ids[:, :cut], other[:, cut:]], dim=1)


def measure_noise(adapter: ModelAdapter, inputs: dict[str, Tensor], base: Tensor) -> float:
    """Return how much the logits differ between equal calls: repeated, and where memory allows in a batch of two."""
    noise = float((logits(adapter, inputs) - base).abs().max())
    if base.numel() < 10_000_000:
        doubled = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
        noise = max(noise, float((logits(adapter, doubled)[:1] - base).abs().max()))
    return noise


def _finding(
    adapter: ModelAdapter, inputs: dict[str, Tensor], cut: int, position: int, change: float, noise: float, length: int
) -> Finding:
    """Describe a leak by one pair of positions and the module where it starts."""
    name = content_input(adapter)
    where = first_leaking_module(adapter, inputs, {**inputs, name: replace_from(adapter, inputs[name], cut)}, cut)
    what = f"token {cut} changes" if cut == length - 1 else f"tokens {cut} to {length - 1} change"
    # One token is easier to picture than a suffix, when one alone is enough.
    single = inputs[name].clone()
    single[:, cut] = replace_from(adapter, single, cut)[:, cut]
    difference = (logits(adapter, {**inputs, name: single})[:, :cut] - logits(adapter, inputs)[:, :cut]).abs()
    alone = difference.amax(dim=(0, *range(2, difference.dim())))
    if float(alone.max()) > max(0.01 * change, 100 * noise):
        what, change, position = f"token {cut} changes", float(alone.max()), int(alone.argmax())
    message = f"{what} the logits at position {position} (|change| {change:.2g}, noise {noise:.0g}, length {length})"
    return Finding("future_leakage", "fail", where or adapter.name, message, HINT)


def first_leaking_module(adapter: ModelAdapter, inputs: dict[str, Tensor], changed: dict[str, Tensor], cut: int) -> str:
    """Return the first module to finish whose output before `cut` changes although its inputs there do not.

    Tensors without a dimension as long as the sequence are compared as a whole.
    """
    length = inputs[content_input(adapter)].shape[1]
    calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def early(value: Any) -> list[Tensor]:
        # The final state of a recurrent layer has seen everything, rightly; what counts is its output per position.
        real = [tensor for _, tensor in named_tensors(value) if tensor.is_floating_point()]
        timed = [tensor for tensor in real if length in tensor.shape]
        return [_before(tensor, length, cut) for tensor in timed or real]

    def early_inputs(value: Any) -> list[Tensor]:
        return [_before(tensor, length, cut) for _, tensor in named_tensors(value)]

    def record(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        calls.append((name, early_inputs(given), early(output)))

    def differ(first: list[Tensor], second: list[Tensor]) -> bool:
        if len(first) != len(second):
            return True
        for a, b in zip(first, second, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                return True
            if a.numel() and a.is_floating_point():
                both = torch.isfinite(a) & torch.isfinite(b)
                scale = float(torch.where(both, a, 0).abs().max())
                if float(torch.where(both, a - b, 0).abs().max()) > 1e-5 * scale:
                    return True
            elif not torch.equal(a, b):
                return True
        return False

    with observe(adapter.module, record):
        logits(adapter, inputs)
    leaking: list[str] = []
    position = 0

    def compare(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal position
        if leaking or position >= len(calls):
            return
        known_name, known_inputs, known_output = calls[position]
        position += 1
        if name == known_name and differ(early(output), known_output) and not differ(early_inputs(given), known_inputs):
            leaking.append(name)

    with observe(adapter.module, compare):
        logits(adapter, changed)
    return leaking[0] if leaking else ""


def _before(tensor: Tensor, length: int, cut: int) -> Tensor:
    """Return a copy of a tensor's part at positions before `cut`, along the time dimension found by its size."""
    sizes = list(tensor.shape)
    if length not in sizes:
        return tensor.detach().clone()
    dimension = 1 if len(sizes) > 1 and sizes[1] == length else sizes.index(length)
    return tensor.detach().narrow(dimension, 0, cut).clone()
