"""Files to read: which of a folder's files matter, and their documents, whole or block by block.

A large file is never in memory at once. It is read in blocks that end at a line, and each block is one document; the
end of a text that is one block long and its continuation are therefore separated like two documents.
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from utils.runtime.errors import DataError
from utils.training.references import IMAGE_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES, describe_references
from utils.training.tables import Table, choose_column, read_rows, texts_of

BLOCK = 1 << 20
"""Bytes of a large text file that make one document."""
WHOLE = 64 << 20
"""Largest text file that is one document."""
LOOKED_AT = 200
"""Rows by which the column of text is chosen."""


@dataclass(frozen=True)
class Files:
    """The files behind a reference."""

    root: Path
    """What the user named."""
    texts: tuple[Path, ...] = ()
    """Plain text."""
    tables: tuple[Path, ...] = ()
    """Rows with named columns."""
    images: tuple[Path, ...] = ()
    """Pictures."""

    @property
    def text_bytes(self) -> int:
        """Size of what holds text."""
        return sum(path.stat().st_size for path in (self.texts or self.tables))


def find_files(path: Path, reference: str) -> Files:
    """Find the files that a path names.

    Raises:
        DataError: There is nothing, or nothing of a known kind.
    """
    if not str(path).strip() or str(path) == ".":
        raise DataError(f"The data reference {reference!r} names no file.", "Expected file:PATH.")
    if not path.exists():
        raise DataError(
            f"There is no file or folder at {path}.",
            "Expected a file of data or a folder of such files.",
            f"Check the path; relative paths start at {Path.cwd()}.",
        )
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    else:
        inside = [path]
    kinds = [
        tuple(file for file in inside if file.suffix.lower() in suffixes)
        for suffixes in (TEXT_SUFFIXES, TABLE_SUFFIXES, IMAGE_SUFFIXES)
    ]
    if not any(kinds):
        if path.is_dir():
            raise DataError(
                f"The folder {path} holds no {', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))} or image file.",
                describe_references(),
            )
        raise DataError(
            f"{path.name} is a {path.suffix or 'suffixless'} file, a format that is not available.",
            describe_references(),
            "Convert it to plain text, or rename it if it is plain text.",
        )
    return Files(path, *kinds)


def documents(files: Files, columns: Mapping[str, str], whole: int | None = None) -> Iterator[str]:
    """Yield the documents of text files, or of a column of tables; never more than one of them is in memory.

    Args:
        files: The files.
        columns: Columns that the user named.
        whole: Largest text file that is one document; larger ones come in blocks. Default `WHOLE`.

    Raises:
        DataError: A file is damaged or not text, or no column fits.
    """
    if files.texts:
        for path in files.texts:
            if path.stat().st_size > (WHOLE if whole is None else whole):
                yield from blocks(path)
            elif (text := read_text(path)).strip():
                yield text
        return
    for path in files.tables:
        rows = read_rows(path)
        head = list(islice(rows, LOOKED_AT))
        if not head:
            continue
        names = dict.fromkeys(name for row in head for name in row)
        column, _ = choose_column(Table({n: [row.get(n) for row in head] for n in names}, str(path)), "text", columns)
        for row in chain(head, rows):
            for text in texts_of(Table({column: [row.get(column)]}, str(path)), column):
                if text.strip():
                    yield text


def read_text(path: Path) -> str:
    """Read one UTF-8 file.

    Raises:
        DataError: It cannot be read or is not text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Expected a readable text file.") from error
    if b"\0" in data[:65536]:
        raise _binary(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data[error.start], error.start) from error


def blocks(path: Path, size: int = BLOCK) -> Iterator[str]:
    """Yield a text file in blocks of about `size` bytes that end at a paragraph or a line.

    Raises:
        DataError: It cannot be read or is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read, rest = 0, ""
    try:
        with open(path, "rb") as stream:
            while data := stream.read(size):
                if b"\0" in data[:65536]:
                    raise _binary(path)
                pending = len(decoder.getstate()[0])
                try:
                    rest += decoder.decode(data)
                except UnicodeDecodeError as error:
                    at = max(0, error.start - pending)
                    raise _not_utf8(path, data[at], read + at) from error
                read += len(data)
                cut = next((end + len(mark) for mark in ("\n\n", "\n", " ") if (end := rest.rfind(mark)) > 0), 0)
                if cut and rest[:cut].strip():
                    yield rest[:cut]
                    rest = rest[cut:]
                elif len(rest) > 8 * size:
                    # A line without end: cut it anywhere rather than keep it all.
                    yield rest
                    rest = ""
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Expected a readable text file.") from error
    if decoder.getstate()[0]:
        raise _not_utf8(path, decoder.getstate()[0][0], read - len(decoder.getstate()[0]))
    if rest.strip():
        yield rest


def _binary(path: Path) -> DataError:
    return DataError(f"{path} is a binary file (it contains zero bytes).", "Expected plain text in UTF-8.")


def _not_utf8(path: Path, byte: int, position: int) -> DataError:
    return DataError(
        f"{path} is not UTF-8: byte 0x{byte:02x} at position {position} cannot be decoded.",
        "Expected plain text in UTF-8.",
        f"Convert it, for example with: iconv -f LATIN1 -t UTF-8 {path.name} > utf8.txt",
    )


def class_folders(paths: Sequence[Path], root: Path) -> list[str] | None:
    """Return the folder directly below `root` that each file is in, or None when files lie beside folders."""
    if not root.is_dir():
        return None
    parts = [path.relative_to(root).parts for path in paths]
    return [part[0] for part in parts] if parts and all(len(part) > 1 for part in parts) else None
