"""Parameters with ``requires_grad=False``: by plan, or by accident?

Freezing follows a plan when it takes everything up to some depth, a whole part, every layer of one kind, embeddings and
fixed tables, or all but adapters and a head. A layer that is frozen while its sisters train follows none.
"""

import re
from typing import Any

from torch import Tensor, nn

from utils.adapters.capture import observe
from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Finding
from utils.validation.gradient_reach import groups, training_inputs
from utils.validation.probing import logits
from utils.validation.weight_scales import role

SHOWN = 6
HINT = "Set requires_grad = True, or list its prefix in ModelSpec(frozen=(...,)) if it is frozen on purpose."
ADAPTER_NAME = re.compile(r"lora|adapter|ia3|prompt|prefix|(^|[._])(lm_)?(head|classifier|fc|score|out)s?[._]", re.I)
TABLE_NAME = re.compile(r"pos|embed|rope|freq|sin|temperature|scale|weight_g$|original0$")
LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def frozen_parameters(adapter: ModelAdapter, parameters: dict[str, nn.Parameter], ran: dict[str, int]) -> list[Finding]:
    """Find parameters that no usual purpose for freezing explains.

    Codes: ``frozen_parameter``.

    Args:
        adapter: The model.
        parameters: Its parameters by name.
        ran: The order in which its modules ran.
    """
    frozen = [
        name
        for name, p in parameters.items()
        if not p.requires_grad and not adapter.spec.freezes(name) and p.is_floating_point()
    ]
    fixed = sum(parameters[name].numel() for name in frozen)
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    rest = sum(p.numel() for p in trainable.values())
    if fixed and not trainable:
        message = f"requires_grad is False for all {fixed:,} numbers: there is nothing to train"
        return [Finding("frozen_parameter", "fail", adapter.name, message, HINT, _reproduction(frozen[0]))]
    tables = any(isinstance(adapter.module.get_submodule(name.rpartition(".")[0]), nn.Embedding) for name in trainable)
    # Tables feed what comes first: who freezes most of a model from its start freezes them too.
    planned = _comes_first(adapter, frozen, trainable, ran) and (fixed <= rest or not tables)
    if not frozen or planned or _is_adapter(adapter, trainable):
        return []
    if fixed > rest:
        largest = max(frozen, key=lambda name: parameters[name].numel())
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in trainable))
        message = (
            f"{fixed:,} of {fixed + rest:,} numbers are frozen, this the largest tensor of them; "
            f"only {parts} train, and that is no adapter and no head"
        )
        return [Finding("frozen_parameter", "warn", largest, message, HINT, _reproduction(largest))]
    stray = {name: severity for name in frozen if (severity := _judged(adapter, name, parameters))}
    findings = []
    found = sorted(groups(adapter, list(stray), trainable=False), key=lambda group: stray[group[1][0]] != "fail")
    for index, (where, names) in enumerate(found[:SHOWN]):
        more = f"; {len(found) - SHOWN} more parts like it" if index == SHOWN - 1 and len(found) > SHOWN else ""
        count = sum(parameters[name].numel() for name in names)
        message = f"requires_grad is False for {count:,} numbers while the rest of the model trains{more}"
        place = where if len(names) > 1 else names[0]
        findings.append(Finding("frozen_parameter", stray[names[0]], place, message, HINT, _reproduction(names[0])))
    return findings


def _judged(adapter: ModelAdapter, name: str, parameters: dict[str, nn.Parameter]) -> str | None:
    """Return how severe it is that one parameter is frozen; None for a usual purpose."""
    owner_name, _, leaf = name.rpartition(".")
    owner = adapter.module.get_submodule(owner_name)
    if isinstance(owner, nn.Embedding) or TABLE_NAME.search(leaf):
        return None
    sisters = [p for key, p in parameters.items() if key != name and role(key) == role(name)]
    if any(p.requires_grad for p in sisters):
        return "fail"
    if not sisters and _stands_for_trained(adapter, name, parameters):
        return "fail"
    if sisters:
        # All of one kind: norms are frozen so for small batches; anything else is worth a look.
        return "warn" if parameters[name].dim() > 1 else None
    top = name.split(".")[0]
    layers = {key.rpartition(".")[0] for key in parameters if key.split(".")[0] == top}
    whole = not any(p.requires_grad for key, p in parameters.items() if key.split(".")[0] == top)
    if whole and len(layers) > 1:
        return None
    if isinstance(owner, LAYERS):
        return "fail"
    if parameters[name].dim() < 2 and not type(owner).__module__.startswith("torch.nn"):
        # Moved by a rule of its own, as the biases that balance the load of experts.
        return None
    alike = [child for child in adapter.module.modules() if type(child) is type(owner)]
    return "warn" if any(p.requires_grad for child in alike for p in child.parameters()) else None


def _stands_for_trained(adapter: ModelAdapter, name: str, parameters: dict[str, nn.Parameter]) -> bool:
    """Tell whether a parameter is all that its module has, and the same place in other blocks trains one of its shape.

    The layers in that place may be of another class, with another name for it.
    """
    place = name.rpartition(".")[0]
    own = {key: p for key, p in parameters.items() if key.rpartition(".")[0] == place}
    if len(own) > 1 or next(adapter.module.get_submodule(place).children(), None) is not None:
        return False
    elsewhere = [
        p for key, p in parameters.items() if key not in own and role(key.rpartition(".")[0]) == role(place) != place
    ]
    return bool(elsewhere) and all(p.requires_grad and p.shape == parameters[name].shape for p in elsewhere)


def _comes_first(
    adapter: ModelAdapter, frozen: list[str], trainable: dict[str, nn.Parameter], ran: dict[str, int]
) -> bool:
    """Tell whether everything frozen runs before everything that trains, embeddings and lone parameters aside."""

    def steps(names: list[str]) -> list[int]:
        owners = {name.rpartition(".")[0] for name in names}
        leaves = {
            owner
            for owner in owners
            if owner in ran and next(adapter.module.get_submodule(owner).children(), None) is None
        }
        return [ran[owner] for owner in leaves if not isinstance(adapter.module.get_submodule(owner), nn.Embedding)]

    fixed, moving = steps(frozen), steps(list(trainable))
    return bool(moving) and (not fixed or max(fixed) < min(moving))


def _is_adapter(adapter: ModelAdapter, trainable: dict[str, nn.Parameter]) -> bool:
    """Tell whether what trains is what one trains on top of a frozen model: adapters, prompts, vectors, the head."""
    head = last_wide_module(adapter)
    return all(
        ADAPTER_NAME.search(name)
        or p.dim() < 2
        or (head and name.startswith(f"{head}."))
        or _is_low_rank(adapter, name, p)
        for name, p in trainable.items()
    )


def _is_low_rank(adapter: ModelAdapter, name: str, parameter: Tensor) -> bool:
    """Tell whether a matrix is one of the two thin ones beside a frozen matrix that it corrects (Hu et al. 2021)."""
    owner = name.rpartition(".")[0]
    thin = min(parameter.shape[:2])
    for place in (owner, owner.rpartition(".")[0]):
        inside = adapter.module.get_submodule(place).named_parameters() if place else ()
        held = [p for _, p in inside]
        bases = [p for p in held if not p.requires_grad and p.dim() > 1]
        others = [p for p in held if p.requires_grad and p.dim() == 2 and p is not parameter]
        # However narrow the frozen matrix is: a product of its very shape is added to it.
        if any(_multiply_to(parameter, other, base) for other in others for base in bases):
            return True
        if any(2 * thin <= min(base.shape[:2]) and set(parameter.shape) & set(base.shape) for base in bases):
            return True
    return False


def _multiply_to(first: Tensor, second: Tensor, base: Tensor) -> bool:
    """Tell whether two matrices multiply, through fewer numbers than the wider side has, to the shape of a third."""
    if first.dim() != 2 or base.dim() != 2:
        return False
    for a in (first.shape, first.shape[::-1]):
        for b in (second.shape, second.shape[::-1]):
            if a[1] == b[0] < max(base.shape) and sorted((a[0], b[1])) == sorted(base.shape):
                return True
    return False


def last_wide_module(adapter: ModelAdapter) -> str | None:
    """Return the last module to finish whose output is as wide as the logits and that has no parts."""
    found: list[str] = []
    width = logits(adapter, training_inputs(adapter), whole=True).shape[-1:]

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1:] == width and next(child.children(), None) is None:
            found.append(name)

    with observe(adapter.module, note):
        logits(adapter, training_inputs(adapter))
    return found[-1] if found else None


def _reproduction(name: str) -> str:
    return f"print(model.get_parameter({name!r}).requires_grad)  # False"
