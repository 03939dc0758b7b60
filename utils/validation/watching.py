"""Which module is at work: the stack of running modules, who changed something, and where two runs part.

Blame goes to the innermost module whose own code acted, so states are compared at every entry to a module and exit
from it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, observe
from utils.adapters.model_adapter import ModelAdapter

HUGE = 1e4
"""Numbers from here on are compared among themselves."""
NUMBERS = (bool, int, float)


class Running:
    """The modules that are running.

    Attributes:
        stack: Their names, the innermost last; the model itself is ``""``. After an exception it stays as it was.
    """

    def __init__(self) -> None:
        """Start outside every module."""
        self.stack: list[str] = []

    @property
    def name(self) -> str:
        """The innermost module that runs."""
        return self.stack[-1] if self.stack else ""


@contextmanager
def running_modules(
    module: nn.Module, event: Callable[[str | None], None] | None = None, running: Running | None = None
) -> Iterator[Running]:
    """Keep track of the modules that run while the block does.

    Args:
        module: The model.
        event: Called at every entry to and exit from a module with the name of the module that was at work until then;
            None when no module was.
        running: Where to keep track; a new one by default.
    """
    running = running or Running()

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if event is not None:
                event(running.name if running.stack else None)
            running.stack.append(name)

        return hook

    def leave(*_: Any) -> None:
        if event is not None:
            event(running.name)
        running.stack.pop()

    handles = []
    for name, child in module.named_modules():
        # First of all pre-hooks and last of all hooks: what a user's hook does counts as the module's own doing.
        handles.append(child.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(child.register_forward_hook(leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def culprits(module: nn.Module, state: Callable[[], Any], call: Callable[[], Any]) -> list[str]:
    """Return the modules whose own code changed something during a call, in order of the first change.

    Args:
        module: The model.
        state: Returns what is watched as a value that compares with ``!=``.
        call: Runs the model.
    """
    found: list[str] = []
    last = state()

    def compare(name: str | None) -> None:
        nonlocal last
        now = state()
        if name is not None and now != last and name not in found:
            found.append(name)
        last = now

    with running_modules(module, compare):
        call()
    return found


class Intruders:
    """Finds the module whose own code made a tensor of a foreign kind (device, dtype) when a pass breaks on it.

    The break often comes later, inside a layer that merely received the tensor.
    """

    def __init__(self, foreign: Callable[[Tensor], bool]) -> None:
        """Take the predicate that tells foreign tensors."""
        self.foreign = foreign
        self.stack: list[tuple[str, bool]] = []
        self.makers: list[str] = []

    def _holds(self, value: Any) -> bool:
        return any(self.foreign(tensor) for _, tensor in named_tensors(value))

    def _enter(self, name: str, args: Any, kwargs: Any) -> None:
        self.stack.append((name, self._holds(args) or self._holds(kwargs)))

    def _leave(self, output: Any) -> None:
        name, received = self.stack.pop()
        if self._holds(output) and not received:
            self.makers.append(name)

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Watch all modules while the block runs."""
        handles = []
        for name, child in module.named_modules():

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._enter(name, args, kwargs)

            handles.append(child.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            handles.append(child.register_forward_hook(lambda _, __, output: self._leave(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def origin(self) -> str:
        """The module to blame: the last maker inside the innermost running module that was given nothing foreign."""
        clean = [name for name, received in self.stack if not received]
        innermost = clean[-1] if clean else ""
        if self.stack and not self.stack[-1][1]:
            own = [name for name in self.makers if name.rpartition(".")[0] == innermost]
        else:
            own = [name for name in self.makers if innermost == "" or name.startswith(f"{innermost}.")]
        return own[-1] if own else innermost


def first_difference(
    adapter: ModelAdapter,
    first: Callable[[], Any],
    second: Callable[[], Any],
    between: Callable[[], Any] = lambda: None,
) -> str | None:
    """Return the first module to finish whose output differs between two runs although its inputs agree.

    Args:
        adapter: The model.
        first: One run.
        second: The other.
        between: What happens after the first run, unobserved.

    Returns:
        Its name, ``""`` for the model itself, or None when no such module exists.
    """
    calls: list[tuple[str, list[Any], list[Any]]] = []
    found: list[str] = []
    position = 0

    def record(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        calls.append((name, values(given), values(output)))

    def compare(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal position
        if found or position >= len(calls):
            return
        known, known_inputs, known_output = calls[position]
        position += 1
        if name != known:
            # The runs took different ways; what chose the way is around here.
            found.append(name.rpartition(".")[0])
        elif not alike(values(output), known_output) and alike(values(given), known_inputs):
            found.append(name)

    with observe(adapter.module, record):
        first()
    between()
    with observe(adapter.module, compare):
        second()
    return found[0] if found else None


def values(given: Any) -> list[Any]:
    """Return copies of the tensors in a value, and the numbers among positional arguments."""
    plain = [item for item in given if isinstance(item, NUMBERS)] if isinstance(given, tuple) else []
    return [*plain, *(tensor.detach().clone() for _, tensor in named_tensors(given))]


def alike(first: Any, second: Any) -> bool:
    """Compare nested values up to rounding; NaN equals NaN."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(alike(a, b) for a, b in zip(first, second, strict=True))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return type(first) is type(second) and bool(first == second)
    return first.shape == second.shape and first.dtype == second.dtype and change(first, second) <= 0


def _rounding(dtype: torch.dtype) -> float:
    """Return the relative difference that adding in another order may make."""
    epsilon = torch.finfo(dtype).eps
    # Half the digits of bfloat16 are no rounding any more.
    return 64 * epsilon if epsilon < 1e-4 else 4 * epsilon


def change(first: Tensor, second: Tensor) -> float:
    """Return the largest difference of two tensors of one shape, 0 if it is no more than rounding.

    Equal calls are bitwise equal nearly always; other threads or memory addresses may add in another order.
    """
    if torch.equal(first, second):
        return 0.0
    if not first.is_floating_point():
        return float((first != second).any())
    a, b = first.detach().double(), second.detach().double()
    finite = torch.isfinite(a)
    # What is infinite must be the same infinity in both; NaN equals NaN.
    if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
    # The huge numbers that switch classes off are no measure for the others.
    ordinary = (a.abs() < HUGE) & (b.abs() < HUGE)
    largest = 0.0
    for part in (ordinary, ~ordinary):
        if bool(part.any()):
            gap, scale = float((a - b)[part].abs().max()), float(torch.maximum(a[part].abs(), b[part].abs()).max())
            largest = max(largest, gap if gap > _rounding(first.dtype) * scale else 0.0)
    return largest
