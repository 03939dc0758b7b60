"""What a data reference says: where the data is, and which columns of it matter.

file:reviews.csv?text=body&label=stars       hub:owner/name/config?split=train&samples=5000       builtin:digits
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from utils.runtime.errors import DataError

TEXT_BUILTINS = ("builtin:python-docs", "builtin:python-code")
IMAGE_BUILTINS = ("builtin:digits",)
TABLE_BUILTINS = ("builtin:diabetes", "builtin:wine")
TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
COLUMN_OPTIONS = ("text", "source", "target", "label", "image")
OPTIONS = {
    "text": "the column that holds the text",
    "label": "the column that holds the class, or the number to predict",
    "source": "the column that is translated from",
    "target": "the column that is translated to, or the number to predict",
    "image": "the column that holds images",
    "split": "the split of a dataset to train on",
    "validation": "the split of a dataset to measure on",
    "samples": "how many samples to take at most",
    "stream": "true: read while training, and keep only what is measured on",
    "task": "the column whose values divide the rows into the tasks of continual learning",
}
"""What may stand behind the question mark."""
WHOLE = ("samples",)


@dataclass(frozen=True)
class DataReference:
    """A data reference, taken apart."""

    text: str
    """As the user wrote it."""
    kind: str
    """``builtin``, ``file``, ``hub`` or ``object``."""
    name: str
    """What follows the colon, without options."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What follows the question mark."""

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the user named, by what they are for."""
        return {name: self.options[name] for name in COLUMN_OPTIONS if name in self.options}

    @property
    def streamed(self) -> bool:
        """Whether to read while training."""
        return self.options.get("stream", "").lower() in ("1", "true", "yes")

    @property
    def samples(self) -> int | None:
        """How many samples to take at most."""
        return int(self.options["samples"]) if "samples" in self.options else None

    @property
    def path(self) -> Path:
        """The file or folder of a ``file:`` reference."""
        return Path(self.name).expanduser()


def parse_reference(text: str) -> DataReference:
    """Take a data reference apart.

    Raises:
        DataError: It is of no known kind, or an option is unknown or impossible.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ("builtin", "file", "hub"):
        # `os.path` says no where `Path` raises: any text may stand here.
        there = next((path for path in (text, text.partition("?")[0]) if os.path.exists(os.path.expanduser(path))), "")
        if Path(there).name:
            raise DataError(
                f"The data reference {text!r} does not say what kind it is.",
                "Expected builtin:NAME, file:PATH or hub:owner/name; a file or folder of this name exists.",
                f"Write file:{text}",
            )
        raise DataError(f"The data reference {text!r} is not available.", describe_references())
    name, _, query = rest.rpartition("?") if "?" in rest else (rest, "", "")
    if kind == "file" and query and Path(rest).expanduser().exists():
        # A file whose own name holds a question mark.
        name, query = rest, ""
    if kind == "builtin":
        if f"builtin:{name}" not in (*TEXT_BUILTINS, *IMAGE_BUILTINS, *TABLE_BUILTINS):
            raise DataError(f"The data reference {text!r} is not available.", describe_references())
    elif not name.strip():
        raise DataError(
            f"The data reference {text!r} names no {'file' if kind == 'file' else 'dataset'}.",
            f"Expected {'file:PATH' if kind == 'file' else 'hub:owner/name'}.",
        )
    return DataReference(text, kind, name, _options(text, query))


def _options(text: str, query: str) -> dict[str, str]:
    """Read what follows the question mark."""
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        pair = parse_qsl(part, keep_blank_values=True)
        name, value = pair[0] if pair and "=" in part else (part, "")
        if name not in OPTIONS or not value:
            raise DataError(
                f"The data reference {text!r} has the option {part!r}.",
                f"Expected name=value, where the name is one of {', '.join(OPTIONS)}.",
                "Write for example file:reviews.csv?text=body&label=stars",
            )
        if name in WHOLE and not (value.isdigit() and int(value) > 0):
            raise DataError(f"The data reference {text!r} says {part!r}.", "Expected a whole number above 0.")
        options[name] = value
    return options


def describe_references() -> str:
    """Return the sentence that lists what can be loaded."""
    suffixes = ", ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES, ".zip"))
    return (
        f"Available are {', '.join((*TEXT_BUILTINS, *IMAGE_BUILTINS, *TABLE_BUILTINS))}, file:PATH, where PATH is a "
        f"file ({suffixes}), a folder of such files or a folder with one folder of images per class, "
        "hub:owner/name[/config], and a datasets.Dataset."
    )
