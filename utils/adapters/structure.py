"""How a model is put together: shared tensors and repeated blocks."""

from torch import nn

from utils.adapters.detection import Detection


def tied_parameters(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the groups of parameter names that are one and the same tensor, in registration order."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def blocks(module: nn.Module) -> Detection[list[str]]:
    """Return the names of the repeated blocks: the container whose like-shaped children hold the most parameters.

    Two children are alike when their parameters have the same names and shapes.
    """

    def layout(child: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((name, tuple(p.shape)) for name, p in child.named_parameters())

    best: list[str] = []
    best_size, container = 0, ""
    for name, parent in module.named_modules():
        groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[str]] = {}
        for child_name, child in parent.named_children():
            if (shape := layout(child)) and any(True for _ in child.children()):
                groups.setdefault(shape, []).append(f"{name}.{child_name}" if name else child_name)
        for group in groups.values():
            size = sum(p.numel() for member in group for p in module.get_submodule(member).parameters())
            if len(group) > 1 and size > best_size:
                best, best_size, container = group, size, name
    if not best:
        return Detection([], "no container holds two children with the same parameter names and shapes")
    return Detection(best, f"{len(best)} children of `{container or 'the model'}` have the same parameter shapes")
