"""One writer for each export format: each writes its files and returns a function that runs what was written.

Unusual: nothing is believed. Every runner starts from the files on disk, so that what is compared with the original is
what a user will load.
"""

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.loading import load_model
from utils.runtime.errors import ExportError, InstantiationError, SeedbedError
from utils.runtime.files import tag_nonfinite, write_json
from utils.runtime.optional import require
from utils.training.extensions import leave_behind
from utils.training.grown_config import fitting_config, layout
from utils.training.weights import load_weights, save_weights

Inputs = Mapping[str, Any]
Runner = Callable[[Inputs], Tensor]


@dataclass
class Candidate:
    """A model to export and what the writers share."""

    adapter: ModelAdapter
    """The model, on the CPU and in eval mode."""
    inputs: dict[str, Any]
    """Inputs at the shape of the export."""
    axes: dict[str, dict[int, str]]
    """For each tensor input the axes that vary: axis number to ``"batch"`` or ``"sequence"``."""
    loaded: Any = None
    """The LoadedModel with the source files, when there is one."""
    tokenizer: Any = None
    """The TextTokenizer that the model was trained with, when there is one."""
    data: Any = None
    """The PreparedData of a run, to measure on."""
    programs: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Captured graphs, or the error, by attention and kind of axes."""

    def plans(self) -> Iterator[tuple[str, str]]:
        """Yield the ways to capture the graph, best first."""
        attentions = ["default"] + (["eager"] if _other_attention(self.adapter.module) else [])
        for kind in ("dynamic", "auto"):
            for attention in attentions:
                yield attention, kind

    def program(self, attention: str, kind: str) -> Any:
        """Capture the graph with torch.export once; a failure is kept and raised again."""
        key = (attention, kind)
        if key not in self.programs:
            try:
                self.programs[key] = self._capture(attention, kind)
            except Exception as error:
                self.programs[key] = error
        if isinstance(self.programs[key], Exception):
            raise self.programs[key]
        return self.programs[key]

    def _capture(self, attention: str, kind: str) -> Any:
        adapter = self.adapter
        if attention == "eager":
            # A copy, because the setting is spread over config objects that the model shares with its parts.
            adapter = twin(adapter, copy.deepcopy(adapter.module))
            adapter.module.set_attn_implementation("eager")  # type: ignore[operator]
        dim = torch.export.Dim.DYNAMIC if kind == "dynamic" else torch.export.Dim.AUTO
        shapes = tuple(dict.fromkeys(self.axes[name], dim) for name in self.axes)
        wrapper = LogitsOnly(adapter, self.inputs)
        with quiet(), torch.no_grad():
            # The arguments of *args form one tuple of their own.
            return torch.export.export(wrapper, tuple(tensors_of(self.inputs).values()), dynamic_shapes=(shapes,))


class LogitsOnly(nn.Module):
    """The model as a function from tensors to its logits, in the order of the adapter's inputs."""

    def __init__(self, adapter: ModelAdapter, inputs: Inputs) -> None:
        """Wrap a model; inputs that are no tensors become constants."""
        super().__init__()
        self.model = adapter.module
        self._adapter = adapter
        self._names = tuple(tensors_of(inputs))
        self._template = {name: None if name in self._names else value for name, value in inputs.items()}
        self.train(adapter.module.training)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the logits for the main inputs."""
        return self._adapter.logits({**self._template, **dict(zip(self._names, tensors, strict=True))})


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return the inputs that are tensors."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def twin(adapter: ModelAdapter, module: nn.Module) -> ModelAdapter:
    """Return an adapter that calls another instance of the same model in the same way."""
    other = copy.copy(adapter)
    other.module = module
    return other


def _other_attention(module: nn.Module) -> bool:
    """Tell whether a transformers model uses an attention that can be exchanged for the plain one."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return chosen not in (None, "eager") and hasattr(module, "set_attn_implementation")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress reports and warnings; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_safetensors(candidate: Candidate, directory: Path) -> tuple[Runner, str]:
    """Write ``model.safetensors`` with config, source and tokenizer; load the weights into another instance."""
    require("safetensors", "write weights")
    adapter = candidate.adapter
    remark, built = "", adapter.factory
    if candidate.loaded is not None:
        try:
            candidate.loaded.save_source(directory)
            if (settings := _follow_growth(candidate)) is not None:
                remark, config = settings
                if config is not None:
                    write_json(directory / "config.json", config)
                    built = lambda: load_model(directory, trust=True).module  # noqa: E731
                else:
                    leave_behind(adapter.module, directory)
        except InstantiationError:
            remark = "The model's code is not in the export, because it was given as a module."
    if not (directory / "config.json").exists():
        write_json(directory / "config.json", _plain(adapter.config))
    if candidate.tokenizer is not None:
        candidate.tokenizer.save(directory / "tokenizer.json")
    weights = directory / "model.safetensors"
    save_weights(adapter.module, weights)
    fresh, made = _another_instance(adapter, built)
    load_weights(fresh, weights)
    fresh.eval()
    return twin(adapter, fresh).logits, " ".join(part for part in (remark, made) if part)


def _follow_growth(candidate: Candidate) -> tuple[str, dict[str, Any] | None] | None:
    """Return, for a model that has grown, a remark and the settings that build it as it is now, if there are any."""
    loaded, module = candidate.loaded, candidate.adapter.module
    if loaded is None or not loaded.can_rebuild or layout(loaded.factory()) == layout(module):
        return None
    settings = fitting_config(loaded, candidate.adapter)
    if settings is None:
        return (
            "The model has grown in a way that no setting of its code says. The weights load into it after "
            "utils.growth.lineage.rebuild(module, read_lineage(folder)), which needs the growth.json beside them.", None
        )  # fmt: skip
    changed = [
        f"{name} {loaded.config.get(name)} -> {value}"
        for name, value in settings.items()
        if value != loaded.config.get(name)
    ]
    return f"The model has grown, and config.json builds it as it is now: {', '.join(changed)}.", settings


def _another_instance(adapter: ModelAdapter, build: Callable[[], nn.Module] | None) -> tuple[nn.Module, str]:
    """Return another instance with its state wiped, newly built where possible, and a remark where not."""
    fresh, remark = None, "it is not known how to build the model again"
    if build is not None:
        try:
            fresh = build().to("cpu")
        except SeedbedError as error:
            remark = f"the model could not be built again ({error})"
        if fresh is not None and layout(fresh) != layout(adapter.module):
            fresh, remark = None, "the model has changed its structure since it was built"
    if fresh is None:
        fresh = copy.deepcopy(adapter.module)
        remark = f"The weights were loaded back into a copy of the model, because {remark}."
    else:
        remark = ""
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    return fresh, remark


def _plain(value: Any) -> Any:
    """Return settings as JSON can hold them; what it cannot hold becomes its text, and infinities are tagged."""
    return tag_nonfinite(json.loads(json.dumps(value, default=str)))


def write_torch_export(candidate: Candidate, directory: Path) -> tuple[Runner, str]:
    """Write ``model.pt2`` and load it back."""
    path = directory / "model.pt2"

    def write(program: Any, attention: str) -> Runner:
        with quiet():
            torch.export.save(program, path)
            module = torch.export.load(path).module()
        return lambda inputs: module(*tensors_of(inputs).values())

    return _first_that_works(candidate, write)


def write_onnx(candidate: Candidate, directory: Path) -> tuple[Runner, str]:
    """Write ``model.onnx`` and open it with ONNX Runtime."""
    purpose = "write or run ONNX files"
    require("onnx", purpose)
    require("onnxscript", purpose)
    onnxruntime = require("onnxruntime", purpose)
    path = directory / "model.onnx"

    def write(program: Any, attention: str) -> Runner:
        with quiet():
            for leftover in directory.glob("model.onnx*"):
                leftover.unlink()
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(candidate.axes),
                output_names=["logits"],
                dynamic_shapes=tuple(candidate.axes.values()),
            )
            assert onnx_program is not None, "torch.onnx.export returns a program when dynamo is on"
            onnx_program.save(path)
        return _session(onnxruntime, path)

    return _first_that_works(candidate, write)


def _session(onnxruntime: Any, path: Path) -> Runner:
    """Open a file with ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a refused shape raises; it need not be printed as well
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}

    def run(inputs: Inputs) -> Tensor:
        feed = {name: value.numpy() for name, value in tensors_of(inputs).items() if name in names}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def write_onnx_int8(candidate: Candidate, directory: Path) -> tuple[Runner, str]:
    """Write ``model.int8.onnx``: matrix products and tables in 8-bit integers, activations scaled as they come."""
    full = directory / "float"
    full.mkdir()
    _, remark = write_onnx(candidate, full)
    quantization = require("onnxruntime.quantization", "quantize ONNX files", "onnxruntime")
    path = directory / "model.int8.onnx"
    model = require("onnx", "quantize ONNX files").load(str(full / "model.onnx"))
    # The quantizer turns weights around and would then find their old shapes written down.
    del model.graph.value_info[:]
    with quiet():
        logging.disable(logging.WARNING)
        try:
            quantization.quantize_dynamic(
                model, path, op_types_to_quantize=list(QUANTIZED), weight_type=quantization.QuantType.QInt8,
                per_channel=True,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
    shutil.rmtree(full)
    return _session(require("onnxruntime", "run ONNX files"), path), remark


def write_torchscript(candidate: Candidate, directory: Path) -> tuple[Runner, str]:
    """Write ``model.ts.pt`` by tracing, and load it back; torch keeps TorchScript only for what uses it already."""
    path = directory / "model.ts.pt"
    example = tuple(tensors_of(candidate.inputs).values())
    with quiet(), torch.no_grad():
        # Tracing checks itself by running twice; the comparison at four shapes says more.
        traced = torch.jit.trace(LogitsOnly(candidate.adapter, candidate.inputs), example, check_trace=False)
        torch.jit.save(traced, path)
        module = torch.jit.load(path)
    remark = "TorchScript is deprecated by PyTorch; prefer torch_export or onnx."
    return lambda inputs: module(*tensors_of(inputs).values()), remark


def _first_that_works(candidate: Candidate, write: Callable[[Any, str], Runner]) -> tuple[Runner, str]:
    """Capture and write the graph in one way after another until one yields a file that runs at the export's shape."""
    failures: list[str] = []
    for attention, kind in candidate.plans():
        try:
            run = write(candidate.program(attention, kind), attention)
            run(candidate.inputs)
        except OSError:
            raise
        except Exception as error:
            failures.append(explain(error))
            continue
        remark = ""
        if attention == "eager":
            remark = f"Exported with eager attention, because the default attention failed: {failures[0]}"
        elif failures:
            remark = f"The exporter chose the axes that vary, because it could not let all vary: {failures[0]}"
        return run, remark
    tried = "" if len(failures) < 3 else " Eager attention failed as well."
    raise ExportError(failures[0] + tried)


def explain(error: BaseException) -> str:
    """Return an exporter's error as one short paragraph: its deepest cause, without the traceback."""
    if isinstance(error, SeedbedError):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("File ", "^", "~", "Traceback"))]
    # torch.export's first line only counts the violated constraints; a later one says which size was baked in.
    telling = next((line for line in lines if "specialized" in line), lines[0] if lines else "no message")
    for noise in (" For more information", " If you're using", "  (Size-like"):
        telling = telling.lstrip("- ").partition(noise)[0]
    message = f"{type(error).__name__}: {telling if len(telling) <= 300 else telling[:297] + '...'}"
    if "data-dependent" in str(error).lower():
        message += (
            " The model chooses its path by the values in a tensor (a Python if, while, .item() or list index on a "
            "tensor), which a fixed graph cannot do. Use torch.where, torch.cond or masking instead."
        )
    return message


FORMATS: dict[str, Callable[[Candidate, Path], tuple[Runner, str]]] = {
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
    "onnx_int8": write_onnx_int8,
    "torchscript": write_torchscript,
}
"""How to write each format; a writer returns a function that runs the files and a remark for the report."""
QUANTIZED = ("MatMul", "Gemm", "Gather")
"""Operators whose weights become 8-bit integers; ONNX Runtime cannot run convolutions of such weights on a CPU."""
INEXACT = ("onnx_int8",)
"""Formats whose numbers differ from the original's by design; what they lose is measured and not judged."""
