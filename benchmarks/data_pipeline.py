"""Does the data pipeline keep up? Both questions are ratios of times measured in one run, in turns.

    python benchmarks/data_pipeline.py [--rounds 5] [--json]

1. Batches: the tokens a second that packing and loading give (text tokenized already, and with tokenizing) beside those
   that the example GPT trains on, forward, backward and optimizer step. Target: packing and loading at least 10 times.
2. Tokenizing: `TextTokenizer.encode` beside calling the same ``tokenizers.Tokenizer`` directly on the same documents
   and taking its ids. Target: at most 1.2 times the time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from utils.adapters import ModelAdapter
from utils.tokenization import choose_tokenizer, pack_causal
from utils.training import TrainingConfig
from utils.training.corpora import load_texts, without_duplicates
from utils.training.dataset_utilities import load_data
from utils.training.evaluation import objective
from utils.training.schedules import make_optimizer
from utils.training.text_stream import open_stream

GPT = {"vocab_size": 1024, "max_seq_len": 128, "d_model": 128, "nhead": 4, "num_layers": 4, "dropout": 0.0}
BATCH, BATCHES, STEPS = 16, 300, 4


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this process: other work on the machine does not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = without_duplicates(load_texts("builtin:python-docs"))
    tokenizer = choose_tokenizer(texts, GPT["vocab_size"])
    encoded = tokenizer.encode(texts)
    tokens = sum(map(len, encoded))
    data = load_data("builtin:python-docs", task="causal_lm", vocab_size=GPT["vocab_size"], max_length=128)
    adapter = ModelAdapter(utils.load_model("example:gpt", config=GPT))
    config = TrainingConfig(batch_size=BATCH)
    optimizer = make_optimizer(adapter.module, config)
    stream = open_stream(data, config)
    adapter.module.train()

    def train() -> None:
        for number, batch in enumerate(stream.batches(STEPS)):
            objective(adapter, data, batch, number)[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def load() -> None:
        for _ in stream.batches(BATCHES):
            pass

    def ours() -> None:
        tokenizer.encode(texts)

    def directly() -> None:
        found = tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        _ = [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    works = {
        "train": (train, STEPS * BATCH * 128),
        "load": (load, BATCHES * BATCH * 128),
        "pack": (lambda: pack_causal(encoded, 128, tokenizer.eos_id or 0), tokens),
        "encode": (ours, tokens),
        "directly": (directly, tokens),
    }
    for work, _ in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, (work, _) in works.items():
            times[name].append(seconds(work))
    per_token = {name: [t / works[name][1] for t in taken] for name, taken in times.items()}

    def ratio(above: Callable[[int], float], below: Callable[[int], float]) -> float:
        return statistics.median(above(i) / below(i) for i in range(options.rounds))

    def cost(*names: str) -> Callable[[int], float]:
        return lambda i: sum(per_token[name][i] for name in names)

    result = {
        "tokens_per_cpu_second": {name: round(1 / statistics.median(taken)) for name, taken in per_token.items()},
        "pack_and_load_over_training": round(ratio(cost("train"), cost("pack", "load")), 1),
        "encode_pack_and_load_over_training": round(ratio(cost("train"), cost("encode", "pack", "load")), 1),
        "encode_over_tokenizers": round(ratio(cost("encode"), cost("directly")), 3),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"tokens a CPU second: {result['tokens_per_cpu_second']}")
    print(f"packing and loading: {result['pack_and_load_over_training']} times what the GPT consumes (target: 10)")
    print(f"with tokenizing: {result['encode_pack_and_load_over_training']} times")
    print(f"tokenizing: {result['encode_over_tokenizers']} times the time of tokenizers directly (target: at most 1.2)")


if __name__ == "__main__":
    main()
