"""What a checkpoint costs: how long the step that saves waits, and how long the writing takes beside it.

Three numbers are measured in turn, many times, in one process, and their medians compared: one plain copy of the whole
state (weights and both moments of AdamW) to host memory, what a step waits for when it saves, and the complete write
(files, hashes, flush to disk, manifest, rename) beside ``torch.save`` of the same state, once as it is and once flushed
to disk as the checkpoint is. The SHA-256 of the same bytes is timed alone, in one thread and in two at once: it is most
of the work of a checkpoint, and only on two free processors can it hide behind the writing.

    python benchmarks/checkpoint_stall.py --megabytes 300 --rounds 7
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from utils.training.background import CheckpointWriter
from utils.training.checkpoint_manager import CheckpointManager, take_snapshot
from utils.training.parts import LightningPart, Progress
from utils.training.state import RunState

NAMES = ("copy", "stall", "write", "save", "save_synced", "hash", "hash_in_two")


def trained(megabytes: int) -> tuple[nn.Module, RunState]:
    """Return a model and the other parts of its state, of about so many megabytes in all."""
    width = 512
    block = 12 * width * width * 4 * 3
    layers = max(1, round(megabytes * 1e6 / block))
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(width, 6 * width), nn.GELU(), nn.Linear(6 * width, width)) for _ in range(layers))
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, width, device=next(model.parameters()).device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, RunState({"progress": Progress(), "optimizer": LightningPart("optimizer", optimizer)})


def tensors_of(model: nn.Module, parts: RunState) -> list[torch.Tensor]:
    """Return all tensors of the state."""
    moments = parts["optimizer"].state_dict()["state"]
    return [*model.state_dict().values(), *(value for state in moments.values() for value in state.values())]


def tensors_in(value: object) -> list[torch.Tensor]:
    """Return the tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inner for tensor in tensors_in(item)]


def hash_all(tensors: list[torch.Tensor], threads: int) -> None:
    """Hash all tensors, each thread its share."""

    def hash_some(some: list[torch.Tensor]) -> None:
        digest = hashlib.sha256()
        for tensor in some:
            digest.update(tensor.flatten().view(torch.uint8).numpy())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(hash_some, [tensors[number::threads] for number in range(threads)]))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the time of a call, by the clock and of the processors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, used = time.perf_counter(), time.process_time()
    result = work()
    taken = time.perf_counter() - started, time.process_time() - used
    del result
    return taken


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="size of weights and moments")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to write; a temporary folder otherwise")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="seedbed-stall-", dir=options.folder))
    model, parts = trained(options.megabytes)
    tensors = tensors_of(model, parts)
    manager = CheckpointManager(folder / "checkpoints", keep=1000)
    writer = CheckpointWriter(manager, folder, None)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    processor: dict[str, list[float]] = {name: [] for name in times}
    for number in range(options.rounds + 1):
        step = number + 1

        def stall(step: int = step) -> None:
            parts["progress"].step = step  # type: ignore[attr-defined]
            writer.make_room()
            writer.write(take_snapshot(step, model, parts.state_dict(), None))

        def save(sync: bool) -> None:
            with open(folder / "plain.pt", "wb") as stream:
                torch.save({"model": model.state_dict(), **parts.state_dict()}, stream)
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())

        def copy() -> list[torch.Tensor]:
            return [tensor.detach().to("cpu", copy=True) for tensor in tensors]

        # Whichever comes second finds memory that the other has just given back: they take turns.
        turns = [("copy", copy), ("stall", stall)]
        measured = {name: seconds(work) for name, work in (turns if number % 2 else turns[::-1])}
        writer.finish()
        # Both writers find the pages that the system has cached before, and given back, for files of this size.
        shutil.rmtree(manager.directory)
        snapshot = take_snapshot(10_000 + step, model, parts.state_dict(), None)
        os.sync()
        measured["write"] = seconds(lambda snapshot=snapshot: manager.write(snapshot))
        held = [*snapshot.tensors.values(), *tensors_in(snapshot.state)]
        measured["hash"] = seconds(lambda held=held: hash_all(held, 1))
        measured["hash_in_two"] = seconds(lambda held=held: hash_all(held, 2))
        del snapshot, held
        shutil.rmtree(manager.directory)
        os.sync()
        measured["save"] = seconds(lambda: save(False))
        (folder / "plain.pt").unlink()
        os.sync()
        measured["save_synced"] = seconds(lambda: save(True))
        (folder / "plain.pt").unlink()
        os.sync()
        if number:  # The first round pays for what is made once.
            for name, (clock, used) in measured.items():
                times[name].append(clock)
                processor[name].append(used)
    shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in times.items()}

    def ratio(one: str, two: str, values: dict[str, list[float]] = times) -> float:
        return round(statistics.median(values[one]) / statistics.median(values[two]), 3)

    result = {
        "megabytes": round(sum(t.nbytes for t in tensors) / 1e6),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "stall_over_copy": ratio("stall", "copy"),
        "write_over_save": ratio("write", "save"),
        "write_over_synced_save": ratio("write", "save_synced"),
        "processor_write_over_save": ratio("write", "save", processor),
        "hash_over_save": ratio("hash", "save"),
        "processors_for_hashing": ratio("hash", "hash_in_two"),
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"state of {result['megabytes']} MB, medians of {options.rounds} rounds")
        for name, value in medians.items():
            print(f"  {name:12} {value:8.3f} s")
        print(f"  the step that saves waits {result['stall_over_copy']} times one copy (at most 1.2)")
        print(f"  a complete write takes {result['write_over_save']} times torch.save (at most 1.3),")
        print(f"  {result['write_over_synced_save']} times torch.save with the same flush to disk,")
        print(f"  and {result['processor_write_over_save']} times the processor time of torch.save;")
        print(f"  the SHA-256 of the state alone takes {result['hash_over_save']} times torch.save in one thread")
        print(f"  (two threads hashed {result['processors_for_hashing']} times as fast as one)")
    return 0 if result["stall_over_copy"] <= 1.2 and result["write_over_save"] <= 1.3 else 1


if __name__ == "__main__":
    sys.exit(main())
