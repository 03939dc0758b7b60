"""The probe trains in the run's precision, judges the event that would be made, and refuses what it cannot judge."""

from dataclasses import replace

import pytest
import torch

import utils
from utils.growth import extension, probe
from utils.growth.edits import GrowthRefusedError, Plan

GROWTH = {
    "operators": ["feed_forward"], "triggers": ["plateau"], "needed": 1, "check_every_steps": 4, "cooldown_steps": 4,
    "patience": 1, "improvement": 0.9, "hysteresis": 1.0, "probe_steps": 1,
}  # fmt: skip
SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}


def probed(monkeypatch, tmp_path, text_file, config, **growth):
    """Train with a probe; return what its forward passes ran in, its migrations and the run's notes."""
    precisions, means = [], []
    objective, migrate = probe.objective, probe.migrate_optimizer

    def watched(*args):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return objective(*args)

    def followed(optimizer, change, groups):
        means.append(change.mean)
        return migrate(optimizer, change, groups)

    monkeypatch.setattr(probe, "objective", watched)
    monkeypatch.setattr(probe, "migrate_optimizer", followed)
    config = config.with_changes(growth={**GROWTH, **growth})
    model = utils.load_model("example:gpt", config=SMALL)
    run = utils.train(model, f"file:{text_file}", config, tmp_path / "run", progress=False)
    return precisions, means, run.notes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "moment"), [("bf16-mixed", "mean"), ("32-true", "zero")])
def test_it_trains_and_migrates_as_the_run_does(monkeypatch, tmp_path, text_file, quick, precision, moment):
    precisions, means, notes = probed(
        monkeypatch, tmp_path, text_file, quick.with_changes(precision=precision), new_second_moment=moment
    )
    assert any("The probe" in note for note in notes) or means
    assert set(precisions) == {precision == "bf16-mixed"}
    assert set(means) == {moment == "mean"}


@pytest.mark.filterwarnings("ignore")
def test_an_approximate_plan_is_refused(monkeypatch, tmp_path, text_file, quick):
    plan = extension.plan_growth
    monkeypatch.setattr(extension, "plan_growth", lambda *args: replace(plan(*args), promise="approximate"))
    precisions, _, notes = probed(monkeypatch, tmp_path, text_file, quick)
    assert precisions == []
    assert any("would change the function. Expected growth that keeps the function" in note for note in notes)


def test_the_refusal_has_three_sentences():
    with pytest.raises(GrowthRefusedError) as caught:
        probe.probe(None, Plan("depth", (), (), 1, 2, "approximate"), 3)
    assert str(caught.value) == (
        "probe_steps is set, and depth from 1 to 2 in the model would change the function. Expected growth that keeps "
        "the function: a copy that was not distilled says nothing of one that was. Set probe_steps to 0, or "
        "approximate "
        "to False."
    )
