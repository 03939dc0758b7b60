"""Random numbers that a forward pass draws from torch's streams: by which call, in which module, and whether it counts.

A call drew when it moved the generator on. It matters when drawing other numbers there, and there alone, changes the
answer: a draw whose result is thrown away is no fault.
"""

from collections.abc import Callable, Sequence
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
SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "rsub", "addcmul",
        "addcmul_", "normal", "normal_")  # fmt: skip
"""What puts a mean and noise together."""
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


class _Latent(TorchFunctionMode):
    """Finds sums of a known mean and random noise, and lets them hold what they held before if that is given."""

    def __init__(self, device: torch.device, means: Sequence[Tensor], held: Sequence[Tensor] = ()) -> None:
        super().__init__()
        cuda = device.type == "cuda"
        self.generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        self.means, self.held = [mean.flatten() for mean in means], list(held)
        self.sums: list[Tensor] = []
        self.noise: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and see whether it made or used noise."""
        name = getattr(func, "__name__", "")
        given = [item for item in (*args, *(kwargs or {}).values()) if isinstance(item, Tensor)]
        noisy = any(self.noise.get(id(item)) is item for item in given)
        known = name in SUMS and any(self._is_mean(item) for item in given)
        before = self.generator.get_state()
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        if not noisy and torch.equal(before, self.generator.get_state()):
            return result
        if not known:
            self.noise[id(result)] = result
            return result
        index = len(self.sums)
        self.sums.append(result.detach().clone())
        self.noise.pop(id(result), None)
        if index < len(self.held) and self.held[index].shape == result.shape:
            if _in_place(name) and not name.startswith("__"):
                return result.copy_(self.held[index])
            return self.held[index].clone()
        return result

    def _is_mean(self, tensor: Tensor) -> bool:
        flat = tensor.detach().flatten()
        return any(mean.shape == flat.shape and torch.equal(mean, flat) for mean in self.means)


def samples_latent(adapter: ModelAdapter, call: Callable[[int], dict[str, Tensor]], seeds: tuple[int, int]) -> bool:
    """Tell whether random answers come from a variational model's draw of its latent vector, which is meant to be.

    Such a model returns mean and variance beside the answer. The proof: noise is added to one of them, and with that
    sum held as it was, other random numbers change nothing.

    Args:
        adapter: The model.
        call: Runs it on a seed and returns its whole output by path.
        seeds: Two seeds whose answers differ.
    """
    first, second = (call(seed) for seed in seeds)
    fixed = [path for path in first if path in second and alike(first[path], second[path])]
    shapes = [first[path].shape for path in fixed if first[path].dim() > 1]
    pairs = [first[path] for path in fixed if shapes.count(first[path].shape) > 1 and first[path].dim() > 1]
    if not pairs:
        return False
    with _Latent(adapter.device, pairs) as seen:
        base = call(seeds[0])
    if not seen.sums:
        return False
    with _Latent(adapter.device, pairs, seen.sums):
        held = call(seeds[1])
    return base.keys() == held.keys() and all(alike(base[path], held[path]) for path in base)
