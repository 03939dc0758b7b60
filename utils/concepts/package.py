"""What one model knows of a concept, in a form that a model of any other architecture can learn from.

Values of one layer mean nothing to another model. So a package holds what does: the samples themselves, how sure the
teacher is of each, and how near it puts each to a few of them (relative representations, Moschella et al., ICLR 2023).
The teacher's own prototypes and direction are there to read the teacher again, and to look at.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from utils.adapters.activations import Place
from utils.concepts.content import Content, read_content
from utils.concepts.direction import ConceptDirection
from utils.concepts.readout import ConceptReadout
from utils.memory.key_reader import adapter_of
from utils.runtime.errors import DataError
from utils.runtime.project import VERSION
from utils.runtime.seeding import derive_seed
from utils.training.weights import weights_sha256

MOST_EXAMPLES = 20_000
"""Exemplars of a package."""
MOST_BYTES = 256 * 2**20
"""Bytes of a package's exemplars."""
MOST_ANCHORS, MOST_TRACES = 256, 16
"""Exemplars that the others are compared with, and layers in which they are."""


class PackageError(DataError):
    """A concept package that cannot be made, saved, read or used."""


@dataclass(frozen=True)
class Provenance:
    """Where a package is from."""

    model: str
    """Class of the teacher."""
    weights_sha256: str
    """SHA-256 of the teacher's weights and buffers, see `utils.training.weights.weights_sha256`."""
    layer: str
    """The layer that the concept was read from."""
    side: str
    """Its ``"output"`` or ``"input"``."""
    pool: str
    """What became of the positions of a sample."""
    channels: int | None
    """The axis of features, where it was given."""
    method: str
    """How the direction was found."""
    seed: int
    """Of the folds, the anchors and the controls."""
    positive: int
    """Exemplars with the concept."""
    negative: int
    """Exemplars without it."""
    licence: str
    """Of the exemplars, as the maker of the package states it."""
    date: str | None = None
    """When it was made, as its maker states it: YYYY-MM-DD."""
    seedbed: str = VERSION
    """Version that made it."""


@dataclass(frozen=True, eq=False)
class ConceptPackage:
    """A concept as a teacher knows it."""

    name: str
    """Of the concept."""
    content: Content = field(repr=False)
    """The exemplars: positive ones first."""
    labels: Tensor = field(repr=False)
    """bool ``(n,)``: on which side each exemplar was given. The transfer does not read them; its baseline does."""
    soft_targets: Tensor = field(repr=False)
    """float32 ``(n,)``: how likely the teacher finds each, calibrated, by a direction found without it."""
    prototypes: Tensor = field(repr=False)
    """float32 ``(2, width)``: the mean of the teacher's representation with the concept, and without it."""
    direction: ConceptDirection = field(repr=False)
    """The concept in the teacher's layer, with its controls."""
    calibration: tuple[float, float]
    """Scale and offset from the direction's score to log odds."""
    anchors: Tensor = field(repr=False)
    """int64 ``(k,)``: numbers of the exemplars that all are compared with."""
    traces: dict[str, Tensor] = field(repr=False)
    """For each traced layer, in the order of calls and the concept's own last, float32 ``(n, k)``: the cosine between
    the teacher's centred representations of an exemplar and of an anchor."""
    provenance: Provenance
    """Where it is from."""
    groups: tuple[str, ...] = field(default=(), repr=False)
    """The source or template of each exemplar; empty where none was given."""

    def __post_init__(self) -> None:
        """Check that all parts are there, fit each other and are bounded.

        Raises:
            PackageError: They do not.
        """
        for problem in self._problems():
            raise PackageError(
                f"The package of the concept {str(self.name)[:60]!r} is not whole: {problem}.",
                "Expected what extract_concept makes.",
                "Make it anew with extract_concept.",
            )

    def _problems(self) -> Iterator[str]:
        yield from self._content_problems()
        count, known = len(self.content), self.provenance
        if not isinstance(self.name, str) or not self.name.strip() or len(self.name) > 200:
            yield "a concept needs a name of at most 200 characters"
        if count > MOST_EXAMPLES or self.content.nbytes > MOST_BYTES:
            yield f"{count:,} exemplars of {self.content.nbytes:,} bytes, above {MOST_EXAMPLES:,} or {MOST_BYTES:,}"
        if not 0 < len(self.anchors) <= MOST_ANCHORS or not 0 < len(self.traces) <= MOST_TRACES:
            yield f"{len(self.anchors)} anchors and {len(self.traces)} traces, above {MOST_ANCHORS} and {MOST_TRACES}"
        vector, width = self.direction.vector, self.direction.vector.numel()
        if vector.ndim != 1 or vector.dtype != torch.float32 or not bool(torch.isfinite(vector).all()):
            yield f"a direction of shape {tuple(vector.shape)} and type {vector.dtype}, or with numbers not finite"
        if not all(math.isfinite(value) for value in (self.direction.bias, *self.calibration)):
            yield f"a bias of {self.direction.bias} and a calibration of {self.calibration}"
        wanted = {"labels": (count,), "soft_targets": (count,), "prototypes": (2, width), "anchors": self.anchors.shape}
        tables = {name: getattr(self, name) for name in wanted}
        wanted |= {f"trace of {name}": (count, len(self.anchors)) for name in self.traces}
        tables |= {f"trace of {name}": value for name, value in self.traces.items()}
        types = {"labels": torch.bool, "anchors": torch.int64}
        for name, value in tables.items():
            if tuple(value.shape) != tuple(wanted[name]) or value.dtype != types.get(name, torch.float32):
                yield f"{name} of shape {tuple(value.shape)} and type {value.dtype}, not {tuple(wanted[name])}"
            elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
                yield f"{name} with values that are not finite"
        targets, anchors = self.soft_targets, self.anchors
        if bool((targets < 0).any() or (targets > 1).any()):
            yield "soft_targets outside 0 to 1"
        if anchors.ndim != 1 or bool((anchors < 0).any() or (anchors >= count).any()):
            yield f"anchors that are not among {count} exemplars"
        if self.groups and len(self.groups) != count:
            yield f"{len(self.groups)} groups for {count} exemplars"
        if (int(self.labels.sum()), int((~self.labels).sum())) != (known.positive, known.negative):
            yield "other numbers of exemplars on either side than its provenance tells"
        if not torch.equal(self.labels, torch.arange(count) < known.positive):
            yield "labels that do not put the positive exemplars first"

    def _content_problems(self) -> Iterator[str]:
        """Check the exemplars as those of a user are."""
        tensors, texts = self.content.tensors, self.content.texts
        if tensors and texts:
            yield "exemplars that are texts and tensors at once"
        try:
            read_content(tensors or list(texts), "exemplars")
        except DataError as error:
            yield f"{error.found.removesuffix('.')}"

    def __len__(self) -> int:
        return len(self.content)

    @property
    def found(self) -> bool:
        """Whether the teacher has a direction of the concept that passes its controls, see `ConceptDirection.found`.

        What the teacher's behaviour loses with it is not measured: `examine_concept` does, and says if it is accepted.
        """
        return self.direction.found

    @property
    def place(self) -> Place:
        """The teacher's layer and its side."""
        return self.provenance.layer, self.provenance.side

    def readout(self, teacher: Any) -> ConceptReadout:
        """Return what reads the concept off the teacher, calibrated.

        Raises:
            PackageError: This model is not the teacher, or its weights have changed since.
        """
        adapter, known = adapter_of(teacher), self.provenance
        found = weights_sha256(adapter.module)
        if found != known.weights_sha256:
            raise PackageError(
                f"The weights of the {adapter.name} have the SHA-256 {found[:16]}...",
                f"The package of {self.name!r} is of a {known.model} whose weights have {known.weights_sha256[:16]}...",
                "Give the teacher as it was, or make the package anew.",
            )
        scale, offset = self.calibration
        return ConceptReadout(
            adapter, known.layer, known.side, known.pool, scale * self.direction.vector,
            scale * self.direction.bias + offset, known.channels,
        )  # fmt: skip

    def shuffled(self, seed: int) -> "ConceptPackage":
        """Return a package that says nothing: what the teacher makes of each exemplar is another exemplar's.

        The targets and the relations are the same ones, and go through the same training. Exemplars of both sides get
        targets of each side in proportion: with a plain permutation a package of n keeps, or inverts, about
        1 / sqrt(n) of the concept by chance. The labels, which the transfer does not read, stay.

        Args:
            seed: Of the permutation.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, "shuffled package"))
        count, positives = len(self), int(self.labels.sum())
        sides = [torch.nonzero(self.labels == side)[:, 0] for side in (True, False)]
        dealt = [side[torch.randperm(len(side), generator=generator)] for side in sides]
        exact = positives * positives / count
        kept = int(exact + float(torch.rand((), generator=generator)))
        parts = (
            torch.cat([dealt[0][:kept], dealt[1][: positives - kept]]),
            torch.cat([dealt[0][kept:], dealt[1][positives - kept :]]),
        )
        order = torch.empty(count, dtype=torch.int64)
        for side, part in zip(sides, parts, strict=True):
            order[side] = part[torch.randperm(len(part), generator=generator)]
        return replace(
            self,
            soft_targets=self.soft_targets[order],
            traces={name: value[order] for name, value in self.traces.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what is told about the package, without its tensors."""
        told = self.direction.to_dict()
        told.pop("vector")
        return {
            "name": self.name,
            "found": self.found,
            "exemplars": len(self),
            "content": self.content.said,
            "anchors": len(self.anchors),
            "traces": list(self.traces),
            "calibration": list(self.calibration),
            "direction": told,
            "provenance": asdict(self.provenance),
        }

    def _repr_html_(self) -> str:
        """Show what it holds and where it is from, and how the direction was judged."""
        from utils.concepts.concept_view import told_html

        known = self.provenance
        told = {
            "concept": self.name, "teacher": known.model, "layer": f"{known.side} of {known.layer}",
            "positions": known.pool, "direction": f"{known.method}, {self.direction.verdict}",
            "held-out AUROC": f"{self.direction.auroc:.3f}", "exemplars with it": known.positive,
            "exemplars without": known.negative, "content": self.content.said, "anchors": len(self.anchors),
            "traced layers": ", ".join(self.traces), "licence": known.licence, "made": known.date or "not stated",
        }  # fmt: skip
        return told_html(f"Concept {self.name!r} of {known.model}", told, self.direction.reasons)

    def __str__(self) -> str:
        known = self.provenance
        return "\n".join([
            f"Concept {self.name!r} of {known.model}, read from the {known.side} of `{known.layer}`: "
            f"{known.positive} exemplars with it and {known.negative} without ({self.content.said}), "
            f"licence {known.licence}.",
            *self.direction.reasons,
        ])  # fmt: skip
