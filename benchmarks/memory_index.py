"""Long-term memory beside plain FAISS: `python benchmarks/memory_index.py [overhead|recall|million|faults ...]`.

overhead: seconds of `add`, without metadata and with three entries for each vector, and of `search` over those of
FAISS alone at 100,000 x 384, in turns in one process.
recall: recall at 10 of inverted lists at the default settings, against comparing with everything.
million: the most memory of a process while a million vectors of 384 numbers are added, searched, saved and loaded.
faults: how many of a list of faults lead to a wrong answer, by each way of searching.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import faiss  # noqa: E402

from benchmarks.memory_faults import FAULTS  # noqa: E402
from utils.memory.long_term_memory import LongTermMemory  # noqa: E402
from utils.memory.vector_index import IndexConfig  # noqa: E402

WIDTH, MANY, MILLION, PART = 384, 100_000, 1_000_000, 50_000
TURNS = 15


def vectors(count: int, seed: int, kind: str = "topics") -> np.ndarray:
    """Return vectors of one of two kinds.

    ``topics`` lie around 2,000 centres, as embeddings of texts lie around topics. ``smooth`` ones are a function of 12
    hidden numbers and have no clusters, which is harder for inverted lists.
    """
    fixed, generator = np.random.default_rng(0), np.random.default_rng(seed)
    if kind == "topics":
        centres = fixed.standard_normal((2_000, WIDTH), dtype=np.float32)
        made = centres[generator.integers(0, len(centres), count)]
        made += 0.7 * generator.standard_normal((count, WIDTH), dtype=np.float32)
        return made
    first, second = (fixed.standard_normal(shape, dtype=np.float32) for shape in ((12, 64), (64, WIDTH)))
    hidden = generator.standard_normal((count, 12), dtype=np.float32)
    return np.asarray(np.tanh(hidden @ first / 2) @ second)


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plain(metric: str) -> Any:
    """Return the index that the memory wraps."""
    return faiss.IndexIDMap2(faiss.IndexFlatIP(WIDTH) if metric == "cosine" else faiss.IndexFlatL2(WIDTH))


def add_plainly(metric: str, table: np.ndarray, ids: np.ndarray) -> Any:
    """Add as FAISS's guide says: under cosine a copy is normalised, for the caller's vectors are not to change."""
    index = plain(metric)
    if metric == "cosine":
        table = table.copy()
        faiss.normalize_L2(table)
    index.add_with_ids(table, ids)
    return index


def overhead() -> None:
    """Measure and print."""
    table, ids = vectors(MANY, 1), np.arange(MANY)
    about = [{"source": f"notes-{row % 100}.txt", "line": row, "weight": row / MANY} for row in range(MANY)]
    for metric in ("cosine", "l2"):
        memory = LongTermMemory(metric=metric)
        memory.add(table)
        # The very index that the memory wraps: where another one lies in memory makes a difference of its own.
        index = memory._index._index  # type: ignore[union-attr]
        works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "add 100,000": (
                lambda m=metric: add_plainly(m, table, ids),
                lambda m=metric: LongTermMemory(metric=m).add(table),
            ),
            # FAISS keeps no metadata: here the memory does more.
            "with metadata": (
                lambda m=metric: add_plainly(m, table, ids),
                lambda m=metric: LongTermMemory(metric=m).add(table, about),
            ),
        }
        for count in (1, 100):
            queries = vectors(count, 2)

            def search_plainly(q: np.ndarray = queries, m: str = metric, i: Any = index) -> Any:
                if m == "cosine":
                    q = q.copy()
                    faiss.normalize_L2(q)
                return i.search(q, 10)

            works[f"search {count}"] = (search_plainly, lambda q=queries, m=memory: m.search(q, 10))
        for name, (raw, wrapped) in works.items():
            times: list[tuple[float, float]] = []
            for turn in range(TURNS):
                # Who comes first changes from turn to turn.
                pair = {call: seconds(call) for call in ((raw, wrapped) if turn % 2 else (wrapped, raw))}
                times.append((pair[raw], pair[wrapped]))
            one, other = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(b / a for a, b in times)
            print(
                f"{metric:<6} {name:<13} FAISS {one * 1e3:8.2f} ms, memory {other * 1e3:8.2f} ms, "
                f"ratio of medians {other / one:.3f}, median of paired ratios {ratio:.3f} ({TURNS} turns)"
            )


def recall() -> None:
    """Measure and print."""
    for kind in ("topics", "smooth"):
        for metric in ("cosine", "l2"):
            memory = LongTermMemory(metric=metric)
            queries = vectors(500, 99, kind)
            took = seconds(lambda k=kind, m=memory: [m.add(vectors(PART, 10 + part, k)) for part in range(4)])
            memory.search(queries, 10)
            asked = seconds(lambda m=memory, q=queries: m.search(q, 10))
            print(f"{kind} {metric}: 200,000 x {WIDTH} added in {took:.0f} s, {asked * 2:.1f} ms for a query")
            for k in (10, 100):
                print(f"    queries that were never stored: {memory.measured_recall(queries, k)}")
            print(f"    the memory's own measure:       {memory.method}", flush=True)


def million() -> None:
    """Measure in a process of its own and print."""
    subprocess.run([sys.executable, __file__, "million-child"], check=True, cwd=ROOT)


def million_child() -> None:
    """Add, search, save and load a million vectors, and print the most memory of the process so far."""

    def report(name: str, call: Callable[[], Any]) -> None:
        took = seconds(call)
        print(f"{name:<7}{took:7.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")

    def add() -> None:
        for part in range(MILLION // PART):
            memory.add(vectors(PART, part))

    memory = LongTermMemory()
    queries = vectors(100, 99)
    report("start", lambda: None)
    report("add", add)
    print(f"       {memory}")
    report("search", lambda: memory.search(queries, 10))
    with tempfile.TemporaryDirectory() as directory:
        report("save", lambda: memory.save(directory))
        code = (
            "import resource, sys, time; sys.path[:0] = sys.argv[2:]\n"
            "from utils.memory.long_term_memory import LongTermMemory\n"
            "s = time.perf_counter(); m = LongTermMemory.load(sys.argv[1])\n"
            "print(f'load   {time.perf_counter() - s:7.1f} s in a new process, peak '\n"
            "      f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB; {m}')"
        )
        sys.stdout.flush()
        subprocess.run([sys.executable, "-c", code, directory, *sys.path], check=True, cwd=ROOT)


def faults() -> None:
    """Try all and print."""
    ways = {"Flat": IndexConfig("faiss"), "lists": IndexConfig("faiss", exact_up_to=20), "torch": IndexConfig("torch")}
    outcomes = {way: {fault.name: fault.outcome(config) for fault in FAULTS} for way, config in ways.items()}
    for fault in FAULTS:
        print(f"{fault.name:<52} " + ", ".join(outcomes[way][fault.name].partition(":")[0] for way in ways))
    wrong = sum(outcome == "WRONG" for found in outcomes.values() for outcome in found.values())
    print(f"{wrong} wrong answers to {len(FAULTS)} faults by each of {', '.join(ways)}")
    sys.exit(wrong > 0)


PARTS = {"overhead": overhead, "recall": recall, "million": million, "million-child": million_child, "faults": faults}


def main() -> None:
    """Run the parts that are named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["overhead", "recall", "million", "faults"], choices=list(PARTS))
    for part in parser.parse_args().parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
