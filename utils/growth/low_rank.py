"""Low-rank corrections of a model's projections (LoRA), put in place by peft where the structure says they belong."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import unfused_attention
from utils.adapters.structure import Structure, structure
from utils.adapters.wiring import Projection
from utils.growth.edits import GrowthError
from utils.growth.scratch import changed_by
from utils.runtime.errors import ConfigError
from utils.runtime.optional import require
from utils.runtime.seeding import isolated_streams

PARTS = ("attention", "feed_forward")
AROUND = 1e-2
"""Change of the answers, as a share of their size, above which two ways of computing them differ by more than rounding:
the corrections are then made as large as their inputs."""


class LowRankError(GrowthError):
    """A module cannot be corrected; the message says which and why."""


@dataclass(frozen=True)
class LowRank:
    """Settings of a light clone: W' = W + (alpha / rank) B A, with B zero at first (Hu et al., 2021, section 4.1)."""

    rank: int = 8
    """Rows of A and columns of B; the corrections have rank x (inputs + outputs) parameters per projection."""
    alpha: float = 16.0
    """Strength: the correction is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability with which an input of A is dropped while training."""
    parts: tuple[str, ...] = PARTS
    """Whose projections are corrected, out of attention and feed_forward."""
    modules: tuple[str, ...] = ()
    """Full names of the modules to correct; they take the place of what the structure would give."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"LowRank.rank is {self.rank!r}.", "Expected a whole number of at least 1.", "Try 8.")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not self.alpha > 0:
            raise ConfigError(f"LowRank.alpha is {self.alpha!r}.", "Expected a number above 0.", "Try twice the rank.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ConfigError(f"LowRank.dropout is {self.dropout!r}.", "Expected a probability below 1.", "Try 0.")
        for name in ("parts", "modules"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) and item for item in value):
                raise ConfigError(f"LowRank.{name} is {value!r}.", "Expected a tuple of names.", "Or leave it out.")
            object.__setattr__(self, name, tuple(value))
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ConfigError(f"LowRank.parts is {self.parts!r}.", f"Expected some of {', '.join(PARTS)}.", "Or both.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LowRank":
        """Read what `to_dict` returned."""
        return cls(**values)


def targets_of(adapter: ModelAdapter, settings: LowRank) -> tuple[tuple[str, ...], list[str]]:
    """Name the modules that a light clone corrects, and say how they were found.

    Raises:
        LowRankError: There are none, or one of the projections is no module of its own.
    """
    known = dict(adapter.module.named_modules())
    if settings.modules:
        missing = [name for name in settings.modules if name not in known]
        if missing:
            raise LowRankError(
                f"{adapter.name} has no module {missing[0]!r}.",
                "LowRank.modules takes full names of modules.",
                "Correct it; model.named_modules() lists all names.",
            )
        return settings.modules, [f"{len(settings.modules)} modules named in LowRank.modules"]
    found = structure(adapter)
    by_part = {part: dict.fromkeys((p.module, p.weight) for p in _projections(found, part)) for part in settings.parts}
    projections = {place: None for places in by_part.values() for place in places}
    if not projections:
        raise LowRankError(
            f"No projections of {' or '.join(settings.parts)} were found in {adapter.name}.",
            "Expected linear layers around a softmax, or pairs of them around an activation.",
            "Name the layers in LowRank(modules=(...)), or make a partial clone.",
        )
    for module, weight in projections:
        if weight.rpartition(".")[0] != module or next(known[module].children(), None) is not None:
            raise LowRankError(
                f"{module or 'The model'} multiplies by {weight} itself.",
                "Expected a layer that is called, such as nn.Linear: peft puts its own in such a layer's place.",
                "Leave that part out (LowRank(parts=...) or modules=...), or make a partial clone.",
            )
    counts = " and ".join(f"{len(places)} projections of {part}" for part, places in by_part.items())
    return tuple(dict.fromkeys(module for module, _ in projections)), [f"{counts}, by the model's structure"]


def _projections(found: Structure, part: str) -> Iterator[Projection]:
    """Yield the projections that were seen."""
    if part == "attention":
        for attention in found.attentions.value:
            yield from filter(None, (attention.query, attention.key, attention.value, attention.out))
    else:
        for pair in found.feed_forwards.value:
            yield from filter(None, (pair.up, pair.gate, pair.down))


def inject(module: nn.Module, settings: LowRank, targets: Sequence[str], seed: int) -> None:
    """Put low-rank corrections into a model, zero at first; which parameters train is left as it is.

    Args:
        module: The model; the layers named in `targets` are replaced in it.
        settings: Rank, strength and dropout.
        targets: Full names.
        seed: Of the first values of A.

    Raises:
        LowRankError: peft has no layer for one of the modules.
        MissingPackageError: peft is not installed.
    """
    peft = require("peft", "make light clones (LoRA)")
    # A list would match by the ends of names; an expression has to match the whole.
    pattern = "|".join(re.escape(name) for name in targets)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=f"(?:{pattern})"
    )
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        with isolated_streams(seed, "clone"), warnings.catch_warnings():
            # It says that it adapts itself to layers with transposed weights.
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            peft.inject_adapter_in_model(config, module)
    except Exception as error:
        raise LowRankError(
            f"peft cannot correct {type(module).__name__} ({type(error).__name__}: {error}).",
            f"Expected layers that it knows, out of {', '.join(targets[:3])}{' and more' if len(targets) > 3 else ''}.",
            "Name other layers in LowRank(modules=(...)), or make a partial clone.",
        ) from error
    finally:
        for parameter, trains in flags:
            parameter.requires_grad_(trains)


def require_felt(view: ModelAdapter, parent: nn.Module, inputs: Mapping[str, Any], targets: Sequence[str]) -> None:
    """Check that every correction reaches the answers, with and without gradients; the clone stays as it is.

    A layer of torch may hand the weights of its parts to one fused operator in eval mode, past what took their place.

    Args:
        view: An adapter of the clone.
        parent: The model without corrections.
        inputs: Of one forward pass.
        targets: Names of the corrected modules.

    Raises:
        LowRankError: One does not.
    """
    theirs = {id(parameter) for parameter in parent.parameters()}
    new = {name: p for name, p in view.module.named_parameters() if id(p) not in theirs}
    zero = {name: p for name, p in new.items() if not bool(p.detach().any())}
    generator = torch.Generator().manual_seed(0)
    with view.isolated():
        try:
            for parameter in zero.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter))
            plain = view.logits(inputs)
            with torch.enable_grad(), unfused_attention():
                followed = view.logits(inputs)
                weights = torch.randn(followed.shape, generator=generator).to(followed)
                reached: Sequence[Tensor | None] = (None,) * len(zero)
                if followed.requires_grad:
                    total = (followed * weights).sum()
                    reached = torch.autograd.grad(total, list(zero.values()), allow_unused=True)
        finally:
            for parameter in zero.values():
                parameter.zero_()
    lost = [name for name, gradient in zip(zero, reached, strict=True) if gradient is None]
    silent = [target for target in targets if not any(name.startswith(f"{target}.") for name in new)]
    if silent or lost:
        raise LowRankError(
            f"The correction of {(silent or lost)[0]} is never used in a forward pass.",
            "Expected the model to call the layers that are corrected.",
            "Leave that part out (LowRank(parts=...) or modules=...), or make a partial clone.",
        )
    if changed_by(followed.detach(), plain) > AROUND:
        raise LowRankError(
            "Without gradients the model computes past its corrected layers, in one fused operator.",
            "Expected the same answers in evaluation as in training.",
            "Call torch.backends.mha.set_fastpath_enabled(False) first, or make a partial clone.",
        )
