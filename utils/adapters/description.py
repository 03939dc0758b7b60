"""What an adapter found out, as a table for people."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from utils.adapters.detection import Detection
from utils.adapters.lengths import Lengths
from utils.runtime.resources import format_count

if TYPE_CHECKING:
    from utils.adapters.model_adapter import ModelAdapter


def facts(adapter: ModelAdapter) -> list[dict[str, Any]]:
    """Return every detected fact as a row ``{"name", "value", "reason"}``."""
    rows: list[dict[str, Any]] = [
        {"name": "inputs", "value": ", ".join(adapter.input_names), "reason": adapter.input_reason},
        *_loss_rows(adapter),
        {"name": "parameters", "value": adapter.num_parameters, "reason": "tensors used twice count once"},
    ]
    for name in ("task", "output", "vocab_size", "max_length", "num_labels", "pad_token_id", "image_shape"):
        detection: Detection[Any] = getattr(adapter, name)
        value = "the output itself" if name == "output" and detection.value == "" else detection.value
        if value is not None:
            rows.append({"name": name, "value": value, "reason": detection.reason})
    if adapter.lengths.value != Lengths():
        rows.append({"name": "lengths", "value": str(adapter.lengths.value), "reason": adapter.lengths.reason})
    return rows


def _loss_rows(adapter: ModelAdapter) -> list[dict[str, Any]]:
    """Return a row for each input of the example that is left to the loss."""
    reason = "no input: other labels change the loss that forward returns, or bring it about, and no score"
    return [{"name": "labels", "value": name, "reason": reason} for name in adapter.loss_inputs]


def summary(adapter: ModelAdapter) -> str:
    """Return class, task, size and inputs in one line."""
    task = "no forward pass succeeded" if adapter.failure is not None else adapter.task.value
    size = format_count(sum(p.numel() for p in adapter.module.parameters() if not is_lazy(p)))
    inputs = ", ".join(adapter.input_names) or "unknown"
    return f"ModelAdapter({adapter.name}, {task}, {size} parameters, inputs {inputs})"


def facts_page(adapter: ModelAdapter) -> str:
    """Return the facts and their reasons as HTML for a notebook."""
    return facts_table(adapter.name, adapter.describe(), str(adapter.module))


def facts_table(name: str, rows: Iterable[dict[str, Any]], layers: str) -> str:
    """Return HTML with a row per fact, its value and its reason, and the layers folded.

    Args:
        name: The model's class name.
        rows: ``{"name", "value", "reason"}`` each.
        layers: The module as text.
    """
    cell = "<td style='text-align:left;vertical-align:top'>"
    body = "".join(
        f"<tr>{cell}{html.escape(row['name'].replace('_', ' '))}</td>{cell}<b>{_text(row['value'])}</b></td>"
        f"{cell}{html.escape(str(row['reason']))}</td></tr>"
        for row in rows
    )
    head = "".join(f"<th style='text-align:left'>{title}</th>" for title in ("", html.escape(name), "how it is known"))
    return (
        f"<table><tr>{head}</tr>{body}</table>"
        f"<details><summary>layers</summary><pre>{html.escape(layers)}</pre></details>"
    )


def _text(value: Any) -> str:
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))
