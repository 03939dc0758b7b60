"""How much does a language model forget when it learns one domain after another? Seedbed's methods on real text.

    python benchmarks/continual_language.py                                  all methods, three seeds
    python benchmarks/continual_language.py --methods naive consolidation --seeds 0 --json

A small GPT reads Python's documentation, then Python code, then Shakespeare, then Twain, each once, and is measured on
held-out text of all four after each. The tokenizer is that of the first domain, because later ones are not known yet.
The memory holds 1% of the windows that are trained on. Forgetting is how much the loss on the earlier domains rose
above its lowest value, in nats per token, the mean over them. CPU seconds are those of training alone, with everything
that a run does between two measurements. Target: the forgetting of consolidation at most a third of naive's.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.continual.accuracy_matrix import AccuracyMatrix, read_matrix
from utils.continual.matrix_view import matrix_picture
from utils.training import TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.prepared_data import PreparedData
from utils.training.resume import train

METHODS = ("naive", "consolidation", "replay", "ewc", "ewc+replay", "joint")
MODEL = {"vocab_size": 1024, "d_model": 96, "nhead": 3, "num_layers": 3, "dropout": 0.0}
LENGTH, BATCH = 64, 16
SAMPLES, HELD_OUT = 1600, 96
"""Windows of each domain to train on and to measure on."""
BUFFER_SHARE, TARGET = 0.01, 1 / 3


def fresh_model(seed: int) -> nn.Module:
    """Return the example GPT with weights drawn from a seed."""
    like = utils.load_model("example:gpt", config=MODEL).module
    torch.manual_seed(seed)
    return type(like)(**MODEL)


def settings(method: str, seed: int, samples: int) -> TrainingConfig:
    """Return the settings of a run."""
    return TrainingConfig(
        max_steps=None, max_epochs=1, batch_size=BATCH, learning_rate=2e-3, weight_decay=0.0,
        context_length=LENGTH, seed=seed, val_every_steps=10**6, log_every_steps=100,
        checkpoint_every_steps=10**6, checkpoint_every_minutes=1e6, keep_best=0,
        continual={
            "method": method, "split": "parts", "setting": "domain", "samples_per_task": samples,
            "buffer": round(BUFFER_SHARE * 4 * samples),
        },
    )  # fmt: skip


def domains(folder: Path, held_out: int) -> PreparedData:
    """Return the four domains as windows of token ids, some of what is held out of each spread over all of it."""
    with tempfile.TemporaryDirectory() as place:
        twain = Path(place) / "twain.txt"
        books = ("twain-huckleberry-finn.txt", "twain-tom-sawyer.txt")
        twain.write_text("\n".join((folder / "gutenberg" / name).read_text("utf-8") for name in books), "utf-8")
        named = {
            "documentation": "builtin:python-docs", "code": "builtin:python-code",
            "Shakespeare": f"file:{folder / 'tinyshakespeare' / 'input.txt'}", "Twain": f"file:{twain}",
        }  # fmt: skip
        spec = ModelSpec(task="causal_lm")
        data = prepare_data(ModelAdapter(fresh_model(0), spec=spec), named, settings("naive", 0, 1))
    kept, parts, start = [], [], 0
    for part in data.facts["parts"]:
        rows = torch.linspace(0, part["validation"] - 1, min(held_out, part["validation"])).long().unique()
        kept.append(start + rows)
        start += part["validation"]
        parts.append({**part, "validation": len(rows)})
    validation = {name: value[torch.cat(kept)] for name, value in data.validation.items()}
    return replace(data, validation=validation, facts={**data.facts, "parts": parts, "validation_unknown": True})


def one(data: PreparedData, method: str, seed: int, samples: int) -> dict[str, Any]:
    """Train one method for one seed, on data without notes of an earlier run."""
    with tempfile.TemporaryDirectory() as folder:
        spec = ModelSpec(task="causal_lm")
        config = settings(method, seed, samples)
        run = train(fresh_model(seed), data, config, Path(folder) / "run", spec=spec, progress=False)
        if not run.finished:
            raise SystemExit(f"{method}: the run {run.status} at step {run.step}.")
        matrix = read_matrix(Path(folder) / "run")
    last = matrix.joint if method == "joint" else matrix.rows[-1]
    assert last is not None
    row: dict[str, Any] = {"method": method, "seed": seed, "loss": statistics.mean(last), "matrix": matrix.to_dict()}
    if matrix.rows:
        row |= {"forgetting": matrix.forgetting, "learned": matrix.learning_accuracy}
        row |= {"cpu": sum(cost.cpu_seconds or 0.0 for cost in matrix.costs), "stored": matrix.costs[-1].stored_samples}
        print(matrix.text(), file=sys.stderr)
    told = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
    print(f"seed {seed} {method}: {told}", file=sys.stderr, flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds, and the forgetting of each as a share of naive's, as text."""
    naive = {row["seed"]: row["forgetting"] for row in rows if row["method"] == "naive"}
    lines = [f"{'':16}{'final loss':>12}{'forgot':>9}{'of naive':>10}{'learned to':>12}{'CPU s':>8}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]

        def told(name: str, own: list[dict[str, Any]] = own) -> str:
            values = [row[name] for row in own if name in row]
            return f"{statistics.mean(values):.3f}" if values else ""

        shares = [row["forgetting"] / naive[row["seed"]] for row in own if "forgetting" in row and row["seed"] in naive]
        share = f"{statistics.mean(shares):.3f}" if shares else ""
        lines.append(
            f"{method:16}{told('loss'):>12}{told('forgetting'):>9}{share:>10}{told('learned'):>12}{told('cpu'):>8}"
        )
    return "\n".join([*lines, f"nats per token; target of consolidation: {TARGET:.3f} of naive's forgetting"])


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=root, help="folder with tinyshakespeare and gutenberg")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows of each domain to train on")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--figures", type=Path, help="folder for the matrices of the last seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = domains(options.data, HELD_OUT)
    for part in data.facts["parts"]:
        print(part, file=sys.stderr)
    rows = [one(data, method, seed, options.samples) for seed in options.seeds for method in options.methods]
    if options.figures is not None:
        options.figures.mkdir(parents=True, exist_ok=True)
        for row in rows:
            matrix = AccuracyMatrix.from_dict(row["matrix"])
            if matrix.rows:
                (options.figures / f"language-{row['method']}.png").write_bytes(matrix_picture(matrix))
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
