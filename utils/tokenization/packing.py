"""Documents to windows of equal length, with every token predicted exactly once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.adapters.objectives import IGNORED
from utils.runtime.errors import DataError


def join_documents(documents: Sequence[np.ndarray], eos_id: int) -> np.ndarray:
    """Join documents into one stream with `eos_id` before the first and after each.

    The one at the very start lets the first token of the first document be predicted like any other.
    """
    separator = np.array([eos_id], dtype=np.int64)
    parts = [separator]
    for document in documents:
        parts += [document, separator]
    return np.concatenate(parts).astype(np.int64)


def pack_causal(
    documents: Sequence[np.ndarray], length: int, eos_id: int, fill_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pack documents for next-token prediction; labels are already aligned with the inputs.

    Args:
        documents: Token ids of each document, shape (tokens,).
        length: Tokens in a window.
        eos_id: Id placed between documents.
        fill_id: Id after the end of the last window; its label is `IGNORED`. Default `eos_id`.

    Returns:
        Inputs and labels, int64, both of shape (windows, length). ``labels[n, i]`` is the token that follows
        ``inputs[n, i]`` in the stream; the windows do not overlap, and the last label of one window is the first input
        of the next.
    """
    _check_length(length)
    stream = join_documents(documents, eos_id)
    inputs = _windows(stream[:-1], length, eos_id if fill_id is None else fill_id)
    return inputs, _windows(stream[1:], length, IGNORED)


def pack_masked(
    documents: Sequence[np.ndarray], length: int, eos_id: int, fill_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pack documents for masked language modelling; nothing is masked yet (see `mask_tokens`).

    Returns:
        Inputs and labels, int64, both of shape (windows, length): the same ids, except that the labels after the end of
        the last window are `IGNORED`.
    """
    _check_length(length)
    stream = join_documents(documents, eos_id)
    return _windows(stream, length, eos_id if fill_id is None else fill_id), _windows(stream, length, IGNORED)


def document_positions(input_ids: Tensor, eos_id: int) -> Tensor:
    """Return each token's position in its own document, for models that can be told.

    The `eos_id` between two documents counts as the first token of the one after it: it is what that document's first
    token is predicted from. A document that began in an earlier window starts at 0 here, so that no position exceeds
    the window.

    Args:
        input_ids: Packed token ids, shape (batch, length).
        eos_id: Id placed between documents.

    Returns:
        Positions, int64, shape (batch, length).
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = torch.where(input_ids == eos_id, index, 0).cummax(dim=1).values
    return index - starts


def _windows(stream: np.ndarray, length: int, fill: int) -> Tensor:
    """Cut a stream into rows, the last one filled up. Shape (windows, length)."""
    count = -(-len(stream) // length)
    rows = np.full(count * length, fill, dtype=np.int64)
    rows[: len(stream)] = stream
    return torch.from_numpy(rows).view(count, length)


def _check_length(length: int) -> None:
    if length < 1:
        raise DataError(f"The window length is {length}.", "Expected at least one token.")
