"""Exact resume, with real processes that are really killed."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import CheckpointError, ConfigError, DataError, RunError
from utils.training import TrainingConfig
from utils.training.checkpoint_manager import STATE
from utils.training.dataset_utilities import load_data
from utils.training.metrics import read_metrics
from utils.training.resume import check_same, open_run, resume, train
from utils.training.run import RECORD, UNFINISHED, read_record, session_lock
from utils.training.weights import weights_sha256

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = ("seconds", "samples_per_second")
TINY_GPT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.1}


def measured(directory: Path) -> list[dict]:
    """Everything in metrics.csv that must not depend on the clock."""
    return [
        {name: value for name, value in row.items() if name not in TIMINGS}
        for row in read_metrics(directory / "metrics.csv")
    ]


class CommandLine:
    """Runs ``python -m utils`` on a tiny model with dropout, shuffled data and a cosine schedule."""

    def __init__(self, folder: Path, data: str, example: str, config: dict, steps: int, accumulate: int = 1) -> None:
        self.folder = folder
        (folder / "model.json").write_text(json.dumps(config))
        self.train = [
            "train", f"example:{example}", "--model-config", str(folder / "model.json"), "--data", data,
            "--max-steps", str(steps), "--batch-size", "4", "--log-every-steps", "5", "--val-every-steps", "6",
            "--checkpoint-every-steps", "4", "--accumulate", str(accumulate), "--learning-rate", "0.003",
        ]  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "utils", *arguments, "--json", "--quiet"]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, *arguments: str, status: int = 0) -> dict:
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == status, errors[-3000:]
        return json.loads(output)

    def kill_after_step(self, directory: Path, step: int, with_signal: int, *arguments: str) -> subprocess.Popen:
        """Start a process and send it a signal once a step has been logged."""
        process = self.start(*arguments)
        deadline = time.monotonic() + 120
        while not (directory / "metrics.csv").exists() or last_step(directory) < step:
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline, "the step was never logged"
            time.sleep(0.002)
        process.send_signal(with_signal)
        self.output = process.communicate(timeout=60)[0]
        return process


def last_step(directory: Path) -> int:
    """Return the step of the last whole row of metrics.csv."""
    lines = (directory / "metrics.csv").read_text().rsplit("\n", 1)[0].splitlines()
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else -1


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path, text_file):
    """Through the command line; `test_kills` has all other settings."""
    line = CommandLine(tmp_path, f"file:{text_file}", "gpt", TINY_GPT, 60)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = line.finish(*line.train, "--run-dir", str(whole))
    process = line.kill_after_step(killed, 20, signal.SIGKILL, *line.train, "--run-dir", str(killed))
    assert process.returncode == -signal.SIGKILL
    resumed = line.finish("resume", str(killed))
    assert uninterrupted["status"] == resumed["status"] == "finished"
    assert resumed["weights_sha256"] == uninterrupted["weights_sha256"]
    assert measured(killed) == measured(whole)
    ends = [torch.load(d / "checkpoints/step-00000060" / STATE, weights_only=True) for d in (whole, killed)]
    moments = [end["optimizer"]["state"] for end in ends]
    assert moments[0].keys() == moments[1].keys()
    for index in moments[0]:
        assert all(torch.equal(moments[0][index][name], moments[1][index][name]) for name in moments[0][index])
    assert ends[0]["schedule"] == ends[1]["schedule"]


def test_sigterm_saves_and_stops_and_nothing_is_lost(tmp_path, text_file):
    line = CommandLine(tmp_path, f"file:{text_file}", "gpt", TINY_GPT, 400)
    directory = tmp_path / "run"
    process = line.kill_after_step(directory, 4, signal.SIGTERM, *line.train, "--run-dir", str(directory))
    assert process.returncode == 1
    summary = json.loads(line.output)
    assert summary["status"] == "terminated"
    assert (directory / "checkpoints" / f"step-{summary['step']:08d}").is_dir()


def test_a_time_budget_stops_cleanly_and_the_rest_is_exact(tmp_path, text_file, tiny_gpt, quick):
    whole = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "whole", progress=False)
    short = quick.with_changes(time_budget_minutes=1e-9)
    parts = train(
        utils.load_model("example:gpt", config=TINY_GPT), f"file:{text_file}", short, tmp_path / "parts", progress=False
    )
    assert (parts.status, parts.step) == ("stopped by its time budget", 1)
    second = resume(tmp_path / "parts", progress=False)
    assert second.step == 2
    rest = resume(tmp_path / "parts", time_budget_minutes=60, progress=False)
    assert rest.finished
    assert weights_sha256(rest.model) == weights_sha256(whole.model)
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")


def test_a_run_that_stopped_early_is_finished_and_not_continued(tmp_path, text_file, tiny_gpt, quick):
    """A learning rate of nearly nothing gains nothing: the first measurement stays the best."""
    config = quick.with_changes(early_stopping_patience=2, val_every_steps=3, learning_rate=1e-30, weight_decay=0.0)
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert (run.status, run.step) == ("finished early", 9)
    assert run.finished
    again = resume(tmp_path / "run", progress=False)
    assert (again.status, again.step, again.sessions) == ("finished early", 9, 1)
    assert weights_sha256(again.model) == weights_sha256(run.model)
    assert again.summary() == run.summary()


def test_patience_is_counted_over_sessions(tmp_path, text_file, tiny_gpt, quick):
    config = quick.with_changes(early_stopping_patience=2, val_every_steps=1, learning_rate=1e-30, weight_decay=0.0)
    run = train(
        tiny_gpt, f"file:{text_file}", config.with_changes(time_budget_minutes=1e-9), tmp_path / "run", progress=False
    )
    steps = [run.step]
    while not run.finished:
        run = resume(tmp_path / "run", progress=False)
        steps.append(run.step)
    assert steps == [1, 2, 3]
    assert run.status == "finished early"


def test_a_finished_run_is_returned_as_it_is(tmp_path, text_file, tiny_gpt, quick):
    run = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    again = resume(tmp_path / "run", progress=False)
    assert again.finished
    assert weights_sha256(again.model) == weights_sha256(run.model)
    assert again.summary() == run.summary()


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, text_file, tiny_gpt, quick):
    whole = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    newest = tmp_path / "run/checkpoints/step-00000024"
    (newest / STATE).write_bytes((newest / STATE).read_bytes()[:-100])
    with pytest.warns(UserWarning, match="step-00000024 does not verify"):
        again = resume(tmp_path / "run", progress=False)
    assert again.finished
    assert weights_sha256(again.model) == weights_sha256(whole.model)


def test_a_run_killed_before_its_first_step_starts_from_the_same_weights(tmp_path, text_file, quick):
    torch.manual_seed(5)
    model = utils.load_model("example:gpt", config=TINY_GPT).module
    nn.init.normal_(model.norm.weight)
    started = weights_sha256(model)
    long = quick.with_changes(time_budget_minutes=1e-9)
    train(model, f"file:{text_file}", long, tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000001")
    other = utils.load_model("example:gpt", config=TINY_GPT).module
    run, state = open_run(tmp_path / "run", model=other)
    assert (run.step, set(state)) == (0, {"memory"})
    assert weights_sha256(other) == started


def test_a_bare_module_needs_to_be_passed_again_and_must_fit(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9)
    train(tiny_gpt.module, f"file:{text_file}", short, tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="bare GPT and has no source.*resume.run_dir, model="):
        resume(tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="trains a GPT, and the model given is a Linear"):
        resume(tmp_path / "run", model=nn.Linear(3, 3), progress=False)
    wider = utils.load_model("example:gpt", config={**TINY_GPT, "d_model": 64}).module
    with pytest.raises(CheckpointError, match="belong to another model .*on disk"):
        resume(tmp_path / "run", model=wider, progress=False)


def test_directories_that_hold_no_run(tmp_path):
    with pytest.raises(RunError, match="There is no directory"):
        resume(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is empty.*start the run again"):
        resume(tmp_path / "empty")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model").mkdir()
    with pytest.raises(RunError, match="without run.json"):
        resume(tmp_path / "half")
    (tmp_path / "half" / RECORD).write_text('{"format_version": 1')
    with pytest.raises(RunError, match="cannot be read .*Restore"):
        resume(tmp_path / "half")
    (tmp_path / "half" / RECORD).write_text('{"format_version": 1, "config": {}}')
    with pytest.raises(RunError, match="cannot be read .KeyError"):
        resume(tmp_path / "half")
    (tmp_path / "half" / RECORD).write_text('{"format_version": 99}')
    with pytest.raises(RunError, match="format version 99.*reads up to 3"):
        resume(tmp_path / "half")


def test_a_changed_source_is_noticed(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9)
    train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)
    source = tmp_path / "run/model/model.py"
    source.write_text(source.read_text() + "\n# changed\n")
    with pytest.raises(RunError, match="model.py in .* is not what the run started with .SHA-256 differs"):
        resume(tmp_path / "run", progress=False)


def test_rows_of_a_session_that_left_no_checkpoint_are_written_once(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9, log_every_steps=1)
    run = train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)
    shutil.rmtree(run.checkpoints.directory / "step-00000001")
    with open(tmp_path / "run/metrics.csv", "a") as stream:
        stream.write("2,train,1.2")
    resume(tmp_path / "run", progress=False)
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.csv")] == [1]


def test_a_summary_that_a_kill_prevented_is_written_later(tmp_path, text_file, tiny_gpt, quick):
    run = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/figures/training.png").unlink()
    resume(tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == run.summary()
    assert (tmp_path / "run/figures/training.png").exists()


def test_one_process_at_a_time(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9)
    train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)
    with session_lock(tmp_path / "run"), pytest.raises(RunError, match="Another process is training the run"):
        resume(tmp_path / "run", progress=False)
    assert resume(tmp_path / "run", progress=False).step == 2


def test_workers_that_outlive_a_session_keep_no_other_out(tmp_path):
    context = multiprocessing.get_context("fork")
    runs, stop = context.Event(), context.Event()
    worker = context.Process(target=lambda: (runs.set(), stop.wait()), daemon=True)
    with session_lock(tmp_path):
        worker.start()
        runs.wait()
        with pytest.raises(RunError, match="Another process is training the run"), session_lock(tmp_path):
            pass
    assert worker.is_alive()
    with session_lock(tmp_path):
        stop.set()
    worker.join()


def test_another_kind_of_machine_is_named(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9)
    train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    record["machine"] |= {"device": "NVIDIA T4", "precision": "16-mixed"}
    (tmp_path / "run" / RECORD).write_text(json.dumps(record))
    with pytest.warns(
        UserWarning, match="device NVIDIA T4 became .*precision 16-mixed became 32-true.*within rounding"
    ):
        resume(tmp_path / "run", progress=False)


def test_an_adapter_keeps_the_source_of_its_model(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9)
    train(ModelAdapter(tiny_gpt), f"file:{text_file}", short, tmp_path / "run", progress=False)
    assert resume(tmp_path / "run", progress=False).step == 2


def test_example_inputs_cannot_be_fed_by_data(tmp_path, text_file, tiny_gpt):
    spec = ModelSpec(example_inputs={"input_ids": torch.ones(1, 4, dtype=torch.long)})
    with pytest.raises(RunError, match="ModelSpec.example_inputs is set"):
        train(tiny_gpt, f"file:{text_file}", TrainingConfig(), tmp_path / "run", spec=spec)


def test_nothing_of_the_users_is_overwritten(tmp_path, text_file, tiny_gpt, quick):
    short = quick.with_changes(time_budget_minutes=1e-9)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "data").mkdir()
    with pytest.raises(RunError, match="not empty and holds no run.*ever overwritten"):
        train(tiny_gpt, f"file:{text_file}", short, tmp_path / "thesis", progress=False)
    train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="holds a run already.*resume"):
        train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)


def test_a_start_that_was_killed_half_way_is_cleared_away(tmp_path, text_file, tiny_gpt, quick):
    remnant = tmp_path / "run"
    (remnant / "checkpoints" / "step-00000000").mkdir(parents=True)
    (remnant / UNFINISHED).touch()
    run = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), remnant, progress=False)
    assert run.finished
    assert not (remnant / UNFINISHED).exists()


def test_a_context_longer_than_the_model_is_refused(tmp_path, text_file, tiny_gpt):
    with pytest.raises(ConfigError, match="context_length is 64, and the model takes at most 32 tokens"):
        train(tiny_gpt, f"file:{text_file}", TrainingConfig(context_length=64), tmp_path / "run")


def test_models_that_cannot_learn_are_refused(tmp_path, text_file, tiny_gpt):
    tiny_gpt.module.requires_grad_(False)
    with pytest.raises(RunError, match="no parameter that can be trained"):
        train(tiny_gpt, f"file:{text_file}", TrainingConfig(), tmp_path / "run")

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

        def forward(self, x):
            raise ValueError("not today")

    with pytest.raises(RunError, match="No forward pass of Broken succeeded.*not today"):
        train(Broken(), f"file:{text_file}", TrainingConfig(), tmp_path / "run")


def test_prepared_data_that_the_model_has_no_place_for_is_refused(tmp_path, text_file, quick):
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=16)
    small = utils.load_model("example:gpt", config={**TINY_GPT, "vocab_size": 100})
    with pytest.raises(DataError, match=r"prepared with token ids up to 299, and the model knows 100 .*from 0 to 99"):
        train(small, data, quick, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="up to 299"):
        train(small, replace(data, stream={"kind": "file"}), quick, tmp_path / "run", progress=False)
    images = load_data("builtin:digits", task="image_classification", num_labels=10, image_shape=(1, 8, 8))
    few = utils.load_model(
        "example:vit", config={"num_classes": 3, "num_channels": 1, "image_size": 8, "patch_size": 4}
    )
    with pytest.raises(DataError, match=r"classes up to number 9, and the model tells 3 apart"):
        train(few, images, quick, tmp_path / "run", progress=False)


def test_what_was_stated_about_the_model_is_compared(tmp_path, text_file, tiny_gpt, quick):
    spec, frozen = ModelSpec(task="causal_lm"), ModelSpec(task="causal_lm", frozen=("embed.weight",))
    config, data = quick.with_changes(max_steps=1), f"file:{text_file}"
    train(tiny_gpt, data, config, tmp_path / "run", spec=spec, progress=False)
    check_same(tmp_path / "run", tiny_gpt, data, config, spec=spec)
    check_same(tmp_path / "run", tiny_gpt, data, config)
    check_same(tmp_path / "run", ModelAdapter(tiny_gpt, spec=spec), data, config)
    for model, stated in ((tiny_gpt, frozen), (ModelAdapter(tiny_gpt, spec=frozen), None)):
        with pytest.raises(RunError, match=r"holds another run: ModelSpec.frozen is \(\), not \('embed.weight',\)"):
            check_same(tmp_path / "run", model, data, config, spec=stated)


CAPPED = """
import torch
from torch import nn

class Capped(nn.Module):
    def __init__(self, cap, floor):
        super().__init__()
        self.cap, self.embed, self.head = cap, nn.Embedding(300, 8), nn.Linear(8, 300)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids)).clamp(max=self.cap)
"""


def test_infinite_settings_come_back_and_run_json_is_json(tmp_path, text_file, quick):
    (tmp_path / "capped.py").write_text(CAPPED)
    model = utils.load_model(tmp_path / "capped.py", config={"cap": float("inf"), "floor": float("nan")})
    data, spec = f"file:{text_file}", ModelSpec(task="causal_lm", vocab_size=300, max_length=16)
    config = quick.with_changes(max_steps=2)
    train(model, data, config, tmp_path / "run", spec=spec, progress=False)

    def refuse(name):
        raise AssertionError(f"a bare {name}")

    json.loads((tmp_path / "run" / RECORD).read_text(), parse_constant=refuse)
    assert read_record(tmp_path / "run")["model"]["config"]["cap"] == float("inf")
    check_same(tmp_path / "run", model, data, config, spec=spec)
    run, _ = open_run(tmp_path / "run")
    assert run.model.cap == float("inf")


def test_a_run_without_matplotlib_ends_with_everything_but_the_picture(
    tmp_path, text_file, tiny_gpt, quick, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="cannot be written everywhere: The package matplotlib"):
        run = train(
            tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", mirror=tmp_path / "copy",
            progress=False,
        )  # fmt: skip
    assert run.finished
    for folder in (tmp_path / "run", tmp_path / "copy"):
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert (folder / "report.html").stat().st_size > 1000
        assert not (folder / "figures" / "training.png").exists()
