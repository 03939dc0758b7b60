"""Does the model take every legal batch size, length and token id, and return the right shape?"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters.capture import first_tensor, named_tensors, observe, tensor_at
from utils.adapters.detection import config_number, kind_by_name
from utils.adapters.lengths import Lengths
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.troubles import STARVED, UNREADABLE, UNSIZED, moves_to_gpu
from utils.runtime.errors import AdapterError
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.containment import MEMORY_HINT
from utils.validation.portability import DEVICE_HINT
from utils.validation.probing import (
    LANGUAGE_MODELS,
    LARGEST_LOGITS,
    LONGEST_LENGTH,
    ModelCrash,
    compares_samples,
    content_input,
    crash_line,
    crash_site,
    forward_seconds,
    has_length,
    logits,
    longest_length,
    short_length,
    stand_in,
    with_steps,
)
from utils.validation.shape_origin import shape_origin
from utils.validation.vocabulary import check_vocabulary

BATCH_SIZES = (1, 2, 3)
OTHER_BATCH_SIZES = (1, 4, 8, 16, 32, 64)
"""Tried where a batch of two does not run at all: one of them may be written into the code."""
ODD_LENGTHS = (1, 5)
BATCH_HINT = "Take the batch size from the input (x.shape[0], or -1 in view), and give squeeze() its dimension."
LENGTH_HINT = "Take lengths from the input (x.shape[1]), and handle a length that is odd, or 1, as any other."
MAXIMUM_HINT = "Make every mask, table and buffer as long as the declared maximum."
IMAGE_HINT = "Use height and width separately, and take both from the input."
BY_DESIGN = ("kernel size", "output size is too small")
"""What torch says when an input is shorter than a convolution: a limit that the design has, not a slip."""
MORE_AXES = "not enough values to unpack"
"""What Python says when forward() expects a shape of more axes."""
MISFIT = "shapes cannot be multiplied"
"""What torch says when one layer's width is not the next one's."""
FOLDED = (
    "is invalid for input of size",
    "don't multiply up to",
    "can't divide axis",
    "expects each tensor to be equal",
)
"""What is said when an axis is cut into parts of a size that does not divide it."""


def check_shape_robustness(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Run legal batch sizes, lengths, image sizes and extreme token ids, and compare the shapes of the logits.

    Codes: ``shape_crash`` for a crash or a wrong shape, ``shape_limit`` for lengths that the design cannot take,
    ``vocab_mismatch`` for logits whose width is not the vocabulary and for a legal id that crashes, ``out_of_memory``
    where no call fits into memory, ``hardcoded_device`` where none runs without a GPU.
    """
    if adapter.failure is not None:
        return _no_call(adapter)
    standard = adapter.example_inputs(2)
    reference = tuple(logits(adapter, standard, whole=True).shape)
    if not adapter.batched:
        raise Skipped(f"the call works, and no other size is known: {adapter.input_reason}")
    findings: list[Finding] = []
    tried: list[dict[str, object]] = []

    def attempt(situation: str, inputs: Mapping[str, Tensor], hint: str) -> Finding | None:
        expected = expected_shape(adapter, reference, inputs)
        entry: dict[str, object] = {"input": situation, "expected": str(expected)}
        tried.append(entry)
        try:
            shape = tuple(logits(adapter, inputs, situation, whole=True).shape)
        except ModelCrash as crash:
            entry["error"] = str(crash)
            where = crash.where if _table_too_short(adapter, crash.where) else shape_origin(adapter, standard, inputs)
            return Finding(
                "shape_crash", "fail", where, str(crash), _hint(adapter, where, hint), _run_line(adapter, inputs)
            )
        entry["shape"] = str(shape)
        if shape != expected:
            message = f"{situation}: logits have shape {shape}, expected {expected}"
            where = shape_origin(adapter, standard, inputs)
            return Finding("shape_crash", "fail", where, message, hint, _run_line(adapter, inputs))
        return None

    length = short_length(adapter) if has_length(adapter) else None
    if turned := _transposed(adapter, reference, standard):
        findings.append(turned)
    for batch_size in BATCH_SIZES if not turned else ():
        words = f"batch size {batch_size}" + (f", length {length}" if length else "")
        if finding := attempt(words, adapter.example_inputs(batch_size, length), BATCH_HINT):
            findings.append(finding)
    if length is not None and not findings:
        findings += _try_lengths(adapter, budget, attempt)
    if adapter.modality == "image" and not findings:
        findings += _try_images(adapter, budget, reference)
    if adapter.modality == "features" and not findings:
        findings += _try_series(adapter, budget)
    if length is not None:
        findings += check_vocabulary(adapter, reference)
    passed = sum("error" not in entry and entry.get("shape") == entry["expected"] for entry in tried)
    what = "batch sizes, lengths and token ids" if length else "batch sizes"
    return Outcome(
        f"{passed} of {len(tried)}",
        "all",
        f"every legal shape tried works ({what})" + _only(adapter),
        _distinct(findings),
        {"tried": tried},
    )


def _no_call(adapter: ModelAdapter) -> Outcome:
    """Report that no call works; where another batch size does, the one that is written into the code."""
    hint = "Make one plain call work first; if it needs special arguments, pass ModelSpec(example_inputs={...})."
    where, message = adapter.name, str(adapter.failure)
    bad = adapter.example_inputs(2) if adapter.input_names else {}
    if bad and moves_to_gpu(message):
        where = crash_site(adapter, bad)
        return Outcome("no call", "one call", "", [Finding("hardcoded_device", "fail", where, message, DEVICE_HINT)])
    if bad and STARVED in message:
        _insist_on_inputs(adapter, bad, message)
        where, code = crash_site(adapter, bad), "out_of_memory"
        starved = Finding(code, "fail", where, message, MEMORY_HINT, location=crash_line(adapter, where))
        return Outcome("no call", "one call", "", [starved])
    if bad and UNREADABLE in message:
        where, hint = crash_site(adapter, bad), "Give the table that reads the ids as many rows as the vocabulary has."
        return Outcome("no call", "one call", "", [Finding("vocab_mismatch", "fail", where, message, hint)])
    if bad and adapter.modality == "tokens" and _runs_without_zero(adapter, bad):
        where, hint = crash_site(adapter, bad), "Ids count from 0: look rows up by the ids as they are."
        message = f"the legal id 0 crashes, and the same text with 1 in its place runs: {message}"
        return Outcome("no call", "one call", "", [Finding("vocab_mismatch", "fail", where, message, hint)])
    for size in OTHER_BATCH_SIZES if bad else ():
        try:
            good = adapter.example_inputs(size)
            if first_tensor(adapter.forward(good)) is None:
                continue
        except Exception:
            continue
        where, hint = shape_origin(adapter, good, bad), BATCH_HINT
        message = f"runs with batch size {size} and not with 2: {message}"
        break
    else:
        _insist_on_inputs(adapter, bad, message)
        # Where the name of the input leaves no doubt about its kind, the crash is the model's own.
        if bad and (adapter.spec.example_inputs is not None or kind_by_name(adapter.main_input) is not None):
            where = crash_site(adapter, bad)
    return Outcome("no call", "one call", "", [Finding("shape_crash", "fail", where, message, hint)])


def _runs_without_zero(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether a text that crashes runs as soon as no id in it is 0."""
    ids = inputs[adapter.main_input]
    if adapter.spec.example_inputs is not None or ids.is_floating_point() or bool((ids != 0).all()):
        return False
    try:
        with torch.no_grad():
            return first_tensor(adapter.forward({**inputs, adapter.main_input: ids.clamp(min=1)})) is not None
    except Exception:
        return False


def _insist_on_inputs(adapter: ModelAdapter, inputs: Mapping[str, Tensor], message: str) -> None:
    """Let a crash pass as the model's own only where its inputs were evidently right.

    They were when the user gave them, when their name tells their kind, or when a layer took them and the crash came
    later; and no size was in the way.

    Raises:
        AdapterError: The crash may be the fault of inputs that were guessed wrongly.
    """
    if adapter.spec.example_inputs is not None or not inputs or not message.startswith("No forward pass of"):
        return
    sized = UNSIZED in message
    name = adapter.main_input
    taken, error = _layer_took(adapter, inputs)
    told = kind_by_name(name) in ("tokens", "image")
    if MORE_AXES in str(error):
        told = taken = False
    if adapter.modality == "features":
        # Real numbers enter a layer by their last axis alone; how many axes there should be is not known.
        taken = taken and (MISFIT in str(error) or STARVED in message)
    if not sized and (told or taken):
        return
    names = dict.fromkeys(name.split(".")[0] for name in adapter.input_names)
    given = ", ".join(f"{name!r}: ..." for name in names)
    what = ", ".join(f"`{name}`" for name in names)
    unclear = f"{what} of one size only, and none tried fits" if sized else f"it is unclear what {what} holds"
    if "RecursionError" in message:
        unclear = f"some inputs end in a RecursionError, as if forward() called itself without end, and {unclear}"
    if STARVED in message:
        unclear = f"memory ran out, and {unclear}"
    raise AdapterError(
        f"No forward pass of {adapter.name} succeeded; {unclear}.",
        f"Pass ModelSpec(example_inputs={{{given}}}) with tensors that it accepts.",
    )


def _layer_took(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> tuple[bool, Exception | None]:
    """Tell whether a layer with parameters of its own ran before the model crashed, and with what it crashed."""
    taken: list[str] = []

    def note(name: str, child: torch.nn.Module, given: tuple[object, ...], output: object) -> None:
        if any(True for _ in child.parameters(recurse=False)):
            taken.append(name)

    try:
        with observe(adapter.module, note), torch.no_grad():
            adapter.forward(inputs)
    except Exception as error:
        return bool(taken), error
    return bool(taken), None


def _transposed(adapter: ModelAdapter, reference: tuple[int, ...], inputs: Mapping[str, Tensor]) -> Finding | None:
    """Recognise logits whose batch and positions have changed places."""
    content = inputs[content_input(adapter)]
    batch, length = content.shape[0], content.shape[-1]
    if not has_length(adapter) or len(reference) != 3 or batch == length:
        return None
    # The adapter turns them back for all other checks.
    with torch.no_grad():
        shape = tuple(tensor_at(adapter.forward(inputs), adapter.output.value or "").shape)
    if shape[:2] != (length, batch):
        return None
    message = (
        f"batch size {batch}, length {length}: logits have shape {shape}, expected {(batch, length, shape[2])}: batch "
        "and positions are transposed"
    )
    turned: list[str] = []

    def note(name: str, child: torch.nn.Module, given: tuple[object, ...], output: object) -> None:
        before, after = ([t.shape[:2] for _, t in named_tensors(value)] for value in (given, output))
        if shape[:2] in after and shape[:2] not in before:
            turned.append(name)

    with observe(adapter.module, note):
        logits(adapter, inputs)
    where = next(iter(turned), "") or adapter.name
    hint = "Return transpose(0, 1), or build recurrent and attention layers with batch_first=True."
    return Finding("shape_crash", "fail", where, message, hint, _run_line(adapter, inputs))


def _table_too_short(adapter: ModelAdapter, where: str) -> bool:
    """Tell whether a crash happened in an embedding: the module that is asked for a row it does not have."""
    named = dict(adapter.module.named_modules())
    return isinstance(named.get(where), torch.nn.Embedding)


def _hint(adapter: ModelAdapter, where: str, hint: str) -> str:
    """Name the rows of a table that crashed; else return the hint."""
    child = dict(adapter.module.named_modules()).get(where)
    if isinstance(child, torch.nn.Embedding):
        declared = adapter.max_length.value
        return (
            f"`{where}` has {child.num_embeddings} rows and was asked for one beyond them: give it as many as the "
            f"longest text has positions ({declared}), counting from 0."
        )
    return hint


def _run_line(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> str:
    """Return code that runs the model on inputs of this shape."""
    main = inputs[adapter.main_input]
    length = f", {main.shape[1]}" if has_length(adapter) else ""
    made = f"inputs = ModelAdapter(model).example_inputs({main.shape[0]}{length})"
    return f"from utils.adapters import ModelAdapter\n{made}\nmodel(**inputs)"


def expected_shape(adapter: ModelAdapter, reference: tuple[int, ...], inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the logits' shape for other inputs, from their shape at batch size 2 and the default length."""
    content = inputs[content_input(adapter)]
    shape = [content.shape[0], *reference[1:]] if reference and reference[0] == 2 else list(reference)
    if reference == (2, 2) and compares_samples(adapter):
        return (content.shape[0], content.shape[0])
    default = adapter.example_inputs(2)[content_input(adapter)]
    follows = adapter.task.value in LANGUAGE_MODELS or (len(reference) == 3 and reference[1] == default.shape[-1])
    if has_length(adapter) and len(reference) == 3 and follows:
        shape[1] = content.shape[1]
    if has_length(adapter) and reference == default.shape and _scores_tokens(adapter):
        shape[1] = content.shape[1]
    if has_length(adapter) and len(reference) == 2 and reference[0] == default.numel():
        # Logits of all texts in one list.
        shape[0] = content.numel()
    return tuple(shape)


def _scores_tokens(adapter: ModelAdapter) -> bool:
    """Tell whether a model gives one number per token, and not as many labels as the default length has tokens."""
    content = content_input(adapter)
    longer = adapter.example_inputs(1, adapter.legal_length(2 * adapter.probe_length))
    try:
        return tuple(logits(adapter, longer, whole=True).shape) == tuple(longer[content].shape)
    except ModelCrash:
        return False


def _try_lengths(
    adapter: ModelAdapter, budget: Budget, attempt: Callable[[str, Mapping[str, Tensor], str], Finding | None]
) -> list[Finding]:
    """Try length 1, an odd one and the maximum."""
    longest = longest_length(adapter, budget, passes=1)
    findings: list[Finding] = []
    declared = adapter.max_length.value
    legal = adapter.lengths.value
    short = [adapter.legal_length(min(n, longest)) for n in ODD_LENGTHS]
    # A model for a single length must at least take the one that it declares.
    longest = declared if legal.fixed and declared else longest
    # Where no limit is known, a length that crashes is one; nobody has promised more.
    tested = sorted({*short, longest} if declared else {*short})
    for length in tested:
        started = time.perf_counter()
        words = f"length {length}" + (" (the maximum)" if length == declared else "") + ", batch size 1"
        hint = MAXIMUM_HINT if length > ODD_LENGTHS[-1] else LENGTH_HINT
        finding = attempt(words, adapter.example_inputs(1, length), hint)
        # A maximum that was worked out from reserved rows may be out by one; only a stated one is a promise.
        guessed = length == declared and ", less the" in adapter.max_length.reason and length > 1
        if finding and not (guessed and attempt(words, adapter.example_inputs(1, length - 1), hint) is None):
            findings.append(finding)
    seconds = time.perf_counter() - started
    if not findings and declared and longest < declared and _true_maximum(adapter, budget, longest, declared, seconds):
        finding = attempt(
            f"length {declared} (the maximum), batch size 1", adapter.example_inputs(1, declared), MAXIMUM_HINT
        )
        findings += [finding] if finding else []
    if not findings and str(legal) != "all":
        findings += _judge_limit(adapter, legal, attempt)
    return findings


def _judge_limit(
    adapter: ModelAdapter, legal: Lengths, attempt: Callable[[str, Mapping[str, Tensor], str], Finding | None]
) -> list[Finding]:
    """Tell a slip that forbids length 1 or odd lengths from a limit that the design has."""
    generates = adapter.task.value in ("causal_lm", "seq2seq")
    refused = None
    if legal.step == 2:
        refused = max(3, legal.shortest + 1)
    elif not legal.fixed and legal.step == 1 and (legal.shortest == 2 or generates):
        refused = 1
    if refused is not None:
        finding = attempt(f"length {refused}, batch size 1", adapter.example_inputs(1, refused), LENGTH_HINT)
        if finding and not any(words in finding.message.lower() for words in BY_DESIGN):
            return [finding]
    # A mixer over time takes one length by design; a shortest length surprises, and generation meets all lengths.
    if legal.fixed and not generates:
        return []
    needed = "generation starts from any length" if generates else "shorter texts crash"
    message = f"legal lengths are {legal} ({adapter.lengths.reason}); {needed}"
    hint = "Pad shorter texts to a legal length, in the data or in forward()."
    return [Finding("shape_limit", "warn", adapter.name, message, hint)]


def _try_images(adapter: ModelAdapter, budget: Budget, reference: tuple[int, ...]) -> list[Finding]:
    """Try other image sizes on a classifier that states none: if larger squares run, rectangles must as well.

    Flattening models take one size by design, and nothing is asked of them.
    """
    shape = adapter.image_shape.value
    stated = config_number(adapter.config, "image_size") is not None or adapter.spec.example_inputs is not None
    if shape is None or stated or adapter.task.value != "image_classification" or shape[1] != shape[2]:
        return []
    side = shape[1]
    larger = side + 32 if side % 32 == 0 else 2 * side
    cost = 4 * forward_seconds(adapter, None, 1)
    if not budget.afford(cost, f"images of {side} x {side} only"):
        return []

    def run(height: int, width: int) -> ModelCrash | tuple[int, ...]:
        inputs = _image(adapter, height, width)
        try:
            return tuple(logits(adapter, inputs, f"image of {height} x {width}", whole=True).shape)
        except ModelCrash as crash:
            return crash

    wanted = (1, *reference[1:])
    if run(larger, larger) != wanted:
        return []
    for severity, code, height, width in (
        ("fail", "shape_crash", side, larger),
        ("fail", "shape_crash", larger, side),
        ("warn", "shape_limit", side + 1, side + 1),
    ):
        got = run(height, width)
        if got == wanted:
            continue
        evidence = str(got) if isinstance(got, ModelCrash) else f"logits have shape {got}, expected {wanted}"
        message = f"images of {side} x {side} and {larger} x {larger} run, {height} x {width} do not: {evidence}"
        where = shape_origin(adapter, adapter.example_inputs(2), _image(adapter, height, width))
        return [Finding(code, severity, where, message, IMAGE_HINT)]
    return []


def _try_series(adapter: ModelAdapter, budget: Budget) -> list[Finding]:
    """Try an odd number of time steps on a model of series that runs on its even neighbours.

    Only a crash where pairs are formed counts: strides and patches that fit some lengths are the design's.
    """
    inputs = adapter.example_inputs(1)
    main = inputs[adapter.main_input]
    if main.dim() != 3 or not main.is_floating_point():
        return []
    if not budget.afford(4 * forward_seconds(adapter, None, 1), f"series of {tuple(main.shape[1:])} only"):
        return []
    for axis in (1, 2):
        even = max(4, main.shape[axis] + main.shape[axis] % 2)
        crashes = {n: _series_crash(adapter, inputs, axis, n) for n in (even + 2, even + 4)}
        if any(crashes.values()):
            # Channels, or patches of another size.
            continue
        crash = _series_crash(adapter, inputs, axis, even + 1)
        if crash is None or not any(words in str(crash.error) for words in FOLDED):
            return []
        good, bad = (with_steps(adapter, inputs, axis, n) for n in (even + 2, even + 1))
        message = f"{even + 2} and {even + 4} steps run, {crash}"
        code = f"inputs = ModelAdapter(model).example_inputs(1)['{adapter.main_input}'].narrow({axis}, 0, 1)"
        lines = f"from utils.adapters import ModelAdapter\n{code}.repeat_interleave({even + 1}, {axis})\nmodel(inputs)"
        return [
            Finding(
                "shape_crash",
                "fail",
                shape_origin(adapter, good, bad),
                message,
                LENGTH_HINT,
                lines if list(inputs) == [adapter.main_input] else "",
            )
        ]
    return []


def _series_crash(adapter: ModelAdapter, inputs: Mapping[str, Tensor], axis: int, steps: int) -> ModelCrash | None:
    """Run a number of time steps and return the crash."""
    try:
        logits(adapter, with_steps(adapter, inputs, axis, steps), f"{steps} do not")
    except ModelCrash as crash:
        return crash
    return None


def _image(adapter: ModelAdapter, height: int, width: int) -> dict[str, Tensor]:
    """Return one image of a size, beside the model's other inputs."""
    inputs = adapter.example_inputs(1)
    inputs[adapter.main_input] = functional.interpolate(
        inputs[adapter.main_input].float(), (height, width), mode="nearest"
    ).to(inputs[adapter.main_input].dtype)
    return inputs


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


def _only(adapter: ModelAdapter) -> str:
    """Say which lengths are legal, where not all are."""
    lengths = str(adapter.lengths.value)
    return "" if lengths == "all" else f"; legal lengths: {lengths}"


def _distinct(findings: list[Finding]) -> list[Finding]:
    """Keep one finding per code and place: ten shapes that crash in one line are one fault."""
    kept: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        kept.setdefault((finding.code, finding.where), finding)
    return list(kept.values())
