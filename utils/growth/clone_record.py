"""What a clone is made of and where it comes from, and how it is put together from its parent.

What a clone shares with its parent are the very same parameters, not copies: they take no memory twice, and what one
model learns in them the other one knows. That is why they are frozen unless asked otherwise, for the parent too.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from utils.growth.certificate import Certificate
from utils.growth.edits import GrowthError
from utils.growth.lineage import lineage_of, remember
from utils.growth.low_rank import LowRank, inject

MODES = ("full", "partial", "light")
TRUNKS = ("frozen", "joint")

_FROZEN: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()
"""Names of the parameters that cloning froze, by parent; other frozen ones are frozen on purpose and stay so."""


class CloneError(GrowthError):
    """A model cannot be cloned as asked, or a clone does not belong to the model that was given."""


@dataclass(frozen=True)
class CloneRecord:
    """Where a clone comes from and what it is made of."""

    domain: str
    """What it is for."""
    mode: str
    """One of `MODES`."""
    parent: str
    """Reference of the parent, or the name of its class where it has none."""
    parent_sha256: str
    """Of the parent's weights when the clone was made."""
    parent_parameters: int
    """Parameters of the parent."""
    own_parameters: int
    """Parameters that only the clone has."""
    shared_parameters: int
    """Parameters that are the parent's."""
    own: tuple[str, ...]
    """Names, in the clone, of the tensors of its own, buffers included."""
    shared: tuple[str, ...]
    """Names, in the parent, of the parameters that both use."""
    trunk: str
    """What becomes of those: one of `TRUNKS`."""
    cut: str | None = None
    """The module up to which a partial clone is shared."""
    low_rank: LowRank | None = None
    """Settings of a light clone."""
    targets: tuple[str, ...] = ()
    """Modules that a light clone corrects."""
    seed: int = 0
    """Of what was drawn."""
    growth_events: int = 0
    """How often the parent had grown."""
    notes: tuple[str, ...] = ()
    """How it was decided what is shared."""

    def describe(self) -> str:
        """Say it in one line."""
        return (
            f"{self.mode} clone of {self.parent} ({self.parent_sha256[:12]}) for {self.domain}: "
            f"{self.own_parameters:,} parameters of its own, {self.shared_parameters:,} shared"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {**plain, "low_rank": None if self.low_rank is None else self.low_rank.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CloneRecord":
        """Read what `to_dict` returned.

        Raises:
            CloneError: It is not that.
        """
        try:
            rest: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            }
            rest["low_rank"] = None if (said := values["low_rank"]) is None else LowRank.from_dict(said)
            return cls(**rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise CloneError(
                f"The record of a clone cannot be read ({type(error).__name__}: {error}).",
                "Expected what this version of Seedbed writes.",
                "Restore the clone's folder from a copy, or use the version that wrote it.",
            ) from error


@dataclass(frozen=True, eq=False)
class DomainClone:
    """A clone with its parent."""

    module: nn.Module
    """The clone: takes and returns what the parent does."""
    parent: nn.Module
    """The model that it was made from; the shared parameters are this one's."""
    record: CloneRecord
    """Where it comes from."""
    certificate: Certificate | None = None
    """How it compared with the parent when it was made; None for one that was read from disk."""

    @property
    def domain(self) -> str:
        """What it is for."""
        return self.record.domain

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that only the clone has, by their names in it, buffers included."""
        return own_tensors(self.module, self.parent)


def build(parent: nn.Module, record: CloneRecord) -> nn.Module:
    """Put a clone together as its record says, with the parent's present values.

    Args:
        parent: The model to clone.
        record: Its `shared` parameters are used, not copied; what is in `own` is copied even where it is tied to one.

    Raises:
        CloneError: The parent cannot be copied, or peft cannot correct one of its modules.
    """
    named = dict(parent.named_parameters(remove_duplicate=False))
    shared = [named[name] for name in record.shared]
    try:
        twin = copy.deepcopy(parent, {id(parameter): parameter for parameter in shared})
    except Exception as error:
        raise CloneError(
            f"{type(parent).__name__} cannot be copied ({type(error).__name__}: {error}).",
            "Expected a model that copy.deepcopy copies.",
            "Move what cannot be copied (files, locks, results of a forward pass) out of the module.",
        ) from error
    kept = {id(parameter) for parameter in shared}
    thawed = _FROZEN.get(parent, set())
    ours = {id(parameter) for name, parameter in named.items() if name in thawed}
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in list(twin.named_parameters(remove_duplicate=False)):
        trains = parameter.requires_grad or id(named[name]) in ours
        if id(parameter) not in kept:
            parameter.requires_grad_(trains)
        elif name in record.own:
            owner, _, leaf = name.rpartition(".")
            new = copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), trains))
            setattr(twin.get_submodule(owner), leaf, new)
    if record.low_rank is None:
        remember(twin, lineage_of(parent))
    else:
        inject(twin, record.low_rank, record.targets, record.seed)
    return twin


def freeze(parent: nn.Module, names: Iterable[str]) -> None:
    """Freeze parameters of a parent; `thaw` undoes it, and leaves alone what was frozen before."""
    named = dict(parent.named_parameters(remove_duplicate=False))
    for name in names:
        if named[name].requires_grad:
            _FROZEN.setdefault(parent, set()).add(name)
            named[name].requires_grad_(False)


def thaw(parent: nn.Module) -> None:
    """Let the parameters train again that cloning froze in a parent; what its clones share changes with them."""
    named = dict(parent.named_parameters(remove_duplicate=False))
    for name in _FROZEN.pop(parent, set()):
        named[name].requires_grad_(True)


def own_tensors(module: nn.Module, parent: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a clone's state that are not the parent's very tensors."""
    theirs = {id(tensor) for tensor in (*parent.parameters(), *parent.buffers())}
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) not in theirs}
