"""Architectures of transformers, built small from their configs; left out where the package is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from benchmarks.zoo.entry import Entry, sound

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 120,
}
PLACES = {"max_position_embeddings": 64}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {"image_size": 32, "patch_size": 8, "num_labels": 5}
RECIPES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "GPTNeoXForCausalLM": {**SMALL, **PLACES}, "LlamaForCausalLM": {**SMALL, **PLACES, "num_key_value_heads": 2},
    "MistralForCausalLM": {**SMALL, **PLACES, "num_key_value_heads": 2}, "Qwen2ForCausalLM": {**SMALL, **PLACES, "num_key_value_heads": 2},
    "GemmaForCausalLM": {**SMALL, **PLACES, "num_key_value_heads": 2, "head_dim": 8},
    "MixtralForCausalLM": {**SMALL, **PLACES, "num_key_value_heads": 2, "num_local_experts": 4},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120},
    "OPTForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 120, "word_embed_proj_dim": 32, **PLACES},
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 120, "state_size": 8},
    "BertForMaskedLM": {**SMALL, **PLACES}, "RobertaForMaskedLM": {**SMALL, "max_position_embeddings": 66, "pad_token_id": 1},
    "DistilBertForSequenceClassification": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 120, **PLACES},
    "ElectraForMaskedLM": {**SMALL, **PLACES, "embedding_size": 16}, "AlbertForMaskedLM": {**SMALL, **PLACES, "embedding_size": 16},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 120, "decoder_start_token_id": 0},
    "BartForConditionalGeneration": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 120, **PLACES},
    "ViTForImageClassification": {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, **VISION},
    "ResNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
    "ConvNextForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 5, "image_size": 32},
    "SwinForImageClassification": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "image_size": 32, "num_labels": 5},
}  # fmt: skip


def build(name: str) -> nn.Module:
    """Return the architecture `name` with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind = getattr(transformers, name)
    settings = {**IDS, **RECIPES[name]} if "vocab_size" in RECIPES[name] else RECIPES[name]
    return kind(kind.config_class(**settings))


def entry(name: str) -> Entry:
    """Describe the architecture `name`."""
    return sound(f"transformers {name}", lambda: build(name))


ENTRIES = [entry(name) for name in RECIPES] if importlib.util.find_spec("transformers") else []
