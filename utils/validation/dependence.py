"""What depends on what: other legal content for an input, all outputs of a call, and where a dependence starts.

A forbidden dependence is proved by changing one part of the input and finding another part of the output changed. Where
rounding could explain a small change, a copy of the model in float64 decides: what is real keeps its size and pattern
there, and rounding does not.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.adapters.capture import first_tensor, named_tensors, observe
from utils.adapters.inputs import length_inputs
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.nesting import flattened
from utils.runtime.seeding import seed_streams
from utils.validation.probing import ModelCrash, guarded, has_length, live
from utils.validation.substitution import faint_gains, noise, parameters_as
from utils.validation.watching import Running, running_modules

LARGEST_TWIN = 5_000_000
"""Parameters of the largest model that is copied to float64."""
PLAIN = 1e-3
"""A change this large beside the output is no rounding in float32; see `least_plain` for coarser types."""

SMALL_INPUT = 20_000

Part = Callable[[Tensor, bool], Tensor | None]
"""Takes a tensor, and whether it is an input; returns the part that must not change, or None where it has none."""


def replace_ids(adapter: ModelAdapter, name: str, ids: Tensor) -> Tensor:
    """Return token ids that all differ from `ids`, legal and not padding."""
    # Ids that the config promises and the table lacks would crash here; shape_robustness reports them.
    vocabulary = max(2, adapter.readable_ids(name))
    padding = adapter.pad_token_id.value
    steps = torch.arange(ids.shape[1], device=ids.device) % max(1, vocabulary - 1)
    other = (ids + 1 + steps.view(1, -1, *[1] * (ids.dim() - 2))) % vocabulary
    if padding is not None and vocabulary > 2:
        other = torch.where(other == padding, (other + 1) % vocabulary, other)
        other = torch.where(other == ids, (other + 1) % vocabulary, other)
    return other


def other_content(adapter: ModelAdapter, name: str, value: Tensor, seed: int = 1) -> Tensor:
    """Return another legal content for an input, different wherever it can be; masks and positions stay.

    Args:
        adapter: The model.
        name: Name of the input.
        value: Its present content, batch first.
        seed: Seed of what is drawn anew.
    """
    if "mask" in name or name == "position_ids" or not value.numel() or value.dim() == 0:
        return value
    if name in measures(adapter):
        # Shorter by one is legal, in the same order, and no longer than the text.
        return (value - 1).clamp(min=1)
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(value.shape, generator=generator).to(value)
        spread = float(value.float().std()) if value.numel() > 1 else 1.0
        return value.float().mean().to(value) + drawn * (spread or 1.0)
    if name == adapter.main_input and adapter.spec.example_inputs is not None and value.shape[0] > 1:
        # Columns may have ranges of their own, so each keeps to the values that it has.
        return _shifted_columns(value)
    if name.endswith("_ids") and name in adapter.input_names and name != "token_type_ids" and value.dim() > 1:
        return replace_ids(adapter, name, value)
    if name == adapter.main_input and adapter.modality == "tokens" and value.dim() > 1:
        return replace_ids(adapter, name, value)
    if value.dtype == torch.bool:
        return ~value
    seen = value.unique()
    if len(seen) == 1:
        # Segments, for example: where all are 0, 1 is the other one.
        return torch.where(value == 0, 1, 0).to(value.dtype)
    return seen[(torch.searchsorted(seen, value.contiguous()) + 1) % len(seen)]


def measures(adapter: ModelAdapter) -> set[str]:
    """Return the names of the inputs that say how long each sample is."""
    examples = adapter.spec.example_inputs
    return length_inputs(adapter.example_inputs(2) if examples is None else flattened(examples), adapter.main_input)


def _shifted_columns(value: Tensor) -> Tensor:
    """Return whole numbers in which each column's values take the place of one another."""
    if value.dim() == 1:
        seen = value.unique()
        return seen[(torch.searchsorted(seen, value.contiguous()) + 1) % len(seen)]
    return torch.stack([_shifted_columns(column) for column in value.unbind(-1)], -1)


def bounded_length(adapter: ModelAdapter, wanted: int) -> int | None:
    """Return a legal length of at most `wanted` tokens, or None where no length can be chosen."""
    if not has_length(adapter):
        return None
    return adapter.legal_length(min(wanted, adapter.max_length.value or wanted))


def sample_inputs(adapter: ModelAdapter, size: int, length: int | None, seed: int = 0) -> dict[str, Any]:
    """Make inputs of a batch size and, where the length can be chosen, of a length.

    A user's own example keeps its length, for columns of a table look like tokens and are none; where ids drawn anew do
    not run, its rows are repeated as they are.
    """
    examples = adapter.spec.example_inputs
    if examples is None:
        return adapter.example_inputs(size, length if has_length(adapter) else None, seed)
    inputs = adapter.example_inputs(size, None, seed)
    try:
        outputs(adapter, inputs)
    except ModelCrash:
        rows = examples[adapter.main_input]
        inputs[adapter.main_input] = rows[torch.arange(seed, seed + size) % len(rows)].to(adapter.device)
    return inputs


def outputs(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return every real-valued output by its path, without a gradient and on the same random streams each time.

    Raises:
        ModelCrash: The model raised.
    """

    def call() -> Any:
        seed_streams(0, "forward")
        with torch.no_grad():
            return adapter.forward(inputs)

    found = named_tensors(guarded(adapter, inputs, "", call))
    return {path: live(adapter, tensor, path) for path, tensor in found if tensor.is_floating_point()}


@contextmanager
def without_zeros(adapter: ModelAdapter) -> Iterator[None]:
    """Let parameters that are all zero hold noise inside the block, and gains that start small hold ones."""
    names = [
        name
        for name, parameter in adapter.module.named_parameters()
        if parameter.is_floating_point() and parameter.numel() and not bool(parameter.detach().flatten()[0])
        and not bool(parameter.detach().any()) and not name.endswith("bias")
    ]  # fmt: skip
    with parameters_as(adapter, names, noise), parameters_as(adapter, faint_gains(adapter), torch.ones_like):
        yield


def relative(change: float, *tensors: Tensor) -> float:
    """Return a change beside the largest number of the tensors that it occurred in."""
    return change / max(*(float(tensor.detach().abs().amax()) for tensor in tensors), 1e-30)


def least_plain(dtype: torch.dtype) -> float:
    """Return the relative change that needs no second proof in this type: 0.001 in float32, more in coarser types."""
    return max(PLAIN, 16 * torch.finfo(dtype).eps)


def double_twin(adapter: ModelAdapter, largest: int = LARGEST_TWIN) -> ModelAdapter | None:
    """Return the same model in float64 behind the same adapter; None where it is large or already that precise.

    Args:
        adapter: The model.
        largest: Parameters up to which it is worth a copy.
    """
    if adapter.num_parameters > largest or any(p.dtype == torch.float64 for p in adapter.module.parameters()):
        return None
    try:
        twin = copy.copy(adapter)
        twin.module = copy.deepcopy(adapter.module).double()
    except Exception:
        # Models that cannot be copied or cast are judged in their own precision.
        return None
    return twin


def as_double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with their real numbers in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def is_real(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    changed: Mapping[str, Any],
    output: Callable[[ModelAdapter, Mapping[str, Any]], Tensor],
    difference: Tensor,
    largest: int = LARGEST_TWIN,
) -> bool | None:
    """Tell whether a small difference of outputs is more than rounding, by the same difference in float64.

    Args:
        adapter: The model.
        inputs: One input.
        changed: The other.
        output: Returns the part of the output that differed.
        difference: How it differed, in the model's own precision.
        largest: Parameters up to which the model is copied.

    Returns:
        Whether the difference is the same in float64; None when the model has no such copy.
    """
    twin = double_twin(adapter, largest)
    if twin is None:
        return None
    try:
        first, second = output(twin, as_double(inputs)).double(), output(twin, as_double(changed)).double()
    except Exception:
        return None
    exact, rough = (second - first).flatten(), difference.flatten().double()
    if exact.shape != rough.shape or not bool(torch.isfinite(exact).all()):
        return None
    if relative(float(exact.abs().max()), first) < 1e-11:
        return False
    # Rounding inside a part that is fixed to float32 is as large here, but falls out differently.
    return float(torch.nn.functional.cosine_similarity(exact, rough, dim=0)) > 0.7


def first_leak(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    changed: Mapping[str, Any],
    part: Part,
    size: float = 1.0,
    part_of_changed: Part | None = None,
    summaries: bool = False,
) -> str:
    """Return the first module to finish whose output changes in a part although its inputs do not.

    Args:
        adapter: The model.
        inputs: One input.
        changed: The other.
        part: The part that must not change.
        size: The relative change of the output in question; a thousandth of it counts as a change.
        part_of_changed: The same part where tensors have other shapes in the second run.
        summaries: Whether outputs that have no such part at all must not change either.

    Returns:
        The module's name; the model's class name for the model itself, or when no module answers to this.
    """
    # Float64 costs twice as much, and tells no more where the change is plain.
    small = sum(value.numel() for value in inputs.values() if isinstance(value, Tensor)) < SMALL_INPUT
    twin = double_twin(adapter) if small or size < PLAIN else None
    if twin is not None:
        try:
            least = max(1e-11, min(1e-5, size / 1e3))
            found = _first_leak(
                twin, as_double(inputs), as_double(changed), part, part_of_changed or part, least, summaries
            )
            return found or adapter.name
        except Exception:
            # A model that refuses float64 is asked in its own precision.
            twin = None
    least = max(8 * torch.finfo(_precision(adapter)).eps, min(1e-5, size / 1e3))
    return _first_leak(adapter, inputs, changed, part, part_of_changed or part, least, summaries) or adapter.name


def _precision(adapter: ModelAdapter) -> torch.dtype:
    return next((p.dtype for p in adapter.module.parameters() if p.is_floating_point()), torch.float32)


def _first_leak(
    adapter: ModelAdapter, inputs: Mapping[str, Any], changed: Mapping[str, Any], part: Part, other: Part, least: float,
    summaries: bool,
) -> str:  # fmt: skip
    calls: list[tuple[str, list[Tensor | None], list[Tensor | None]]] = []
    found: list[str] = []
    position = 0

    def of_inputs(value: Any, part: Part) -> list[Tensor | None]:
        taken = ((tensor, part(tensor, True)) for _, tensor in named_tensors(value))
        return [(tensor if kept is None else kept).detach().clone() for tensor, kept in taken]

    def of_output(value: Any, part: Part) -> list[Tensor | None]:
        real = [tensor for _, tensor in named_tensors(value) if tensor.is_floating_point()]
        taken = [part(tensor, False) for tensor in real]
        if summaries and all(kept is None for kept in taken):
            taken = list(real)
        return [None if kept is None else kept.detach().clone() for kept in taken]

    def record(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        calls.append((name, of_inputs(given, part), of_output(output, part)))

    def compare(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal position
        if found or position >= len(calls):
            return
        known, known_inputs, known_output = calls[position]
        position += 1
        changed_here = name == known and differ(of_output(output, other), known_output, least)
        if changed_here and not differ(of_inputs(given, other), known_inputs, least):
            found.append(name)

    with observe(adapter.module, record):
        outputs(adapter, inputs)
    with observe(adapter.module, compare):
        outputs(adapter, changed)
    return found[0] if found else ""


def differ(first: Sequence[Tensor | None], second: Sequence[Tensor | None], least: float) -> bool:
    """Tell whether two lists of tensors differ by more than `least` of their largest number; NaN differs from none."""
    if len(first) != len(second):
        return True
    for a, b in zip(first, second, strict=True):
        if a is None or b is None:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return True
        if not a.numel():
            continue
        if a.is_floating_point():
            both = torch.isfinite(a) & torch.isfinite(b)
            scale = float(torch.where(both, a, 0).abs().max())
            if float(torch.where(both, a - b, 0).abs().max()) > least * scale:
                return True
        elif not torch.equal(a, b):
            return True
    return False


class Enough(Exception):
    """Ends a forward pass early: what was wanted of it is there."""


def output_of(adapter: ModelAdapter, inputs: Mapping[str, Any], name: str) -> Tensor:
    """Run a model no further than to the first output of one of its modules, and return that.

    Raises:
        LookupError: The module was not called or returned no tensor.
    """
    taken: list[Tensor] = []

    def stop(child: nn.Module, given: Any, output: Any) -> None:
        if (tensor := first_tensor(output)) is not None:
            taken.append(tensor.detach())
        raise Enough

    handle = adapter.module.get_submodule(name).register_forward_hook(stop)
    try:
        seed_streams(0, "forward")
        with torch.no_grad():
            adapter.forward(inputs)
    except Enough:
        pass
    finally:
        handle.remove()
    if not taken:
        raise LookupError(name)
    return taken[0]


class _Attending(TorchFunctionMode):
    """Notes which module runs when a softmax goes over a dimension of some length, or fused attention is called."""

    def __init__(self, running: Running, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.running, self.lengths, self.found = running, lengths, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        fused = "dot_product_attention" in name or "multi_head_attention" in name or "transformer_encoder" in name
        spread = "softmax" in name and isinstance(result, Tensor) and any(n in self.lengths for n in result.shape[-2:])
        if fused or spread:
            self.found.add(self.running.name)
        return result


def attends(adapter: ModelAdapter, inputs: Mapping[str, Any], lengths: tuple[int, ...], where: str = "") -> bool:
    """Tell whether a module, or one inside it, forms attention over positions.

    Args:
        adapter: The model.
        inputs: What to run it on.
        lengths: How many positions there may be.
        where: As in a finding.
    """
    with running_modules(adapter.module) as running, _Attending(running, lengths) as mode:
        outputs(adapter, inputs)
    if where in ("", adapter.name):
        return bool(mode.found)
    return any(name == where or name.startswith(f"{where}.") for name in mode.found)
