"""Units and parts that start equal and stay equal, proven by training a copy.

Equal weights are no fault in themselves: different inputs or different readers drive them apart with the first step. So
a copy in float64 takes a few steps, in train mode and towards random answers. What is equal to the last digit after
them, and has moved, stays equal whatever the model is trained for.
"""

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.resources import is_out_of_memory
from utils.runtime.seeding import seed_streams
from utils.validation.check import Finding
from utils.validation.dependence import as_double, double_twin
from utils.validation.probing import has_length, logits, short_length
from utils.validation.substitution import parameters_as

STEPS = 4
STEP = 0.1
"""Length of a step, as a share of the length of all weights."""
EQUAL = 1e-9
"""Share of how far equal units moved, from which on what lies between them is more than rounding of float64."""
SHOWN = 6
HINT = "Initialise each with random numbers of its own: what starts equal and is used alike has the power of one."


def stays_equal(adapter: ModelAdapter) -> list[Finding]:
    """Find equal units of a weight and equal sister modules that training cannot tell apart.

    Codes: ``symmetric_init``.
    """
    axes = _equal_axes(adapter.module)
    sisters = _equal_sisters(adapter.module)
    if not (axes or sisters) or (twin := double_twin(adapter)) is None:
        return []
    before = {name: p.detach().clone() for name, p in twin.module.named_parameters()}
    now = {name: p.detach() for name, p in twin.module.named_parameters()}
    units = {(name, axis): [_slices(now, before, name, axis)] for name, axis in axes}
    parts = {
        (parent, *names): [
            [(before[f"{name}.{key}"], now[f"{name}.{key}"]) for name in names]
            for key, _ in twin.module.get_submodule(names[0]).named_parameters()
        ]
        for parent, names in sisters
    }
    try:
        for step in range(STEPS):
            if not _step(twin, step):
                return []
            units = {key: groups for key, groups in units.items() if all(_together(group) for group in groups)}
            parts = {key: groups for key, groups in parts.items() if all(_together(group) for group in groups)}
            if not units and not parts:
                return []
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # What does not train in float64, or not at all, is the business of other checks.
        return []
    findings: list[Finding] = []
    for (parent, *names), groups in parts.items():
        if any(_moved(group) for group in groups):
            message = f"{', '.join(names)} start equal, get equal gradients and are equal after {STEPS} steps"
            a, b = (f"model.get_submodule({name!r}).parameters()" for name in names[:2])
            lines = f"import torch\nprint(all(torch.equal(a, b) for a, b in zip({a}, {b})))  # True"
            findings.append(Finding("symmetric_init", "fail", parent or adapter.name, message, HINT, lines))
    for (name, axis), groups in units.items():
        if _moved(groups[0]) and name not in [finding.where for finding in findings]:
            if not _output_axes(adapter.module, name) and _only_add_up(twin, name, axis):
                continue
            shape = tuple(before[name].shape)
            message = (
                f"all {shape[axis]} slices along axis {axis} of the weight {shape} start equal, get equal gradients "
                f"and are equal after {STEPS} steps"
            )
            lines = f"w = model.get_parameter({name!r})\nprint((w == w.narrow({axis}, 0, 1)).all())  # True"
            findings.append(Finding("symmetric_init", "fail", name, message, HINT, lines))
    return findings[:SHOWN]


def _slices(now: dict[str, Tensor], before: dict[str, Tensor], name: str, axis: int) -> list[tuple[Tensor, Tensor]]:
    """Return the slices of a weight, each with what it was."""
    return list(zip(before[name].unbind(axis), now[name].unbind(axis), strict=True))


def _output_axes(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the axis of a weight along which its layer's units lie; empty where nothing says which one it is.

    Along the other axis lie the inputs: slices that read equal inputs stay equal, and lose nothing by it.
    """
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd)):
        return (1,)
    known = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    return (0,) if isinstance(owner, known) else ()


def _only_add_up(twin: ModelAdapter, name: str, axis: int) -> bool:
    """Tell whether only the sum of two slices counts: then they read equal inputs, or are read as one number.

    What one slice gains the other loses. Units between which something bends would answer otherwise.
    """
    length = short_length(twin) if has_length(twin) else None
    inputs = as_double(twin.example_inputs(3, length))
    twin.module.eval()
    seed_streams(0, "symmetry")
    move = torch.randn_like(twin.module.get_parameter(name).detach().narrow(axis, 0, 1))
    move *= float(twin.module.get_parameter(name).detach().square().mean().sqrt())

    def shifted(parameter: Tensor) -> Tensor:
        shifted = parameter.clone()
        shifted.narrow(axis, 0, 1).add_(move)
        shifted.narrow(axis, 1, 1).sub_(move)
        return shifted

    before = logits(twin, inputs)
    with parameters_as(twin, [name], shifted):
        after = logits(twin, inputs)
    return float((after - before).abs().max()) <= EQUAL * float(before.abs().max())


def _equal_axes(module: nn.Module) -> list[tuple[str, int]]:
    """Return weights and each axis along which all their units are one; zeros and single numbers say nothing."""
    found = []
    for name, weight in module.named_parameters():
        if not weight.requires_grad or weight.dim() < 2 or not weight.is_floating_point():
            continue
        for axis in _output_axes(module, name) or range(weight.dim()):
            if weight.shape[axis] < 2 or weight.numel() == weight.shape[axis]:
                continue
            values, first = weight.detach(), weight.detach().narrow(axis, 0, 1)
            # The cheap comparison spares large tensors the full one.
            same = torch.equal(first, values.narrow(axis, 1, 1)) and bool((values == first).all())
            if same and bool(first.any()):
                found.append((name, axis))
    return found


def _equal_sisters(module: nn.Module) -> list[tuple[str, list[str]]]:
    """Return groups of children of one module, with the parent's name, that hold equal matrices and share none."""
    found = []
    for parent, owner in module.named_modules():
        groups: list[tuple[list[nn.Parameter], list[str]]] = []
        for key, child in owner.named_children():
            held = [p for p in child.parameters() if p.numel()]
            # Norms and the like start equal everywhere: something drawn must be equal.
            if not any(p.dim() > 1 and p.requires_grad and bool((p != p.flatten()[:1]).any()) for p in held):
                continue
            name = f"{parent}.{key}" if parent else key
            for known, names in groups:
                if _same(known, held):
                    names.append(name)
                    break
            else:
                groups.append((held, [name]))
        found += [(parent, names) for _, names in groups if len(names) > 1]
    return found


def _same(first: list[nn.Parameter], second: list[nn.Parameter]) -> bool:
    """Tell whether two lists of parameters have the same values and are not the same objects."""
    if len(first) != len(second) or any(a is b or a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return False
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(first, second, strict=True))


def _step(twin: ModelAdapter, step: int) -> bool:
    """Take a step of gradient descent towards random answers; False where no gradient arrives."""
    twin.module.train()
    parameters = [p for p in twin.module.parameters() if p.requires_grad]
    length = short_length(twin) if has_length(twin) else None
    seed_streams(step, "symmetry")
    result = twin.logits(as_double(twin.example_inputs(3, length, seed=step)))
    loss = (result.double() - torch.randn_like(result, dtype=torch.float64)).square().mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    size = _length([gradient for gradient in gradients if gradient is not None])
    if not 0 < size < float("inf"):
        return False
    scale = STEP * _length(parameters) / size
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(scale * (gradient.to_dense() if gradient.is_sparse else gradient))
    return True


def _length(tensors: list[Tensor] | list[nn.Parameter]) -> float:
    """Return the length of many tensors as one vector."""
    return sum(float((t.to_dense() if t.is_sparse else t).detach().square().sum()) for t in tensors) ** 0.5


def _together(group: list[tuple[Tensor, Tensor]]) -> bool:
    """Tell whether tensors, given before and after training, are still equal."""
    first = group[0][1]
    apart = max(float((after - first).abs().max()) for _, after in group)
    return apart <= EQUAL * max(float((after - before).abs().max()) for before, after in group)


def _moved(group: list[tuple[Tensor, Tensor]]) -> bool:
    """Tell whether training changed a tensor of a group."""
    return any(bool((after != before).any()) for before, after in group)
