import json
import math
import sys

import pytest
import torch

import utils
from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError, DataError, RunError
from utils.training import TrainingConfig
from utils.training.baseline import Comparison, Contender, benchmark, paired_difference, reference_model
from utils.training.dataset_utilities import load_data, prepare_data

CONFIG = TrainingConfig(max_steps=16, batch_size=4, log_every_steps=5, val_every_steps=4, checkpoint_every_steps=50)
LINEAR = """
from torch import nn


class Bigram(nn.Module):
    def __init__(self, vocab_size=300, width=64, {arguments}):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids):
        return self.head(self.mix(self.embed(input_ids)))
"""


@pytest.fixture
def bigram(tmp_path):
    """A model with no attention at all, loaded from source."""
    folder = tmp_path / "bigram"
    folder.mkdir()
    (folder / "model.py").write_text(LINEAR.format(arguments="max_seq_len=32"))
    (folder / "config.json").write_text('{"vocab_size": 300, "max_seq_len": 32, "model_name": "Bigram"}')
    return utils.load_model(folder)


def comparison(differences, tmp_path=None) -> Comparison:
    losses = [2.0 + d for d in differences]
    model = Contender("Mine", 1000, tuple(losses), tuple(((1, 3.0), (2, x)) for x in losses), 0.02, None)
    plain = Contender("plain GPT", 1010, (2.0,) * len(losses), (((1, 3.0), (2, 2.0)),) * len(losses), 0.01, None)
    return Comparison(
        model, plain, paired_difference(model.losses, plain.losses), "file:x", "causal_lm", tuple(range(len(losses))),
        2, tmp_path, {"d_model": 8},
    )  # fmt: skip


def test_both_see_the_same_batches_and_the_numbers_are_those_of_the_runs(tmp_path, text_file, bigram):
    result = benchmark(bigram, f"file:{text_file}", CONFIG, tmp_path / "out", seeds=(0, 1), progress=False)
    assert abs(result.reference.parameters / result.model.parameters - 1) <= 0.05
    assert (result.model.name, result.reference.name) == ("Bigram", "plain GPT")
    fingerprints = set()
    for seed in (0, 1):
        for kind, contender in (("model", result.model), ("reference", result.reference)):
            place = tmp_path / "out" / f"seed-{seed}" / kind
            record, summary = (json.loads((place / name).read_text()) for name in ("run.json", "summary.json"))
            assert record["config"]["seed"] == seed
            assert summary["validation_loss"] == contender.losses[seed]
            fingerprints.add(json.dumps(record["data"], sort_keys=True))
    assert len(fingerprints) == 1
    expected = paired_difference(result.model.losses, result.reference.losses)
    assert result.difference == expected
    assert [step for step, _ in result.model.curves[0]] == [4, 8, 12, 16]
    assert result.model.curves[0] != result.model.curves[1], "the seeds differ"
    assert result.time_ratio > 0
    # Two linear layers per token, forward, and backward twice that but for what no gradient flows into.
    assert result.model.step_flops > 2 * 4 * 32 * (64 * 64 + 64 * 300) * 2
    before = result.to_dict()
    again = benchmark(bigram, f"file:{text_file}", CONFIG, tmp_path / "out", seeds=(0, 1), progress=False)
    assert again.to_dict()["model"]["losses"] == before["model"]["losses"], "finished runs are read, not trained again"
    with pytest.raises(RunError, match="batch_size is 4, not 8"):
        benchmark(bigram, f"file:{text_file}", CONFIG.with_changes(batch_size=8), tmp_path / "out", progress=False)


def test_images_have_a_small_vit_beside_them(tmp_path):
    model = utils.load_model("example:vit", config={"d_model": 32, "num_layers": 2})
    data = prepare_data(ModelAdapter(model), "builtin:digits", CONFIG)
    plain = reference_model(data, model.num_parameters)
    assert plain.name == "ViT"
    assert abs(plain.num_parameters / model.num_parameters - 1) <= 0.05
    images = data.train["pixel_values"][:2]
    assert plain.module(images).shape == (2, plain.config["num_classes"])


@pytest.mark.parametrize("parameters", [30_000, 98_765, 1_000_000, 20_000_000])
def test_the_reference_has_the_size_asked_for(text_file, parameters):
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=32)
    plain = reference_model(data, parameters)
    assert abs(plain.num_parameters / parameters - 1) <= 0.05
    assert 2 <= plain.config["d_model"] / plain.config["num_layers"] <= 200
    assert plain.module(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 300)


def test_what_has_no_reference_is_told(text_file):
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=32)
    with pytest.raises(DataError, match="No plain transformer with 500 parameters"):
        reference_model(data, 500)
    from dataclasses import replace

    with pytest.raises(DataError, match="no plain transformer to compare with for regression"):
        reference_model(replace(data, task="regression"), 1000)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_must_be_different(bigram, seeds):
    with pytest.raises(ConfigError, match="Expected different seeds"):
        benchmark(bigram, "builtin:python-docs", CONFIG, seeds=seeds)


def test_a_run_that_is_stopped_is_told_and_continued(tmp_path, text_file, bigram):
    arguments = (bigram, f"file:{text_file}")
    with pytest.raises(ConfigError, match="Make the same call again"):
        benchmark(*arguments, CONFIG.with_changes(time_budget_minutes=1e-7), tmp_path, seeds=(0,), progress=False)
    assert benchmark(*arguments, CONFIG, tmp_path, seeds=(0,), progress=False).model.curves[0][-1][0] == 16


def test_the_interval_is_students():
    found = paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert paired_difference([1.0], [0.0]).high == math.inf
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [])


def test_nothing_is_claimed_when_the_interval_includes_zero(tmp_path):
    shown = comparison([-0.1, 0.05, -0.02], tmp_path)
    assert shown.winner is None
    assert shown.verdict.startswith("No difference is shown")
    better = comparison([-0.1, -0.11, -0.12], tmp_path)
    assert better.winner == "model"
    assert better.verdict.startswith("Mine is better than a plain transformer")
    worse = comparison([0.1, 0.11, 0.12], tmp_path)
    assert worse.winner == "reference"
    assert worse.verdict.startswith("A plain transformer of its size is better than Mine")
    single = comparison([-1.0], tmp_path)
    assert single.winner is None and "single seed" in single.verdict
    assert json.loads(json.dumps(single.to_dict()))["difference"]["low"] is None
    assert "2.00 times as long" in worse.text()
    worse.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "data:image/png" in page and "plain GPT" in page


def test_a_model_that_takes_positions_is_compared_with_one_that_takes_none(tmp_path, text_file, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def llama():
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=300, max_position_embeddings=32, hidden_size=32, num_hidden_layers=1,
                num_attention_heads=2, intermediate_size=32,
            )
        )  # fmt: skip

    monkeypatch.setattr("utils.training.baseline.ROUNDS", 1)
    config = CONFIG.with_changes(max_steps=2, context_length=16)
    result = benchmark(llama, f"file:{text_file}", config, tmp_path / "out", seeds=(0,), progress=False)
    facts = {}
    for kind in ("model", "reference"):
        record = json.loads((tmp_path / "out" / "seed-0" / kind / "run.json").read_text())
        facts[kind] = record["data"]["facts"]["positions_argument"]
    assert facts == {"model": "position_ids", "reference": None}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in result._repr_html_()
