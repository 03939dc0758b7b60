"""How far exported transformers are from the original: ten small families, four input shapes, several formats.

    python benchmarks/export_parity.py                               ONNX and torch.export
    python benchmarks/export_parity.py --families gpt2 bert --formats onnx onnx_int8

Every model has two layers and seeded random weights; a difference is the largest absolute difference of the logits from
the original's, on the CPU in float32, of files that were loaded back from disk. A family counts when its file takes
all shapes that the original takes and differs by at most 1e-5 at each; the others are listed with the reason.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

BOUND = 1e-5
WIDTH, LAYERS, HEADS, VOCABULARY = 64, 2, 4, 256


def families() -> dict[str, Callable[[], nn.Module]]:
    """Return how to build each family."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
    }  # fmt: skip
    decoder = {**usual, "num_key_value_heads": 2, "max_position_embeddings": 128}
    encoder = {**usual, "max_position_embeddings": 130}
    image = {k: v for k, v in usual.items() if k != "vocab_size"}
    return {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=128)
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**decoder)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**decoder)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**decoder)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**encoder)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**encoder)),
        "distilbert": lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=2 * WIDTH,
                                max_position_embeddings=128)
        ),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**image, image_size=32, patch_size=8, num_channels=3, num_labels=10)
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=LAYERS,
                        num_heads=HEADS, decoder_start_token_id=0)
        ),
        "mamba": lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8)
        ),
    }  # fmt: skip


def measure(build: Callable[[], nn.Module], formats: list[str]) -> dict[str, dict[str, Any]]:
    """Export one model; return status, differences by shape, reason and seconds by format."""
    from utils.training.export_utilities import export

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report = export(build().eval(), folder, formats, progress=False)
    return {result.format: result.to_dict() for result in report.results}


def within(result: dict[str, Any]) -> bool:
    """Tell whether a format takes at least four shapes and differs by at most the bound at each."""
    differences = [check["difference"] for check in result["checks"]]
    good = result["status"] == "ok" and len(differences) >= 4
    return good and all(value is not None and value <= BOUND for value in differences)


def main() -> None:
    """Export the families and print the differences."""
    parser = argparse.ArgumentParser(description="Differences of exported transformers from the originals.")
    parser.add_argument("--families", nargs="+", help="some of the ten")
    parser.add_argument("--formats", nargs="+", default=["onnx", "torch_export"])
    parser.add_argument("--json", metavar="FILE", help="also write all numbers here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = families()
    chosen = options.families or list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)} is not among {', '.join(known)}")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in chosen:
        started = time.perf_counter()
        results[name] = measure(known[name], options.formats)
        for form, result in results[name].items():
            shapes = "  ".join(
                f"{'x'.join(map(str, check['shape']))} "
                + ("refused" if check["difference"] is None else f"{check['difference']:.1e}")
                for check in result["checks"]
            )
            print(f"{name:<12}{form:<14}{result['status']:<13}{shapes}", flush=True)
            if result["status"] != "ok" or result["why"]:
                print(f"{'':<26}{result['why']}")
        print(f"{'':<26}{time.perf_counter() - started:.1f} s", flush=True)
    for form in options.formats:
        good = [name for name in results if within(results[name][form])]
        rest = [name for name in results if name not in good]
        left = f"; not: {', '.join(rest)}" if rest else ""
        print(f"{form}: {len(good)} of {len(results)} families within {BOUND:.0e} at four shapes{left}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
