import math

import pytest

import utils
from tests.training.conftest import TINY_GPT
from utils.continual.accuracy_matrix import read_matrix
from utils.continual.extension import make_extension
from utils.continual.methods.consolidation import Consolidation
from utils.training import TrainingConfig

LOREM = ["zq", "xv", "jk", "wy", "qz", "vx", "kj", "yw"]


@pytest.fixture
def domains(tmp_path, text_file):
    """Python's documentation, and a language of eight words."""
    made = tmp_path / "made.txt"
    made.write_text(" ".join(LOREM[(n * n + n // 7) % 8] for n in range(8000)), encoding="utf-8")
    text = tmp_path / "docs.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[:24_000], encoding="utf-8")
    return {"docs": f"file:{text}", "made": f"file:{made}"}


def learned(domains, folder, method, **changes):
    continual = {"method": method, "split": "parts", "setting": "domain", "samples_per_task": 120, "buffer": 12,
                 "fisher_samples": 24, **changes}  # fmt: skip
    config = TrainingConfig(max_steps=60, batch_size=4, learning_rate=4e-3, val_every_steps=1000,
                            checkpoint_every_steps=1000, continual=continual)  # fmt: skip
    model = utils.load_model("example:gpt", config={**TINY_GPT, "dropout": 0.0})
    run = utils.train(model, domains, config, folder, progress=False)
    return run, read_matrix(folder)


def test_domains_are_measured_in_nats_and_less_is_forgotten_with_consolidation(tmp_path, domains):
    _, naive = learned(domains, tmp_path / "naive", "naive")
    _, held = learned(domains, tmp_path / "held", "consolidation")
    assert naive.tasks == ("docs", "made")
    assert (naive.unit, naive.higher_is_better) == ("nats", False)
    # An untrained model knows as little as one that guesses.
    assert all(abs(loss - math.log(300)) < 0.5 for loss in naive.untrained)
    assert naive.forgetting > 0.1
    assert held.forgetting < naive.forgetting / 2


def test_where_no_answers_are_stored_the_weights_are_held(tmp_path, domains):
    run, _ = learned(domains, tmp_path / "run", "consolidation")
    method, extension = Consolidation(), make_extension(run.config)
    learner = extension.make_learner(run.adapter, run.data, [None])
    assert not method.keeps_logits(learner)
    assert method._strength(learner) == Consolidation.penalty > 0
    given = make_extension(run.config.with_changes(continual={**run.config.continual, "penalty": 2.5}))
    assert method._strength(given.make_learner(run.adapter, run.data, [None])) == 2.5
