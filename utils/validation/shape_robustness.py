"""Does the model take every legal batch size, length and token id, and return the right shape?"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Finding, Outcome
from utils.validation.probing import (
    LANGUAGE_MODELS,
    LARGEST_LOGITS,
    LONGEST_LENGTH,
    ModelCrash,
    content_input,
    has_length,
    logits,
    longest_length,
    short_length,
    stand_in,
)

BATCH_SIZES = (1, 2, 3)
CRASH_HINT = "Derive shapes from the input (x.shape), never from constants; size tables by the declared maximum."
ODD_LENGTHS = (1, 5)


def check_shape_robustness(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Run legal batch sizes, lengths and extreme token ids, and compare the shapes of the logits.

    Codes: ``shape_crash`` for a crash or a wrong shape, ``vocab_mismatch`` for logits whose width is not the
    vocabulary and for a legal id that crashes.
    """
    if adapter.failure is not None:
        hint = "Make one plain call work first; if it needs special arguments, pass ModelSpec(example_inputs={...})."
        return Outcome("no call", "one call", "", [Finding("shape_crash", "fail", adapter.name, adapter.failure, hint)])
    reference = tuple(logits(adapter, adapter.example_inputs(2)).shape)
    findings: list[Finding] = []
    tried: list[dict[str, object]] = []

    def attempt(situation: str, inputs: Mapping[str, Tensor]) -> Finding | None:
        expected = expected_shape(adapter, reference, inputs)
        entry: dict[str, object] = {"input": situation, "expected": str(expected)}
        tried.append(entry)
        try:
            shape = tuple(logits(adapter, inputs, situation).shape)
        except ModelCrash as crash:
            entry["error"] = str(crash)
            return Finding("shape_crash", "fail", crash.where, str(crash), CRASH_HINT)
        entry["shape"] = str(shape)
        if shape != expected:
            message = f"{situation}: logits have shape {shape}, expected {expected}"
            return Finding(
                "shape_crash", "fail", adapter.name, message, "Avoid squeeze() without a dimension and fixed views."
            )
        return None

    length = short_length(adapter) if has_length(adapter) else None
    for batch_size in BATCH_SIZES:
        words = f"batch size {batch_size}" + (f", length {length}" if length else "")
        if finding := attempt(words, adapter.example_inputs(batch_size, length)):
            findings.append(finding)
    if length is not None and not findings:
        findings += _try_lengths(adapter, budget, attempt)
    if length is not None:
        findings += _check_vocabulary(adapter, reference)
    passed = sum("error" not in entry and entry.get("shape") == entry["expected"] for entry in tried)
    what = "batch sizes, lengths and token ids" if length else "batch sizes"
    return Outcome(
        f"{passed} of {len(tried)}",
        "all",
        f"every legal shape tried works ({what})" + _only(adapter),
        _distinct(findings),
        {"tried": tried},
    )


def expected_shape(adapter: ModelAdapter, reference: tuple[int, ...], inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the logits' shape for other inputs, from their shape at batch size 2 and the default length."""
    content = inputs[content_input(adapter)]
    shape = [content.shape[0], *reference[1:]] if reference and reference[0] == 2 else list(reference)
    default = adapter.example_inputs(2)[content_input(adapter)]
    follows = adapter.task.value in LANGUAGE_MODELS or (len(reference) == 3 and reference[1] == default.shape[-1])
    if has_length(adapter) and len(reference) == 3 and follows:
        shape[1] = content.shape[1]
    return tuple(shape)


def _try_lengths(
    adapter: ModelAdapter, budget: Budget, attempt: Callable[[str, Mapping[str, Tensor]], Finding | None]
) -> list[Finding]:
    """Try length 1, an odd one and the maximum."""
    longest = longest_length(adapter, budget, passes=1)
    findings: list[Finding] = []
    declared = adapter.max_length.value
    legal = adapter.lengths.value
    short = [adapter.legal_length(min(n, longest)) for n in ODD_LENGTHS]
    # A model for a single length must at least take the one that it declares.
    longest = declared if legal.fixed and declared else longest
    tested = sorted({*short, longest})
    for length in tested:
        started = time.perf_counter()
        words = f"length {length}" + (" (the maximum)" if length == declared else "") + ", batch size 1"
        if finding := attempt(words, adapter.example_inputs(1, length)):
            findings.append(finding)
    seconds = time.perf_counter() - started
    if not findings and declared and longest < declared and _true_maximum(adapter, budget, longest, declared, seconds):
        finding = attempt(f"length {declared} (the maximum), batch size 1", adapter.example_inputs(1, declared))
        findings += [finding] if finding else []
    # A mixer over time takes one length by design; a shortest length surprises, and generation meets all lengths.
    if not findings and str(legal) != "all" and (not legal.fixed or _generates(adapter)):
        needed = "generation starts from any length" if _generates(adapter) else "shorter texts crash"
        message = f"legal lengths are {legal} ({adapter.lengths.reason}); {needed}"
        hint = "Pad shorter texts to a legal length, in the data or in forward()."
        findings.append(Finding("shape_limit", "warn", adapter.name, message, hint))
    return findings


def _true_maximum(adapter: ModelAdapter, budget: Budget, longest: int, declared: int, seconds: float) -> bool:
    """Tell whether one pass at the declared maximum fits, going by the pass at `longest`; then nothing stands for it.

    Where tables end is the likeliest place for a crash, so it is worth half of the check's time beyond what is left.
    """
    fits = declared <= LONGEST_LENGTH and 4 * declared * (adapter.vocab_size.value or 1) <= LARGEST_LOGITS
    cost = 1.2 * seconds * declared / longest
    if not fits or cost > budget.remaining() + 0.5 * budget.seconds:
        return False
    note = stand_in(longest, declared)
    budget.reduced[:] = [reduced for reduced in budget.reduced if reduced != note]
    return True


def _generates(adapter: ModelAdapter) -> bool:
    """Tell whether the model is asked for texts of every length, one token after another."""
    return adapter.task.value in ("causal_lm", "seq2seq")


def _only(adapter: ModelAdapter) -> str:
    """Say which lengths are legal, where not all are."""
    lengths = str(adapter.lengths.value)
    return "" if lengths == "all" else f"; legal lengths: {lengths}"


def _check_vocabulary(adapter: ModelAdapter, reference: tuple[int, ...]) -> list[Finding]:
    """Compare the logits' width with the vocabulary, and try the first and the last id."""
    vocabulary = adapter.vocab_size.value
    if vocabulary is None:
        return []
    findings = []
    task = adapter.task.value
    if task in LANGUAGE_MODELS and reference[-1] != vocabulary:
        width = reference[-1]
        # Widths are padded to a multiple of 64 for speed; the extra columns only waste a little probability.
        padded = width % 64 == 0 and vocabulary < width < min(vocabulary + 64, 1.05 * vocabulary)
        rows = {m.weight.shape[0] for m in adapter.module.modules() if isinstance(m, torch.nn.Embedding)}
        if not (task == "seq2seq" and width in rows):
            message = f"logits are {width} wide, the vocabulary has {vocabulary} ({adapter.vocab_size.reason})"
            hint = (
                "Give the output layer as many rows as the vocabulary; correct vocab_size in the config if it is wrong."
            )
            findings.append(
                Finding("vocab_mismatch", "warn" if padded else "fail", _head(adapter, width), message, hint)
            )
    for token in (0, vocabulary - 1):
        inputs = adapter.example_inputs(2, short_length(adapter))
        inputs[adapter.main_input] = torch.full_like(inputs[adapter.main_input], token)
        try:
            logits(adapter, inputs, f"token id {token}")
        except ModelCrash as crash:
            readable = adapter.readable_ids()
            table = f"; the embedding has {readable} rows" if readable < vocabulary else ""
            message = f"the legal id {token} of a vocabulary of {vocabulary} crashes{table}: {crash}"
            hint = f"The embedding needs {vocabulary} rows (vocab_size: {adapter.vocab_size.reason})."
            findings.append(Finding("vocab_mismatch", "fail", crash.where, message, hint))
    return findings


def _head(adapter: ModelAdapter, width: int) -> str:
    """Return the last registered module that is `width` wide, by the shape of its weight."""
    found = adapter.name
    for name, child in adapter.module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and width in weight.shape:
            found = name or adapter.name
    return found


def _distinct(findings: list[Finding]) -> list[Finding]:
    """Keep one finding per code and place: ten shapes that crash in one line are one fault."""
    kept: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        kept.setdefault((finding.code, finding.where), finding)
    return list(kept.values())
