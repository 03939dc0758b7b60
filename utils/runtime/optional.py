"""Optional packages: imported at the call that needs them, with the install line when they are absent."""

import importlib
from types import ModuleType

from utils.runtime.errors import MissingPackageError


def require(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Import an optional module or say how to install it.

    Args:
        module: Name to import, for example ``"pytorch_lightning"``.
        purpose: What it is needed for, as the end of the sentence "... is needed to".
        package: Name to install when it differs from `module`.

    Raises:
        MissingPackageError: The module cannot be imported; the message carries the install line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.split(".")[0].replace("_", "-")
        raise MissingPackageError(
            f"The package {name} cannot be imported ({error}).",
            f"It is needed to {purpose}.",
            f"Install it with: pip install {name}  (or all of them: pip install -r requirements-training.txt).",
        ) from error
