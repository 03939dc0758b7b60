"""Whole numbers and priorities that come with samples, checked."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runtime.arguments import described
from utils.runtime.errors import DataError


def whole_numbers(values: Tensor | None, rows: int, name: str, action: str) -> np.ndarray:
    """Return a copy of a tensor of whole numbers.

    Args:
        values: What was given, [rows].
        rows: How many there must be.
        name: What they are, for the message.
        action: What to do about others, for the message.

    Returns:
        int64 [rows].

    Raises:
        DataError: Missing, of another shape, or no whole numbers.
    """
    if (
        not isinstance(values, Tensor)
        or values.is_floating_point()
        or values.is_complex()
        or values.dtype == torch.bool
        or values.shape != (rows,)
    ):
        raise DataError(
            f"The {name} are {_told(values)}.", f"Expected a tensor of whole numbers of the shape [{rows}].", action
        )
    numbers: np.ndarray = values.detach().to("cpu", torch.int64).numpy().copy()
    return numbers


def listed_groups(groups: Any, name: str) -> np.ndarray:
    """Return groups that a user chose, int64 ``[n]``.

    Args:
        groups: Whole numbers.
        name: Of the argument, for the message.

    Raises:
        DataError: They are none.
    """
    try:
        if isinstance(groups, (str, bytes)):
            raise TypeError
        return np.array([operator.index(group) for group in groups], dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{name} is {described(groups)}.",
            "Expected several whole numbers, the groups of samples.",
            "Give, for example, [0, 3]; `EpisodicBuffer.counts` names the groups that there are.",
        ) from None


def checked_priorities(values: Tensor | None, rows: int, needed: bool) -> np.ndarray:
    """Return priorities.

    Args:
        values: What was given, [rows].
        rows: How many there must be.
        needed: Without any, all are 1 unless they are needed.

    Returns:
        float64 [rows].

    Raises:
        DataError: Missing, of another shape, negative or not finite.
    """
    if values is None and not needed:
        return np.ones(rows)
    bad = ""
    if isinstance(values, Tensor) and values.shape == (rows,) and not values.is_complex():
        priorities: np.ndarray = values.detach().to("cpu", torch.float64).numpy().copy()
        if np.isfinite(priorities).all() and (priorities >= 0).all():
            return priorities
        bad = ", with entries that are negative or not finite"
    raise DataError(
        f"The priorities of {rows} samples are {_told(values)}{bad}.",
        "Expected a tensor with one finite number, at least 0, for each sample.",
        "Give, for example, the loss of each sample.",
    )


def _told(values: object) -> str:
    return "missing" if values is None else described(values)
