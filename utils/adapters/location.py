"""Where in the user's code a module or parameter lives."""

import inspect
import sys
from pathlib import PurePath

from torch import nn

LIBRARY = ("torch.", "torchvision.ops.")


def code_location(module: nn.Module, where: str) -> str:
    """Return file and line of the code that a finding is about, for example ``model.py:42 (class Attention)``.

    The class of the named module counts, or of its closest parent that is not one of PyTorch's own layers: nobody
    mends `nn.Linear`, but the class that holds it.

    Args:
        module: The model.
        where: Qualified name of a module or parameter, or the model's class name.

    Returns:
        The location; empty when the class has no Python source of its own.
    """
    chain: list[nn.Module] = [module]
    for part in where.split("."):
        child = chain[-1]._modules.get(part)
        if child is None:
            break
        chain.append(child)
    for owner in reversed(chain):
        kind = type(owner)
        if f"{kind.__module__}.".startswith(LIBRARY):
            continue
        function = kind.__dict__.get("forward") or kind.__dict__.get("__init__")
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if code is None:
            continue
        source = getattr(sys.modules.get(kind.__module__), "__file__", None) or code.co_filename
        return f"{PurePath(source).name}:{code.co_firstlineno} (class {kind.__name__})"
    return ""
