import json

import pytest

import utils
from utils import tier3_training_utilities as facade
from utils.__main__ import main
from utils.runtime.errors import ConfigError, RunError
from utils.training import TrainingConfig, automatic_settings
from utils.training.automatic_settings import asked_for, resolved
from utils.training.batch_size_finder import BatchSizeSuggestion, Trial, find_batch_size
from utils.training.learning_rate_finder import LearningRateSuggestion, find_learning_rate
from utils.training.resume import check_same, train
from utils.training.weights import weights_sha256

TINY = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1, "dropout": 0.1}
BATCH = BatchSizeSuggestion(4, 2, (Trial(8, "ran out of memory", None), Trial(4, "fits", 1000)), 10**9, "here")
RATE = LearningRateSuggestion(2.5e-3, "it falls there", (1e-3, 1e-2), (2.0, 1.0), (2.0, 1.0), "ended at 1")


@pytest.fixture
def found(monkeypatch):
    """What the finders are called with; they answer at once."""
    calls = []
    monkeypatch.setattr(automatic_settings, "find_batch_size", lambda *a: calls.append(("batch", a[2])) or BATCH)
    monkeypatch.setattr(automatic_settings, "find_learning_rate", lambda *a, **k: calls.append(("rate", a[2])) or RATE)
    return calls


def settings(quick, **changes):
    return quick.with_changes(**{"batch_size": "auto", "learning_rate": "auto", "step_samples": 8, **changes})


def test_a_run_finds_them_once_and_resumes_exactly_with_the_numbers(tmp_path, text_file, quick, found, capsys):
    config = settings(quick, max_steps=4, val_every_steps=2, checkpoint_every_steps=2)
    whole = train(utils.load_model("example:gpt", config=TINY), f"file:{text_file}", config, tmp_path / "whole")
    assert [kind for kind, _ in found] == ["batch", "rate"]
    assert (found[1][1].batch_size, found[1][1].accumulate) == (4, 2), "the rate is for the step that is taken"
    numbers = (whole.config.batch_size, whole.config.accumulate, whole.config.learning_rate, whole.config.step_samples)
    assert numbers == (4, 2, 2.5e-3, None)
    record = json.loads((whole.directory / "run.json").read_text())
    assert TrainingConfig.from_dict(record["config"]) == whole.config
    assert record["found"]["learning_rate"]["reason"] == "it falls there"
    assert record["found"]["batch_size"]["trials"][0]["outcome"] == "ran out of memory"
    assert whole.notes[:2] == [BATCH.text(), RATE.text()]
    assert RATE.text() in capsys.readouterr().err

    model = utils.load_model("example:gpt", config=TINY)
    part = config.with_changes(time_budget_minutes=1e-9)
    facade.train_or_resume(model, f"file:{text_file}", part, tmp_path / "part", progress=False)
    for _ in range(20):
        again = facade.train_or_resume(model, f"file:{text_file}", part, tmp_path / "part", progress=False)
        if again.finished:
            break
    assert again.finished and again.sessions > 1
    assert len(found) == 4, "found once for each run, not once for each session"
    assert weights_sha256(again.model) == weights_sha256(whole.model)

    check_same(whole.directory, model, f"file:{text_file}", config)
    with pytest.raises(RunError, match=r"batch_size is 4, not 16"):
        check_same(whole.directory, model, f"file:{text_file}", config.with_changes(batch_size=16, step_samples=None))
    with pytest.raises(RunError, match=r"step_samples is None, not 64"):
        check_same(whole.directory, model, f"file:{text_file}", config.with_changes(step_samples=64))


def test_a_run_with_numbers_is_no_run_with_auto():
    record = {"config": {"learning_rate": 1e-3, "batch_size": 4}, "found": {}}
    assert asked_for({"learning_rate": "auto"}, record) == {"learning_rate": "auto"}
    assert asked_for({"learning_rate": 1e-3}, {"config": {}}) == {"learning_rate": 1e-3}


def test_numbers_are_left_alone(found):
    config = TrainingConfig()
    assert resolved(None, None, config) == (config, {})
    assert found == []


def test_an_unclear_answer_starts_no_run(tmp_path, text_file, quick, monkeypatch):
    none = LearningRateSuggestion(None, "the loss never moved", (), (), (), "ended at 1")
    monkeypatch.setattr(automatic_settings, "find_learning_rate", lambda *a, **k: none)
    with pytest.raises(RunError, match="No learning rate was found: the loss never moved"):
        train(
            utils.load_model("example:gpt", config=TINY), f"file:{text_file}",
            quick.with_changes(learning_rate="auto"), tmp_path / "run", progress=False,
        )  # fmt: skip
    assert not (tmp_path / "run" / "run.json").exists()


def test_on_the_command_line_really_found(tmp_path, text_file, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: example:gpt\npreset: fast\n"
        f"data: file:{text_file}\nrun_dir: {tmp_path / 'run'}\n"
        "config: {learning_rate: auto, context_length: 16, max_steps: 2, log_every_steps: 1}\n"
    )
    model = tmp_path / "model.json"
    model.write_text(json.dumps(TINY))
    assert main(["train", "--config", str(file), "--model-config", str(model), "--batch-size", "auto", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "learning rate " in shown and "batch size 16: it is a step of 16 samples" in shown
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 1e-4 < record["config"]["learning_rate"] < 0.1
    assert record["config"]["batch_size"] == 16, "a step takes the samples that the preset says"


def test_the_verbs_are_at_hand():
    assert facade.find_learning_rate is find_learning_rate
    assert facade.find_batch_size is find_batch_size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"batch_size": "auto", "accumulate": 4},
            "batch_size is 'auto' and accumulate is 4.*accumulate=1.*Say with",
        ),
        ({"step_samples": 64}, "step_samples is 64 and batch_size is 16.*only with batch_size='auto'.*to None"),
        ({"batch_size": "auto", "step_samples": 0}, "step_samples is 0.*above 0"),
        ({"accumulate": "auto"}, "accumulate is 'auto'.*Expected a whole number"),
        ({"batch_size": "all"}, "batch_size is 'all'.*Expected a whole number or 'auto'"),
        ({"learning_rate": "Auto"}, "learning_rate is 'Auto'.*Expected a number or 'auto'"),
    ],
)
def test_contradictions_are_told(changes, words):
    with pytest.raises(ConfigError, match=words):
        TrainingConfig(**changes)


def test_what_a_step_takes_is_known_before():
    assert TrainingConfig(batch_size="auto", devices=2).samples_per_step == 64
    assert TrainingConfig(batch_size="auto", step_samples=8, max_steps=None, max_epochs=2).total_steps(80) == 20
    assert TrainingConfig(batch_size="auto").unresolved == ("batch_size",)
    assert TrainingConfig().unresolved == ()
    assert TrainingConfig(learning_rate="auto").to_dict()["learning_rate"] == "auto"
