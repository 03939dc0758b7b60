"""Parameters that get no gradient: cut off from the loss, or never used.

The two are told apart by changing the parameter: one that moves the output and gets no gradient is cut off.
"""

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.structure import blocks
from utils.runtime.resources import LARGE_MODEL
from utils.runtime.seeding import seed_streams
from utils.validation.check import Finding
from utils.validation.probing import has_length, is_out_of_memory, logits, short_length
from utils.validation.substitution import parameters_as

SHOWN = 6
LARGE_MODEL_LENGTH = 9
"""Tokens of a text for a large model."""
DETACHED_HINT = "Remove detach(), .data, no_grad(), argmax or numpy from the path between this part and the loss."
UNUSED_HINT = (
    "Call it in forward(), or delete it: it takes memory, confuses the optimizer and breaks DistributedDataParallel."
)


def training_inputs(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return a small batch as training would use it, a shorter one for a large model."""
    if not has_length(adapter):
        return adapter.example_inputs(2)
    large = adapter.num_parameters > LARGE_MODEL
    return adapter.example_inputs(2, adapter.legal_length(LARGE_MODEL_LENGTH) if large else short_length(adapter))


def still_missing(adapter: ModelAdapter, missing: list[str]) -> list[str]:
    """Return which parameters get no gradient in train mode and from the model's other outputs either.

    Auxiliary heads run in training only, and a pooled output beside the logits has no part in the task's loss.
    """
    parameters = dict(adapter.module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    inputs = training_inputs(adapter)
    adapter.module.train()
    try:
        # A part may serve the model's own loss alone, as the transitions of a conditional random field do.
        for given in (inputs, adapter.with_labels(inputs)) if adapter.loss_inputs else (inputs,):
            seed_streams(0, "forward")
            output = adapter.forward(given)
            outputs = [t for _, t in named_tensors(output) if t.is_floating_point() and t.requires_grad]
            if outputs:
                torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return missing
    finally:
        adapter.module.eval()
    return [name for name in missing if parameters[name].grad is None]


def without_gradient(
    adapter: ModelAdapter, missing: list[str], ran: dict[str, int], norms: dict[str, float]
) -> list[Finding]:
    """Describe parameters without a gradient, one finding per part that is wholly without."""
    findings = []
    spared = set(waiting(adapter, missing, ran))
    parts = [
        (where, names)
        for where, names in groups(adapter, missing)
        if where not in spared and not _unrouted_expert(adapter, where, norms)
    ]
    # The part that ran last stands next to the cut.
    parts.sort(key=lambda group: -ran.get(group[0], -1))
    for where, names in parts:
        count = sum(adapter.module.get_parameter(name).numel() for name in names)
        size = f"{len(names)} parameter{'s' if len(names) > 1 else ''} ({count:,} numbers)"
        if _influences(adapter, names):
            message = f"{size} change the output but get no gradient, so they never train"
            findings.append(Finding("detached_submodule", "fail", where, message, DETACHED_HINT))
        else:
            module_ran = where in ran or (where.rpartition(".")[0] in ran and where in names)
            message = f"{size} have no influence on the output" + ("" if module_ran else ": the module never runs")
            # A part that runs and is not asked for its result (a pooler under a language model's head) is waste, not a
            # fault, and nobody but its maker can mend a library.
            mild = module_ran or _is_vector(adapter, where, names) or _is_optional(adapter, where)
            mild = mild or _is_from_package(adapter, where)
            findings.append(Finding("unused_parameter", "warn" if mild else "fail", where, message, UNUSED_HINT))
    if len(findings) > SHOWN:
        rest = len(findings) - SHOWN
        last = findings[SHOWN - 1]
        shortened = Finding(last.code, last.severity, last.where, f"{last.message}; and {rest} more parts", last.hint)
        findings = [*findings[: SHOWN - 1], shortened]
    return findings


def waiting(adapter: ModelAdapter, missing: list[str], ran: dict[str, int]) -> list[str]:
    """Return the parts that only an input or an objective uses which this task does not have.

    A part that never ran waits for an optional input if there is one that nobody could fill, and if the code of its
    owner reads it. A single vector (a mask token) that the code reads costs nothing either way.
    """
    found = []
    for where, names in groups(adapter, missing):
        never = where not in ran and not any(name.startswith(f"{where}.") for name in ran)
        if _is_optional(adapter, where) and (
            _is_vector(adapter, where, names) or (never and bool(adapter.unfilled_inputs))
        ):
            found.append(where)
    return found


def groups(adapter: ModelAdapter, missing: list[str], trainable: bool = True) -> list[tuple[str, list[str]]]:
    """Group parameters by the largest module all of whose parameters, or all trainable ones, are among them."""
    lost = set(missing)
    covered: set[str] = set()
    groups: list[tuple[str, list[str]]] = []
    for name, module in adapter.module.named_modules():
        prefix = f"{name}." if name else ""
        own = [prefix + key for key, p in module.named_parameters() if p.requires_grad or not trainable]
        if own and lost.issuperset(own) and not covered.issuperset(own):
            groups.append((name or adapter.name, own))
            covered.update(own)
    groups += [(name, [name]) for name in missing if name not in covered]
    return groups


def _unrouted_expert(adapter: ModelAdapter, where: str, norms: dict[str, float]) -> bool:
    """Tell whether a module has siblings of its own kind that were used: then this batch did not choose it."""
    parent_name, _, leaf = where.rpartition(".")
    try:
        parent, module = adapter.module.get_submodule(parent_name), adapter.module.get_submodule(where)
    except AttributeError:
        return False
    if not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        return False
    siblings = [key for key, child in parent.named_children() if key != leaf and type(child) is type(module)]
    if _is_block(adapter, where):
        return False
    used = any(name.startswith(f"{parent_name}.{key}.") for key in siblings for name in norms)
    return used and (_has_router(adapter, parent_name, len(siblings) + 1) or _runs_for_others(adapter, where))


def _has_router(adapter: ModelAdapter, parts: str, count: int) -> bool:
    """Tell whether a matrix beside a list of modules has one row or column for each of them."""
    owner = adapter.module.get_submodule(parts.rpartition(".")[0])
    inside = parts.rpartition(".")[2] + "."
    return any(p.dim() > 1 and count in p.shape for key, p in owner.named_parameters() if not key.startswith(inside))


def _runs_for_others(adapter: ModelAdapter, where: str) -> bool:
    """Tell whether a module runs in a larger batch, in which rules without weights choose more of the parts."""
    seen: set[str] = set()
    inputs = adapter.example_inputs(16)
    with observe(adapter.module, lambda name, *_: seen.add(name)):
        logits(adapter, inputs)
    return where in seen


def _is_vector(adapter: ModelAdapter, where: str, names: list[str]) -> bool:
    """Tell whether a part is one parameter of at most one axis that is not of size one."""
    return names == [where] and sum(size > 1 for size in adapter.module.get_parameter(where).shape) <= 1


def _is_optional(adapter: ModelAdapter, where: str) -> bool:
    """Tell whether the code that holds a part reads it outside the constructor: for other inputs it may run."""
    leaf = where.rpartition(".")[2]
    return any(leaf in _names(code) for name, code in _methods(adapter, where) if name != "__init__")


def _is_from_package(adapter: ModelAdapter, where: str) -> bool:
    """Tell whether the constructor that makes a part belongs to an installed package."""
    leaf = where.rpartition(".")[2]
    codes = [code for name, code in _methods(adapter, where) if name == "__init__"]
    return any(leaf in _names(code) and "-packages" in code.co_filename for code in codes)


def _methods(adapter: ModelAdapter, where: str) -> Iterator[tuple[str, CodeType]]:
    """Yield the methods of the class that holds a part, also those behind decorators."""
    try:
        kind = type(adapter.module.get_submodule(where.rpartition(".")[0]))
    except AttributeError:
        return
    replaced: set[str] = set()
    for part in kind.__mro__:
        if part is nn.Module or not issubclass(part, nn.Module):
            continue
        for name, item in vars(part).items():
            item = item.fget if isinstance(item, property) else item
            code = getattr(_unwrapped(item), "__code__", None)
            if code is None or name in replaced:
                continue
            yield name, code
            if "super" not in code.co_names:
                replaced.add(name)


def _unwrapped(item: Any) -> Any:
    """Return the function under decorators; what cannot be unwrapped stays as it is."""
    try:
        return inspect.unwrap(item)
    except ValueError:
        return item


def _names(code: CodeType) -> set[str]:
    """Return the attributes that a function reads or writes, the functions inside it included."""
    inner = [item for item in code.co_consts if isinstance(item, CodeType)]
    return set(code.co_names).union(*(_names(item) for item in inner))


def _is_block(adapter: ModelAdapter, where: str) -> bool:
    """Tell whether a module is one of the model's repeated blocks, which must all run."""
    return where in blocks(adapter.module).value


def _influences(adapter: ModelAdapter, names: list[str]) -> bool:
    """Tell whether the output changes when these parameters do; the parameters themselves are not touched."""
    inputs = training_inputs(adapter)
    before = logits(adapter, inputs)

    def shaken(parameter: Tensor) -> Tensor:
        return parameter + torch.randn_like(parameter) * (parameter.float().std(unbiased=False) + 0.1)

    with parameters_as(adapter, names, shaken):
        after = logits(adapter, inputs)
    return before.shape != after.shape or not torch.equal(before.nan_to_num(), after.nan_to_num())
