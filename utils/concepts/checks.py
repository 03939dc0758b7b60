"""What a user gives to the functions of this package, checked alike everywhere: tables of numbers, counts, types.

NumPy arrays are taken wherever tensors are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runtime.arguments import described, instance_of, whole
from utils.runtime.errors import ConfigError, DataError, SeedbedError
from utils.runtime.settings import shown

SIDES = ("output", "input")
"""Of a layer."""


def as_tensor(value: Any) -> Any:
    """Return a NumPy array of real numbers as a tensor of its own, and anything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return value
    wide = value.dtype.kind == "f" and value.dtype.itemsize > 8
    return torch.from_numpy(np.array(value, dtype=np.float64 if wide else value.dtype.newbyteorder("=")))


def with_tensors(given: Any) -> Any:
    """Return examples that a user gave with tensors in the place of NumPy arrays.

    Arrays of float64, NumPy's own default, become float32, which is torch's; an array of texts becomes a list, also one
    of objects, as pandas makes them.

    Raises:
        DataError: An array holds something else.
    """
    if isinstance(given, np.ndarray):
        objects = given.ravel().tolist() if given.dtype.kind in "OTU" else [None]
        made = given.tolist() if all(isinstance(entry, str) for entry in objects) else as_tensor(given)
        if isinstance(made, np.ndarray):
            others = [type(entry).__name__ for entry in objects if not isinstance(entry, str)]
            mixed = f", {len(others)} of them no texts but {others[0]}" if len(others) < len(objects) else ""
            raise DataError(
                f"Among the examples is a NumPy array of {made.dtype}{mixed}.",
                "Expected real numbers, samples first, or texts.",
                "Leave those out that are no texts."
                if mixed
                else "Convert it first: np.stack(...) makes one array of several of one shape, and np.char.decode(...) "
                "texts of bytes.",
            )
        return made.float() if isinstance(made, Tensor) and made.dtype == torch.float64 else made
    if isinstance(given, Tensor) and (given.layout != torch.strided or given.is_complex() or given.is_quantized):
        raise DataError(
            f"Among the examples is a tensor of the type {given.dtype}, {given.layout}.".replace("torch.", ""),
            "Expected real numbers in a plain tensor, samples first.",
            "Convert it with to_dense(), torch.view_as_real or dequantize().",
        )
    if isinstance(given, Mapping):
        return {
            name: with_tensors(value) if isinstance(value, (np.ndarray, Tensor)) else value
            for name, value in given.items()
        }
    if isinstance(given, (list, tuple)):
        return [with_tensors(part) if isinstance(part, (np.ndarray, Tensor, Mapping)) else part for part in given]
    return given


def fitted_table(values: Any, what: str) -> Tensor:
    """Return a table of finite real numbers that something is to be fitted to, ``(n, width)`` on the CPU.

    Args:
        values: What a user gave.
        what: How its rows are called, such as "vectors".

    Raises:
        DataError: It is no such table, or has no columns.
    """
    table = _table(values, what, DataError)
    if table.ndim != 2 or not table.shape[1]:
        raise DataError(
            f"The {what} have the shape {tuple(table.shape)}.",
            "Expected a table (rows, width).",
            "Give one row for each, as `representations(...).values` does.",
        )
    table = table.detach().cpu()
    if table.is_floating_point() and (broken := int((~torch.isfinite(table)).any(1).sum())):
        raise DataError(
            f"{broken} of {len(table)} {what} hold values that are not finite.",
            "Expected numbers.",
            "Look for the layer where they begin: `utils.validate(model)` names it.",
        )
    return table


def read_table(values: Any, width: int, reader: str, flat: bool = True) -> Tensor:
    """Return floating-point vectors that something made for one width is to read.

    Args:
        values: What a user gave: ``(n, width)``, or ``(..., width)``.
        width: Numbers in a vector.
        reader: What reads it, such as "the eraser".
        flat: Whether there is one axis of vectors and no more.

    Raises:
        ConfigError: It is no tensor, has another width, or holds whole numbers.
    """
    table = _table(values, "values", ConfigError)
    if table.shape[-1:] != (width,) or (flat and table.ndim != 2):
        raise ConfigError(
            f"The values have the shape {tuple(table.shape)}, and {reader} is for the width {width}.",
            f"Expected ({'n' if flat else '...'}, {width}).",
            "Take them from the layer that it was made for, one row for each vector.",
        )
    if not table.is_floating_point():
        raise ConfigError(
            f"The values are of the type {str(table.dtype).removeprefix('torch.')}.",
            f"Expected floating-point numbers: what {reader} makes of them is no whole number.",
            "Convert them with values.float().",
        )
    return table


def _table(values: Any, what: str, error: type[SeedbedError]) -> Tensor:
    """Return a tensor of real numbers."""
    table = as_tensor(values)
    if not isinstance(table, Tensor) or table.layout != torch.strided or table.is_complex() or table.is_quantized:
        kind = f"of the type {table.dtype}, {table.layout}" if isinstance(table, Tensor) else described(table)
        raise error(
            f"The {what} are {kind}.".replace("torch.", ""),
            "Expected a tensor or a NumPy array of real numbers, one row for each vector.",
            "Convert a list with torch.tensor(...), and a sparse or nested tensor with to_dense or to_padded_tensor.",
        )
    return table


def check_count(name: str, value: Any, least: int, optional: bool = False) -> None:
    """Check a whole number, which is to fit into 64 bits.

    Args:
        name: Of the setting.
        value: What a user gave.
        least: The least.
        optional: Whether None passes.

    Raises:
        ConfigError: It is none, below the least, or too large.
    """
    if value is not None or not optional:
        example = f"{name}={max(least, 1)}"
        whole(value, name, least, f"Write for example {example}{', or leave it out' * optional}.")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check a setting that has a few values.

    Raises:
        ConfigError: It is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(
            f"The {name} is {described(value)}.", f"Expected one of {', '.join(allowed)}.", "Choose one of them."
        )


def check_kind(value: Any, kind: type, what: str, action: str, error: type[SeedbedError] = ConfigError) -> None:
    """Check that a value is of a class.

    Args:
        value: What a user gave.
        kind: The class.
        what: How the value is called, such as "package".
        action: How one is made, as a sentence.
        error: Raised if it is something else.

    Raises:
        SeedbedError: It is something else.
    """
    name = kind.__name__
    instance_of(
        value, kind, f"The {what}", f"Expected {'an' if name[0] in 'AEIOU' else 'a'} {name}.", action, error=error
    )


def checked_names(names: Any, what: str, error: type[SeedbedError] = ConfigError) -> Sequence[Any]:
    """Return a list of names, or of Nones where those stand for a choice.

    Raises:
        SeedbedError: It is one name by itself, nothing, or no list.
    """
    if isinstance(names, (list, tuple)) and names:
        return names
    raise error(
        f"The {what} are {shown(names)}.", "Expected a list of names, one at least.", "Put a single name into a list."
    )
