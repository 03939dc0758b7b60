"""How alike two representations are, measured from what chance alone would give.

A score of similarity grows with the width of what is compared and shrinks with the number of samples, so that it means
nothing by itself. Here it comes with its distribution when the samples of one side change places (Groeger et al.,
arXiv:2602.14486): the zero of the calibrated score is the largest score that chance gives one time in twenty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from utils.adapters.activations import representations
from utils.concepts.checks import check_choice, checked_names, fitted_table
from utils.concepts.examples import BATCH_SIZE, example_batches
from utils.memory.key_reader import adapter_of
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.seeding import derive_seed

MEASURES = ("cka", "neighbours")
LEVEL = 0.05
"""Share of unrelated pairs whose calibrated score may be above 0."""
PERMUTATIONS = 199
LEAST = 10
"""Fewest samples."""
CHUNK = 1 << 22
"""Numbers of permuted matrices that are held at a time."""


@dataclass(frozen=True)
class Similarity:
    """How alike two representations of the same samples are."""

    measure: str
    """``"cka"``, debiased and linear, or ``"neighbours"``, the share of nearest neighbours in common."""
    score: float
    """The measure itself; 1 for representations that are alike."""
    calibrated: float
    """How far the score is on the way from `critical` to 1; 0 below."""
    p_value: float
    """How often permuted samples score as much: ``(1 + as many as that) / (1 + all)``; see `compared`."""
    critical: float
    """The score that one in twenty pairs of unrelated representations reaches, or one in twenty tables of pairs."""
    null: tuple[float, ...]
    """Scores of permuted samples."""
    uncorrected: float
    """Linear CKA as it is usually reported, whose value for unrelated representations is far from 0; NaN for others."""
    samples: int
    """Samples compared."""
    widths: tuple[int, int]
    """Numbers in a vector of either side."""
    layers: tuple[str, str] = ("", "")
    """The layers, where models were compared."""
    compared: int = 1
    """Pairs of layers compared together: `p_value`, `critical` and `calibrated` are corrected for the best of them."""

    @property
    def significant(self) -> bool:
        """Whether the two are more alike than chance makes them, at the level of 5%."""
        return self.p_value <= LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values; JSON wants `utils.runtime.files.null_nonfinite` where `uncorrected` is NaN."""
        made = {name: getattr(self, name) for name in self.__dataclass_fields__}
        made = {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}
        return made | {"significant": self.significant}

    def __str__(self) -> str:
        usual = "" if math.isnan(self.uncorrected) else f" (uncorrected {self.uncorrected:.3f})"
        pairs = f" for the best of {self.compared} pairs" if self.compared > 1 else ""
        return (
            f"{self.measure} {self.score:.3f}{usual}, calibrated {self.calibrated:.3f}, p = {self.p_value:.3g}{pairs}; "
            f"chance reaches {self.critical:.3f} with {self.samples} samples of widths {self.widths[0]} "
            f"and {self.widths[1]}."
        )

    def _repr_html_(self) -> str:
        """Show the picture and the same in words."""
        from utils.concepts.concept_view import shown_html, similarity_figure

        return shown_html(partial(similarity_figure, self), str(self))


class SimilarityTable(list[list[Similarity]]):
    """Similarities of layers of two models: a list of rows, which shows itself as a table."""

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values, see `Similarity.to_dict`."""
        return {"rows": [[found.to_dict() for found in row] for row in self]}

    def table(self) -> list[dict[str, str]]:
        """Return a row of text for each layer of the first model, whose name is under the empty one."""
        names = [found.layers[1] for found in self[0]] if self else []
        if len(set(names)) < len(names):
            names = [f"{number}: {name}" for number, name in enumerate(names, 1)]
        said = [[f"{found.calibrated:.3f}{'*' * found.significant}" for found in row] for row in self]
        return [
            {"": row[0].layers[0], **dict(zip(names, own, strict=True))} for row, own in zip(self, said, strict=True)
        ]

    def __repr__(self) -> str:
        lines = []
        for row in self.table():
            first = row.pop("")
            lines.append(f"{first}: " + ", ".join(f"{name} {said}" for name, said in row.items()))
        return "\n".join([self.headline, *lines])

    __str__ = __repr__

    @property
    def headline(self) -> str:
        """What the numbers are."""
        if not self:
            return "There are no similarities."
        found = self[0][0]
        return (
            f"{found.measure} of {found.samples} samples, calibrated: 0 is what chance reaches one time in twenty, "
            "1 is alike; * where p is at most 0.05"
        )

    def _repr_html_(self) -> str:
        """Show the table."""
        from utils.concepts.concept_view import similarity_html

        return similarity_html(self)


def similarity(
    first: Tensor, second: Tensor, measure: str = "cka", *, permutations: int = PERMUTATIONS, neighbours: int = 10,
    seed: int = 0,
) -> Similarity:  # fmt: skip
    """Compare two representations of the same samples.

    ``"cka"`` is linear centred kernel alignment with unbiased terms (Song et al. 2012, equation 5; Nguyen et al.,
    arXiv:2010.15327), ``"neighbours"`` the mean share of nearest neighbours, by cosine, that a sample has on both sides
    (Huh et al., arXiv:2405.07987). Neither changes when a side is turned, mirrored or scaled; CKA does not when it is
    moved either. Samples must be independent: those of one text or film are more alike than chance expects.

    Args:
        first: ``(n, width)``.
        second: ``(n, other width)``, the same samples in the same order.
        measure: ``"cka"`` or ``"neighbours"``.
        permutations: Of the samples of one side; each costs ``n * n`` operations.
        neighbours: How many nearest neighbours are compared.
        seed: Of the permutations.

    Raises:
        DataError: The samples do not match, are too few, not finite, or all equal.
        ConfigError: No such measure, fewer than 19 permutations, or neighbours beyond half of the samples.
    """
    check_choice("measure", measure, MEASURES)
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 19:
        raise ConfigError(
            f"There are {permutations!r} permutations.", "Expected 19 at least, for a p value of 0.05.", "Take more."
        )
    sides = _checked(first, second)
    count = len(sides[0])
    if measure == "cka":
        compared, uncorrected = [_alignment(rows) for rows in sides], _uncorrected(*sides)
    else:
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or not 1 <= neighbours <= count // 2:
            raise ConfigError(
                f"There are {neighbours!r} neighbours to compare among {count} samples.",
                f"Expected from 1 to {count // 2}.",
                "Take fewer, or more samples.",
            )
        compared, uncorrected = [_neighbourhood(rows, neighbours) for rows in sides], math.nan
    score = float((compared[0] * compared[1]).sum())
    null = _permuted_scores(compared[0], compared[1], permutations, seed)
    p_value, critical = _against(null, score)
    return Similarity(
        measure, score, _calibrated(score, critical), p_value, critical, tuple(null.tolist()), uncorrected,
        count, (sides[0].shape[1], sides[1].shape[1]),
    )  # fmt: skip


def model_similarity(
    first: Any, second: Any, examples: Any, second_examples: Any = None, *, layers: Sequence[str | None] = (None,),
    second_layers: Sequence[str | None] = (None,), measure: str = "cka", pool: str = "auto", tokenizer: Any = None,
    second_tokenizer: Any = None, permutations: int = PERMUTATIONS, neighbours: int = 10, seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> SimilarityTable:  # fmt: skip
    """Compare layers of two models on the same samples, every layer of the one with every layer of the other.

    The p values and calibrated scores of several pairs are corrected for their number: unrelated models have one
    calibrated score or more above 0 in one table of twenty.

    Args:
        first: A run, a loaded model, an adapter or a module.
        second: Another one, of any architecture.
        examples: Texts or model inputs; see `utils.concepts.examples.example_batches`.
        second_examples: The same samples as the second model takes them; None gives it `examples`.
        layers: Qualified names of the first model's layers; None takes what the layer that makes the logits reads.
        second_layers: Those of the second model.
        measure: ``"cka"`` or ``"neighbours"``.
        pool: What becomes of the positions of a sample: ``"mean"``, ``"last"`` or ``"flat"``.
        tokenizer: For texts; None takes the run's.
        second_tokenizer: The same for the second model.
        permutations: See `similarity`, and so the next two.
        neighbours: See there.
        seed: See there.
        batch_size: Samples that go through a model at a time.

    Returns:
        A list with a row for each of `layers`, each with an entry for each of `second_layers`.

    Raises:
        ConfigError: No such layer, pool or measure, or examples of no known kind.
        DataError: The samples do not match, are too few, not finite, or all equal.
        AdapterError: A model cannot be called, or a layer makes nothing of each sample.
    """
    check_choice("measure", measure, MEASURES)
    if isinstance(pool, str) and pool == "positions":
        raise ConfigError(
            "The pool is 'positions'.",
            "Expected one row for each sample: several rows of one are no independent samples.",
            'Choose pool="mean", pool="last" or pool="flat".',
        )
    check_choice("pool", pool, ("auto", "mean", "last", "flat"))
    layers, second_layers = checked_names(layers, "layers"), checked_names(second_layers, "second_layers")
    tables = []
    for model, given, names, own in (
        (first, examples, layers, tokenizer),
        (second, examples if second_examples is None else second_examples, second_layers, second_tokenizer),
    ):
        adapter = adapter_of(model)
        made = example_batches(model, given, own, batch_size)
        read = [representations(adapter, made.batches, name, pool) for name in names]
        tables.append([(found.layer, made.restored(found.values)) for found in read])
    rows = []
    for name, values in tables[0]:
        row = []
        for other_name, other in tables[1]:
            found = similarity(values, other, measure, permutations=permutations, neighbours=neighbours, seed=seed)
            row.append(replace(found, layers=(name, other_name)))
        rows.append(row)
    return SimilarityTable(together(rows))


def together(rows: Sequence[Sequence[Similarity]]) -> list[list[Similarity]]:
    """Correct similarities of the same samples for how many there are.

    Every score is compared with the largest over all pairs of the same permutation (Westfall and Young 1993), each in
    standard deviations of its own pair's, because chance gives more to wide representations.

    Args:
        rows: Of `similarity` with the same samples, number of permutations and seed.

    Raises:
        ConfigError: The numbers of samples or permutations differ.
    """
    pairs = [found for row in rows for found in row]
    if len({(found.samples, len(found.null)) for found in pairs}) > 1:
        raise ConfigError(
            "The similarities are of different numbers of samples or permutations.",
            "Expected the same, because the permutations are compared one by one.",
            "Compare all pairs on the same samples, with the same permutations and seed.",
        )
    if len(pairs) < 2:
        return [list(row) for row in rows]
    scores = torch.tensor([[found.score, *found.null] for found in pairs], dtype=torch.float64)
    # The score itself is among what it is measured by, so that it is one of the permutations where nothing is related.
    middle, scale = scores.mean(1), scores.std(1, correction=0).clamp_min(1e-12)
    standard = (scores - middle[:, None]) / scale[:, None]
    most = standard[:, 1:].amax(0)
    corrected = []
    for found, own, mean, deviation in zip(
        pairs, standard[:, 0].tolist(), middle.tolist(), scale.tolist(), strict=True
    ):
        p_value, limit = _against(most, own)
        critical = mean + deviation * limit
        corrected.append(
            replace(
                found, p_value=p_value, critical=critical, calibrated=_calibrated(found.score, critical),
                compared=len(pairs),
            )
        )  # fmt: skip
    made = iter(corrected)
    return [[next(made) for _ in row] for row in rows]


def _against(null: Tensor, score: float) -> tuple[float, float]:
    """Return the p value of a score under chance, and the score that chance reaches one time in twenty."""
    # Rounding must not make a score differ from that of a permutation which changes nothing.
    as_much = int((null >= score - 1e-12).sum())
    place = math.floor(LEVEL * (1 + len(null)) + 1e-9) - 1
    return (1 + as_much) / (1 + len(null)), float(null.sort(descending=True).values[place])


def _calibrated(score: float, critical: float) -> float:
    return max(0.0, (score - critical) / (1 - critical)) if critical < 1 else 0.0


def _checked(first: Tensor, second: Tensor) -> list[Tensor]:
    """Return both sides in float64 on the CPU, centred and of unit size."""
    sides = []
    for name, values in (("first", first), ("second", second)):
        rows = fitted_table(values, f"vectors of the {name} representation").double()
        if bool((rows == rows[:1]).all()) and len(rows) > 1:
            raise DataError(
                f"All samples are equal in the {name} representation.",
                "Expected samples that differ.",
                "Choose a layer that reads its input, and different samples.",
            )
        sides.append(rows)
    if len(sides[0]) != len(sides[1]):
        raise DataError(
            f"The first representation is of {len(sides[0])} samples and the second of {len(sides[1])}.",
            "Expected the same samples in the same order.",
            "Give both models the same samples.",
        )
    if len(sides[0]) < LEAST:
        raise DataError(
            f"There {'is 1 sample' if len(sides[0]) == 1 else f'are {len(sides[0])} samples'} to compare by.",
            f"Expected {LEAST} at least.",
            "Give more samples.",
        )
    return [rows / rows.abs().max() for rows in sides]


def _alignment(rows: Tensor) -> Tensor:
    """Return the U-centred Gram matrix ``(n, n)`` of length 1: the product of two sums to their debiased CKA."""
    count = len(rows)
    centred = rows - rows.mean(0)
    gram = (centred @ centred.T).fill_diagonal_(0)
    sums = gram.sum(1) / (count - 2)
    made = (gram - sums[:, None] - sums + gram.sum() / ((count - 1) * (count - 2))).fill_diagonal_(0)
    return made / made.norm().clamp_min(1e-300)


def _uncorrected(first: Tensor, second: Tensor) -> float:
    """Return linear CKA (Kornblith et al., arXiv:1905.00414)."""
    grams = [(rows - rows.mean(0)) @ (rows - rows.mean(0)).T for rows in (first, second)]
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()).clamp_min(1e-300))


def _neighbourhood(rows: Tensor, neighbours: int) -> Tensor:
    """Return which samples are nearest to which, ``(n, n)``; the product of two sums to the share in common."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    near = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(neighbours).indices
    made = torch.zeros(len(rows), len(rows), dtype=rows.dtype)
    return made.scatter_(1, near, (len(rows) * neighbours) ** -0.5)


def _permuted_scores(first: Tensor, second: Tensor, permutations: int, seed: int) -> Tensor:
    """Return the sum of products with the second side's samples in other orders: ``(permutations,)``."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "similarity"))
    count = len(first)
    scores = []
    size = max(1, CHUNK // count**2)
    for start in range(0, permutations, size):
        number = min(size, permutations - start)
        orders = torch.rand(number, count, generator=generator).argsort(1)
        moved = second[orders[:, :, None], orders[:, None, :]]
        scores.append(torch.einsum("ij,pij->p", first, moved))
    return torch.cat(scores)
