"""Settings dataclasses: the line of help under each field, and the check of names that somebody wrote."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from utils.runtime.errors import ConfigError


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
                f"Did you mean {near[0]!r}?" if near else "",
            )
