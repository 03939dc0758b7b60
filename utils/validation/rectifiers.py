"""Rectifiers that let nothing through: every unit of every sample is zero, so no gradient passes either."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Finding

HINT = "Check the bias and the scale of the layer before it; initialise biases at zero, or use GELU or LeakyReLU."
RECTIFIERS = {functional.relu, functional.relu_, functional.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
FEWEST_VALUES = 32
"""Fewer values than this may all be negative by chance."""
FEWEST_UNITS = 16
"""A layer of fewer units than this may be dead by chance: samples are alike, so only units count as draws."""
Site = tuple[str, str, int, str]
"""The module that calls, its part that ended last, how many rectifiers it called since, and the rectifier's name."""


class Rectified(TorchFunctionMode):
    """Notes what each rectifier lets through, by where it is called: in which module, and behind which part of it.

    Attributes:
        alive: Whether any value of any call was above zero, by site. A loop over time comes back to the same site, a
            loop over layers does not.
        units: How many units each has.
        behind: The autograd nodes that fed the calls at dead sites.
    """

    def __init__(self, plain: set[str]) -> None:
        """Start with none seen; `plain` are the names of modules without parts and parameters."""
        super().__init__()
        self.plain = plain
        self.alive: dict[Site, bool] = {}
        self.units: dict[Site, int] = {}
        self.behind: dict[Site, list[Any]] = {}
        # Of each running module: its name, its part that ended last, and how many rectifiers it called since.
        self.running: list[tuple[str, str, int]] = [("", "", 0)]

    def enter(self, name: str) -> None:
        """Note that a module starts."""
        self.running.append((name, "", 0))

    def leave(self) -> None:
        """Note that the innermost module is done."""
        name = self.running.pop()[0]
        if self.running:
            self.running[-1] = (self.running[-1][0], name, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and look at the result of rectifiers."""
        # In place, the input would be gone afterwards.
        # nn.ReLU6 is a hardtanh from 0 on.
        rectifies = func in RECTIFIERS or (func is functional.hardtanh and (kwargs or {}).get("min_val") == 0)
        weighed = rectifies and args and args[0].numel() >= FEWEST_VALUES
        weighed = weighed and (args[0].requires_grad or not torch.is_grad_enabled())
        # Exact zeros come from layers that start at zero on purpose.
        weighed = weighed and bool(args[0].any())
        node = args[0].grad_fn if weighed else None
        result = func(*args, **(kwargs or {}))
        if weighed and node is None:
            # A parameter itself: only what comes out has a node.
            node = result.grad_fn
        if rectifies:
            site = self._site()
            if weighed:
                passes = bool(result.any())
                self.alive[site] = self.alive.get(site, False) or passes
                self.units[site] = args[0].shape[1 if args[0].dim() >= 4 else -1]
                if self.alive[site]:
                    self.behind.pop(site, None)
                elif node is not None:
                    self.behind.setdefault(site, []).append(node)
        return result

    def _site(self) -> Site:
        """Return where the running call comes from, and count it."""
        name, last, count = self.running[-1]
        self.running[-1] = (name, last, count + 1)
        if name in self.plain and len(self.running) > 1:
            # One nn.ReLU may serve several layers of its parent's.
            return (*self.running[-2], name)
        return name, last, count, ""


@contextmanager
def watch_rectifiers(module: nn.Module) -> Iterator[Rectified]:
    """Watch the rectifiers of all passes inside the block."""
    seen = Rectified({name for name, child in module.named_modules() if name and _is_plain(child)})
    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, name=name: seen.enter(name)))
        handles.append(child.register_forward_hook(lambda *_: seen.leave()))
    try:
        with seen:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def dead_rectifiers(adapter: ModelAdapter, seen: Rectified) -> list[Finding]:
    """Judge: a layer of many units that are all dead is a fault, one of few units worth a look if others work.

    To be called after the backward pass: where the weights behind a rectifier have a gradient all the same, it is a
    clamp beside another way, as in ``x - relu(x - limit)``, and nothing stops learning.
    """
    dead = [site for site, alive in seen.alive.items() if not alive and not _learns(seen.behind.get(site, []))]
    if not dead:
        return []
    wide = [site for site in dead if seen.units[site] >= FEWEST_UNITS]
    worst = (wide or dead)[0]
    severity = "fail" if wide or len(dead) == len(seen.alive) else "warn"
    message = f"{len(dead)} of {len(seen.alive)} ReLUs give zero for every unit of every sample, this one first"
    caller, last, _, own = worst
    # Where one module, or one function, serves several layers, the layer before it tells which call it was.
    shared = not own or sum(site[3] == own for site in seen.alive) > 1
    if not shared:
        return [Finding("dead_relu", severity, own, message, HINT)]
    names = {id(p): name for name, p in adapter.module.named_parameters()}
    feeding = [names[id(p)] for p in _nearest(seen.behind.get(worst, [])) if id(p) in names]
    # What ended last need not be what was handed over.
    if last and (not feeding or any(name.startswith(f"{last}.") for name in feeding)):
        where, how = last, "after"
    else:
        where, how = (_holder(adapter.module, feeding[0]), "fed by") if feeding else (caller, "")
    if how:
        message += f" (in {caller or adapter.name}, {how} {where})"
    return [Finding("dead_relu", severity, where or adapter.name, message, HINT)]


def _holder(module: nn.Module, name: str) -> str:
    """Return the layer that a parameter makes up with others; the parameter itself where its holder has parts."""
    owner = name.rpartition(".")[0]
    return owner if owner and next(module.get_submodule(owner).children(), None) is None else name


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module has neither parts nor parameters."""
    return next(module.children(), None) is None and next(module.parameters(), None) is None


def _learns(nodes: list[Any]) -> bool:
    """Tell whether the nearest parameters behind autograd nodes got a gradient above zero."""
    return any(p.grad is not None and bool(p.grad.any()) for p in _nearest(nodes))


def _nearest(nodes: list[Any]) -> list[Tensor]:
    """Return the parameters, or other leaves, that the fewest steps lead to from autograd nodes."""
    level, known = list(nodes), set(nodes)
    while level:
        found = [node.variable for node in level if hasattr(node, "variable")]
        if found:
            return found
        following = [before for node in level for before, _ in node.next_functions if before is not None]
        level = [node for node in dict.fromkeys(following) if node not in known]
        known.update(level)
    return []
