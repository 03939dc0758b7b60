"""What a training loop costs beside the model: microseconds of CPU and wall per step, over a raw PyTorch loop.

    python benchmarks/step_overhead.py                 all loops, 5 rounds
    python benchmarks/step_overhead.py --rounds 9 --steps 600 --json

Every loop trains the same linear classifier of 8 x 8 images with batches of 16, fused AdamW, clipping and a cosine, in
one thread; the model is so small that only the loop counts. Seedbed logs every 10 steps, shows its progress bar and has
its checkpoint writer on, whose thread counts too. Lightning runs as it comes (CSV logger, `self.log` of the loss,
progress bar, checkpoint callback) and lean (none of these). The HF Trainer logs every 10 steps, shows its bar and saves
once; it is left out where accelerate is missing. The loops take turns. A round gives a loop's median step; ``least`` is
the quietest round of each loop, for load from elsewhere only ever adds, and ``median`` is that of the rounds'
differences from the raw loop of the same round. ``mean`` counts rare work as well.
Target: Seedbed at most 220 microseconds of CPU on a machine where Lightning's default loop takes 506 and the HF Trainer
262, and ahead of both in the same run.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

BATCH = 16
PIXELS, CLASSES = 64, 10


class Classifier(nn.Module):
    """One linear layer over an image of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``."""
        return self.head(pixel_values.flatten(1))


def samples() -> dict[str, Tensor]:
    """Return 512 random images with labels."""
    made = torch.Generator().manual_seed(0)
    images = torch.randn(512, 1, 8, 8, generator=made)
    return {"pixel_values": images, "labels": torch.randint(CLASSES, (512,), generator=made)}


class Clock:
    """CPU time of the process and wall time at each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Note the end of a step."""
        self.times.append((time.process_time(), time.perf_counter()))

    def steps(self) -> dict[str, float]:
        """Return microseconds per step, without the first tenth: medians, and the mean, in which rare work counts."""
        kept = self.times[len(self.times) // 10 :]
        gaps = [(later[0] - one[0], later[1] - one[1]) for one, later in pairwise(kept)]
        return {
            "cpu": statistics.median(cpu for cpu, _ in gaps) * 1e6,
            "mean": statistics.mean(cpu for cpu, _ in gaps) * 1e6,
            "wall": statistics.median(wall for _, wall in gaps) * 1e6,
        }


def optimizer_of(model: nn.Module, steps: int) -> tuple[Any, Any]:
    """Return AdamW, fused as with Seedbed and the HF Trainer, and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def raw(steps: int, clock: Clock) -> None:
    """Train with a plain loop."""
    torch.manual_seed(0)
    model, data = Classifier(), samples()
    optimizer, schedule = optimizer_of(model, steps)
    order = torch.Generator().manual_seed(0)
    done = 0
    while done < steps:
        permutation = torch.randperm(512, generator=order)
        for start in range(0, 512, BATCH):
            chosen = permutation[start : start + BATCH]
            loss = nn.functional.cross_entropy(model(data["pixel_values"][chosen]), data["labels"][chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            clock.tick()
            done += 1
            if done == steps:
                return


def seedbed(steps: int, clock: Clock) -> None:
    """Train with `utils.train`."""
    from utils.adapters import ModelSpec
    from utils.training import TrainingConfig, training_core
    from utils.training.prepared_data import PreparedData
    from utils.training.resume import train
    from utils.training.session_callback import SessionCallback

    class Ticking(SessionCallback):
        def on_train_batch_end(self, *given: Any) -> None:
            super().on_train_batch_end(*given)
            clock.tick()

    facts = {"classes": CLASSES, "largest_class": 0.1, "image_shape": [1, 8, 8], "sha256": "", "seed": 0}
    data = samples()
    few = {name: tensor[:32].clone() for name, tensor in data.items()}
    prepared = PreparedData("random images", "image_classification", data, few, None, facts)
    config = TrainingConfig(
        max_steps=steps, batch_size=BATCH, log_every_steps=10, val_every_steps=steps, checkpoint_every_steps=steps // 2
    )
    original, training_core.SessionCallback = training_core.SessionCallback, Ticking  # type: ignore[misc]
    try:
        spec = ModelSpec(task="image_classification", example_inputs=None)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            train(Classifier(), prepared, config, Path(folder) / "run", spec=spec, progress=True)
    finally:
        training_core.SessionCallback = original  # type: ignore[misc]


def lightning(steps: int, clock: Clock, lean: bool = False) -> None:
    """Train with Lightning's own loop, as it comes or without logger, bar and checkpoints."""
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier()

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            if not lean:
                self.log("loss", loss, prog_bar=True)
            return loss

        def on_train_batch_end(self, *given: Any) -> None:
            clock.tick()

        def configure_optimizers(self) -> Any:
            optimizer, schedule = optimizer_of(self.model, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    data = samples()
    loader = DataLoader(TensorDataset(data["pixel_values"], data["labels"]), batch_size=BATCH, shuffle=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        settings: dict[str, Any] = {"logger": CSVLogger(folder)}
        if lean:
            settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", gradient_clip_val=1.0, enable_model_summary=False,
            default_root_dir=folder, **settings,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(Module(), loader)


def hf_trainer(steps: int, clock: Clock) -> None:
    """Train with the Trainer of transformers."""
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = samples()

    class Images(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 512

        def __getitem__(self, number: int) -> dict[str, Tensor]:
            return {"pixel_values": data["pixel_values"][number], "labels": data["labels"][number]}

    class WithLoss(Classifier):
        def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
            logits = super().forward(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Tick(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, logging_steps=10, report_to=[],
            save_steps=steps, use_cpu=True, disable_tqdm=False, lr_scheduler_type="cosine",
        )  # fmt: skip
        trainer = Trainer(WithLoss(), arguments, train_dataset=Images(), callbacks=[Tick()])
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer.train()


def main() -> None:
    """Let the loops take turns and print what each costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loops: dict[str, Callable[[int, Clock], None]] = {
        "raw loop": raw,
        "Seedbed": seedbed,
        "Lightning lean": lambda steps, clock: lightning(steps, clock, lean=True),
        "Lightning default": lightning,
    }
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401

        loops["HF Trainer"] = hf_trainer
    except ImportError:
        print("HF Trainer: not measured, accelerate is not installed", file=sys.stderr)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for _ in range(chosen.rounds):
        for name, loop in loops.items():
            clock = Clock()
            loop(chosen.steps, clock)
            rounds[name].append(clock.steps())
    result = {name: summary(measured, rounds["raw loop"]) for name, measured in rounds.items()}
    if chosen.json:
        print(json.dumps(result))
        return
    print(f"{'':<20}{'CPU of':>9}{'over the raw loop':>27}{'wall of':>10}{'over':>8}")
    print(f"{'microseconds':<20}{'a step':>9}{'least':>9}{'median':>9}{'mean':>9}{'a step':>10}{'raw':>8}")
    for name, row in result.items():
        print(f"{name:<20}{row['cpu']:>9.0f}{row['least']:>9.0f}{row['median']:>9.0f}{row['mean']:>9.0f}"
              f"{row['wall']:>10.0f}{row['wall_over']:>8.0f}")  # fmt: skip
    ours = result["Seedbed"]["least"]
    others = ", ".join(
        f"{ours / row['least']:.2f} of {name}" for name, row in result.items() if name not in ("raw loop", "Seedbed")
    )
    print(f"Seedbed's overhead: {others}")


def summary(measured: list[dict[str, float]], raw_loop: list[dict[str, float]]) -> dict[str, float]:
    """Return what a loop costs, and how much of it over the raw loop."""
    least = {key: min(one[key] for one in measured) for key in ("cpu", "mean", "wall")}
    base = {key: min(one[key] for one in raw_loop) for key in ("cpu", "mean", "wall")}
    return {
        "cpu": least["cpu"],
        "least": least["cpu"] - base["cpu"],
        "median": statistics.median(one["cpu"] - other["cpu"] for one, other in zip(measured, raw_loop, strict=True)),
        "mean": least["mean"] - base["mean"],
        "wall": least["wall"],
        "wall_over": least["wall"] - base["wall"],
    }


if __name__ == "__main__":
    main()
