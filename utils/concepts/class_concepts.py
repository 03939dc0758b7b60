"""Concepts that are sets of classes, such as "even" among digits: samples with and without them, and readings.

Labelled data have far more concepts than classes. A reading is what a model's layer says of a sample that the reading
was not fitted to, so that it holds what the model knows, mistakes included, and not what the labels say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from html import escape
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from utils.adapters.activations import representations
from utils.concepts.checks import SIDES, check_choice, check_count, check_kind
from utils.concepts.examples import example_batches
from utils.concepts.ranking import auroc
from utils.concepts.readout import fit_readout
from utils.memory.key_reader import adapter_of
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.seeding import derive_seed
from utils.runtime.settings import shown
from utils.training.prepared_data import PreparedData

LABELS = "labels"
LEAST = 4
"""Samples with a concept, and without it, that a reading needs; half of them fit it."""


@dataclass(frozen=True, eq=False)
class ConceptSamples:
    """Samples, their classes, and concepts as sets of classes."""

    inputs: dict[str, Tensor]
    """By their names, samples first."""
    labels: Tensor
    """int64 ``(n,)``: the class of each sample."""
    concepts: Mapping[str, tuple[int, ...]]
    """The classes that have each concept."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def given(self) -> Any:
        """The inputs as functions of this package take them: a tensor where there is one input, else all by name."""
        return next(iter(self.inputs.values())) if len(self.inputs) == 1 else self.inputs

    def present(self, concept: str) -> Tensor:
        """Return which samples have a concept, bool ``(n,)``.

        Raises:
            ConfigError: It is unknown; the nearest names are given.
        """
        if not isinstance(concept, str) or concept not in self.concepts:
            near = get_close_matches(str(concept), self.concepts, n=3, cutoff=0.4) or list(self.concepts)[:3]
            raise ConfigError(
                f"There is no concept {concept!r} among {len(self.concepts)}.",
                f"Near to it are: {', '.join(map(repr, near))}.",
                "Choose one of them, or name its classes when the samples are made.",
            )
        return torch.isin(self.labels, torch.tensor(self.concepts[concept]))

    def sides(self, concept: str) -> tuple[Any, Any]:
        """Return the inputs of samples with a concept, and of those without it; see `present`."""
        here = self.present(concept)
        return self.chosen(here).given, self.chosen(~here).given

    def chosen(self, which: Tensor) -> "ConceptSamples":
        """Return some of the samples, by a mask or by their numbers."""
        inputs = {name: value[which] for name, value in self.inputs.items()}
        return ConceptSamples(inputs, self.labels[which], self.concepts)

    def items(self) -> list[dict[str, Any]]:
        """Return for each sample its number, class and concepts as plain values, for a memory to keep."""
        rows: list[list[str]] = [[] for _ in range(len(self))]
        for name in self.concepts:
            for number in self.present(name).nonzero().flatten().tolist():
                rows[number].append(name)
        return [
            {"sample": number, "class": int(label), "concepts": ", ".join(own)}
            for number, (label, own) in enumerate(zip(self.labels.tolist(), rows, strict=True))
        ]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {' x '.join(map(str, value.shape[1:]))}" for name, value in self.inputs.items())
        return f"{len(self)} samples ({shapes}) with {len(self.concepts)} concepts"


@dataclass(frozen=True, eq=False, repr=False)
class ConceptReadings:
    """What a model's layer says of samples about each concept, beside what the labels say."""

    names: tuple[str, ...]
    scores: Tensor
    """float32 ``(n, concepts)``: log odds, each read by a half of the samples that it is not in."""
    truth: Tensor
    """bool ``(n, concepts)``: by the labels."""
    layer: str

    @property
    def present(self) -> Tensor:
        """Bool ``(n, concepts)``: what the model takes for there."""
        return self.scores > 0

    def rows(self) -> list[dict[str, Any]]:
        """Return for each concept its share, how well it is read (AUROC) and how often wrongly."""
        wrong = (self.present != self.truth).double().mean(0).tolist()
        return [
            {
                "concept": name,
                "share": float(self.truth[:, number].double().mean()),
                "auroc": auroc(self.scores[self.truth[:, number], number], self.scores[~self.truth[:, number], number]),
                "wrong": wrong[number],
            }
            for number, name in enumerate(self.names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values without the scores."""
        return {"layer": self.layer, "samples": len(self.scores), "concepts": self.rows()}

    def __str__(self) -> str:
        lines = [f"{len(self.names)} concepts read from `{self.layer}` in {len(self.scores)} samples"]
        for row in self.rows():
            lines.append(f"{row['concept']:24} {row['share']:6.1%}  AUROC {row['auroc']:.3f}  wrong {row['wrong']:.1%}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show a table."""
        body = "".join(
            f"<tr><td>{escape(row['concept'])}</td><td>{row['share']:.1%}</td><td>{row['auroc']:.3f}</td>"
            f"<td>{row['wrong']:.1%}</td></tr>"
            for row in self.rows()
        )
        head = "<tr><th>concept</th><th>of the samples</th><th>AUROC</th><th>read wrongly</th></tr>"
        return f"<p>{escape(str(self).splitlines()[0])}</p><table>{head}{body}</table>"


def concept_samples(
    data: PreparedData, concepts: Mapping[str, Sequence[int]], parts: int = 1, seed: int = 0, trained: bool = False
) -> tuple[ConceptSamples, ...]:
    """Return samples of classified data in disjoint parts of about equal size.

    Args:
        data: What a model was trained on.
        concepts: The classes that have each concept, by name.
        parts: How many.
        seed: Of the division.
        trained: Those that were trained on; otherwise those held out, which are new to the model.

    Raises:
        DataError: The data have no classes, or too few samples.
        ConfigError: A concept has no class, all classes, or one that does not occur.
    """
    check_kind(data, PreparedData, "data", "Give what a run has: utils.train(...).data, or train_briefly(...).data.")
    check_count("parts", parts, 1)
    if not isinstance(concepts, Mapping) or not concepts:
        raise ConfigError(
            f"The concepts are {shown(concepts)}.",
            "Expected a mapping from names to the classes that have each, one concept at least.",
            "Write for example {'even': [0, 2, 4, 6, 8]}.",
        )
    held = data.train if trained else data.validation
    labels = held.get(LABELS)
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            f"The data {data.reference} were prepared for {data.task}.",
            "Expected one class per sample.",
            "Use data for classification, such as builtin:digits.",
        )
    if parts > len(labels):
        raise DataError(
            f"{len(labels)} samples are to be divided into {parts} parts.",
            "Expected one sample for each part at least.",
            "Choose fewer parts, or hold out more with TrainingConfig(validation_share=0.5).",
        )
    classes = set(labels.tolist())
    for name, own in concepts.items():
        whole = isinstance(own, (list, tuple, set, frozenset, range)) and all(
            isinstance(number, Integral) and not isinstance(number, bool) for number in own
        )
        if not whole:
            raise ConfigError(
                f"The concept {name!r} has the classes {shown(own)}.",
                f"Expected a list of whole numbers, some of {sorted(classes)[:20]}.",
                "Give the numbers of the classes that have it.",
            )
        strange = sorted(set(own) - classes)
        if not own or strange or set(own) == classes:
            what = f"the classes {strange}, which do not occur" if strange else "all classes" if own else "no class"
            raise ConfigError(
                f"The concept {name!r} has {what}.",
                f"Expected some, not all, of {sorted(classes)[:20]}.",
                "Correct its classes.",
            )
    fixed = {name: tuple(own) for name, own in concepts.items()}
    everything = ConceptSamples({name: value for name, value in held.items() if name != LABELS}, labels, fixed)
    generator = torch.Generator().manual_seed(derive_seed("concept samples", seed))
    order = torch.randperm(len(labels), generator=generator)
    return tuple(everything.chosen(part) for part in order.tensor_split(parts))


def concept_task(data: PreparedData, concept: str, classes: Sequence[int]) -> PreparedData:
    """Return the same samples with one question: is the concept there (1) or not (0)? To train a model for it.

    Args:
        data: For classification.
        concept: Its name.
        classes: Those that have it.

    Raises:
        DataError: The data have no classes.
        ConfigError: The concept has no class, all classes, or one that does not occur.
    """
    if not isinstance(concept, str) or not concept.strip():
        raise ConfigError(f"The concept is {shown(concept)}.", "Expected its name.", "Give a text, such as 'even'.")
    (all_held,) = concept_samples(data, {concept: classes})
    own = torch.tensor(all_held.concepts[concept])
    parts = [{**part, LABELS: torch.isin(part[LABELS], own).long()} for part in (data.train, data.validation)]
    held = parts[1][LABELS].double().mean().item()
    facts = {name: value for name, value in data.facts.items() if name != "report"}
    facts |= {"classes": 2, "class_names": [f"not {concept}", concept], "largest_class": max(held, 1 - held)}
    named = f"{data.reference}, {concept} or not"
    made = replace(data, reference=named, train=parts[0], validation=parts[1], facts=facts)
    return replace(made, facts={**facts, "sha256": made.fingerprint()})


def concept_readings(
    model: Any,
    samples: ConceptSamples,
    layer: str | None = None,
    pool: str = "auto",
    side: str = "output",
    seed: int = 0,
) -> ConceptReadings:
    """Read all concepts off a layer of a model, in each half of the samples by what the other half taught.

    Args:
        model: A run, a loaded model, an adapter or a module; it is left as it was.
        samples: With their concepts.
        layer: Qualified name; None takes what the layer that makes the logits reads.
        pool: What becomes of a sample's positions: ``"mean"`` (also ``"auto"``), ``"last"`` or ``"flat"``.
        side: The layer's ``"output"`` or ``"input"``; for its default the input.
        seed: Of the halves.

    Raises:
        DataError: A concept has too few samples on one side.
        ConfigError: No such layer, pool or side.
        AdapterError: The model cannot be called.
    """
    check_choice("pool", pool, ("auto", "mean", "last", "flat"))
    check_choice("side", side, SIDES)
    check_kind(samples, ConceptSamples, "samples argument", "Make them with concept_samples(data, concepts).")
    truth = torch.stack([samples.present(name) for name in samples.concepts], 1)
    fewest = torch.minimum(truth.sum(0), (~truth).sum(0))
    if int(fewest.min()) < LEAST:
        name = list(samples.concepts)[int(fewest.argmin())]
        raise DataError(
            f"The concept {name!r} has {int(fewest.min())} samples on one side.",
            f"Expected {LEAST} with it and without it at least.",
            "Give more samples, or leave the concept out.",
        )
    adapter, given = adapter_of(model), samples.given
    examples = example_batches(model, given)
    made = representations(adapter, examples.batches, layer, pool, side=side)
    values = examples.restored(made.values)
    generator = torch.Generator().manual_seed(derive_seed("concept readings", seed))
    scores = torch.zeros(truth.shape)
    for column, here in enumerate(truth.T):
        half = torch.zeros(len(here), dtype=torch.bool)
        for own in (here, ~here):
            # Half of each side, so that a rare concept is in both halves.
            numbers = own.nonzero().flatten()
            half[numbers[torch.randperm(len(numbers), generator=generator)[::2]]] = True
        for fitted in (half, ~half):
            vector, bias = fit_readout(values[fitted], here[fitted].double())
            scores[~fitted, column] = values[~fitted] @ vector + bias
    return ConceptReadings(tuple(samples.concepts), scores, truth, made.layer)
