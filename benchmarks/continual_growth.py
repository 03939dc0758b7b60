"""Does a net that grows with its stream of tasks end as good as one that was large from the start? Real images.

    python benchmarks/continual_growth.py                                    both streams, three seeds
    python benchmarks/continual_growth.py --streams permuted-mnist --seeds 0 --json

The streams and settings are those of `continual_methods.py`; the method is consolidation with 500 remembered samples.
Nets learn each stream with `utils.train`: one of 784-400-400-10 all along; one that begins with smaller hidden layers
and widens both when tasks end (`TrainingConfig.growth`, operator channels); and, as a control, one that stays as small
as that began. A smaller net learns at a higher rate, the large one's times the ratio of the first widths, as Adam's
rate scales with width (Yang et al., Tensor Programs V, arXiv:2203.03466, table 3); another control is the large net at
that rate. FLOPs are those of all training steps, forward and backward, remembered samples included: counted
by torch for one step of each size, times its steps, plus the events. What is done once at a task's end (answers and
Fisher information) and measurements are left out for all. At each event the logits of held-out samples of all
tasks that have ended are compared before and after. Targets: the grown net ends within 0.5 points of the large one with
at most 60% of its FLOPs; no logit moves by more than 1e-5 of the largest.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from continual_methods import BATCH, BUFFER, STREAMS, images
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.continual.accuracy_matrix import read_matrix
from utils.continual.methods.consolidation import REPLAYED
from utils.growth.extension import GrowthExtension
from utils.growth.lineage import read_lineage
from utils.runtime.isolation import preserved
from utils.training import TrainingConfig
from utils.training.prepared_data import PreparedData
from utils.training.resume import train

WIDTH, RATE = 400, 1e-3
NETS = ("large", "faster", "grown", "small")
Plan = tuple[tuple[int, int, int], ...]
PLANS: dict[str, Plan] = {
    "split-mnist": ((1, 240, 160), (3, 320, 240)),
    "permuted-mnist": ((1, 240, 240), (6, 300, 300)),
}
"""For each stream the hidden layers of a growing net, with the task (from 1) with which each size begins."""
FLOPS_TARGET, POINTS_TARGET, MOVED_TARGET = 0.6, 0.5, 1e-5
SPEC = ModelSpec(task="image_classification", num_labels=10)
WHERE = ("layers.0", "layers.2")
SHOWN = 64


class Flat(nn.Module):
    """Two hidden layers on images."""

    def __init__(self, first: int, second: int, seed: int = 0) -> None:
        """Draw the weights from a seed."""
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return ten scores."""
        return self.layers(pixel_values.flatten(1))


def settings(stream: str, seed: int, steps: int, plan: Plan, rate: float) -> TrainingConfig:
    """Return the settings of a run whose net grows when tasks end."""
    own = {name: value for name, value in STREAMS[stream].items() if name != "data"}
    own |= {"method": "consolidation", "buffer": BUFFER, "shuffle_classes": seed > 0 and own["split"] == "labels"}
    events = [
        {"at": round(steps * (task - 1) / own["tasks"]), "operator": "channels", "to": to, "where": where}
        for before, (task, *after) in pairwise(plan)
        for where, was, to in zip(WHERE, before[1:], after, strict=True)
        if to != was
    ]
    return TrainingConfig(
        max_steps=steps, batch_size=BATCH, learning_rate=rate, weight_decay=0.0, beta2=0.999,
        schedule="constant", warmup_share=0.0, clip_norm=1e6, seed=seed, val_every_steps=10**6, log_every_steps=100,
        checkpoint_every_steps=10**6, checkpoint_every_minutes=1e6, keep_best=0, continual=own,
        growth={"schedule": events, "on_refusal": "stop"} if events else None,
    )  # fmt: skip


def step_flops(first: int, second: int) -> int:
    """Return the FLOPs of a training step with remembered samples, of a net with some widths."""
    net, total = Flat(first, second), 0
    for rows in (BATCH, REPLAYED * BATCH):
        with FlopCounterMode(display=False) as counter:
            functional.cross_entropy(net(torch.zeros(rows, 784)), torch.zeros(rows, dtype=torch.long)).backward()
        total += counter.get_total_flops()
    return total


def event_flops(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Return the FLOPs of going from some widths to others: planning, trying it on copies, and the certificate."""
    net = ModelAdapter(Flat(*before), spec=SPEC)
    with FlopCounterMode(display=False) as counter:
        for where, was, to in zip(WHERE, before, after, strict=True):
            if to != was:
                utils.grow(net, "channels", to=to, where=where, inputs={"pixel_values": torch.rand(8, 1, 28, 28)})
    return int(counter.get_total_flops())


@contextmanager
def watched() -> Iterator[list[float]]:
    """Yield the largest change that each event makes to a logit of an earlier task, as a share of the largest."""
    moved: list[float] = []
    original = GrowthExtension.grow

    def answers(session: Any) -> Tensor:
        learner, found = session.extensions["continual"].learner, []
        with preserved(learner.module), torch.no_grad():
            learner.module.eval()
            for task in learner.tasks[: learner.task.number + 1]:
                shown = task.batch(learner.data.validation, task.validation[:SHOWN])
                found.append(learner.module(shown["pixel_values"]))
        return torch.cat(found)

    def grow(self: GrowthExtension, session: Any, *arguments: Any, **named: Any) -> Any:
        before = answers(session)
        grown = original(self, session, *arguments, **named)
        moved.append(float((answers(session) - before).abs().max() / before.abs().max()))
        return grown

    GrowthExtension.grow = grow  # type: ignore[method-assign]
    try:
        yield moved
    finally:
        GrowthExtension.grow = original  # type: ignore[method-assign]


def one(data: PreparedData, stream: str, seed: int, plan: Plan, rate: float) -> dict[str, Any]:
    """Train one net and return what came of it."""
    own = STREAMS[stream]
    samples = own["tasks"] * own["samples_per_task"] if "samples_per_task" in own else data.train_samples
    steps = samples // BATCH
    config = settings(stream, seed, steps, plan, rate)
    with tempfile.TemporaryDirectory() as folder, watched() as moved:
        directory = Path(folder) / "run"
        run = train(Flat(*plan[0][1:], seed), data, config, directory, spec=SPEC, progress=False)
        if not run.finished:
            raise SystemExit(f"{stream}: the run {run.status} at step {run.step}.")
        matrix = read_matrix(directory)
        events = read_lineage(directory) if len(plan) > 1 else []
    starts = [0, *sorted({event.step for event in events})]
    if len(starts) != len(plan) or len(events) != len((config.growth or {"schedule": ()})["schedule"]):
        raise SystemExit(f"{stream}: an event was refused, after {len(events)}.")
    lasted = [end - start for start, end in zip(starts, [*starts[1:], steps], strict=True)]
    flops = sum(count * step_flops(*widths) for count, (_, *widths) in zip(lasted, plan, strict=True))
    flops += sum(event_flops(before[1:], after[1:]) for before, after in pairwise(plan))
    certified = [event.certificate.difference for event in events if event.certificate is not None]
    return {
        "accuracy": 100 * statistics.mean(matrix.rows[-1]), "forgetting": 100 * matrix.forgetting, "flops": flops,
        "cpu": sum(cost.cpu_seconds or 0.0 for cost in matrix.costs), "events": len(events),
        "moved": max(moved, default=0.0), "certified": max(certified, default=0.0),
    }  # fmt: skip


def compare(data: PreparedData, stream: str, seed: int) -> dict[str, Any]:
    """Train the nets on one stream."""
    plan, large = PLANS[stream], ((1, WIDTH, WIDTH),)
    rate = RATE * WIDTH / plan[0][1]
    nets: dict[str, tuple[Plan, float]] = {
        "large": (large, RATE), "faster": (large, rate), "grown": (plan, rate), "small": (plan[:1], rate),
    }  # fmt: skip
    row: dict[str, Any] = {"stream": stream, "seed": seed, "widths": ["-".join(map(str, one[1:])) for one in plan]}
    for name, arguments in nets.items():
        row[name] = one(data, stream, seed, *arguments)
        told = ", ".join(f"{key} {value:.4g}" for key, value in row[name].items())
        print(f"{stream} seed {seed} {name}: {told}", file=sys.stderr, flush=True)
    row["flops_share"] = row["grown"]["flops"] / row["large"]["flops"]
    row["points"] = row["grown"]["accuracy"] - row["large"]["accuracy"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds as text."""
    lines = [
        f"{'':16}" + "".join(f"{net:>8}" for net in NETS) + f"{'points':>8}{'FLOPs':>8}{'CPU':>7}{'moved':>10}  widths"
    ]
    for stream in dict.fromkeys(row["stream"] for row in rows):
        own = [row for row in rows if row["stream"] == stream]
        means = [statistics.mean(row[net]["accuracy"] for row in own) for net in NETS]
        points, share = (statistics.mean(row[name] for row in own) for name in ("points", "flops_share"))
        cpu = sum(row["grown"]["cpu"] for row in own) / sum(row["large"]["cpu"] for row in own)
        moved = max(row["grown"]["moved"] for row in own)
        lines.append(
            f"{stream:16}" + "".join(f"{value:8.2f}" for value in means) + f"{points:8.2f}{share:8.3f}{cpu:7.2f}"
            f"{moved:10.1e}  {', '.join(own[0]['widths'])}"
        )
    return "\n".join([*lines, f"targets: at least -{POINTS_TARGET} points, at most {FLOPS_TARGET} of the FLOPs, "
                      f"at most {MOVED_TARGET:.0e} moved; FLOPs and CPU seconds of grown over large"])  # fmt: skip


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=root, help="folder with mnist")
    parser.add_argument("--streams", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        compare(images(options.data / STREAMS[stream]["data"]), stream, seed)
        for stream in options.streams
        for seed in options.seeds
    ]
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
