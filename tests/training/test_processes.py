"""Several devices and other machines: the same steps, shared differently."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import utils
from utils.__main__ import main
from utils.runtime.errors import ConfigError, RunError
from utils.training import TrainingConfig, clean_stop, processes
from utils.training.clean_stop import LAUNCHER, STOP_FILE, CleanStop, session_minutes
from utils.training.parts import LightningPart
from utils.training.processes import (
    adapted,
    devices_here,
    is_started_here,
    processes_here,
    rank_and_world,
    wait_for_run,
)
from utils.training.resume import open_run, resume, train
from utils.training.run import PROCESSES_LOCK, session_lock

ROOT = Path(__file__).resolve().parents[2]
TINY = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.0}


@pytest.mark.parametrize(
    ("batch", "accumulate", "devices", "now", "expected"),
    [
        (8, 1, 2, 1, (8, 2)),
        (8, 2, 1, 2, (8, 1)),
        (8, 1, 1, 2, (4, 1)),
        (8, 3, 2, 3, (8, 2)),
        (8, 1, 4, 2, (8, 2)),
        (6, 1, 1, 4, None),
        (8, 1, 1, 0, None),
    ],
)
def test_a_step_keeps_its_samples_on_another_number_of_devices(batch, accumulate, devices, now, expected):
    config = TrainingConfig(batch_size=batch, accumulate=accumulate, devices=devices)
    if expected is None:
        with pytest.raises(RunError, match=rf"takes {batch * accumulate * devices} samples.*{now} devices.*devices=1"):
            adapted(config, now)
        return
    changed = adapted(config, now)
    assert (changed.batch_size, changed.accumulate, changed.devices) == (*expected, now)
    assert changed.samples_per_step == config.samples_per_step


def test_one_device_needs_no_strategy_and_a_cpu_no_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = TrainingConfig(devices=2, strategy="ddp", precision="16-mixed")
    changed = adapted(config, 1)
    assert (changed.strategy, changed.precision) == ("auto", "32-true")
    assert adapted(config, 2, "fsdp").strategy == "fsdp"
    assert adapted(config, 4, "fsdp").strategy == "fsdp"
    with pytest.raises(ConfigError, match="strategy is 'zero'"):
        adapted(config, 2, "zero")
    assert devices_here(config) == 2
    assert devices_here(config, 4) == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices_here(config) == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert rank_and_world() == (5, 8)
    assert processes_here() == 4
    assert devices_here(config, 3) == 8


def test_an_optimizer_computes_as_this_machine_does():
    parameter = torch.nn.Parameter(torch.ones(2))
    there = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(2)
    there.step()
    here = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    LightningPart("optimizer", here).load_state_dict(there.state_dict())
    assert here.param_groups[0]["lr"] == there.param_groups[0]["lr"]
    assert not here.param_groups[0]["fused"]
    assert torch.equal(here.state_dict()["state"][0]["exp_avg"], there.state_dict()["state"][0]["exp_avg"])


def test_another_number_of_devices_goes_on_within_tolerance_and_says_so(tmp_path, text_file, quick):
    """The run was started with two devices, and this machine is asked to use one."""
    model = utils.load_model("example:gpt", config=TINY)
    short = quick.with_changes(accumulate=2, time_budget_minutes=1e-9)
    train(model, f"file:{text_file}", short, tmp_path / "run", progress=False)
    whole = train(
        utils.load_model("example:gpt", config=TINY), f"file:{text_file}", quick.with_changes(accumulate=2),
        tmp_path / "whole", progress=False,
    )  # fmt: skip
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["config"] |= {"accumulate": 1, "devices": 2}
    record["machine"]["devices"] = 2
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="devices 2 became 1.*agree within rounding.*dropout.*other batches"):
        run = resume(tmp_path / "run", devices=1, time_budget_minutes=60, progress=False)
    assert run.finished
    assert run.last("validation")["loss"] == pytest.approx(whole.last("validation")["loss"], rel=1e-4)
    assert json.loads(path.read_text())["config"]["devices"] == 2, "the run stays one of two devices"


def test_a_bare_module_cannot_be_spread_over_devices_later(tmp_path, text_file, quick, tiny_gpt):
    short = quick.with_changes(time_budget_minutes=1e-9)
    train(tiny_gpt.module, f"file:{text_file}", short, tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="devices is 2, and the model is a bare GPT"):
        resume(tmp_path / "run", model=tiny_gpt.module, devices=2, progress=False)


def test_devices_and_strategy_reach_every_verb(tmp_path, monkeypatch, capsys):
    asked = []

    def caught(*arguments, **named):
        config = next((value for value in arguments if isinstance(value, TrainingConfig)), None)
        asked.append((config.devices, config.strategy) if config else (named["devices"], named["strategy"]))
        raise RunError("Enough.")

    monkeypatch.setattr("utils.training.resume.train", caught)
    monkeypatch.setattr("utils.training.resume.resume", caught)
    config = TrainingConfig(devices=8, strategy="fsdp")
    for verb in (
        lambda: utils.train("example:gpt", config=config, run_dir=tmp_path),
        lambda: utils.resume(tmp_path, devices=8, strategy="fsdp"),
    ):
        with pytest.raises(RunError, match="Enough"):
            verb()
    options = ["--devices", "8", "--strategy", "fsdp"]
    assert main(["train", "example:gpt", "--run-dir", str(tmp_path), *options]) == 2
    assert main(["resume", str(tmp_path), *options]) == 2
    assert asked == [(8, "fsdp")] * 4


def test_what_trackers_said_in_another_process_is_told(tmp_path, text_file, quick, monkeypatch):
    """The first of the processes tracks; what it has to say comes to the one that started it."""

    def ended(directory, devices, arguments):
        assert arguments[:2] == ["--strategy", "fsdp"]
        run, _ = open_run(directory)
        run.notes.append("wandb sync here")
        run.save_summary()
        return 1

    monkeypatch.setattr("utils.training.resume.launch", ended)
    model = utils.load_model("example:gpt", config=TINY)
    config = quick.with_changes(devices=2, strategy="fsdp")
    run = train(model, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert run.notes == ["wandb sync here"]
    assert "wandb sync here" in run._repr_html_()


def test_other_processes_wait_for_the_first_to_make_the_run(tmp_path, monkeypatch):
    timer = threading.Timer(0.1, (tmp_path / "run.json").touch)
    timer.start()
    wait_for_run(tmp_path / "run.json")
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    with pytest.raises(RunError, match="elsewhere.json has not come.*folder that all machines share"):
        wait_for_run(tmp_path / "elsewhere.json")


def test_only_the_first_process_speaks(tmp_path, text_file, quick, tiny_gpt, monkeypatch, capsys):
    train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=1), tmp_path / "run", progress=False)
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
        assert ("finished at step 1 of 1" in capsys.readouterr().out) is speaks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, text_file, quick):
    config = quick.with_changes(max_steps=8, checkpoint_every_steps=3, log_every_steps=2)
    data = f"file:{text_file}"
    one = train(
        utils.load_model("example:gpt", config=TINY), data, config.with_changes(batch_size=8), tmp_path / "one",
        progress=False,
    )  # fmt: skip
    two = train(
        utils.load_model("example:gpt", config=TINY), data, config.with_changes(devices=2), tmp_path / "two",
        progress=False,
    )  # fmt: skip
    assert two.finished
    rows = [[row for row in run.metrics if row["split"] == "train"] for run in (one, two)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for first, second in zip(*rows, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-3)
    for name, tensor in one.model.state_dict().items():
        assert torch.allclose(tensor, two.model.state_dict()[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["asked", "vanished"])
def test_processes_stop_and_save_when_their_launcher_is_asked_to_or_vanishes(tmp_path, text_file, quick, how):
    config = quick.with_changes(devices=2, max_steps=100_000, checkpoint_every_steps=100_000)
    script = tmp_path / "start.py"
    script.write_text(
        "import sys, json, utils\n"
        "from utils.training import TrainingConfig\n"
        "from utils.training.resume import train\n"
        f"model = utils.load_model('example:gpt', config={TINY!r})\n"
        f"config = TrainingConfig(**{config.to_dict()!r})\n"
        f"run = train(model, {f'file:{text_file}'!r}, config, sys.argv[1], progress=False)\n"
        "print(run.status)\n"
    )
    directory = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(script), str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (directory / "metrics.csv").exists() or (directory / "metrics.csv").read_text().count("\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM if how == "asked" else signal.SIGKILL)
    output = process.communicate(timeout=100)[0]
    if how == "asked":
        assert output.strip() == "terminated"
    while how == "vanished":
        try:
            with session_lock(directory):
                break
        except RunError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    run, _ = open_run(directory)
    assert run.step >= 5
    assert json.loads((directory / "summary.json").read_text())["status"] == "terminated"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_fails_is_no_end_of_the_run(tmp_path, text_file, quick, monkeypatch):
    monkeypatch.setattr(processes, "python_path", lambda: str(tmp_path))
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__main__.py").write_text("raise SystemExit(1)")
    model = utils.load_model("example:gpt", config=TINY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="failed with exit status 1.*stands at step 0.*utils.resume"):
        train(model, f"file:{text_file}", quick.with_changes(devices=2), tmp_path / "run", progress=False)


def test_torchrun_that_cannot_be_started(tmp_path, text_file, quick, monkeypatch):
    def nowhere(*arguments, **named):
        raise OSError("no such program")

    monkeypatch.setattr(subprocess, "Popen", nowhere)
    model = utils.load_model("example:gpt", config=TINY)
    with pytest.raises(RunError, match="2 devices could not be started: no such program.*torchrun --nproc-per-node 2"):
        train(model, f"file:{text_file}", quick.with_changes(devices=2), tmp_path / "run", progress=False)


def test_what_a_killed_launcher_left_behind_keeps_others_away(tmp_path):
    with (
        session_lock(tmp_path, PROCESSES_LOCK),
        pytest.raises(RunError, match="Another process is training"),
        session_lock(tmp_path),
    ):
        pass
    with session_lock(tmp_path), session_lock(tmp_path, PROCESSES_LOCK):
        pass


def test_a_started_process_asks_its_launcher(tmp_path, monkeypatch):
    assert not is_started_here()
    CleanStop().look()
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    assert is_started_here()
    stop = CleanStop()
    stop.look()
    assert stop.reason is None
    (tmp_path / "stop").write_text("interrupted")
    stop.look()
    assert stop.reason == "interrupted"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv(LAUNCHER, str(gone.pid))
    monkeypatch.delenv(STOP_FILE)
    stop = CleanStop()
    stop.look()
    assert stop.reason == "terminated"


def test_training_stops_before_the_machine_does(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    age = session_minutes()
    assert 0 < age < 24 * 60
    monkeypatch.setattr(clean_stop, "in_colab", lambda: True)
    assert session_minutes() >= age
    monkeypatch.setattr(clean_stop.Path, "read_text", lambda *arguments, **named: "not like that")
    assert session_minutes() >= 0
    monkeypatch.undo()
    limited = quick.with_changes(session_limit_minutes=15.0 + age / 2)
    run = train(tiny_gpt, f"file:{text_file}", limited, tmp_path / "run", progress=False)
    assert (run.status, run.step) == ("stopped before the end of the machine's session", 1)
    assert open_run(tmp_path / "run")[0].step == 1


def test_signals_outside_the_main_thread_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)

    def inside():
        with CleanStop().listening():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()


def test_a_second_interrupt_is_immediate():
    stop = CleanStop()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "interrupted"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
