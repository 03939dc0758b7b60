"""Texts that each are a sample: with a class, with a number, or with the text they turn into.

Samples differ in length. They are kept at the length of the longest, with their own length beside, and `collate` cuts
each batch to the longest sample in it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.adapters.objectives import IGNORED
from utils.runtime.errors import DataError
from utils.tokenization import TextTokenizer
from utils.training.data_report import (
    DataReport,
    class_counts,
    class_warnings,
    describe_lengths,
    find_overlap,
)
from utils.training.labels import read_targets, standardised
from utils.training.needs import Needs
from utils.training.prepared_data import PreparedData
from utils.training.splitting import split_rows
from utils.training.tables import Table, choose_column, texts_of


def prepare_labelled(table: Table, columns: dict[str, str], needs: Needs, reference: str) -> PreparedData:
    """Prepare texts with a class, or with a number where the model's task is regression.

    Args:
        table: The rows.
        columns: Columns that the user named.
        needs: What the model needs.
        reference: Where the data is from.

    Raises:
        DataError: No column fits, or the labels do not fit the model.
    """
    regression = needs.task == "regression"
    label_role = "number" if regression else "label"
    named = [columns[name] for name in ("label", "target") if name in columns]
    text_column, text_reason = choose_column(table, "text", columns, named)
    label_column, label_reason = choose_column(table, label_role, columns, (text_column,))
    origin = f"The column {label_column!r} of {table.origin}"
    notes = [f"text is the column {text_column!r}: {text_reason}", f"labels are {label_column!r}: {label_reason}"]
    texts, values = texts_of(table, text_column), table.columns[label_column]
    found, usable = read_targets(values, regression, needs.num_labels, origin, table.names.get(label_column, ()))
    numbers, names = found.numbers, found.names
    notes += [found.reason] if found.reason else []
    usable &= np.array([bool(text.strip()) for text in texts], dtype=bool)
    warnings = [f"{(~usable).sum():,} rows have no text or no label and were left out"] if not usable.all() else []
    kept, contradictions = _without_repetitions(texts, numbers, usable)
    duplicates = int(usable.sum()) - len(kept)
    texts, numbers = [texts[index] for index in kept], numbers[kept]
    keys = [text.strip().encode() for text in texts]
    groups = None if regression else numbers
    held = split_rows(keys, groups, needs.share_of_samples, needs.seed, table.origin, table.held_of(kept))

    length = needs.length
    training = [text for text, out in zip(texts, held, strict=True) if not out]
    tokenizer = needs.tokenizer_for(training)
    encoded = tokenizer.encode(texts)
    ids, lengths = _padded([document[:length] for document in encoded], tokenizer.fill_id)
    facts: dict[str, Any] = {"length": length, "columns": {"text": text_column, label_role: label_column}}
    if regression:
        targets = standardised(numbers, ~held, origin, needs.like)
        labels = torch.from_numpy(targets.values)
        facts |= {"target_mean": targets.mean, "target_deviation": targets.deviation}
    else:
        labels = torch.from_numpy(numbers)
        facts |= {"classes": len(names), "class_names": names, "largest_class": _largest(numbers[held])}
    train, validation = _parts({"input_ids": ids, "lengths": lengths, "labels": labels}, held)
    classes = {} if regression else class_counts(names, numbers[~held], numbers[held])
    report = DataReport(
        "texts",
        int((~held).sum()),
        int(held.sum()),
        duplicates,
        contradictions,
        describe_lengths([len(document) for document in encoded]),
        *cut_off(encoded, length),
        unknown_share(tokenizer, encoded),
        find_overlap(training, [text for text, out in zip(texts, held, strict=True) if out]),
        classes,
        describe_targets(numbers) if regression else None,
        notes,
        warnings + class_warnings(classes),
    )
    return PreparedData(reference, needs.task, train, validation, tokenizer, {**facts, "report": report.to_dict()})


def prepare_pairs(table: Table, columns: dict[str, str], needs: Needs, reference: str) -> PreparedData:
    """Prepare pairs of texts for a model that turns one into the other.

    The decoder's input is the target moved right by one, behind the id that starts it; the label at each position is
    the target's token there, the id that ends it included.

    Args:
        table: The rows.
        columns: Columns that the user named.
        needs: What the model needs.
        reference: Where the data is from.

    Raises:
        DataError: No columns fit, or there are too few pairs.
    """
    named = [columns[name] for name in ("target", "source") if name in columns]
    target_column, target_reason = choose_column(table, "target", columns, named if "target" not in columns else ())
    source_column, source_reason = choose_column(table, "source", columns, (target_column,))
    sources, targets = texts_of(table, source_column), texts_of(table, target_column)
    usable = np.array([bool(a.strip() and b.strip()) for a, b in zip(sources, targets, strict=True)], dtype=bool)
    warnings = [f"{(~usable).sum():,} rows lack one of the two texts and were left out"] if not usable.all() else []
    first: dict[tuple[str, str], int] = {}
    for index in np.flatnonzero(usable):
        first.setdefault((sources[index], targets[index]), int(index))
    pairs = list(first)
    keys = [source.strip().encode() for source, _ in pairs]
    fixed = table.held_of(list(first.values()))
    held = split_rows(keys, None, needs.share_of_samples, needs.seed, table.origin, fixed)
    length = needs.length
    training = [text for pair, out in zip(pairs, held, strict=True) if not out for text in pair]
    tokenizer = needs.tokenizer_for(training)
    end = tokenizer.eos_id
    assert end is not None, "every tokenizer made by choose_tokenizer has one"
    start = next((n for n in (needs.decoder_start, tokenizer.pad_id) if n is not None and n < needs.vocabulary), end)
    encoded = [tokenizer.encode([pair[side] for pair in pairs]) for side in (0, 1)]
    inputs = [np.append(ids[: length - 1], end) for ids in encoded[0]]
    answers = [np.append(ids[: length - 1], end) for ids in encoded[1]]
    ids, lengths = _padded(inputs, tokenizer.fill_id)
    labels, target_lengths = _padded(answers, IGNORED)
    shifted, _ = _padded([np.concatenate([[start], answer[:-1]]) for answer in answers], tokenizer.fill_id)
    samples = {"input_ids": ids, "lengths": lengths, "decoder_input_ids": shifted, "labels": labels,
               "target_lengths": target_lengths}  # fmt: skip
    both = [*encoded[0], *encoded[1]]
    report = DataReport(
        "pairs",
        int((~held).sum()),
        int(held.sum()),
        int(usable.sum()) - len(pairs),
        len(pairs) - len({source for source, _ in pairs}),
        describe_lengths([len(document) for document in both]),
        *cut_off(both, length - 1),
        unknown_share(tokenizer, both),
        find_overlap(
            [source for (source, _), out in zip(pairs, held, strict=True) if not out],
            [source for (source, _), out in zip(pairs, held, strict=True) if out],
        ),
        notes=[
            f"source is the column {source_column!r}: {source_reason}",
            f"target is the column {target_column!r}: {target_reason}",
            f"the decoder starts with id {start}; each text ends with id {end}",
        ],
        warnings=warnings,
    )
    facts = {
        "length": length,
        "columns": {"source": source_column, "target": target_column},
        "decoder_start": start,
        "report": report.to_dict(),
    }
    train, validation = _parts(samples, held)
    return PreparedData(reference, needs.task, train, validation, tokenizer, facts)


def cut_off(encoded: Sequence[np.ndarray], length: int) -> tuple[int, float]:
    """Return how many texts are longer than `length` tokens, and the share of all tokens beyond it."""
    sizes = np.array([len(document) for document in encoded])
    beyond = np.maximum(sizes - length, 0)
    return int((beyond > 0).sum()), float(beyond.sum() / max(1, sizes.sum()))


def unknown_share(tokenizer: TextTokenizer, encoded: Sequence[np.ndarray]) -> float:
    """Return the share of tokens that have no id of their own."""
    if tokenizer.unknown_id is None:
        return 0.0
    total = sum(len(document) for document in encoded)
    return sum(int((document == tokenizer.unknown_id).sum()) for document in encoded) / max(1, total)


def describe_targets(numbers: np.ndarray) -> dict[str, float]:
    """Return mean, deviation and range of what is to be predicted."""
    return {
        "mean": float(numbers.mean()),
        "deviation": float(numbers.std()),
        "smallest": float(numbers.min()),
        "largest": float(numbers.max()),
    }


def _without_repetitions(texts: Sequence[str], numbers: np.ndarray, usable: np.ndarray) -> tuple[list[int], int]:
    """Return the first of all equal samples, and how many texts occur with different labels."""
    first: dict[tuple[str, float], int] = {}
    for index in np.flatnonzero(usable).tolist():
        first.setdefault((texts[index].strip(), float(numbers[index])), index)
    return list(first.values()), len(first) - len({text for text, _ in first})


def _padded(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Return rows at the length of the longest, int32, and their own lengths."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    if not lengths.all():
        raise DataError("A text has no token.", "Expected texts of at least one token each.")
    filled = np.full((len(rows), int(lengths.max())), fill, dtype=np.int32)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(filled), torch.from_numpy(lengths)


def _parts(samples: dict[str, Tensor], held: np.ndarray) -> list[dict[str, Tensor]]:
    """Return the training and the held-out samples."""
    return [{name: t[torch.from_numpy(mask)] for name, t in samples.items()} for mask in (~held, held)]


def _largest(numbers: np.ndarray) -> float:
    """Return the share of the largest class."""
    return float(np.bincount(numbers).max() / len(numbers))
