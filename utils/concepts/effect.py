"""What a model loses when a concept is taken out of one of its layers, beside what it loses with random directions."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.concepts.checks import check_choice
from utils.concepts.direction import (
    CONTROLS,
    LEVEL,
    METHODS,
    ConceptDirection,
    checked_sides,
    find_direction,
    group_halves,
    group_numbers,
)
from utils.concepts.erasure import Eraser, fit_eraser, random_erasers
from utils.concepts.examples import BATCH_SIZE, Sides, read_sides
from utils.concepts.patching import answers
from utils.concepts.ranking import auroc
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.runtime.settings import shown

Behaviour = Callable[[Tensor, Tensor], float]
"""From the logits of samples ``(n, outputs)`` and their numbers ``(n,)`` to how much of a behaviour they show."""
DRAWS = 100
"""Random directions; with fewer than 100 no p value is below 0.01."""
TOLD = "how well the answers tell the examples apart (AUROC)"


@dataclass(frozen=True)
class ErasureEffect:
    """A behaviour on held-out examples, with the layer as it is, without the concept, and without something random."""

    behaviour: str
    """What was measured; more is more of it."""
    before: float
    """With the layer as it is."""
    after: float
    """Without the concept."""
    random: tuple[float, ...]
    """After changes as large in directions drawn at random."""
    size: float
    """How far vectors move when the concept is erased, as a share of their distance to the mean."""
    examples: int
    """Held-out examples."""
    layer: str
    """The layer."""

    @property
    def drop(self) -> float:
        """How much of the behaviour is lost with the concept."""
        return self.before - self.after

    @property
    def p_value(self) -> float:
        """How often a random direction costs as much: ``(1 + as many as that) / (1 + all)``, a permutation test."""
        return (1 + sum(self.before - value >= self.drop for value in self.random)) / (1 + len(self.random))

    @property
    def found(self) -> bool:
        """Whether losing the concept costs more than losing random directions does, at p < 0.01."""
        return self.p_value < LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values that JSON can hold."""
        made = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return made | {"random": list(self.random), "drop": self.drop, "p_value": self.p_value, "found": self.found}

    def __str__(self) -> str:
        worst = self.before - min(self.random)
        return (
            f"Without the concept in `{self.layer}`, {self.behaviour} goes from {self.before:.3f} to {self.after:.3f} "
            f"on {self.examples} held-out examples; the worst of {len(self.random)} random directions costs "
            f"{worst:.3f} (p = {self.p_value:.3g})."
        )

    def _repr_html_(self) -> str:
        """Show the picture and the same in words."""
        from utils.concepts.concept_view import effect_figure, shown_html

        return shown_html(partial(effect_figure, self), str(self))


def erasure_effect(
    model: Any, positive: Any, negative: Any, layer: str | None = None, behaviour: Behaviour | None = None, *,
    described: str = "the behaviour", pool: str = "auto", side: str = "output", channels: int | None = None,
    tokenizer: Any = None, draws: int = DRAWS, seed: int = 0, batch_size: int = BATCH_SIZE,
    groups: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> ErasureEffect:  # fmt: skip
    """Erase a concept from a layer while the model runs, and see what that does to its answers.

    The eraser is fitted on one half of the examples and the behaviour measured on the other; repeated ones count once.
    The metric in which the change is least is shrunk by ``width / (rows + width)``: with few rows for the width, plain
    LEACE takes out what happens to be in these rows. LEACE keeps the mean of all examples, so that a behaviour of one
    side alone may stay as it is: measure one that tells the sides apart.

    Args:
        model: A run, a loaded model, an adapter or a module.
        positive: Examples with the concept; see `utils.concepts.examples.example_batches`.
        negative: Examples without it.
        layer: Qualified name; None takes what the layer that makes the logits reads.
        behaviour: Is given logits of held-out samples ``(n, outputs)``, and the numbers of these samples, positive ones
            first, and returns how much they show of what the concept is claimed to drive. The logits of a causal
            language model are the mean of its positions, or with ``pool="last"`` those of the next token. None takes
            how well the logits tell both sides apart: the AUROC of a direction in them, found on the other half with
            the layer as it is.
        described: The behaviour in words.
        pool: What becomes of the positions of a sample when the eraser is fitted; it is applied to each of them.
        side: The layer's ``"output"`` or ``"input"``; for its default the input.
        channels: The axis of features, where the shape leaves it open.
        tokenizer: For texts; None takes the run's.
        draws: Random directions.
        seed: Of the split and the random directions.
        batch_size: Samples that go through the model at a time.
        groups: The source or template of each example, on either side: those of one group are in the same half.

    Raises:
        ConfigError: No such layer, pool or side, fewer than 20 draws, or a behaviour that is no function of two.
        DataError: Too few examples, some on both sides, values that are not finite, or a behaviour that is no number.
        AdapterError: The model cannot be called, or the layer makes nothing of each sample.
    """
    _check_settings(behaviour, draws)
    read = read_sides(
        model, positive, negative, layer, pool,
        side=side, channels=channels, tokenizer=tokenizer, batch_size=batch_size,
    )  # fmt: skip
    distinct = [own.distinct(read.adapter.main_input) for _, own in read.paired]
    checked_sides(read.first.values[distinct[0]], read.second.values[distinct[1]])
    generator = torch.Generator().manual_seed(derive_seed(seed, "erasure"))
    values = torch.cat([read.first.values, read.second.values])
    is_positive = torch.arange(len(values)) < len(read.positive)
    everyone = torch.arange(len(read.positive) + len(read.negative))
    numbered = everyone[: len(read.positive)], everyone[len(read.positive) :]
    if groups is not None:
        numbered = group_numbers(groups, (len(read.positive), len(read.negative)))
    parted = group_halves((numbered[0][distinct[0]], numbered[1][distinct[1]]), generator)
    fitted, held = (torch.cat([distinct[0][rows[0]], distinct[1][rows[1]] + len(read.positive)]) for rows in parted)
    shrinkage = values.shape[1] / (len(fitted) + values.shape[1])
    eraser = fit_eraser(values[fitted], is_positive[fitted], shrinkage)
    if not eraser.rank:
        raise DataError(
            f"In `{read.first.layer}` the examples of both sides have the same mean.",
            "Expected a difference that can be erased.",
            "Choose a layer that tells them apart.",
        )
    others = random_erasers(values[fitted], eraser, draws, generator, shrinkage)
    # Where a position's answer is read, the concept must be erased from the same positions' vectors.
    of_answers = "mean" if read.first.pool == "mean" else "last"
    where = {"pool": of_answers, "side": read.first.side, "flat": read.first.pool == "flat", "channels": channels}
    with preserved(read.adapter.module, seed, "erasure"), torch.no_grad():
        read.adapter.module.eval()

        if behaviour is None:
            logits = _held_out(read, fitted, None, where)
            own = is_positive[fitted]
            direction = logits[own].mean(0) - logits[~own].mean(0)

            def told(logits: Tensor, numbers: Tensor) -> float:
                scores, own = logits @ direction, is_positive[numbers]
                return auroc(scores[own], scores[~own])

            behaviour, described = told, TOLD
        measure: Behaviour = behaviour

        def measured(change: Eraser | None) -> float:
            return _number(measure(_held_out(read, held, change, where), held))

        before, after = measured(None), measured(eraser)
        random = tuple(measured(other) for other in others)
    rows = values[held].double()
    spread = float((rows - eraser.mean).square().sum(1).mean().sqrt())
    return ErasureEffect(
        described, before, after, random, eraser.change(rows) / max(spread, 1e-300), len(held), read.first.layer
    )


class Examination(NamedTuple):
    """A concept's direction, and what the model loses without it: a pair, which shows itself in a notebook."""

    direction: ConceptDirection
    """Its `accepted` and `reasons` include the effect."""
    effect: ErasureEffect
    """What erasing it does."""

    def to_dict(self) -> dict[str, Any]:
        """Return both as plain values that JSON can hold."""
        return {"direction": self.direction.to_dict(), "effect": self.effect.to_dict()}

    def __str__(self) -> str:
        return f"{self.direction}\n{self.effect}"

    def _repr_html_(self) -> str:
        """Show both pictures and the same in words."""
        return self.direction._repr_html_() + self.effect._repr_html_()


def examine_concept(
    model: Any, positive: Any, negative: Any, layer: str | None = None, behaviour: Behaviour | None = None, *,
    method: str = "mean_difference", described: str = "the behaviour", pool: str = "auto", side: str = "output",
    channels: int | None = None, tokenizer: Any = None, draws: int = DRAWS, seed: int = 0,
    batch_size: int = BATCH_SIZE, groups: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> Examination:  # fmt: skip
    """Find a concept's direction and what erasing it does, and judge it by all rules together.

    Args:
        model: See `erasure_effect`, and so all but the next.
        positive: See there.
        negative: See there.
        layer: See there.
        behaviour: See there.
        method: ``"mean_difference"`` or ``"logistic"``; see `utils.concepts.direction.concept_direction`.
        described: See there.
        pool: See there.
        side: See there.
        channels: See there.
        tokenizer: See there.
        draws: See there.
        seed: See there.
        batch_size: See there.
        groups: See there, and `utils.concepts.direction.concept_direction`.

    Returns:
        The pair of the direction, whose `accepted` and `reasons` include the effect, and the effect.

    Raises:
        ConfigError: As there, or no such method.
        DataError: As there.
        AdapterError: As there.
    """
    _check_settings(behaviour, draws)
    check_choice("method", method, METHODS)
    reading: dict[str, Any] = {
        "pool": pool, "side": side, "channels": channels, "tokenizer": tokenizer, "seed": seed,
        "batch_size": batch_size, "groups": groups,
    }  # fmt: skip
    found = find_direction(model, positive, negative, layer, method, **reading)
    effect = erasure_effect(
        model, positive, negative, layer, behaviour, described=described, draws=draws, **reading
    )  # fmt: skip
    return Examination(found.with_effect(effect.p_value), effect)


def _check_settings(behaviour: Any, draws: Any) -> None:
    """Check what can be checked before the model runs.

    Raises:
        ConfigError: Too few random directions, or a behaviour that is no function of logits and numbers.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < CONTROLS:
        raise ConfigError(
            f"There are {draws!r} random directions to compare with.",
            f"Expected {CONTROLS} at least, and {DRAWS} for a p value below {LEVEL}.",
            "Draw more.",
        )
    if behaviour is None:
        return
    taken = f"a {type(behaviour).__name__}"
    if callable(behaviour):
        try:
            inspect.signature(behaviour).bind(None, None)
            return
        except TypeError as error:
            taken = f"a function that does not take two arguments ({error})"
        except ValueError:  # a function in C, whose signature nobody knows
            return
    raise ConfigError(
        f"The behaviour is {taken}.",
        "Expected a function of logits (n, outputs) and of the numbers of these samples (n,) that returns a number.",
        "Write for example behaviour=lambda logits, numbers: float(logits[:, 0].mean()), or leave it out.",
    )


def _held_out(read: Sides, numbers: Tensor, change: Eraser | None, where: dict[str, Any]) -> Tensor:
    """Return the logits of examples by their ascending numbers, positive ones first."""
    made, count = [], len(read.positive)
    for examples, own in (
        (read.positive, numbers[numbers < count]),
        (read.negative, numbers[numbers >= count] - count),
    ):
        chosen = examples.chosen(own)
        rows = answers(read.adapter, chosen.batches, read.first.layer, change.apply if change else None, **where)
        made.append(chosen.restored(rows))
    return torch.cat(made)


def _number(value: Any) -> float:
    """Return a behaviour as a number.

    Raises:
        DataError: It is none, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise DataError(
            f"The behaviour was measured as {shown(value)}.",
            "Expected a finite number.",
            "Return one, the higher the more of the behaviour.",
        )
    return number
