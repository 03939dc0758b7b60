"""Files that are either whole or absent: written beside the target, flushed to disk, then renamed over it."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.runtime.errors import CheckpointError, SeedbedError
from utils.runtime.settings import shown

TAG = "__float__"
SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def own_hash(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a JSON file says, its entry ``sha256`` aside, which holds this hash.

    It notices damage and changes by hand; it is no signature, because whoever changes a file on purpose can hash it
    anew.

    Raises:
        CheckpointError: It is nested more deeply than JSON is written.
    """
    said = {name: value for name, value in content.items() if name != "sha256"}
    try:
        written = json.dumps(said, sort_keys=True, ensure_ascii=True)
    except RecursionError:
        # What was read may be a little deeper than what can be written.
        raise CheckpointError(
            "A JSON file is nested too deeply to be hashed.",
            "Expected a file that Seedbed wrote.",
            "Give another copy; nothing was read from this one.",
        ) from None
    return sha256_bytes(written.encode())


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    # One piece of memory that stays in the processor's cache between reading and hashing.
    piece = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as stream:
        while length := stream.readinto(piece):
            digest.update(piece[:length])
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Force a file, or a directory's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: The disk is full or the directory cannot be written; the old file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_file(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Half of a surrogate pair, which UTF-8 does not know, is written as JSON's escape of it.

    Raises:
        ValueError: A number in it is not finite, for which JSON has no name: see `null_nonfinite`, `tag_nonfinite`.
        TypeError: JSON cannot hold a value of its type.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Python escapes such a half just as JSON does; outside of texts JSON has none.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def is_other_json(path: Path, own: Callable[[dict[str, Any]], bool]) -> bool:
    """Tell whether a file is JSON of something else, which no save may replace.

    Args:
        path: The file.
        own: Tells of an object in JSON whether it is of the kind that is saved here, damaged or not.

    Returns:
        False also where there is no file, or one that is no JSON at all, as a torn one of ours may be.

    Raises:
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return not isinstance(content, dict) or not own(content)


def check_replaceable(path: Path, what: str, writer: str, error: type[SeedbedError] = CheckpointError) -> None:
    """Refuse to replace JSON that is not of a save: a number of its format, and a file of tensors with its hash.

    Args:
        path: Of the JSON file that a save writes.
        what: What is saved, such as "concept package".
        writer: The function that saves it.
        error: Raised if something else is there.

    Raises:
        SeedbedError: Something else is there.
        OSError: It cannot be read.
    """

    def own(content: dict[str, Any]) -> bool:
        tensors = content.get("tensors")
        named = isinstance(tensors, dict) and {"file", "sha256"} <= tensors.keys()
        return named and type(content.get("format")) is int

    if is_other_json(path, own):
        raise error(
            f"The {path.name} in {path.parent} is of no {what}.",
            f"Expected a folder without one, or with one that {writer} wrote.",
            "Save into another folder; nothing is replaced that is something else.",
        )


def checked_path(path: Any, what: str, error: type[SeedbedError] = CheckpointError) -> Path:
    """Return a path that a user gave.

    Args:
        path: A text or a path.
        what: What is kept there, such as "the concept package".
        error: Raised if it is none.

    Raises:
        SeedbedError: It is no path.
    """
    said = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(said, str) or not said.strip() or "\0" in said:
        raise error(
            f"The path of {what} is {shown(path)}.",
            "Expected a path: a text that names a file or a folder, or a pathlib.Path.",
            "Give one, such as 'kept/first'.",
        )
    return Path(said)


@contextmanager
def saving(path: Any, what: str, error: type[SeedbedError] = CheckpointError, folder: bool = False) -> Iterator[Path]:
    """Yield a checked path to write to, and turn what the system refuses meanwhile into an error a user can act on.

    Args:
        path: A text or a path.
        what: What is saved, such as "the concept package".
        error: Raised if it cannot be.
        folder: Whether it goes into a folder of this name, instead of a file.

    Raises:
        SeedbedError: It is no path, below an ordinary file, not writable, or the disk is full.
    """
    place = checked_path(path, what, error)
    try:
        if not folder and (not place.name or place.is_dir()):
            raise IsADirectoryError(f"{place} is a folder")
        yield place
    except OSError as failure:
        raise error(
            f"{what[:1].upper()}{what[1:]} cannot be saved as {place} ({type(failure).__name__}: {failure}).",
            f"Expected a {'folder' if folder else 'file'} that can be written, below folders and not below a file.",
            "Choose another path, or make room; what was saved there before is untouched.",
        ) from failure


def null_nonfinite(value: Any) -> Any:
    """Return what was measured as JSON can hold it: None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: null_nonfinite(item) for name, item in value.items()}
    return [null_nonfinite(item) for item in value] if isinstance(value, (list, tuple)) else value


def tag_nonfinite(value: Any) -> Any:
    """Return settings as JSON can hold them without losing any: an infinity becomes ``{"__float__": "Infinity"}``."""
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {name: tag_nonfinite(item) for name, item in value.items()}
    return [tag_nonfinite(item) for item in value] if isinstance(value, (list, tuple)) else value


def untag_nonfinite(value: Any) -> Any:
    """Return what `tag_nonfinite` was given."""
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(value.get(TAG), str) and value[TAG] in SPELLED:
            return SPELLED[value[TAG]]
        return {name: untag_nonfinite(item) for name, item in value.items()}
    return [untag_nonfinite(item) for item in value] if isinstance(value, list) else value
