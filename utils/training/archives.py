"""A zip file as a folder for a while; nothing is ever unpacked outside of it."""

import lzma
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from utils.runtime.errors import DataError
from utils.runtime.resources import format_bytes

MOST_FILES = 1_000_000
DAMAGED = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError,
           NotImplementedError, OSError)  # fmt: skip
"""What zipfile raises for an archive that is damaged, depending on where."""
SPARE = 500_000_000
"""Bytes of disk that stay free."""


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a zip file into a temporary folder; a folder or another file is yielded as it is.

    Raises:
        DataError: The archive is damaged, encrypted, too large for the disk, or wants to write outside its folder.
    """
    if path.suffix.lower() != ".zip" or not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="seedbed-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(path) as archive:
                _check(archive, path, folder)
                archive.extractall(folder)
        except DAMAGED as error:
            raise DataError(
                f"{path} cannot be unpacked ({error}).",
                "Expected a whole zip file, and a disk to unpack it on.",
                "Make or download it again.",
            ) from error
        except RuntimeError as error:  # what zipfile raises for a missing password
            raise DataError(f"{path} is encrypted ({error}).", "Expected a zip file without a password.") from error
        # Archives of macOS carry a second, hidden copy of each file's name.
        shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
        yield _single_folder(folder)


def _check(archive: zipfile.ZipFile, path: Path, folder: Path) -> None:
    entries = archive.infolist()
    for entry in entries:
        target = PurePosixPath(entry.filename.replace("\\", "/"))
        if target.is_absolute() or ".." in target.parts:
            raise DataError(
                f"{path} wants to write outside its folder, to {entry.filename!r}.", "Expected plain relative names."
            )
    size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
    if len(entries) > MOST_FILES or size > free - SPARE:
        raise DataError(
            f"{path} holds {len(entries):,} files of {format_bytes(size)} when unpacked.",
            f"Expected at most {MOST_FILES:,} files, and {format_bytes(max(0, free - SPARE))} fit on the disk.",
            "Make a smaller archive.",
        )


def _single_folder(folder: Path) -> Path:
    """Return the only folder inside a folder that holds nothing else, or its only file."""
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    while len(inside) == 1:
        # One class folder is not the whole: it stays under its parent, which lists the classes.
        if inside[0].is_file():
            return inside[0]
        below = [entry for entry in inside[0].iterdir() if not entry.name.startswith(".")]
        if not any(entry.is_dir() for entry in below) and len(below) != 1:
            return inside[0]
        folder, inside = inside[0], below
    return folder
