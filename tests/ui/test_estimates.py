import math
import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError
from utils.training import batch_size_finder
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import load_data
from utils.training.resume import train
from utils.training.weights import weights_sha256
from utils.ui import estimates
from utils.ui.estimates import duration, estimate_run, tokens_per_sample

SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1, "dropout": 0.1}
CONFIG = TrainingConfig(max_steps=40, batch_size=4, context_length=16, val_every_steps=20, checkpoint_every_steps=10)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400)))
    return f"file:{path}"


@pytest.fixture(scope="module")
def data(text):
    return load_data(text, task="causal_lm", vocab_size=300, max_length=16)


@pytest.fixture(scope="module")
def gpt():
    return utils.load_model("example:gpt", config=SMALL)


def test_it_comes_from_real_steps_and_changes_nothing(gpt, data, tmp_path):
    before = weights_sha256(gpt.module)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    estimate = estimate_run(gpt, data, CONFIG, tmp_path / "run", seconds=0.2)
    assert weights_sha256(gpt.module) == before
    assert all(parameter.grad is None for parameter in gpt.module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "run").exists()
    assert estimate.possible and estimate.measured_steps >= 2
    assert 0 < estimate.seconds_per_step <= estimate.slowest_step
    assert estimate.total_seconds > 40 * estimate.seconds_per_step
    assert estimate.tokens_per_second == pytest.approx(estimate.samples_per_second * 16)
    assert 0 < estimate.memory < estimate.memory_there
    estimate.check()
    for shown in (str(estimate), estimate._repr_html_()):
        assert "This run fits." in shown and "measured here and now" in shown and "this machine" in shown
    assert estimate.to_dict()["possible"] is True


def test_disk_is_what_the_run_then_takes(gpt, data, tmp_path):
    estimate = estimate_run(gpt, data, CONFIG, tmp_path / "run", seconds=0.1)
    run = train(gpt, data, CONFIG, tmp_path / "run", progress=False)
    newest = max((run.directory / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    assert estimate.checkpoint == pytest.approx(size, rel=0.35)
    taken = sum(path.stat().st_size for path in run.directory.rglob("*") if path.is_file())
    assert taken < 1.6 * estimate.disk + 1e6


def test_accumulation_and_moving_averages_count(gpt, data, tmp_path):
    plain = estimate_run(gpt, data, CONFIG, tmp_path, seconds=0.1)
    more = estimate_run(gpt, data, CONFIG.with_changes(accumulate=4, ema_decay=0.9), tmp_path, seconds=0.1)
    assert more.seconds_per_step > 1.5 * plain.seconds_per_step
    assert more.checkpoint > 1.2 * plain.checkpoint
    every = estimate_run(gpt, data, CONFIG.with_changes(keep_every_steps=10), tmp_path, seconds=0.1)
    assert every.disk > plain.disk + 3 * plain.checkpoint


def test_a_batch_that_does_not_fit_is_refused_before_it_is_tried(gpt, data, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "available_memory", lambda: 0)
    monkeypatch.setattr(estimates, "resident_memory", lambda: 30_000_000)
    estimate = estimate_run(gpt, data, CONFIG.with_changes(batch_size=100_000), tmp_path)
    assert estimate.measured_steps == 0
    assert "batches of 100000 (counted on one sample), and there are 30.0 MB" in estimate.problems[0]
    assert "as many samples in each step, in more passes" in estimate.problems[0]
    with pytest.raises(ConfigError, match=r"A step keeps about .* estimate again"):
        estimate.check()
    assert "This run cannot work here." in estimate.text() and "<li>" in estimate._repr_html_()
    assert math.isnan(estimate.total_seconds)


def test_a_model_without_room_is_refused_whatever_the_batch(gpt, data, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "available_memory", lambda: 0)
    monkeypatch.setattr(estimates, "resident_memory", lambda: 1000)
    assert "no batch size can change that" in estimate_run(gpt, data, CONFIG, tmp_path).problems[0]


def test_running_out_of_memory_while_measuring_is_an_answer(gpt, data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(estimates, "_run_steps", fail)
    estimate = estimate_run(gpt, data, CONFIG, tmp_path)
    assert "Memory ran out in the first steps, with batches of 4" in estimate.problems[0]
    assert "batch_size=2 with accumulate=2" in estimate.problems[0]
    alone = estimate_run(gpt, data, CONFIG.with_changes(batch_size=1), tmp_path)
    assert "context_length" in alone.problems[0]
    monkeypatch.setattr(estimates, "_run_steps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate_run(gpt, data, CONFIG, tmp_path)


def test_too_little_disk_is_refused_for_both_copies(gpt, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 10))
    problems = estimate_run(gpt, data, CONFIG, tmp_path / "a" / "b", mirror=tmp_path / "m", seconds=0.1).problems
    assert f"{tmp_path} has 10 B free" in problems[0] and "4 checkpoints of" in problems[0]
    assert problems[1].startswith("The second copy needs")


def test_too_little_time_is_refused_with_what_fits(gpt, data, tmp_path):
    estimate = estimate_run(gpt, data, CONFIG.with_changes(max_steps=10**6), tmp_path, limit_minutes=0.001, seconds=0.1)
    assert "1,000,000 steps take about" in estimate.problems[0] and "steps would fit" in estimate.problems[0]


def test_sessions_are_counted(gpt, data, tmp_path):
    config = CONFIG.with_changes(max_steps=10**6, time_budget_minutes=1.0)
    estimate = estimate_run(gpt, data, config, tmp_path, seconds=0.1)
    assert estimate.sessions == math.ceil(estimate.total_seconds / 60) > 1
    assert f"in {estimate.sessions} sessions" in estimate.text()


def test_what_is_not_measured_is_said(gpt, data, tmp_path, monkeypatch):
    notes = estimates._notes(CONFIG.with_changes(compile=True, devices=2))
    assert [word in " ".join(notes) for word in ("torch.compile", "one of the 2 devices")] == [True] * 2
    from contextlib import contextmanager

    @contextmanager
    def unknown():
        yield []

    monkeypatch.setattr(estimates, "peak_of_block", unknown)
    assert "counted, not measured" in estimate_run(gpt, data, CONFIG, tmp_path, seconds=0.1).memory_reason


def test_what_is_found_at_the_start_is_found_for_the_estimate_too(gpt, data, tmp_path, monkeypatch):
    config = CONFIG.with_changes(batch_size="auto", step_samples=6, learning_rate="auto")
    estimate = estimate_run(gpt, data, config, tmp_path, seconds=0.1)
    assert estimate.possible
    assert estimate.samples_per_second == pytest.approx(6 / estimate.seconds_per_step)
    assert estimate.total_seconds > 140 * estimate.seconds_per_step
    assert "batch size 6: it is a step of 6 samples" in estimate.text()
    assert "about 100 steps that are counted here" in estimate.text()
    monkeypatch.setattr(batch_size_finder, "room", lambda device: 1000)
    refused = estimate_run(gpt, data, config, tmp_path)
    assert refused.problems[0].startswith("No batch fits: one sample ruled out by counting, with 1.0 kB free")


def test_only_tokens_that_are_there_are_counted(tmp_path):
    (tmp_path / "few.csv").write_text("text,label\n" + "".join(f"a{i},{'xy'[i % 2]}\n" for i in range(40)))
    data = load_data(f"file:{tmp_path / 'few.csv'}", task="text_classification", vocab_size=300, num_labels=2)
    mean = data.train["lengths"].float().mean().item()
    assert tokens_per_sample(data) == pytest.approx(mean) and mean < 8 < data.facts["length"]
    (tmp_path / "pairs.csv").write_text("source,target\n" + "".join(f"a{i},bb{i} c\n" for i in range(40)))
    data = load_data(f"file:{tmp_path / 'pairs.csv'}", task="seq2seq", vocab_size=300, max_length=64)
    both = data.train["lengths"] + data.train["target_lengths"]
    assert tokens_per_sample(data) == pytest.approx(both.float().mean().item())


def test_images_and_batch_normalization(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    example = {"input": torch.zeros(4, 1, 8, 8)}
    spec = utils.ModelSpec(task="image_classification", num_labels=10, example_inputs=example)
    adapter = ModelAdapter(model, spec=spec)
    data = load_data("builtin:digits", task="image_classification", num_labels=10, image_shape=(1, 8, 8))
    estimate = estimate_run(adapter, data, CONFIG.with_changes(context_length=None), tmp_path, seconds=0.1)
    assert estimate.tokens_per_second is None and "samples per second" in estimate.text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (1.26, "1.3 s"), (61, "61 s"), (600, "10 min"), (7200, "2.0 h"), (400_000, "4.6 days")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


@pytest.mark.gpu
def test_on_a_gpu_the_memory_is_the_gpus(gpt, data, tmp_path):
    estimate = estimate_run(gpt, data, CONFIG, tmp_path, seconds=0.5)
    assert estimate.possible
    assert estimate.memory_reason == "measured by the GPU"
    assert 0 < estimate.memory < estimate.memory_there
