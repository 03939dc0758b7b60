"""Parameters that get no gradient: cut off from the loss, or never used.

The two are told apart by changing the parameter: one that moves the output and gets no gradient is cut off.
"""

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.structure import blocks
from utils.runtime.seeding import seed_streams
from utils.validation.check import Finding
from utils.validation.probing import has_length, is_out_of_memory, logits, short_length
from utils.validation.substitution import parameters_as

SHOWN = 6
DETACHED_HINT = "Remove detach(), .data, no_grad(), argmax or numpy from the path between this part and the loss."
UNUSED_HINT = (
    "Call it in forward(), or delete it: it takes memory, confuses the optimizer and breaks DistributedDataParallel."
)


def training_inputs(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return a small batch as training would use it."""
    return adapter.example_inputs(2, short_length(adapter) if has_length(adapter) else None)


def still_missing(adapter: ModelAdapter, missing: list[str]) -> list[str]:
    """Return which parameters get no gradient in train mode and from the model's other outputs either.

    Auxiliary heads run in training only, and a pooled output beside the logits has no part in the task's loss.
    """
    parameters = dict(adapter.module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    adapter.module.train()
    seed_streams(0, "forward")
    try:
        output = adapter.forward(training_inputs(adapter))
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
    parts = [(where, names) for where, names in groups(adapter, missing) if not _unrouted_expert(adapter, where, norms)]
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
            # A single learned vector that only some other objective uses (a mask token) costs nothing; a part that
            # runs and is not asked for its result (a pooler under a language model's head) is waste, not a fault.
            shape = adapter.module.get_parameter(names[0]).shape
            token = len(names) == 1 and where == names[0] and sum(size > 1 for size in shape) <= 1
            mild = token or module_ran or _is_optional(adapter, where)
            findings.append(Finding("unused_parameter", "warn" if mild else "fail", where, message, UNUSED_HINT))
    if len(findings) > SHOWN:
        rest = len(findings) - SHOWN
        last = findings[SHOWN - 1]
        shortened = Finding(last.code, last.severity, last.where, f"{last.message}; and {rest} more parts", last.hint)
        findings = [*findings[: SHOWN - 1], shortened]
    return findings


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
    return any(name.startswith(f"{parent_name}.{key}.") for key in siblings for name in norms) and not _is_block(
        adapter, where
    )


def _is_optional(adapter: ModelAdapter, where: str) -> bool:
    """Tell whether the code that holds a module reads it outside the constructor: for other inputs it may run."""
    parent, _, leaf = where.rpartition(".")
    try:
        kind = type(adapter.module.get_submodule(parent))
    except AttributeError:
        return False
    own = [part for part in kind.__mro__ if part is not nn.Module and issubclass(part, nn.Module)]
    methods = [(name, item) for part in own for name, item in vars(part).items() if name != "__init__"]
    return any(leaf in code.co_names for _, item in methods if (code := getattr(item, "__code__", None)) is not None)


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
