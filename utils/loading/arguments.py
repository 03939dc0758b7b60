"""Turn a config into the arguments that a constructor accepts."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

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
    config (``config``, ``cfg``, ``args`` ...) is given one object with all settings.

    Args:
        function: A model's class, or ``build_model``.
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
            value = settings[name]
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
        raise InstantiationError(
            f"{function.__name__} needs {', '.join(missing)}, which the config does not set; it sets {have}.",
            f"Expected a value for every required argument of {function.__name__}.",
            f"Add {missing[0]} to config.json, or pass config={{{missing[0]!r}: ...}}.",
        )
    if takes_all:
        taken = {parameter.name for parameter in parameters}
        keywords.update({key: value for key, value in settings.items() if key not in taken})
    return tuple(positional), keywords


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
