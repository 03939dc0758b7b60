"""What was rehearsed often moves from an episodic buffer into long-term memory, and leaves the buffer once it is safe.

After the two stores of complementary learning systems (McClelland, McNaughton & O'Reilly 1995, "Why there are
complementary learning systems in the hippocampus and neocortex", Psychological Review 102(3)): a small one that learns
at once, and a large one that takes over what is replayed.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.memory.episodic_buffer import EpisodicBuffer
from utils.memory.long_term_memory import LongTermMemory
from utils.memory.sample_storage import DTYPES
from utils.runtime.arguments import described, instance_of, whole
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.files import checked_path

ARRIVAL, DIGEST, FIELDS = "arrival", "sample_sha256", "fields"
"""Keys of the metadata: the sample's number in its stream, its hash, and its tensors."""
TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Consolidation:
    """What moved."""

    moved: int
    """Samples that were put into long-term memory."""
    known: int
    """Samples that were there already, from a consolidation after which the buffer was put back to an earlier state."""
    left: int
    """Samples that stay in the buffer."""
    min_rehearsals: int
    """Draws from which a sample moves."""
    ids: tuple[int, ...]
    """Of the new memories."""
    saved_to: str | None
    """Where the memory was saved before the buffer let go; None where it was not asked to be, or nothing moved."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """Say it in a line."""
        where = f", saved to {self.saved_to}" if self.saved_to else ""
        again = f", {self.known} were there already" if self.known else ""
        return f"{self.moved} samples drawn {self.min_rehearsals} times or more moved{again}; {self.left} stay{where}"


def consolidate(
    buffer: EpisodicBuffer,
    memory: LongTermMemory,
    min_rehearsals: int = 3,
    *,
    inputs: Callable[[dict[str, Tensor]], Any] | None = None,
    keep: Iterable[str] | None = None,
    domain: str = "consolidated",
    directory: str | Path | None = None,
) -> Consolidation:
    """Move the samples of a buffer that were rehearsed often into long-term memory.

    The metadata of each say where it is from: ``time``, ``priority``, ``group``, ``rehearsals``, ``arrival``, and the
    fields that are one number per sample, such as labels, by their names; the others lie in ``fields``, from which
    `recalled` makes tensors again. The buffer lets go of a sample only when it is in the memory and, with `directory`,
    on disk; a sample that is there already is not stored twice.

    Args:
        buffer: Where samples come from.
        memory: Where they go.
        min_rehearsals: Draws (`EpisodicBuffer.sample`) from which a sample moves, at least 1.
        inputs: From the fields of samples, each ``[n, ...]``, to what the memory takes as items; None gives all fields
            to an embedder that reads a model, which picks its inputs.
        keep: Names of the fields that are stored beside the vector; None for all.
        domain: Where they belong in the memory.
        directory: Where the memory is saved before the buffer lets go.

    Raises:
        ConfigError: `min_rehearsals` below 1, or an argument of a wrong kind.
        DataError: Samples of which the memory cannot make vectors, or a field to keep that does not exist. Memory and
            buffer are as they were.
        CheckpointError: The memory cannot be saved. Memory and buffer are as they were.
    """
    instance_of(
        buffer, EpisodicBuffer, "The buffer", "Expected an EpisodicBuffer.", "Give the one to move samples from."
    )
    _check_memory(memory)
    action = "Give how often a sample must have been drawn."
    min_rehearsals = whole(min_rehearsals, "The number of rehearsals", 1, action)
    if inputs is not None and not callable(inputs):
        raise ConfigError(
            f"inputs is {described(inputs)}.",
            "Expected a function from the fields of samples to the items of the memory, or None.",
            'Give, for example, lambda samples: samples["pixel_values"].',
        )
    several = isinstance(keep, Iterable) and not isinstance(keep, (str, bytes, Tensor))
    if keep is not None and not several:
        raise ConfigError(
            f"keep is {described(keep)}.",
            "Expected several names of fields, or None for all.",
            'Give, say, ["labels"].',
        )
    place = None if directory is None else checked_path(directory, "the long-term memory")
    names = set(buffer.layouts) if keep is None else set(map(str, keep))
    if unknown := sorted(names - set(buffer.layouts)):
        raise DataError(
            f"The buffer has no field {', '.join(unknown)[:200]}.",
            f"Expected some of {', '.join(sorted(buffer.layouts)) or 'none: it is empty'}.",
            "Give names of its fields.",
        )
    slots = buffer.slots[buffer.about()["rehearsals"] >= min_rehearsals]
    about, samples = buffer.about(slots), buffer.read(slots)
    digests = _digests(samples, len(slots))
    there = _stored(memory)
    keys = zip(about["arrivals"].tolist(), digests, strict=True)
    rows = torch.tensor([row for row, key in enumerate(keys) if key not in there], dtype=torch.int64)
    ids: np.ndarray = np.empty(0, dtype=np.int64)
    if len(rows):
        samples = {name: field[rows] for name, field in samples.items()}
        entries = _metadata(samples, {name: column[rows] for name, column in about.items()}, names)
        for entry, row in zip(entries, rows.tolist(), strict=True):
            entry[DIGEST] = digests[row]
        ids = memory.add(samples if inputs is None else inputs(samples), entries, domain=domain)
    # Where nothing moves there is nothing to keep safe.
    place = place if len(slots) else None
    try:
        if place is not None:
            memory.save(place)
    except BaseException:
        memory.delete(ids)
        raise
    buffer.remove(slots)
    saved = None if place is None else str(place)
    return Consolidation(len(ids), len(slots) - len(ids), len(buffer), min_rehearsals, tuple(ids.tolist()), saved)


def recalled(memory: LongTermMemory, ids: Any) -> dict[str, Tensor]:
    """Return the samples behind consolidated memories, bit for bit, each field ``[n, ...]``.

    Raises:
        ConfigError: It is no memory.
        DataError: Ids that are not there, that no consolidation has made, or whose samples have unlike fields.
    """
    _check_memory(memory)
    entries = memory.get(ids).metadata
    fields = [entry.get(FIELDS) for entry in entries]
    if not entries or any(not isinstance(field, dict) or field.keys() != (fields[0] or {}).keys() for field in fields):
        raise DataError(
            f"The {len(entries)} memories hold no samples, or samples with unlike fields.",
            "Expected memories that `consolidate` has made, with the same fields kept.",
            f'Take ids of memory.ids(where=lambda metadata: "{FIELDS}" in metadata).',
        )
    try:
        return {
            name: torch.stack([_tensor(field[name]) for field in fields if field is not None])
            for name in fields[0] or {}
        }
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The fields of the memories make no tensors ({type(error).__name__}: {error}).",
            "Expected fields of one shape, as `consolidate` wrote them.",
            "Recall memories of one buffer at a time.",
        ) from error


def _check_memory(memory: Any) -> None:
    instance_of(
        memory, LongTermMemory, "The memory", "Expected a LongTermMemory.", "Make one with the embedder of the samples."
    )


def _stored(memory: LongTermMemory) -> set[tuple[int, str]]:
    """Return number in the stream and hash of the samples that were moved before."""
    found: set[tuple[int, str]] = set()

    def note(entry: Mapping[str, Any]) -> bool:
        if DIGEST in entry and ARRIVAL in entry:
            found.add((entry[ARRIVAL], entry[DIGEST]))
        return False

    memory.ids(where=note)
    return found


def _digests(samples: Mapping[str, Tensor], count: int) -> list[str]:
    """Return the hash of each sample, over the names, types, shapes and bits of its fields."""
    digests = [hashlib.sha256() for _ in range(count)]
    for name, field in sorted(samples.items()):
        for digest, values in zip(digests, field, strict=True):
            digest.update(json.dumps([name, _plain(values)]).encode())
    return [digest.hexdigest() for digest in digests]


def _metadata(samples: Mapping[str, Tensor], about: Mapping[str, Tensor], names: set[str]) -> list[dict[str, Any]]:
    entries = []
    for row in range(len(about["arrivals"])):
        entry: dict[str, Any] = {
            name: samples[name][row].item() for name in sorted(names) if not samples[name].shape[1:]
        }
        entry |= {
            "time": int(about["times"][row]),
            "priority": float(about["priorities"][row]),
            "group": int(about["groups"][row]),
            "rehearsals": int(about["rehearsals"][row]),
            ARRIVAL: int(about["arrivals"][row]),
            FIELDS: {name: _plain(samples[name][row]) for name in sorted(names)},
        }
        entries.append(entry)
    return entries


def _plain(values: Tensor) -> dict[str, Any]:
    """Return a tensor as JSON values without losing a bit."""
    raw = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    name = str(values.dtype).removeprefix("torch.")
    return {"dtype": name, "shape": list(values.shape), "base64": base64.b64encode(raw).decode("ascii")}


def _tensor(plain: Mapping[str, Any]) -> Tensor:
    # A bytearray can be written to, as torch asks for.
    raw = np.frombuffer(bytearray(base64.b64decode(plain["base64"])), dtype=np.uint8)
    return torch.from_numpy(raw).view(TYPES[plain["dtype"]]).reshape(plain["shape"])
