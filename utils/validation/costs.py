"""What does one forward pass cost, in arithmetic, in bytes moved and in time, and which modules pay it?

Arithmetic and bytes are counted operator by operator and the same on every machine; times are of this one.
"""

import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from utils.adapters.capture import unfused_attention
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.dispatch import OperatorMode
from utils.runtime.resources import format_bytes, format_count
from utils.validation.check import Budget, Outcome
from utils.validation.pictures import Picture
from utils.validation.probing import has_length, logits
from utils.validation.svg import bar_list
from utils.validation.watching import Running, running_modules

COUNTED_LENGTH = 32
FEWEST_RUNS, MOST_RUNS, USEFUL_SECONDS = 2, 5, 0.3
ONE_RUN = "times of one pass"
SHOWN = 15
BALANCE = {"a T4 (65 TFLOPS, 320 GB/s)": 203, "an H100 (990 TFLOPS, 3350 GB/s)": 295}
"""Operations per byte from which on arithmetic and not memory is the limit: half-precision peak over bandwidth."""


class CostCounter(OperatorMode):
    """Counts floating-point operations and bytes of every operator in the block, by the module that runs.

    Bytes are those of every operator's inputs and outputs: what moves when nothing is fused and nothing stays in a
    cache. A multiplication with an addition counts as two operations, as usual.

    Attributes:
        flops: Operations by module.
        bytes: Bytes by module.
    """

    def __init__(self, running: Running) -> None:
        """Start at zero."""
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self._formulas = {**flop_registry, **_own_formulas()}
        self._running = running
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        module = self._running.name
        if (formula := self._formulas.get(func.overloadpacket)) is not None:
            self.flops[module] += int(formula(*args, **kwargs, out_val=result))
        if not getattr(func, "is_view", False):
            leaves = tree_leaves((args, kwargs, result))
            tensors = [t for t in leaves if isinstance(t, Tensor) and not t.is_nested]
            self.bytes[module] += sum(t.numel() * t.element_size() for t in tensors)
        return result


def _own_formulas() -> dict[Any, Any]:
    """Return formulas for fused CPU operators that torch's own table leaves out."""
    aten = torch.ops.aten
    formulas: dict[Any, Any] = {}
    if hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        formulas[aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    if hasattr(aten, "mkldnn_rnn_layer"):
        formulas[aten.mkldnn_rnn_layer] = _recurrence_flops
    return formulas


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Count both products, of shapes ``(length, width) (width, keys)`` and ``(length, keys) (keys, width)``."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _recurrence_flops(x: Tensor, weight_in: Tensor, weight_hidden: Tensor, *_: Any, **__: Any) -> int:
    """Count the products with the input and the hidden state, for every step and sample."""
    steps = x.numel() // x.shape[-1]
    return 2 * steps * (weight_in.numel() + weight_hidden.numel())


@dataclass(frozen=True)
class ModuleCost:
    """What the own code of one module costs in a forward pass, its submodules left out."""

    name: str
    """Qualified name; the class name for the model itself."""
    kind: str
    """Class of the module."""
    seconds: float
    """Median time."""
    flops: int
    """Floating-point operations."""
    bytes: int
    """Bytes read and written."""


def module_costs(adapter: ModelAdapter, length: int | None, budget: Budget) -> list[ModuleCost]:
    """Return the costs of every module that does something in a forward pass of one sample, the slowest first."""
    inputs = adapter.example_inputs(1, length)
    # A whole layer as one operator hides its products, and the modules inside it that make them.
    with unfused_attention():
        return _module_costs(adapter, inputs, budget)


def _module_costs(adapter: ModelAdapter, inputs: dict[str, Tensor], budget: Budget) -> list[ModuleCost]:
    """Return what `module_costs` does, for one batch."""
    with running_modules(adapter.module) as running:
        counter = CostCounter(running)
        with counter:
            logits(adapter, inputs)
    runs: dict[str, list[float]] = defaultdict(list)
    spent, count = 0.0, 0
    fewest = FEWEST_RUNS if budget.afford(USEFUL_SECONDS, ONE_RUN) else 1
    while count < fewest or (count < MOST_RUNS and spent < min(USEFUL_SECONDS, budget.remaining())):
        times = _own_seconds(adapter, inputs)
        for name, seconds in times.items():
            runs[name].append(seconds)
        spent += sum(times.values())
        count += 1
    costs = [
        ModuleCost(
            name or adapter.name, type(adapter.module.get_submodule(name)).__name__, statistics.median(seconds),
            counter.flops[name], counter.bytes[name],
        )
        for name, seconds in runs.items()
    ]  # fmt: skip
    return sorted(costs, key=lambda cost: -cost.seconds)


def _own_seconds(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Return the seconds of one forward pass by the module whose own code was running."""
    seconds: dict[str, float] = defaultdict(float)
    cuda = adapter.device.type == "cuda"
    last = 0.0

    def event(name: str | None) -> None:
        nonlocal last
        if cuda:
            torch.cuda.synchronize(adapter.device)
        now = time.perf_counter()
        if name is not None:
            seconds[name] += now - last
        last = now

    with running_modules(adapter.module, event):
        logits(adapter, inputs)
    return seconds


def operations(count: float) -> str:
    """Format a number of floating-point operations, for example ``16.0 GFLOP``."""
    number = format_count(count).replace("B", "G").replace("k", "K")
    return f"{number[:-1]} {number[-1]}FLOP" if number[-1].isalpha() else f"{number} FLOP"


def check_costs(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Count operations and bytes, and time every module; nothing is judged."""
    sequence = has_length(adapter)
    longest = adapter.max_length.value or COUNTED_LENGTH
    length = adapter.legal_length(min(COUNTED_LENGTH, longest)) if sequence else None
    costs = module_costs(adapter, length, budget)
    flops, moved = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
    seconds = sum(cost.seconds for cost in costs)
    intensity = flops / max(moved, 1)
    shown = [cost for cost in costs[:SHOWN] if cost.seconds > 0]
    details: dict[str, Any] = {
        "length": length, "flops": flops, "bytes_moved": moved, "arithmetic_intensity": intensity,
        "flops_per_second": flops / max(seconds, 1e-12),
        "training_flops": 3 * flops,
        "modules": [vars(cost) for cost in shown],
    }  # fmt: skip
    bound = ", ".join(f"{limit} for {device}" for device, limit in BALANCE.items())
    why = (
        f"{operations(flops)} for one sample"
        + (f" of {length} tokens" if length else "")
        + f", {format_bytes(moved)} moved: {intensity:.1f} operations per byte"
        + (f"; {shown[0].name} takes {shown[0].seconds / max(seconds, 1e-12):.0%} of the time" if shown else "")
    )
    pictures = []
    if shown:
        names = [f"{cost.name} ({cost.kind})" for cost in shown]
        labels = [
            f"{cost.seconds * 1000:.2f} ms, {operations(cost.flops)}, {format_bytes(cost.bytes)}" for cost in shown
        ]
        picture = bar_list(names, [cost.seconds for cost in shown], labels, "Time by module, without its submodules")
        caption = f"Below about {bound} operations per byte, memory and not arithmetic is the limit."
        pictures.append(Picture("Time by module", picture, caption))
    return Outcome(flops, None, why, (), details, pictures)
