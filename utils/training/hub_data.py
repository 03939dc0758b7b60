"""Datasets of the Hub, and datasets given as objects, as tables.

The Hub is read as a stream: nothing is downloaded that is not used. A dataset that is prepared before training is cut
at `MOST_SAMPLES` rows unless the reference says ``?samples=N``; a text can also be read while training
(``?stream=true``).
"""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from utils.runtime.errors import DataError
from utils.runtime.optional import require
from utils.runtime.secrets import find_secret
from utils.tokenization.pretrained import hub_unreachable
from utils.training.references import DataReference
from utils.training.tables import Table, choose_column, texts_of

MOST_SAMPLES = 100_000
"""Rows of a dataset that are taken unless the user says otherwise."""
MOST_BYTES = 500_000_000
"""Characters of text that are taken, whatever the number of rows."""
LOOKED_AT = 200
HELD_OUT_SPLITS = ("validation", "valid", "dev", "test")


def is_dataset(value: object) -> bool:
    """Tell whether a value is a dataset, or a dict of datasets, of the datasets library, without importing it."""
    return any(
        kind.__module__.partition(".")[0] == "datasets"
        and kind.__name__ in ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
        for kind in type(value).__mro__
    )


def is_data_module(value: object) -> bool:
    """Tell whether a value is a LightningDataModule, without importing Lightning."""
    return any(kind.__name__ == "LightningDataModule" for kind in type(value).__mro__)


def refuse_data_module(value: object) -> DataError:
    """Return the error that says what to give instead of a LightningDataModule."""
    return DataError(
        f"{type(value).__name__} is a LightningDataModule.",
        "Expected data whose order can be told from a seed and a position: a run that is killed must continue with the "
        "very next sample, and a data module hands out batches in an order of its own.",
        "Give what it reads: file:PATH, hub:owner/name, or its datasets.Dataset.",
    )


def hub_tables(reference: DataReference) -> tuple[Table, Table | None]:
    """Read a dataset of the Hub.

    Returns:
        The rows to train on, and those to measure on where the user named a split for it.

    Raises:
        DataError: It cannot be reached or read.
    """
    options = reference.options
    splits = _open(reference.name, reference.text)
    train = _split(splits, options.get("split"), reference.text)
    held = _split(splits, options["validation"], reference.text) if "validation" in options else None
    samples = reference.samples or MOST_SAMPLES
    return (
        table_of(train, reference.text, samples),
        None if held is None else table_of(held, f"{reference.text} (held out)", samples),
    )


def object_tables(value: Any) -> tuple[Table, Table | None]:
    """Read a dataset, or a dict of datasets, whose split for measuring is used as such.

    Raises:
        DataError: It is empty or has no split to train on.
    """
    if not isinstance(value, Mapping):
        return table_of(value, "the dataset", None if hasattr(value, "__len__") else MOST_SAMPLES), None
    train = _split(value, None, "the dataset")
    held = next((value[name] for name in HELD_OUT_SPLITS if name in value and value[name] is not train), None)
    limit = None if hasattr(train, "__len__") else MOST_SAMPLES
    return (
        table_of(train, "the dataset's training split", limit),
        None if held is None else table_of(held, "the dataset's held-out split", limit),
    )


def object_name(value: Any) -> str:
    """Return the reference of a dataset given as an object: its fingerprint, where it has one."""
    first = next(iter(value.values())) if isinstance(value, Mapping) else value
    return f"datasets:{getattr(first, '_fingerprint', None) or type(value).__name__}"


def table_of(dataset: Any, origin: str, samples: int | None) -> Table:
    """Read the rows of a dataset.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    columns: dict[str, list[Any]] = {}
    count, size = 0, 0
    names = class_names(dataset)
    notes: list[str] = []
    try:
        for row in _undecoded(dataset):
            if count == samples or size > MOST_BYTES:
                notes.append(
                    f"only the first {count:,} rows are used; say ?samples=N for more, or ?stream=true for text"
                )
                break
            row = _flat(row)
            size += sum(len(value) for value in row.values() if isinstance(value, str))
            for name in row.keys() - columns.keys():
                columns[name] = [None] * count
            for name, values in columns.items():
                values.append(row.get(name))
            count += 1
    except Exception as error:  # whatever the library or the network raises while it streams
        raise _unreadable(origin, error) from error
    if not count:
        raise DataError(f"{origin} is empty.", "Expected at least one row of data.")
    return Table(columns, origin, names, notes=notes)


def _undecoded(dataset: Any) -> Any:
    """Return a dataset whose images stay the bytes that they are until one after the other is needed."""
    images = [
        name for name, kind in (getattr(dataset, "features", None) or {}).items() if type(kind).__name__ == "Image"
    ]
    if images:
        kind = require("datasets", "read images of a dataset").Image(decode=False)
        for name in images:
            dataset = dataset.cast_column(name, kind)
    return dataset


def class_names(dataset: Any) -> dict[str, list[str]]:
    """Return the names of classes that a dataset knows, by column."""
    features = getattr(dataset, "features", None) or {}
    return {name: list(kind.names) for name, kind in features.items() if hasattr(kind, "int2str")}


def hub_documents(name: str, split: str | None, columns: Mapping[str, str], start: int = 0) -> Iterator[str]:
    """Yield the texts of a dataset from a number of rows on.

    Blank ones are yielded too, because a place in the dataset is a number of rows; who trains on them leaves them out.

    Raises:
        DataError: It cannot be reached or read, or has no column of text.
    """
    origin = f"hub:{name}"
    dataset = _split(_open(name, origin), split, origin)
    try:
        head = [_flat(row) for row in islice(dataset, LOOKED_AT)]
    except Exception as error:
        raise _unreadable(origin, error) from error
    if not head:
        raise DataError(f"{origin} is empty.", "Expected at least one row of data.")
    names = dict.fromkeys(name for row in head for name in row)
    column, _ = choose_column(Table({n: [row.get(n) for row in head] for n in names}, origin), "text", columns)

    def texts() -> Iterator[str]:
        rows = iter(dataset.skip(start)) if start else chain(head, islice(dataset, LOOKED_AT, None))
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise _unreadable(origin, error) from error
            if row is None:
                return
            yield texts_of(Table({column: [_flat(row).get(column)]}, origin), column)[0]

    return texts()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the languages of a translation as columns of their own."""
    inner = row.get("translation")
    return {**row, **inner} if isinstance(inner, Mapping) else dict(row)


def _open(name: str, origin: str) -> Mapping[str, Any]:
    """Open a dataset as a stream."""
    datasets = require("datasets", "read datasets of the Hub")
    arguments: dict[str, Any] = {"streaming": True}
    if (folder := Path(name).expanduser()).is_dir():
        path, config = str(folder), None
    else:
        parts = name.split("/")
        path, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
        if reason := hub_unreachable():
            raise DataError(
                f"{origin} cannot be reached ({reason}).", "Expected a connection to the Hub.",
                "Check the network, or download the files and use file:PATH.",
            )  # fmt: skip
        arguments["token"] = find_secret("HF_TOKEN").value
    try:
        return dict(datasets.load_dataset(path, config, **arguments))
    except Exception as error:  # missing, gated, unreachable, or its own loading code, which is not run
        raise _unreadable(origin, error) from error


def _split(splits: Mapping[str, Any], wanted: str | None, origin: str) -> Any:
    """Return a split; the one called train, or the only one, when none is asked for."""
    name = wanted or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if name is None or name not in splits:
        raise DataError(
            f"{origin} has no split {name!r}." if name else f"{origin} has no split called train.",
            f"Its splits are {', '.join(map(str, splits))}.",
            "Name one in the reference: ?split=NAME",
        )
    return splits[name]


def _unreadable(origin: str, error: Exception) -> DataError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{origin} cannot be read ({type(error).__name__}: {text[:200]}).",
        "Expected a public dataset of plain files (csv, json, parquet, text, images).",
        "Check the spelling of owner/name; a private or gated one needs HF_TOKEN; its own Python code is never run.",
    )
