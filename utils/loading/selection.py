"""Which of the classes in a model's source is the model."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from utils.loading.source import CONFIG_FILE, MODEL_FILE, Source
from utils.runtime.errors import InstantiationError

_CLASS_NAME = re.compile(r"[A-Z]\w*", re.ASCII)


def choose(
    module: ModuleType, source: Source, config: Mapping[str, Any]
) -> tuple[Callable[..., nn.Module], tuple[str, ...]]:
    """Return the class or the function that makes the model.

    In this order: the class or function that ``model_name`` in the config names exactly, ``build_model()``, ``Model``,
    ``CustomTransformer``, and the one root class, which is a class of ``model.py`` that no other class there uses or
    is built from.

    Returns:
        The maker, and a note when ``model_name`` in the config names no class, as a title such as "My GPT" does.

    Raises:
        InstantiationError: There is no model class, or more than one could be meant; the message lists them. Or
            ``model_name`` names something in the source that is not one of its models.
    """
    files, own = source.files, source.entry
    name = config.get("model_name")
    package = module.__name__.partition(".")[0]
    named = vars(module).get(name) if isinstance(name, str) else None
    if named is not None and (_is_model(named, package) or _is_own_function(named, package)):
        return named, ()
    maker = _by_convention(module, source)
    if name is None:
        return maker, ()
    where = CONFIG_FILE if CONFIG_FILE in files else "The config"
    if isinstance(name, str) and _CLASS_NAME.fullmatch(name) and _exists(name, module, files):
        raise InstantiationError(
            f'{where} names the class "{name}", and {own} defines {maker.__name__}.',
            f"Expected model_name to be a class derived from torch.nn.Module that {own} defines, or a title.",
            f'Set model_name to "{maker.__name__}" if that is the model, or leave it out.',
        )
    shown = name if isinstance(name, str) else repr(name)
    return maker, (
        f'{where} names the model "{shown[:80]}"; {own} has no class of that name: {maker.__name__} was used.',
    )


def _exists(name: str, module: ModuleType, files: Mapping[str, str]) -> bool:
    """Whether the source imports or defines something of this name, at whatever depth."""
    return name in vars(module) or any(
        isinstance(node, ast.ClassDef) and node.name == name
        for file, text in files.items()
        if file.endswith(".py")
        for node in ast.walk(ast.parse(text))
    )


def _by_convention(module: ModuleType, source: Source) -> Callable[..., nn.Module]:
    """Return what makes the model when the config does not say."""
    namespace = vars(module)
    package = module.__name__.partition(".")[0]
    build = namespace.get("build_model")
    if callable(build) and not isinstance(build, type) and getattr(build, "__module__", "").startswith(package + "."):
        return build
    for usual in ("Model", "CustomTransformer"):
        if _is_model(namespace.get(usual), package):
            return namespace[usual]
    candidates = {
        key: value
        for key, value in namespace.items()
        if _is_model(value, package) and value.__module__ == module.__name__ and value.__name__ == key
    }
    if not candidates:
        others = [key for key, value in namespace.items() if _is_model(value, package)]
        raise InstantiationError(
            f"{source.entry} defines no class derived from torch.nn.Module.",
            "Expected the model's class, named Model or as model_name in config.json says.",
            f"It imports {', '.join(others)}: set model_name to the one that is meant." if others else "",
        )
    parts = _parts(source.files[MODEL_FILE], set(candidates))
    roots = [key for key in candidates if key not in parts]
    if len(roots) == 1:
        return candidates[roots[0]]
    listed = ", ".join(roots or candidates)
    # Parts stand above the whole that is made of them, so the last class is the likeliest.
    likeliest = (roots or list(candidates))[-1]
    makers = factories(module, likeliest)
    raise InstantiationError(
        f"{source.entry} defines {len(roots or candidates)} classes that could be the model: {listed}.",
        "Expected exactly one class that no other class uses as a part.",
        f'Say which is meant: {{"model_name": "{(makers or [likeliest])[0]}"}} in config.json or in config=; '
        "it may be a class, or a function that returns the model.",
    )


def factories(module: ModuleType, name: str) -> list[str]:
    """Return the functions of a module that can be called without arguments, use a class and return something."""
    functions = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and value.__name__ == key
    }
    users, grown = {name}, True
    while grown:
        found = {key for key, value in functions.items() if users & set(value.__code__.co_names)} - users
        users, grown = users | found, bool(found)
    return [key for key, value in functions.items() if key in users and _needs_nothing(value) and _returns(value)]


def _needs_nothing(function: FunctionType) -> bool:
    return all(
        parameter.default is not parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(function).parameters.values()
    )


def _returns(function: FunctionType) -> bool:
    """Whether a function returns a value, as ``main`` seldom does."""
    tree = syntax(function)
    return tree is not None and any(isinstance(node, ast.Return) and node.value for node in ast.walk(tree))


def syntax(item: Callable[..., Any]) -> ast.Module | None:
    """Return the syntax tree of a class or function, or None where its text is unknown."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(item)))
    except (OSError, TypeError, SyntaxError):
        return None


def _is_own_function(value: Any, package: str) -> bool:
    return isinstance(value, FunctionType) and str(value.__module__).startswith(package + ".")


def _is_model(value: Any, package: str) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__.startswith(package + ".")


def _parts(text: str, candidates: set[str]) -> set[str]:
    """Return the candidates that another candidate uses, directly or through functions and tables of the file.

    A class that is handed to another one, as in ``ResNet(BasicBlock, [2, 2])``, is a part of it.
    """
    uses: dict[str, set[str]] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in candidates:
            given = (*node.args, *(keyword.value for keyword in node.keywords))
            uses.setdefault(node.func.id, set()).update(item.id for item in given if isinstance(item, ast.Name))
    for statement in tree.body:
        names = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            uses.setdefault(statement.name, set()).update(names)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    uses.setdefault(target.id, set()).update(names)
    parts: set[str] = set()
    for candidate in candidates:
        reached: set[str] = set()
        waiting = [candidate]
        while waiting:
            for name in uses.get(waiting.pop(), set()) - reached:
                reached.add(name)
                waiting.append(name)
        parts |= (reached & candidates) - {candidate}
    return parts
