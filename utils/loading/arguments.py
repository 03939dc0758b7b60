"""Turn a config into the arguments that a constructor accepts."""

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from utils.loading.selection import factories, syntax
from utils.runtime.errors import InstantiationError

_CONFIG_NAMES = ("config", "cfg", "args", "conf", "configuration", "settings", "params", "hparams")
_CONFIG_CLASS_ENDINGS = ("config", "args", "settings", "params", "hparams", "configuration")


class Settings(SimpleNamespace):
    """A config that is read as ``config.d_model`` or as ``config["d_model"]``."""

    def __getitem__(self, key: str) -> Any:
        return vars(self)[key]

    def __contains__(self, key: object) -> bool:
        return key in vars(self)

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def keys(self) -> Any:
        """Return the names of the settings."""
        return vars(self).keys()

    def items(self) -> Any:
        """Return the names and values of the settings."""
        return vars(self).items()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or `default` when there is none of that name."""
        return vars(self).get(key, default)


def bind(
    function: Callable[..., Any], settings: Mapping[str, Any], module: ModuleType
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Choose the arguments for a class or function from the settings.

    Settings that it does not accept are left out; all are passed when it takes ``**kwargs``. An argument named like a
    config (``config``, ``cfg``, ``args`` ...) is given one object with all settings. One that the code calls, as in
    ``block(64)``, is a class: a text that names a class of the module becomes that class.

    Args:
        function: A model's class, or a function that returns the model.
        settings: The config without the keys that describe the file.
        module: The module that it belongs to, where names in annotations are looked up.

    Returns:
        Positional arguments and keyword arguments.

    Raises:
        InstantiationError: A required argument is missing; the message names it.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return (), {}
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    missing = []
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for parameter in parameters:
        name = parameter.name
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name in settings:
            value = _named_class(settings[name], name, function, module)
        elif name.lower() in _CONFIG_NAMES:
            value = _config_object(parameter, settings, module)
        elif parameter.default is not parameter.empty:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                value = parameter.default
            else:
                continue
        else:
            missing.append(name)
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            keywords[name] = value
    if missing:
        have = ", ".join(sorted(settings)) or "no settings at all"
        action = f"Add {missing[0]} to config.json, or pass config={{{missing[0]!r}: ...}}."
        if classes := [name for name in missing if _is_called(name, function)]:
            action += f" The name of a class stands for the class in {', '.join(classes)}."
        if makers := factories(module, function.__name__):
            action += f' Or name a function that builds it: {{"model_name": "{makers[0]}"}}; '
            action += f"or import it and pass utils.validate({makers[0]}())."
        raise InstantiationError(
            f"{function.__name__} needs {', '.join(missing)}, which the config does not set; it sets {have}.",
            f"Expected a value for every required argument of {function.__name__}.",
            action,
        )
    if takes_all:
        taken = {parameter.name for parameter in parameters}
        keywords.update({key: value for key, value in settings.items() if key not in taken})
    return tuple(positional), keywords


def _named_class(value: Any, name: str, function: Callable[..., Any], module: ModuleType) -> Any:
    """Return the class that a text names, where the argument is one that the code calls; else the value itself."""
    kind = vars(module).get(value) if isinstance(value, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) and _is_called(name, function) else value


def _is_called(name: str, function: Callable[..., Any]) -> bool:
    """Whether the code calls what it is given under this name, and never puts something else in its place."""
    nodes = list(ast.walk(tree)) if (tree := syntax(function)) else []
    called = any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name for n in nodes)
    return called and not any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in nodes)


def misspelt(function: Callable[..., Any], settings: Mapping[str, Any], module: ModuleType) -> tuple[str, ...]:
    """Return one note for each setting that nothing takes and that is spelt nearly as one that is not set."""
    taken: set[str] = set()
    waiting = [function]
    while waiting:
        try:
            parameters = inspect.signature(waiting.pop()).parameters.values()
        except (TypeError, ValueError):
            return ()
        for parameter in parameters:
            if parameter.kind is parameter.VAR_KEYWORD:
                return ()
            if parameter.name not in settings and parameter.name.lower() in _CONFIG_NAMES:
                kind = _config_class(parameter, module)
                if kind in (None, dict, Mapping):
                    return ()
                waiting.append(kind)
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                taken.add(parameter.name)
    notes = []
    for key in settings:
        if key not in taken and (close := difflib.get_close_matches(key, sorted(taken - settings.keys()), 1, 0.8)):
            notes.append(f"{function.__name__} takes no {key[:80]}, which was left out; did you mean {close[0]}?")
    return tuple(notes)


def config_reads(function: Callable[..., Any], module: ModuleType) -> tuple[str, list[str]]:
    """Return the argument of a class that takes the whole config, and what its code reads from it, in order.

    Both are empty where there is no such argument, or where a class of the model's own says what its config holds.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "", []
    names = [
        parameter.name
        for parameter in parameters
        if parameter.name.lower() in _CONFIG_NAMES and _config_class(parameter, module) in (None, dict, Mapping)
    ]
    tree = syntax(function) if names else None
    if tree is None:
        return "", []
    found: list[tuple[int, int, str]] = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        key = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
        if node.value.id == names[0] and isinstance(key, str) and not hasattr(dict, key):
            found.append((node.lineno, node.col_offset, key))
    return names[0], list(dict.fromkeys(key for _, _, key in sorted(found)))


def _config_object(parameter: inspect.Parameter, settings: Mapping[str, Any], module: ModuleType) -> Any:
    """Build the object for an argument that takes the whole config."""
    kind = _config_class(parameter, module)
    if kind is None:
        return Settings(**settings)
    if kind in (dict, Mapping):
        return dict(settings)
    arguments, keywords = bind(kind, settings, module)
    return kind(*arguments, **keywords)


def _config_class(parameter: inspect.Parameter, module: ModuleType) -> Any:
    """Return the class of a config argument: annotated, of its default, or the one config dataclass of the file."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        # A name is looked up; evaluating the text would run code.
        words = [word.strip() for word in annotation.removeprefix("Optional[").rstrip("]").split("|")]
        annotation = next((vars(module)[word] for word in words if word in vars(module)), {"dict": dict}.get(words[0]))
    for member in getattr(annotation, "__args__", ()) or (annotation,):
        if isinstance(member, type) and member not in (type(None), inspect.Parameter.empty, object):
            if issubclass(member, dict) or getattr(annotation, "__origin__", None) is dict:
                return dict
            if member.__module__ not in ("builtins", "types", "typing"):
                return member
    if getattr(annotation, "__origin__", None) is dict:
        return dict
    if dataclasses.is_dataclass(parameter.default) and not isinstance(parameter.default, type):
        return type(parameter.default)
    own = [
        value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and dataclasses.is_dataclass(value)
        and value.__name__ == key
        and key.lower().endswith(_CONFIG_CLASS_ENDINGS)
    ]
    return own[0] if len(own) == 1 else None
