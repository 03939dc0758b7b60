"""When model code may set or answer for attributes whose names are computed."""

import ast
import builtins
from collections.abc import Mapping

from utils.loading import audit_rules as rules
from utils.loading.audit_names import dotted


def reaches_numpy(trees: Mapping[str, ast.Module], bindings: Mapping[str, Mapping[str, set[str]]]) -> bool:
    """Whether any file can hold numpy arrays.

    To numpy an object with one certain attribute is a piece of memory at an address of the object's choice.
    """
    if any(
        target.split(".")[0] == "numpy" for names in bindings.values() for found in names.values() for target in found
    ):
        return True
    return any(
        (isinstance(node, ast.Attribute) and node.attr in rules.NUMPY_ATTRIBUTES)
        or (isinstance(node, ast.Constant) and node.value in rules.NUMPY_ATTRIBUTES)
        or (isinstance(node, ast.MatchClass) and set(node.kwd_attrs) & rules.NUMPY_ATTRIBUTES)
        for tree in trees.values()
        for node in ast.walk(tree)
    )


def plain_constructors(trees: Mapping[str, ast.Module], imported: Mapping[str, set[str]]) -> set[int]:
    """Return the ids of the ``__init__`` functions that can be given nothing but a new object of their own class.

    They are those of top-level classes without bases, decorators or subclasses, in a model of one file where
    ``__init__`` is reached through ``super()`` only: such a function may set any attribute of ``self``.
    """
    if len(trees) != 1:
        return set()
    tree = next(iter(trees.values()))
    nodes = list(ast.walk(tree))
    bound = [
        *(node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)),
        *(node.arg for node in nodes if isinstance(node, ast.arg)),
        *(getattr(node, "name", None) for node in nodes if not isinstance(node, ast.alias)),
        *imported,
    ]
    if {"super", "object"} & set(bound) or any(map(_mentions_init, nodes)):
        return set()
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    builtin = {(name,) for name in vars(builtins)}
    bases: set[str] = set()
    for base in (base.value if isinstance(base, ast.Subscript) else base for node in classes for base in node.bases):
        chain = dotted(base)
        if chain == ("object",):
            continue
        if not chain or bound.count(chain[0]) != (0 if chain in builtin else 1):
            return set()
        if chain[0] not in {*imported, *(kind.name for kind in classes)} and chain not in builtin:
            return set()
        bases.add(chain[0])
    return {
        id(function)
        for node in classes
        if node in tree.body and node.name not in bases and bound.count(node.name) == 1
        if not node.decorator_list and not node.keywords and all(dotted(base) == ("object",) for base in node.bases)
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__" and not function.decorator_list
    }


def _mentions_init(node: ast.AST) -> bool:
    """Whether a node reaches ``__init__`` other than by ``super().__init__``."""
    if isinstance(node, ast.Attribute) and node.attr == "__init__":
        call = node.value
        return not (isinstance(call, ast.Call) and dotted(call.func) == ("super",) and not call.args)
    return (
        (isinstance(node, ast.Name) and node.id == "__init__")
        or (isinstance(node, ast.Constant) and node.value == "__init__")
        or (isinstance(node, ast.MatchClass) and "__init__" in node.kwd_attrs)
    )
