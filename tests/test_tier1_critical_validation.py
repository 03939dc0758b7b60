"""Tier 1 as a whole: every kind of sound model is ready, arguments are checked."""

import dataclasses

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import AdapterError, ConfigError
from utils.tier1_critical_validation import TIER1, run_tier1, validate

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def transformers_model(kind):
    """Build a small model of transformers from a config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_positions=64, **sizes))
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=99, max_position_embeddings=64, **TINY))
    if kind == "bare_bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=99, max_position_embeddings=64, **TINY))
    if kind == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=32, patch_size=8, num_labels=10, **TINY)
        )
    if kind == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=99, max_position_embeddings=128, **TINY)
        )
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=99, **sizes))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "bare_bert", "vit", "llama", "t5"])
def test_sound_transformers_are_ready(kind):
    """No fault, no warning, nothing that could not run."""
    torch.set_num_threads(1)
    report = validate(transformers_model(kind), progress=False)
    assert report.verdict == "READY" and report.findings == (), report.text()
    assert [result.check for result in report.results] == [check.id for check in TIER1]


@pytest.mark.parametrize("name", ["gpt", "bert", "vit"])
def test_builtin_examples_are_ready(name):
    """The examples that users start from must be sound."""
    from utils.loading import load_model

    torch.set_num_threads(1)
    report = validate(load_model(f"example:{name}"), progress=False)
    assert report.verdict == "READY" and report.findings == (), report.text()
    assert report.seconds < 15


def test_output_kinds():
    """Logits in a tuple, a list, a dict or a dataclass, wherever they stand."""

    @dataclasses.dataclass
    class Answer:
        features: torch.Tensor
        logits: torch.Tensor

    class Model(nn.Module):
        def __init__(self, pack):
            super().__init__()
            self.embed, self.head, self.pack = nn.Embedding(50, 8), nn.Linear(8, 50), pack

        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.pack(x, self.head(x))

    packs = (
        lambda x, y: (x, y),
        lambda x, y: [y],
        lambda x, y: {"hidden": x, "logits": y},
        lambda x, y: Answer(x, y),
    )
    for pack in packs:
        report = validate(Model(pack), progress=False)
        assert report.verdict == "READY", report.text()
        assert report.task == "causal_lm"


def test_arguments():
    """A tier that is none, no tier, a foolish budget, no module: clear errors."""
    model = nn.Linear(8, 3)
    with pytest.raises(ConfigError, match=r"Tier 3 was asked for. Validation has Tier 1 .* and Tier 2 "):
        validate(model, tiers=(1, 3))
    with pytest.raises(ConfigError, match="No tier was asked for"):
        validate(model, tiers=())
    with pytest.raises(ConfigError, match=r"time_budget is -3. Expected seconds, more than 0."):
        validate(model, time_budget=-3)
    with pytest.raises(AdapterError, match="A str was given where a model was expected"):
        validate("example:gpt")


def test_adapter_spec_and_config_are_used():
    """What the user states reaches the checks."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    adapter = ModelAdapter(model)
    assert run_tier1(adapter, progress=False).task == "tabular_classification"
    assert run_tier1(adapter, spec=ModelSpec(task="regression"), progress=False).task == "regression"


def test_checks_are_registered_once():
    """Ids are unique, and all belong to tier 1."""
    assert len({check.id for check in TIER1}) == len(TIER1) == 7 and {check.tier for check in TIER1} == {1}
