"""Tables: csv, jsonl and parquet files, and which of their columns matter.

A column is taken because the user named it, or because of its name or content; the reason is always told.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.runtime.errors import DataError
from utils.runtime.optional import require

NAMES = {
    "text": ("text", "content", "body", "document", "sentence", "article", "review", "message", "prompt", "story"),
    "label": ("label", "labels", "class", "category", "target", "y", "stars", "rating", "sentiment"),
    "source": ("source", "src", "input", "question", "article", "document", "text", "prompt", "en"),
    "target": ("target", "tgt", "output", "answer", "summary", "highlights", "completion", "response", "translation"),
    "number": ("target", "label", "y", "score", "value", "price", "rating", "stars", "labels"),
    "image": ("image", "img", "pixel_values", "picture"),
}
"""Usual names of columns, the likeliest first."""
WORDS = {
    "text": "text",
    "label": "the class",
    "source": "what is translated from",
    "target": "what is translated to",
    "number": "the number to predict",
    "image": "images",
}
SHOWN = 12


@dataclass(frozen=True)
class Table:
    """Named columns of equal length."""

    columns: dict[str, list[Any]]
    """Values by column."""
    origin: str
    """Where it is from, for messages."""
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What the whole numbers of a column stand for, where the source says so."""
    held: Sequence[bool] | None = None
    """Which rows are to be measured on, where the source says so."""
    notes: Sequence[str] = ()
    """What the data report should say about where the rows are from."""

    def held_of(self, rows: Sequence[int]) -> list[bool] | None:
        """Return which of some rows are to be measured on, or None when the source does not say."""
        return None if self.held is None else [self.held[row] for row in rows]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values()), []))


def joined(table: Table, held: Table) -> Table:
    """Return the rows to train on and those to measure on as one table that knows which are which."""
    names = dict.fromkeys([*table.columns, *held.columns])
    columns = {
        name: [*table.columns.get(name, [None] * len(table)), *held.columns.get(name, [None] * len(held))]
        for name in names
    }
    flags = [False] * len(table) + [True] * len(held)
    return Table(columns, table.origin, table.names, flags, table.notes)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a csv, tsv, jsonl or parquet file, a few at a time in memory.

    Raises:
        DataError: The file is damaged or of another form.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix == ".jsonl":
            with open(path, encoding="utf-8-sig") as stream:
                yield from _read_jsonl(path, stream)
        else:
            with open(path, encoding="utf-8-sig", newline="") as stream:
                yield from _read_csv(path, stream, "\t" if suffix == ".tsv" else None)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start} of a block).", "Expected a table in UTF-8.",
            f"Convert it, for example with: iconv -f LATIN1 -t UTF-8 {path.name} > utf8{path.suffix}",
        ) from error  # fmt: skip
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).", "Expected a readable file.") from error


def read_table(paths: Sequence[Path], samples: int | None = None) -> Table:
    """Read some files of rows as one table; a value that a row lacks is None.

    Raises:
        DataError: There is no row.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        for row in read_rows(path):
            rows.append(row)
            if samples is not None and len(rows) == samples:
                break
        if samples is not None and len(rows) == samples:
            break
    origin = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
    if not rows:
        raise DataError(f"{origin} is empty.", "Expected at least one row of data.")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name) for row in rows] for name in names}, origin)


def _read_jsonl(path: Path, lines: Any) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if "\0" in line:
            raise DataError(f"{path} is a binary file (it contains zero bytes).", "Expected one JSON object a line.")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"Line {number} of {path} is not JSON ({error}).", "Expected one JSON object a line.",
                "Mend or remove the line.",
            ) from error  # fmt: skip
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise DataError(
                f"Line {number} of {path} is a {type(value).__name__}.", 'Expected an object such as {"text": "..."}.'
            )
        # A translation is often kept as {"translation": {"en": ..., "de": ...}}.
        inner = value.get("translation")
        yield {**value, **inner} if isinstance(inner, dict) else value


def _read_csv(path: Path, stream: Any, delimiter: str | None) -> Iterator[dict[str, Any]]:
    start = stream.read(65536)
    if "\0" in start:
        raise DataError(f"{path} is a binary file (it contains zero bytes).", "Expected a table with commas.")
    stream.seek(0)
    if delimiter is None:
        header = start.split("\n", 1)[0]
        delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(stream, delimiter=delimiter)
    names = reader.fieldnames or []
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{path} has the column {twice[0]!r} twice.", "Expected each column name once.")
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    f"Line {reader.line_num} of {path} has more fields than the header ({len(names)}).",
                    "Expected as many fields in each line; a field with commas stands in quotes.",
                )
            yield row
    except csv.Error as error:
        raise DataError(f"Line {reader.line_num} of {path} cannot be read ({error}).", "Expected a table.") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    pyarrow = require("pyarrow", "read parquet files")
    parquet = require("pyarrow.parquet", "read parquet files", "pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} cannot be read as parquet ({str(error).splitlines()[0][:150]}).", "Expected a whole parquet file."
        ) from error


def choose_column(table: Table, role: str, chosen: Mapping[str, str], taken: Sequence[str] = ()) -> tuple[str, str]:
    """Choose a column.

    Args:
        table: The table.
        role: One of `NAMES`.
        chosen: Columns that the user named.
        taken: Columns that serve for something else.

    Returns:
        Its name and the reason.

    Raises:
        DataError: The column that the user named is not there, or none fits.
    """
    there = ", ".join(list(table.columns)[:SHOWN]) + (", ..." if len(table.columns) > SHOWN else "")
    options = ("target", "label") if role == "number" else (role,)
    for option in options:
        if option in chosen:
            if chosen[option] not in table.columns:
                raise DataError(
                    f"{table.origin} has no column {chosen[option]!r}.", f"Its columns are {there}.",
                    f"Name another in the reference: ?{option}=COLUMN",
                )  # fmt: skip
            return chosen[option], "named in the reference"
    free = [name for name in table.columns if name not in taken]
    lower = {name.lower(): name for name in reversed(free)}
    for usual in NAMES[role]:
        if usual in lower and (role not in ("text", "source", "target") or _is_text(table.columns[lower[usual]])):
            return lower[usual], "by its usual name"
    if role in ("text", "source", "target"):
        texts = [name for name in free if _is_text(table.columns[name])]
        if len(texts) == 1 or (role == "text" and texts):
            longest = max(texts, key=lambda name: _mean_length(table.columns[name]))
            return longest, "the only column of text" if len(texts) == 1 else "the column with the longest texts"
    elif role == "label" and len(free) == 1:
        return free[0], "the only other column"
    option = options[0]
    raise DataError(
        f"{table.origin} has no column that is plainly {WORDS[role]}; its columns are {there}.",
        f"Expected one named {', '.join(NAMES[role][:5])} or the like.",
        f"Name it in the reference: ?{option}=COLUMN",
    )


def _is_text(values: Sequence[Any]) -> bool:
    """Tell whether a column holds text: strings that are not all numbers."""
    some = [value for value in values[:200] if value not in (None, "")]
    return (
        bool(some) and all(isinstance(value, str) for value in some) and any(to_number(value) is None for value in some)
    )


def _mean_length(values: Sequence[Any]) -> float:
    some = [len(value) for value in values[:1000] if isinstance(value, str)]
    return sum(some) / max(1, len(some))


def to_number(value: Any) -> float | None:
    """Return a value as a number, or None when it is none."""
    if isinstance(value, bool):
        return float(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def texts_of(table: Table, column: str) -> list[str]:
    """Return a column of text, empty where a row has none.

    Raises:
        DataError: A value is no text, or holds half characters.
    """
    result = []
    for number, value in enumerate(table.columns[column], 1):
        text = "" if value is None else value if isinstance(value, str) else _plain(value)
        if text is None:
            raise DataError(
                f"The column {column!r} of {table.origin} holds a {type(value).__name__} in row {number}.",
                "Expected text.",
                "Name another column in the reference, for example ?text=COLUMN",
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode("utf-8")
        result.append(text)
    return result


def _plain(value: Any) -> str | None:
    return str(value) if isinstance(value, (int, float)) else None
