"""The files that make a model: ``model.py``, what it imports from its own folder, and ``config.json``."""

import ast
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.runtime.errors import ModelReferenceError
from utils.runtime.resources import format_bytes

MODEL_FILE = "model.py"
CONFIG_FILE = "config.json"
DEFAULT_MAX_BYTES = 10_000_000
_EXAMPLES = Path(__file__).parent / "examples"
_MODULE_FILE = re.compile(r"[A-Za-z_]\w*\.py", re.ASCII)


@dataclass(frozen=True)
class Source:
    """The source of a model, as text."""

    files: dict[str, str]
    """Text by file name; always has ``model.py``."""
    revision: str | None = None
    """Version of the files, when they come from a place that keeps versions."""
    entry: str = MODEL_FILE
    """What its author calls the file that is ``model.py`` here; messages name it so."""

    def shown(self, name: str) -> str:
        """Return what the author calls one of the files."""
        return self.entry if name == MODEL_FILE else name

    @property
    def sha256(self) -> str:
        """SHA-256 of the files, independent of their order."""
        return hashlib.sha256(json.dumps(sorted(self.files.items())).encode()).hexdigest()


def decode(data: bytes, name: str) -> str:
    """Return a file's text, or say which byte is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ModelReferenceError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} in line {line}.",
            "Expected Python source and JSON encoded as UTF-8.",
            "Open the file in an editor and save it again as UTF-8.",
        ) from None


def imported_siblings(text: str, available: Iterable[str]) -> list[str]:
    """Return the files among `available` that a source text imports, in order; unparsable text imports none."""
    modules = {name.removesuffix(".py") for name in available if _MODULE_FILE.fullmatch(name)}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
        for name in names:
            if (top := name.split(".")[0]) in modules:
                found[top + ".py"] = None
    return list(found)


def collect(
    read: Callable[[str], str], available: Iterable[str], where: str, entry: str = MODEL_FILE
) -> dict[str, str]:
    """Read the model's file, the sibling files it imports (directly or not) and the config.

    Args:
        read: Returns the text of one of the available files.
        available: Names of all files there are.
        where: The place, for error messages, such as ``"The Gist 1234"``.
        entry: The file to start from; it is called ``model.py`` in the result.

    Raises:
        ModelReferenceError: The model's file is missing or empty, or the files are ambiguous.
    """
    available = sorted(available)
    if entry not in available:
        listing = ", ".join(available[:20]) or "no files at all"
        close = [name for name in available if name.lower() == entry.lower()]
        raise ModelReferenceError(
            f"{where} has no {entry}; it has {listing}.",
            f"Expected {MODEL_FILE} with the model's class and {CONFIG_FILE} with its settings.",
            f"Rename {close[0]}: names are case-sensitive." if close else f"Add a file named {MODEL_FILE}.",
        )
    texts: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop(0)
        if name not in texts:
            texts[name] = read(name)
            waiting += imported_siblings(texts[name], available)
    if not texts[entry].strip():
        raise ModelReferenceError(
            f"{where} is empty." if where.endswith(entry) else f"{where} has an empty {entry}.",
            "Expected Python source that defines a torch.nn.Module.",
            "Export the model again, or check that the file was saved.",
        )
    if entry != MODEL_FILE and MODEL_FILE in texts:
        raise ModelReferenceError(
            f"{where}: {entry} imports {MODEL_FILE} beside it, so it is not clear which of the two is the model.",
            f"Expected the model's class in {MODEL_FILE}.",
            f"Load {MODEL_FILE}, or rename it.",
        )
    files = {MODEL_FILE: texts.pop(entry), **texts}
    if CONFIG_FILE in available:
        files[CONFIG_FILE] = read(CONFIG_FILE)
    return files


def read_path(path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> Source:
    """Read a model from a ``.py`` file or from a folder with ``model.py``.

    Raises:
        ModelReferenceError: There is no such file or folder, it is too large, or no text.
    """
    if path.is_dir():
        folder, entry, where = path, MODEL_FILE, f"The folder {path}"
    elif path.is_file() and path.suffix == ".py":
        folder, entry, where = path.parent, path.name, f"The file {path}"
    elif path.exists():
        raise ModelReferenceError(
            f"{path} is not Python source.",
            "Expected a .py file, or a folder with model.py and config.json.",
            "A file with weights alone does not say which model they belong to: pass its source.",
        )
    else:
        close = difflib.get_close_matches(str(path), example_names(), 1, 0.5) if len(path.parts) == 1 else []
        raise ModelReferenceError(
            f"There is no file or folder {str(path)!r}.",
            "Expected a path that exists, a Gist id (32 hexadecimal digits), a link, hub:owner/name or example:NAME.",
            f"Did you mean example:{close[0]}?" if close else "Check the spelling and the working directory.",
        )

    def read(name: str) -> str:
        try:
            size = (folder / name).stat().st_size
            if size > max_bytes:
                raise ModelReferenceError(
                    f"{folder / name} has {format_bytes(size)}.",
                    f"Expected source of at most {format_bytes(max_bytes)}.",
                    "Pass max_bytes= to allow more.",
                )
            return decode((folder / name).read_bytes(), str(folder / name))
        except OSError as error:
            raise ModelReferenceError(
                f"{folder / name} cannot be read: {error.strerror}.", "Expected a readable file."
            ) from None

    try:
        names = [item.name for item in folder.iterdir() if item.is_file()]
    except OSError as error:
        raise ModelReferenceError(
            f"{folder} cannot be listed: {error.strerror}.", "Expected a readable folder."
        ) from None
    return Source(collect(read, names, where, entry), entry=entry)


def example_names() -> list[str]:
    """Return the names of the built-in examples."""
    return sorted(folder.name for folder in _EXAMPLES.iterdir() if (folder / MODEL_FILE).is_file())


def read_example(name: str) -> Source:
    """Read a built-in example.

    Raises:
        ModelReferenceError: There is no example of that name; the message lists them.
    """
    names = example_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, 0.4)
        raise ModelReferenceError(
            f"There is no example named {name!r}.",
            f"Expected one of: {', '.join(names)}.",
            f"Did you mean example:{close[0]}?" if close else "",
        )
    return read_path(_EXAMPLES / name)
