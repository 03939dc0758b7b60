"""The data behind a reference: real text and images that every machine already has, or the user's own files.

Everything comes back as plain values in a deterministic order; tokenizing, splitting and packing happen elsewhere.
"""

import ast
import gc
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from utils.runtime.errors import DataError
from utils.runtime.optional import require
from utils.runtime.resources import available_memory, format_bytes

TEXT_BUILTINS = ("builtin:python-docs", "builtin:python-code")
IMAGE_BUILTINS = ("builtin:digits",)
TEXT_SUFFIXES = (".txt", ".md")
LARGEST = 2_000_000_000
"""Most bytes of text that are read into memory."""
_MEMORY_PER_BYTE = 8
"""Bytes of memory that preparing one byte of text takes: the text, its tokens, inputs and labels."""
_SHORTEST_DOCSTRING = 40


def describe_references() -> str:
    """Return the sentence that lists what can be loaded."""
    return (
        f"Available in this version are {', '.join((*TEXT_BUILTINS, *IMAGE_BUILTINS))} and file:PATH, where PATH is a "
        f"{' or '.join(TEXT_SUFFIXES)} file or a folder of them."
    )


def load_texts(reference: str) -> list[str]:
    """Return the documents of a text reference, in a deterministic order, duplicates included.

    Raises:
        DataError: The reference is unknown, or the files are missing, empty, too large or not text.
    """
    if reference == "builtin:python-docs":
        with _without_collector():
            return [text for text in (*_topics(), *_docstrings()) if _is_storable(text)]
    if reference == "builtin:python-code":
        return [text for text in _library_sources() if text.strip() and _is_storable(text)]
    if reference.startswith("file:"):
        return _read_files(Path(reference.removeprefix("file:")).expanduser(), reference)
    raise DataError(f"The data reference {reference!r} is not available.", describe_references())


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector, which costs as much as the parser itself while syntax trees are built."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _topics() -> list[str]:
    """Return the topics that ``help()`` shows, by name."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library in source order, parsed and never imported."""
    for source in _library_sources():
        if '"""' not in source and "'''" not in source:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # test data kept by a distribution, for another Python version
            continue
        for node in _definitions(tree):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                yield text


def _definitions(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module and its classes and functions; expressions are not entered, which is most of the time saved."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for field in ("finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                pending.extend(reversed(children))


def _library_sources() -> Iterator[str]:
    """Yield the sources of the standard library without tests, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if excluded.isdisjoint(path.relative_to(root).parts) and path.is_file():
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few old sources declare another encoding
                continue


def _is_storable(text: str) -> bool:
    """Tell whether a text has no lone surrogates, which a docstring's escapes can produce."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_files(path: Path, reference: str) -> list[str]:
    """Return the texts of a file or of all text files in a folder, sorted by path."""
    if not str(path).strip() or str(path) == ".":
        raise DataError(f"The data reference {reference!r} names no file.", "Expected file:PATH.")
    if not path.exists():
        raise DataError(
            f"There is no file or folder at {path}.",
            "Expected a text file or a folder of text files.",
            f"Check the path; relative paths start at {Path.cwd()}.",
        )
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES)
        if not files:
            raise DataError(
                f"The folder {path} holds no {' or '.join(TEXT_SUFFIXES)} file.",
                describe_references(),
            )
    elif path.suffix.lower() not in TEXT_SUFFIXES:
        raise DataError(
            f"{path.name} is a {path.suffix or 'suffixless'} file, a format that is not available.",
            describe_references(),
            "Convert it to plain text, or rename it if it is plain text.",
        )
    else:
        files = [path]
    _check_size(path, sum(file.stat().st_size for file in files))
    texts = [text for text in map(_read_text, files) if text.strip()]
    if not texts:
        raise DataError(
            f"{path} is empty." if path.is_file() else f"All {len(files)} text files in {path} are empty.",
            "Expected text to train on.",
        )
    return texts


def _check_size(path: Path, size: int) -> None:
    """Refuse text that does not fit into memory."""
    limit = min(LARGEST, available_memory() // _MEMORY_PER_BYTE)
    if size > limit:
        raise DataError(
            f"{path} holds {format_bytes(size)} of text.",
            f"At most {format_bytes(limit)} can be prepared in this machine's memory.",
            "Cut out a part of it, for example with: head -c 500000000 IN.txt > OUT.txt",
        )


def _read_text(path: Path) -> str:
    """Read one UTF-8 file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Expected a readable text file.") from error
    if b"\0" in data[:65536]:
        raise DataError(f"{path} is a binary file (it contains zero bytes).", "Expected plain text in UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start} cannot be decoded.",
            "Expected plain text in UTF-8.",
            f"Convert it, for example with: iconv -f LATIN1 -t UTF-8 {path.name} > utf8.txt",
        ) from error


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's images of handwritten digits: float32 (1797, 8, 8) in [0, 1] and int64 labels (1797,)."""
    require("sklearn", "load builtin:digits", "scikit-learn")
    from sklearn.datasets import load_digits as bundled

    images, labels = bundled(return_X_y=True)
    return (images.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64)


def without_duplicates(texts: Iterable[str]) -> list[str]:
    """Return the texts without exact repetitions (surrounding white space aside), in order of first appearance."""
    return list({text.strip(): text for text in reversed(list(texts))}.values())[::-1]
