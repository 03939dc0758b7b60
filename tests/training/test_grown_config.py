import json

import pytest
import torch

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.lineage import read_lineage, rebuild
from utils.training.export_utilities import export
from utils.training.grown_config import fitting_config, layout
from utils.training.weights import load_weights

GPT = {"vocab_size": 60, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 2}


def test_more_blocks_are_said_by_the_config(tmp_path):
    loaded = utils.load_model("example:gpt", config=GPT)
    utils.grow(loaded, "depth", 3)
    settings = fitting_config(loaded, ModelAdapter(loaded))
    assert settings["num_layers"] == 5
    assert {**settings, "num_layers": 2} == loaded.config
    report = export(loaded, tmp_path / "out", formats=("safetensors",), progress=False)
    assert report.results[0].status == "ok"
    assert "config.json builds it as it is now: num_layers 2 -> 5" in report.results[0].why
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_layers"] == 5
    again = utils.load_model(tmp_path / "out", trust=True).module.eval()
    load_weights(again, tmp_path / "out" / "model.safetensors")
    tokens = torch.randint(0, 60, (2, 9))
    assert torch.equal(again(tokens), loaded.module.eval()(tokens))


def test_nested_settings_and_several_sizes_at_once(tmp_path):
    (tmp_path / "model.py").write_text(
        "from torch import nn\n\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, **config):\n"
        "        super().__init__()\n"
        "        width, parts = config['sizes']['width'], config['sizes']['parts']\n"
        "        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(parts)])\n\n"
        "    def forward(self, x):\n"
        "        for layer in self.layers:\n"
        "            x = layer(x)\n"
        "        return x\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"sizes": {"width": 4, "parts": 2}, "model_name": "Model"}))
    loaded = utils.load_model(tmp_path, trust=True)
    spec = ModelSpec(example_inputs={"x": torch.randn(2, 6)})
    grown = type(loaded.module)(sizes={"width": 6, "parts": 3})
    assert fitting_config(loaded, ModelAdapter(grown, spec=spec))["sizes"] == {"width": 6, "parts": 3}


def test_what_no_setting_says_is_told(tmp_path):
    loaded = utils.load_model("example:gpt", config=GPT)
    utils.grow(loaded, "feed_forward", 8, where=0)
    assert fitting_config(loaded, ModelAdapter(loaded)) is None
    report = export(loaded, tmp_path / "out", formats=("safetensors",), progress=False)
    assert "no setting of its code says" in report.results[0].why
    assert report.results[0].status == "ok"
    assert layout(loaded.factory()) != layout(loaded.module)
    again = utils.load_model(tmp_path / "out", trust=True).module.eval()
    rebuild(again, read_lineage(tmp_path / "out"))
    load_weights(again, tmp_path / "out" / "model.safetensors")
    tokens = torch.randint(0, 60, (2, 9))
    assert torch.equal(again(tokens), loaded.module.eval()(tokens))


def test_a_grown_transformers_model_is_exported_with_a_config_of_its_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "source")
    loaded = utils.load_model(tmp_path / "source")
    utils.grow(loaded, "depth", 1)
    assert sum(p.numel() for p in loaded.factory().parameters()) < loaded.num_parameters
    export(loaded, tmp_path / "out", formats=("safetensors",), progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 60, (2, 9))
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, loaded.module.eval()(tokens).logits, atol=1e-5)
