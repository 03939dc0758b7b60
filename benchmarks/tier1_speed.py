"""Seconds and peak memory of Tier 1 beside one forward and backward pass of the same model.

    python benchmarks/tier1_speed.py                    GPT-2, 124M parameters, from a transformers config
    python benchmarks/tier1_speed.py --model small      a GPT-2 of 0.2M parameters
    python benchmarks/tier1_speed.py --threads 1

Each measurement runs in a process of its own, so that its peak is its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = {"gpt2": {}, "small": {"vocab_size": 256, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 4}}


def build(size: str):
    """Return a GPT-2 with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    settings = SIZES[size]
    last = settings.get("vocab_size", 50257) - 1
    return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=last, eos_token_id=last))


def measure(what: str, size: str, threads: int, short: bool) -> dict[str, object]:
    """Measure one thing in this process."""
    import torch

    torch.set_num_threads(threads)
    from utils.runtime.resources import peak_memory

    model = build(size)
    before = peak_memory()
    started = time.perf_counter()
    answer: dict[str, object] = {}
    if what == "tier1":
        from utils.tier1_critical_validation import validate

        report = validate(model, progress=False)
        answer = {"verdict": report.verdict, "text": report.text()}
    elif what == "pass":
        length = 17 if short else model.config.n_positions
        ids = torch.randint(model.config.vocab_size, (1, length))
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
    else:
        import torchinfo

        ids = torch.randint(model.config.vocab_size, (1, model.config.n_positions))
        torchinfo.summary(model, input_data={"input_ids": ids}, verbose=0)
    seconds = time.perf_counter() - started
    return {**answer, "seconds": seconds, "peak": peak_memory(), "before": before}


def in_process(what: str, arguments: argparse.Namespace, *extra: str) -> dict | None:
    """Run one measurement in a fresh process; None when its package is missing."""
    command = [sys.executable, __file__, "--measure", what, "--model", arguments.model]
    command += ["--threads", str(arguments.threads), *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if "No module named 'torchinfo'" in done.stderr:
            return None
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="gpt2", help="which model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--short", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.model, arguments.threads, arguments.short)))
        return
    tier1 = in_process("tier1", arguments)
    rows = [
        ("Tier 1", tier1),
        ("forward + backward, maximum length", in_process("pass", arguments)),
        ("forward + backward, 17 tokens", in_process("pass", arguments, "--short")),
        ("torchinfo summary, maximum length", in_process("torchinfo", arguments)),
    ]
    assert tier1 is not None
    print(tier1["text"])
    print(f"{'':<36} {'seconds':>8} {'peak GB':>8} {'Tier 1 takes':>13}")
    for name, row in rows:
        if row is None:
            print(f"{name:<36} not installed")
        else:
            ratio = tier1["seconds"] / row["seconds"]
            print(f"{name:<36} {row['seconds']:8.2f} {row['peak'] / 1e9:8.2f} {ratio:11.1f} x")


if __name__ == "__main__":
    main()
