"""From a model and examples to a concept package.

A soft target is what a direction says that was found without that example (cross-fitting), so that no target can
repeat the label of its own example, and differences to the labels are the teacher's.
"""

from collections.abc import Sequence
from datetime import date as calendar_date
from typing import Any

import torch
from torch import Tensor

from utils.adapters.activations import default_layer, layer_named, representations
from utils.concepts.checks import SIDES, check_choice, check_count
from utils.concepts.content import Content, paired_groups, read_content
from utils.concepts.direction import METHODS, concept_direction
from utils.concepts.examples import example_batches
from utils.concepts.layer_reading import spaced_layers
from utils.concepts.package import ConceptPackage, Provenance
from utils.concepts.readout import calibration
from utils.memory.key_reader import adapter_of, tokenizer_of
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.seeding import derive_seed
from utils.runtime.settings import shown
from utils.training.weights import weights_sha256

FOLDS = 5
"""Parts of the examples, each scored by a direction from the other four."""
LEAST_EXAMPLES = 16
"""Different examples on each side: four fifths of them must still make a direction."""
POOLS = ("auto", "mean", "last", "flat")
LONGEST_NAME, LONGEST_LICENCE = 200, 2000
"""Characters."""


def extract_concept(
    teacher: Any, name: str, examples: Any, counter_examples: Any, *, layer: str | None = None, side: str = "output",
    pool: str = "auto", channels: int | None = None, method: str = "logistic",
    groups: tuple[Sequence[Any], Sequence[Any]] | None = None, licence: str = "not stated", date: str | None = None,
    tokenizer: Any = None, anchors: int = 64, traces: int = 3, seed: int = 0,
) -> ConceptPackage:  # fmt: skip
    """Make a package of what a model knows of a concept; the model is left as it was.

    Args:
        teacher: A run, a loaded model, an adapter or a module.
        name: Of the concept.
        examples: Samples with it: texts, a tensor of main inputs, or a mapping of all inputs, samples first.
        counter_examples: Samples without it.
        layer: Where the concept is read; None takes what the layer that makes the logits reads.
        side: The layer's ``"output"`` or ``"input"``; for its default the input.
        pool: What becomes of a sample's positions: ``"mean"``, ``"last"`` or ``"flat"``; ``"auto"`` is the mean.
        channels: The axis of features, where the layer's shape leaves it open.
        method: How the direction is found, see `concept_direction`.
        groups: The source or template of each example and of each counter-example. Those of one group stay together
            when the direction is tested and when targets are made, and a test set may have none of them.
        licence: Of the data; it goes with the package, which carries the examples.
        date: Of today, as YYYY-MM-DD.
        tokenizer: For texts; None takes the run's.
        anchors: Exemplars that all are compared with, in every traced layer.
        traces: Layers in which they are, beside the concept's own.
        seed: Of folds, anchors and controls.

    Raises:
        DataError: Too few different examples, the same ones on both sides, or a layer that says nothing about them.
        PackageError: The package would be too large.
        ConfigError: A layer that does not exist (the nearest are named), or another setting out of range.
        AdapterError: The teacher cannot be called.
    """
    _check_settings(name, licence, pool, side, method, anchors, traces, date)
    positive = read_content(examples, "examples")
    negative = read_content(counter_examples, "counter-examples")
    content = positive.joined(negative)
    labels = torch.arange(len(content)) < len(positive)
    hashes = content.hashes()
    _check_sides(hashes, labels)
    parted = paired_groups(groups, (len(positive), len(negative)), ("examples", "counter-examples"))
    told = parted[0] + parted[1]
    adapter = adapter_of(teacher)
    if layer is None:
        layer, side, _ = default_layer(adapter)
    layer_named(adapter.module, layer)
    inputs = example_batches(adapter, content.given, tokenizer_of(teacher, tokenizer))

    def read(place: str, which: str, how: str) -> Tensor:
        axis = channels if place == layer else None
        made = representations(adapter, inputs.batches, place, how, side=which, channels=axis)
        return inputs.restored(made.values)

    values = read(layer, side, pool)
    direction = concept_direction(values[labels], values[~labels], method, seed, groups=parted if told else None)
    held_out = _cross_fitted(values, labels, told or hashes, method, seed)
    scale, offset = calibration(held_out, labels)
    numbers = _chosen_anchors(labels, anchors, seed)
    first = {name: value[:2] for name, value in inputs.batches[0].items()}
    places = [place for place in spaced_layers(adapter, first, traces) if place != layer]
    tables = {place: relations(read(place, "output", "mean"), numbers) for place in places}
    known = Provenance(
        type(adapter.module).__name__, weights_sha256(adapter.module), layer, side, "mean" if pool == "auto" else pool,
        channels, method, seed, len(positive), len(negative), licence, date,
    )  # fmt: skip
    return ConceptPackage(
        name, _owned(content), labels, (scale * held_out + offset).sigmoid().float(),
        torch.stack([values[labels].mean(0), values[~labels].mean(0)]), direction, (scale, offset), numbers,
        tables | {layer: relations(values, numbers)}, known, told,
    )  # fmt: skip


def relations(values: Tensor, anchors: Tensor) -> Tensor:
    """Return the cosine between each row and each anchor, both less the mean of all rows: ``(n, k)``.

    Args:
        values: ``(n, width)``.
        anchors: int64 ``(k,)``: numbers of rows.
    """
    centred = values - values.mean(0)
    directed = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return directed @ directed[anchors].T


def _cross_fitted(values: Tensor, labels: Tensor, keys: Sequence[str], method: str, seed: int) -> Tensor:
    """Return a score for each row by a direction from rows with other keys, ``(n,)``."""
    names = sorted(set(keys))
    generator = torch.Generator().manual_seed(derive_seed(seed, "folds"))
    dealt = torch.randperm(len(names), generator=generator) % min(FOLDS, len(names))
    fold_of = dict(zip(names, dealt.tolist(), strict=True))
    folds = torch.tensor([fold_of[key] for key in keys])
    scores = torch.empty(len(values))
    for fold in range(int(folds.max()) + 1):
        rest = folds != fold
        try:
            found = concept_direction(values[rest & labels], values[rest & ~labels], method, seed, controls=1)
        except DataError as error:
            raise DataError(
                f"Without one of {int(folds.max()) + 1} parts of the examples there is no direction. {error.found}",
                "Expected examples that can be parted, those of one group together.",
                "Give more examples, or more groups with both sides in each.",
            ) from error
        scores[~rest] = found.score(values[~rest])
    return scores


def _chosen_anchors(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return numbers of exemplars, half of them from either side where there are as many."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "anchors"))
    sides = [torch.nonzero(labels == side)[:, 0] for side in (True, False)]
    picked = [side[torch.randperm(len(side), generator=generator)][: count // 2] for side in sides]
    return torch.cat(picked).sort().values


def _owned(content: Content) -> Content:
    """Return content that later changes of the given tensors do not reach."""
    return Content({name: value.clone() for name, value in content.tensors.items()}, content.texts)


def _check_sides(hashes: tuple[str, ...], labels: Tensor) -> None:
    sides = [{key for key, own in zip(hashes, labels.tolist(), strict=True) if own == side} for side in (True, False)]
    if shared := len(sides[0] & sides[1]):
        raise DataError(
            f"{shared} of {len(sides[0])} examples {'is' if shared == 1 else 'are'} among the counter-examples too.",
            "Expected each sample on one side.",
            "Take them off one of the sides.",
        )
    for what, side in zip(("example", "counter-example"), sides, strict=True):
        if len(side) < LEAST_EXAMPLES:
            raise DataError(
                f"There {'is' if len(side) == 1 else 'are'} {len(side)} different {what}{'s' * (len(side) != 1)}.",
                f"Expected {LEAST_EXAMPLES} on each side at least: targets are made by parts left out in turn.",
                "Give more; some hundreds make a package that can be verified.",
            )


def _check_settings(
    concept: Any, licence: Any, pool: str, side: str, method: str, anchors: int, traces: int, date: Any
) -> None:
    for name, value, allowed in (("pool", pool, POOLS), ("side", side, SIDES), ("method", method, METHODS)):
        check_choice(name, value, allowed)
    check_count("anchors", anchors, 2)
    check_count("traces", traces, 0)
    for name, text, longest in (("name", concept, LONGEST_NAME), ("licence", licence, LONGEST_LICENCE)):
        if not isinstance(text, str) or not text.strip() or len(text) > longest:
            raise ConfigError(
                f"The {name} is {shown(text)}.",
                f"Expected a text of 1 to {longest} characters.",
                f"Write one, such as {name}={'round shapes' if name == 'name' else 'CC0'!r}.",
            )
    if date is not None:
        try:
            calendar_date.fromisoformat(date)
        except (TypeError, ValueError):
            raise ConfigError(
                f"The date is {date!r}.", "Expected YYYY-MM-DD.", "Correct it, or leave it out."
            ) from None
