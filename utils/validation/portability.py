"""Does the model survive being moved and cast? It is run on torch's meta device and in bfloat16, as a whole.

A GPU is not needed: operations that mix the meta device with the CPU are those that a GPU refuses. Answers that differ
in another dtype are the business of numerics; here only what cannot run at all counts.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.isolation import preserved
from utils.runtime.resources import LARGE_MODEL
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.determinism import Inputs, example
from utils.validation.hidden import Hidden, exchanged, hidden_items
from utils.validation.probing import first_line, is_out_of_memory
from utils.validation.relocation import DeviceMismatch, Disguised, Elsewhere, swapped
from utils.validation.watching import Intruders

DTYPES = re.compile(
    r"same dtype|same type|dtypes? (to )?match|expected scalar type|expected dtype|scalar type of"
    r"|Input type .* and (bias|weight) type|dtype mismatch|must have the same dtype",
    re.I,
)
NOT_MIXED = re.compile(r"not implemented for|only supported for|not support|Unsupported", re.I)
"""Messages about a dtype that torch cannot do at all are nobody's fault here."""
NUMPY = re.compile(r"can't convert meta device type tensor to numpy|convert .* tensor to numpy", re.I)
MIXED = re.compile(r"(at|on|in|have|with|expected|be the)( the)? same device|(different|two) devices", re.I)
"""What functions and layers of torch say that look at their devices themselves."""
ELSEWHERE, RUNS = "another device", "runs"
DEVICE_HINT = (
    "Create tensors where the input is: torch.arange(n, device=x.device), torch.zeros_like(x), x.new_zeros(...); keep "
    "constants with register_buffer; no .cpu(), .numpy() or device names in forward()."
)
DTYPE_HINT = (
    "Create tensors in the input's dtype (torch.zeros(n, dtype=x.dtype), x.new_zeros(n)) and cast back after computing "
    "in float32: y.to(x.dtype)."
)


@dataclass(frozen=True)
class Failure:
    """A forward pass that does not run elsewhere.

    Attributes:
        where: The innermost module that was running.
        message: The error.
        mixed: Whether the error is about two devices or two dtypes; any other says nothing.
    """

    where: str
    message: str
    mixed: bool


def check_portability(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Run the model on another device and in other dtypes, with everything moved that the model holds.

    Codes: ``hardcoded_device``, ``hardcoded_dtype``.

    Raises:
        Skipped: The model does what could not be tried on another device, or its first pass makes parameters.
    """
    held = hidden_items(adapter.module)
    findings: list[Finding] = []
    tried: dict[str, str] = {}
    moved = run_elsewhere(adapter, held)
    tried[ELSEWHERE] = moved.message if moved else RUNS
    if moved is not None and moved.mixed:
        message = f"on another device than the CPU this raises: {moved.message}"
        reproduction = (
            "from utils.adapters import ModelAdapter  # on a machine with a GPU\n"
            "inputs = {name: value.to('cuda') for name, value in ModelAdapter(model).example_inputs().items()}\n"
            "model.to('cuda')(**inputs)"
        )
        findings.append(Finding("hardcoded_device", "fail", moved.where, message, DEVICE_HINT, reproduction))
    for dtype in dtypes(adapter):
        cast = run_cast(adapter, dtype, held)
        name = str(dtype).removeprefix("torch.")
        tried[name] = cast.message if cast else RUNS
        if cast is not None and cast.mixed:
            message = f"cast to {name} this raises: {cast.message}"
            reproduction = (
                "import copy, torch; from utils.adapters import ModelAdapter\n"
                f"cast = copy.deepcopy(model).to(torch.{name})\n"
                "cast(**ModelAdapter(model).example_inputs())"
            )
            findings.append(Finding("hardcoded_dtype", "fail", cast.where, message, DTYPE_HINT, reproduction))
        if cast is None or cast.mixed:
            # A second dtype is for models that the first cannot run at all.
            break
    if findings and _makes_parameters(adapter):
        raise Skipped("its first forward pass makes parameters (see registration); nothing can be moved before")
    if not findings and moved is not None:
        raise Skipped(_in_words(tried))
    return Outcome(
        "; ".join(f"{key}: {value}" for key, value in tried.items()), "runs", _in_words(tried), findings,
        {"tried": tried},
    )  # fmt: skip


def _in_words(tried: Mapping[str, str]) -> str:
    """Say where a model runs, and where it could not be tried."""
    places = {key: f"{'on' if key == ELSEWHERE else 'in'} {key}" for key in tried}
    runs = " and ".join(places[key] for key, value in tried.items() if value == RUNS)
    untried = "; ".join(
        f"{places[key]} it could not be tried: {value}" for key, value in tried.items() if value != RUNS
    )
    return "; ".join(part for part in (f"it runs {runs}" if runs else "", untried) if part)


def _makes_parameters(adapter: ModelAdapter) -> bool:
    """Tell whether a forward pass registers parameters: what a model has then can be moved like any other."""
    before = {name for name, _ in adapter.module.named_parameters()}
    with preserved(adapter.module), torch.no_grad():
        adapter.forward(example(adapter, 0, 1))
        return any(name not in before for name, _ in adapter.module.named_parameters())


def dtypes(adapter: ModelAdapter) -> list[torch.dtype]:
    """Return the dtypes that a model of real numbers is cast to."""
    real = {p.dtype for p in adapter.module.parameters() if p.is_floating_point()}
    if len(real) != 1 or adapter.device.type == "meta":
        # Parts kept in another precision on purpose (quantised, mixed) are not to be cast.
        return []
    others = [torch.bfloat16] if adapter.num_parameters > LARGE_MODEL else [torch.bfloat16, torch.float64]
    return [dtype for dtype in others if dtype not in real]


def run_elsewhere(adapter: ModelAdapter, moved: Iterable[Hidden] = ()) -> Failure | None:
    """Run the model on the meta device.

    Args:
        adapter: The model.
        moved: What is hidden in it and moved nevertheless; ``model.to`` would leave it where it is.
    """
    moved = list(moved)
    failure = None
    for disguise in ((), (Disguised(),)):
        elsewhere = Elsewhere()
        inputs = _converted(example(adapter, 0, 1), elsewhere.moved)
        again = _attempt(adapter, inputs, (elsewhere, *disguise), elsewhere.moved, moved)
        if again is None:
            # Nothing fails, or only code that asks for the meta device by name, which no user's device is.
            return None
        failure = failure or again
    return failure


def run_cast(adapter: ModelAdapter, dtype: torch.dtype, moved: Iterable[Hidden] = ()) -> Failure | None:
    """Run the model with all real tensors in another dtype; `moved` as in `run_elsewhere`.

    A model that cannot run so is tried once more with the parts left in float32 that it declares to be kept there.
    """
    moved = list(moved)
    kept = kept_in_float32(adapter.module) if dtype in (torch.float16, torch.bfloat16) else set()

    def attempt(stay: set[int]) -> Failure | None:
        def cast(tensor: Tensor) -> Tensor:
            change = tensor.is_floating_point() and id(tensor) not in stay
            return tensor.detach().to(dtype) if change else tensor

        def foreign(tensor: Tensor) -> bool:
            return tensor.dim() > 0 and tensor.is_floating_point() and tensor.dtype != dtype

        return _attempt(adapter, _converted(example(adapter, 0, 1), cast), (), cast, moved, foreign)

    failure = attempt(set())
    return attempt(kept) if failure is not None and failure.mixed and kept else failure


def kept_in_float32(module: nn.Module) -> set[int]:
    """Return the ids of parameters and buffers that loading in half precision leaves in float32.

    Transformers reads the list `_keep_in_fp32_modules_strict` of a model and of its parts for that. Its entries are
    pieces of names, whole between their dots.
    """
    declared: set[str] = set()
    for child in module.modules():
        stated = getattr(child, "_keep_in_fp32_modules_strict", None)
        if isinstance(stated, (list, tuple, set, frozenset)):
            declared.update(str(piece) for piece in stated)
    named = [*module.named_parameters(), *module.named_buffers()]
    return {id(tensor) for name, tensor in named if any(f".{piece}." in f".{name}." for piece in declared)}


def _converted(inputs: Inputs, convert: Any) -> dict[str, Any]:
    return {key: convert(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _attempt(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    modes: tuple[Any, ...],
    convert: Any,
    moved: Iterable[Hidden],
    foreign: Callable[[Tensor], bool] = lambda tensor: tensor.dim() > 0 and tensor.device.type != "meta",
) -> Failure | None:
    """Run one forward pass and return how it failed."""
    with ExitStack() as stack:
        stack.enter_context(preserved(adapter.module))
        if convert is not None:
            stack.enter_context(swapped(adapter.module, convert))
            stack.enter_context(exchanged(moved, convert))
        intruders = Intruders(foreign)
        stack.enter_context(intruders.watch(adapter.module))
        seed_streams(0, "portability")
        try:
            with torch.no_grad(), ExitStack() as elsewhere:
                for mode in modes:
                    elsewhere.enter_context(mode)
                adapter.forward(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            text = first_line(error)
            mixed = isinstance(error, DeviceMismatch) or bool(NUMPY.search(text) or MIXED.search(text))
            if not modes:
                mixed = bool(DTYPES.search(str(error))) and not NOT_MIXED.search(str(error))
            return Failure(intruders.origin or adapter.name, f"{type(error).__name__}: {text}", mixed)
    return None
