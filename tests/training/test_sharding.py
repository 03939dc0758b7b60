"""Models in parts: what is cut, what is saved, and that it learns the same."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

import utils
from tests.training.toy_in_parts import CONFIG, Toy, tensors
from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError, RunError
from utils.training import TrainingConfig, sharding
from utils.training.checkpoint_manager import CheckpointManager, take_snapshot
from utils.training.diagnosis import culprit
from utils.training.module_memory import ModuleMemory
from utils.training.parts import LightningPart
from utils.training.processes import agreed
from utils.training.recomputation import recomputed_blocks
from utils.training.resume import open_run, resume, train
from utils.training.sharding import Sharding, check_sharding, explained, is_part, is_sharded, local, units, whole
from utils.training.weight_average import WeightAverage

ROOT = Path(__file__).resolve().parents[2]
TINY = {"vocab_size": 301, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.0}


@pytest.fixture
def mesh():
    """A mesh of this process alone: everything of FSDP2 but the others."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_blocks_that_every_pass_calls_once_are_units():
    assert is_sharded(CONFIG)
    assert not is_sharded(CONFIG.with_changes(devices=1))
    everything = [f"blocks.{i}" for i in range(3)]
    assert units(ModelAdapter(Toy())) == everything
    assert units(ModelAdapter(Toy(twice=True))) == everything[1:]
    assert units(ModelAdapter(Toy(tie_blocks=True))) == everything[1:2]
    # A block that is left out at random would be waited for by the processes that did not leave it out.
    assert units(ModelAdapter(Toy(skipped=0.2))) == []
    assert units(ModelAdapter(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), spec=utils.ModelSpec(
        example_inputs={"input": torch.rand(2, 2, 2)}
    ))) == []  # fmt: skip


def test_a_model_comes_back_as_it_was(mesh):
    module = Toy()
    before, ids = copy.deepcopy(module), torch.randint(0, 11, (2, 5))
    expected = module(ids)
    memory = ModuleMemory(module).state_dict()
    attributes = {name: set(vars(child)) for name, child in module.named_modules()}
    adapter = ModelAdapter(module)
    cut = Sharding(adapter, CONFIG)
    cut.apply(mesh)
    assert all(is_part(parameter) for parameter in module.parameters())
    assert adapter.name == "Toy"
    assert torch.equal(module(ids), expected)
    module(ids).sum().backward()
    assert ModuleMemory(module).state_dict()["attributes"] == memory["attributes"]
    state = cut.weights()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())
    assert state["head.weight"] is state["embed.weight"]
    assert take_snapshot(1, state, {}).aliases == {"head.weight": "embed.weight"}
    assert cut.weights(keep=False)["embed.weight"].numel() == 0
    cut.undo()
    assert type(module) is Toy
    assert {name: set(vars(child)) for name, child in module.named_modules()} == attributes
    assert module.head.weight is module.embed.weight
    assert not module.shift.requires_grad
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    for child in module.modules():
        assert not any(value for name, value in vars(child).items() if name.endswith("_hooks"))
    assert torch.equal(module(ids), expected)
    assert not copy.deepcopy(module).state_dict().keys() ^ before.state_dict().keys()


def test_optimizer_and_average_in_parts_are_saved_whole(mesh):
    torch.manual_seed(0)
    plain = Toy()
    cut_model, ids = copy.deepcopy(plain), torch.randint(0, 11, (2, 5))
    cut = Sharding(ModelAdapter(cut_model), CONFIG)
    cut.apply(mesh)
    states = []
    for module in (plain, cut_model):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        optimizer, average = torch.optim.AdamW(named, lr=0.01), WeightAverage(module, 0.9)
        for _ in range(3):
            module(ids).square().mean().backward()
            norm = nn.utils.clip_grad_norm_([p for _, p in named], 0.1)
            optimizer.step()
            optimizer.zero_grad()
            average.update()
        parts = LightningPart("optimizer", optimizer), average
        states.append([whole(part.state_dict()) for part in parts])
        assert float(norm.full_tensor() if is_part(norm) else norm) > 0.1
    for first, second in zip(*states, strict=True):
        torch.testing.assert_close(tensors(first), tensors(second), rtol=1e-5, atol=1e-7)
    # Whole states fit a model in parts, and the other way round, bit by bit.
    for module, given in ((cut_model, states[0]), (plain, states[1])):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        parts = LightningPart("optimizer", torch.optim.AdamW(named)), WeightAverage(module, 0.9)
        for part, state in zip(parts, given, strict=True):
            part.load_state_dict(state)
            torch.testing.assert_close(tensors(whole(part.state_dict())), tensors(state), rtol=0, atol=0)
    with parts[1].applied():
        assert torch.equal(plain.gain, states[1][1]["average"]["gain"])
    assert local(cut_model.gain).shape == (1,)
    assert agreed(True)
    assert not agreed(False)


def test_bfloat16_and_recomputed_blocks_go_with_parts(mesh):
    torch.manual_seed(0)
    plain, ids = Toy(), torch.randint(0, 11, (2, 5))
    cut_model = copy.deepcopy(plain)
    Sharding(ModelAdapter(cut_model), CONFIG.with_changes(precision="bf16-mixed")).apply(mesh)
    for module in (plain, cut_model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(ids).float().square().mean().backward()
    # Weights and gradients, and with them the optimizer, stay in float32.
    assert {(p.dtype, p.grad.dtype) for p in cut_model.parameters() if p.requires_grad} == {(torch.float32,) * 2}
    torch.testing.assert_close(whole(cut_model.embed.weight.grad), plain.embed.weight.grad, rtol=0.1, atol=0.02)
    again = copy.deepcopy(plain)
    plain.zero_grad()
    with recomputed_blocks(again) as names:
        cut = Sharding(ModelAdapter(again), CONFIG)
        assert cut.units == names
        cut.apply(mesh)
        for module in (plain, again):
            module(ids).square().mean().backward()
    torch.testing.assert_close(whole(again.embed.weight.grad), plain.embed.weight.grad)


def test_a_bad_gradient_of_a_model_in_parts_has_a_name(mesh, text_file, tiny_gpt):
    adapter = ModelAdapter(tiny_gpt)
    cut = Sharding(adapter, CONFIG)
    cut.apply(mesh)
    ids = torch.randint(0, 300, (2, 16))
    adapter.logits({"input_ids": ids}).sum().backward()
    with torch.no_grad():
        local(adapter.module.norm.weight.grad)[0] = float("nan")
    data = SimpleNamespace(task="causal_lm", tokenizer=None, facts={})
    module = SimpleNamespace(
        model=adapter.module, adapter=adapter, data=data, config=CONFIG, batch_number=0, global_rank=0
    )
    said = culprit(module, {"input_ids": ids, "labels": ids})
    assert said == " (the forward pass is finite; first in the gradient of norm.weight)"
    cut.undo()


def test_settings_that_do_not_go_with_parts_are_refused(monkeypatch):
    check_sharding(CONFIG, Toy())
    check_sharding(CONFIG.with_changes(devices=1, compile=True), Toy())
    with pytest.raises(ConfigError, match="compile is true and strategy is 'fsdp'"):
        check_sharding(CONFIG.with_changes(compile=True), Toy())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match="precision is '16-mixed', and strategy is 'fsdp'.*bf16-mixed or 32-true"):
        check_sharding(CONFIG.with_changes(precision="16-mixed"), Toy())
    with pytest.raises(ConfigError, match="precision is 'auto', which is 16-mixed on this GPU, and strategy is 'fsdp'"):
        check_sharding(CONFIG, Toy())
    monkeypatch.undo()
    model = Toy()
    model.gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(RunError, match="parameter gain has no axis.*strategy is 'fsdp'"):
        check_sharding(CONFIG, model)
    model.gain = nn.Parameter(torch.rand(6, 6).T)
    with pytest.raises(RunError, match="parameter gain is not contiguous"):
        check_sharding(CONFIG, model)
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(RunError, match="has no torch.distributed.fsdp.fully_shard.*2.6"):
        check_sharding(CONFIG, Toy())


def test_a_run_is_refused_before_it_begins(tmp_path, text_file, quick, monkeypatch):
    model = utils.load_model("example:gpt", config=TINY)
    config = quick.with_changes(devices=2, strategy="fsdp", compile=True)
    with pytest.raises(ConfigError, match="compile is true"):
        train(model, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RunError, match="devices is 2, and torchrun started 4 processes.*devices to 4"):
        train(model, f"file:{text_file}", config, tmp_path / "run", progress=False)


def test_a_model_that_reads_a_blocks_weights_elsewhere_is_told(mesh):
    adapter = ModelAdapter(Toy(peek=True))
    cut = Sharding(adapter, CONFIG)
    cut.apply(mesh)
    ids = torch.randint(0, 11, (2, 5))
    with (
        pytest.raises(RunError, match="Toy cannot be trained in parts: .*DTensor.*strategy to 'ddp'"),
        explained(adapter),
    ):
        adapter.module(ids)
    with pytest.raises(RuntimeError, match="something else"), explained(adapter):
        raise RuntimeError("something else")


PAIR = """
import copy
import torch
from torch import distributed, nn
from tests.training.toy_in_parts import CONFIG, Toy, tensors
from utils.adapters import ModelAdapter
from utils.training.parts import LightningPart
from utils.training.sharding import Sharding, local, whole
from utils.training.weight_average import WeightAverage

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
plain = Toy()
model, ids = copy.deepcopy(plain), torch.randint(0, 11, (4, 5))
cut = Sharding(ModelAdapter(model), CONFIG)
assert len(cut.units) == 3
cut.apply(distributed.init_device_mesh("cpu", (2,)))
# Eleven rows are six and five, and the second device has nothing of a single number.
assert local(model.embed.weight).shape[0] == (6, 5)[rank] and local(model.gain).numel() == (1, 0)[rank]
states = []
for module, mine in ((plain, ids), (model, ids[2 * rank : 2 * rank + 2])):
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    optimizer, average = torch.optim.AdamW(named, lr=0.01), WeightAverage(module, 0.9)
    for _ in range(3):
        for part in mine.split(1):  # accumulated
            (module(part).square().mean() / len(mine)).backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 0.1)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    states.append((module, LightningPart("optimizer", optimizer), average))
saved = [whole(part.state_dict()) for part in states[1][1:]]
for first, second in zip([part.state_dict() for part in states[0][1:]], saved):
    torch.testing.assert_close(tensors(first), tensors(second), rtol=1e-4, atol=1e-6)
named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
for part, state in zip((LightningPart("optimizer", torch.optim.AdamW(named)), WeightAverage(model, 0.9)), saved):
    part.load_state_dict(state)
    torch.testing.assert_close(tensors(whole(part.state_dict())), tensors(state), rtol=0, atol=0)
model.seen += 5 + rank
model.mean += rank + 0.5
cut.share_buffers()
assert int(model.seen) == 5 and model.mean.tolist() == [0.5] * 5
assert whole(model.embed.weight.detach(), keep=rank == 0).numel() == (66, 0)[rank]
state = cut.weights()
cut.undo()
plain.seen += 5
torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
print("well")
"""


def torchrun(*arguments, folder=None):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_hold_what_one_does(tmp_path):
    script = tmp_path / "pair.py"
    script.write_text(PAIR)
    result = torchrun(script)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("well") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_in_parts_learns_the_same_and_goes_on_anywhere(tmp_path, text_file, quick):
    """Started by torchrun, as on several machines; continued on one device from a checkpoint of two."""
    config = quick.with_changes(max_steps=8, val_every_steps=4, log_every_steps=2, accumulate=2, ema_decay=0.9)
    data = f"file:{text_file}"
    one = train(
        utils.load_model("example:gpt", config=TINY), data, config.with_changes(batch_size=8), tmp_path / "one",
        progress=False,
    )  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    changes = {name: value for name, value in config.to_dict().items() if value != getattr(TrainingConfig(), name)}
    options = [str(part) for name, value in changes.items() for part in (f"--{name.replace('_', '-')}", value)]
    directory = tmp_path / "two"
    result = torchrun(
        "--module", "utils", "train", "example:gpt", "--data", data, "--run-dir", directory, "--model-config",
        tmp_path / "model.json", "--devices", "2", "--strategy", "fsdp", "--quiet", *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    two, state = open_run(directory)
    assert two.finished
    assert two.config.strategy == "fsdp"
    for first, second in zip(one.metrics, two.metrics, strict=True):
        assert (second["step"], second["split"]) == (first["step"], first["split"])
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        if first["split"] == "train":
            assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-3)
    for name, tensor in one.model.state_dict().items():
        assert torch.allclose(tensor, two.model.state_dict()[name], rtol=1e-3, atol=1e-4), name
    assert json.loads((directory / "summary.json").read_text())["model"] == "GPT"

    # The layout is that of one device.
    alone = CheckpointManager(tmp_path / "one" / "checkpoints").latest().load_into(one.model)
    assert {name: part.keys() for name, part in alone.items()} == {name: part.keys() for name, part in state.items()}
    assert alone["memory"]["attributes"] == state["memory"]["attributes"]
    shutil.rmtree(directory / "checkpoints" / "step-00000008")
    with pytest.warns(UserWarning, match="devices 2 became 1, weights in parts became whole.*agree within rounding"):
        continued = resume(directory, devices=1, progress=False)
    assert continued.finished
    assert continued.last("validation")["loss"] == pytest.approx(one.last("validation")["loss"], rel=1e-4)
    assert sharding.is_sharded(open_run(directory)[0].config), "the run stays one of two devices"
