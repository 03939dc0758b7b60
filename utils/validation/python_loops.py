"""Does Python loop where one operator on whole tensors would do?

Found by counting the operators that Python calls, which is the same on every machine, at several lengths and batch
sizes. A loop that no size changes, such as one over heads, is found by what it works on: slices of one tensor, one
after another, in one place of the code. A recurrence, in which each step needs the one before, is no needless loop: it
is told by following what each result was made from.
"""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.adapters.capture import named_tensors
from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Finding
from utils.validation.probing import ModelCrash, logits
from utils.validation.watching import Running, running_modules

LENGTHS = (8, 24, 40)
BATCHES = (2, 6, 10)
PER_STEP = {"position": 0.9, "sample": 0.9}
"""Operators and calls of submodules per further position or sample from which on a module loops."""
LINEAR = 0.8
"""A loop's count grows by the same number again; that of experts, more of which are met in a larger batch, by less."""
FEWEST_SLICES, FEWEST_LIGHT_SLICES = 3, 16
"""Slices of one tensor from which on a loop over them is told, for functions that are heavy and for others."""
HEAVY = frozenset({"linear", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm", "addmm", "conv1d", "conv2d",
                   "scaled_dot_product_attention", "softmax", "_softmax"})  # fmt: skip
COLLECTING = frozenset({
    "add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "maximum", "minimum", "cat", "concat", "stack",
    "__setitem__", "__getitem__", "copy_", "to", "view", "reshape", "unsqueeze", "squeeze", "index_add_", "select",
    "narrow", "detach", "unbind", "transpose", "chunk", "split", "permute", "contiguous", "flatten", "size", "dim",
})  # fmt: skip
"""Functions that only collect: a sum over steps does not make the steps depend on each other."""

Site = tuple[str, str, int]
"""Module, function and place in the code of a call."""


@dataclass
class Work:
    """What the code of each module did in one forward pass."""

    steps: Counter[str] = field(default_factory=Counter)
    """Operators and calls of submodules, by module."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each module was called."""
    operators: int = 0
    """Operators in all."""
    sites: Counter[Site] = field(default_factory=Counter)
    """How often each place in the code called its function."""
    recurrent: Counter[Site] = field(default_factory=Counter)
    """How many results of a site, each made from the one before, led to its input, for sites that have such inputs."""
    slices: dict[tuple[Any, ...], set[int]] = field(default_factory=lambda: defaultdict(set))
    """Offsets of the slices that one place passed to one function, by a key that begins with the level above the
    running module and the name of the module that loops."""
    equal: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    """How often one place passed the very same tensors to one heavy function; keys as before."""

    def per_call(self, name: str) -> float:
        """Return a module's own steps in one of its calls."""
        return self.steps[name] / max(1, self.calls[name])


class _Watch(TorchFunctionMode):
    """Counts the torch functions that Python calls, and follows what their results are made from.

    Below that level a fused LSTM kernel would look like a loop, because it is taken apart into steps there.
    """

    def __init__(self, module: nn.Module, running: Running, work: Work) -> None:
        super().__init__()
        self._running, self._work = running, work
        self._parameters = {p.untyped_storage()._cdata for p in module.parameters() if p.layout == torch.strided}
        self._made_from: dict[int, tuple[Tensor, frozenset[Site], dict[Site, int]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function and take note of it."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":
            # Attributes such as shape are no work.
            return result
        module, work = self._running.name, self._work
        work.steps[module] += 1
        work.operators += 1
        site = (module, name, _line())
        work.sites[site] += 1
        given = [t for _, t in named_tensors((args, kwargs or {}))]
        known = [self._made_from[id(t)] for t in given if id(t) in self._made_from]
        sources = frozenset[Site]().union(*(sites for _, sites, _ in known))
        chains: dict[Site, int] = {}
        for _, _, earlier in known:
            for place, count in earlier.items():
                chains[place] = max(count, chains.get(place, 0))
        if site in sources:
            chains[site] = chains.get(site, 0) + 1
            work.recurrent[site] = max(work.recurrent[site], chains[site])
        changed = given[:1] if result is None or name.endswith("_") else []
        made = [*(t for _, t in named_tensors(result)), *changed]
        # Reading a number, as of an expert that was chosen, is no work on a slice.
        if made and name not in COLLECTING:
            self._note_slices(site, given, made, sources)
        sources |= {site}
        for tensor in made:
            # Holding on to the tensor keeps its id from being reused.
            self._made_from[id(tensor)] = (tensor, sources, chains)
        return result

    def _note_slices(self, site: Site, given: list[Tensor], made: list[Tensor], sources: frozenset[Site]) -> None:
        """Take note of which part of a larger activation is worked on, if it is a part, and of equal calls."""
        calls = self._work.calls
        shapes = tuple(tuple(tensor.shape) for tensor in (*given, *made))
        # A submodule that is called again and again is not what loops: both are noted, and the inner is asked first.
        for level, looping in enumerate(self._running.stack[-1:-3:-1]):
            key = (level, looping, calls[looping], *site)
            # Averaging over several dropout masks looks like equal calls in eval mode.
            random = any(name == "dropout" and module.startswith(looping) for module, name, _ in sources)
            if site[1] in HEAVY and given and not random:
                self._work.equal[(*key, *map(id, given))] += 1
            for index, tensor in enumerate(given):
                try:
                    storage = tensor.untyped_storage()
                except (NotImplementedError, RuntimeError):
                    # Inside of torch.vmap, or in a layout of its own: such a tensor has no place in a larger one.
                    continue
                if storage._cdata not in self._parameters and storage.nbytes() > tensor.nbytes:
                    place = (*key, index, storage._cdata, shapes)
                    self._work.slices[place].add(int(tensor.storage_offset()))


def _line() -> int:
    """Return a number for the innermost call outside torch that is being executed."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/torch/" in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return hash((frame.f_code, frame.f_lasti))


def count_work(
    adapter: ModelAdapter, batch_size: int, length: int | None, inputs: dict[str, Tensor] | None = None
) -> Work:
    """Return what one forward pass does, module by module; on drawn inputs of this size unless some are given."""
    inputs = adapter.example_inputs(batch_size, length) if inputs is None else inputs
    work = Work()

    def enter(name: str, parent: str) -> None:
        work.calls[name] += 1
        work.steps[parent] += 1

    with running_modules(adapter.module) as running:
        handles = [
            child.register_forward_pre_hook(lambda *_, name=name: enter(name, _above(running)))
            for name, child in adapter.module.named_modules()
        ]
        try:
            with _Watch(adapter.module, running, work):
                logits(adapter, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return work


def _above(running: Running) -> str:
    """Return the module that called the one that has just started."""
    return running.stack[-2] if len(running.stack) > 1 else ""


def find_loops(adapter: ModelAdapter, sequence: bool) -> tuple[list[Finding], dict[str, int]]:
    """Look for needless loops over positions, samples and slices.

    Args:
        adapter: The model.
        sequence: Whether inputs have a length that can be chosen.

    Returns:
        At most one finding of ``slow_python_loop`` per kind of loop, and the number of operators at each size.
    """
    longest = adapter.max_length.value or LENGTHS[-1]
    lengths = [adapter.legal_length(min(n, longest)) if sequence else None for n in LENGTHS]
    counts: dict[str, int] = {}

    def work_at(batch_size: int, length: int | None) -> Work:
        work = count_work(adapter, batch_size, length)
        counts[f"batch {batch_size}" + (f", length {length}" if length else "")] = work.operators
        return work

    # What is made once, in the first pass, would look like a loop.
    logits(adapter, adapter.example_inputs(BATCHES[0], lengths[0]))
    base = work_at(BATCHES[0], lengths[0])
    findings = []
    sizes: dict[str, list[tuple[int, int | None]]] = {"sample": [(n, lengths[0]) for n in BATCHES]}
    if sequence and len(set(lengths)) == len(LENGTHS):
        sizes["position"] = [(BATCHES[0], n) for n in lengths]
    for what, places in sizes.items():
        numbers = [length if what == "position" else batch for batch, length in places]
        works = [base, work_at(*places[1])]
        if not _growing(works, numbers, what):
            continue
        works.append(work_at(*places[2]))
        names = _growing(works, numbers, what)
        if what == "position":
            names = {name: rate for name, rate in names.items() if not _recurrent(works, name)}
        if names := _whatever_it_reads(adapter, names, base, places, what):
            findings.append(_growth_finding(adapter, names, what, counts))
    if not findings and (name := _slicing(base)):
        findings.append(_slice_finding(adapter, *name))
    return findings, counts


def _growing(works: list[Work], numbers: list[Any], what: str) -> dict[str, float]:
    """Return the modules whose own steps per call grow with a size, evenly, and by how many per unit of it."""
    found = {}
    for name in works[-1].steps:
        values = [work.per_call(name) for work in works]
        rates = [(b - a) / (n - m) for a, b, m, n in zip(values, values[1:], numbers, numbers[1:], strict=False)]
        if min(rates) >= PER_STEP[what] and rates[-1] >= LINEAR * rates[0]:
            found[name] = rates[-1]
    return found


def _whatever_it_reads(
    adapter: ModelAdapter, names: dict[str, float], base: Work, places: list[tuple[int, int | None]], what: str
) -> dict[str, float]:
    """Return those modules that take as many steps where more input is but the same input again.

    Experts that are skipped when no token is sent to them run more often the more different tokens there are.
    """
    if not names:
        return {}
    (few, short), (many, long) = ((batch, length or 0) for batch, length in (places[0], places[-1]))
    repeated = {}
    for key, value in adapter.example_inputs(few, short).items():
        if isinstance(value, Tensor) and what == "sample" and value.shape[:1] == (few,):
            value = value[torch.arange(many, device=value.device) % few]
        elif isinstance(value, Tensor) and what == "position" and value.shape[1:2] == (short,):
            value = value[:, torch.arange(long, device=value.device) % short]
        repeated[key] = value
    try:
        again = count_work(adapter, many, places[-1][1], repeated)
    except ModelCrash:
        return names
    more = many - few if what == "sample" else long - short
    return {n: r for n, r in names.items() if again.per_call(n) - base.per_call(n) >= PER_STEP[what] * more}


def _recurrent(works: list[Work], name: str) -> bool:
    """Tell whether the steps of a module's loop depend on each other: chains of them get longer with the input."""
    inside = [
        site
        for site in works[-1].recurrent
        if (site[0] == name or site[0].startswith(f"{name}." if name else "")) and site[1] not in COLLECTING
    ]
    return any(works[-1].recurrent[site] > works[0].recurrent[site] for site in inside)


def _slicing(work: Work) -> tuple[str, str] | None:
    """Return a module that calls one function on slices of one tensor, or on the very same ones, and what it does."""
    sizes = Counter(place[:-1] for place in work.slices)
    for place, offsets in sorted(work.slices.items(), key=lambda item: item[0][0]):
        _, name, _, _, function, *_ = place
        if sizes[place[:-1]] > 1:
            # Parts or results of several sizes, as of tokens sorted by their expert, do not fit into one tensor.
            continue
        within = f"{name}." if name else ""
        chains = [
            count
            for site, count in work.recurrent.items()
            if (site[0] == name or site[0].startswith(within)) and site[1] not in COLLECTING
        ]
        # Layers that a model's own code runs one after another are a chain too, but not one as long as the loop. A
        # recurrence that runs twice is two chains beside each other, each of one link less than it has steps.
        chain = max(chains, default=0)
        dependent = len(offsets) <= 2 * chain + (2 if chain >= FEWEST_SLICES else 1)
        if len(offsets) >= (FEWEST_SLICES if function in HEAVY else FEWEST_LIGHT_SLICES) and not dependent:
            return name, f"{function.strip('_')} is called on {len(offsets)} slices of one tensor, one after the other"
    for (_, name, _, _, function, *_), count in sorted(work.equal.items(), key=lambda item: item[0][0]):
        if count >= FEWEST_SLICES:
            return name, f"{function.strip('_')} is called {count} times on the very same tensors"
    return None


def _growth_finding(adapter: ModelAdapter, names: dict[str, float], what: str, counts: dict[str, int]) -> Finding:
    """Describe a loop over positions or samples."""
    # A loop within a loop grows with both; the innermost module is the place to begin.
    where = max(names, key=lambda name: (names[name], name.count(".")))
    measured = ", ".join(f"{count} at {size}" for size, count in counts.items())
    more = f", and in {len(names) - 1} more modules" if len(names) > 1 else ""
    message = f"{names[where]:.0f} more operators or calls per {what}{more} ({measured})"
    hint = f"Work on whole tensors instead of looping over {what}s in Python: they do not depend on each other here."
    return Finding("slow_python_loop", "warn", where or adapter.name, message, hint)


def _slice_finding(adapter: ModelAdapter, where: str, message: str) -> Finding:
    """Describe a loop over slices of one tensor."""
    hint = (
        "Compute once what does not change in the loop, give the loop's axis its own dimension, (batch, heads, length,"
        " width) for heads, and call the function once."
    )
    return Finding("slow_python_loop", "warn", where or adapter.name, message, hint)
