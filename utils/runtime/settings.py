"""The line of help under each field of a settings dataclass, for forms and command lines."""

import ast
import inspect
import textwrap
from itertools import pairwise


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
