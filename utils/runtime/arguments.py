"""What is asked of arguments: whole numbers in a range, names out of some, objects of a kind."""

import sys
from collections.abc import Collection
from typing import Any

import numpy as np
from torch import Tensor

from utils.runtime.errors import ConfigError, SeedbedError
from utils.runtime.settings import shown

LARGEST = 2**63 - 1
"""What an int64 holds."""


def is_finite(value: Any) -> bool:
    """Tell whether a value is a finite number; true and false are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # which NaN and infinity are not


def is_whole(value: object, least: int = -LARGEST, most: int = LARGEST) -> bool:
    """Tell whether a value is a whole number in a range; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole(
    value: Any, name: str, least: int, action: str, *, most: int = LARGEST, error: type[SeedbedError] = ConfigError
) -> int:
    """Return a whole number that a user gave, a NumPy one as Python's.

    Args:
        value: What was given.
        name: What it is, as the beginning of a sentence.
        least: The smallest that is allowed.
        action: What to do about others, for the message.
        most: The largest that is allowed.
        error: Raised if it is none.

    Raises:
        SeedbedError: It is no whole number, or out of range.
    """
    number = int(value) if isinstance(value, np.integer) else value
    if not is_whole(number, least, most):
        bound = f"at least {least}" if most == LARGEST else f"from {least} to {most}"
        raise error(f"{name} is {described(value)}.", f"Expected a whole number, {bound}.", action)
    return int(number)


def one_of(value: Any, name: str, choices: Collection[str], action: str) -> None:
    """Check that a text is one of several.

    Args:
        value: What was given.
        name: What it is, as the beginning of a sentence.
        choices: Those that are allowed.
        action: What to do about others, for the message.

    Raises:
        ConfigError: It is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} is {described(value)}.", f"Expected one of {', '.join(choices)}.", action)


def instance_of(
    value: Any,
    kind: type | tuple[type, ...],
    name: str,
    expected: str,
    action: str,
    *,
    error: type[SeedbedError] = ConfigError,
) -> None:
    """Check that an object is of a kind.

    Args:
        value: What was given.
        kind: The kinds that are allowed.
        name: What it is, as the beginning of a sentence.
        expected: The second sentence of the message.
        action: The third.
        error: Raised if it is of another kind.

    Raises:
        SeedbedError: It is of another kind.
    """
    if not isinstance(value, kind):
        raise error(f"{name} is {described(value)}.", expected, action)


def flag(value: Any, name: str, action: str) -> None:
    """Check that a user gave True or False; what else counts as true in Python is likelier a slip.

    Args:
        value: What was given.
        name: Of the argument.
        action: What each of them does, for the message.

    Raises:
        ConfigError: It is something else.
    """
    instance_of(value, bool, name, "Expected True or False.", action)


def described(value: object) -> str:
    """Return what a message says of a value: itself where it is short, else its type, and the shape of a tensor."""
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "NumPy array"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {kind} of the type {dtype} and the shape {list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        return shown(value)
    return f"of the type {type(value).__name__}"
