"""What a growth event costs, and what it does to the training that follows: every operator, models of several sizes.

    python benchmarks/growth_events.py                      four sizes from 0.3 to 10 million parameters, three seeds
    python benchmarks/growth_events.py --sizes 0.3 1.2 --operators depth --seeds 0 --json

The example GPT learns the built-in text byte by byte for some steps, with the optimizer of `utils.train` at a learning
rate that stays. Then it goes on in copies: one is never grown (the twin), the others grow by one operator first. All
see the same batches. Measured are

- the event in training steps: CPU seconds of finding the parts, of planning on a copy, and of the change with its
  certificate, over those of one training step of the grown model; the median of several, each but the last undone, and
  the first alone, which also fills caches,
- the jump: the loss of a batch right after minus right before, in nats,
- the bump: the mean loss of the next 20 steps minus the twin's, in nats,
- the way back: whether parameters, buffers, optimizer state and random streams are bit for bit what they were, the
  same objects, and whether the next steps give the twin's losses bit for bit.

An operator that does not fit is listed with its reason.
Targets: at most two training steps, a jump of at most 1e-4, a bump of at most 0.01, and every way back exact.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import utils
from utils.adapters import ModelAdapter
from utils.adapters.structure import structure
from utils.growth.edits import GrowthError
from utils.growth.planning import PLANNERS, plan_growth
from utils.growth.request import Request
from utils.growth.transaction import Grown, grow_by
from utils.runtime.seeding import stream_states
from utils.training import TrainingConfig
from utils.training.corpora import load_texts
from utils.training.parts import LightningPart
from utils.training.schedules import make_optimizer, parameter_groups
from utils.training.state import RunState

DATA, VOCABULARY, HEADS = "builtin:python-docs", 256, 4
SHAPES = {0.3: (64, 6), 1.2: (128, 6), 3.2: (256, 4), 10.0: (320, 8)}
"""Width and blocks of the models, by millions of parameters."""
AMOUNTS: dict[str, Callable[[int, int], int]] = {
    "depth": lambda width, blocks: blocks,
    "feed_forward": lambda width, blocks: 2 * width,
    "heads": lambda width, blocks: HEADS // 2,
    "residual": lambda width, blocks: width // 2,
    "vocabulary": lambda width, blocks: 16,
}
"""How much an operator adds to a model of some width and number of blocks; 1 where nothing is said."""
WARMUP, AFTER, AGAIN = 60, 20, 3
"""Steps before the event, steps after it that are compared, and how often it is made."""
STEPS_TARGET, JUMP_TARGET, BUMP_TARGET = 2.0, 1e-4, 0.01


@dataclass
class Lab:
    """A model in training, and what remembers something about it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainingConfig

    def __post_init__(self) -> None:
        """Wrap the parts as a run does."""
        self.adapter = ModelAdapter(self.model)
        groups = lambda: parameter_groups(self.model, self.config.weight_decay)  # noqa: E731
        self.state = RunState({"optimizer": LightningPart("optimizer", self.optimizer, groups)})

    def copy(self) -> "Lab":
        """Return the same model and optimizer once more."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Lab(model, optimizer, self.config)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch in nats."""
        return self.adapter.loss(self.adapter.logits({"input_ids": batch["input_ids"]}), batch["labels"])

    def train(self, batches: list[dict[str, Tensor]], rate: float, rising: int = 0) -> tuple[list[float], float]:
        """Train on batches, the rate rising over the first few; return losses and the median CPU seconds of a step."""
        losses, seconds = [], []
        self.model.train()
        for number, batch in enumerate(batches):
            started = time.process_time()
            for group in self.optimizer.param_groups:
                group["lr"] = rate * (1.0 if number >= rising else (number + 1) / rising)
            loss = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            self.optimizer.step()
            losses.append(float(loss.detach()))
            seconds.append(time.process_time() - started)
        return losses, statistics.median(seconds)

    def everything(self) -> list[Any]:
        """Return copies of all that an undo has to bring back, and the identities of what holds them."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        moments = self.optimizer.state_dict()
        streams = stream_states()
        return [
            [(name, id(tensor), tensor.detach().clone()) for name, tensor in named],
            [[id(p) for p in group["params"]] for group in self.optimizer.param_groups],
            copy.deepcopy(moments),
            (streams["torch"].clone(), streams["python"], repr(streams["numpy"])),
        ]


def equal(left: Any, right: Any) -> bool:
    """Tell whether nested values are equal, tensors bit for bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def batches_of(seed: int, count: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """Return batches of windows at random places of the built-in text, one id per byte."""
    ids = torch.frombuffer(bytearray("\n".join(load_texts(DATA)).encode()), dtype=torch.uint8).long()
    drawn = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        places = torch.randint(len(ids) - length - 1, (rows,), generator=drawn)
        windows = torch.stack([ids[place : place + length + 1] for place in places.tolist()])
        made.append({"input_ids": windows[:, :-1].contiguous(), "labels": windows[:, 1:].contiguous()})
    return made


def grow(lab: Lab, operator: str, amount: int, batch: dict[str, Tensor], seed: int) -> tuple[Grown, dict[str, float]]:
    """Make one event; return it and the CPU seconds of its parts."""
    clock = [time.process_time()]
    found = structure(lab.adapter)
    clock.append(time.process_time())
    plan = plan_growth(lab.adapter, Request(operator, amount), found)
    clock.append(time.process_time())
    grown = grow_by(
        lab.adapter, plan, {"input_ids": batch["input_ids"]}, lambda: float(lab.loss(batch).detach()),
        lab.state.migrate, seed, WARMUP,
    )  # fmt: skip
    clock.append(time.process_time())
    parts = ("parts", "planning", "change")
    return grown, {name: late - early for name, early, late in zip(parts, clock, clock[1:], strict=False)}


def event(
    lab: Lab, twin: list[float], operator: str, amount: int, later: list[dict[str, Tensor]], seed: int, rate: float
) -> dict[str, Any]:
    """Measure one operator on a trained model, whose twin had these losses."""
    before = lab.everything()
    costs: list[dict[str, float]] = []
    exact = True
    try:
        for _ in range(AGAIN):
            grown, cost = grow(lab, operator, amount, later[0], seed)
            costs.append(cost)
            grown.undo()
            exact = exact and equal(before, lab.everything())
    except GrowthError as error:
        return {"operator": operator, "refused": str(error.found)}
    followed = lab.copy()
    exact = exact and followed.train(later[:3], rate)[0] == twin[:3]
    grown, cost = grow(lab, operator, amount, later[0], seed)
    costs.append(cost)
    losses, step = lab.train(later, rate)
    certificate = grown.event.certificate
    assert certificate is not None
    totals = [sum(cost.values()) for cost in costs]
    return {
        "operator": operator,
        "refused": None,
        "promise": grown.event.plan.promise,
        "parameters": [grown.event.parameters_before, grown.event.parameters_after],
        "step_seconds": step,
        "seconds": {name: statistics.median(cost[name] for cost in costs) for name in costs[0]},
        "steps": statistics.median(totals) / step,
        "first_steps": totals[0] / step,
        "jump": certificate.jump,
        "difference": certificate.difference,
        "bump": statistics.mean(losses) - statistics.mean(twin),
        "rollback_exact": exact,
    }


def measured(size: float, operators: list[str], seed: int, rows: int, length: int) -> Iterator[dict[str, Any]]:
    """Yield the measurements of one size and seed."""
    width, blocks = SHAPES[size]
    config = TrainingConfig()
    rate = float(config.learning_rate)
    like = type(utils.load_model("example:gpt").module)
    torch.manual_seed(seed)
    model = like(vocab_size=VOCABULARY, d_model=width, nhead=HEADS, num_layers=blocks, dropout=0.0)
    start = Lab(model, make_optimizer(model, config), config)
    batches = batches_of(seed, WARMUP + AFTER, rows, length)
    start.train(batches[:WARMUP], rate, WARMUP // 3)
    later = batches[WARMUP:]
    twin, _ = start.copy().train(later, rate)
    for operator in operators:
        amount = AMOUNTS.get(operator, lambda width, blocks: 1)(width, blocks)
        yield {"size": size, "seed": seed, **event(start.copy(), twin, operator, amount, later, seed, rate)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=float, nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--operators", nargs="+", choices=sorted(PLANNERS), default=list(PLANNERS))
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--length", type=int, default=128, help="bytes in a window")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        for seed in options.seeds:
            for row in measured(size, options.operators, seed, options.batch, options.length):
                rows.append(row)
                print(f"{size:g}M seed {seed} {row['operator']}", file=sys.stderr)
    made = [row for row in rows if row["refused"] is None]
    worst = {
        "steps": max((row["steps"] for row in made), default=0.0),
        "jump": max((row["jump"] for row in made), default=0.0),
        "bump": max((row["bump"] for row in made), default=0.0),
        "rollback_exact": all(row["rollback_exact"] for row in made),
    }
    if options.json:
        print(json.dumps({"tokens_per_step": options.batch * options.length, "rows": rows, "worst": worst}))
        return
    print(f"steps of {options.batch} x {options.length} bytes; each number is the worst of {len(options.seeds)} seeds")
    print(f"{'':<6}{'operator':<14}{'parameters':<24}{'a step':>8}{'event':>8} {'= parts + plan + change':<26}"
          f"{'in steps':>9}{'first':>7}{'jump':>10}{'bump':>9}  way back")  # fmt: skip
    for size in options.sizes:
        for operator in options.operators:
            same = [row for row in rows if (row["size"], row["operator"]) == (size, operator)]
            refused = [row["refused"] for row in same if row["refused"] is not None]
            if refused:
                print(f"{size:>4g}M {operator:<14}refused: {refused[0]}")
                continue
            worst_of = {name: max(row[name] for row in same) for name in ("steps", "first_steps", "jump", "bump")}
            old, new = same[0]["parameters"]
            seconds = {name: max(row["seconds"][name] for row in same) for name in same[0]["seconds"]}
            together = " + ".join(f"{1e3 * value:.0f}" for value in seconds.values()) + " ms"
            print(
                f"{size:>4g}M {operator:<14}{f'{old:,} -> {new:,}':<24}"
                f"{1e3 * max(row['step_seconds'] for row in same):>5.0f} ms{1e3 * sum(seconds.values()):>5.0f} ms   "
                f"{together:<24}{worst_of['steps']:>9.2f}{worst_of['first_steps']:>7.2f}"
                f"{worst_of['jump']:>10.1e}{worst_of['bump']:>9.4f}  "
                f"{'exact' if all(row['rollback_exact'] for row in same) else 'NOT EXACT'}"
            )
    for name, value, target in (
        ("training steps", worst["steps"], STEPS_TARGET),
        ("jump in nats", worst["jump"], JUMP_TARGET),
        ("bump in nats", worst["bump"], BUMP_TARGET),
    ):
        print(f"most {name}: {value:.3g} (target: at most {target:g}, {'met' if value <= target else 'missed'})")
    print(f"ways back: {'all exact' if worst['rollback_exact'] else 'NOT all exact'}")


if __name__ == "__main__":
    main()
