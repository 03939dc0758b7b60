"""Concept packages on disk: a folder with one JSON file and one safetensors file, whole or absent, checked when read.

The JSON file names the tensors by their hash and carries a hash of itself, so a change of either is noticed. That is no
signature: who changes a package on purpose can hash it anew. Compare its SHA-256 with one that came another way.
"""

import io
import json
import re
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.concepts.checks import check_kind
from utils.concepts.content import Content
from utils.concepts.direction import ConceptDirection
from utils.concepts.package import MOST_BYTES, ConceptPackage, PackageError, Provenance
from utils.runtime.errors import CheckpointError, DataError
from utils.runtime.files import (
    check_replaceable,
    checked_path,
    own_hash,
    saving,
    sha256_bytes,
    tag_nonfinite,
    untag_nonfinite,
    write_atomic,
    write_json,
)
from utils.training.weights import write_tensors

FORMAT = 2
"""Layout of the folder."""
MANIFEST = "concept.json"
INPUT, TRACE = "input:", "trace:"
"""What stands before the names of inputs and of traced layers among the tensors."""
MOST_FILE = 3 * MOST_BYTES
"""Bytes of a file that is read at all."""


def save_package(package: ConceptPackage, directory: str | Path, replace: bool = False) -> Path:
    """Write a package into a folder; one of the same concept and teacher that is there is replaced as a whole.

    Args:
        package: The package.
        directory: The folder, made where there is none.
        replace: Replace a package of another concept or teacher as well, or one that cannot be read. Other JSON of the
            name of a package's is never replaced.

    Returns:
        The folder.

    Raises:
        PackageError: It is no package, another one or something else is there, or the files cannot be written; what
            was there is still there.
    """
    check_kind(package, ConceptPackage, "package", "Make one with extract_concept.", PackageError)
    with saving(directory, "the concept package", PackageError, folder=True) as folder:
        check_replaceable(folder / MANIFEST, "concept package", "save_package", PackageError)
        if not replace:
            _check_present(package, folder)
        _write(package, folder)
    return folder


def _check_present(package: ConceptPackage, directory: Path) -> None:
    """Refuse a folder that holds another package, or one that cannot be read."""
    if not (directory / MANIFEST).exists():
        return
    try:
        body = _manifest(directory)
        there = str(body["name"]), body["provenance"]["weights_sha256"], f"of a {body['provenance']['model']}"
    except (PackageError, KeyError, TypeError) as error:
        why = error.found if isinstance(error, PackageError) else f"It says no {error}."
        raise PackageError(
            f"{directory} holds a concept package that cannot be told apart from this one. {why}",
            "Expected a folder without a package, or with one of the same concept and teacher.",
            "Save into another folder, or write replace=True.",
        ) from error
    if there[:2] != (package.name, package.provenance.weights_sha256):
        raise PackageError(
            f"{directory} holds the package of the concept {there[0][:60]!r} {there[2][:60]} with the weights "
            f"{str(there[1])[:16]}..., and this one is of {package.name!r} of a {package.provenance.model} with "
            f"{package.provenance.weights_sha256[:16]}...",
            "Expected a folder without a package, or with one of the same concept and teacher.",
            "Save into another folder, or write replace=True.",
        )


def _write(package: ConceptPackage, directory: Path) -> None:
    stream = io.BytesIO()
    write_tensors({name: value.contiguous() for name, value in _tensors(package).items()}, {}, stream)
    content = stream.getvalue()
    digest = sha256_bytes(content)
    direction = package.direction.to_dict()
    body = {
        "format": FORMAT,
        "name": package.name,
        "provenance": asdict(package.provenance),
        "calibration": list(package.calibration),
        "direction": {name: direction[name] for name in _direction_fields()},
        "groups": list(package.groups),
        "texts": list(package.content.texts),
        "inputs": list(package.content.tensors),
        "traces": list(package.traces),
        "tensors": {"file": _file_name(digest), "sha256": digest},
    }
    body = tag_nonfinite(body)
    old = _old_file(directory)
    write_atomic(directory / _file_name(digest), content)
    # The manifest comes last: until then a reader sees the old package, from then on the new one.
    write_json(directory / MANIFEST, body | {"sha256": own_hash(body)})
    if old is not None and old != _file_name(digest):
        with suppress(OSError):
            (directory / old).unlink()


def package_sha256(directory: str | Path) -> str:
    """Return the SHA-256 of a saved package, to send by another way than the package.

    Raises:
        PackageError: There is none, or it is damaged.
    """
    return str(_manifest(checked_path(directory, "the concept package", PackageError))["sha256"])


def load_package(directory: str | Path, sha256: str | None = None) -> ConceptPackage:
    """Read a package that `save_package` wrote; nothing in it is run.

    Args:
        directory: The folder.
        sha256: What `package_sha256` returned where the package was made; None trusts the folder.

    Raises:
        PackageError: It is missing, of another version, damaged or changed, or not the one that was expected.
    """
    directory = checked_path(directory, "the concept package", PackageError)
    body = _manifest(directory)
    if sha256 is not None and not (isinstance(sha256, str) and body["sha256"] == sha256):
        raise PackageError(
            f"The package in {directory} has the SHA-256 {body['sha256'][:16]}...",
            f"Expected {str(sha256)[:16]}...",
            "Fetch it again from where it was made.",
        )
    try:
        tensors = _read_tensors(directory, body["tensors"])
        return _made(untag_nonfinite(body), tensors)
    except DataError as error:
        raise error if isinstance(error, PackageError) else _damaged(directory, str(error)) from error
    except Exception as error:
        # Whatever is wrong in a file that a stranger may have made, it is no package.
        raise _damaged(directory, f"{type(error).__name__}: {error}") from error


def _made(body: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptPackage:
    """Return the package of a manifest and its tensors."""
    named = {name: value for name, value in body["direction"].items() if name in _direction_fields()}
    named = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    return ConceptPackage(
        body["name"],
        Content({name: tensors[INPUT + name] for name in body["inputs"]}, tuple(body["texts"])),
        tensors["labels"],
        tensors["soft_targets"],
        tensors["prototypes"],
        ConceptDirection(vector=tensors["direction"], **named),
        (float(body["calibration"][0]), float(body["calibration"][1])),
        tensors["anchors"],
        {name: tensors[TRACE + name] for name in body["traces"]},
        Provenance(**body["provenance"]),
        tuple(body["groups"]),
    )


def _tensors(package: ConceptPackage) -> dict[str, Tensor]:
    return {
        **{INPUT + name: value for name, value in package.content.tensors.items()},
        **{TRACE + name: value for name, value in package.traces.items()},
        "labels": package.labels,
        "soft_targets": package.soft_targets,
        "prototypes": package.prototypes,
        "direction": package.direction.vector,
        "anchors": package.anchors,
    }


def _direction_fields() -> list[str]:
    return [part.name for part in fields(ConceptDirection) if part.name != "vector"]


def _manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a folder, whole and of this version."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MOST_FILE:
            raise ValueError(f"{MANIFEST} is above {MOST_FILE:,} bytes")
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackageError(
            f"There is no concept package in {directory}.",
            f"Expected a folder with {MANIFEST}, as save_package writes it.",
            "Check the path.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}") from error
    if not isinstance(body, dict) or "format" not in body:
        raise _damaged(directory, f"{MANIFEST} does not say its format")
    if body["format"] != FORMAT:
        raise PackageError(
            f"The package in {directory} has the format {body['format']!r}.",
            f"Expected {FORMAT}, the one that this version of Seedbed reads.",
            "Make the package anew with this version, or read it with the version that made it.",
        )
    told = body.get("sha256")
    try:
        found = own_hash(body)
    except CheckpointError as error:
        raise _damaged(directory, error.found) from error
    if told != found:
        raise _damaged(directory, f"{MANIFEST} has the SHA-256 {found[:16]}... and says {str(told)[:16]}...")
    return body


def _read_tensors(directory: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a package, read once: what is hashed is what is used."""
    from safetensors.torch import load

    name, digest = entry["file"], entry["sha256"]
    if not _is_own(entry):
        raise PackageError(
            f"The package in {directory} names the file {str(name)[:80]!r}.",
            f"Expected {_file_name(str(digest))}, in the same folder.",
            "Do not use it.",
        )
    path = directory / name
    if path.stat().st_size > MOST_FILE:
        raise ValueError(f"{name} is above {MOST_FILE:,} bytes")
    content = path.read_bytes()
    if (found := sha256_bytes(content)) != digest:
        raise _damaged(directory, f"{name} has the SHA-256 {found[:16]}..., not {digest[:16]}...")
    tensors: dict[str, Tensor] = load(content)
    return {key: value if value.is_contiguous() else value.contiguous() for key, value in tensors.items()}


def _old_file(directory: Path) -> str | None:
    """Return the name of the tensors' file of a package that is there already; None where save_package gave none."""
    try:
        entry = _manifest(directory)["tensors"]
        return str(entry["file"]) if _is_own(entry) else None
    except (PackageError, KeyError, TypeError):
        return None


def _is_own(entry: Any) -> bool:
    """Tell whether an entry names a file as save_package does: its content is read, and it is deleted when replaced.

    A manifest of a stranger may name any path, and put one into what should be a hash.
    """
    digest = entry["sha256"]
    hexadecimal = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
    return hexadecimal and entry["file"] == _file_name(digest)


def _file_name(digest: str) -> str:
    return f"concept-{digest[:16]}.safetensors"


def _damaged(directory: Path, why: str) -> PackageError:
    return PackageError(
        f"The concept package in {directory} is damaged or was changed ({why}).",
        "Expected the files as save_package wrote them.",
        "Copy the folder again from where it was made.",
    )
