"""Does a language model learn as much with Seedbed as with a plain loop? Bits per byte of held-out text, in one run.

    python benchmarks/bits_per_byte.py                        three seeds, 614,400 tokens each
    python benchmarks/bits_per_byte.py --seeds 0 --preset fast --json

The example GPT is trained on ``builtin:python-docs`` with `utils.train`, settings as they come, and with a loop like
nanoGPT's, written out below: windows at random places of the token stream, AdamW with betas 0.9 and 0.95 and a weight
decay of 0.1 for matrices, warm-up and cosine to a tenth, clipping at 1, no dropout. The loop runs with nanoGPT's
learning rate for small models and, so that the learning rate alone does not decide, with Seedbed's. Each pair of runs
begins with the same weights and sees as many tokens with the same tokenizer; all are measured by the same code on the
same text. zlib and lzma pack that text alone, and primed with the training text: what the held-out text adds to it.
Target: Seedbed at or below the better loop.
"""

import argparse
import json
import lzma
import math
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional

import utils
from utils.adapters.objectives import IGNORED
from utils.training import TrainingConfig
from utils.training.corpora import load_texts, without_duplicates
from utils.training.dataset_utilities import prepare_data
from utils.training.needs import TEXT_SHARE
from utils.training.prepared_data import PreparedData
from utils.training.splitting import split_documents
from utils.ui.presets import preset

DATA = "builtin:python-docs"
LENGTH, DROPOUT = 128, 0.0
"""Tokens in a window and dropout, as the example's config.json has them."""
NANO_RATE, NANO_WARMUP = 1e-3, 0.02
"""nanoGPT's settings for small models: 1e-3, after a warm-up of 100 of 5000 steps."""


def fresh_model(seed: int, dropout: float) -> nn.Module:
    """Return the example GPT with weights drawn from a seed."""
    like = utils.load_model("example:gpt").module
    torch.manual_seed(seed)
    return type(like)(dropout=dropout)


def token_stream(windows: dict[str, Tensor]) -> Tensor:
    """Return the tokens ``(tokens,)`` that windows were cut from."""
    inputs, labels = windows["input_ids"].flatten(), windows["labels"].flatten()
    count = int((labels != IGNORED).sum())
    return torch.cat((inputs[:count], labels[count - 1 : count])).long()


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: PreparedData) -> float:
    """Return the bits of the whole held-out text under a model, by its bytes."""
    model.eval()
    nats = 0.0
    inputs, labels = data.validation["input_ids"].long(), data.validation["labels"].long()
    for start in range(0, len(inputs), 16):
        logits = model(inputs[start : start + 16]).flatten(0, 1)
        nats += float(functional.cross_entropy(logits, labels[start : start + 16].flatten(), reduction="sum"))
    return nats / math.log(2) / data.facts["validation_bytes"]


def with_seedbed(model: nn.Module, data: PreparedData, config: TrainingConfig, seed: int) -> None:
    """Train with `utils.train`."""
    from utils.training.resume import train

    with tempfile.TemporaryDirectory() as folder:
        train(model, data, config.with_changes(seed=seed), Path(folder) / "run", progress=False)


def with_loop(model: nn.Module, data: PreparedData, config: TrainingConfig, seed: int, peak: float) -> None:
    """Train with a loop like nanoGPT's."""
    for layer in model.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.0
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    tokens, length, steps = token_stream(data.train), int(data.facts["length"]), config.max_steps
    assert steps is not None
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    warmup = max(1, round(NANO_WARMUP * steps))
    drawn = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        if step < warmup:
            share = (step + 1) / (warmup + 1)
        else:
            share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = peak * share
        places = torch.randint(len(tokens) - length, (config.samples_per_step,), generator=drawn)
        inputs = torch.stack([tokens[place : place + length] for place in places])
        targets = torch.stack([tokens[place + 1 : place + 1 + length] for place in places])
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def compressors(data: PreparedData) -> dict[str, float]:
    """Return the bits per byte of general compressors on the held-out text."""
    sides = split_documents(without_duplicates(load_texts(DATA)), TEXT_SHARE, data.facts["length"], data.facts["seed"])
    train, held = ("\n".join(side).encode("utf-8") for side in sides)
    if len(held) != data.facts["validation_bytes"]:
        raise SystemExit(f"The held-out text has {len(held)} bytes, not {data.facts['validation_bytes']} as measured.")
    packers: dict[str, Callable[[bytes], bytes]] = {
        "zlib -9": lambda text: zlib.compress(text, 9),
        "lzma": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    result = {}
    for name, pack in packers.items():
        result[name] = 8 * len(pack(held)) / len(held)
        result[f"{name}, primed"] = 8 * (len(pack(train + b"\n" + held)) - len(pack(train))) / len(held)
    return result


def main() -> None:
    """Train with each, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", help="settings of a preset; those of TrainingConfig() otherwise")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--dropout", type=float, default=DROPOUT, help="of the model that Seedbed trains")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = preset(options.preset) if options.preset else TrainingConfig()
    config = config.with_changes(context_length=LENGTH)
    if options.steps:
        config = config.with_changes(max_steps=options.steps)
    data = prepare_data(fresh_model(0, options.dropout), DATA, config)
    rates = sorted({NANO_RATE, config.learning_rate})
    ways: dict[str, Callable[[nn.Module, int], None]] = {
        "Seedbed": lambda model, seed: with_seedbed(model, data, config, seed)
    }
    for rate in rates:
        ways[f"loop, learning rate {rate:g}"] = lambda model, seed, rate=rate: with_loop(
            model, data, config, seed, rate
        )
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in options.seeds:
        for name, work in ways.items():
            started, model = time.monotonic(), fresh_model(seed, options.dropout)
            work(model, seed)
            found[name].append(bits_per_byte(model, data))
            print(f"seed {seed}  {name}: {found[name][-1]:.4f}  ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    packed = compressors(data)
    means = {name: statistics.mean(values) for name, values in found.items()}
    ours, loop = means["Seedbed"], min(mean for name, mean in means.items() if name != "Seedbed")
    result = {
        "tokens": config.total_steps(1) * config.samples_per_step * data.facts["length"],
        "parameters": sum(p.numel() for p in fresh_model(0, 0.0).parameters()),
        "held_out_bytes": data.facts["validation_bytes"],
        "bits_per_byte": {**found, **{name: [value] for name, value in packed.items()}},
        "seedbed_over_better_loop": ours / loop,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens, {result['held_out_bytes']:,} bytes held out"
    )
    print(f"{'':<28}{'bits per byte':>14}{'over Seedbed':>14}  by seed")
    for name, value in {**means, **packed}.items():
        seeds = " ".join(f"{one:.4f}" for one in found.get(name, []))
        print(f"{name:<28}{value:>14.4f}{value / ours:>14.3f}  {seeds}".rstrip())
    verdict = "met" if ours <= loop else "missed"
    print(f"Seedbed over the better loop: {ours / loop:.4f} (target: at most 1, {verdict})")


if __name__ == "__main__":
    main()
