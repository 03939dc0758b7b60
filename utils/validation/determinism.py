"""Is the answer a function of the input alone? Calls are repeated after other calls, and on other random streams.

In eval mode nothing but the input may matter. What does is told apart by what is held fixed: random numbers (another
seed changes the answer), state (the answer depends on the calls before), or neither (a clock, an unseeded generator).
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.adapters.capture import named_tensors
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.isolation import ModelChangedError, preserved
from utils.runtime.resources import LARGE_MODEL
from utils.runtime.seeding import seed_streams
from utils.runtime.snapshot import bits, same_bits
from utils.validation.check import Budget, Finding, Outcome
from utils.validation.draws import guilty_draws, samples_latent
from utils.validation.hidden import hidden_items
from utils.validation.probing import ModelCrash, guarded, has_length, short_length
from utils.validation.watching import alike, change, culprits, first_difference, running_modules

LENGTHS = (9, 12)
MORE_SAMPLES = 8
"""Samples in which random answers are looked for, where a pass is no great cost."""
SEEDS = 24
FEWEST_SEEDS = 6
Inputs = Mapping[str, Any]
DROPOUT_HINT = (
    "Let the mode decide: nn.Dropout, or functional.dropout(x, p, training=self.training), and random layer drop only "
    "if self.training."
)
RANDOM_HINT = (
    "Draw random numbers in train mode only (if self.training:), or once in __init__ and keep them with "
    "register_buffer."
)
LATENT_HINT = "A variational model may draw; for answers that can be compared, use the mean unless self.training."
CLOCK_HINT = "Look for the time, an unseeded generator (numpy's default_rng()) or uninitialised memory (torch.empty)."
STATE_HINT = (
    "Keep nothing on self in forward() that the next call reads; pass caches and hidden states in and out as arguments."
)
REPRODUCTION = (
    "from utils.adapters import ModelAdapter\n"
    "model.eval(); adapter = ModelAdapter(model); inputs = adapter.example_inputs()\n"
    "print(adapter.logits(inputs) - adapter.logits(inputs))"
)
MUTATION_HINT = "Replace in-place operations on arguments (x += y, x[...] = y, x.op_()) by new tensors, or clone first."


def check_determinism(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Call the model again and again in eval mode, and require each input to have one answer.

    Codes: ``dropout_in_eval``, ``nondeterministic_forward``, ``state_across_calls``, ``input_mutation``.
    """
    if (finding := _second_call(adapter)) is not None:
        return Outcome("crash", "equal", "", [finding])
    inputs = example(adapter, 0)
    drew: list[bool] = []
    grew: list[bool] = []

    def run(given: Inputs) -> None:
        before, size = _streams(), _size(adapter)
        adapter.logits(given)
        drew.append(_streams() != before)
        grew.append(_size(adapter) != size)

    mutated: list[Finding] = []
    findings: list[Finding] = []
    try:
        mutated = _first_call(adapter, inputs, run)
        if grew[0]:
            # Layers made by the first call are said once, as lazy parameters; here they count as part of the model.
            answer(adapter, inputs)
        if drew[0]:
            findings += _random(adapter, budget)
        if _history(adapter, inputs, budget):
            findings += _diagnose(adapter, inputs)
    except ModelChangedError as error:
        findings.append(Finding("state_across_calls", "fail", error.names[0], str(error), error.action))
    why = "equal inputs have equal answers in eval mode, whatever was called before and however streams are seeded"
    return Outcome("differs" if findings else "equal", "equal", why, [*mutated, *findings])


def _second_call(adapter: ModelAdapter) -> Finding | None:
    """Explain why a model cannot be called at all, if that is because a first call breaks the second."""
    if adapter.failure is None or not adapter.input_names:
        return None
    inputs, later = adapter.example_inputs(2), adapter.example_inputs(2, seed=1)
    try:
        with _fresh(adapter), torch.no_grad():
            adapter.forward(later)
        with _fresh(adapter), torch.no_grad():
            adapter.forward(inputs)
            guarded(adapter, later, "a second call", lambda: adapter.forward(later))
    except ModelCrash as crash:
        message = f"the call after another one raises ({crash}); on a fresh model it works"
        return Finding("state_across_calls", "fail", crash.where, message, STATE_HINT, REPRODUCTION)
    except Exception:
        return None
    return None


def _size(adapter: ModelAdapter) -> int:
    """Return the number of registered parameters."""
    return sum(1 for _ in adapter.module.parameters())


def example(adapter: ModelAdapter, kind: int, batch_size: int = 2) -> dict[str, Any]:
    """Make small inputs: kinds 0 and 1 differ in content, kind 2 in shape too; no two tensors share memory.

    Raises:
        AdapterError: No forward pass of the model succeeds.
    """
    if adapter.failure is not None:
        raise AdapterError("no forward pass succeeds, see shape_robustness")
    length = adapter.legal_length(min(LENGTHS[kind // 2], short_length(adapter))) if has_length(adapter) else None
    return copied(adapter.example_inputs(batch_size + kind // 2, length, seed=kind))


def answer(adapter: ModelAdapter, inputs: Inputs, seed: int = 0) -> Tensor:
    """Return the logits for a copy of the inputs on given random streams, without a gradient."""

    def call() -> Tensor:
        seed_streams(seed, "determinism")
        with torch.no_grad():
            return adapter.logits(copied(inputs)).clone()

    result: Tensor = guarded(adapter, inputs, "", call)
    return result


def mutations(adapter: ModelAdapter, inputs: Inputs, run: Callable[[Inputs], Any]) -> list[Finding]:
    """Run the model once on a copy of the inputs, and find those that are no longer what they were.

    Code: ``input_mutation``, also for a write that happened to leave equal values: those of other inputs it changes.
    """
    given = copied(inputs)
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    before = {key: value._version for key, value in tensors.items()}

    def call() -> None:
        with torch.no_grad():
            seed_streams(0, "determinism")
            run(given)

    with _fresh(adapter):
        guarded(adapter, inputs, "", call)
    # A write through `.data` moves no version, and an equal value no bit.
    changed = [key for key, value in tensors.items() if not _same(value, inputs[key])]
    written = [key for key, value in tensors.items() if value._version != before[key]]
    if not changed and not written:
        return []
    key = (changed or written)[0]
    given = copied(inputs)
    with _fresh(adapter):
        places = culprits(adapter.module, lambda: _mark(given[key]), call)
    what = "writes to (equal values, this time)"
    if changed and tensors[key].shape == inputs[key].shape:
        what = f"changes {int((tensors[key] != inputs[key]).sum())} of {tensors[key].numel()} values of"
    elif changed:
        what = "changes the shape of"
    mode = "train" if adapter.module.training else "eval"
    message = f"one forward pass in {mode} mode {what} its argument `{key}` in place"
    where = (places[0] if places else "") or adapter.name
    reproduction = (
        "from utils.adapters import ModelAdapter; adapter = ModelAdapter(model); inputs = adapter.example_inputs()\n"
        f"before = inputs['{key}'].clone(); adapter.forward(inputs)\n"
        f"print(inputs['{key}']._version, inputs['{key}'] != before)"
    )
    return [Finding("input_mutation", "fail", where, message, MUTATION_HINT, reproduction)]


def _same(first: Tensor, second: Tensor) -> bool:
    """Tell whether an input has the shape and the bits that it had."""
    if first.layout != torch.strided or second.layout != torch.strided:
        return first._version == 0
    return first.shape == second.shape and first.dtype == second.dtype and same_bits(first, second)


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """Return what is another after any write to a tensor."""
    values = bits(tensor).cpu().numpy().tobytes() if tensor.layout == torch.strided else b""
    return tensor._version, tensor.shape, values


def _first_call(adapter: ModelAdapter, inputs: Inputs, run: Callable[[Inputs], Any]) -> list[Finding]:
    """Look for changed inputs, an attention mask among them that forward takes although it needs none."""
    name, main = "attention_mask", inputs[adapter.main_input]
    if name not in inputs and name in adapter.argument_names and isinstance(main, Tensor) and has_length(adapter):
        with suppress(ModelCrash, AdapterError):
            return mutations(adapter, {**inputs, name: torch.ones_like(main)}, run)
    return mutations(adapter, inputs, run)


def copied(inputs: Inputs) -> dict[str, Any]:
    """Return inputs whose tensors are copies."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _history(adapter: ModelAdapter, inputs: Inputs, budget: Budget) -> bool:
    """Tell whether answers depend on what was called before; all calls are on the same random streams."""
    other, third = example(adapter, 1), example(adapter, 2)
    shapes = False
    try:
        with preserved(adapter.module):
            started = time.perf_counter()
            first = answer(adapter, inputs)
            once = time.perf_counter() - started
            early = answer(adapter, other)
            if not alike(answer(adapter, inputs), first):
                return True
            shapes = budget.afford(6 * once, "state was not looked for across calls of different shapes")
            last = answer(adapter, third) if shapes else None
        with preserved(adapter.module):
            if last is not None and not alike(answer(adapter, third), last):
                return True
            return not alike(answer(adapter, other), early)
    except ModelCrash:
        # A crash of a later call is state, unless the same call crashes on a fresh model too.
        for given in (inputs, other):
            _fresh_answer(adapter, given)
        try:
            _fresh_answer(adapter, third)
        except ModelCrash:
            return False
        return True


@contextmanager
def _fresh(adapter: ModelAdapter) -> Iterator[None]:
    """Put everything that a call may change back afterwards."""
    with preserved(adapter.module):
        yield


def _fresh_answer(adapter: ModelAdapter, inputs: Inputs, seed: int = 0) -> Tensor:
    with _fresh(adapter):
        return answer(adapter, inputs, seed)


def _diagnose(adapter: ModelAdapter, inputs: Inputs) -> list[Finding]:
    """Say what the answer depends on besides the input and the random streams."""
    base = _fresh_answer(adapter, inputs)
    again = _fresh_answer(adapter, inputs)
    return _state(adapter, inputs) if alike(base, again) else [_beyond_reach(adapter, inputs, base, again)]


def _difference(first: Tensor, second: Tensor) -> str:
    """Say how far two answers are apart."""
    if first.shape != second.shape:
        return f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
    return f"|difference| {change(first, second):.2g}, largest |logit| {float(first.abs().max()):.2g}"


def _random(adapter: ModelAdapter, budget: Budget) -> list[Finding]:
    """Name the random numbers that change the answer, one finding per code.

    Several seeds are tried on a larger batch: a layer that is dropped rarely is dropped for some sample some time.
    """
    inputs = example(adapter, 0, MORE_SAMPLES if adapter.num_parameters < LARGE_MODEL else 2)
    for item in hidden_items(adapter.module):
        if isinstance(item.item, torch.nn.Module) and item.trains:
            # Hidden layers are out of reach of eval(), which is said once, as unregistered layers.
            item.item.eval()

    def call() -> Tensor:
        return _fresh_answer(adapter, inputs)

    started = time.perf_counter()
    base = call()
    once = time.perf_counter() - started
    tried = 0
    for seed in range(1, SEEDS + 1):
        if tried >= FEWEST_SEEDS and not budget.afford(once, f"{tried} of {SEEDS} seeds were tried for random answers"):
            return []
        reseeded, tried = _fresh_answer(adapter, inputs, seed), seed
        if not alike(base, reseeded):
            break
    else:
        return []
    evidence = f"two calls on the same input in eval mode differ ({_difference(base, reseeded)})"
    draws = guilty_draws(adapter, call)
    latent = samples_latent(adapter, lambda given: _whole_answer(adapter, inputs, given), (0, tried))
    findings = []
    for code, drops, hint in (
        ("dropout_in_eval", True, DROPOUT_HINT), ("nondeterministic_forward", False, RANDOM_HINT)
    ):  # fmt: skip
        found = [draw for draw in draws if draw.drops is drops]
        if found:
            also = f", and {len(found) - 1} more" if len(found) > 1 else ""
            message = f"{evidence}: {found[0].function}() draws random numbers here{also}"
            wanted = latent and not drops
            severity = "warn" if wanted else "fail"
            if wanted:
                hint = LATENT_HINT
            findings.append(Finding(code, severity, found[0].module or adapter.name, message, hint, REPRODUCTION))
    if findings:
        return findings
    places = culprits(adapter.module, lambda: _streams()[:3], call)
    skipped = _calls(adapter, inputs, 0) != _calls(adapter, inputs, seed)
    code, hint = ("dropout_in_eval", DROPOUT_HINT) if skipped else ("nondeterministic_forward", RANDOM_HINT)
    source = "layers are skipped at random" if skipped else "Python's or NumPy's random numbers are drawn"
    where = (places[0] if places else "") or adapter.name
    return [Finding(code, "fail", where, f"{evidence}: {source} here", hint, REPRODUCTION)]


def _whole_answer(adapter: ModelAdapter, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """Return every real-valued tensor of the output for a copy of the inputs on given random streams."""
    with _fresh(adapter), torch.no_grad():
        seed_streams(seed, "determinism")
        found = named_tensors(adapter.forward(copied(inputs)))
        return {path: tensor.clone() for path, tensor in found if tensor.is_floating_point()}


def _streams() -> tuple[Any, ...]:
    """Return the states of the global streams: Python's, NumPy's in two parts, torch's."""
    kind: Any = np.random.get_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    device = [bytes(state.numpy()) for state in torch.cuda.get_rng_state_all()] if cuda else []
    return random.getstate(), kind[1].tobytes(), kind[2], bytes(torch.get_rng_state().numpy()), device


def _calls(adapter: ModelAdapter, inputs: Inputs, seed: int) -> int:
    """Return how many modules start and end in one call."""
    events: list[str | None] = []
    with _fresh(adapter), running_modules(adapter.module, events.append):
        answer(adapter, inputs, seed)
    return len(events)


def _beyond_reach(adapter: ModelAdapter, inputs: Inputs, base: Tensor, again: Tensor) -> Finding:
    """Describe answers that differ although the model, the input and all random streams are the same."""
    places = culprits(adapter.module, lambda: _outside(adapter), lambda: answer(adapter, inputs))
    evidence = f"({_difference(base, again)})"
    if places:
        message = f"a call changes class attributes or globals, and the next call's answer with them {evidence}"
        return Finding("state_across_calls", "fail", places[0] or adapter.name, message, STATE_HINT, REPRODUCTION)

    def call() -> Tensor:
        return _fresh_answer(adapter, inputs)

    where = first_difference(adapter, call, call)
    message = f"two calls differ on equal input, state and random seeds {evidence}"
    return Finding("nondeterministic_forward", "fail", where or adapter.name, message, CLOCK_HINT, REPRODUCTION)


def _outside(adapter: ModelAdapter) -> list[Any]:
    """Return numbers, and sizes of containers, in the classes and source modules of the model's own code."""
    classes = {base for child in adapter.module.modules() for base in type(child).__mro__}
    own = [c for c in classes if c.__module__.partition(".")[0] not in ("torch", "builtins", *sys.stdlib_module_names)]
    spaces: dict[str, Mapping[str, Any]] = {f"{c.__module__}.{c.__qualname__}": vars(c) for c in own}
    spaces |= {name: vars(sys.modules[name]) for name in {c.__module__ for c in own} if name in sys.modules}
    noted: list[Any] = []
    for name in sorted(spaces):
        for key, value in list(spaces[name].items()):
            if isinstance(value, (int, float)):
                noted.append((name, key, value))
            elif isinstance(value, (list, dict, set)):
                noted.append((name, key, len(value)))
            elif isinstance(value, Tensor):
                noted.append((name, key, id(value), value._version))
    return noted


def _state(adapter: ModelAdapter, inputs: Inputs) -> list[Finding]:
    """Find answers that depend on the calls before, all on the same random streams."""
    fresh = _fresh_answer(adapter, inputs)
    for kind in (0, 1, 2):
        earlier = example(adapter, kind)

        def between(earlier: Inputs = earlier) -> None:
            with suppress(ModelCrash):
                answer(adapter, earlier)

        def repeat() -> Tensor:
            return answer(adapter, inputs)

        def fresh_repeat() -> Tensor:
            return _fresh_answer(adapter, inputs)

        with _fresh(adapter):
            between()
            try:
                late = repeat()
            except ModelCrash as crash:
                message = f"the call after another one raises ({crash}); on a fresh model it works"
                return [Finding("state_across_calls", "fail", crash.where, message, STATE_HINT, REPRODUCTION)]
        if alike(fresh, late):
            continue
        with _fresh(adapter):
            where = first_difference(adapter, fresh_repeat, repeat, between)
        message = f"the answer to one input depends on the calls before it ({_difference(fresh, late)})"
        return [Finding("state_across_calls", "fail", where or adapter.name, message, STATE_HINT, REPRODUCTION)]
    return []
