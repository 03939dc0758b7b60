import errno
import math
import shutil
import signal
import warnings

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError, RunError
from utils.training import TrainingConfig, checkpoint_manager, training_core
from utils.training.clean_stop import interruptible
from utils.training.dataset_utilities import load_data
from utils.training.diagnosis import NotFiniteError
from utils.training.evaluation import evaluate
from utils.training.metrics import read_metrics
from utils.training.resume import train
from utils.training.schedules import learning_rate_share
from utils.training.session_callback import SessionCallback
from utils.training.text_stream import open_stream
from utils.training.training_module import TrainingModule
from utils.training.weights import weights_sha256


def test_a_language_model_learns_and_everything_is_kept(tmp_path, text_file, tiny_gpt, quick):
    run = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=60), tmp_path / "run", progress=False)
    assert run.finished
    assert run.model is tiny_gpt.module
    assert not run.model.training
    losses = [row["loss"] for row in run.metrics if row["split"] == "train"]
    assert losses[0] == pytest.approx(math.log(300), abs=0.4), "the first losses are those of chance"
    assert losses[-1] < losses[0] - 0.5
    last = run.last("validation")
    facts = run.data.facts
    expected = last["loss"] * facts["validation_tokens"] / math.log(2) / facts["validation_bytes"]
    assert last["bits_per_byte"] == pytest.approx(expected)
    assert read_metrics(run.directory / "metrics.csv") == run.metrics
    for name in ("run.json", "summary.json", "figures/training.png", "model/model.py", "data/tokenizer.json"):
        assert (run.directory / name).stat().st_size > 100, name
    assert "finished at step 60 of 60" in str(run)
    assert "<table>" in run._repr_html_()


def test_images_are_classified_better_than_chance(tmp_path):
    loaded = utils.load_model("example:vit")
    config = TrainingConfig(max_steps=130, batch_size=32, learning_rate=3e-3, val_every_steps=130)
    run = train(loaded, "builtin:digits", config, tmp_path / "run", progress=False)
    assert run.last("validation")["accuracy"] > 0.6


def test_the_seed_decides_everything(tmp_path, text_file, quick):
    def sha(name: str, seed: int) -> str:
        loaded = utils.load_model(
            "example:bert", config={"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
        )
        config = quick.with_changes(max_steps=3, seed=seed)
        return weights_sha256(train(loaded, f"file:{text_file}", config, tmp_path / name, progress=False).model)

    torch.manual_seed(1)
    first = sha("a", 0)
    torch.manual_seed(2)
    assert sha("b", 0) == first
    assert sha("c", 1) != first


def test_the_callers_random_streams_are_untouched(tmp_path, text_file, tiny_gpt, quick):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_measuring_leaves_the_model_alone_and_repeats(text_file, tiny_gpt):
    adapter = ModelAdapter(tiny_gpt)
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=32)
    tiny_gpt.module.train()
    first, second = (evaluate(adapter, data, batch_size=size) for size in (3, 3))
    assert first == second
    assert tiny_gpt.module.training
    whole = evaluate(adapter, data, batch_size=64)
    assert whole["loss"] == pytest.approx(first["loss"], rel=1e-5), "the mean is over tokens, not over batches"


def test_a_full_disk_warns_and_training_goes_on(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    original, calls = checkpoint_manager.write_tensors, []

    def sometimes_full(tensors, aliases, path):
        calls.append(path)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, aliases, path)

    monkeypatch.setattr(checkpoint_manager, "write_tensors", sometimes_full)
    with pytest.warns(
        UserWarning, match="disk is full: the checkpoint of step .*step-00000000 is untouched.*Training goes on"
    ):
        run = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    assert run.finished
    assert run.lost_checkpoints == 2
    assert run.checkpoints.latest().step == 24


def test_a_disk_that_is_full_at_the_end_is_not_called_finished(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    original, armed = checkpoint_manager.write_tensors, []

    def full_at_the_end(tensors, aliases, path):
        if "step-00000024" in str(path) and not armed:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, aliases, path)

    monkeypatch.setattr(checkpoint_manager, "write_tensors", full_at_the_end)
    with pytest.warns(UserWarning, match="disk is full: the checkpoint of step 24"):
        run = train(tiny_gpt, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    assert run.status == "finished, but not saved"
    assert not run.finished
    armed.append(True)
    again = utils.resume(tmp_path / "run", progress=False)
    assert again.finished
    assert weights_sha256(again.model) == weights_sha256(run.model)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, text_file, quick):
    loaded = utils.load_model(
        "example:gpt", config={"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
    )
    original = loaded.module.forward

    def breaks(input_ids):
        logits = original(input_ids)
        return logits * float("nan") if loaded.module.training and breaks.armed else logits

    breaks.armed = False
    loaded.module.forward = breaks
    original_train = loaded.module.train

    def arm(mode: bool = True):
        breaks.armed = mode
        return original_train(mode)

    loaded.module.train = arm
    with pytest.raises(
        RunError,
        match="training loss is nan in batch 0 of step 1 .first in what GPT puts out.*last good state is kept",
    ):
        train(loaded, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    assert (tmp_path / "run/checkpoints/step-00000000").is_dir()


def test_a_gradient_that_is_not_finite_is_kept_out_of_the_checkpoints(tmp_path, text_file, tiny_gpt, quick):
    config = quick.with_changes(log_every_steps=1, checkpoint_every_steps=1)
    tiny_gpt.module.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(
        RunError,
        match="norm is nan in batch 0 of step 1.*forward pass is finite; first in the gradient of norm.weight.*last",
    ):
        train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000000"]


class Poisoned(nn.Module):
    """Its numbers stop being finite in one pass of training, forward or backward."""

    def __init__(self, when: int, backward: bool) -> None:
        super().__init__()
        self.head, self.embed, self.middle = nn.Linear(8, 300), nn.Embedding(300, 8), nn.Linear(8, 8)
        self.when, self.backward, self.passes = when, backward, 0

    def forward(self, input_ids):
        x = self.middle(self.embed(input_ids))
        if self.training:
            self.passes += 1
            if self.passes == self.when and self.backward:
                x.register_hook(lambda gradient: gradient * float("nan"))
            elif self.passes == self.when:
                x = x / 0
        return self.head(x)


SPEC = ModelSpec(task="causal_lm", vocab_size=300, max_length=32)


@pytest.mark.parametrize(
    ("backward", "words"),
    [
        (False, "training loss is nan in batch 5 of step 2"),
        # Of the bad gradients that of the module called last, wherever the model has it.
        (
            True,
            r"norm is nan in batches 4 to 7 of step 2 .the forward pass is finite; first in the gradient of middle.b",
        ),
    ],
)
def test_one_bad_pass_of_a_step_is_told(tmp_path, text_file, quick, backward, words):
    config = quick.with_changes(accumulate=4)
    with pytest.raises(RunError, match=words):
        train(Poisoned(6, backward), f"file:{text_file}", config, tmp_path / "run", spec=SPEC, progress=False)


@pytest.mark.parametrize("backward", [False, True])
def test_where_nobody_waits_for_the_device_the_weights_still_stop_and_the_batch_is_found(
    tmp_path, text_file, quick, monkeypatch, backward
):
    """As on a GPU: the step is decided on the device, and read when a row is due."""
    original = TrainingModule.on_train_start

    def as_on_a_gpu(self):
        original(self)
        self.on_cpu = False

    monkeypatch.setattr(TrainingModule, "on_train_start", as_on_a_gpu)
    monkeypatch.setattr(TrainingModule, "transfer_batch_to_device", lambda self, batch, device, index: batch)
    model = Poisoned(5, backward)
    config = quick.with_changes(accumulate=2, val_every_steps=24, weight_decay=0.0)
    seen = []
    end = SessionCallback.on_train_batch_end

    def noting(self, *arguments):
        end(self, *arguments)
        seen.append(model.middle.weight.detach().clone())

    monkeypatch.setattr(SessionCallback, "on_train_batch_end", noting)
    words = r"gradient's norm is not finite in batches 4 to 5 of step 3"
    with pytest.raises(RunError, match=words):
        train(model, f"file:{text_file}", config, tmp_path / "run", spec=SPEC, progress=False)
    assert len(seen) == 7, "the failure was found when something was due"
    assert not torch.equal(seen[1], seen[3])
    assert all(torch.equal(seen[3], later) for later in seen[3:]), "no step after it changed the weights"


def test_a_batch_of_the_past_is_run_again_to_find_the_module(tmp_path, text_file, quick, monkeypatch):
    class Word(nn.Module):
        """Puts out no numbers for a batch that holds one sample."""

        def forward(self, x, ids):
            return x * float("nan") if self.training and (ids == chosen).all(1).any() else x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.word, self.head = nn.Embedding(300, 8), Word(), nn.Linear(8, 300)

        def forward(self, input_ids):
            return self.head(self.word(self.embed(input_ids), input_ids))

    original = TrainingModule.on_train_start

    def as_on_a_gpu(self):
        original(self)
        self.on_cpu = False

    monkeypatch.setattr(TrainingModule, "on_train_start", as_on_a_gpu)
    monkeypatch.setattr(TrainingModule, "transfer_batch_to_device", lambda self, batch, device, index: batch)
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=32)
    chosen = open_stream(data, quick).batch_at(2 * quick.batch_size)["input_ids"][1]
    with pytest.raises(RunError, match="not finite in batch 2 of step 3 .first in what word puts out"):
        train(
            Model(), data, quick.with_changes(checkpoint_every_steps=100), tmp_path / "run", spec=SPEC, progress=False
        )


def test_a_scaler_that_leaves_out_every_step_is_no_training(text_file, tiny_gpt, quick):
    adapter = ModelAdapter(tiny_gpt)
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=32)
    module = TrainingModule(adapter, data, quick, 100)
    module.failed, module.left_out, module.batch_number = torch.tensor(-1), torch.tensor(31), 40
    module.check_finite()
    module.left_out += 1
    with pytest.raises(NotFiniteError, match=r"not been finite in 32 steps in a row, up to step 40.*of head\).*bf16"):
        module.check_finite(lambda numbers: " (of head)" if list(numbers) == [39] else "")


def test_a_second_interrupt_is_an_interrupt(tmp_path, text_file, quick):
    class Interrupted(Poisoned):
        def forward(self, input_ids):
            if self.training and self.passes == 2:
                raise KeyboardInterrupt
            return super().forward(input_ids)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted(0, False), f"file:{text_file}", quick, tmp_path / "run", spec=SPEC, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(SystemExit), interruptible():
        raise SystemExit(3)


def test_lightning_says_nothing(tmp_path, text_file, tiny_gpt, quick, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 0.1), (7, 0.0), (2, 0.0), (10, 0.9), (1, 0.0)])
def test_every_schedule_is_its_closed_form_and_ends_at_the_final_share(schedule, total, warmup):
    decay = min(0.3, round(1 - warmup, 6))
    config = TrainingConfig(
        schedule=schedule, warmup_share=warmup, final_learning_rate_share=0.2, decay_share=decay, max_steps=total
    )
    shares = [learning_rate_share(step, total, config) for step in range(total)]
    rising = round(warmup * total)
    start = max(rising, total - max(1, round(decay * total))) if schedule == "wsd" else rising
    for step, share in enumerate(shares):
        if step < rising:
            assert share == (step + 1) / rising
        elif schedule == "constant" or total == 1 or step < start:
            assert share == 1.0
        elif step < total - 1:
            progress = (step - start) / (total - 1 - start)
            left = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
            assert share == pytest.approx(0.2 + 0.8 * left)
    assert max(shares) == 1.0
    assert shares[-1] == (1.0 if schedule == "constant" or total == 1 else 0.2)


def test_the_logged_rate_is_the_one_that_was_used(tmp_path, text_file, tiny_gpt, quick, monkeypatch):
    used = []
    original = torch.optim.AdamW.step

    def noting(self, *arguments, **named):
        used.append(self.param_groups[0]["lr"])
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    config = quick.with_changes(
        max_steps=5, log_every_steps=1, warmup_share=0.0, schedule="linear", final_learning_rate_share=0.0,
        learning_rate=1e-2,
    )  # fmt: skip
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    logged = [row["learning_rate"] for row in run.metrics if row["split"] == "train"]
    assert logged == used == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0])


def test_precision_on_this_machine():
    if torch.cuda.is_available():
        assert TrainingConfig().resolved_precision in {"bf16-mixed", "16-mixed"}
        assert TrainingConfig(precision="16-mixed").resolved_precision == "16-mixed"
    else:
        assert TrainingConfig().resolved_precision == "32-true"
        with pytest.raises(ConfigError, match="'16-mixed', and this machine has no GPU"):
            _ = TrainingConfig(precision="16-mixed").resolved_precision
    assert TrainingConfig(precision="bf16-mixed").resolved_precision == "bf16-mixed"


@pytest.mark.gpu
def test_mixed_precision_trains_and_resumes_on_a_gpu(tmp_path, text_file, tiny_gpt, quick):
    tiny_gpt.module.cuda()
    config = quick.with_changes(precision="16-mixed", time_budget_minutes=1e-9)
    train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    run = utils.resume(tmp_path / "run", time_budget_minutes=60, progress=False)
    assert run.finished
    assert math.isfinite(run.last("validation")["loss"])


SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_learns_the_same_and_is_left_as_it_was(tmp_path, text_file, quick):
    runs = []
    for name, compiled in (("plain", False), ("compiled", True)):
        loaded = utils.load_model("example:gpt", config={**SMALL, "dropout": 0.0})
        config = quick.with_changes(max_steps=6, val_every_steps=6, compile=compiled)
        runs.append(train(loaded, f"file:{text_file}", config, tmp_path / name, progress=False))
        assert loaded.module._compiled_call_impl is None
    losses = [[row["loss"] for row in run.metrics if row["split"] == "train"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_model_that_cannot_be_compiled_is_told(tiny_gpt):
    class BackendCompilerFailed(Exception):
        pass

    BackendCompilerFailed.__module__ = "torch._dynamo.exc"
    words = "torch.compile cannot handle GPT: no compiler.*Set compile to false"
    with pytest.raises(RunError, match=words), training_core.compiled(tiny_gpt.module):
        raise BackendCompilerFailed("no compiler\nat line 3")
    assert tiny_gpt.module._compiled_call_impl is None
