"""Columns of labels as class numbers, and columns of numbers as targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.runtime.errors import DataError
from utils.training.prepared_data import PreparedData
from utils.training.tables import to_number

MISSING = -1
SHOWN = 8


@dataclass(frozen=True)
class Classes:
    """Labels as numbers, and what they stand for."""

    numbers: np.ndarray
    """One class per sample, int64; `MISSING` where a row has none."""
    names: list[str]
    """What each class stands for."""
    reason: str
    """How labels became numbers."""


def read_targets(
    values: Sequence[Any], regression: bool, num_labels: int | None, origin: str, names: Sequence[str] = ()
) -> tuple[Classes, np.ndarray]:
    """Read a column of labels as what the task predicts, and mask the rows that have some.

    Args:
        values: The labels as they were read.
        regression: Numbers are predicted, and no classes; then there are no names and no reason.
        num_labels: As for `encode_labels`.
        origin: Column and file, for messages.
        names: As for `encode_labels`.

    Raises:
        DataError: As `read_numbers` and `encode_labels`.
    """
    if regression:
        numbers = read_numbers(values, origin)
        return Classes(numbers, [], ""), ~np.isnan(numbers)
    found = encode_labels(values, num_labels, origin, names)
    return found, found.numbers != MISSING


def encode_labels(values: Sequence[Any], num_labels: int | None, origin: str, names: Sequence[str] = ()) -> Classes:
    """Turn labels into class numbers.

    Whole numbers from 0 are class numbers already. Other labels (words, stars from 1 to 5, -1 and 1) are numbered in
    their order, and the reason says so.

    Args:
        values: The labels as they were read.
        num_labels: How many classes the model tells apart; a single score tells two apart.
        origin: Column and file, for messages.
        names: What class numbers stand for, where the data says so.

    Raises:
        DataError: There is no label, all are the same, or there are more classes than the model tells apart.
    """
    limit = None if num_labels is None else max(2, num_labels)
    cleaned = [None if value is None or (isinstance(value, str) and not value.strip()) else value for value in values]
    present = [value for value in cleaned if value is not None and value == value]
    if not present:
        raise DataError(
            f"{origin} holds no label.", "Expected a class for each row.", "Name another column: ?label=COLUMN"
        )
    numbers = [to_number(value) for value in present]
    if all(number is not None and number.is_integer() for number in numbers):
        whole = sorted({int(number) for number in numbers if number is not None})
        if names or whole[0] == 0:
            return _as_they_are(cleaned, whole, limit, origin, names)
        keys: dict[Any, int] = {value: index for index, value in enumerate(whole)}
        found = [MISSING if v is None or v != v else keys[int(to_number(v) or 0)] for v in cleaned]
        shown = [str(value) for value in whole]
    else:
        shown = sorted({str(value).strip() for value in present})
        keys = {value: index for index, value in enumerate(shown)}
        found = [MISSING if v is None or v != v else keys[str(v).strip()] for v in cleaned]
    if limit is not None and len(shown) > limit:
        listed = ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")
        raise DataError(
            f"{origin} holds {len(shown)} different labels ({listed}), and the model tells {limit} classes apart.",
            f"Expected at most {limit} classes.",
            f"Build the model with num_classes={len(shown)}"
            + (", or train a regression model on these numbers." if len(shown) > 50 else "."),
        )
    _check_several(shown, origin)
    listed = ", ".join(f"{name} is {index}" for index, name in enumerate(shown[:SHOWN]))
    return Classes(np.array(found, dtype=np.int64), shown, f"labels numbered in their order: {listed}")


def _as_they_are(
    values: Sequence[Any], whole: Sequence[int], limit: int | None, origin: str, names: Sequence[str]
) -> Classes:
    """Take whole numbers from 0 as class numbers."""
    top = whole[-1] + 1
    if names and whole[0] == MISSING:
        # Published test splits mark hidden labels this way.
        whole = whole[1:] or whole
    if limit is not None and top > limit:
        raise DataError(
            f"{origin} has labels {whole[0]} to {whole[-1]}, and the model tells {limit} classes apart.",
            f"Expected labels from 0 to {limit - 1}.",
            f"Build the model with num_classes={top}, or correct the labels.",
        )
    shown = [names[index] if index < len(names) else str(index) for index in range(max(top, len(names)))]
    _check_several([str(value) for value in whole], origin)
    found = [MISSING if value is None or value != value else int(to_number(value) or 0) for value in values]
    return Classes(np.array(found, dtype=np.int64), shown, "labels are class numbers already")


def _check_several(shown: Sequence[str], origin: str) -> None:
    if len(shown) < 2:
        raise DataError(
            f"{origin} holds the one label {shown[0]!r} for every row.", "Expected at least two classes to tell apart."
        )


@dataclass(frozen=True)
class Targets:
    """Numbers to predict, brought to mean 0 and deviation 1."""

    values: np.ndarray
    """float32, shape (samples, targets)."""
    mean: float
    """Mean of the training targets before."""
    deviation: float
    """Their deviation before."""


def read_numbers(values: Sequence[Any], origin: str) -> np.ndarray:
    """Return a column as float64; nan where a row has no value.

    Raises:
        DataError: A value is no number.
    """
    found = np.empty(len(values), dtype=np.float64)
    for index, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            found[index] = math.nan
            continue
        number = to_number(value)
        if number is None or math.isinf(number):
            raise DataError(
                f"{origin} holds {value!r} in row {index + 1}.", "Expected numbers.",
                "Name another column in the reference, for example ?target=COLUMN",
            )  # fmt: skip
        found[index] = number
    return found


def standardised(numbers: np.ndarray, training: np.ndarray, origin: str, like: PreparedData | None = None) -> Targets:
    """Bring targets to mean 0 and deviation 1 over the training samples, or to the scale of a first part.

    Raises:
        DataError: They are all the same.
    """
    mean, deviation = float(numbers[training].mean()), float(numbers[training].std())
    if like is not None:
        mean, deviation = like.facts["target_mean"], like.facts["target_deviation"]
    if deviation == 0:
        raise DataError(f"{origin} holds the number {mean:g} in every row.", "Expected numbers that differ.")
    return Targets(((numbers - mean) / deviation).astype(np.float32)[:, None], mean, deviation)
