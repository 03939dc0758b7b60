"""Whatever is pasted in: a clear verdict or a clear error, never a traceback from deep inside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import AdapterError
from utils.tier1_critical_validation import validate
from utils.validation.report import ValidationReport

VOCABULARY, WIDTH = 50, 16


class Language(nn.Module):
    """A sound little model; `answer` is what a test makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.lin, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.answer(self.head(self.norm(hidden + self.lin(hidden).relu())))

    def answer(self, logits: Tensor) -> Any:
        return logits


def raising(message: str, kind: type[Exception] = RuntimeError) -> nn.Module:
    """Return a model whose forward raises."""

    class Raising(Language):
        def answer(self, logits: Tensor) -> Any:
            raise kind(message)

    return Raising()


def answering(make: Any) -> nn.Module:
    """Return a model that makes something else of its logits."""

    class Answering(Language):
        def answer(self, logits: Tensor) -> Any:
            return make(logits)

    return Answering()


def checked(model: Any, spec: ModelSpec | None = None) -> ValidationReport:
    torch.manual_seed(0)
    return validate(model, spec=spec, progress=False)


def faults(report: ValidationReport) -> set[str]:
    return {finding.code for result in report.results for finding in result.findings if finding.severity == "fail"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error: 0 active drivers ([]). There should only be one."),
        NotImplementedError("Could not run 'flash_attn::fwd' with arguments from the 'CPU' backend."),
        AssertionError("Torch not compiled with CUDA enabled"),
        RuntimeError("Found no NVIDIA driver on your system."),
        ImportError("causal_conv1d is not installed"),
        ValueError("FlashAttention only supports CUDA tensors"),
    ],
)
def test_kernels_that_need_a_gpu(error: Exception) -> None:
    model = raising(str(error), type(error))
    adapter = ModelAdapter(model)
    assert adapter.failure is not None
    assert adapter.failure.startswith(f"Raising needs a GPU and ran on cpu: {type(error).__name__}: ")
    assert "Run it on a machine with one" in adapter.failure
    assert adapter.modality == "tokens"


def test_a_gpu_kernel_is_not_ready() -> None:
    report = checked(raising("Triton Error: 0 active drivers ([])."))
    assert (report.verdict, faults(report)) == ("NOT READY", {"shape_crash"})
    assert "needs a GPU" in report.text()


def test_a_gpu_written_into_the_code() -> None:
    class Moving(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.to("cuda"))

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = Language()
    model.lin = Moving(WIDTH, WIDTH)
    report = checked(model)
    found = [finding for result in report.results for finding in result.findings]
    assert [(finding.code, finding.where) for finding in found] == [("hardcoded_device", "lin")]
    assert "device" in found[0].hint


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda logits: None, "returned None and no tensor"),
        (lambda logits: "hello", "returned a str and no tensor"),
        (lambda logits: (part for part in [logits]), "returned a generator and no tensor"),
    ],
)
def test_nothing_that_could_be_logits(made: Any, words: str) -> None:
    failure = ModelAdapter(answering(made)).failure
    assert failure is not None
    assert words in failure
    assert failure.endswith("Expected logits, scores or features. Return them from forward().")


def test_returning_nothing_is_not_ready() -> None:
    report = checked(answering(lambda logits: None))
    assert report.verdict == "NOT READY"
    assert "returned None and no tensor for token ids (2, 12)" in report.text()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda logits: logits.argmax(-1), r"returned no real-valued tensor \(torch\.int64\)"),
        (lambda logits: logits.mean(), r"returned a single number and nothing per sample"),
        (list, r"returned 2 tensors of shape \(12, 50\) for 2 samples\..*torch\.stack"),
    ],
)
def test_answers_that_are_refused(made: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        checked(answering(made))


def test_nan() -> None:
    report = checked(answering(lambda logits: logits * float("nan")))
    assert report.verdict == "NOT READY"
    assert "nan_output" in faults(report)


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(), nn.Sequential(nn.ReLU(), nn.Flatten())])
def test_without_parameters(model: nn.Module) -> None:
    report = checked(model)
    assert (report.parameters, report.failures) == (0, ())
    assert any("no parameters" in result.why for result in report.results if result.status == "skip")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(how: str) -> None:
    model = nn.Linear(3, 3)
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.zeros(1, 3))
    with pytest.raises(AdapterError, match=r"A TorchScript module .* was given.*before torch\.jit"):
        checked(scripted)


def test_exported() -> None:
    program = torch.export.export(Language(), (torch.zeros(2, 4).long(),))
    with pytest.raises(AdapterError, match=r"An exported program .* was given.*before torch\.export"):
        checked(program.module())


def test_symbolically_traced_is_an_ordinary_module() -> None:
    report = checked(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))))
    assert report.failures == ()


def test_compiled_either_way_runs_as_written() -> None:
    plain, in_place = Language(), Language()
    assert ModelAdapter(torch.compile(plain)).module is plain
    in_place.compile()
    compiled = in_place._compiled_call_impl
    report = checked(in_place)
    assert report.passed
    assert in_place._compiled_call_impl is compiled


@pytest.mark.filterwarnings("ignore")
def test_quantised() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(Language(), {nn.Linear}, torch.qint8)
    with pytest.raises(AdapterError, match=r"The layer lin is quantised \(Linear\)\..*from before quantisation"):
        checked(quantised)


def test_no_values() -> None:
    with pytest.raises(AdapterError, match=r"tok\.weight is on the meta device and has no values\..*to_empty"):
        checked(Language().to("meta"))
    with torch.inference_mode():
        model = Language()
    with pytest.raises(AdapterError, match=r"tok\.weight was made in torch\.inference_mode\(\).*outside"):
        checked(model)


class Wrapped(nn.Module):
    """As a parallel wrapper of one's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_wrappers() -> None:
    model = Language()
    adapter = ModelAdapter(nn.DataParallel(model))
    assert adapter.module is model
    report = checked(Wrapped(model))
    assert (report.passed, report.task) == (True, "causal_lm")


class LowRank(nn.Module):
    """A frozen layer with a trainable correction, as LoRA makes it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_low_rank_adapters() -> None:
    model = Language().requires_grad_(False)
    model.lin = LowRank(model.lin)
    report = checked(model)
    assert report.passed
    assert not model.head.weight.requires_grad


def test_memory_shared_with_another_model() -> None:
    first, second = Language(), Language()
    second.tok, second.head.weight = first.tok, nn.Parameter(first.head.weight.data)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    report = checked(second)
    assert report.passed
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert all(parameter.grad is None for parameter in first.parameters())


def test_containers_have_no_forward() -> None:
    for container in (nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ModuleList([nn.Linear(2, 2)])):
        with pytest.raises(AdapterError, match=r"Module\w+ has no forward\(\)\..*pass the model that holds"):
            checked(container)


def test_arguments_nobody_can_guess() -> None:
    class Graph(Language):
        def forward(self, input_ids: Tensor, camera: Tensor, rays: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids) * camera

    with pytest.raises(AdapterError, match=r"requires camera, rays beside input_ids\..*example_inputs=\{'input_ids'"):
        checked(Graph())
    examples = {"input_ids": torch.ones(2, 6).long(), "camera": torch.tensor(1.0), "rays": None}
    report = checked(Graph(), ModelSpec(example_inputs=examples))
    assert report.task == "causal_lm"
    assert "shape_crash" not in faults(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    report = checked(Language().to(dtype))
    assert faults(report) == set()


def test_like_lightning() -> None:
    class Module(Language):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            raise AssertionError("never called")

        def configure_optimizers(self) -> None:
            raise AssertionError("never called")

    assert checked(Module()).passed
