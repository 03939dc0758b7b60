"""What a run learned task after task as rows of plain values, for reports, trackers and model cards.

What makes a run learn task after task lies above training, so its record (``accuracy_matrix.json`` in the run's
directory) is read here as the JSON that it is. A record that is missing or damaged is no fault of the run: what shows
it says so and goes on. The numbers are those of `utils.continual.accuracy_matrix`, which defines them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from utils.runtime.files import untag_nonfinite
from utils.training.growth_rows import markdown_table

MATRIX = "accuracy_matrix.json"
"""Name of the record in a run directory."""
KIND, VERSION = "accuracy_matrix", 1
COLUMNS = ("after", "step", "learned", "average", "forgetting", "seconds", "stored_samples")
"""Keys of a row, in order; ``scores`` comes with them."""
WIDEST, NAME_LENGTH = 20, 18
"""Tasks up to which tables show the score on each of them, and characters of a name in them."""
STRONGEST = 55
"""Percent of colour behind the best score of a table."""
UNITS = {"accuracy": ("accuracy", " %", " points"), "nats": ("loss", " nats", " nats")}
"""What scores of a unit are called, and what comes after a score and after a difference of two."""


@dataclass(frozen=True)
class TaskRows:
    """What a run's directory says about the tasks that it learned."""

    tasks: tuple[str, ...] = ()
    """Names of all tasks of the stream."""
    rows: tuple[dict[str, Any], ...] = ()
    """Before training, after each task and after all at once, as far as measured; see `table_rows`."""
    unit: str = "accuracy"
    """``accuracy`` (shares from 0 to 1), ``nats`` or another word."""
    higher_is_better: bool = True
    """False for losses."""
    problem: str | None = None
    """Why the record cannot be read; None when it can, or when there is none."""

    @property
    def learned(self) -> tuple[dict[str, Any], ...]:
        """The rows after a task of the stream."""
        return tuple(row for row in self.rows if row["number"])

    @property
    def newest(self) -> dict[str, Any] | None:
        """The row after the last task, or after all tasks at once; None as long as nothing was learned."""
        return next((row for row in reversed(self.learned or self.rows) if row["number"] != 0), None)

    @property
    def headline(self) -> dict[str, float]:
        """The average score and the forgetting now under their names, those left out that are not defined."""
        newest = self.newest or {}
        named = {f"average_{self.name}": newest.get("average"), "forgetting": newest.get("forgetting")}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def name(self) -> str:
        """What a score is called."""
        return UNITS.get(self.unit, ("score", "", ""))[0]

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings of `values`."""
        return (*COLUMNS, *(f"on {task}" for task in self.shown))

    @property
    def values(self) -> list[list[Any]]:
        """Rows as lists under `columns`; None where nothing was measured."""
        return [[*(row[name] for name in COLUMNS), *row["scores"][: len(self.shown)]] for row in self.rows]

    @property
    def shown(self) -> tuple[str, ...]:
        """The tasks whose scores have a column each: all or, when they are too many, none."""
        return self.tasks if len(self.tasks) <= WIDEST else ()

    def said(self, value: float | None, places: int = 1) -> str:
        """Return a score or a difference as text: accuracies in percent; a dash where nothing was measured."""
        if value is None:
            return "–"
        return f"{100 * value:.{places}f}" if self.unit == "accuracy" else f"{value:.{places + 1}f}"

    @property
    def sentence(self) -> str:
        """How far the stream is and how well it went, without a full stop; empty when nothing was learned."""
        newest, (name, unit, points) = self.newest, UNITS.get(self.unit, (self.unit, "", ""))
        if newest is None:
            return ""
        count, way = len(self.tasks), "at once" if newest["number"] is None else "one after another"
        finished = f"{newest['number']} of {count}" if (newest["number"] or count) < count else str(count)
        text = f"Learned {finished} task{'s' * (count > 1)} {way}: average {name} {self.said(newest['average'])}{unit}"
        if newest["forgetting"] is None:
            return text
        return f"{text}, forgetting {self.said(newest['forgetting'])}{points}"


def read_tasks(directory: str | Path) -> TaskRows:
    """Read what a run learned task after task."""
    try:
        text = (Path(directory) / MATRIX).read_text(encoding="utf-8")
    except FileNotFoundError:
        return TaskRows()
    except (OSError, ValueError) as error:
        return TaskRows(problem=f"{MATRIX} cannot be read ({type(error).__name__}).")
    try:
        values = json.loads(text)
        if values["kind"] != KIND or values["version"] != VERSION:
            of = f"{values['kind']!r}, version {values['version']!r}"[:80]
            return TaskRows(problem=f"{MATRIX} is of the kind {of}; this Seedbed reads {KIND!r}, version {VERSION}.")
        values = untag_nonfinite(values)
        tasks, unit, up = values["tasks"], values["unit"], values["higher_is_better"]
        fitting = isinstance(tasks, list) and isinstance(unit, str) and isinstance(up, bool)
        if not fitting or not all(isinstance(task, str) for task in tasks) or not 0 < len(set(tasks)) == len(tasks):
            raise ValueError
        # Half a surrogate pair is a string in JSON and in no file.
        "".join((*tasks, unit)).encode()
        return TaskRows(tuple(tasks), tuple(table_rows(values)), unit, up)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        return TaskRows(problem=f"{MATRIX} cannot be read ({type(error).__name__}).")


def table_rows(matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a matrix as rows of plain values with the keys ``number``, ``scores`` and `COLUMNS`.

    ``number`` counts the tasks learned, 0 before any training and None for all at once; ``scores`` are those on each
    task of the stream, ``learned`` the one on the row's own task; ``average`` is over the tasks learned, ``forgetting``
    over those before the last: how much better the best earlier row was. Seconds are of the task alone. What was not
    measured, or is not defined, is None.

    Args:
        matrix: As `accuracy_matrix.json` holds it, numbers that are not finite put back.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is not that.
    """
    tasks, sign, shares = matrix["tasks"], 1 if matrix["higher_is_better"] else -1, matrix["unit"] == "accuracy"
    scores = [_scores(row, len(tasks), shares) for row in matrix["rows"]]
    costs, ends = matrix["costs"] or [{}] * len(scores), matrix["ends"] or [None] * len(scores)
    if len(scores) > len(tasks):
        raise ValueError
    rows = []
    if matrix["untrained"] is not None:
        rows.append(_row(0, "untrained", _scores(matrix["untrained"], len(tasks), shares)))
    best = [math.nan] * len(tasks)
    for number, (row, cost, end) in enumerate(zip(scores, costs, ends, strict=True), 1):
        lost = [best[j] - row[j] * sign for j in range(number - 1)]
        best = [max((x for x in (b, r * sign) if not math.isnan(x)), default=b) for b, r in zip(best, row, strict=True)]
        rows.append({
            **_row(number, tasks[number - 1], row),
            "step": None if end is None else int(end),
            "learned": _known(row[number - 1]),
            "average": _known(sum(row[:number]) / number),
            "forgetting": _known(sum(lost) / len(lost)) if lost else None,
            "seconds": None if cost.get("seconds") is None else float(cost["seconds"]),
            "stored_samples": None if cost.get("stored_samples") is None else int(cost["stored_samples"]),
        })  # fmt: skip
    if matrix["joint"] is not None:
        joint = _scores(matrix["joint"], len(tasks), shares)
        rows.append(_row(None, "all at once", joint) | {"average": _known(sum(joint) / len(joint))})
    return rows


def _row(number: int | None, after: str, scores: Sequence[float]) -> dict[str, Any]:
    """Return a row of which no more is known than the scores."""
    empty: dict[str, Any] = dict.fromkeys(COLUMNS)
    return {"number": number, "scores": tuple(map(_known, scores)), **empty, "after": after}


def _scores(values: Any, count: int, shares: bool) -> list[float]:
    """Return scores, NaN where not measured; a record that holds anything else is not one."""
    if not isinstance(values, list) or len(values) != count or any(type(value) not in (int, float) for value in values):
        raise ValueError
    scores = [float(value) for value in values]
    if shares and not all(0 <= score <= 1 for score in scores if not math.isnan(score)):
        raise ValueError
    return scores


def _known(value: float) -> float | None:
    """Return a score; None where nothing was measured. An infinite loss is a measurement."""
    return None if math.isnan(value) else value


def _lines(record: TaskRows) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows as text, the scores on the shown tasks right after the name of the row."""
    head = ["after", *(_cut(f"on {task}") for task in record.shown)]
    head += [*(() if record.shown else ("on this task",)), "average", "forgetting", "time", "kept samples"]
    lines = []
    for row in record.rows:
        scores = row["scores"][: len(record.shown)] if record.shown else (row["learned"],)
        line = [_cut(row["after"]), *map(record.said, (*scores, row["average"], row["forgetting"]))]
        line.append("" if row["seconds"] is None else f"{row['seconds']:.1f} s")
        line.append("" if row["stored_samples"] is None else f"{row['stored_samples']:,}")
        lines.append(line)
    return head, lines


def _cut(name: str) -> str:
    """Return a name, the middle of a long one left out: names of one stream often begin or end alike."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[1 - half :]}"


def tasks_table(record: TaskRows) -> str:
    """Return rows as an HTML table in the style of the run report; empty when there are none.

    Behind each score is a colour, stronger for a better one: from 0 to 1 for accuracies, else from the worst to the
    best of the table. Scores on tasks that were not learned yet are fainter.
    """
    if not record.rows:
        return ""
    head, lines = _lines(record)
    titles = ["", *record.shown, *[""] * (len(head) - 1 - len(record.shown))]
    heads = [_cell("th", name, bool(place), titles[place]) for place, name in enumerate(head)]
    finite = [score for row in record.rows for score in row["scores"] if score is not None and math.isfinite(score)]
    low, high = (0.0, 1.0) if record.unit == "accuracy" else (min(finite, default=0.0), max(finite, default=0.0))
    body = []
    for row, line in zip(record.rows, lines, strict=True):
        cells = [_cell("td", line[0], title=row["after"])]
        for place, text in enumerate(line[1:]):
            score = row["scores"][place] if place < len(record.shown) else None
            if score is None:
                cells.append(_cell("td", text, True))
                continue
            share = (min(max(score, low), high) - low) / (high - low) if high > low else 0.0
            percent = STRONGEST * (share if record.higher_is_better else 1 - share)
            early = row["number"] is not None and place >= row["number"]
            colour = f"background:color-mix(in srgb,var(--c1) {percent:.0f}%,transparent)"
            cells.append(_cell("td", text, True, soft=early, style=colour))
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="tasks">{table}</table></div>'


def _cell(tag: str, text: str, number: bool = False, title: str = "", soft: bool = False, style: str = "") -> str:
    """Return a cell of a table; a title that only repeats its text is left out."""
    classes = " ".join(name for name, wanted in (("number", number), ("soft", soft)) if wanted)
    wanted = {"class": classes, "title": title if title != text else "", "style": style}
    attributes = "".join(f' {name}="{escape(value)}"' for name, value in wanted.items() if value)
    return f"<{tag}{attributes}>{escape(text)}</{tag}>"


def tasks_markdown(record: TaskRows) -> str:
    """Return rows as a table in Markdown; empty when there are none."""
    return markdown_table(*_lines(record)) if record.rows else ""


def said_method(settings: Mapping[str, Any]) -> str:
    """Name the method of a run from its settings, which need not hold what a default decides."""
    continual = settings.get("continual")
    named = continual.get("method") if isinstance(continual, Mapping) else None
    return f"method {named}" if isinstance(named, str) else "the default method"
