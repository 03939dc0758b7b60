import errno
import math
import shutil
import warnings

import pytest
import torch

import utils
from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError, RunError
from utils.training import TrainingConfig, checkpoint_manager, training_core
from utils.training.dataset_utilities import load_data
from utils.training.evaluation import evaluate
from utils.training.metrics import read_metrics
from utils.training.resume import train
from utils.training.schedules import learning_rate_share
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
        match="norm is nan in batch 0, which ends step 1 .first in what GPT puts out.*last good state is kept",
    ):
        train(loaded, f"file:{text_file}", quick, tmp_path / "run", progress=False)
    assert (tmp_path / "run/checkpoints/step-00000000").is_dir()


def test_a_gradient_that_is_not_finite_is_kept_out_of_the_checkpoints(tmp_path, text_file, tiny_gpt, quick):
    config = quick.with_changes(log_every_steps=1, checkpoint_every_steps=1)
    tiny_gpt.module.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(
        RunError,
        match="norm is nan in batch 0.*forward pass is finite; first in the gradient of norm.bias.*last good state",
    ):
        train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000000"]


def test_lightning_says_nothing(tmp_path, text_file, tiny_gpt, quick, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=2), tmp_path / "run", progress=False)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainingConfig(warmup_share=0.1, final_learning_rate_share=0.2)
    shares = [learning_rate_share(step, 100, config) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1.0
    assert shares[55] == pytest.approx(0.6)
    assert shares[100] == pytest.approx(0.2)
    assert learning_rate_share(0, 5, TrainingConfig(warmup_share=0.0)) == 1.0


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
