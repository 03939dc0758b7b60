"""How much compute does growth save? A character model of 1.2 million parameters on tiny Shakespeare, grown and not.

    python benchmarks/growth_compute.py                              three seeds, an hour and a half of CPU
    python benchmarks/growth_compute.py --steps 1600 --seeds 0 --figure growth.png
    python benchmarks/growth_compute.py --data my.txt --json

Five ways to a GPT of six blocks, all with the same optimizer, the same windows in the same order, and weights drawn
from the same seed:

- scratch: six blocks from the start, with `utils.train`;
- Seedbed: `utils.train` with a growth schedule that begins shallow and inserts blocks that keep the function;
- stacking: as Seedbed, but the new blocks are copies of the old ones (G_stack, Du et al., arXiv:2405.15319);
- random: as Seedbed, but the new blocks are drawn as for a new model (Deep Progressive Training);
- shorter: scratch with fewer steps, as many as cost what Seedbed costs.

The last three are written out below, begin the optimizer state of new blocks anew as Seedbed does here, and get as many
FLOPs as Seedbed, its events included. Growing runs take a quarter more steps than scratch, most of them shallow.
FLOPs are counted by torch for one step of each size, forward and backward, times the steps, plus those of the growth
events: finding the parts, planning on a copy, the change and its certificate. CPU seconds are those of all threads of
the whole call, measurements on the way included. Under ``--schedule wsd`` scratch falls steeply at the end of any run;
whether it has nearly stopped improving is seen under ``--schedule cosine``.
Targets: scratch's loss on the held-out text, without tolerance, with at most 50% of its FLOPs and 55% of its CPU
seconds (stretch: 35%), where scratch gains less than 1% in its last quarter; less loss than stacking and random for
every seed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import utils
from utils.adapters import ModelAdapter
from utils.growth.lineage import read_lineage
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.transaction import grow_by
from utils.runtime.optional import require
from utils.training import TrainingConfig
from utils.training.prepared_data import PreparedData
from utils.training.schedules import learning_rate_share, make_optimizer
from utils.training.stream import SampleStream

DATA = "tinyshakespeare/input.txt"
"""Where the text is, in the folder of shared data beside the checkout."""
WIDTH, HEADS, BLOCKS, LENGTH, BATCH = 128, 4, 6, 64, 8
STEPS, CURVE = 8000, 128
"""Steps of scratch; windows of the held-out text that are measured on the way."""
SCRATCH: dict[str, Any] = {
    "learning_rate": 2e-3, "schedule": "wsd", "decay_share": 0.25, "final_learning_rate_share": 0.0,
}  # fmt: skip
GROWN: dict[str, Any] = {
    "learning_rate": 2e-3, "schedule": "wsd", "decay_share": 0.3, "final_learning_rate_share": 0.0,
}  # fmt: skip
BEGIN, LASTS = 1, 1.25
"""Blocks that a growing model begins with, and its steps over scratch's: steps of a shallow model are cheap."""
SCHEDULE: tuple[tuple[float, int, int | None], ...] = ((0.5, 2, None), (0.85, 6, None))
"""Events of a growing model: share of its run, depth, and the block behind which Seedbed inserts the new ones."""
FLOPS_TARGET, CPU_TARGET, STRETCH, STILL = 0.5, 0.55, 0.35, 0.01
WAYS = ("stacking", "random", "shorter")


@dataclass
class Outcome:
    """One trained model."""

    loss: float
    """On all of the held-out text, in nats for each character."""
    flops: float
    """Of all steps and events."""
    cpu: float
    """Seconds of all threads."""
    steps: int
    curve: list[tuple[int, float]]
    """Steps done and loss on a part of the held-out text."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Step, depth, and loss of a batch right before and after."""


def prepared(path: Path) -> tuple[PreparedData, dict[str, Tensor]]:
    """Return a text as windows of character ids, the last tenth of it held out, and all of the held-out windows."""
    text = path.read_text(encoding="utf-8")
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[character] for character in text])
    cut = int(0.9 * len(ids))

    def windows(part: Tensor) -> dict[str, Tensor]:
        rows = (len(part) - 1) // LENGTH
        inputs, labels = part[: rows * LENGTH], part[1 : rows * LENGTH + 1]
        return {"input_ids": inputs.view(rows, LENGTH), "labels": labels.view(rows, LENGTH)}

    train, held = windows(ids[:cut]), windows(ids[cut:])
    first = {name: tensor[:CURVE] for name, tensor in held.items()}
    size = int(first["labels"].numel())
    facts = {"length": LENGTH, "vocab_size": len(known), "validation_bytes": size, "zlib_bits_per_byte": 8.0}
    return PreparedData(path.name, "causal_lm", train, first, None, {**facts, "sha256": ""}), held


def fresh_model(seed: int, vocabulary: int, blocks: int) -> nn.Module:
    """Return the example GPT with weights drawn from a seed."""
    like = type(utils.load_model("example:gpt").module)
    torch.manual_seed(seed)
    return like(vocab_size=vocabulary, d_model=WIDTH, nhead=HEADS, num_layers=blocks, dropout=0.0)


def batch_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch in nats."""
    return functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, held: dict[str, Tensor]) -> float:
    """Return the mean loss over held-out windows in nats."""
    model.eval()
    total = 0.0
    for start in range(0, len(held["input_ids"]), 64):
        batch = {name: tensor[start : start + 64] for name, tensor in held.items()}
        total += float(batch_loss(model, batch)) * batch["labels"].numel()
    model.train()
    return total / held["labels"].numel()


class Costs:
    """FLOPs of what a run is made of, counted once for each size."""

    def __init__(self, data: PreparedData) -> None:
        """Count for models that read this data."""
        self.data, self.vocabulary = data, int(data.facts["vocab_size"])
        self.batch = {name: tensor[:BATCH] for name, tensor in data.train.items()}
        self._steps: dict[int, float] = {}
        self._events: dict[tuple[int, int], float] = {}

    def step(self, blocks: int) -> float:
        """Return the FLOPs of one step, forward and backward."""
        if blocks not in self._steps:
            model = fresh_model(0, self.vocabulary, blocks)
            with FlopCounterMode(display=False) as counter:
                batch_loss(model, self.batch).backward()
            self._steps[blocks] = float(counter.get_total_flops())
        return self._steps[blocks]

    def event(self, before: int, after: int) -> float:
        """Return the FLOPs of one growth event: finding the parts, planning, and the change with its certificate."""
        if (before, after) not in self._events:
            adapter = ModelAdapter(fresh_model(0, self.vocabulary, before))
            inputs = {"input_ids": self.batch["input_ids"]}
            with FlopCounterMode(display=False) as counter:
                plan = plan_growth(adapter, Request("depth", to=after))
                grow_by(adapter, plan, inputs, lambda: float(batch_loss(adapter.module, self.batch).detach()))
            self._events[before, after] = float(counter.get_total_flops())
        return self._events[before, after]

    def training(self, steps: int, depths: dict[int, int]) -> list[float]:
        """Return the FLOPs spent after each step; `depths` tells the depth from a step on."""
        spent, total, blocks = [], 0.0, 0
        for step in range(steps):
            blocks = depths.get(step, blocks)
            total += self.step(blocks)
            spent.append(total)
        return spent


def schedule_of(steps: int) -> dict[int, int]:
    """Return the depth of a growing model by the step from which it has it."""
    return {0: BEGIN, **{max(1, round(share * steps)): blocks for share, blocks, _ in SCHEDULE}}


def config_of(settings: dict[str, Any], steps: int, seed: int) -> TrainingConfig:
    """Return the settings of a run."""
    return TrainingConfig(
        max_steps=steps, batch_size=BATCH, context_length=LENGTH, seed=seed, beta2=0.99,
        warmup_share=min(0.1, 100 / steps), val_every_steps=max(1, steps // 16), log_every_steps=100,
        checkpoint_every_steps=steps, checkpoint_every_minutes=1e6, keep_best=0, **settings,
    )  # fmt: skip


def with_seedbed(data: PreparedData, held: dict[str, Tensor], config: TrainingConfig, blocks: int, costs: Costs
                 ) -> Outcome:  # fmt: skip
    """Train with `utils.train`, with growth if the settings say so."""
    from utils.training.metrics import read_metrics
    from utils.training.resume import train

    steps, model = int(config.max_steps or 0), fresh_model(config.seed, costs.vocabulary, blocks)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        run = train(model, data, config, Path(folder) / "run", progress=False)
        seconds = time.process_time() - started
        lineage = read_lineage(run.directory)
        if len(lineage) < len((config.growth or {}).get("schedule", ())):
            raise SystemExit(f"A growth event was refused: {' '.join(run.notes)}")
        rows = read_metrics(run.directory / "metrics.csv")
    curve = [(int(row["step"]), float(row["loss"])) for row in rows if row["split"] == "validation"]
    events = []
    for event in lineage:
        seen = event.certificate
        assert seen is not None
        row = {"step": event.step, "blocks": event.plan.after, "before": seen.loss_before, "after": seen.loss_after}
        events.append({**row, "equal": seen.equal})
    depths = {0: blocks, **{event.step: event.plan.after for event in lineage}}
    flops = costs.training(steps, depths)[-1]
    flops += sum(costs.event(event.plan.before, event.plan.after) for event in lineage)
    return Outcome(held_out_loss(run.model, held), flops, seconds, steps, curve, events)


def with_loop(data: PreparedData, held: dict[str, Tensor], config: TrainingConfig, depths: dict[int, int], how: str,
              costs: Costs) -> Outcome:  # fmt: skip
    """Train with a plain loop that puts copies or newly drawn blocks on top."""
    steps = int(config.max_steps or 0)
    model = fresh_model(config.seed, costs.vocabulary, depths[0])
    optimizer, stream = make_optimizer(model, config), SampleStream(data.train, BATCH, config.seed)
    curve, events = [], []
    started = time.process_time()
    for step, batch in enumerate(stream.batches(steps)):
        if step in depths and step:
            before = float(batch_loss(model, batch).detach())
            _extend(model, depths[step], how, config.seed)
            held_back, optimizer = optimizer, make_optimizer(model, config)
            for parameter, state in held_back.state.items():
                optimizer.state[parameter] = state
            after = float(batch_loss(model, batch).detach())
            events.append({"step": step, "blocks": depths[step], "before": before, "after": after, "equal": False})
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_share(step, steps, config)
        loss = batch_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        if (step + 1) % config.val_every_steps == 0:
            curve.append((step + 1, held_out_loss(model, data.validation)))
    seconds = time.process_time() - started
    return Outcome(held_out_loss(model, held), costs.training(steps, depths)[-1], seconds, steps, curve, events)


def _extend(model: nn.Module, blocks: int, how: str, seed: int) -> None:
    """Put blocks on top: copies of the old ones in order, again and again, or those of a new model of that depth."""
    old: Any = model.get_submodule("blocks")
    vocabulary, kept = model.get_parameter("embed.weight").shape[0], len(old)
    new: Any = fresh_model(seed + 1, vocabulary, blocks).get_submodule("blocks")
    for number in range(kept, blocks):
        if how == "stacking":
            new[number].load_state_dict(old[number % kept].state_dict())
        old.append(new[number])


def one_seed(
    seed: int, steps: int, schedule: str, ways: list[str], data: PreparedData, held: dict[str, Tensor], costs: Costs
) -> dict[str, Outcome]:
    """Train all ways for one seed."""
    found: dict[str, Outcome] = {}
    alone = {**SCRATCH, "schedule": schedule}

    def note(name: str, outcome: Outcome) -> None:
        found[name] = outcome
        print(f"seed {seed}  {name}: {outcome.loss:.4f}  ({outcome.cpu:.0f} s of CPU)", file=sys.stderr)

    note("scratch", with_seedbed(data, held, config_of(alone, steps, seed), BLOCKS, costs))
    lasts = max(2, round(LASTS * steps))
    depths = schedule_of(lasts)
    wishes = [
        {"at": max(1, round(share * lasts)), "operator": "depth", "to": blocks, "where": where}
        for share, blocks, where in SCHEDULE
    ]
    grown = config_of(GROWN, lasts, seed).with_changes(growth={"schedule": wishes, "new_second_moment": "zero"})
    note("Seedbed", with_seedbed(data, held, grown, BEGIN, costs))
    # As many steps more as make up for the events, which copies and new blocks do not need.
    more = -int(-(found["Seedbed"].flops - costs.training(lasts, depths)[-1]) // costs.step(BLOCKS))
    for how in ways:
        if how == "shorter":
            fewer = round(found["Seedbed"].flops / costs.step(BLOCKS))
            note(how, with_loop(data, held, config_of(alone, fewer, seed), {0: BLOCKS}, how, costs))
        else:
            note(how, with_loop(data, held, config_of(GROWN, lasts + more, seed), depths, how, costs))
    return found


def verdicts(found: dict[int, dict[str, Outcome]]) -> list[dict[str, Any]]:
    """Return each target with the numbers of each seed and whether all of them meet it."""

    def verdict(target: str, numbers: list[float], met: list[bool]) -> dict[str, Any]:
        return {"target": target, "by_seed": numbers, "met": all(met)}

    seeds = list(found.values())
    gaps = [seed["Seedbed"].loss - seed["scratch"].loss for seed in seeds]
    flops = [seed["Seedbed"].flops / seed["scratch"].flops for seed in seeds]
    cpu = [seed["Seedbed"].cpu / seed["scratch"].cpu for seed in seeds]
    late = [_late_gain(seed["scratch"]) for seed in seeds]
    made = [
        verdict(f"scratch gains less than {STILL:.0%} in its last quarter", late, [gain < STILL for gain in late]),
        verdict("Seedbed's loss minus scratch's is at most 0", gaps, [gap <= 0 for gap in gaps]),
        verdict(f"FLOPs over scratch's at most {FLOPS_TARGET:.0%}", flops, [share <= FLOPS_TARGET for share in flops]),
        verdict(f"CPU seconds over scratch's at most {CPU_TARGET:.0%}", cpu, [share <= CPU_TARGET for share in cpu]),
        verdict(f"stretch: FLOPs at most {STRETCH:.0%}", flops, [share <= STRETCH for share in flops]),
    ]
    for way in WAYS:
        if all(way in seed for seed in seeds):
            differences = [seed["Seedbed"].loss - seed[way].loss for seed in seeds]
            made.append(verdict(f"Seedbed's loss minus {way}'s is below 0", differences, [d < 0 for d in differences]))
    return made


def _late_gain(outcome: Outcome) -> float:
    """Return by which share of itself the loss fell in the last quarter."""
    start = min(outcome.curve, key=lambda point: abs(point[0] - 0.75 * outcome.steps))[1]
    return (start - outcome.curve[-1][1]) / start


def figure(path: Path, found: dict[int, dict[str, Outcome]], costs: Costs) -> None:
    """Draw the loss on held-out windows over the FLOPs, with the growth events, for the first seed."""
    require("matplotlib", "draw the losses")
    from matplotlib.figure import Figure

    outcomes = next(iter(found.values()))
    drawn = Figure(figsize=(7, 4.2), layout="constrained")
    panel = drawn.subplots()
    for name, outcome in outcomes.items():
        depths = {0: BLOCKS if name in ("scratch", "shorter") else BEGIN}
        depths |= {event["step"]: event["blocks"] for event in outcome.events}
        spent = [0.0, *costs.training(outcome.steps, depths)]
        line = panel.plot([spent[step] / 1e12 for step, _ in outcome.curve], [loss for _, loss in outcome.curve],
                          label=f"{name}: {outcome.loss:.4f} on all held-out text")[0]  # fmt: skip
        for step in [step for step in depths if step and name == "Seedbed"]:
            place = spent[step] / 1e12
            panel.axvline(place, color=line.get_color(), linestyle=":", linewidth=1)
            panel.annotate(f" {depths[step]} blocks", (place, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
    bottom = min(loss for outcome in outcomes.values() for _, loss in outcome.curve)
    panel.set(xlabel="TFLOP", ylabel="loss of held-out windows, nats per character", ylim=(bottom - 0.05, bottom + 0.7))
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=140)


def main() -> None:
    """Train all ways, compare and print."""
    shared = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of scratch")
    parser.add_argument("--schedule", choices=("wsd", "cosine"), default=SCRATCH["schedule"], help="of scratch")
    parser.add_argument("--data", type=Path, default=shared / DATA, help="any text")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="opponents beside scratch")
    parser.add_argument("--figure", type=Path, help="draw the losses over the FLOPs into this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not options.data.is_file():
        raise SystemExit(f"Skipped: there is no text at {options.data}. Give one with --data FILE.")
    torch.set_num_threads(1)
    data, held = prepared(options.data)
    costs = Costs(data)
    found = {
        seed: one_seed(seed, options.steps, options.schedule, options.ways, data, held, costs) for seed in options.seeds
    }
    judged = verdicts(found)
    if options.figure:
        figure(options.figure, found, costs)
    parameters = sum(p.numel() for p in fresh_model(0, costs.vocabulary, BLOCKS).parameters())
    if options.json:
        outcomes = {seed: {name: vars(outcome) for name, outcome in ways.items()} for seed, ways in found.items()}
        print(json.dumps({"parameters": parameters, "steps": options.steps, "outcomes": outcomes, "verdicts": judged}))
        return
    print(f"{parameters:,} parameters, {options.steps:,} steps of {BATCH} x {LENGTH} characters, "
          f"{held['labels'].numel():,} characters held out")  # fmt: skip
    print(f"{'':<10}{'loss':>8}{'FLOPs':>8}{'CPU':>8}{'steps':>8}  loss by seed")
    for name in next(iter(found.values())):
        same = [ways[name] for ways in found.values()]
        flops = statistics.mean(ways[name].flops / ways["scratch"].flops for ways in found.values())
        cpu = statistics.mean(ways[name].cpu / ways["scratch"].cpu for ways in found.values())
        by_seed = " ".join(f"{outcome.loss:.4f}" for outcome in same)
        loss = statistics.mean(outcome.loss for outcome in same)
        print(f"{name:<10}{loss:>8.4f}{flops:>8.1%}{cpu:>8.1%}{same[0].steps:>8,}  {by_seed}")
    for seed, ways in found.items():
        for name, outcome in ways.items():
            for event in outcome.events:
                equal = ", all answers equal" if event["equal"] else ""
                print(f"seed {seed}  {name} to {event['blocks']} blocks at step {event['step']:,}: "
                      f"loss {event['before']:.6f} -> {event['after']:.6f}{equal}")  # fmt: skip
    for row in judged:
        numbers = " ".join(f"{number:.4f}" for number in row["by_seed"])
        print(f"{row['target']}: {numbers} ({'met' if row['met'] else 'missed'})")


if __name__ == "__main__":
    main()
