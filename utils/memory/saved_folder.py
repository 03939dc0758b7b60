"""A folder that a memory is saved in: its manifest, its one writer, and whether anything else lies there.

A save deletes what the manifest before it named, and what saves that were killed have left. The latter is told from the
files of a user by the lock's file, in which a save notes the names that it is about to write.
"""

import fcntl
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from utils.runtime.errors import CheckpointError
from utils.runtime.files import is_other_json, own_hash, sha256_file, write_json

MANIFEST = "manifest.json"
LOCK = ".lock"
TEMPORARY = re.compile(rf"\.{re.escape(MANIFEST)}\.tmp-\d+", re.ASCII)
"""What a killed save may leave of a manifest."""
SHOWN = 3
"""Names in a message."""


@dataclass(frozen=True)
class SavedKind:
    """What is saved, in the words of its manifest and of its errors."""

    format: str
    """The manifest says it."""
    version: int
    """Of the files."""
    noun: str
    """What it is, for messages."""
    writer: str
    """The function that writes it."""
    names: re.Pattern[str]
    """Whole names of the files that a save makes; those that it renames when they are whole begin with a dot."""

    def read(self, directory: Path) -> dict[str, Any] | None:
        """Return the manifest of a folder; None where there is none.

        Raises:
            CheckpointError: It is damaged, changed by hand, of something else or of another version.
        """
        path = directory / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise self.absent(directory, "which is a file") from error
        except (OSError, ValueError, RecursionError) as error:
            raise self.damaged(path, f"cannot be read ({type(error).__name__}: {error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != self.format:
            raise CheckpointError(
                f"{path} is no manifest of a {self.noun}.",
                f"Expected a file of the format {self.format!r}.",
                f"Give a folder that {self.writer} wrote, or an empty one to save in.",
            )
        if manifest.get("version") != self.version:
            raise CheckpointError(
                f"The {self.noun} in {directory} is of version {manifest.get('version')!r}.",
                f"Expected version {self.version}.",
                "Load it with the Seedbed that wrote it, or save a new one in another folder.",
            )
        if manifest.get("sha256") != own_hash(manifest):
            raise self.damaged(path, "was changed after it was written: its hash is another")
        return manifest

    def present(self, directory: Path) -> dict[str, Any]:
        """Return the manifest of a folder.

        Raises:
            CheckpointError: There is none, or as for `read`.
        """
        manifest = self.read(directory)
        if manifest is None:
            raise self.absent(directory, f"which has no {MANIFEST}" if directory.is_dir() else "which does not exist")
        return manifest

    def check_place(self, directory: Path, replace: bool = False, leftovers: bool = True) -> None:
        """Refuse to mix a save with the files of something else.

        Args:
            directory: Where it will be saved; it is there.
            replace: Whether a manifest of this kind that cannot be used may be replaced, or one that is no JSON.
            leftovers: Whether files of such names are taken for those of a save that was killed.

        Raises:
            CheckpointError: It holds other files and no manifest of this kind.
            OSError: It cannot be read.
        """
        try:
            if self.read(directory) is not None:
                return
        except CheckpointError:
            if not replace or is_other_json(directory / MANIFEST, lambda said: said.get("format") == self.format):
                raise
        inside = sorted(path.name for path in directory.iterdir())
        left = self.names if leftovers or replace else TEMPORARY
        foreign = [
            name
            for name in inside
            if not left.fullmatch(name)
            and not TEMPORARY.fullmatch(name)
            and name != LOCK
            and not (replace and name == MANIFEST)
        ]
        if foreign:
            more = ", ..." if len(foreign) > SHOWN else ""
            raise CheckpointError(
                f"{directory} holds no {self.noun} but other things: {', '.join(foreign[:SHOWN])}{more}.",
                f"Expected an empty or new folder, or one that {self.writer} wrote.",
                "Save in a folder of its own, such as one below it.",
            )

    def file(self, directory: Path, entry: Any, role: str) -> Path:
        """Return a file that a manifest names, after checking that it is as it was saved.

        Args:
            directory: Of the manifest.
            entry: What it says of the file: ``name``, ``sha256`` and, where they are known, ``bytes``.
            role: What the file holds, for messages.

        Raises:
            CheckpointError: No name, or a file that is missing, torn or changed.
        """
        if not isinstance(entry, dict) or Path(str(entry.get("name"))).name != entry.get("name"):
            raise self.damaged(directory / MANIFEST, f"names no file for the {role}")
        path = directory / entry["name"]
        if not path.is_file():
            raise self.damaged(path, "is missing")
        size = path.stat().st_size
        if size != entry.get("bytes", size):
            raise self.damaged(path, f"is torn: it has {size:,} bytes of {entry['bytes']!r}")
        if sha256_file(path) != entry.get("sha256"):
            raise self.damaged(path, "was changed or torn after it was written: its hash is another")
        return path

    def write(self, directory: Path, about: Mapping[str, Any]) -> str:
        """Write a manifest, and return its hash.

        Args:
            directory: Where.
            about: What it says, beside its format, its version and its hash.

        Raises:
            OSError: It cannot be written; the one before it is untouched.
        """
        manifest = {"format": self.format, "version": self.version, **about}
        digest = own_hash(manifest)
        write_json(directory / MANIFEST, manifest | {"sha256": digest})
        return digest

    @contextmanager
    def locked(self, directory: Path) -> Iterator["Writer"]:
        """Keep a second writer out; folders that know no locks, as some mounts, are not locked, which a warning says.

        Raises:
            CheckpointError: Another one is saving there.
        """
        with (directory / LOCK).open("a+", encoding="utf-8", errors="replace") as stream:
            alone = True
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"Another process is saving a {self.noun} in {directory}.",
                    "Expected to be the only writer.",
                    "Wait until it has ended, load what it wrote, and save again.",
                ) from None
            except OSError as error:
                alone = False
                # The same text each time, so that Python's usual filter shows it once.
                warnings.warn(
                    f"The file system knows no locks ({error}): nothing keeps two processes from saving a {self.noun} "
                    "here at the same time.",
                    RuntimeWarning,
                    2,
                )
            yield Writer(self, directory, stream, self._left(directory, stream) if alone else frozenset())

    def _left(self, directory: Path, stream: TextIO) -> frozenset[str]:
        """Return the files that killed saves left; nobody but the one writer knows that nobody writes them."""
        stream.seek(0)
        noted = {name for name in stream.read().splitlines() if self.names.fullmatch(name)}
        temporary = {
            path.name
            for path in directory.iterdir()
            if TEMPORARY.fullmatch(path.name) or (path.name.startswith(".") and self.names.fullmatch(path.name))
        }
        return frozenset(noted | temporary)

    def absent(self, directory: Path, how: str) -> CheckpointError:
        """Return the error of a folder that holds none."""
        return CheckpointError(
            f"There is no {self.noun} in {directory}, {how}.",
            f"Expected a folder with a {MANIFEST}.",
            f"Give the folder that {self.writer} wrote.",
        )

    def damaged(self, path: Path, how: str) -> CheckpointError:
        """Return the error of a file that is not as it was saved."""
        return CheckpointError(
            f"{path} {how}.",
            f"Expected the files of a {self.noun} as they were saved.",
            "Load another copy, or make it anew in another folder; nothing was read from this one.",
        )


@dataclass(frozen=True)
class Writer:
    """The one that saves in a folder, while it does."""

    kind: SavedKind
    """What it saves."""
    directory: Path
    """Where."""
    stream: TextIO
    """The lock's file."""
    left: frozenset[str]
    """Files that saves have left which were killed."""

    def note(self, names: Collection[str]) -> None:
        """Note the names of files before they are written, so that the next save knows whose they are.

        A file of such a name that is there already is none of this save.
        """
        noted = self.left | {name for name in names if not (self.directory / name).exists()}
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.writelines(f"{name}\n" for name in sorted(noted))
        self.stream.flush()

    def clear(self, before: Iterable[Any], after: Collection[str]) -> None:
        """Delete the files of earlier saves, once the manifest names others.

        Args:
            before: What the manifest that was replaced said of its files; whoever wrote it may have named any.
            after: Names of those that stay.
        """
        named = {str(entry.get("name")) for entry in before if isinstance(entry, dict)}
        for name in (self.left | set(filter(self.kind.names.fullmatch, named))).difference(after):
            with suppress(OSError):
                (self.directory / name).unlink()
        self.stream.seek(0)
        self.stream.truncate()
