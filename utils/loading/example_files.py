"""Arguments of a model's forward from a file."""

import json
from pathlib import Path
from typing import Any

import numpy
import torch

from utils.runtime.errors import ConfigError, SeedbedError
from utils.runtime.optional import require


def read_examples(path: str, model: Any) -> dict[str, Any]:
    """Read arguments of forward from a file without running anything in it; a model's real numbers have its dtype.

    Args:
        path: A ``.safetensors``, ``.npz`` or ``.json`` file; the latter holds lists of numbers by name.
        model: The model, or what holds it in ``module``.

    Raises:
        ConfigError: The file is of another kind, or cannot be read.
    """
    kind = Path(path).suffix
    if kind not in (".safetensors", ".npz", ".json"):
        raise ConfigError(f"{path} ends in {kind or 'nothing'}.", "Expected a .safetensors, .npz or .json file.")
    try:
        if kind == ".safetensors":
            return dict(require("safetensors.torch", "read this file").load_file(path))
        if kind == ".npz":
            with numpy.load(path, allow_pickle=False) as held:
                read = {name: torch.from_numpy(held[name]) for name in held.files}
        else:
            values = json.loads(Path(path).read_text(encoding="utf-8")).items()
            read = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in values}
    except SeedbedError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.", "Expected the arguments of forward() by name, numbers only."
        ) from error
    module = getattr(model, "module", model)
    real = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: value.to(real) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in read.items()
    }
