import os
import signal
from types import SimpleNamespace

import pytest
import torch

import utils
from utils.__main__ import main
from utils.runtime.errors import RunError
from utils.training import TrainingConfig
from utils.training.out_of_memory import in_batches_of, lost_worker, smaller_batch
from utils.training.resume import resume, train
from utils.training.training_module import TrainingModule
from utils.training.weights import weights_sha256

TINY = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1, "dropout": 0.0}


@pytest.fixture
def failing(monkeypatch):
    """Return a function that makes a pass of a run, or the update after it, run out of memory once."""

    def fail(batch, inside="_backward", error=None):
        original = getattr(TrainingModule, inside)
        left = [error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")]

        def limited(self, *arguments):
            if left and self.batch_number == batch:
                if inside == "_step":
                    self.phase = "update"
                raise left.pop()
            return original(self, *arguments)

        monkeypatch.setattr(TrainingModule, inside, limited)

    return fail


def start(place, text_file, config):
    loaded = utils.load_model("example:gpt", config=TINY)
    return train(loaded, f"file:{text_file}", config, place, progress=False)


CONFIG = TrainingConfig(
    max_steps=9,
    batch_size=4,
    accumulate=2,
    log_every_steps=3,
    val_every_steps=9,
    checkpoint_every_steps=100,
    keep_best=0,
)


def test_the_last_whole_step_is_saved_and_goes_on_to_the_same_end(tmp_path, text_file, failing):
    whole = start(tmp_path / "whole", text_file, CONFIG)
    failing(13)
    with pytest.raises(RunError) as caught:
        start(tmp_path / "run", text_file, CONFIG)
    assert str(caught.value) == (
        "Memory ran out in step 7, with batches of 4 (CUDA out of memory. Tried to allocate 2.00 GiB). Expected a step "
        f"to fit; the state after step 6 is saved. Try utils.resume('{tmp_path / 'run'}', batch_size=2): the "
        "same samples in each step, in 4 passes."
    )
    again = resume(tmp_path / "run", progress=False)
    assert again.finished and again.sessions == 2
    assert weights_sha256(again.model) == weights_sha256(whole.model)
    for before, after in zip(whole.metrics, again.metrics, strict=True):
        assert (before["step"], before["loss"]) == (after["step"], after["loss"])


def test_smaller_batches_go_on_with_the_same_samples(tmp_path, text_file, failing):
    whole = start(tmp_path / "whole", text_file, CONFIG)
    failing(6)
    with pytest.raises(RunError, match="Memory ran out in step 4"):
        start(tmp_path / "run", text_file, CONFIG)
    assert main(["resume", str(tmp_path / "run"), "--batch-size", "2", "--quiet"]) == 0
    again = resume(tmp_path / "run", progress=False)
    assert again.finished
    for before, after in zip(whole.metrics, again.metrics, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=2e-4)


def test_a_failure_while_weights_change_keeps_the_checkpoint_before(tmp_path, text_file, failing):
    failing(13, "_step")
    with pytest.raises(RunError, match="Memory ran out in step 7.*the state after step 4 is saved"):
        start(tmp_path / "run", text_file, CONFIG.with_changes(checkpoint_every_steps=4))
    whole = start(tmp_path / "whole", text_file, CONFIG)
    assert weights_sha256(resume(tmp_path / "run", progress=False).model) == weights_sha256(whole.model)


def test_a_single_sample_that_does_not_fit(tmp_path, text_file, failing):
    failing(0, error=RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    words = "Memory ran out in step 1, with batches of 1 .*after step 0 is saved.*context_length.*in a new run"
    with pytest.raises(RunError, match=words):
        start(tmp_path / "run", text_file, CONFIG.with_changes(batch_size=1, accumulate=1))


def test_other_errors_pass(tmp_path, text_file, failing):
    failing(3, error=RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        start(tmp_path / "run", text_file, CONFIG)


def test_batches_must_make_up_the_same_steps():
    config = TrainingConfig(batch_size=6, accumulate=2)
    assert (in_batches_of(config, 4).batch_size, in_batches_of(config, 4).accumulate) == (4, 3)
    for size in (5, 0, "2", True):
        with pytest.raises(RunError, match=r"takes 12 samples on each device.*Pass one of 1, 2, 3, 4, 6, 12\."):
            in_batches_of(config, size)
    assert [smaller_batch(config.with_changes(batch_size=n)) for n in (1, 2, 3, 5, 6, 7)] == [0, 1, 1, 2, 3, 2]


def test_the_batch_that_is_advised_holds_no_sample_twice():
    config = TrainingConfig(batch_size=10**6)
    assert smaller_batch(config) == 500_000
    assert smaller_batch(config, 300) == 250


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed_is_told(tmp_path):
    run = SimpleNamespace(directory=tmp_path, config=CONFIG)
    callback = SimpleNamespace(run=run, config=CONFIG.with_changes(workers=1), writer=SimpleNamespace(saved_step=6))
    with pytest.raises(RuntimeError) as raised:
        list(torch.utils.data.DataLoader(Killed(), num_workers=1, multiprocessing_context="fork"))
    error = lost_worker(callback, raised.value)
    assert "A worker process that prepares batches has died (DataLoader worker" in str(error)
    assert "the state after step 6 is saved. Continue with utils.resume(" in str(error)
    assert lost_worker(callback, RuntimeError("mat1 and mat2")) is None
    assert lost_worker(callback, ValueError("DataLoader worker (pid 1)")) is None
