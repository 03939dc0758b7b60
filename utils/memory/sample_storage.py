"""Samples as named tensors of fixed shapes: checked, and stored in memory or in files."""

import contextlib
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.runtime.errors import DataError

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
"""Those whose entries torch can pick on a CPU and write to a file."""
RESERVED = "slots"
"""A sampled batch says under this name where its samples lie."""


@dataclass(frozen=True)
class Layout:
    """What one field of one sample looks like."""

    shape: tuple[int, ...]
    """Without the dimension of the samples."""
    dtype: torch.dtype
    """Of its entries."""

    @classmethod
    def of(cls, values: Tensor) -> "Layout":
        """Return that of a tensor whose first dimension are samples."""
        return cls(tuple(values.shape[1:]), values.dtype)

    @property
    def bytes(self) -> int:
        """Of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def checked(values: object, name: str, rows: int, layout: Layout | None = None) -> Tensor:
    """Return the values of one field, or refuse them.

    Args:
        values: A tensor, one row for each sample.
        name: Of the field.
        rows: How many samples there must be.
        layout: What the field looks like so far; None when it is new.

    Returns:
        The tensor without its history, on its device.

    Raises:
        DataError: No tensor, of another shape or type, or with entries that are not finite.
    """
    if not isinstance(values, Tensor) or values.layout is not torch.strided or values.is_meta:
        raise DataError(
            f"The field {name!r} of the samples is {_described(values)}.",
            "Expected a dense tensor with values.",
            "Give tensors whose first dimension are the samples.",
        )
    if values.ndim == 0 or values.shape[0] != rows:
        raise DataError(
            f"The field {name!r} has the shape {list(values.shape)}.",
            f"Expected one row for each of the {rows} samples.",
            "Give all fields for the same samples in the same order.",
        )
    if values.dtype not in DTYPES:
        raise DataError(
            f"The field {name!r} is of the type {values.dtype}.",
            f"Expected one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}.",
            "Convert it before it is stored.",
        )
    if layout is not None and (values.dtype != layout.dtype or values.shape[1:] != layout.shape):
        raise DataError(
            f"The field {name!r} has samples of {Layout.of(values)}.",
            f"Expected {layout}, as in the samples stored so far.",
            "Convert, pad or cut it; logits of a head that grew fit after `EpisodicBuffer.widen`.",
        )
    # A sum is finite unless an entry is not, or it overflowed; asking every entry takes several times longer.
    values = values.detach()
    if values.is_floating_point() and not (math.isfinite(values.sum().item()) or bool(values.isfinite().all())):
        bad = int((~values.flatten(1).isfinite().all(1)).sum()) if values.ndim > 1 else int((~values.isfinite()).sum())
        raise DataError(
            f"The field {name!r} has entries that are not finite, in {bad} of {rows} samples.",
            "Expected numbers: one infinity or NaN that is replayed spoils every weight of a model.",
            "Find their cause; for masked logits store zeros, and how many are valid as a field of its own.",
        )
    return values


def checked_samples(samples: object, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Return the fields of samples, or refuse them.

    Args:
        samples: Tensors by name.
        layouts: The fields stored so far; empty before the first sample.

    Raises:
        DataError: Nothing, other names than before, or what `checked` refuses.
    """
    if not isinstance(samples, Mapping) or not samples or not all(isinstance(name, str) for name in samples):
        raise DataError(
            f"The samples are {_described(samples)}.",
            "Expected a dict of tensors by name, whose first dimension are the samples.",
            'Give, for example, {"pixel_values": images, "labels": labels}.',
        )
    if RESERVED in samples:
        raise DataError(
            f"The samples have a field named {RESERVED!r}.",
            "Expected other names: a drawn batch says under this one where its samples lie.",
            "Rename the field.",
        )
    if layouts and samples.keys() != layouts.keys():
        raise DataError(
            f"The samples have the fields {sorted(samples)}.",
            f"Expected {sorted(layouts)}, as in the samples stored so far.",
            "Give the same fields each time; a new one is first given for all stored samples with `update`.",
        )
    first = next(iter(samples.values()))
    rows = first.shape[0] if isinstance(first, Tensor) and first.ndim else 0
    return {name: checked(values, name, rows, layouts.get(name)) for name, values in samples.items()}


def allocated(layout: Layout, capacity: int, directory: Path | None) -> Tensor:
    """Return an empty field for so many samples.

    Args:
        layout: Of the field.
        capacity: How many samples.
        directory: Where its file lies; None for main memory. The file has no name once it is mapped, where the system
            allows that, so that it is gone with the process, however that ends.

    Raises:
        DataError: There is no room in memory or in the directory, or that cannot be written.
    """
    shape = (capacity, *layout.shape)
    size = capacity * layout.bytes
    if directory is None or not size:
        try:
            return torch.empty(shape, dtype=layout.dtype)
        except RuntimeError as error:
            raise DataError(
                f"There is no memory for {capacity:,} samples of {layout.bytes:,} bytes.",
                "Expected room for all samples that the buffer may hold, whose places are taken at once.",
                "Lower the capacity or max_bytes, or give the buffer a directory.",
            ) from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(suffix=".samples", dir=directory)
        try:
            try:
                _reserve(handle, size)
            finally:
                os.close(handle)
            return torch.from_file(path, shared=True, size=math.prod(shape), dtype=layout.dtype).view(shape)
        finally:
            # Windows keeps the name of a file that is in use.
            with contextlib.suppress(PermissionError):
                os.unlink(path)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"The directory of the buffer has no place for a file of {size:,} bytes: {error}",
            "Expected a directory that can be written, with room for all samples that the buffer may hold.",
            "Make room, lower the capacity or max_bytes, or leave the directory out.",
        ) from error


def _reserve(handle: int, size: int) -> None:
    """Take the space now: a mapped file that finds the disk full later kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    block = bytes(min(size, 1 << 20))
    for start in range(0, size, len(block)):
        os.write(handle, block[: size - start])


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        dense = value.layout is torch.strided and not value.is_meta
        return "one tensor" if dense else f"a tensor without values or of the layout {value.layout}"
    if isinstance(value, Mapping):
        return "empty" if not value else f"named {', '.join(repr(name) for name in value)}"
    return f"of the type {type(value).__name__}"
