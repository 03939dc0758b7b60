"""Tier 1 as a whole: every kind of sound model is ready, arguments are checked."""

import ast
import dataclasses
import functools
import inspect
import sys

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import AdapterError, ConfigError
from utils.tier1_critical_validation import TIER1, run_tier1, validate
from utils.validation.codes import MEANING

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
    with pytest.raises(ConfigError, match=r"tiers is the text '2'. Expected numbers. Pass \(1,\), "):
        validate(model, tiers="2")
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
    """Ids are unique, all belong to tier 1, and every kind of finding has a check that looks for it."""
    assert len({check.id for check in TIER1}) == len(TIER1) and {check.tier for check in TIER1} == {1}
    listed = {code for check in TIER1 for code in check.codes}
    assert set(MEANING) - listed == {"process_died", "timed_out"}, "those two end the validation before any check"
    assert listed <= set(MEANING)


ASKED_ONLY = {"padding": "mixes_samples", "signal_propagation": "weight_faults", "low_precision": "weight_faults"}
"""Functions of other checks that a check calls to learn whether it applies; it reports nothing of what they find."""


@pytest.mark.parametrize("check", TIER1, ids=lambda check: check.id)
def test_codes_of_a_check_are_those_its_functions_can_report(check):
    """Found by reading the source: every code in a function that the check reaches is listed, and no other."""
    assert codes_behind(check.run, ASKED_ONLY.get(check.id)) == set(check.codes)


def codes_behind(function, left_out):
    """Return the codes written in a function and in what it uses of `utils.validation`, except to compare with them."""
    found, seen, todo = set(), {(function.__module__, left_out)}, [(function.__module__, function.__name__)]
    while todo:
        place = todo.pop()
        node = defined(place[0]).get(place[1])
        if place in seen or node is None:
            continue
        seen.add(place)
        if isinstance(node, tuple):
            todo.append(node)
            continue
        compared = {id(part) for test in ast.walk(node) if isinstance(test, ast.Compare) for part in ast.walk(test)}
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and part.value in MEANING and id(part) not in compared:
                found.add(part.value)
            elif isinstance(part, ast.Name):
                todo.append((place[0], part.id))
    return found


@functools.cache
def defined(module):
    """Map each name at the top of a module to its node, or to the module of `utils.validation` it is imported from."""
    names = {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils.validation"):
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names
