"""A student of any architecture learns a concept from a package, and keeps what it knew.

It begins where reading the concept off the student as it is ends (linear probing before fine-tuning distorts features
least: Kumar et al., ICLR 2022). Then it learns three things at once: how sure the teacher is of each exemplar
(distillation), how near the teacher puts exemplars to each other (relational distillation, Park et al., CVPR 2019, on
relative representations, Moschella et al., ICLR 2023), and its own outputs on its own data as they were. If more of its
answers change than the budget allows, its weights go back on the straight line to the old ones until they do not
(Wortsman et al., CVPR 2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.activations import Place, default_layer, layer_named
from utils.concepts.content import Content, paired_content
from utils.concepts.examples import Examples
from utils.concepts.layer_reading import Read, reading, spaced_layers
from utils.concepts.package import ConceptPackage
from utils.concepts.readout import ConceptReadout, fit_readout
from utils.concepts.retention import MIXTURES, Retention, fitted_batches, twin
from utils.concepts.transfer_config import TransferConfig
from utils.memory.key_reader import adapter_of, tokenizer_of
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.seeding import derive_seed, isolated_streams
from utils.runtime.settings import settings_of

LOGGED = 20
"""Rows of a history, about."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """A student that learned a concept."""

    student: nn.Module = field(repr=False)
    """The student: a copy, unless it was asked to change the one given. Its outputs have the shape they had."""
    readout: ConceptReadout = field(repr=False)
    """Reads the concept off it."""
    before: ConceptReadout = field(repr=False)
    """Reads the concept off the student as it was, as well as its representation allowed."""
    history: tuple[dict[str, float], ...] = field(repr=False)
    """Losses by step: ``concept`` in nats, ``alignment`` from 0 to 2, ``retention`` in nats."""
    changed: float
    """Share of the student's answers on held-out samples of its own data that are others now."""
    changed_unbounded: float
    """The same before its weights went back to keep the budget."""
    measured_on: int
    """Samples of its own that this was measured on."""
    mixture: float
    """Share of the way from the old weights to the trained ones that was kept."""
    trained: int
    """Parameters that were free to move."""
    config: TransferConfig
    """The settings."""
    seed: int
    """Of the order of exemplars and of the samples set aside."""

    def to_dict(self) -> dict[str, Any]:
        """Return all but the models as plain values that JSON can hold."""
        named = ("changed", "changed_unbounded", "measured_on", "mixture", "trained", "seed")
        return {name: getattr(self, name) for name in named} | {
            "config": self.config.to_dict(), "readout": self.readout.to_dict(), "history": list(self.history),
        }  # fmt: skip

    def __str__(self) -> str:
        kept = "" if self.mixture == 1 else (
            f" Unbounded it would have been {self.changed_unbounded:.2%}. Nothing of the training was kept: raise "
            "TransferConfig.budget, or retention, or give the student's own data."
        ) if self.mixture == 0 else (
            f" Unbounded it would have been {self.changed_unbounded:.2%}; {self.mixture:.0%} of the change was kept."
        )  # fmt: skip
        return (
            f"The concept is read from the {self.readout.side} of `{self.readout.layer}`; {self.trained:,} parameters "
            f"took part. {self.changed:.2%} of the answers on {self.measured_on} samples of its own changed.{kept}"
        )

    def _repr_html_(self) -> str:
        """Show what was learned and kept."""
        from utils.concepts.concept_view import transfer_html

        return transfer_html(self)


def transfer_concept(
    package: ConceptPackage, student: Any, config: TransferConfig | None = None, *, retention: Any = None,
    student_examples: tuple[Any, Any] | None = None, tokenizer: Any = None, labels_only: bool = False,
    in_place: bool = False, seed: int = 0,
) -> Transfer:  # fmt: skip
    """Teach a student a concept.

    Args:
        package: What the teacher knows.
        student: A run, a loaded model, an adapter or a module, of any architecture.
        config: Settings.
        retention: Samples of what the student is for, without labels, disjoint from any test: texts, a tensor or a
            mapping. None keeps its outputs on the exemplars.
        student_examples: The package's examples and counter-examples in the form that the student takes, in the same
            order; None gives it those of the package.
        tokenizer: For texts; None takes the run's.
        labels_only: Learn the labels alone, without anything the teacher makes of the exemplars: the baseline.
        in_place: Change the student that was given.
        seed: Of the order of exemplars and of the samples set aside.

    Raises:
        ConfigError: The package does not fit what the student takes, there is no such layer, it cannot be copied, or
            its weights are float16.
        DataError: Texts without a tokenizer, or other examples than the package has.
        AdapterError: The student cannot be called.
    """
    check_package(package)
    config = settings_of(TransferConfig, config)
    given = adapter_of(student)
    layer, side = config.layer, config.side
    if layer is None:
        layer, side, _ = default_layer(given)
    layer_named(given.module, layer)
    tokenizer = tokenizer_of(student, tokenizer)
    inputs = fitted_batches(given, exemplars_for(package, student_examples), tokenizer, "exemplars of the package")
    own = inputs if retention is None else fitted_batches(given, retention, tokenizer, "samples to be retained")
    generator = torch.Generator().manual_seed(derive_seed(seed, "transfer"))
    kept = Retention(given, own, generator, config.temperature)
    learner = given if in_place else twin(given, "the student that was given stays as it is")
    targets = package.labels.float() if labels_only else package.soft_targets
    lesson = _Lesson(package, learner, inputs, kept, config, (layer, side), targets, labels_only)
    with isolated_streams(seed, "transfer"):
        return lesson.taught(generator, seed)


def check_package(package: Any) -> None:
    """Refuse what is no concept package.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(package, ConceptPackage):
        raise ConfigError(
            f"The package is a {type(package).__name__}.",
            "Expected a ConceptPackage.",
            "Make one with extract_concept, or read one with load_package.",
        )


def exemplars_for(package: ConceptPackage, student_examples: tuple[Any, Any] | None) -> Content:
    """Return the exemplars that a student is shown, as many as the package has on either side.

    Raises:
        ConfigError: They are no pair.
        DataError: They are not as many, or of different kinds.
    """
    if student_examples is None:
        return package.content
    return paired_content(
        student_examples, (package.provenance.positive, package.provenance.negative), "student_examples", "examples",
        "those of the package in its order", "Give the same samples that the package was made from.",
    )  # fmt: skip


class _Lesson:
    """One student, one package."""

    def __init__(
        self, package: ConceptPackage, learner: ModelAdapter, inputs: Examples, kept: Retention,
        config: TransferConfig, place: Place, targets: Tensor, labels_only: bool,
    ) -> None:  # fmt: skip
        """Choose the layers that are aligned."""
        self.package, self.learner, self.inputs, self.kept, self.config = package, learner, inputs, kept, config
        self.place, self.targets = place, targets
        self.pairs: list[tuple[Place, Tensor]] = []
        if config.alignment and config.steps and not labels_only:
            self.pairs = _aligned(package, learner, inputs, place)
        self.parameters = {name: p for name, p in learner.module.named_parameters() if p.requires_grad}
        if config.steps and any(parameter.dtype == torch.float16 for parameter in self.parameters.values()):
            raise ConfigError(
                f"The {learner.name} has weights of float16.",
                "Expected float32 or bfloat16: steps of training underflow and overflow in float16.",
                "Convert the student with model.float() or model.bfloat16(), or read it as it is with "
                "TransferConfig(steps=0).",
            )

    def taught(self, generator: torch.Generator, seed: int) -> Transfer:
        """Train, keep within the budget, and fit the readout; the learner has its modes and gradients back."""
        config, learner = self.config, self.learner
        modes = [(child, child.training) for child in learner.module.modules()]
        gradients = {name: parameter.grad for name, parameter in learner.module.named_parameters()}
        # In eval mode: what it learned about its own data's means stays, and nothing is dropped at random.
        learner.module.eval()
        try:
            start = self._fitted()
            history = self._trained(start, generator) if config.steps and self.parameters else []
            unbounded, changed, mixture = self._bounded()
            end = self._fitted()
        finally:
            for child, training in modes:
                child.training = training
            for name, parameter in learner.module.named_parameters():
                parameter.grad = gradients[name]
        return Transfer(
            learner.module, self._readout(learner, *end), self._readout(self.kept.old, *start), tuple(history), changed,
            unbounded, len(self.kept.held), mixture, sum(p.numel() for p in self.parameters.values()), config, seed,
        )  # fmt: skip

    def _readout(self, adapter: ModelAdapter, vector: Tensor, bias: float) -> ConceptReadout:
        pool = "mean" if self.config.pool == "auto" else self.config.pool
        return ConceptReadout(adapter, *self.place, pool, vector, bias, self.config.channels)

    def _fitted(self) -> tuple[Tensor, float]:
        """Return vector and bias that read the targets best off the learner as it is now."""
        with torch.no_grad(), reading(self.learner, [self.place], self.config.pool, self.config.channels) as read:
            rows = torch.cat([
                read({name: value[start : start + 256] for name, value in batch.items()})[0].cpu()
                for batch in self.inputs.batches
                for start in range(0, len(next(iter(batch.values()))), 256)
            ])  # fmt: skip
        return fit_readout(self.inputs.restored(rows), self.targets, self.config.ridge)

    def _trained(self, start: tuple[Tensor, float], generator: torch.Generator) -> list[dict[str, float]]:
        """Take all steps and return the history of losses."""
        config, device = self.config, self.learner.device
        vector = start[0].to(device).requires_grad_()
        bias = torch.tensor(start[1], device=device, requires_grad=True)
        optimizer = torch.optim.AdamW(
            [*self.parameters.values(), vector, bias], lr=config.learning_rate, weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / config.steps, max(1, config.steps - 1))
        targets = self.targets.to(device)
        anchors = self.package.anchors
        exemplars = _Turns(torch.arange(len(self.targets)), config.batch_size, generator)
        own = _Turns(self.kept.trained, config.batch_size, generator)
        history = []
        places = [self.place, *(place for place, _ in self.pairs if place != self.place)]
        with torch.enable_grad(), reading(self.learner, places, config.pool, config.channels) as read:
            for step in range(1, config.steps + 1):
                numbers = exemplars.next()
                # Relations are to the anchors as the student sees them now, so they come along.
                shown = torch.cat([numbers, anchors]).unique() if self.pairs else numbers
                tables = dict(zip(places, _read(read, self.inputs, shown), strict=True))
                rows = torch.searchsorted(shown, numbers).to(device)
                logits = tables[self.place][rows] @ vector + bias
                losses = {"concept": functional.binary_cross_entropy_with_logits(logits, targets[numbers.to(device)])}
                if self.pairs:
                    pillars = torch.searchsorted(shown, anchors).to(device)
                    parts = [_unlike(tables[p], rows, pillars, wanted[numbers].to(device)) for p, wanted in self.pairs]
                    losses["alignment"] = torch.stack(parts).mean()
                if config.retention:
                    losses["retention"] = self.kept.loss(self.learner, own.next())
                weights = {"concept": 1.0, "alignment": config.alignment, "retention": config.retention}
                total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
                if not bool(torch.isfinite(total)):
                    raise DataError(
                        f"The loss of step {step} is not finite.",
                        "Expected training to converge.",
                        "Lower TransferConfig.learning_rate, and run utils.validate on the student.",
                    )
                optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
                optimizer.step()
                schedule.step()
                if step % max(1, config.steps // LOGGED) == 0 or step in (1, config.steps):
                    history.append({"step": step, **{name: float(value.detach()) for name, value in losses.items()}})
        return history

    def _bounded(self) -> tuple[float, float, float]:
        """Go back towards the old weights until few enough answers change: that share before and after, and how far."""
        new = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        unbounded = changed = self.kept.changed(self.learner)
        budget = self.config.budget
        for share in MIXTURES:
            if share < 1:
                self.kept.mix(self.learner, new, share)
                changed = self.kept.changed(self.learner)
            if budget is None or changed <= budget:
                return unbounded, changed, share
        return unbounded, changed, 0.0


class _Turns:
    """Numbers in batches, each once a pass, in another order every pass."""

    def __init__(self, numbers: Tensor, size: int, generator: torch.Generator) -> None:
        self.numbers, self.size, self.generator = numbers, min(size, len(numbers)), generator
        self.left = numbers[:0]

    def next(self) -> Tensor:
        """Return the next batch, ascending."""
        if len(self.left) < self.size:
            self.left = self.numbers[torch.randperm(len(self.numbers), generator=self.generator)]
        taken, self.left = self.left[: self.size], self.left[self.size :]
        return taken.sort().values


def _read(read: Read, inputs: Examples, numbers: Tensor) -> list[Tensor]:
    """Return what each place makes of some samples, in ascending order of their numbers."""
    chosen = inputs.chosen(numbers)
    parts = [read(batch) for batch in chosen.batches]
    order = chosen.order.argsort()
    return [torch.cat(tables)[order.to(tables[0].device)] for tables in zip(*parts, strict=True)]


def _unlike(values: Tensor, rows: Tensor, anchors: Tensor, wanted: Tensor) -> Tensor:
    """Return one less the correlation between a student's relations to anchors and the teacher's: from 0 to 2.

    A correlation, because how far apart everything is differs between architectures and says nothing.

    Args:
        values: ``(m, width)``: the student's representations of exemplars and anchors.
        rows: Which of them the exemplars are.
        anchors: Which of them the anchors are.
        wanted: ``(rows, anchors)``: the teacher's relations.
    """
    directed = functional.normalize(values - values.mean(0), dim=1)
    made = directed[rows] @ directed[anchors].T
    made, wanted = made - made.mean(), wanted - wanted.mean()
    return 1 - (made * wanted).sum() / (made.norm() * wanted.norm()).clamp_min(1e-8)


def _aligned(
    package: ConceptPackage, learner: ModelAdapter, inputs: Examples, place: Place
) -> list[tuple[Place, Tensor]]:
    """Return which of the student's layers follows which of the teacher's relations, matched by depth.

    The student's readout layer follows the teacher's concept layer.
    """
    *before, last = package.traces.values()
    pairs = [(place, last)]
    batch: Mapping[str, Tensor] = {name: value[:2] for name, value in inputs.batches[0].items()}
    names = [name for name in spaced_layers(learner, batch, len(before)) if name != place[0]]
    for number, table in enumerate(before if names else []):
        depth = number / max(1, len(before) - 1)
        pairs.append(((names[round(depth * (len(names) - 1))], "output"), table))
    return pairs
