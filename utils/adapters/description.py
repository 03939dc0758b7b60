"""What an adapter found out, as a table for people."""

import html
from collections.abc import Iterable
from typing import Any


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
