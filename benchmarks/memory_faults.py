"""Faults of memories on FAISS, each as something to do and a test of the answer; see `memory_index.py faults`.

A fault is survived when the memory refuses with an error that Seedbed raises on purpose, or answers rightly.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.memory.embedding import function_embedder
from utils.memory.long_term_memory import LongTermMemory
from utils.memory.vector_index import IndexConfig
from utils.runtime.errors import SeedbedError

COUNT, WIDTH = 50, 8


@dataclass(frozen=True)
class Fault:
    """One fault."""

    name: str
    """What is done."""
    act: Callable[[LongTermMemory, np.ndarray, Path], bool]
    """Does it to a memory that holds the vectors; true for a right answer, and an error for what cannot have one."""
    must_refuse: bool
    """There is no right answer."""

    def outcome(self, config: IndexConfig) -> str:
        """Return ``refused: ...``, ``right`` or ``WRONG``."""
        table = np.random.default_rng(0).standard_normal((COUNT, WIDTH), dtype=np.float32)
        memory = LongTermMemory(config=config)
        memory.add(table, [{"row": row, "even": row % 2 == 0} for row in range(COUNT)])
        with tempfile.TemporaryDirectory() as directory:
            try:
                right = self.act(memory, table, Path(directory) / "memory")
            except SeedbedError as error:
                return f"refused: {error.found}"
        return "right" if right and not self.must_refuse else "WRONG"


def _with(table: np.ndarray, value: float) -> np.ndarray:
    spoiled = table[:3].copy()
    spoiled[1, 2] = value
    return spoiled


def _saved(memory: LongTermMemory, place: Path) -> tuple[Path, dict[str, Any]]:
    memory.save(place)
    return place, json.loads((place / "manifest.json").read_text())


def _changed(memory: LongTermMemory, place: Path, role: str, change: Callable[[bytes], bytes]) -> bool:
    """Change a saved file and load the memory again."""
    place, manifest = _saved(memory, place)
    path = place / ("manifest.json" if role == "manifest" else manifest["files"][role]["name"])
    path.write_bytes(change(path.read_bytes()))
    return len(LongTermMemory.load(place)) == COUNT


def _out_of_step(memory: LongTermMemory, table: np.ndarray, place: Path) -> bool:
    """Put the metadata of one save beside the vectors of another."""
    other = LongTermMemory(config=memory.config)
    other.add(table[:20], [{"row": -row} for row in range(20)])
    theirs, said = _saved(other, place.with_name("other"))
    ours, manifest = _saved(memory, place)
    (ours / manifest["files"]["metadata"]["name"]).write_bytes(
        (theirs / said["files"]["metadata"]["name"]).read_bytes()
    )
    return len(LongTermMemory.load(ours)) == COUNT


def _broken_save(memory: LongTermMemory, table: np.ndarray, place: Path) -> bool:
    """Stop a save in its midst."""
    memory.save(place)
    memory.add(table + 1)

    class Stopped(Exception):
        pass

    def chunks() -> Any:
        raise Stopped

    kept = memory._index.chunks
    memory._index.chunks = chunks  # type: ignore[method-assign]
    try:
        memory.save(place)
    except Stopped:
        memory._index.chunks = kept  # type: ignore[method-assign]
        return len(LongTermMemory.load(place)) == COUNT
    return False


def _two_writers(memory: LongTermMemory, table: np.ndarray, place: Path) -> bool:
    memory.save(place)
    first, second = LongTermMemory.load(place), LongTermMemory.load(place)
    first.add(table)
    first.save(place)
    second.save(place)
    return False


def _changes_later(memory: LongTermMemory, table: np.ndarray, _: Path) -> bool:
    mine, said = table.copy(), {"list": [1]}
    key = memory.add(mine[:1] + 5, said)
    said["list"].append(2)
    found = memory.search(table[:1] + 5, 1)
    memory.update(key, metadata={"list": []})
    memory.delete(key)
    return found[0][0].metadata == {"list": [1]} and found.ids[0, 0] == key[0]


def _moved(memory: LongTermMemory, table: np.ndarray, _: Path) -> bool:
    memory.update([7], vectors=-table[7:8])
    return memory.search(table[7], 1).ids[0, 0] != 7 and memory.search(-table[7], 1).ids[0, 0] == 7


def _forgotten(memory: LongTermMemory, table: np.ndarray, _: Path) -> bool:
    memory.delete([7])
    return 7 not in memory.search(table[7], COUNT).ids and memory.add(table[:1]).tolist() == [COUNT]


def _learned_since(_: LongTermMemory, table: np.ndarray, __: Path) -> bool:
    model = torch.nn.Linear(WIDTH, 4)
    memory = LongTermMemory(embedder=function_embedder(model.forward))
    memory.add(torch.from_numpy(table))
    with torch.no_grad():
        model.weight += 1
    memory.search(torch.from_numpy(table))
    return True


def _another_embedder(_: LongTermMemory, table: np.ndarray, place: Path) -> bool:
    memory = LongTermMemory(embedder=function_embedder(np.asarray, "the first"))
    memory.add(table)
    memory.save(place)
    LongTermMemory.load(place, function_embedder(np.asarray, "the second"))
    return True


def _lengths(memory: LongTermMemory, table: np.ndarray, _: Path) -> bool:
    """By inner product a long vector is nearest to everything."""
    memory.add(table[:1] * 1000)
    return memory.search(table[9], 1).ids[0, 0] == 9


def _tiny(memory: LongTermMemory, table: np.ndarray, _: Path) -> bool:
    """Squares that underflow make a norm of zero, and NaN of what is divided by it."""
    return memory.search(table[9] * np.float32(1e-25), 1).ids[0, 0] == 9


def _rows(memory: LongTermMemory, table: np.ndarray, k: int, **options: Any) -> list[int]:
    return [match.metadata["row"] for match in memory.search(table[0], k, **options)[0]]


FAULTS = (
    Fault("NaN in a vector that is added", lambda m, t, _: bool(len(m.add(_with(t, np.nan)))), True),
    Fault("infinity in a query", lambda m, t, _: len(m.search(_with(t, np.inf))) == 3, True),
    Fault("float64 that float32 cannot hold", lambda m, t, _: bool(len(m.add(t.astype(float) * 1e60))), True),
    Fault("a zero vector under cosine", lambda m, t, _: bool(len(m.add(t[:1] * 0))), True),
    Fault("vectors whose squares underflow", _tiny, False),
    Fault("vectors of unlike length under cosine", _lengths, False),
    Fault("vectors of another width", lambda m, t, _: bool(len(m.add(t[:, 1:]))), True),
    Fault("token ids instead of vectors", lambda m, t, _: bool(len(m.add(np.ones((2, WIDTH), np.int64)))), True),
    Fault("half precision", lambda m, t, _: m.search(torch.from_numpy(t[9:10]).half(), 1).ids[0, 0] == 9, False),
    Fault("a view with strides", lambda m, t, _: m.search(np.asfortranarray(t), 1).ids[9, 0] == 9, False),
    Fault("an empty memory", lambda m, t, _: LongTermMemory(WIDTH).search(t).ids.shape == (COUNT, 0), False),
    Fault("more asked for than there is", lambda m, t, _: sorted(_rows(m, t, 80)) == list(range(COUNT)), False),
    Fault("k = 0", lambda m, t, _: len(m.search(t, 0)) == COUNT, True),
    Fault("an id twice in a call", lambda m, t, _: bool(len(m.add(t[:2], ids=[90, 90]))), True),
    Fault("an id that is there", lambda m, t, _: bool(len(m.add(t[:1], ids=[3]))), True),
    Fault("the id -1", lambda m, t, _: bool(len(m.add(t[:1], ids=[-1]))), True),
    Fault("an id of a memory that is not there", lambda m, t, _: m.delete([3, 99]) is None, True),
    Fault("deleted and found again", _forgotten, False),
    Fault("found where it lay before an update", _moved, False),
    Fault(
        "a filter that few of the nearest pass",
        lambda m, t, _: len(_rows(m, t, 25, where={"even": False})) == 25,
        False,
    ),
    Fault("a domain with a typing error", lambda m, t, _: len(m.search(t, domain="defualt")) == COUNT, True),
    Fault("metadata that JSON cannot hold", lambda m, t, _: bool(len(m.add(t[:1], [{"a": np.nan}]))), True),
    Fault("metadata for fewer than there are", lambda m, t, _: bool(len(m.add(t[:2], [{}]))), True),
    Fault("arguments and memories that change after the answer", _changes_later, False),
    Fault("vectors cut short on disk", lambda m, t, p: _changed(m, p, "vectors", lambda b: b[:-9]), True),
    Fault(
        "a bit of a vector flipped on disk",
        lambda m, t, p: _changed(m, p, "vectors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        True,
    ),
    Fault("metadata cut short on disk", lambda m, t, p: _changed(m, p, "metadata", lambda b: b[:-9]), True),
    Fault("a manifest cut short", lambda m, t, p: _changed(m, p, "manifest", lambda b: b[:-9]), True),
    Fault(
        "a manifest with another metric",
        lambda m, t, p: _changed(m, p, "manifest", lambda b: b.replace(b'"cosine"', b'"l2"')),
        True,
    ),
    Fault("metadata of another save", _out_of_step, True),
    Fault("a save that is broken off", _broken_save, False),
    Fault("two writers", _two_writers, True),
    Fault("another embedder than the one that wrote", _another_embedder, True),
    Fault("an embedder that learned since", _learned_since, True),
)
