"""Is every part known to torch, and once? Hidden layers, layers without a shape, layers that are one and the same.

A hidden part is a fault only when the output depends on it: a teacher or a parent kept out of sight on purpose is not.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from utils.adapters.capture import observe
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.isolation import preserved
from utils.validation.check import Budget, Finding, Outcome
from utils.validation.determinism import answer, example
from utils.validation.hidden import Hidden, exchanged, hidden_items
from utils.validation.untrained import BATCH_NORM
from utils.validation.watching import Running, alike, running_modules

LAYER_HINT = (
    "Hold layers in nn.ModuleList or nn.ModuleDict and weights in nn.Parameter or nn.ParameterList, as attributes of "
    "the module itself."
)
SHARED_HINT = "Create a new layer for each place ([Block() for _ in range(n)]), and clone() weights that are copied."
LAZY_HINT = "Give the layer its input size, or run one batch through the model before the optimizer is made."
SHARING = ("share", "shared", "sharing", "universal", "num_hidden_groups")
"""Words in settings that announce layers shared on purpose."""


def check_registration(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Look for parts that torch does not see, has not sized or sees twice.

    Codes: ``unregistered_layer``, ``lazy_parameter``, ``shared_weight``.
    """
    findings = lazy_findings(adapter) + shared_findings(adapter)
    grown, used = _used(adapter)
    findings += grown
    layers = [item for item in hidden_items(adapter.module) if item.trains or isinstance(item.item, nn.Module)]
    layers = [item for item in layers if item.tensors]
    hidden = _unregistered(adapter, layers)
    findings += hidden or [finding for finding in used if not grown]
    value = sum(1 for _ in adapter.module.modules())
    return Outcome(value, "all registered once", f"all {value} modules are registered, each in one place", findings)


def lazy_findings(adapter: ModelAdapter) -> list[Finding]:
    """Describe parameters that had no shape when the model was given."""
    places = dict.fromkeys(name.rpartition(".")[0] or adapter.name for name in adapter.lazy)
    message = "parameters here have no shape yet; an optimizer made now cannot hold them"
    reproduction = (
        "from torch.nn.parameter import is_lazy\nprint([n for n, p in model.named_parameters() if is_lazy(p)])"
    )
    return [Finding("lazy_parameter", "fail", place, message, LAZY_HINT, reproduction) for place in places]


class _Users(TorchFunctionMode):
    """Notes modules that compute with weights which nobody holds: layers made in forward(), globals of the code."""

    def __init__(self, known: set[int], running: Running) -> None:
        super().__init__()
        self.known, self.running = known, running
        self.found: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of one call."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter) and leaf.requires_grad and id(leaf) not in self.known:
                self.found.setdefault(self.running.name, leaf)
        return func(*args, **(kwargs or {}))


def _used(adapter: ModelAdapter) -> tuple[list[Finding], list[Finding]]:
    """Run the model once and find parameters that it makes: those it registers, and those it uses and forgets."""
    module = adapter.module
    inputs = example(adapter, 0)
    known = {id(p) for p in module.parameters()}
    known |= {id(tensor) for item in hidden_items(module) for tensor in item.tensors}
    before = {name for name, _ in module.named_parameters()}
    parts = {name for name, _ in module.named_modules()}
    with preserved(module), running_modules(module) as running, _Users(known, running) as users:
        answer(adapter, inputs)
        new = [name for name, _ in module.named_parameters() if name not in before]
    places: dict[str, str] = {}
    for name in new:
        # The outermost new part: a whole new layer, or a single new weight.
        path = name.split(".")
        places.setdefault(next(p for n in range(1, len(path) + 1) if (p := ".".join(path[:n])) not in parts), name)
    message = "is made by the first forward pass; an optimizer made before never sees it"
    grown = [
        Finding("lazy_parameter", "fail", place, f"the parameter `{name}` {message}", LAZY_HINT)
        for place, name in places.items()
    ]
    used = [
        Finding(
            "unregistered_layer", "fail", name or adapter.name,
            f"a weight of shape {tuple(leaf.shape)} that no module holds is used here: it is made in forward()",
            LAYER_HINT,
        )
        for name, leaf in users.found.items()
    ]  # fmt: skip
    return grown, used


def _unregistered(adapter: ModelAdapter, layers: list[Hidden]) -> list[Finding]:
    """Find hidden layers and weights that the output depends on, one finding per attribute."""
    findings: list[Finding] = []
    attributes: dict[str, list[Hidden]] = {}
    for item in layers:
        attributes.setdefault(item.where, []).append(item)
    for where, items in attributes.items():
        if not influences(adapter, items):
            continue
        count = sum(tensor.numel() for item in items for tensor in item.tensors)
        trains = any(item.trains for item in items)
        what = (
            f"{len(items)} module{'s' if len(items) > 1 else ''}" if isinstance(items[0].item, nn.Module) else "weights"
        )
        message = (
            f"{what} with {count:,} numbers change the output but are no part of model.parameters() or state_dict()"
        )
        reproduction = f"value = model.{where}\nprint([name for name, _ in model.named_parameters()])  # not among them"
        severity = "fail" if trains else "warn"
        findings.append(Finding("unregistered_layer", severity, where, message, LAYER_HINT, reproduction))
    return findings


def influences(adapter: ModelAdapter, items: list[Hidden]) -> bool:
    """Tell whether the output changes when hidden tensors take other values."""
    inputs = example(adapter, 0)
    with preserved(adapter.module):
        base = answer(adapter, inputs)
    with preserved(adapter.module), exchanged(items, altered):
        try:
            return not alike(answer(adapter, inputs), base)
        except Exception:
            # A model that stumbles over other values of a tensor depends on them.
            return True


def altered(tensor: Tensor) -> Tensor:
    """Return other values of the same kind: flipped, rotated or with noise of their own size added."""
    data = tensor.detach()
    if data.dtype == torch.bool:
        return ~data
    if not data.is_floating_point():
        return data.flatten().roll(1).view_as(data) if bool((data != data.flatten()[:1]).any()) else data * 0
    scale = data.float().nan_to_num(posinf=0, neginf=0).abs().mean() + 0.1
    return torch.where(data.isfinite(), data + torch.randn_like(data) * scale.to(data), data)


def shared_findings(adapter: ModelAdapter) -> list[Finding]:
    """Find layers that are registered in several places, and parameters that several layers hold."""
    module = adapter.module
    if _announced(adapter):
        return []
    declared = _declared(module)
    findings: list[Finding] = []
    covered: set[int] = set()
    places: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        places.setdefault(id(child), []).append(name)
    modules = dict(module.named_modules(remove_duplicate=False))
    for names in places.values():
        child = modules[names[0]]
        own = list(child.parameters())
        if len(names) < 2 or not own or any(id(p) in covered for p in own):
            continue
        covered.update(id(p) for p in own)
        if _is_declared([f"{name}.{key}" for name in names for key, _ in child.named_parameters()], declared):
            continue
        finding = _same_module(adapter, child, names)
        if finding is not None:
            findings.append(finding)
    return findings + _same_tensor(adapter, covered, declared)


def _same_module(adapter: ModelAdapter, child: nn.Module, names: list[str]) -> Finding | None:
    """Judge a module with several names."""
    if isinstance(child, nn.Embedding) or _is_table(child) or not any(p.requires_grad for p in child.parameters()):
        return None
    parents = [name.rpartition(".")[0] for name in names]
    parent = adapter.module.get_submodule(parents[0])
    indexed = all(any(part.isdigit() for part in name.split(".")) for name in names)
    runs = _runs(adapter, child)
    if not indexed and runs < 2:
        # Another name for the same layer, kept for convenience.
        return None
    alone = len(set(parents)) == 1 and len({id(c) for c in parent._modules.values()}) == 1
    where = parents[0] if alone and parents[0] else names[1]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    count = sum(p.numel() for p in child.parameters())
    message = f"{shown} are one and the same module of {count:,} parameters, which runs {runs} times in a forward pass"
    reproduction = (
        "modules = dict(model.named_modules(remove_duplicate=False))\n"
        f"print(modules[{names[0]!r}] is modules[{names[1]!r}])"
    )
    severity = "warn" if _handed_out(child, names) else "fail"
    return Finding("shared_weight", severity, where, message, SHARED_HINT, reproduction)


def _handed_out(child: nn.Module, names: list[str]) -> bool:
    """Tell whether a module has a home of its own from which it is handed to parts deeper down: no accident of a list.

    Batch statistics are of one place in the network only, so sharing those is never meant.
    """
    if any(isinstance(part, BATCH_NORM) for part in child.modules()):
        return False
    homes = [name for name in names if not any(part.isdigit() for part in name.split("."))]
    return any(
        all(other == home or (other.startswith(above) and other.count(".") > home.count(".")) for other in names)
        for home in homes
        for above in [home[: len(home) - len(home.rpartition(".")[2])]]
    )


def _same_tensor(adapter: ModelAdapter, covered: set[int], declared: list[str]) -> list[Finding]:
    """Find parameters of different layers that are one tensor, or different parameters over one piece of memory."""
    module = adapter.module
    owners: dict[tuple[int, int], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        memory = parameter.data_ptr() if parameter.device.type != "meta" and parameter.numel() > 1 else 0
        owners.setdefault((memory or id(parameter), parameter.numel()), []).append(name)
    findings: dict[str, Finding] = {}
    for names in owners.values():
        parameter = module.get_parameter(names[0])
        distinct = {id(module.get_submodule(name.rpartition(".")[0])) for name in names}
        if len(names) < 2 or id(parameter) in covered or len(distinct) < 2 or not parameter.requires_grad:
            continue
        layers = [module.get_submodule(name.rpartition(".")[0]) for name in names]
        if any(isinstance(layer, nn.Embedding) for layer in layers) or _vocabulary_wide(adapter, parameter):
            continue
        if _is_declared(names, declared):
            continue
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        message = f"{shown} are one and the same tensor of {parameter.numel():,} numbers"
        reproduction = (
            "p = dict(model.named_parameters(remove_duplicate=False))\n"
            f"print(p[{names[0]!r}].data_ptr() == p[{names[1]!r}].data_ptr())"
        )
        where = names[1]
        findings.setdefault(
            where.rpartition(".")[0], Finding("shared_weight", "fail", where, message, SHARED_HINT, reproduction)
        )
    return list(findings.values())


def _vocabulary_wide(adapter: ModelAdapter, parameter: Tensor) -> bool:
    """Tell whether a weight has one row per token, as tied tables and heads have, or is the bias of such a head."""
    vocabulary = adapter.vocab_size.value
    return vocabulary is not None and vocabulary in parameter.shape


def _is_table(child: nn.Module) -> bool:
    """Tell whether a module only looks things up or scales them: shared tables of positions are usual."""
    return all(
        isinstance(part, nn.Embedding) or not list(part.parameters(recurse=False)) for part in child.modules()
    ) or (not type(child).__module__.startswith("torch.") and all(p.dim() < 2 for p in child.parameters()))


def _runs(adapter: ModelAdapter, child: nn.Module) -> int:
    """Return how often a module runs in one forward pass; of a list of modules, how often any one of them does."""
    counts: dict[int, int] = {}

    def note(name: str, ran: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        counts[id(ran)] = counts.get(id(ran), 0) + 1

    inputs = example(adapter, 0)
    with preserved(adapter.module), observe(adapter.module, note):
        answer(adapter, inputs)
    # A list does not run itself; its members do.
    parts = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return max((counts.get(id(part), 0) for part in parts), default=0)


def _announced(adapter: ModelAdapter) -> bool:
    """Tell whether a setting or an attribute of the model says that layers are shared."""
    settings = {**vars(adapter.module), **adapter.config}
    return any(
        word in key.lower().split("_") or word == key.lower()
        for key, value in settings.items()
        if isinstance(value, (bool, int)) and value and "embedding" not in key
        for word in SHARING
    )


def _declared(module: nn.Module) -> list[str]:
    """Return patterns of weight names whose sharing the author has declared, as transformers models do."""
    patterns: list[str] = []
    for child in module.modules():
        keys = getattr(child, "_tied_weights_keys", None) or ()
        patterns += [str(key) for key in keys]
        patterns += [str(value) for value in keys.values()] if isinstance(keys, dict) else []
    return patterns


def _is_declared(names: list[str], patterns: list[str]) -> bool:
    """Tell whether one of the names of a shared weight is among the declared ones."""
    return any(re.search(pattern, name) for pattern in patterns for name in names)
