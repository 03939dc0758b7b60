"""Random numbers that a forward pass draws from torch's streams: by which call, in which module, and whether it counts.

A call drew when it moved the generator on. It matters when drawing other numbers there, and there alone, changes the
answer: a draw whose result is thrown away is no fault.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.watching import Running, alike, running_modules

DROPPING = ("dropout", "bernoulli", "lstm", "gru", "rnn_", "multi_head_attention", "scaled_dot_product", "rrelu")
"""Parts of the names of functions that drop values at random."""
UNIFORM = ("rand", "rand_like", "uniform_", "uniform")
SHIFTS = ("add", "add_", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "to", "float", "type_as",
          "__getitem__", "view", "reshape", "expand", "unsqueeze")  # fmt: skip
CUTS = ("lt", "le", "gt", "ge", "__lt__", "__le__", "__gt__", "__ge__", "less", "greater", "less_equal",
        "greater_equal", "floor", "floor_", "round", "item", "__bool__", "__float__", "heaviside")  # fmt: skip
"""What turns uniform numbers into a mask or a decision: dropout written by hand."""
MOST_SITES = 6
TRIES = 8
"""A decision that goes one way nearly always needs several draws to go the other."""


@dataclass(frozen=True)
class Draw:
    """One place where random numbers are drawn.

    Attributes:
        module: Name of the innermost module that was running; ``""`` is the model itself.
        function: Name of the function that drew.
        drops: Whether values are dropped at random, as opposed to noise, samples or random projections.
    """

    module: str
    function: str
    drops: bool


class _Watch(TorchFunctionMode):
    """Notes the calls that move the generator on, and draws other numbers in chosen ones."""

    def __init__(
        self, running: Running, device: torch.device, altered: tuple[str, str] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.running, self.altered, self.seed = running, altered, seed
        cuda = device.type == "cuda"
        self.generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        self.sites: dict[tuple[str, str], bool] = {}
        self.uniform: dict[int, tuple[Any, tuple[str, str]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and see whether it drew."""
        name = getattr(func, "__name__", "")
        before = self.generator.get_state()
        result = func(*args, **(kwargs or {}))
        after = self.generator.get_state()
        site = (self.running.name, name)
        if torch.equal(before, after):
            self._follow(name, args, result)
            return result
        self.sites.setdefault(site, any(word in name for word in DROPPING))
        if name in UNIFORM and isinstance(result, Tensor):
            self.uniform[id(result)] = (result, site)
        if site == self.altered and not _in_place(name):
            # All later draws are the same as without this.
            self.generator.manual_seed(int(before.sum()) + self.seed)
            result = func(*args, **(kwargs or {}))
            self.generator.set_state(after)
        elif site == self.altered and isinstance(result, Tensor):
            self.generator.manual_seed(int(before.sum()) + self.seed)
            # The values before are gone; the drawn ones in another order are another draw.
            order = torch.randperm(result.numel(), device=result.device)
            result.copy_(result.flatten()[order].view_as(result))
            self.generator.set_state(after)
        return result

    def _follow(self, name: str, args: Any, result: Any) -> None:
        """Follow uniform numbers until something is decided by them."""
        for item in args:
            known = self.uniform.get(id(item))
            if known is None or known[0] is not item:
                continue
            if name in CUTS:
                self.sites[known[1]] = True
            elif name in SHIFTS and isinstance(result, Tensor):
                self.uniform[id(result)] = (result, known[1])


def _in_place(name: str) -> bool:
    return name.endswith("_")


def guilty_draws(adapter: ModelAdapter, call: Callable[[], Any]) -> list[Draw]:
    """Return the draws that the answer depends on, in order of the first; empty if none is torch's own.

    Args:
        adapter: The model.
        call: Runs it on seeded streams, and returns what to compare.
    """

    def run(altered: tuple[str, str] | None, seed: int = 0) -> tuple[Any, dict[tuple[str, str], bool]]:
        with running_modules(adapter.module) as running, _Watch(running, adapter.device, altered, seed) as watch:
            return call(), watch.sites

    base, sites = run(None)
    draws = []
    for site, drops in list(sites.items())[:MOST_SITES]:
        if any(not alike(run(site, seed)[0], base) for seed in range(TRIES)):
            draws.append(Draw(site[0], site[1], drops))
    return draws or [Draw(module, function, drops) for (module, function), drops in sites.items()][:1]
