"""Several references, or one table cut by a column, as one piece of prepared data that knows its parts.

What the parts share is decided by the first, because a stream of tasks does not know the later ones yet: tokenizer,
scale of numbers and pixels, columns of features. Classes are the exception: they are numbered over all parts, by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters.objectives import IGNORED
from utils.runtime.errors import DataError
from utils.training.class_union import ClassUnion, unite_classes
from utils.training.data_report import DataReport, class_counts, class_warnings
from utils.training.needs import Needs
from utils.training.prepared_data import PreparedData
from utils.training.references import parse_reference
from utils.training.tables import Table

MOST_PARTS = 100
"""A column with more values than this names no tasks."""
MOST_UNKNOWN = 0.5
"""Share of a part's tokens that may have no id of their own."""
SUMMED = ("documents", "duplicates_removed", "train_documents", "validation_documents", "train_tokens",
          "validation_tokens", "train_bytes", "validation_bytes", "samples")  # fmt: skip
"""Facts that are counts."""


def parts_of(value: object) -> list[tuple[str, object]] | None:
    """Return the parts that data was given as, with their names; None for anything but a list, a tuple or a dict.

    Raises:
        DataError: There are none, or two have the same name.
    """
    if isinstance(value, Mapping):
        named = [(str(name), one) for name, one in value.items()]
    elif isinstance(value, (list, tuple)):
        named = [(_short(one, number), one) for number, one in enumerate(value, 1)]
        taken = [name for name, _ in named]
        # Two files of one name in different folders: the whole reference tells them apart.
        named = [(str(one) if taken.count(name) > 1 else name, one) for name, one in named]
    else:
        return None
    if not named:
        raise DataError("The data is an empty list.", "Expected references, one for each part.", "Name at least two.")
    names = [name for name, _ in named]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"Two parts of the data have the name {twice!r}.",
            "Expected a different name for each part.",
            "Give the data as a dict from names to references.",
        )
    return named


def parts_reference(named: Sequence[tuple[str, object]], describe: Callable[[object], str]) -> str:
    """Return what identifies data of several parts in a run's record.

    Args:
        named: What `parts_of` returned.
        describe: Returns what identifies one part.
    """
    told = [(name, describe(one), _short(one, number)) for number, (name, one) in enumerate(named, 1)]
    return " + ".join(one if name in (short, one) else f"{name}={one}" for name, one, short in told)


def prepare_parts(
    named: Sequence[tuple[str, Any]],
    needs: Needs,
    reference: str,
    prepare: Callable[[Any, Needs], PreparedData],
    one_source: bool = False,
) -> PreparedData:
    """Prepare each part as the first one was, and join them in their order.

    Args:
        named: The parts with their names.
        needs: What the model needs.
        reference: What identifies all of it.
        prepare: Prepares one part.
        one_source: The parts are of one table, whose labels mean the same everywhere.

    Returns:
        One piece of data; ``facts["parts"]`` holds name, reference and counts of each part.

    Raises:
        DataError: A part cannot be prepared (its name is told), is too large for memory, or does not go with others.
    """
    found: list[tuple[str, PreparedData]] = []
    for number, (name, one) in enumerate(named, 1):
        like = found[0][1] if found else None
        try:
            if isinstance(one, PreparedData):
                raise DataError("It is prepared already.", "Expected a reference.", "Give what it was prepared from.")
            part = prepare(one, replace(needs, like=like, in_memory=True))
            _check(part, like)
        except DataError as error:
            raise DataError(
                f"Part {number} of the data ({name}) cannot be used. {error.found}", error.expected, error.action
            ) from error
        found.append((name, part))
    names = unite_classes(found, needs.num_labels, one_source) if "class_names" in found[0][1].facts else None
    return _joined(found, reference, names)


def divide(table: Table, column: str, held: Table | None = None) -> list[tuple[str, Table, Table | None]]:
    """Cut a table by the values of a column, in the order in which they first come; the column is left out.

    Args:
        table: The rows to train on.
        column: The column.
        held: Rows to measure on, where the source says so.

    Returns:
        Name and rows of each part.

    Raises:
        DataError: The column is not there, or does not divide the rows.
    """
    if column not in table.columns or (held is not None and column not in held.columns):
        raise DataError(
            f"{table.origin} has no column {column!r} in all of its rows.",
            f"Its columns are {', '.join(table.columns)}.",
            "Name another in the reference: ?task=COLUMN",
        )
    keys = _keys(table, column)
    values = list(dict.fromkeys(key for key in keys if key))
    if not 2 <= len(values) <= MOST_PARTS:
        raise DataError(
            f"The column {column!r} of {table.origin} holds {len(values):,} different values.",
            f"Expected 2 to {MOST_PARTS}: its rows become one task for each.",
            "Name another in the reference: ?task=COLUMN",
        )
    blank = sum(not key for key in keys)
    notes = [f"rows are divided by the column {column!r}"]
    notes += [f"{blank:,} rows without a value in it were left out"] if blank else []
    measured = [] if held is None else _keys(held, column)
    parts = []
    for value in values:
        part = _rows(table, [key == value for key in keys], column)
        if value == values[0]:
            part = replace(part, notes=[*part.notes, *notes])
        parts.append((value, part, None if held is None else _rows(held, [key == value for key in measured], column)))
    return parts


def _keys(table: Table, column: str) -> list[str]:
    """Return the value of each row as text; empty where there is none."""
    names = table.names.get(column, ())
    found = []
    for value in table.columns[column]:
        named = isinstance(value, int) and 0 <= value < len(names)
        found.append(str(names[value]) if named else "" if value is None or value != value else str(value).strip())
    return found


def _rows(table: Table, chosen: Sequence[bool], without: str) -> Table:
    """Return some rows of a table without a column."""
    columns = {
        name: [value for value, take in zip(values, chosen, strict=True) if take]
        for name, values in table.columns.items()
        if name != without
    }
    held = None if table.held is None else [out for out, take in zip(table.held, chosen, strict=True) if take]
    return replace(table, columns=columns, held=held)


def _short(value: object, number: int) -> str:
    """Return a short name of a part: that of its file, dataset or built-in text."""
    if not isinstance(value, str):
        return f"part {number}"
    try:
        reference = parse_reference(value)
    except DataError:
        # Told when the part is prepared.
        return f"part {number}"
    return Path(reference.name).name or reference.name


def _check(part: PreparedData, like: PreparedData | None) -> None:
    """Refuse a part that cannot be joined to the first one."""
    if part.stream is not None:
        raise DataError(
            f"{part.reference} is read while training.",
            "Expected samples that can be joined and divided into tasks before the first step.",
            "Leave out ?stream=true.",
        )
    unknown = part.report.unknown_share if part.report is not None else 0.0
    if unknown > MOST_UNKNOWN:
        raise DataError(
            f"{unknown:.0%} of its tokens have no id of their own in the tokenizer of the first part.",
            f"Expected at most {MOST_UNKNOWN:.0%}: the tokenizer is fixed before later parts are seen.",
            "Build the model with 257 or more token ids, which is enough for one that knows every byte.",
        )
    if like is None:
        return
    shapes = [
        {n: (t.dtype, t.shape[1:] if t.is_floating_point() else t.dim()) for n, t in one.train.items()}
        for one in (like, part)
    ]
    if shapes[0] != shapes[1]:
        told = [
            "; ".join(f"{n}: {list(t.shape[1:])} of {t.dtype}" for n, t in one.train.items()) for one in (part, like)
        ]
        raise DataError(
            f"Its samples are {told[0]}.",
            f"Expected those of the first part: {told[1]}.",
            "Build the model with the sizes of its input, or use parts of one kind.",
        )


def _joined(parts: Sequence[tuple[str, PreparedData]], reference: str, union: ClassUnion | None) -> PreparedData:
    """Join prepared parts in their order."""
    first = parts[0][1]
    sides: list[dict[str, Tensor]] = []
    for side in ("train", "validation"):
        pieces = [dict(getattr(part, side)) for _, part in parts]
        if union is not None:
            pieces = [{**p, "labels": m[p["labels"].long()]} for p, m in zip(pieces, union.maps, strict=True)]
        fill = 0 if first.tokenizer is None else first.tokenizer.fill_id
        sides.append({name: _stacked([piece[name] for piece in pieces], name, fill) for name in pieces[0]})
    facts = dict(first.facts)
    for name in SUMMED:
        if name in facts:
            facts[name] = sum(part.facts[name] for _, part in parts)
    if "zlib_bits_per_byte" in facts:
        bits = sum(part.facts["zlib_bits_per_byte"] * part.facts["validation_bytes"] for _, part in parts)
        facts["zlib_bits_per_byte"] = bits / max(1, facts["validation_bytes"])
        tokens = [part.facts["validation_tokens"] for _, part in parts]
        unknown = sum(part.facts["validation_unknown"] * n for (_, part), n in zip(parts, tokens, strict=True))
        facts["validation_unknown"] = unknown / max(1, sum(tokens))
    if "flips" in facts or any("flips" in part.facts for _, part in parts):
        facts["flips"] = all(part.facts.get("flips", True) for _, part in parts)
    report = _report(parts)
    if union is not None:
        train, held = (side["labels"].numpy() for side in sides)
        counts = torch.bincount(sides[1]["labels"])
        facts |= {"classes": len(union.names), "class_names": union.names,
                  "largest_class": float(counts.max() / counts.sum())}  # fmt: skip
        classes = class_counts(union.names, train, held)
        report = replace(
            report, classes=classes, notes=[*report.notes, union.reason],
            warnings=[*report.warnings, *class_warnings(classes)],
        )  # fmt: skip
    facts["parts"] = [
        {
            "name": name,
            "reference": part.reference,
            "train": part.train_samples,
            "validation": part.validation_samples,
            "columns": dict(part.facts.get("columns", {})),
            "unknown_share": part.report.unknown_share if part.report is not None else 0.0,
        }
        for name, part in parts
    ]
    return PreparedData(
        reference, first.task, sides[0], sides[1], first.tokenizer, {**facts, "report": report.to_dict()}
    )


def _stacked(tensors: Sequence[Tensor], name: str, fill: int) -> Tensor:
    """Join tensors by their first dimension, filled up to the widest; what is not predicted stays so."""
    if tensors[0].dim() != 2 or tensors[0].is_floating_point():
        return torch.cat(list(tensors))
    widest, value = max(tensor.shape[1] for tensor in tensors), IGNORED if name == "labels" else fill
    return torch.cat([functional.pad(tensor, (0, widest - tensor.shape[1]), value=value) for tensor in tensors])


def _report(parts: Sequence[tuple[str, PreparedData]]) -> DataReport:
    """Return one report of all parts: counts added up, and what is to be said about each under its name."""
    reports = [(name, part.report or DataReport("samples", part.train_samples, part.validation_samples))
               for name, part in parts]  # fmt: skip
    own = [report for _, report in reports]
    total = sum(report.train + report.validation for report in own)
    seen = [report.overlap for report in own if report.overlap is not None]
    notes = []
    for (name, part), report in zip(parts, own, strict=True):
        length = f", {report.lengths['median']:,} tokens in the middle" if report.lengths else ""
        told = f", {report.unknown_share:.2%} of the tokens unknown" if part.tokenizer is not None else ""
        notes.append(f"{name}: {report.train:,} {report.unit} to train, {report.validation:,} held out{length}{told}")
    if len({report.unit for report in own}) == 1:
        notes += [f"{name}: {note}" for name, report in reports for note in report.notes]
    overlap = None
    if len(seen) == len(own):
        overlap = {key: sum(one[key] for one in seen) for key in ("exact", "near", "checked")}
        overlap["searched_share"] = min(one["searched_share"] for one in seen)
        notes.append("overlap was looked for within each part, not between parts")
    if len(parts) > 1:
        notes.append("all parts have the tokenizer and the scales of the first: later ones are not known yet")
    deviations = [report.targets for report in own if report.targets is not None]
    return DataReport(
        own[0].unit, sum(r.train for r in own), sum(r.validation for r in own), sum(r.duplicates for r in own),
        sum(r.contradictions for r in own), None, sum(r.cut_units for r in own),
        sum(r.cut_share * (r.train + r.validation) for r in own) / max(1, total),
        sum(r.unknown_share * (r.train + r.validation) for r in own) / max(1, total),
        overlap, {}, deviations[0] if deviations else None, notes,
        [f"{name}: {warning}" for name, report in reports for warning in report.warnings]
        + [f"{name}: {report.unknown_share:.1%} of its tokens have no id in the tokenizer of the first part"
           for name, report in reports if report.unknown_share],
    )  # fmt: skip
