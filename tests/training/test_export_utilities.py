import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from utils import load_model
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError, ExportError
from utils.runtime.files import sha256_file
from utils.tokenization import TextTokenizer, choose_tokenizer
from utils.training import export_formats, export_utilities
from utils.training.export_report import ShapeCheck
from utils.training.export_utilities import export
from utils.training.weights import read_weights

GPT = {"vocab_size": 40, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Scores(nn.Module):
    """A small token model whose subclasses misbehave."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.output = nn.Linear(8, 50)

    def forward(self, input_ids):
        return self.output(self.embedding(input_ids))


class Tied(Scores):
    def __init__(self):
        super().__init__()
        self.output.weight = self.embedding.weight


class ValueBranch(Scores):
    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        return self.output(hidden * 2 if hidden.sum() > 0 else hidden)


class PythonLoop(Scores):
    """Unrolled by every exporter, so that the export takes one length only."""

    def forward(self, input_ids):
        hidden, state = self.embedding(input_ids), 0
        states = [state := torch.tanh(state + hidden[:, position]) for position in range(hidden.shape[1])]
        return self.output(torch.stack(states, 1))


class OneLength(Scores):
    """Takes 16 tokens and nothing else, as the original too."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, input_ids):
        return self.output(self.mix(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2))


class ForgottenState(Scores):
    """Keeps something that its output depends on outside the state that is saved."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, input_ids):
        return super().forward(input_ids) + self.shift


class DefaultAttentionFails(Scores):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa", vocab_size=50)

    def set_attn_implementation(self, name):
        self.config._attn_implementation = name

    def forward(self, input_ids):
        logits = super().forward(input_ids)
        if self.config._attn_implementation == "sdpa" and logits.sum() > 1e9:
            return logits * 2
        return logits


def fingerprint(module):
    return {name: (value.clone(), value._version) for name, value in module.state_dict(keep_vars=True).items()}


def test_gpt_in_all_formats_with_dynamic_batch_and_length(tmp_path):
    loaded = load_model("example:gpt", config=GPT)
    loaded.module.train()
    before, stream = fingerprint(loaded.module), torch.get_rng_state()
    report = export(loaded, tmp_path / "deep" / "export", progress=False)
    assert report.passed, report.text()
    assert [result.format for result in report.results] == ["safetensors", "onnx", "torch_export"]
    for result in report.results:
        shapes = [check.shape for check in result.checks]
        assert len(set(shapes)) >= 4
        assert {shape[0] for shape in shapes} == {1, 2, 3}
        assert max(shape[1] for shape in shapes) == 32
        assert any(shape[1] % 2 for shape in shapes)
        assert result.max_difference <= 1e-5
        for file in result.files:
            path = tmp_path / "deep" / "export" / file.name
            assert (path.stat().st_size, sha256_file(path)) == (file.bytes, file.sha256)
    assert {file.name for file in report["safetensors"].files} >= {"model.safetensors", "config.json", "model.py"}

    assert loaded.module.training
    assert torch.equal(torch.get_rng_state(), stream)
    for name, value in loaded.module.state_dict(keep_vars=True).items():
        assert torch.equal(value, before[name][0])
        assert value._version == before[name][1]
        assert value.grad is None
    assert not list((tmp_path / "deep" / "export").glob(".*")), "nothing temporary is left"


def test_exported_files_run_without_seedbed(tmp_path):
    import onnxruntime

    model = Scores()
    assert export(model, tmp_path, progress=False).passed
    ids = torch.randint(50, (4, 11), generator=torch.Generator().manual_seed(1))
    expected = model(ids)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert session.get_inputs()[0].shape == ["batch", "sequence"]
    assert session.get_outputs()[0].name == "logits"
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0]), expected)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(ids), expected)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["output.bias"], model.output.bias)


def test_source_in_the_export_loads_again(tmp_path):
    loaded = load_model("example:gpt", config=GPT)
    export(loaded, tmp_path, ["safetensors"], progress=False)
    again = load_model(str(tmp_path))
    assert type(again.module).__name__ == type(loaded.module).__name__
    again.module.load_state_dict(read_weights(tmp_path / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_other_examples_in_all_formats(name, tmp_path):
    report = export(load_model(f"example:{name}"), tmp_path, progress=False)
    assert report.passed, report.text()
    assert len(report["onnx"].checks) == 4


def test_image_model_has_a_dynamic_batch(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    report = export(model, tmp_path, ["torch_export"], progress=False)
    assert report.passed, report.text()
    assert {check.shape[0] for check in report["torch_export"].checks} == {1, 2, 3, 5}


def test_tied_weights_are_stored_once_and_load_under_both_names(tmp_path):
    model = Tied()
    report = export(model, tmp_path, ["safetensors"], progress=False)
    assert report.passed
    assert report["safetensors"].max_difference == 0
    assert set(load_file(tmp_path / "model.safetensors")) == {"embedding.weight", "output.bias"}
    assert torch.equal(read_weights(tmp_path / "model.safetensors")["output.weight"], model.output.weight)


def test_run_is_exported_with_the_trained_weights_and_the_models_source(tmp_path):
    loaded = load_model("example:gpt", config=GPT)
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.add_(0.01)
    tokenizer = choose_tokenizer(["some text"], 300)
    run = SimpleNamespace(adapter=ModelAdapter(loaded), loaded=loaded, data=SimpleNamespace(tokenizer=tokenizer))
    report = export(run, tmp_path / "out", "safetensors", progress=False)
    assert report.passed
    assert (tmp_path / "out" / "model.py").exists()
    assert TextTokenizer.load(tmp_path / "out" / "tokenizer.json").to_json() == tokenizer.to_json()
    for name, value in read_weights(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, loaded.module.state_dict()[name])


def test_control_flow_on_values_fails_with_the_reason_and_the_rest_goes_ahead(tmp_path):
    report = export(ValueBranch(), tmp_path, progress=False)
    assert not report.passed
    assert [result.status for result in report.results] == ["ok", "failed", "failed"]
    for result in report.failures:
        assert "chooses its path by the values in a tensor" in result.why
        assert "torch.where, torch.cond" in result.why
        assert "\n" not in result.why
        assert "Traceback" not in result.why
        assert result.files == ()
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "export.json"}


def test_export_fixed_to_one_shape_is_reported_as_such(tmp_path):
    report = export(PythonLoop(), tmp_path, ["torch_export"], progress=False)
    result = report["torch_export"]
    assert (report.passed, result.status) == (False, "fixed_shape")
    assert result.checks[0].difference < 1e-5
    assert all(check.difference is None for check in result.checks[1:])
    assert "right at (2, 24) and refuses (1, 7), which the original takes" in result.why
    assert "specialized it to be a constant (24)" in result.why
    assert (tmp_path / "model.pt2").exists()


@pytest.mark.slow
def test_onnx_export_fixed_to_one_shape_is_reported_as_such(tmp_path):
    report = export(PythonLoop(), tmp_path, ["onnx"], progress=False)
    assert report["onnx"].status == "fixed_shape", report.text()


def test_model_that_takes_one_length_only_is_not_blamed_on_the_export(tmp_path):
    report = export(OneLength(), tmp_path, ["torch_export"], progress=False)
    result = report["torch_export"]
    assert result.status == "ok", report.text()
    assert {check.shape for check in result.checks} == {(2, 16), (1, 16), (3, 16)}
    assert "original itself takes only sequences of 16 tokens" in result.why


def test_weights_that_do_not_carry_everything_fail(tmp_path):
    model = ForgottenState(3.0)
    report = export(model, tmp_path, ["safetensors"], spec=ModelSpec(factory=ForgottenState), progress=False)
    assert report["safetensors"].status == "failed"
    assert "differs from the original by 3.0e+00" in report["safetensors"].why
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "file"), [("safetensors", "model.safetensors"), ("torch_export", "model.pt2")])
def test_altered_files_are_found_and_not_published(name, file, tmp_path, monkeypatch):
    export(Scores(), tmp_path, [name], progress=False)
    before = (tmp_path / file).read_bytes()
    write = export_formats.FORMATS[name]

    def altered(candidate, directory):
        bias = candidate.adapter.module.output.bias
        original = bias.detach().clone()
        with torch.no_grad():
            bias += 0.5
            try:
                return write(candidate, directory)
            finally:
                bias.copy_(original)

    monkeypatch.setitem(export_formats.FORMATS, name, altered)
    report = export(Scores(), tmp_path, [name], progress=False)
    assert report[name].status == "failed"
    assert "The exported model differs from the original by" in report[name].why
    assert report[name].max_difference == pytest.approx(0.5, abs=1e-3)
    assert (tmp_path / file).read_bytes() == before, "the earlier export is still there"


def test_eager_attention_is_tried_and_reported(tmp_path):
    model = DefaultAttentionFails()
    report = export(model, tmp_path, ["torch_export"], progress=False)
    assert report.passed, report.text()
    assert "Exported with eager attention, because the default attention failed" in report["torch_export"].why
    assert model.config._attn_implementation == "sdpa"


def test_missing_onnx_runtime_gives_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export(Scores(), tmp_path, ["onnx", "safetensors"], progress=False)
    assert [result.status for result in report.results] == ["failed", "ok"]
    assert "pip install onnxruntime" in report["onnx"].why


def test_files_that_no_export_wrote_are_never_replaced(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    report = export(Scores(), tmp_path, ["safetensors"], progress=False)
    assert report["safetensors"].status == "failed"
    assert "holds config.json already, and no export wrote that" in report["safetensors"].why
    assert (tmp_path / "config.json").read_text() == "mine"
    (tmp_path / "config.json").unlink()
    assert export(Scores(), tmp_path, ["safetensors"], progress=False).passed
    assert export(Scores(), tmp_path, ["safetensors"], progress=False).passed, "its own files it may replace"


def test_full_disk_fails_the_format_and_keeps_the_earlier_export(tmp_path, monkeypatch):
    export(Scores(), tmp_path, ["safetensors"], progress=False)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(module, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_formats, "save_weights", full)
    report = export(Scores(), tmp_path, ["safetensors"], progress=False)
    assert "cannot be written (No space left on device)" in report["safetensors"].why
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_report_says_it_all_and_is_saved(tmp_path):
    report = export(Scores(), tmp_path / "a<b", ["safetensors", "torch_export"], progress=False)
    text = report.text()
    assert text.startswith("EXPORTED  Scores, causal_lm, 850 parameters: 2 of 2 formats")
    assert "at 2x24 0.0e+00, 1x7 0.0e+00" in text
    assert "of the largest float32 logit" in text
    saved = json.loads((tmp_path / "a<b" / "export.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["results"][1]["files"][0]["name"] == "model.pt2"
    assert saved["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    page = report._repr_html_()
    assert "EXPORTED" in page
    assert "2x24: 0.0e+00" in page


def test_unusable_arguments_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"format 'tensorrt' is unknown. Expected some of safetensors, onnx, torch_export"
    ):
        export(Scores(), tmp_path, ["tensorrt"])
    with pytest.raises(ConfigError, match="No export format"):
        export(Scores(), tmp_path, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"export directory .*file cannot be written"):
        export(Scores(), tmp_path / "file", progress=False)


def test_model_that_cannot_run_is_refused(tmp_path):
    class Broken(Scores):
        def forward(self, input_ids):
            return self.output(self.embedding(input_ids)[..., :3])

    with pytest.raises(ExportError, match=r"Broken cannot be exported. No forward pass of Broken succeeded"):
        export(Broken(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_comparison_of_outputs():
    def compare(actual, expected):
        return export_utilities._compare(lambda inputs: actual, {}, expected, (1, 3)).difference

    nan, inf = torch.nan, torch.inf
    assert compare(torch.tensor([1.0, nan, -inf]), torch.tensor([1.5, nan, -inf])) == 0.5
    assert compare(torch.tensor([1.0, nan, 0.0]), torch.tensor([1.0, 0.0, 0.0])) == inf
    assert compare(torch.tensor([1.0, inf, 0.0]), torch.tensor([1.0, -inf, 0.0])) == inf
    assert compare(torch.zeros(2), torch.zeros(3)) == inf


def test_tolerance_follows_the_size_and_type_of_the_output():
    assert export_utilities._tolerance([torch.tensor([1.0, -20.0, torch.inf])]) == (
        pytest.approx(2e-3),
        "0.0001 of the largest float32 logit, 20",
    )
    assert export_utilities._tolerance([torch.tensor([2.0], dtype=torch.bfloat16)])[0] == pytest.approx(0.06)
    assert export_utilities._tolerance([torch.zeros(3)])[0] > 0


def test_half_precision_is_exported_with_its_own_tolerance(tmp_path):
    report = export(Scores().bfloat16(), tmp_path, ["safetensors", "torch_export"], progress=False)
    assert report.passed, report.text()
    assert "bfloat16" in report.tolerance_reason


def test_non_tensor_inputs_of_the_spec_become_constants(tmp_path):
    class Scaled(Scores):
        def forward(self, input_ids, scale):
            return super().forward(input_ids) * scale

    spec = ModelSpec(example_inputs={"input_ids": torch.randint(50, (2, 8)), "scale": 3})
    report = export(Scaled(), tmp_path, ["torch_export"], spec=spec, progress=False)
    assert report.passed, report.text()


def test_int8_is_measured_and_called_approximate(tmp_path):
    torch.manual_seed(0)
    loaded = load_model("example:gpt", config=GPT)
    report = export(loaded, tmp_path, ["safetensors", "onnx_int8"], progress=False)
    exact, int8 = report["safetensors"], report["onnx_int8"]
    assert (exact.status, int8.status) == ("ok", "approximate"), report.text()
    assert report.passed
    assert exact.max_difference < 1e-5 < int8.max_difference < 1
    assert exact.same_choice == 1
    assert 0.5 < int8.same_choice <= 1
    assert "Fewer bits, other numbers: the logits differ by up to" in int8.why
    assert [file.name for file in int8.files] == ["model.int8.onnx"]
    assert len(int8.checks) == 4
    saved = json.loads((tmp_path / "export.json").read_text())["results"][1]
    assert saved["checks"][0]["same_choice"] == int8.checks[0].same_choice


def test_numbers_that_are_not_finite_fail_inexact_formats_too():
    broken = (ShapeCheck((1, 3), torch.inf, "only one of the two is NaN or infinite"),)
    assert export_utilities._judge(broken, 1e-3, exact=False)[0] == "failed"


def test_torchscript_where_it_works_and_where_it_bakes_a_shape_in(tmp_path):
    good = export(Scores(), tmp_path / "good", ["torchscript"], progress=False)["torchscript"]
    assert good.status == "ok"
    assert good.max_difference == 0
    assert "TorchScript is deprecated by PyTorch" in good.why
    ids, model = torch.randint(50, (4, 11)), Scores()
    export(model, tmp_path / "good", ["torchscript"], progress=False)
    assert torch.equal(torch.jit.load(tmp_path / "good" / "model.ts.pt")(ids), model(ids))
    baked = export(PythonLoop(), tmp_path / "baked", ["torchscript"], progress=False)["torchscript"]
    assert baked.status == "failed"
    assert "the output is (3, 24, 50) and the original's (3, 72, 50)" in baked.why
    assert not (tmp_path / "baked" / "model.ts.pt").exists(), "a file that answers wrongly without a word is not kept"


@pytest.mark.slow
def test_int8_of_a_model_with_convolution_and_head(tmp_path):
    result = export(load_model("example:vit"), tmp_path, ["onnx_int8"], progress=False)["onnx_int8"]
    assert result.status == "approximate", result.why
    assert 0 < result.max_difference < 0.1
