import copy
import itertools
import json
import warnings

import pytest
import torch

import utils
import utils.growth.edits
import utils.runtime.errors
from utils.growth.config import GrowthConfig
from utils.growth.lineage import LINEAGE, read_lineage
from utils.runtime.errors import ConfigError
from utils.tier3_training_utilities import train_or_resume
from utils.training.config import TrainingConfig
from utils.training.resume import open_run, resume, train

SCHEDULE = [
    {"at": 5, "operator": "depth", "amount": 1, "where": 0},
    {"at": 0.5, "operator": "feed_forward", "amount": 16},
]


def fresh():
    return utils.load_model("example:gpt", config={"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2,
                                                   "num_layers": 2, "dropout": 0.1})  # fmt: skip


class Stop:
    """Stops a session after some rows of metrics."""

    def start(self, run):
        self.run, self.left = run, 2

    def update(self, rows):
        self.left -= 1
        if self.left == 0:
            self.run.stop_requested = "stopped by the test"

    def close(self, rows):
        pass


@pytest.fixture
def growing(quick):
    return quick.with_changes(growth={"schedule": SCHEDULE}, ema_decay=0.9)


def test_a_run_that_stops_before_between_and_after_its_events_ends_like_one_that_does_not(tmp_path, text_file, growing):
    data = f"file:{text_file}"
    often = growing.with_changes(log_every_steps=2)
    whole = utils.train(fresh(), data, often, tmp_path / "whole", progress=False)
    assert [(e.step, e.plan.operator) for e in read_lineage(tmp_path / "whole")] == [(5, "depth"), (12, "feed_forward")]
    run = train(fresh(), data, often, tmp_path / "parts", progress=False, observers=[Stop()])
    sessions = 1
    while not run.finished:
        sessions += 1
        run = resume(tmp_path / "parts", progress=False, observers=[Stop()])
    assert sessions > 5
    assert run.summary()["weights_sha256"] == whole.summary()["weights_sha256"]
    assert [e.plan for e in read_lineage(tmp_path / "parts")] == [e.plan for e in read_lineage(tmp_path / "whole")]
    reopened, state = open_run(tmp_path / "parts")
    assert reopened.adapter.num_parameters == run.adapter.num_parameters
    assert len(state["growth"]["events"]) == 2


def test_training_begins_with_few_blocks_and_ends_with_all(tmp_path, text_file, quick):
    config = quick.with_changes(growth=GrowthConfig.progressive(1, at=0.5).to_dict(), max_steps=8)
    loaded = fresh()
    names = [name for name, _ in loaded.module.named_parameters()]
    run = utils.train(loaded, f"file:{text_file}", config, tmp_path / "run", progress=False)
    events = read_lineage(tmp_path / "run")
    assert [(e.step, e.plan.before, e.plan.after, e.plan.promise) for e in events] == [
        (0, 2, 1, "anew"), (4, 1, 2, "exact"),
    ]  # fmt: skip
    assert events[0].describe().endswith("nothing was trained yet")
    assert [name for name, _ in run.model.named_parameters()] == names
    again = utils.resume(tmp_path / "run", progress=False)
    assert again.summary()["weights_sha256"] == run.summary()["weights_sha256"]


def test_a_run_that_is_killed_before_its_first_step_begins_with_the_same_blocks(
    tmp_path, text_file, quick, monkeypatch
):
    growth = {"begin_blocks": 1, "schedule": [{"at": 3, "operator": "feed_forward", "amount": 8}]}
    config = quick.with_changes(growth=growth, max_steps=4)
    whole = utils.train(fresh(), f"file:{text_file}", config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr("utils.training.training_core.fit", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        utils.train(fresh(), f"file:{text_file}", config, tmp_path / "killed", progress=False)
    run = utils.resume(tmp_path / "killed", progress=False)
    assert len(run.model.blocks) == 1
    assert run.summary()["weights_sha256"] == whole.summary()["weights_sha256"]


def test_what_is_refused_is_said_once_and_the_run_goes_on(tmp_path, text_file, quick):
    config = quick.with_changes(growth={"schedule": [{"at": 3, "operator": "expert", "amount": 1}]}, max_steps=6)
    with pytest.warns(UserWarning, match="At step 3 the model did not grow in expert: .* The run goes on as it is"):
        run = utils.train(fresh(), f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert run.finished
    assert not (tmp_path / "run" / LINEAGE).exists()
    _, state = open_run(tmp_path / "run")
    assert [(r["step"], r["operator"]) for r in state["growth"]["refusals"]] == [(3, "expert")]
    assert "did not grow in expert" in run.notes[-1]


def test_a_run_may_stop_when_growth_is_refused(tmp_path, text_file, quick):
    growth = {"schedule": [{"at": 3, "operator": "expert", "amount": 1}], "on_refusal": "stop"}
    with pytest.warns(UserWarning, match="resumed, it goes on without this event"):
        run = utils.train(fresh(), f"file:{text_file}", quick.with_changes(growth=growth, max_steps=6),
                          tmp_path / "run", progress=False)  # fmt: skip
    assert run.step == 3
    assert "growth in expert was refused at step 3" in run.status
    assert utils.resume(tmp_path / "run", progress=False).finished


def test_a_beginning_is_no_event_of_the_budget(tmp_path, text_file, quick):
    growth = {"begin_blocks": 1, "schedule": [{"at": 2, "operator": "depth", "to": "full"}], "max_events": 1}
    run = utils.train(fresh(), f"file:{text_file}", quick.with_changes(growth=growth, max_steps=4), tmp_path / "run",
                      progress=False)  # fmt: skip
    assert len(run.model.blocks) == 2


def test_a_beginning_is_taken_back_when_the_run_cannot_be_made(tmp_path, text_file, quick, monkeypatch):
    loaded = fresh()
    before = {name: id(p) for name, p in loaded.module.named_parameters()}
    config = quick.with_changes(growth=GrowthConfig.progressive(1).to_dict(), max_steps=4)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="gone"):
        patched.setattr("utils.training.resume.create_run", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        utils.train(loaded, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert {name: id(p) for name, p in loaded.module.named_parameters()} == before
    utils.train(loaded, f"file:{text_file}", config, tmp_path / "other", progress=False)


def test_blocks_that_were_trained_are_not_taken_away(tmp_path, text_file, quick):
    loaded = fresh()
    utils.train(loaded, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "first", progress=False)
    config = quick.with_changes(growth=GrowthConfig.progressive(1).to_dict(), max_steps=4)
    with pytest.raises(utils.growth.edits.GrowthRefusedError, match="Expected a model that has not been trained"):
        utils.train(loaded, f"file:{text_file}", config, tmp_path / "second", progress=False)


def test_what_was_frozen_stays_so_when_blocks_have_other_names(tmp_path, text_file, quick):
    loaded = fresh()
    utils.grow(loaded, "depth", 1, where=0)
    loaded.module.blocks[2].requires_grad_(False)
    growth = {"schedule": [{"at": 2, "operator": "depth", "amount": 1, "where": 0}]}
    run = utils.train(loaded, f"file:{text_file}", quick.with_changes(growth=growth, max_steps=4), tmp_path / "run",
                      progress=False)  # fmt: skip
    frozen = [name for name, p in run.model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(name.startswith("blocks.3.") for name in frozen)
    again, _ = open_run(tmp_path / "run")
    assert [name for name, p in again.model.named_parameters() if not p.requires_grad] == frozen


def test_a_copy_of_a_grown_model_is_told_before_it_is_trained(tmp_path, text_file, quick):
    loaded = fresh()
    utils.grow(loaded, "depth", 1)
    with pytest.raises(utils.growth.edits.GrowthError, match="a copy of it does not know what it grew through"):
        utils.train(copy.deepcopy(loaded), f"file:{text_file}", quick, tmp_path / "run", progress=False)


def test_the_cell_of_a_notebook_keeps_the_growth_of_its_model(tmp_path, text_file, quick):
    loaded = fresh()
    utils.grow(loaded, "depth", 1)
    config = quick.with_changes(max_steps=3)
    for _ in range(2):
        run = train_or_resume(loaded, f"file:{text_file}", config, tmp_path / "run", progress=False)
        assert len(run.model.blocks) == 3
    assert run.finished


def test_a_checkpoint_from_before_an_event_cannot_be_exported_from_the_grown_run(tmp_path, text_file, quick):
    growth = {"schedule": [{"at": 8, "operator": "depth", "amount": 1}]}
    config = quick.with_changes(growth=growth, max_steps=10, val_every_steps=2, learning_rate=1e-3)
    run = utils.train(fresh(), f"file:{text_file}", config, tmp_path / "run", progress=False)
    best = run.checkpoints.best()
    if best.step < 8:
        with pytest.raises(utils.runtime.errors.ExportError, match="before the model grew"):
            utils.export(run, tmp_path / "out", formats=("safetensors",), weights="best")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["validation_loss"] = 0.0 if manifest["step"] < 8 else 1.0
        (path / "manifest.json").write_text(json.dumps(manifest))
    if run.checkpoints.best().step < 8:
        with pytest.raises(utils.runtime.errors.ExportError, match="Export with weights='last'"):
            utils.export(run, tmp_path / "other", formats=("safetensors",), weights="best")


def test_a_full_disk_for_the_picture_of_the_lineage_stops_nothing(tmp_path, text_file, growing, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.growth.extension.save_lineage", full)
    with pytest.warns(UserWarning, match=r"growth\.json cannot be written \(No space left on device\)"):
        run = utils.train(fresh(), f"file:{text_file}", growing.with_changes(max_steps=8), tmp_path / "run",
                          progress=False)  # fmt: skip
    assert run.finished
    assert len(run.model.blocks) == 3


def test_a_scheduled_event_begins_the_cool_down(tmp_path, text_file, quick):
    growth = {
        "schedule": [{"at": 7, "operator": "depth", "amount": 1}], "operators": ["feed_forward"],
        "triggers": ["plateau"], "needed": 1, "check_every_steps": 4, "patience": 1, "improvement": 0.9,
        "hysteresis": 1.0, "cooldown_steps": 8,
    }  # fmt: skip
    utils.train(fresh(), f"file:{text_file}", quick.with_changes(growth=growth, max_steps=20), tmp_path / "run",
                progress=False)  # fmt: skip
    steps = [event.step for event in read_lineage(tmp_path / "run")]
    assert steps[0] == 7
    assert all(later - earlier >= 8 for earlier, later in itertools.pairwise(steps))


def test_a_budget_holds(tmp_path, text_file, quick):
    growth = {"schedule": [{"at": 2, "operator": "depth", "amount": 1}, {"at": 4, "operator": "depth", "amount": 40}],
              "max_parameters": 70_000}  # fmt: skip
    with pytest.warns(UserWarning, match="Expected at most max_parameters=70,000"):
        run = utils.train(fresh(), f"file:{text_file}", quick.with_changes(growth=growth, max_steps=6),
                          tmp_path / "run", progress=False)  # fmt: skip
    assert len(run.model.blocks) == 3


def test_triggers_let_it_grow_and_the_next_session_decides_the_same(tmp_path, text_file, quick):
    growth = {
        "operators": ["depth", "feed_forward"], "triggers": ["plateau", "benefit"], "needed": 1,
        "check_every_steps": 4, "cooldown_steps": 4, "patience": 1, "improvement": 0.5, "benefit_threshold": 0.01,
        "hysteresis": 1.0, "max_events": 2,
    }  # fmt: skip
    config = quick.with_changes(growth=growth, log_every_steps=2)
    data = f"file:{text_file}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = train(fresh(), data, config, tmp_path / "run", progress=False)
        parts = train(fresh(), data, config, tmp_path / "parts", progress=False, observers=[Stop()])
        while not parts.finished:
            parts = resume(tmp_path / "parts", progress=False, observers=[Stop()])
    assert parts.sessions > 5
    assert parts.summary()["weights_sha256"] == run.summary()["weights_sha256"]
    assert [e.plan for e in read_lineage(tmp_path / "parts")] == [e.plan for e in read_lineage(tmp_path / "run")]
    events = read_lineage(tmp_path / "run")
    assert len(events) == 2
    assert all(event.signals and "triggers ask for growth" in event.why for event in events)
    _, state = open_run(tmp_path / "run")
    assert state["growth"]["controller"]["arbiter"]["events"] == 2
    assert run.finished


def test_a_probe_decides_and_leaves_no_trace(tmp_path, text_file, quick):
    """The probe rejects growth while the loss still falls by itself: then the run is the ungrown one, bit for bit."""
    growth = {
        "operators": ["feed_forward"], "triggers": ["plateau"], "needed": 1, "check_every_steps": 4,
        "cooldown_steps": 4, "patience": 1, "improvement": 0.9, "hysteresis": 1.0, "probe_steps": 2,
    }  # fmt: skip
    plain = utils.train(fresh(), f"file:{text_file}", quick, tmp_path / "plain", progress=False)
    with pytest.warns(UserWarning, match=r"The probe rejected feed_forward from 128 to 192 .* times the FLOPs"):
        run = utils.train(fresh(), f"file:{text_file}", quick.with_changes(growth=growth), tmp_path / "run",
                          progress=False)  # fmt: skip
    assert read_lineage(tmp_path / "run") == []
    assert run.summary()["weights_sha256"] == plain.summary()["weights_sha256"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"growth": {"shedule": []}}, "no setting 'shedule'.*Did you mean 'schedule'"),
        ({"growth": {"schedule": [{"at": 2, "operator": "width"}]}}, "ScheduledGrowth.operator is 'width'"),
        ({"growth": {"schedule": SCHEDULE}, "devices": 2, "strategy": "fsdp"}, "strategy is 'fsdp'.*Expected ddp"),
        ({"growth": {"operators": ["depth"]}, "devices": 2}, "Expected a schedule on several devices"),
        ({"growth": {"begin_blocks": 2}}, "begin_blocks is 2 and nothing says when"),
        ({"growth": GrowthConfig.progressive(2).to_dict()}, "begin_blocks is 2, and the model has 2 blocks"),
        ({"growth": {"schedule": [{"at": 0.99, "operator": "depth", "amount": 1}]}}, "planned for step 24.*has 24"),
        ({"growth": {"schedule": [{"at": 50, "operator": "depth", "amount": 1}]}}, "planned for step 50.*has 24"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_written(tmp_path, text_file, quick, changes, words):
    with pytest.raises((ConfigError, utils.growth.edits.GrowthRefusedError), match=f"(?s){words}"):
        utils.train(fresh(), f"file:{text_file}", quick.with_changes(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "run.json").exists()


def test_settings_of_growth_may_be_given_as_an_object():
    config = TrainingConfig(growth=GrowthConfig.progressive(2))
    assert config.growth["begin_blocks"] == 2
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_lineage_of_another_run_is_refused(tmp_path, text_file, growing):
    utils.train(fresh(), f"file:{text_file}", growing.with_changes(max_steps=14), tmp_path / "run", progress=False)
    state_file = max((tmp_path / "run" / "checkpoints").glob("step-*")) / "state.pt"
    state = torch.load(state_file, weights_only=True)
    state["growth"]["events"].pop()
    torch.save(state, state_file)
    manifest = state_file.with_name("manifest.json")
    text = json.loads(manifest.read_text())
    from utils.runtime.files import sha256_file

    text["files"]["state.pt"] = {"bytes": state_file.stat().st_size, "sha256": sha256_file(state_file)}
    manifest.write_text(json.dumps(text))
    with pytest.raises(utils.runtime.errors.CheckpointError, match="belong to another model"):
        utils.resume(tmp_path / "run", progress=False)


def test_growth_with_recomputed_activations_takes_the_same_steps(tmp_path, text_file, growing):
    runs = []
    for name, recomputed in (("plain", False), ("recomputed", True)):
        config = growing.with_changes(gradient_checkpointing=recomputed)
        runs.append(utils.train(fresh(), f"file:{text_file}", config, tmp_path / name, progress=False))
    assert runs[0].summary()["weights_sha256"] == runs[1].summary()["weights_sha256"]
    assert not any("forward" in vars(part) for part in runs[1].model.modules())


def test_steps_of_several_passes_grow_between_them(tmp_path, text_file, growing):
    """An event in the middle of an accumulation would lose the gradients of its first passes."""
    config = growing.with_changes(accumulate=3, max_steps=12)
    run = utils.train(fresh(), f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert [event.step for event in read_lineage(tmp_path / "run")] == [5, 6]
    assert run.finished


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_model_grows(tmp_path, text_file, quick, monkeypatch):
    """What is traced holds the old parameters; the code that a C++ compiler would make of it is not looked at here."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend="eager"))
    runs = []
    for name, compiled in (("plain", False), ("compiled", True)):
        growth = {"schedule": [{"at": 3, "operator": "depth", "amount": 1}]}
        config = quick.with_changes(growth=growth, max_steps=6, val_every_steps=6, log_every_steps=1, compile=compiled)
        small = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 2, "dropout": 0.0}
        loaded = utils.load_model("example:gpt", config=small)
        runs.append(utils.train(loaded, f"file:{text_file}", config, tmp_path / name, progress=False))
        assert len(loaded.module.blocks) == 3
        assert loaded.module._compiled_call_impl is None
    losses = [[row["loss"] for row in run.metrics if row["split"] == "train"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_model_grows_on_a_gpu_and_resumes(tmp_path, text_file, growing, precision):
    config = growing.with_changes(precision=precision, time_budget_minutes=1e-9)
    run = utils.train(fresh(), f"file:{text_file}", config, tmp_path / "run", progress=False)
    while not run.finished:
        run = utils.resume(tmp_path / "run", time_budget_minutes=0.02, progress=False)
    events = read_lineage(tmp_path / "run")
    assert [event.plan.operator for event in events] == ["depth", "feed_forward"]
    assert all(event.certificate.passed for event in events)
    assert next(run.model.parameters()).is_cuda
