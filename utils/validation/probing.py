"""Running a model under test: crashes with their circumstances, lengths that fit the budget, the first bad module."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from utils.adapters.capture import named_tensors, observe
from utils.adapters.location import crash_location
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.resources import is_out_of_memory
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget

LANGUAGE_MODELS = ("causal_lm", "masked_lm", "seq2seq")
SHORT_LENGTH = 17
UNBOUNDED_LENGTH = 512
"""Length that stands for "long" when a model states no maximum."""
LARGEST_LOGITS = 400e6
LONG_PASS = 0.05
"""Seconds of a forward pass from which on what the first pass of all takes beside is small."""
LONGEST_LENGTH = 4096
OBSERVERS = ("utils.validation.", "utils.adapters.")
"""Modules of this package whose hooks and modes watch a model."""
MODULE_CALL = ("torch.nn.modules.module", "_call_impl")
"""Where torch starts a module, in a traceback."""
OFF = -1e4
"""A score that no real class has: models that switch classes off use this, more, or minus infinity."""
_LIVE: WeakKeyDictionary[ModelAdapter, dict[tuple[str, int], Tensor | None]] = WeakKeyDictionary()
_LINES: WeakKeyDictionary[ModelAdapter, dict[str, str]] = WeakKeyDictionary()
_RUN: WeakKeyDictionary[ModelAdapter, set[int]] = WeakKeyDictionary()
_SECONDS: WeakKeyDictionary[ModelAdapter, dict[tuple[int | None, int], float]] = WeakKeyDictionary()


class ModelCrash(Exception):
    """The model raised on a legal input.

    Attributes:
        error: What it raised.
        situation: The input, in words.
        where: The innermost module that was running, by name.
    """

    def __init__(self, error: Exception, situation: str, where: str) -> None:
        """Keep the circumstances."""
        super().__init__(f"{situation}: {type(error).__name__}: {first_line(error)}")
        self.error, self.situation, self.where = error, situation, where


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, shortened to 200 characters."""
    return (str(error).strip() or "no message").splitlines()[0][:200]


def describe_inputs(inputs: Mapping[str, Any]) -> str:
    """Describe inputs by name and shape, for example ``input_ids (2, 16)``."""
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor))


def guarded(adapter: ModelAdapter, inputs: Mapping[str, Any], situation: str, call: Callable[[], Any]) -> Any:
    """Run a call of the model; an exception becomes a `ModelCrash` that names the module it came from.

    What an observer raises is no crash of the model and comes through as it is.

    Raises:
        ModelCrash: The model raised anything but an out-of-memory error.
    """
    try:
        return call()
    except AdapterError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        where = _crashing_module(adapter, inputs)
        if where is None and _is_own(error):
            raise
        raise ModelCrash(error, situation or describe_inputs(inputs), where or adapter.name) from error


def crash_site(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> str:
    """Return the name of the innermost module that was running when the model raises on these inputs."""
    return _crashing_module(adapter, inputs) or adapter.name


def _crashing_module(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> str | None:
    """Run the model by itself, and return what `crash_site` does; None where it does not raise."""
    running: list[str] = []
    handles = []
    with _unobserved(adapter.module):
        for name, child in adapter.module.named_modules():
            handles.append(child.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            # A hook that returns anything but None replaces the output, so what pop returns must not get out.
            handles.append(child.register_forward_hook(lambda *_: (running.pop(), None)[1]))
        try:
            seed_streams(0, "forward")
            adapter.forward(inputs)
        except Exception as error:
            where = running[-1] if running and running[-1] else adapter.name
            _LINES.setdefault(adapter, {})[where] = crash_location(adapter.module, error)
            return where
        finally:
            for handle in handles:
                handle.remove()
    return None


@contextmanager
def _unobserved(module: torch.nn.Module) -> Iterator[None]:
    """Lift the hooks of this package, and all modes that see functions or operators, while the block runs."""
    lifted: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for child in module.modules():
        for hooks in (child._forward_pre_hooks, child._forward_hooks):
            if any(_is_observer(hook) for hook in hooks.values()):
                lifted.append((hooks, dict(hooks)))
    try:
        for hooks, _ in lifted:
            for key in [key for key, hook in hooks.items() if _is_observer(hook)]:
                del hooks[key]
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            yield
    finally:
        for hooks, before in lifted:
            hooks.clear()
            hooks.update(before)


def _is_observer(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(OBSERVERS)


def _is_own(error: BaseException) -> bool:
    """Tell whether an error was raised outside the model, or code of this package ran inside the model."""
    names, trace = [], error.__traceback__
    while trace is not None:
        names.append((str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_frame.f_code.co_name))
        trace = trace.tb_next
    called = next((index for index, name in enumerate(names) if name == MODULE_CALL), None)
    return called is None or any(name.startswith(OBSERVERS) for name, _ in names[called:])


def crash_line(adapter: ModelAdapter, where: str) -> str:
    """Return file and line of the last crash that `crash_site` laid at a module, empty if there was none."""
    return _LINES.get(adapter, {}).get(where, "")


def logits(adapter: ModelAdapter, inputs: Mapping[str, Any], situation: str = "", whole: bool = False) -> Tensor:
    """Return the logits without a gradient, on the same random streams each time.

    Args:
        adapter: The model.
        inputs: A batch.
        situation: The input in words, for a crash.
        whole: Whether to keep classes that are switched off; see `live`.

    Raises:
        ModelCrash: The model raised.
    """

    def call() -> Tensor:
        # A forward that draws random numbers would otherwise differ from call to call for that reason alone.
        seed_streams(0, "forward")
        with torch.no_grad():
            return adapter.logits(inputs)

    result: Tensor = guarded(adapter, inputs, situation, call)
    return result if whole else live(adapter, result)


def live(adapter: ModelAdapter, result: Tensor, path: str = "") -> Tensor:
    """Leave out the classes that a model switches off by minus infinity or a huge negative number.

    They carry nothing, and beside their size every real difference would pass for rounding. Which they are is settled
    by the first output seen.

    Args:
        adapter: The model.
        result: ``(..., classes)``.
        path: Where in the output it is, when it is not the logits.
    """
    if not result.is_floating_point() or result.dim() < 2 or not result.numel():
        return result
    kept = _LIVE.setdefault(adapter, {})
    key = (path, result.shape[-1])
    if key not in kept:
        # NaN is no way to switch off: it compares as live, and stays in sight.
        off = (result.detach() <= OFF).flatten(0, -2).all(0)
        kept[key] = (~off).nonzero()[:, 0] if bool(off.any()) and int((~off).sum()) > 1 else None
    columns = kept[key]
    return result if columns is None else result[..., columns.to(result.device)]


def compares_samples(adapter: ModelAdapter) -> bool:
    """Tell whether the logits are a table ``(batch, batch)`` of each sample against each other, as contrast makes."""
    if adapter.failure is not None or not adapter.batched:
        return False
    for size in (2, 3):
        try:
            shape = tuple(logits(adapter, adapter.example_inputs(size), whole=True).shape)
        except ModelCrash:
            return False
        if shape != (size, size):
            return False
    return True


def content_input(adapter: ModelAdapter) -> str:
    """Return the name of the input whose positions the logits follow: the decoder's in a seq2seq model."""
    return adapter.content_input if adapter.task.value == "seq2seq" else adapter.main_input


def has_length(adapter: ModelAdapter) -> bool:
    """Tell whether inputs are token sequences whose length can be chosen."""
    return adapter.modality == "tokens" and adapter.example_inputs(1)[adapter.main_input].dim() == 2


def short_length(adapter: ModelAdapter) -> int:
    """Return a short length, odd if possible, that the model takes."""
    return adapter.legal_length(min(SHORT_LENGTH, adapter.max_length.value or SHORT_LENGTH))


def longest_length(adapter: ModelAdapter, budget: Budget, passes: int, batch_size: int = 1) -> int:
    """Return the longest length, up to the model's maximum, at which `passes` forward passes fit the budget.

    What had to be cut is recorded in the budget.
    """
    stated = adapter.max_length.value
    limit = stated or UNBOUNDED_LENGTH
    width = adapter.vocab_size.value or 1
    length = max(1, min(limit, LONGEST_LENGTH, int(LARGEST_LOGITS / (4 * width * batch_size))))
    reference, expected = _expected_seconds(adapter, length, batch_size, budget)
    # Whether a length that nobody stated runs at all takes a pass of its own.
    passes += stated is None
    while length > 64 and passes * expected(length) > budget.remaining():
        length //= 2
    length = adapter.legal_length(length)
    if stated is None:
        length = _longest_that_runs(adapter, length, reference)
    elif length < limit:
        note = stand_in(length, limit)
        if note not in budget.reduced:
            budget.reduced.append(note)
    return length


def _expected_seconds(
    adapter: ModelAdapter, longest: int, batch_size: int, budget: Budget
) -> tuple[int, Callable[[int], float]]:
    """Return a length that runs, and the seconds of a forward pass by its length.

    A token of a longer text costs less where a pass has a fixed price, and more where every pair of tokens is looked
    at: lengths as long as the budget easily allows are measured, and the growth between the last two is carried on.
    """
    known, power = adapter.legal_length(min(32, longest)), 1.0
    if not budget.remaining():
        return known, lambda _: math.inf
    seconds = forward_seconds(adapter, known, batch_size)
    while (longer := adapter.legal_length(4 * known)) <= longest / 4 and longer > known:
        if 2 * seconds * (longer / known) ** 2 > budget.remaining() / 8:
            break
        try:
            more = forward_seconds(adapter, longer, batch_size)
        except ModelCrash:
            # Whoever runs so long a text next tells of it.
            break
        power = min(2.0, max(1.0, math.log(more / seconds) / math.log(longer / known)))
        known, seconds = longer, more
    return known, lambda length: seconds * (length / known) ** power


def _longest_that_runs(adapter: ModelAdapter, length: int, known: int) -> int:
    """Return a length that runs, at most `length`: where nobody stated a limit, exceeding one is no fault."""
    run = _RUN.setdefault(adapter, set())
    while length > known and length not in run:
        try:
            logits(adapter, adapter.example_inputs(1, length))
        except ModelCrash:
            length = adapter.legal_length(max(known, length // 2))
        else:
            run.add(length)
    return length if length in run else min(length, known)


def with_steps(adapter: ModelAdapter, inputs: Mapping[str, Tensor], axis: int, steps: int) -> dict[str, Tensor]:
    """Return inputs with another number of time steps, in all of them that have as many as the main one."""
    main = inputs[adapter.main_input]
    old, index = main.shape[axis], torch.arange(steps, device=main.device) % main.shape[axis]
    result = dict(inputs)
    for name, value in inputs.items():
        shared = 1 if value is not main and isinstance(value, Tensor) and value.dim() == 2 else axis
        if isinstance(value, Tensor) and value.dim() > shared and value.shape[shared] == old:
            result[name] = value.index_select(shared, index)
    return result


def stand_in(length: int, limit: int) -> str:
    """Return the note that a shorter length was tried instead of the maximum."""
    return f"length {length} stands for the maximum of {limit}"


def forward_seconds(adapter: ModelAdapter, length: int | None, batch_size: int = 1) -> float:
    """Return the seconds of one forward pass, the faster of two where that is quick; measured once for each size."""
    measured = _SECONDS.setdefault(adapter, {})
    if (length, batch_size) in measured:
        return measured[length, batch_size]
    inputs = adapter.example_inputs(batch_size, length)
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        logits(adapter, inputs)
        best = min(best, time.perf_counter() - started)
        if best > LONG_PASS:
            break
    measured[length, batch_size] = best
    return best


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds only finite numbers, without a mask as large as the tensor.

    A sum over squares would overflow for large finite values; extreme values are NaN or infinite exactly when some
    element is.
    """
    if tensor.is_sparse:
        tensor = tensor.detach().coalesce().values()
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all tensors hold only finite numbers."""
    return all(is_finite(tensor) for tensor in tensors)


def _is_bad(tensor: Tensor) -> bool:
    """Tell whether an input holds NaN or infinity; minus infinity of four axes is a mask's right."""
    return not is_finite(tensor) and not (tensor.dim() >= 4 and bool((tensor < float("inf")).all()))


def first_nonfinite(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> str:
    """Return the first module in execution order whose output is not finite although its inputs are.

    Additive masks hold minus infinity on purpose; they enter as inputs and so never blame a module.
    """
    found: list[str] = []

    def observer(name: str, child: torch.nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if not found and not all_finite(t for _, t in named_tensors(output)):
            if not any(_is_bad(t) for _, t in named_tensors(given)) and all_finite(child.parameters()):
                found.append(name or adapter.name)
            elif not all_finite(child.parameters()):
                bad = next(key for key, p in child.named_parameters() if not is_finite(p))
                found.append(f"{name}.{bad}" if name else bad)

    with observe(adapter.module, observer):
        logits(adapter, inputs)
    return found[0] if found else adapter.name
