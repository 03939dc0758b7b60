"""Files that are either whole or absent: written beside the target, flushed to disk, then renamed over it."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

TAG = "__float__"
SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


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

    Raises:
        ValueError: A number in it is not finite, for which JSON has no name: see `null_nonfinite`, `tag_nonfinite`.
        TypeError: JSON cannot hold a value of its type.
    """
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
