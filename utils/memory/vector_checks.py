"""What may enter a long-term memory: vectors, ids and metadata, checked before anything is changed.

An index of FAISS takes NaN, zero vectors under cosine and ids that are there already without a word, and answers
wrongly from then on; here each of them is an error.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runtime.errors import DataError
from utils.runtime.settings import shown

METRICS = ("cosine", "l2")
"""Cosine similarity (nearer is higher), or squared Euclidean distance (nearer is lower)."""
LONGEST = 3e18
"""Largest norm under l2: whatever is summed up for the squared distance of two such vectors is a float32."""
RELIABLE = (1e-12, 1e15)
"""Norms between these are precise in float32; others are computed again in float64."""
BLOCK = 16_384
"""Vectors that are looked at in one piece."""
LAST_ID = 2**63 - 2
"""Largest id."""
PLAIN = {str, int, float, bool, type(None)}
"""Types of values that JSON returns as they are, if they are not large; a class derived from one is another type."""
LARGE = 1e300
"""JSON has no infinity, and its Python library refuses whole numbers of thousands of digits."""
SHOWN = 5
"""Examples in a message."""


def as_vectors(values: Any, dimension: int | None, what: str = "vectors") -> np.ndarray:
    """Return vectors as a float32 table, C-contiguous ``[n, dimension]``; a single one ``[dimension]`` is one row.

    Nothing is copied where that is possible. The entries are not checked yet, see `checked`.

    Args:
        values: A tensor on any device, a NumPy array or nested lists of real numbers.
        dimension: Width; None where it is not known yet.
        what: What they are, for the message.

    Raises:
        DataError: Another shape, width or type.
    """
    if isinstance(values, Tensor):
        if values.layout is not torch.strided or values.is_meta:
            raise _no_vectors(what, "a tensor that is sparse or has no values")
        values = values.detach()
        values = (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    elif isinstance(values, (list, tuple)):
        values = _from_lists(values, what)
    if not isinstance(values, np.ndarray) or isinstance(values, np.ma.MaskedArray):
        raise _no_vectors(what, f"of the type {type(values).__name__}")
    if values.dtype.kind != "f":
        raise _no_vectors(what, f"of the dtype {values.dtype}")
    table = values[None] if values.ndim == 1 else values
    if table.ndim != 2 or not table.shape[1]:
        raise _no_vectors(what, f"of the shape {list(values.shape)}")
    if dimension is not None and table.shape[1] != dimension:
        raise DataError(
            f"The {what} are {table.shape[1]} wide.",
            f"Expected {dimension}, as the memory is.",
            "Make them with the same embedding, or start another memory for them.",
        )
    with np.errstate(over="ignore"):  # what does not fit into float32 becomes infinite, and is refused as such
        return np.ascontiguousarray(table, dtype=np.float32)


def checked(table: np.ndarray, metric: str, what: str = "vectors") -> np.ndarray:
    """Return the rows of a table as they are compared: copies of norm 1 under cosine, otherwise the table itself.

    Args:
        table: float32 ``[n, width]``.
        metric: One of `METRICS`.
        what: What they are, for the message.

    Raises:
        DataError: As for `lengths`.
    """
    return compared(table, lengths(table, metric, what), metric)


def lengths(table: np.ndarray, metric: str, what: str = "vectors") -> np.ndarray:
    """Return the norm of every row, float64 ``[n]``.

    Args:
        table: float32 ``[n, width]``.
        metric: One of `METRICS`.
        what: What they are, for the message.

    Raises:
        DataError: Entries that are not finite, a vector without direction under cosine, or one that is too long for
            squared distances under l2.
    """
    norms = np.empty(len(table))
    for start in range(0, len(table), BLOCK):
        # Torch asks for arrays that it could write to; others are copied, piece by piece.
        part = torch.from_numpy(np.require(table[start : start + BLOCK], requirements="W"))
        norms[start : start + BLOCK] = torch.linalg.vector_norm(part, dim=1)
    # A norm is finite unless an entry is not, or a square overflowed.
    odd = _odd(norms)
    broken = odd[~np.isfinite(table[odd]).all(axis=1)]
    if len(broken):
        raise DataError(
            f"{len(broken)} of {len(table)} {what} hold entries that are not finite in float32: {_listed(broken)}.",
            "Expected numbers: comparing with NaN or infinity has no answer.",
            "Find their cause in what made them.",
        )
    norms[odd] = np.sqrt(np.einsum("ij,ij->i", table[odd], table[odd], dtype=np.float64))
    if metric == "l2" and len(far := odd[norms[odd] > LONGEST]):
        raise DataError(
            f"{len(far)} of {len(table)} {what} are longer than {LONGEST:.0e}: {_listed(far)}.",
            "Expected vectors whose squared distances fit into float32.",
            "Scale them down, all by the same number.",
        )
    if metric == "cosine" and len(zero := odd[norms[odd] == 0]):
        raise DataError(
            f"{len(zero)} of {len(table)} {what} are zero: {_listed(zero)}.",
            "Expected a direction: a zero vector has no cosine with anything.",
            'Leave them out, or make the memory with metric="l2".',
        )
    return norms


def compared(table: np.ndarray, norms: np.ndarray, metric: str) -> np.ndarray:
    """Return `checked` of a table whose `lengths` are known."""
    if metric == "l2":
        return table
    unit = table.copy()
    # To copy and divide in place is faster than to divide into new memory, and torch is faster at it than NumPy.
    torch.from_numpy(unit).div_(torch.from_numpy(norms.astype(np.float32))[:, None])
    odd = _odd(norms)
    unit[odd] = table[odd] / norms[odd, None]
    return unit


def _odd(norms: np.ndarray) -> np.ndarray:
    """Return which norms float32 does not get right, or does not hold."""
    return np.flatnonzero(~((norms >= RELIABLE[0]) & (norms <= RELIABLE[1])))


def as_ids(values: Any, rows: int | None = None) -> np.ndarray:
    """Return ids as int64 ``[n]``.

    Args:
        values: Whole numbers: one, or a tensor, array or sequence of them.
        rows: How many there must be; None for any number.

    Raises:
        DataError: No whole numbers from 0 to `LAST_ID`, another number of them, or one given twice.
    """
    try:
        given = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        if isinstance(given, (str, bytes, Mapping)):
            raise TypeError
        array = np.atleast_1d(np.asarray(given if isinstance(given, (np.ndarray, int)) else list(given)))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        array = np.empty((1, 1), dtype=object)
    if not array.size and array.ndim == 1:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and int(array.min()) < 0):
        raise _no_ids(values)
    if array.size and int(array.max()) > LAST_ID:
        raise _no_ids(values)
    if rows is not None and len(array) != rows:
        raise DataError(
            f"There are {len(array)} ids for {rows} memories.",
            "Expected one id for each.",
            "Give as many ids, or none to have them chosen.",
        )
    ids = array.astype(np.int64)
    ordered = np.sort(ids)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        raise DataError(
            f"The ids hold some twice: {_listed(twice)}.", "Expected each once.", "Leave out the repetitions."
        )
    return ids


def as_metadata(metadata: Any, rows: int) -> list[dict[str, Any]]:
    """Return metadata as one dict of JSON values for each memory, copies of what was given.

    Args:
        metadata: A mapping for each memory or None where it has none; a single mapping stands for all.
        rows: How many memories.

    Raises:
        DataError: Another number of them, or values that do not come back from JSON as they are.
    """
    if metadata is None:
        return [{}] * rows
    if isinstance(metadata, Mapping):
        metadata = [metadata] * rows
    if not isinstance(metadata, Sequence) or isinstance(metadata, (str, bytes)):
        raise DataError(
            f"The metadata are of the type {type(metadata).__name__}.",
            "Expected a list with a mapping for each memory, or one mapping for all.",
            'Give, for example, [{"source": "notes.txt", "line": 3}, ...].',
        )
    if len(metadata) != rows:
        raise DataError(
            f"There are metadata for {len(metadata)} memories, and {rows} memories.",
            "Expected one mapping for each memory.",
            "Give None for those without metadata.",
        )
    plain = [{} if entry is None else entry for entry in metadata]
    if _is_flat(plain):
        return list(map(dict.copy, plain))
    bad = next((entry for entry in plain if not isinstance(entry, Mapping)), None)
    if bad is not None:
        raise _no_metadata(plain.index(bad), f"is of the type {type(bad).__name__}")
    plain = [entry if type(entry) is dict else dict(entry) for entry in plain]
    # All at once is many times faster than one by one; only what fails is looked at on its own.
    if _returned(plain) is None:
        for number, entry in enumerate(plain):
            if _returned(entry) is None:
                raise _no_metadata(number, f"holds what is no JSON value: {_shown(entry)}")
    copies: list[dict[str, Any]] = _returned(plain) or []
    return copies


def _is_flat(entries: list[dict[str, Any]]) -> bool:
    """Return whether all are dicts of what JSON returns as it is: texts, usual numbers, true, false and null by texts.

    Faster than to ask JSON; where it is not so, JSON is asked.
    """
    if set(map(type, entries)) != {dict} or not set(map(type, chain.from_iterable(entries))) <= {str}:
        return False
    values = list(chain.from_iterable(map(dict.values, entries)))
    if not set(map(type, values)) <= PLAIN:
        return False
    try:
        # One sum shows whether any is NaN, infinite or large.
        return sum(abs(value) for value in values if type(value) is not str and value is not None) < LARGE
    except OverflowError:
        return False


def _shown(entry: dict[str, Any]) -> str:
    """Return the beginning of an entry as text; Python writes no whole numbers of thousands of digits."""
    try:
        return str(entry)[:200]
    except (ValueError, RecursionError):
        return f"under the keys {', '.join(map(repr, entry))}"[:200]


def _returned(value: Any) -> Any:
    """Return what comes back from JSON; None when it is not the same or JSON cannot hold it."""
    try:
        back = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None
    # Keys that are no texts come back as texts, and tuples as lists.
    return back if back == value else None


def _from_lists(values: Any, what: str) -> np.ndarray:
    if values and all(isinstance(row, Tensor) and row.ndim == 1 for row in values):
        if len({len(row) for row in values}) > 1:
            raise _no_vectors(what, "tensors of unlike length")
        values = [row.detach().float().cpu().numpy() for row in values]
    try:
        array = np.array(values)
    except (TypeError, ValueError, OverflowError):
        raise _no_vectors(what, "lists that make no table") from None
    # A list written by hand may well say 1 for 1.0; an array of integers is likelier one of token ids.
    return array.astype(np.float64) if array.dtype.kind == "i" else array


def _listed(numbers: np.ndarray) -> str:
    shown = ", ".join(str(number) for number in numbers[:SHOWN].tolist())
    return f"number{'s' if len(numbers) > 1 else ''} {shown}" + (", ..." if len(numbers) > SHOWN else "")


def _no_vectors(what: str, found: str) -> DataError:
    return DataError(
        f"The {what} are {found}.",
        "Expected real floating-point numbers, [n, width], as a dense tensor, a NumPy array or nested lists.",
        "Turn texts, images or token ids into vectors first, or give the memory an embedder.",
    )


def _no_ids(values: Any) -> DataError:
    return DataError(
        f"The ids are {shown(values, 100)} of the type {type(values).__name__}.",
        "Expected whole numbers from 0 to 2^63 - 2, in one dimension.",
        "Keep names of your own in the metadata, or leave the ids out to have them chosen.",
    )


def _no_metadata(number: int, found: str) -> DataError:
    return DataError(
        f"The metadata of number {number} {found}.",
        "Expected a mapping of JSON values: texts as keys; texts, finite numbers, true, false, null, lists and such "
        "mappings as values.",
        "Convert tensors with tolist(), paths and dates with str(), tuples with list().",
    )
