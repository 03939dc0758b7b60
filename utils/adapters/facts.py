"""Numbers about a model that its config, its embedding tables or a trial tell, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from utils.adapters.capture import named_tensors
from utils.adapters.detection import Detection, config_number
from utils.adapters.inputs import longest_length, table_sizes
from utils.adapters.tasks import LANGUAGE_MODELS
from utils.runtime.resources import LARGE_MODEL

LOOKAHEAD = 4

if TYPE_CHECKING:
    from utils.adapters.model_adapter import ModelAdapter


def reads_columns(adapter: ModelAdapter, inputs: Mapping[str, Tensor], output: Any) -> bool:
    """Tell whether a user's whole numbers are columns of a table: no part reads them as one, no answer per column."""
    main = inputs[adapter.main_input]
    if adapter.spec.example_inputs is None or main.dim() != 2 or main.shape[1] < 2 or adapter.spec.vocab_size:
        return False
    per_column = any(tensor.shape[:2] == main.shape for _, tensor in named_tensors(output) if tensor.dim() == 3)
    return not per_column and not any(table.reads == adapter.main_input for table in adapter.tables)


def find_vocab_size(adapter: ModelAdapter, shape: tuple[int, ...]) -> Detection[int | None]:
    """Return the number of legal token ids.

    Args:
        adapter: The model.
        shape: Shape of its main output for a batch of two; empty while it is not known.
    """
    if adapter.spec.vocab_size is not None:
        return Detection(adapter.spec.vocab_size, "stated in ModelSpec")
    if adapter.modality != "tokens":
        return Detection(None, f"the input is not token ids but {adapter.modality}")
    if (found := config_number(adapter.config, "vocab_size")) is not None:
        return Detection(found.value, found.reason)
    for use in adapter.tables:
        if use.reads_tokens:
            tie = " and the output is as wide" if shape[-1:] == (use.rows,) else ""
            reason = f"rows of the embedding `{use.name or adapter.name}` that reads the token ids{tie}"
            return Detection(use.rows, reason)
    if len(shape) == 3 and shape[-1] > 2:
        return Detection(shape[-1], "width of the output; no embedding was seen reading the token ids")
    return Detection(None, "no config entry, and no embedding was seen reading the token ids")


def find_pad_token_id(adapter: ModelAdapter) -> Detection[int | None]:
    """Return the token id that fills up short sequences."""
    if adapter.spec.pad_token_id is not None:
        return Detection(adapter.spec.pad_token_id, "stated in ModelSpec")
    if (found := config_number(adapter.config, "pad_token_id")) is not None and found.value >= 0:
        return Detection(found.value, found.reason)
    for use in adapter.tables:
        if use.reads_tokens and use.padding_idx is not None:
            return Detection(use.padding_idx, f"padding_idx of the embedding `{use.name}`")
    return Detection(None, "no config entry and no padding_idx")


def find_max_length(adapter: ModelAdapter) -> Detection[int | None]:
    """Return the longest legal sequence in tokens; None when there is no known limit."""
    if adapter.spec.max_length is not None:
        return Detection(adapter.spec.max_length, "stated in ModelSpec")
    if adapter.modality != "tokens":
        return Detection(None, f"the input is not a sequence of tokens but {adapter.modality}")
    tables = [use for use in adapter.tables if use.offset is not None and not use.reads_tokens]
    configured = config_number(adapter.config, "max_length")
    if configured is not None:
        for use in tables:
            # Tables like RoBERTa's reserve their first rows, and the config counts these too.
            if use.offset and use.rows == configured.value:
                reason = f"{configured.reason}, less the {use.offset} first rows of `{use.name}`"
                return _that_runs(adapter, use.rows - use.offset, reason)
        return Detection(configured.value, configured.reason)
    if tables:
        table = min(tables, key=lambda use: use.rows - (use.offset or 0))
        return Detection(table.rows - (table.offset or 0), f"rows of the position embedding `{table.name}`")
    if adapter.failure is not None:
        return Detection(None, "no forward pass succeeded")
    with adapter.isolated():
        return longest_length(adapter.run_length, adapter.probe_length, table_sizes(adapter.module))


def _that_runs(adapter: ModelAdapter, length: int, reason: str) -> Detection[int | None]:
    """Return a limit, or the one just below that runs: some read a few rows beyond the last position."""
    for shorter in range(length, length - LOOKAHEAD, -1) if adapter.num_parameters < LARGE_MODEL else ():
        try:
            adapter.run_length(shorter)
        except Exception:
            continue
        ahead = f" and {length - shorter} read ahead" if shorter < length else ""
        return Detection(shorter, reason + ahead)
    return Detection(length, reason)


def find_num_labels(adapter: ModelAdapter, shape: tuple[int, ...]) -> Detection[int | None]:
    """Return the number of classes or targets; None for language models.

    Args:
        adapter: The model.
        shape: As in `find_vocab_size`.
    """
    if adapter.spec.num_labels is not None:
        return Detection(adapter.spec.num_labels, "stated in ModelSpec")
    if adapter.task.value in LANGUAGE_MODELS:
        return Detection(None, "a language model predicts tokens")
    if (found := config_number(adapter.config, "num_labels")) is not None:
        return Detection(found.value, found.reason)
    if shape:
        return Detection(shape[-1] if len(shape) > 1 else 1, "width of the output")
    return Detection(None, "no config entry, and no forward pass succeeded")
