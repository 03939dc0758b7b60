"""How much a nearest-neighbour memory says about the next token, and how that is mixed with what the model says.

Khandelwal et al. 2020, "Generalization through memorization: nearest neighbor language models" (ICLR,
arXiv:1911.00172):

    p_knn(y) ∝ sum over the k nearest (key, value) with value y of exp(-d(key, query) / T)    (equation 2, with T = 1)
    p(y) = lambda p_knn(y) + (1 - lambda) p_model(y)                                          (equation 3)

with squared Euclidean distance d. Where a gate is given, lambda follows from each lookup, as in He et al. 2021,
"Efficient nearest neighbor language models" (EMNLP, arXiv:2109.04212), here by a logistic function of six numbers.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from utils.runtime.arguments import described, instance_of, is_finite, is_whole
from utils.runtime.errors import ConfigError
from utils.runtime.settings import settings_of, shown

FEATURES = (
    "log distance of the nearest", "distance of the nearest", "log mean distance",
    "mass of the memory's likeliest token", "entropy of the model", "log probability of the model's likeliest token",
)  # fmt: skip
"""What a gate reads, in order; the distances are roots, so that they are lengths."""
SMALLEST = 1e-30
"""Stands for a probability of zero in a logarithm."""
NEAREST = 1e-4
"""Length that stands for anything shorter: float32 cannot tell shorter distances from rounding."""
PENALTY = 1e-3
"""Of squared coefficients of a gate, so that few texts do not drive them to infinity."""


@dataclass(frozen=True)
class Gate:
    """A logistic function of `FEATURES`, each brought to mean 0 and deviation 1."""

    means: tuple[float, ...]
    """Of the features."""
    deviations: tuple[float, ...]
    """Of the features."""
    coefficients: tuple[float, ...]
    """Of the features, after that."""
    bias: float
    """What is added."""

    def __post_init__(self) -> None:
        """Check that there is a finite number for each feature.

        Raises:
            ConfigError: There are more or fewer, or one that is not finite, or a deviation of 0.
        """
        for name in ("means", "deviations", "coefficients"):
            given = getattr(self, name)
            values = tuple(given) if isinstance(given, (list, tuple)) else ()
            object.__setattr__(self, name, values)
            fits = len(values) == len(FEATURES) and all(map(is_finite, values)) and is_finite(self.bias)
            if not fits or (name == "deviations" and min(values) <= 0):
                raise ConfigError(
                    f"The {name} of the gate are {shown(given)}, and its bias is {described(self.bias)}.",
                    f"Expected {len(FEATURES)} finite numbers, deviations above 0, and a finite bias.",
                    "Have the gate fitted by choose_settings.",
                )

    def logit(self, features: Tensor) -> Tensor:
        """Return the logit of lambda, ``(n,)``, from features ``(n, 6)``."""
        scaled = (features - features.new_tensor(self.means)) / features.new_tensor(self.deviations)
        return scaled @ features.new_tensor(self.coefficients) + self.bias


@dataclass(frozen=True)
class NeighbourConfig:
    """How a nearest-neighbour head answers; `choose_settings` finds the values on a development split."""

    neighbours: int = 128
    """How many memories are asked, k; fewer where there are fewer."""
    temperature: float = 10.0
    """Divides squared distances, T: a small one listens to the nearest alone."""
    weight: float = 0.25
    """Share of the memory in the answer, lambda; 0 leaves the model alone."""
    gate: Gate | None = None
    """Chooses the share for each token instead of `weight`; None takes `weight` always."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: One of them is out of its range.
        """
        if isinstance(self.gate, Mapping):
            missing = [field.name for field in fields(Gate) if field.name not in self.gate]
            if missing:
                raise ConfigError(
                    f"The gate of the NeighbourConfig has no {', '.join(missing)}.",
                    f"Expected all of {', '.join(field.name for field in fields(Gate))}.",
                    "Take a gate from `NeighbourConfig.to_dict`, or None.",
                )
            object.__setattr__(self, "gate", settings_of(Gate, self.gate))
        rules = {
            "neighbours": (is_whole(self.neighbours, 1), "a whole number above 0"),
            "temperature": (is_finite(self.temperature) and self.temperature > 0, "a number above 0"),
            "weight": (is_finite(self.weight) and 0 <= self.weight < 1, "a number from 0 to below 1"),
            "gate": (self.gate is None or isinstance(self.gate, Gate), "a Gate or None"),
        }
        for name, (fits, expected) in rules.items():
            if not fits:
                raise ConfigError(
                    f"NeighbourConfig.{name} is {described(getattr(self, name))}.",
                    f"Expected {expected}.",
                    "Have it found by choose_settings, or give another value.",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "NeighbourConfig":
        """Make settings from a dict.

        Raises:
            ConfigError: It is no mapping, a name is unknown or a value is invalid.
        """
        return settings_of(cls, settings)


@dataclass(frozen=True, eq=False)
class Lookup:
    """What model and memory know of a number of places in text, before they are mixed."""

    distances: Tensor
    """Squared distances of the nearest, ascending, float32 ``(n, k)``."""
    rows: Tensor
    """Which memories they are, int64 ``(n, k)``."""
    values: Tensor
    """Their tokens, int64 ``(n, k)``."""
    entropy: Tensor
    """Entropy of the model's answer in nats, ``(n,)``."""
    top: Tensor
    """Log probability of the model's likeliest token, ``(n,)``."""
    targets: Tensor
    """The token that followed, int64 ``(n,)``."""
    model: Tensor
    """The model's log probability of it, ``(n,)``."""
    windows: Tensor
    """Which window each place is in, int64 ``(n,)``."""
    hashes: Tensor
    """`window_hashes` of that window, int64 ``(n,)``, to tell whether two splits share text."""

    def with_values(self, values: Tensor) -> "Lookup":
        """Return the same lookup in a memory whose tokens are `values` ``(keys,)``."""
        return replace(self, values=values.long()[self.rows])

    def part(self, mask: Tensor) -> "Lookup":
        """Return some of the places."""
        return Lookup(**{name: value[mask] for name, value in vars(self).items()})

    def shares(self, config: NeighbourConfig) -> Tensor:
        """Return how much each neighbour counts, ``(n, k)`` with rows of sum 1, equation 2 before it is summed."""
        return (-self.distances[:, : config.neighbours] / config.temperature).softmax(1)

    def memory(self, config: NeighbourConfig) -> Tensor:
        """Return the memory's probability of the token that followed, ``(n,)``."""
        hit = self.values[:, : config.neighbours] == self.targets[:, None]
        return (self.shares(config) * hit).sum(1)

    def features(self, config: NeighbourConfig) -> Tensor:
        """Return `FEATURES`, ``(n, 6)``."""
        nearest = self.distances[:, : config.neighbours].sqrt().clamp_min(NEAREST)
        first, mean = nearest[:, 0], nearest.mean(1)
        shares, values = self.shares(config), self.values[:, : config.neighbours]
        # The likeliest token's mass, found among the values: sorted, so that equal tokens are neighbours.
        order = values.argsort(1)
        values, running = values.gather(1, order), shares.gather(1, order).cumsum(1)
        begins = torch.ones_like(values, dtype=torch.bool)
        begins[:, 1:] = values[:, 1:] != values[:, :-1]
        before = torch.where(begins, running - shares.gather(1, order), 0).cummax(1).values
        mass = (running - before).amax(1)
        return torch.stack((first.log(), first, mean.log(), mass, self.entropy, self.top), 1)

    def weight_logits(self, config: NeighbourConfig) -> Tensor:
        """Return the logit of the memory's share, ``(n,)``; minus infinity for none."""
        if config.gate is not None:
            return config.gate.logit(self.features(config).double()).float()
        share = math.log(config.weight / (1 - config.weight)) if config.weight else -math.inf
        return torch.full_like(self.model, share)

    def log_probability(self, config: NeighbourConfig) -> Tensor:
        """Return the mixture's log probability of the token that followed, ``(n,)``, equation 3."""
        return mixed(self.model, self.memory(config), self.weight_logits(config))


def check_lookup(lookup: Any, name: str) -> None:
    """Check that something is a lookup.

    Args:
        lookup: What was given.
        name: What it is, as the beginning of a sentence.

    Raises:
        ConfigError: It is something else, such as token ids.
    """
    action = "Give head.lookup(ids), or head.lookup(ids, labels)."
    instance_of(lookup, Lookup, name, "Expected what a head finds in a text.", action)


def mixed(model: Tensor, memory: Tensor, weight_logits: Tensor) -> Tensor:
    """Return the log of the mixture.

    Args:
        model: Log probabilities by the model.
        memory: Probabilities by the memory.
        weight_logits: Logits of the memory's share.
    """
    return torch.logaddexp(
        model + functional.logsigmoid(-weight_logits),
        memory.clamp_min(SMALLEST).log() + functional.logsigmoid(weight_logits),
    )


def window_hashes(ids: Tensor) -> Tensor:
    """Return a number for each window of token ids ``(n, length)``, int64 ``(n,)``: 64 bits of its SHA-256."""
    rows = np.ascontiguousarray(ids.cpu().numpy(), dtype="<i8")
    return torch.tensor(
        [int.from_bytes(hashlib.sha256(row).digest()[:8], "little", signed=True) for row in rows], dtype=torch.int64
    )


def fit_gate(lookup: Lookup, config: NeighbourConfig) -> Gate:
    """Find the gate that makes the tokens that followed likeliest, by L-BFGS in float64.

    Args:
        lookup: Places of a development split.
        config: Neighbours and temperature, and the weight to start from.

    Raises:
        ConfigError: One of them is something else.
    """
    check_lookup(lookup, "The lookup")
    config = settings_of(NeighbourConfig, config)
    features = lookup.features(config).double()
    means, deviations = features.mean(0), features.std(0).clamp_min(1e-6)
    scaled = (features - means) / deviations
    model, memory = lookup.model.double(), lookup.memory(config).double()
    start = min(max(config.weight, 0.01), 0.99)
    # The last entry is the bias.
    point = torch.zeros(len(FEATURES) + 1, dtype=torch.float64)
    point[-1] = math.log(start / (1 - start))
    point.requires_grad_(True)
    optimizer = torch.optim.LBFGS([point], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -mixed(model, memory, scaled @ point[:-1] + point[-1]).mean() + PENALTY * point[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = point.detach()
    return Gate(tuple(means.tolist()), tuple(deviations.tolist()), tuple(found[:-1].tolist()), float(found[-1]))
