"""The growth of a run's model as rows of plain values, for reports, trackers and curves.

What grows a model lies above training, so its record (``growth.json`` in the run directory) is read here as the JSON
that it is. A record that is missing or damaged is no fault of the run: what shows it says so and goes on.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from utils.runtime.files import untag_nonfinite

LINEAGE = "growth.json"
"""Name of the lineage in a run directory, for people; what a resume reads is in the checkpoints."""
COLUMNS = (
    "step", "operator", "where", "from", "to", "parameters", "promise", "difference", "loss_jump", "seconds", "why",
)  # fmt: skip
"""Keys of a row, in order."""
SHOWN_PLACES = 3
NUMBERS = ("#", "step", "parameters", "change of the answers", "change of the loss", "time")
"""Headings of the table whose columns are set to the right."""


@dataclass(frozen=True)
class GrowthRows:
    """What a run's directory says about the growth of its model."""

    rows: tuple[dict[str, Any], ...] = ()
    """One per event, see `table_rows`; empty when the model never grew."""
    problem: str | None = None
    """Why the record cannot be read; None when it can, or when there is none."""

    @property
    def marks(self) -> list[tuple[int, str]]:
        """Step and name of each event while the run was trained, for vertical lines in its curves."""
        return [
            (row["step"], f"{number}: {said_growth(row)}") for number, row in enumerate(self.rows, 1) if row["step"]
        ]

    @property
    def parameters(self) -> int | None:
        """Number of parameters after the last event; None when there was none."""
        return self.rows[-1]["parameters"] if self.rows else None


def read_growth(directory: str | Path, parameters: int | None = None) -> GrowthRows:
    """Read the growth of a run.

    Args:
        directory: The run.
        parameters: How many the model had when the run was started; tells which events are older than the run.
    """
    try:
        text = (Path(directory) / LINEAGE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return GrowthRows()
    except (OSError, ValueError) as error:
        return GrowthRows(problem=f"{LINEAGE} cannot be read ({type(error).__name__}).")
    try:
        events = untag_nonfinite(json.loads(text))["events"]
        return GrowthRows(tuple(table_rows(events, events_before(events, parameters))))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        return GrowthRows(problem=f"{LINEAGE} cannot be read ({type(error).__name__}).")


def events_before(events: Sequence[Mapping[str, Any]], parameters: int | None = None) -> int:
    """Return how many events of a lineage the model had behind it when its run was started.

    A model that has grown in one run may be trained in another, whose steps begin at zero again. Growth only adds, and
    a beginning with fewer blocks comes before the first step of a run, so the number of parameters tells.

    Args:
        events: As `growth.json` holds them.
        parameters: How many the model had when the run was started; None when that is not known.
    """
    first = max((number for number, event in enumerate(events, 1) if event["certificate"] is None), default=0)
    sizes = [event["parameters_before"] for event in events[:1]] + [event["parameters_after"] for event in events]
    return next((number for number in range(first, len(sizes)) if sizes[number] == parameters), first)


def table_rows(events: Iterable[Mapping[str, Any]], before: int = 0) -> list[dict[str, Any]]:
    """Return events as rows of plain values with the keys `COLUMNS`.

    ``step`` is None for an event of an earlier run; ``difference`` is the largest change of an answer as a share of
    their size, zero when all were equal bit for bit; ``loss_jump`` is in nats. Both are None where nothing was
    measured.

    Args:
        events: As `growth.json` holds them.
        before: The number of events that are older than the run.

    Raises:
        KeyError, TypeError, ValueError: They are not that.
    """
    rows = []
    for number, event in enumerate(events, 1):
        plan, certificate = event["plan"], event["certificate"]
        older = number < before or (number == before and certificate is not None)
        jump = difference = None
        if certificate is not None:
            difference = _finite(certificate["difference"])
            if certificate["loss_before"] is not None and certificate["loss_after"] is not None:
                jump = _finite(certificate["loss_after"] - certificate["loss_before"])
        places = [str(place) for place in plan["where"]]
        more = len(places) - SHOWN_PLACES
        rows.append(
            {
                "step": None if older else int(event["step"]),
                "operator": str(plan["operator"]),
                "where": ", ".join(places[:SHOWN_PLACES]) + (f" and {more} more" if more > 0 else ""),
                "from": int(plan["before"]),
                "to": int(plan["after"]),
                "parameters": int(event["parameters_after"]),
                "promise": str(plan["promise"]),
                "difference": difference,
                "loss_jump": jump,
                "seconds": float(event["seconds"]),
                "why": str(event["why"]),
            }
        )
    return rows


def _finite(value: Any) -> float | None:
    """Return a measured number; None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def said_growth(row: Mapping[str, Any]) -> str:
    """Say what grew from which size to which."""
    return f"{row['operator'].replace('_', ' ')} {row['from']:,} → {row['to']:,}"


def said_difference(row: Mapping[str, Any]) -> str:
    """Say what the event did to the answers."""
    if row["difference"] is None:
        return "untrained"
    return "bit-equal" if row["difference"] == 0 else f"{row['difference']:.1e}"


def said_jump(row: Mapping[str, Any]) -> str:
    """Say by how much the loss changed, in nats."""
    if row["loss_jump"] is None:
        return ""
    return "0" if row["loss_jump"] == 0 else f"{row['loss_jump']:+.1e}"


def said_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return rows as text under readable headings."""
    return [
        {
            "#": str(number),
            "step": "earlier run" if row["step"] is None else f"{row['step']:,}",
            "what grew": said_growth(row),
            "parameters": f"{row['parameters']:,}",
            "promise": row["promise"],
            "change of the answers": said_difference(row),
            "change of the loss": said_jump(row),
            "time": f"{row['seconds']:.2f} s",
            "where": row["where"],
            "why": row["why"],
        }
        for number, row in enumerate(rows, 1)
    ]


def growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table in the style of the run report; empty when there are none."""
    said = said_rows(rows)
    if not said:
        return ""
    kinds = dict.fromkeys(NUMBERS, ' class="number"') | {"where": ' class="wrap"', "why": ' class="wrap"'}
    head = "".join(f"<th{kinds.get(name, '') if name in NUMBERS else ''}>{escape(name)}</th>" for name in said[0])
    body = "".join(
        f"<tr>{''.join(f'<td{kinds.get(name, str())}>{escape(text)}</td>' for name, text in row.items())}</tr>"
        for row in said
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def growth_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table in Markdown; empty when there are none."""
    said = said_rows(rows)
    return markdown_table(list(said[0]), [list(row.values()) for row in said]) if said else ""


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return headings and rows of text as a table in Markdown."""
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in line] for line in (head, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * len(head), *cells[1:]))
