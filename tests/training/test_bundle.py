import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import utils
from tests.training.conftest import TINY_GPT
from utils.runtime.errors import ConfigError, ExportError
from utils.runtime.files import sha256_file
from utils.tokenization import choose_tokenizer
from utils.training import TrainingConfig, inference_script
from utils.training import bundle as bundle_module
from utils.training.bundle import bundle, read_manifest
from utils.training.resume import open_run, train
from utils.training.weights import read_weights

ALONE = """
import json, runpy, sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = ["inference.py", *{arguments!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory):
    torch.set_num_threads(1)
    loaded = utils.load_model("example:gpt", config={**TINY_GPT, "vocab_size": 400})
    config = TrainingConfig(
        max_steps=30, batch_size=4, log_every_steps=5, val_every_steps=10, checkpoint_every_steps=10,
        learning_rate=3e-3, ema_decay=0.9,
    )  # fmt: skip
    return train(loaded, f"file:{text_file}", config, tmp_path_factory.mktemp("run") / "run", progress=False)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return bundle(run, tmp_path_factory.mktemp("bundle") / "out", progress=False)


def alone(made, empty, *arguments, absent=("torch", "tokenizers", "utils", "transformers")):
    """Run a copy of the bundle's files in an empty directory, where some packages cannot be imported."""
    for file in made.files:
        (empty / file.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.directory / file.name, empty / file.name)
    code = ALONE.format(absent=absent, arguments=arguments, script=str(empty / "inference.py"))
    return subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, timeout=300)


def test_the_bundle_of_a_run_is_complete(run, made):
    assert made.passed, made.text()
    assert made.runtime == "onnxruntime"
    assert made.report.weights == "the moving average (decay 0.9) of the weights at step 30"
    names = {file.name for file in made.files}
    assert names >= {
        "README.md", "inference.py", "inference.json", "check.json", "model.onnx", "model.safetensors", "model.py",
        "config.json", "tokenizer.json", "export.json",
    }  # fmt: skip
    for file in made.files:
        path = made.directory / file.name
        assert (path.stat().st_size, sha256_file(path)) == (file.bytes, file.sha256)
    assert read_manifest(made.directory) == json.loads(json.dumps(made.to_dict()))
    assert "inference.py runs with onnxruntime alone" in str(made)
    assert "Bundle of" in made._repr_html_()


def test_the_card_holds_the_numbers_of_the_run(run, made):
    card = (made.directory / "README.md").read_text(encoding="utf-8")
    last = run.last("validation")
    for part in (
        "pipeline_tag: text-generation", f"{run.adapter.num_parameters:,}", f"{last['loss']:.4f}",
        f"{last['bits_per_byte']:.4f}", f"{run.last('train')['loss']:.4f}", "30 of 30 planned steps",
        made.report.weights, "file:topics.txt", f"{run.data.facts['zlib_bits_per_byte']:.4f}", "None was chosen",
        f"perplexity {made.report.held_out['perplexity']:.4f}", "sees at most 32 tokens", '"ema_decay": 0.9',
        run.data.facts["sha256"],
    ):  # fmt: skip
        assert part in card, part
    assert "license:" not in card
    assert str(run.directory.parent) not in card
    assert run.data.reference not in card, "the folders of this machine are nobody's business"
    onnx, original = made.report["onnx"].held_out, made.report.held_out
    assert onnx["perplexity"] == pytest.approx(original["perplexity"], rel=1e-4)
    assert onnx["samples"] == original["samples"] > 0


def test_the_script_runs_with_onnxruntime_alone_and_agrees(run, made, tmp_path):
    done = alone(made, tmp_path, "--check")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["difference"] < 1e-4
    ids = torch.randint(400, (2, 7), generator=torch.Generator().manual_seed(5))
    (tmp_path / "inputs.json").write_text(json.dumps({run.adapter.main_input: ids.tolist()}))
    done = alone(made, tmp_path, "--inputs", "inputs.json")
    averaged = run.checkpoints.latest().load_into(open_run(run.directory)[0].model)["average"]["average"]
    module = utils.load_model("example:gpt", config={**TINY_GPT, "vocab_size": 400}).module.eval()
    module.load_state_dict(averaged, strict=False)
    expected = module(ids)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-4, rtol=1e-4)


def test_the_script_continues_a_text(made, tmp_path):
    done = alone(made, tmp_path, "The value", "--tokens", "20", "--seed", "1")
    again = alone(made, tmp_path, "The value", "--tokens", "20", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == again.stdout
    assert done.stdout.startswith("The value")
    assert len(done.stdout) > len("The value\n")


def test_a_file_that_was_altered_does_not_pass_its_check(made, tmp_path):
    alone(made, tmp_path)
    check = json.loads((tmp_path / "check.json").read_text())
    check["logits"][0] += 0.5
    (tmp_path / "check.json").write_text(json.dumps(check))
    answer = bundle_module.run_check(tmp_path)
    assert answer["good"] is False
    assert answer["difference"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("size", [300, 60], ids=["bytes", "characters"])
def test_the_scripts_tokenizer_is_the_packages(size, text_file, tmp_path):
    texts = [text_file.read_text(encoding="utf-8")]
    tokenizer = choose_tokenizer(texts, size)
    tokenizer.save(tmp_path / "tokenizer.json")
    own = inference_script.Tokenizer(tmp_path / "tokenizer.json")
    assert own.library is None
    chance = random.Random(0)
    samples = [
        texts[0][:3000],
        "we'll  've \t\n  x\u00a0y \u2003 'S",
        "\u0661\u0662 \u4e2d\u6587 e\u0301 \U0001f600\u200d",
    ]
    letters = [chr(n) for n in (*range(9, 14), *range(28, 127), 0x85, 0xA0, 0xB2, 0x2028, 0x3000, 0x1F600)]
    samples += ["".join(chance.choices(letters, k=40)) for _ in range(200)]
    for text in samples:
        ids = [int(n) for n in tokenizer.encode([text])[0]]
        assert own.encode(text) == ids, text
        assert own.decode(ids) == tokenizer.decode(ids, skip_special=True)


def test_other_weights_of_a_run(run, tmp_path):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    last = utils.export(run, tmp_path / "last", ["safetensors"], weights="last", progress=False)
    best = utils.export(run, tmp_path / "best", ["safetensors"], weights="best", progress=False)
    average = utils.export(run, tmp_path / "average", ["safetensors"], progress=False)
    assert last.weights == "the weights after step 30"
    assert "the checkpoint with the lowest held-out loss" in best.weights
    stored = read_weights(tmp_path / "last" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in before.items())
    state = run.checkpoints.latest().load_into(open_run(run.directory)[0].model)
    stored = read_weights(tmp_path / "average" / "model.safetensors")
    assert all(torch.equal(stored[name], state["average"]["average"][name]) for name, _ in run.model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert average.held_out["loss"] != last.held_out["loss"]
    assert "Weights: the moving average" in average.text()


def test_weights_that_are_not_there_are_refused(run, tmp_path, tiny_gpt, quick, text_file, monkeypatch):
    with pytest.raises(ConfigError, match=r"weights is 'newest'\. Expected one of last, best, average, or None"):
        utils.export(run, tmp_path, weights="newest")
    with pytest.raises(ConfigError, match=r"weights is 'best', and the model is not a training run"):
        utils.export(tiny_gpt, tmp_path, weights="best")
    plain = train(tiny_gpt, f"file:{text_file}", quick.with_changes(max_steps=3), tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match=r"the run kept no average of its weights"):
        utils.export(plain, tmp_path / "out", weights="average")
    monkeypatch.setattr(run, "step", 99)
    with pytest.raises(ExportError, match=r"newest checkpoint is of step 30, and the run stands at step 99"):
        utils.export(run, tmp_path / "out")
    monkeypatch.setattr(type(run.checkpoints), "best", lambda self: None)
    with pytest.raises(ExportError, match=r"No checkpoint of the run has a measured held-out loss"):
        utils.export(run, tmp_path / "out", weights="best")


def test_foreign_files_are_never_replaced(tmp_path, tiny_gpt):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ExportError, match=r"holds README.md already, and no bundle wrote that"):
        bundle(tiny_gpt, tmp_path, progress=False)
    assert (tmp_path / "README.md").read_text() == "mine"


class PythonLoop(nn.Module):
    """Unrolled by every exporter, so that a file takes one length only."""

    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids):
        hidden, state = self.embedding(input_ids), 0
        states = [state := torch.tanh(state + hidden[:, position]) for position in range(hidden.shape[1])]
        return self.output(torch.stack(states, 1))


@pytest.mark.slow
def test_a_file_of_one_shape_is_said_to_be_so_and_still_continues(tmp_path):
    torch.manual_seed(0)
    model = PythonLoop()
    made = bundle(model, tmp_path / "out", spec=utils.ModelSpec(task="causal_lm"), progress=False)
    assert made.passed, made.text()
    assert "runs at the input shape (2, 24) only" in made.why
    script = inference_script.Model(made.directory)
    ids = [3, 4, 5]
    for _ in range(30):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-24:]]))[0, -1].argmax()))
    assert script.generate([3, 4, 5], 30, temperature=0) == ids[3:]


class ValueBranch(PythonLoop):
    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        return self.output(hidden * 2 if hidden.sum() > 0 else hidden)


def test_without_a_format_that_runs_alone_there_is_no_script(tmp_path):
    made = bundle(ValueBranch(), tmp_path / "out", progress=False)
    assert not made.passed
    assert "No format runs without the model's code" in made.why
    assert {"torch_export", "onnx"} <= {result.format for result in made.report.results}
    assert not (tmp_path / "out" / "inference.py").exists()
    assert "There is no `inference.py`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_torch_is_the_runtime_where_onnx_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    spec = utils.ModelSpec(example_inputs={"input": torch.randn(2, 3, 2, 2)}, task="image_classification")
    made = bundle(model, tmp_path / "out", spec=spec, licence="mit", progress=False)
    assert made.passed, made.text()
    assert made.runtime == "torch"
    assert 'license: "mit"' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = alone(made, empty, "--check", absent=("onnxruntime", "utils", "tokenizers"))
    assert done.returncode == 0, done.stderr


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"is no bundle: bundle.json cannot be read \(FileNotFoundError\)"):
        read_manifest(tmp_path)
    (tmp_path / "bundle.json").write_text('{"version": 9, "files": []}')
    with pytest.raises(ExportError, match=r"has layout version 9\. This version of Seedbed reads 1"):
        read_manifest(tmp_path)


def test_a_script_that_says_nothing_or_hangs_has_not_passed(tmp_path, monkeypatch):
    (tmp_path / "inference.py").write_text("raise SystemExit('broken')")
    answer = bundle_module.run_check(tmp_path)
    assert answer == {"good": False, "why": "exit status 1, broken"}
    (tmp_path / "inference.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(bundle_module, "PATIENCE", 1)
    assert bundle_module.run_check(tmp_path) == {"good": False, "why": "no answer in 1 s"}


def test_a_checkpoint_without_the_average_is_refused(run, tmp_path, monkeypatch):
    from utils.training.checkpoint_manager import Checkpoint

    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    monkeypatch.setattr(Checkpoint, "load_into", lambda self, module: {})
    with pytest.raises(ExportError, match=r"step-00000030 holds no average of the weights"):
        utils.export(run, tmp_path / "out", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_full_disk_is_told(run, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "write_atomic", full)
    with pytest.raises(ExportError, match=r"The bundle .* cannot be written \(No space left on device\)"):
        bundle(run, tmp_path / "out", ["safetensors", "torch_export"], progress=False)


def test_the_script_says_what_is_missing(made, tmp_path):
    alone(made, tmp_path)
    model = inference_script.Model(tmp_path)
    with pytest.raises(SystemExit, match=r"The input '\w+' is missing; expected"):
        model.logits({})
    model.tokenizer = None
    with pytest.raises(SystemExit, match=r"There is no tokenizer.json beside this script"):
        model.generate("text")
    model.settings["end_id"] = None
    with pytest.raises(SystemExit, match=r"The prompt is empty"):
        model.generate([])
    model.settings["task"] = "masked_lm"
    with pytest.raises(SystemExit, match=r"This model is for masked_lm; it continues no text"):
        model.generate([1])
