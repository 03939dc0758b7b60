import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError, RunError
from utils.runtime.resources import available_memory
from utils.training import TrainingConfig, batch_size_finder, step_memory
from utils.training.batch_size_finder import find_batch_size
from utils.training.prepared_data import PreparedData
from utils.training.step_memory import activation_bytes, largest_batch, run_bytes
from utils.training.weights import weights_sha256

AUTO = TrainingConfig(batch_size="auto", step_samples=48)


class Limited(nn.Module):
    """Runs out of memory above a number of samples, as a GPU would."""

    def __init__(self, most, error=torch.OutOfMemoryError, width=8):
        super().__init__()
        self.layer = nn.Linear(4, width)
        self.head = nn.Linear(width, 1)
        self.most, self.error = most, error

    def forward(self, features):
        if len(features) > self.most:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.head(torch.tanh(self.layer(features)))


def task(model, samples=60):
    adapter = ModelAdapter(model, spec=ModelSpec(task="regression", example_inputs={"features": torch.zeros(1, 4)}))
    torch.manual_seed(0)
    rows = {"features": torch.randn(samples, 4), "labels": torch.randn(samples, 1)}
    return adapter, PreparedData("test", "regression", rows, rows)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_running_out_of_memory_is_survived_and_the_step_keeps_its_samples(error):
    adapter, data = task(Limited(20, error))
    before = weights_sha256(adapter.module)
    state = torch.get_rng_state()
    found = find_batch_size(adapter, data, AUTO)
    assert (found.batch_size, found.accumulate, found.samples_per_step) == (16, 3, 48)
    assert [(trial.batch_size, trial.outcome) for trial in found.trials] == [
        (48, "ran out of memory"), (24, "ran out of memory"), (16, "fits"),
    ]  # fmt: skip
    assert weights_sha256(adapter.module) == before
    assert torch.equal(torch.get_rng_state(), state)
    config = found.applied(AUTO)
    assert (config.batch_size, config.accumulate, config.step_samples) == (16, 3, None)
    assert config.samples_per_step == AUTO.samples_per_step == 48
    assert str(found).startswith("batch size 16: 3 passes of it make a step of 48 samples; ")
    assert "ran out of memory" in found._repr_html_()
    assert found.to_dict()["trials"][0] == {"batch_size": 48, "outcome": "ran out of memory", "memory": None}


def test_what_fits_at_once_is_tried_once():
    found = find_batch_size(*task(Limited(100)), AUTO)
    assert (found.batch_size, found.accumulate, len(found.trials)) == (48, 1, 1)
    assert "batch size 48: it is a step of 48 samples" in found.text()
    more = find_batch_size(*task(Limited(100)), TrainingConfig(batch_size=4, learning_rate="auto"), samples=200)
    assert (more.batch_size, more.accumulate) == (100, 2)


def test_settings_say_the_samples_of_a_step():
    assert find_batch_size(*task(Limited(5)), TrainingConfig(batch_size=6, accumulate=2)).samples_per_step == 12
    assert find_batch_size(*task(Limited(5)), TrainingConfig(batch_size="auto")).samples_per_step == 32
    with pytest.raises(ConfigError, match="samples is 0.*above 0"):
        find_batch_size(*task(Limited(5)), AUTO, samples=0)


def test_nothing_fits():
    adapter, data = task(Limited(20))
    adapter.module.most = 0
    with pytest.raises(RunError, match=r"No batch fits: one sample ran out of memory, with .* Shorten the samples"):
        find_batch_size(adapter, data, AUTO)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        find_batch_size(*task(Limited(20, ZeroDivisionError)), AUTO)


def test_on_a_cpu_what_cannot_fit_is_counted_and_not_tried(monkeypatch):
    adapter, data = task(Limited(100, width=1000))
    held, each = run_bytes(adapter, AUTO, torch.device("cpu")), activation_bytes(adapter, data, AUTO)
    assert 4000 <= each <= 12_000, "the output of tanh, and little else"
    monkeypatch.setattr(batch_size_finder, "room", lambda device: int(1.15 * (held + 13 * each)))
    monkeypatch.setattr(batch_size_finder, "_taken", lambda *_: 1000)
    found = find_batch_size(adapter, data, AUTO)
    assert found.batch_size == 12
    assert {trial.outcome for trial in found.trials[:-1]} == {"ruled out by counting"}
    assert found.trials[0].memory == held + 48 * each


def test_what_leaves_too_little_is_not_taken(monkeypatch):
    monkeypatch.setattr(batch_size_finder, "_taken", lambda *a: room if a[2].batch_size > 8 else room // 2)
    room = available_memory()
    monkeypatch.setattr(batch_size_finder, "room", lambda device: room)
    found = find_batch_size(*task(Limited(100)), AUTO)
    assert found.batch_size == 8
    assert found.trials[0].outcome == "leaves too little memory"


class Hungry(nn.Module):
    """Takes 64 MB for each sample without keeping it, which no counting of what is kept can see."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, features):
        with torch.no_grad():
            torch.ones(len(features), 16_000_000)
        return self.layer(features)


def test_a_limit_of_the_system_is_survived(monkeypatch):
    """A real failure of the allocator: the block may allocate 0.85 GB, and 48 samples would take three.

    16 would take 1.02: memory that earlier tests mapped and gave back is not enough for the rest.
    """
    from utils.runtime.resources import allocation_limit

    monkeypatch.setattr(batch_size_finder, "allocation_limit", lambda: allocation_limit(0.85e9))
    found = find_batch_size(*task(Hungry()), AUTO)
    assert found.trials[0].outcome == "ran out of memory"
    assert found.batch_size in (6, 8, 12)
    assert found.trials[-1].memory > found.batch_size * 50e6


def test_the_longest_samples_are_tried():
    lengths = torch.tensor([2, 9, 5, 16])
    rows = {"input_ids": torch.ones(4, 16, dtype=torch.int64), "lengths": lengths, "labels": torch.zeros(4)}
    data = PreparedData("test", "text_classification", rows, rows)
    assert largest_batch(data, 1)["attention_mask"].sum() == 16
    assert largest_batch(data, 6)["attention_mask"].sum(1).tolist() == [16, 9, 5, 2, 16, 9]


def test_recomputed_activations_count_less():
    loaded = utils.load_model("example:gpt", config={"vocab_size": 50, "d_model": 32, "nhead": 2, "num_layers": 4})
    rows = {"input_ids": torch.ones(4, 16, dtype=torch.int64), "labels": torch.ones(4, 16, dtype=torch.int64)}
    data, adapter = PreparedData("test", "causal_lm", rows, rows), ModelAdapter(loaded)
    all_kept = activation_bytes(adapter, data, TrainingConfig())
    assert activation_bytes(adapter, data, TrainingConfig(gradient_checkpointing=True)) < all_kept / 2


def test_batch_normalization_is_tried_without_counting():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    adapter = ModelAdapter(model, spec=ModelSpec(task="regression", example_inputs={"input": torch.zeros(4, 4)}))
    rows = {"features": torch.randn(60, 4), "labels": torch.randn(60, 1)}
    data = PreparedData("test", "regression", rows, rows)
    assert activation_bytes(adapter, data, AUTO) == 0
    assert find_batch_size(adapter, data, AUTO).batch_size == 48


@pytest.mark.gpu
def test_on_a_gpu_real_memory_runs_out():
    """64 MB a sample, kept by nobody; so many samples that no GPU has room for them."""
    found = find_batch_size(*task(Hungry()), AUTO, samples=2**14)
    assert found.trials[0].outcome in ("ran out of memory", "leaves too little memory")
    assert 32 <= found.batch_size < 2**14
    assert step_memory.room(torch.device("cuda", 0)) > found.trials[-1].memory
