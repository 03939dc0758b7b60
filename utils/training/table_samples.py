"""Rows of numbers: with a class, or with a number to predict."""

from typing import Any

import numpy as np
import torch

from utils.runtime.errors import DataError
from utils.training.data_report import DataReport, class_counts, class_warnings
from utils.training.labels import read_numbers, read_targets, standardised
from utils.training.needs import Needs
from utils.training.prepared_data import PreparedData
from utils.training.splitting import split_rows
from utils.training.tables import Table, choose_column, to_number
from utils.training.text_samples import describe_targets

MOST_CATEGORIES = 32
"""Different words of a column that become columns of their own."""


def prepare_features(table: Table, columns: dict[str, str], needs: Needs, reference: str) -> PreparedData:
    """Prepare rows of a table: every column but the label is a feature.

    Numbers are brought to mean 0 and deviation 1 over the training rows, missing ones filled with the mean; a column of
    words becomes one column of 0 and 1 per word.

    Args:
        table: The rows.
        columns: Columns that the user named.
        needs: What the model needs.
        reference: Where the data is from.

    Raises:
        DataError: A column cannot be used, or the number of features is not the model's.
    """
    regression = needs.task == "regression"
    label_column, reason = choose_column(table, "number" if regression else "label", columns)
    origin = f"The column {label_column!r} of {table.origin}"
    notes = [f"labels are the column {label_column!r}: {reason}"]
    given, known = table.columns[label_column], table.names.get(label_column, ())
    found, usable = read_targets(given, regression, needs.num_labels, origin, known)
    numbers, names = found.numbers, found.names
    notes += [found.reason] if found.reason else []
    known_titles = None if needs.like is None else list(needs.like.facts["features"])
    values, titles = _features(table, label_column, known_titles)
    values, numbers = values[usable], numbers[usable]
    warnings = [f"{(~usable).sum():,} rows have no label and were left out"] if not usable.all() else []
    if needs.features is not None and values.shape[1] != needs.features:
        raise DataError(
            f"{table.origin} has {values.shape[1]} features beside {label_column!r} ({', '.join(titles[:8])}"
            f"{', ...' if len(titles) > 8 else ''}), and the model takes {needs.features}.",
            "Expected as many columns as the model has inputs.",
            f"Build the model for {values.shape[1]} features, or leave columns out of the file.",
        )
    _, first = np.unique(np.column_stack([np.nan_to_num(values, nan=np.inf), numbers]), axis=0, return_index=True)
    chosen = np.sort(first)
    duplicates = len(values) - len(chosen)
    values, numbers = values[chosen], numbers[chosen]
    keys = [row.tobytes() for row in values]
    rows = np.flatnonzero(usable)[chosen].tolist()
    groups = None if regression else numbers
    held = split_rows(keys, groups, needs.share_of_samples, needs.seed, table.origin, table.held_of(rows))
    if needs.like is not None:
        scale = np.array(needs.like.facts["feature_means"]), np.array(needs.like.facts["feature_deviations"])
    else:
        scale = _scale(values[~held])
    filled, missing = _standardised(values, *scale)
    if missing:
        warnings.append(f"{missing:,} missing values were filled with the mean of their column")
    facts: dict[str, Any] = {
        "features": titles, "columns": {"label": label_column}, "feature_means": scale[0].tolist(),
        "feature_deviations": scale[1].tolist(),
    }  # fmt: skip
    if regression:
        targets = standardised(numbers, ~held, origin, needs.like)
        labels = torch.from_numpy(targets.values)
        facts |= {"target_mean": targets.mean, "target_deviation": targets.deviation}
    else:
        labels = torch.from_numpy(numbers)
        counts = np.bincount(numbers[held])
        facts |= {"classes": len(names), "class_names": names, "largest_class": float(counts.max() / counts.sum())}
    features = torch.from_numpy(filled)
    parts = [{"features": features[mask], "labels": labels[mask]} for mask in map(torch.from_numpy, (~held, held))]
    classes = {} if regression else class_counts(names, numbers[~held], numbers[held])
    report = DataReport(
        "rows", int((~held).sum()), int(held.sum()), duplicates, len(keys) - len(set(keys)), classes=classes,
        targets=describe_targets(numbers) if regression else None, notes=notes,
        warnings=[*warnings, *class_warnings(classes)],
    )  # fmt: skip
    return PreparedData(reference, needs.task, parts[0], parts[1], None, {**facts, "report": report.to_dict()})


def _features(table: Table, label: str, wanted: list[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Return all columns but the label, float64 ``(rows, features)`` with nan for missing values, and their names.

    Args:
        table: The rows.
        label: The column that is predicted.
        wanted: The features of a first part; a column of words then has those words, and no row any other.
    """
    found: list[np.ndarray] = []
    titles: list[str] = []
    for name, values in table.columns.items():
        if name == label:
            continue
        blank = [value is None or (isinstance(value, str) and not value.strip()) for value in values]
        known = None if wanted is None else [one for one in wanted if one.startswith(f"{name}=")]
        numeric = all(empty or to_number(value) is not None for value, empty in zip(values, blank, strict=True))
        if numeric and not known:
            found.append(read_numbers(values, f"The column {name!r} of {table.origin}"))
            titles.append(name)
            continue
        words = ["" if empty else str(value).strip() for value, empty in zip(values, blank, strict=True)]
        categories = [one.removeprefix(f"{name}=") for one in known] if known else sorted(set(words) - {""})
        if len(categories) > MOST_CATEGORIES:
            raise DataError(
                f"The column {name!r} of {table.origin} holds {len(categories):,} different texts.",
                f"Expected numbers, or at most {MOST_CATEGORIES} different words.",
                "Leave the column out of the file, or encode it as numbers.",
            )
        found += [np.array([word == category for word in words], dtype=np.float64) for category in categories]
        titles += [f"{name}={category}" for category in categories]
    if not found:
        raise DataError(f"{table.origin} has the one column {label!r}.", "Expected features beside the label.")
    if wanted is not None and sorted(titles) != sorted(wanted):
        raise DataError(
            f"{table.origin} has the features {', '.join(titles[:8])}{', ...' if len(titles) > 8 else ''}.",
            f"Expected those of the first part: {', '.join(wanted[:8])}{', ...' if len(wanted) > 8 else ''}.",
            "Give all parts the same columns, with numbers in the same of them.",
        )
    order = range(len(titles)) if wanted is None else [titles.index(one) for one in wanted]
    return np.column_stack([found[place] for place in order]), wanted or titles


def _scale(training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of each feature over the training rows, missing values aside."""
    present = ~np.isnan(training)
    count = np.maximum(present.sum(0), 1)
    mean = np.where(present, training, 0).sum(0) / count
    deviation = np.sqrt((np.where(present, training - mean, 0) ** 2).sum(0) / count)
    return mean, deviation


def _standardised(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, int]:
    """Return features at a scale, and how many values were missing."""
    scaled = (values - mean) / np.where(deviation > 0, deviation, 1)
    return np.nan_to_num(scaled, nan=0.0).astype(np.float32), int(np.isnan(values).sum())
