"""How well, and how fast, does Seedbed learn task after task? Its methods beside plain loops, on real images.

    python benchmarks/continual_methods.py                                   all streams and methods, three seeds
    python benchmarks/continual_methods.py --streams split-mnist --methods der++ consolidation --seeds 0 1 2 3 4
    python benchmarks/continual_methods.py --streams permuted-mnist --json

An MLP 784-400-400-10, Adam with 1e-3, batches of 128, one pass over each task, 500 remembered samples:

- split-mnist, split-fashion: five tasks of two classes, class-incremental; the order of classes is drawn for seeds
  above 0;
- permuted-mnist: ten tasks of 10,000 images, each with an order of pixels of its own, domain-incremental.

Each of Seedbed's methods runs through `utils.train`; a plain loop (`continual_references.py`) with the same arithmetic
runs right before it on the same tasks from the same weights. CPU seconds are those of training alone on both sides;
with Seedbed everything that a run does between two measurements counts. Targets: every method within one point of the
reference figures below or above it, at most 1.15 times its plain loop's CPU seconds; consolidation at least 93.5, 80.0
and 89.0, at no more than 1.1 times the CPU seconds of Seedbed's own der++.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from continual_references import plain
from torch import Tensor, nn

from utils.adapters import ModelSpec
from utils.continual.accuracy_matrix import AccuracyMatrix, read_matrix
from utils.continual.config import ContinualConfig
from utils.continual.matrix_view import matrix_picture
from utils.continual.scenario import make_tasks
from utils.training import TrainingConfig
from utils.training.prepared_data import PreparedData
from utils.training.resume import train

BUFFER, BATCH = 500, 128
STREAMS: dict[str, dict[str, Any]] = {
    "split-mnist": {"data": "mnist", "split": "labels", "tasks": 5},
    "split-fashion": {"data": "fashion-mnist", "split": "labels", "tasks": 5},
    "permuted-mnist": {
        "data": "mnist", "split": "permutation", "setting": "domain", "tasks": 10, "samples_per_task": 10_000,
    },
}  # fmt: skip
METHODS = ("naive", "joint", "ewc", "agem", "replay", "der++", "consolidation")
FIGURES = {
    "split-mnist": {"naive": 19.2, "joint": 96.2, "agem": 38.8, "replay": 88.6, "der++": 91.7, "consolidation": 93.5},
    "split-fashion": {"naive": 19.8, "joint": 85.2, "agem": 32.5, "replay": 75.6, "der++": 77.6, "consolidation": 80.0},
    "permuted-mnist": {
        "naive": 65.4,
        "joint": 89.6,
        "ewc": 77.8,
        "agem": 81.4,
        "replay": 84.6,
        "der++": 88.4,
        "consolidation": 89.0,
    },
}
"""Average accuracy in percent of plain loops elsewhere, and what consolidation is to reach."""
SLACK, CPU_TARGET, OWN_TARGET = 1.0, 1.15, 1.1


def images(folder: Path) -> PreparedData:
    """Return one of the image sets in the form of a run's data."""

    def read(name: str, header: int) -> Tensor:
        content = gzip.decompress((folder / name).read_bytes())
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())

    sides = []
    for side in ("train", "t10k"):
        pixels = read(f"{side}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28).float() / 255
        sides.append({"pixel_values": pixels, "labels": read(f"{side}-labels-idx1-ubyte.gz", 8).long()})
    return PreparedData(folder.name, "image_classification", *sides, facts={"classes": 10, "sha256": ""})


def layers(seed: int) -> nn.Sequential:
    """Return the net with weights drawn from a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))


class Flat(nn.Module):
    """The net on images."""

    def __init__(self, seed: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.layers = layers(seed)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return ten scores."""
        return self.layers(pixel_values.flatten(1))


def settings(stream: str, method: str, seed: int) -> dict[str, Any]:
    """Return the settings of continual learning."""
    own = {name: value for name, value in STREAMS[stream].items() if name != "data"}
    return {**own, "method": method, "buffer": BUFFER, "shuffle_classes": seed > 0 and own["split"] == "labels"}


def with_seedbed(data: PreparedData, stream: str, method: str, seed: int) -> AccuracyMatrix:
    """Train through `utils.train`, on data without notes of an earlier run."""
    config = TrainingConfig(
        max_steps=None, max_epochs=1, batch_size=BATCH, learning_rate=1e-3, weight_decay=0.0, beta2=0.999,
        schedule="constant", warmup_share=0.0, clip_norm=1e6, seed=seed, val_every_steps=10**6, log_every_steps=100,
        checkpoint_every_steps=10**6, checkpoint_every_minutes=1e6, keep_best=0,
        continual=settings(stream, method, seed),
    )  # fmt: skip
    spec = ModelSpec(task="image_classification", num_labels=10)
    with tempfile.TemporaryDirectory() as folder:
        train(Flat(seed), data, config, Path(folder) / "run", spec=spec, progress=False)
        return read_matrix(Path(folder) / "run")


def one(data: PreparedData, stream: str, method: str, seed: int) -> dict[str, Any]:
    """Train one method for one seed, the plain loop first where there is one."""
    tasks = make_tasks(data, ContinualConfig.from_dict(settings(stream, method, seed)), seed)
    row: dict[str, Any] = {"stream": stream, "method": method, "seed": seed}
    if method != "consolidation":
        reference = plain(method, layers(seed), data, tasks, seed, BUFFER)
        row |= {"plain": 100 * statistics.mean(reference.rows[-1]), "plain_cpu": reference.cpu}
    matrix = with_seedbed(data, stream, method, seed)
    last = matrix.joint if method == "joint" else matrix.rows[-1]
    assert last is not None
    row |= {"accuracy": 100 * statistics.mean(last), "matrix": matrix.to_dict()}
    if matrix.rows:
        row |= {"forgetting": 100 * matrix.forgetting, "stored_floats": matrix.costs[-1].stored_floats}
        row["cpu"] = sum(cost.cpu_seconds or 0.0 for cost in matrix.costs)
    told = ", ".join(f"{k} {v:.2f}" for k, v in row.items() if isinstance(v, float))
    print(f"{stream} seed {seed} {method}: {told}", file=sys.stderr)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds and how they compare, as text."""
    lines = []
    for stream in dict.fromkeys(row["stream"] for row in rows):
        lines += [stream, f"  {'':14}{'Seedbed':>9}{'plain':>8}{'figure':>8}{'forgot':>8}{'CPU s':>8}{'/plain':>8}"]
        der = [row["cpu"] for row in rows if row["stream"] == stream and row["method"] == "der++"]
        for method in dict.fromkeys(row["method"] for row in rows if row["stream"] == stream):
            own = [row for row in rows if (row["stream"], row["method"]) == (stream, method)]

            def mean(name: str, own: list[dict[str, Any]] = own) -> str:
                values = [row[name] for row in own if name in row]
                return f"{statistics.mean(values):.2f}" if values else ""

            ratios = [row["cpu"] / row["plain_cpu"] for row in own if "cpu" in row and "plain_cpu" in row]
            if method == "consolidation" and der:
                ratios = [statistics.median(row["cpu"] for row in own) / statistics.median(der)]
            figure = FIGURES[stream].get(method, "")
            ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
            lines.append(
                f"  {method:14}{mean('accuracy'):>9}{mean('plain'):>8}{figure!s:>8}{mean('forgetting'):>8}"
                f"{mean('cpu'):>8}{ratio:>8}"
            )
    return "\n".join([*lines, "/plain of consolidation: over the CPU seconds of Seedbed's der++"])


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=root, help="folder with mnist and fashion-mnist")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--figures", type=Path, help="folder for the accuracy matrices of the last seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for stream in options.streams:
        data = images(options.data / STREAMS[stream]["data"])
        for seed in options.seeds:
            rows += [one(data, stream, method, seed) for method in options.methods]
    if options.figures is not None:
        options.figures.mkdir(parents=True, exist_ok=True)
        for row in rows:
            matrix = AccuracyMatrix.from_dict(row["matrix"])
            if matrix.rows:
                (options.figures / f"{row['stream']}-{row['method']}.png").write_bytes(matrix_picture(matrix))
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
