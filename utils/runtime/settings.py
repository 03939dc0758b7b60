"""Settings dataclasses: the line of help under each field, and the check of names and numbers that somebody wrote."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeVar, cast, get_args, get_type_hints

from utils.runtime.errors import ConfigError

Range = tuple[float, float, bool, bool]
"""Of a number the least and the most, whether it is whole, and whether the least itself is excluded."""
UNBOUNDED = 2**31 - 1
"""A most from here on only keeps arithmetic in bounds: it is told to those alone who are above it."""
Settings = TypeVar("Settings")


def field_help(settings: type) -> dict[str, str]:
    """Return the string under each annotated field of a dataclass, by field name, in order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(settings)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    texts: dict[str, str] = {}
    for statement, following in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            texts[statement.target.id] = following.value.value
    return texts


def check_names(settings: type, given: Mapping[str, Any]) -> None:
    """Check that all names are fields of a settings dataclass.

    Raises:
        ConfigError: One is not; the nearest is suggested.
    """
    known = [field.name for field in fields(settings)]
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            raise ConfigError(
                f"{settings.__name__} has no setting {name!r}.",
                f"Expected one of {', '.join(known)}.",
                f"Did you mean {near[0]!r}?" if near else "Use one of these names, or leave it out.",
            )


def check_ranges(settings: Any, ranges: Mapping[str, Range]) -> None:
    """Check the numbers of a settings dataclass; None passes where the field's annotation allows it.

    NumPy's numbers are taken, and replaced in the object by Python's, which JSON can hold.

    Args:
        settings: The object, from its ``__post_init__``.
        ranges: By field.

    Raises:
        ConfigError: One is no number, not whole, or out of its range.
    """
    owner, hints = type(settings), get_type_hints(type(settings))
    defaults = {field.name: field.default for field in fields(settings)}
    for name, (least, most, whole, above) in ranges.items():
        value = getattr(settings, name)
        optional = type(None) in get_args(hints[name])
        if value is None and optional:
            continue
        number = _python_number(value, whole)
        if number is not None and (least < number if above else least <= number) and number <= most:
            if number is not value:
                object.__setattr__(settings, name, number)  # settings are frozen
            continue
        bound = f"{'above' if above else 'from'} {least:g}"
        if most < UNBOUNDED or (number is not None and number > most):
            bound += f" to {most:g}" if most < UNBOUNDED else f" and at most {most}"
        default = defaults[name]
        raise ConfigError(
            f"{owner.__name__}.{name} is {shown(value)}.",
            f"Expected a {'whole ' * whole}number {bound}{' or None' if optional else ''}.",
            f"Choose one{'' if default is MISSING else f'; left out it is {default!r}'}.",
        )


def _python_number(value: Any, whole: bool) -> int | float | None:
    """Return a number as one of Python's, before it is compared: NumPy narrows a limit to the number's own type.

    Args:
        value: What was given.
        whole: Whether it has to be of a type of whole numbers.

    Returns:
        None where it is no number, true or false, or larger than a float can be.
    """
    plain = type(value) in (int, float)
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return None
    if plain:
        return cast(int | float, value)
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:  # a fraction of large whole numbers
        return None


def settings_of(kind: type[Settings], given: Any) -> Settings:
    """Return settings that may also be given as names and values, or as None for the defaults.

    Args:
        kind: Their class.
        given: What a user gave.

    Raises:
        ConfigError: It is something else, a name is unknown or a value is invalid.
    """
    if isinstance(given, kind):
        return given
    if given is None or isinstance(given, Mapping):
        given = given or {}
        check_names(kind, given)
        needed = [field.name for field in fields(cast(Any, kind)) if field.default is field.default_factory is MISSING]
        if lost := [name for name in needed if name not in given]:
            raise ConfigError(
                f"{kind.__name__} needs {', '.join(lost)}.", "Expected a value for each.", "Give them by name."
            )
        return kind(**given)
    raise ConfigError(
        f"The settings are of the type {type(given).__name__}.",
        f"Expected a {kind.__name__}, a mapping with its names and values, or None for the defaults.",
        f"Write {kind.__name__}(...) with those that should be others than the defaults.",
    )


def shown(value: Any, most: int = 60) -> str:
    """Return a value as an error can show it, however long it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    said = repr(value)
    return said if len(said) <= most else f"{said[:most]}..."
