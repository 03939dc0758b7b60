"""Where in the user's code a module or parameter lives: where it is made, where it is called, where it raised.

Source is read with `ast`. A line counts only where there is exactly one candidate; else it is the line of ``forward``.
"""

import ast
import inspect
import linecache
import sys
from collections.abc import Iterator
from pathlib import PurePath
from types import FunctionType
from typing import Any

from torch import nn

LIBRARY = ("torch.", "torchvision.ops.")
REGISTER = ("register_buffer", "register_parameter", "register_module", "add_module")


def code_location(module: nn.Module, where: str, at: str = "inside") -> str:
    """Return file and line of the code that a finding is about, for example ``model.py:42 (class Attention)``.

    The class of the named module counts, or of its closest parent that is not one of PyTorch's own layers: nobody
    mends `nn.Linear`, but the class that holds it.

    Args:
        module: The model.
        where: Qualified name of a module or parameter, or the model's class name.
        at: ``"inside"``: ``forward`` of a class of the user's own, and the line that makes a parameter or one of
            PyTorch's layers; ``"made"``: that line for any part; ``"called"``: the line that calls it.

    Returns:
        The location; empty when the class has no Python source of its own.
    """
    chain: list[nn.Module] = [module]
    names = where.split(".")
    for part in names:
        child = chain[-1]._modules.get(part)
        if child is None:
            break
        chain.append(child)
    owned = [index for index, part in enumerate(chain) if not _is_library(type(part))]
    if not owned:
        return ""
    last = owned[-1]
    # The last own module itself is wanted, not something in it: what makes and calls it is its parent's code.
    itself = last == len(names) and at != "inside"
    holder = owned[-2] if itself and len(owned) > 1 else last
    if holder < len(names) and not (itself and len(owned) == 1):
        line = _line_of(type(chain[holder]), names[holder], at)
        if line:
            return line
    for index in reversed(owned):
        for kind in type(chain[index]).__mro__:
            if not _is_library(kind) and (line := _main_line(kind)):
                return line
    return ""


def crash_location(module: nn.Module, error: BaseException) -> str:
    """Return the innermost line of the model's own files in an exception's traceback, empty where there is none.

    Args:
        module: The model.
        error: What it raised.
    """
    kinds = {type(part) for part in module.modules() if not _is_library(type(part))}
    files = {function.__code__.co_filename for kind in kinds for function in _functions(kind)}
    found = ""
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if code.co_filename in files:
            owner = type(step.tb_frame.f_locals.get("self"))
            what = f"class {owner.__name__}" if owner in kinds else f"in {code.co_name}"
            name = PurePath(_file(owner, code.co_filename) if owner in kinds else code.co_filename).name
            found = f"{name}:{step.tb_lineno} ({what})"
        step = step.tb_next
    return found


def _is_library(kind: type) -> bool:
    """Tell whether a class is PyTorch's own."""
    return f"{kind.__module__}.".startswith(LIBRARY)


def _functions(kind: type) -> list[FunctionType]:
    """Return the methods that a class itself defines, without their decorators."""
    plain = [inspect.unwrap(value) for value in vars(kind).values() if callable(value) and not isinstance(value, type)]
    return [function for function in plain if isinstance(function, FunctionType)]


def _main_line(kind: type) -> str:
    """Return the line of what a class adds to those that it inherits from: ``forward``, or its only method."""
    functions = {function.__name__: function for function in _functions(kind)}
    known = next((functions[name] for name in ("forward", "__init__") if name in functions), None)
    function = next(iter(functions.values())) if known is None and len(functions) == 1 else known
    return _text(kind, function.__code__.co_filename, function.__code__.co_firstlineno) if function else ""


def _file(kind: type, known: str) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or known


def _text(kind: type, file: str, line: int) -> str:
    return f"{PurePath(_file(kind, file)).name}:{line} (class {kind.__name__})"


def _line_of(kind: type, name: str, at: str) -> str:
    """Return the one line of a class, or of the classes it inherits from, that makes or calls an attribute."""
    for candidates in (_calls, _makes) if at == "called" else (_makes,):
        found = {
            (base, function.__code__.co_filename, line)
            for base in kind.__mro__
            if not _is_library(base)
            for function in _functions(base)
            for line in candidates(function, name)
        }
        if len(found) == 1:
            ((base, file, line),) = found
            return _text(base, file, line)
    return ""


def _body(function: FunctionType) -> tuple[list[ast.AST], str]:
    """Return what a function consists of, line numbers those of its file, and what it calls its object."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 :]
    try:
        tree = ast.parse(_dedented(inspect.getblock(lines)))
    except (SyntaxError, IndexError, ValueError):
        return [], ""
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    return list(ast.walk(tree)), code.co_varnames[0] if code.co_argcount else ""


def _dedented(lines: list[str]) -> str:
    """Return lines of a method moved to the left margin; text inside longer strings may move along."""
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "".join(line[margin:] if not line[:margin].strip() else line for line in lines)


def _is_attribute(node: Any, owner: str, name: str) -> bool:
    """Tell whether an expression is ``self.name``."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    )


def _makes(function: FunctionType, name: str) -> Iterator[int]:
    """Yield the lines that assign or register an attribute."""
    nodes, owner = _body(function)
    for node in nodes:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        elif isinstance(node, ast.Call) and any(_is_attribute(node.func, owner, verb) for verb in REGISTER):
            named = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (node.lineno for value in named if value == name)
        flat = [part for target in targets for part in getattr(target, "elts", [target])]
        yield from (part.lineno for part in flat if _is_attribute(part, owner, name))


def _calls(function: FunctionType, name: str) -> Iterator[int]:
    """Yield the lines that call an attribute."""
    nodes, owner = _body(function)
    yield from (node.lineno for node in nodes if isinstance(node, ast.Call) and _is_attribute(node.func, owner, name))
