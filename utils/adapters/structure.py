"""How a model is put together, found by following one forward pass: no class is recognised by its name.

Everything that later changes a model's size needs is here by parameter, axis and index: which rows of which weight
belong to which attention head, and which axis of which weights is the hidden size of a feed-forward pair.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.detection import Detection, embedding_uses
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.provenance import traced
from utils.adapters.traces import Layer, Trace
from utils.adapters.wiring import AttentionModule, FeedForward, Wiring

BATCH = 2
ALIKE = 0.8
"""Share of parameters, by name and shape, that blocks of one stack have in common."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A table or parameter that is read by index or added by place."""

    name: str
    """The module, or the parameter where no module owns it alone."""
    kind: str
    """``"token"``, ``"position"``, or ``"other"`` for types, segments and the like."""
    rows: int
    """Number of vectors."""
    width: int
    """Length of each."""


@dataclass(frozen=True)
class Stage:
    """Convolutions at one resolution."""

    modules: tuple[str, ...]
    """Names in order."""
    channels: int
    """Channels of the last one's output."""
    resolution: tuple[int, ...]
    """Spatial size of their outputs for the example input."""


@dataclass(frozen=True)
class Structure:
    """The parts of a model, each with how it was found."""

    blocks: Detection[list[str]]
    """The largest stack of repeated blocks."""
    stacks: Detection[list[list[str]]]
    """Every stack, such as an encoder's and a decoder's, in order."""
    embeddings: Detection[list[EmbeddingTable]]
    """Tables that read tokens, and those for positions and types."""
    head: Detection[str | None]
    """The module whose output is the logits."""
    attentions: Detection[list[AttentionModule]]
    """Every attention, in order of execution."""
    feed_forwards: Detection[list[FeedForward]]
    """Every pair of linear layers that widens and narrows, in order of execution."""
    norms: Detection[list[str]]
    """Normalisations."""
    width: Detection[int | None]
    """Width of what blocks hand on to each other: features of a token, or channels."""
    ties: Detection[list[tuple[str, ...]]]
    """Groups of names for one parameter."""
    stages: Detection[list[Stage]]
    """Resolutions of a convolutional model."""

    def describe(self) -> list[dict[str, Any]]:
        """Return one row ``{"name", "value", "reason"}`` per part, with counts for long lists."""
        rows = []
        for name in self.__dataclass_fields__:
            found: Detection[Any] = getattr(self, name)
            value = len(found.value) if isinstance(found.value, list) else found.value
            rows.append({"name": name, "value": value, "reason": found.reason})
        return rows


def structure(adapter: ModelAdapter) -> Structure:
    """Find the parts of a model with two forward passes on an example; the model comes back as it was.

    Args:
        adapter: The model.

    Raises:
        AdapterError: No forward pass succeeds.
    """
    module = adapter.module
    main, stacks = blocks(module), block_stacks(module)
    members = [name for stack in stacks.value for name in stack]
    inputs = adapter.example_inputs(BATCH)
    wiring = Wiring(module, members, BATCH)
    with adapter.isolated():
        with traced(module, wiring.contraction, wiring.layer) as tracer:
            logits = adapter.logits(inputs)
            last = tracer.trace(logits)
        seen = _Seen(members, logits)
        with observe(module, seen):
            adapter.logits(inputs)
        embeddings = _embeddings(adapter, inputs, seen)
    return Structure(
        blocks=main,
        stacks=stacks,
        embeddings=embeddings,
        head=_head(last, seen),
        attentions=wiring.attentions(),
        feed_forwards=wiring.feed_forwards(),
        norms=Detection(seen.norms, "modules of torch that normalise, or whose output stays when their input doubles"),
        width=_width(seen, main.value),
        ties=Detection(tied_parameters(module), "parameters that are one tensor under several names"),
        stages=_stages(seen),
    )


def tied_parameters(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the groups of parameter names that are one and the same tensor, in registration order."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def blocks(module: nn.Module) -> Detection[list[str]]:
    """Return the names of the repeated blocks: the container whose like-shaped children hold the most parameters.

    Two children are alike when nearly all of their parameters have the same names and shapes.
    """
    best: tuple[int, str, list[str]] = (0, "", [])
    for size, container, group in _repeated(module):
        if size > best[0]:
            best = size, container, group
    if not best[2]:
        return Detection([], "no container holds two children with the same parameter names and shapes")
    return Detection(best[2], f"{len(best[2])} children of `{best[1] or 'the model'}` have the same parameter shapes")


def block_stacks(module: nn.Module) -> Detection[list[list[str]]]:
    """Return every stack of repeated blocks that is not inside a block of another, in order of registration.

    A stack counts when it holds at least a tenth of the parameters of the largest one.
    """
    found = sorted(_repeated(module), key=lambda item: -item[0])
    kept: list[list[str]] = []
    for size, _, group in found:
        inside = any(name == other or name.startswith(f"{other}.") for s in kept for other in s for name in group)
        around = any(other.startswith(f"{name}.") for s in kept for other in s for name in group)
        if not inside and not around and size >= 0.1 * found[0][0]:
            kept.append(group)
    order = [name for name, _ in module.named_modules()]
    kept.sort(key=lambda group: order.index(group[0]))
    return Detection(kept, f"{len(kept)} containers hold children with the same parameter names and shapes")


def lone_blocks(module: nn.Module) -> list[str]:
    """Return the blocks that are the only ones of their list, the largest first."""
    names = [
        f"{name}.0".lstrip(".")
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == 1 and any(True for _ in child[0].children())
    ]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return sorted(outermost, key=lambda name: -sum(p.numel() for p in module.get_submodule(name).parameters()))


def _repeated(module: nn.Module) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the parameters, container and names of every group of like-shaped children."""
    for name, parent in module.named_modules():
        groups: list[tuple[set[tuple[str, tuple[int, ...]]], list[str]]] = []
        for child_name, child in parent.named_children():
            shape = {(key, tuple(p.shape)) for key, p in child.named_parameters()}
            if not shape or next(child.children(), None) is None:
                continue
            full = f"{name}.{child_name}" if name else child_name
            group = next((members for first, members in groups if _alike(first, shape)), None)
            if group is None:
                groups.append((shape, [full]))
            else:
                group.append(full)
        for _, group in groups:
            if len(group) > 1:
                yield sum(p.numel() for member in group for p in module.get_submodule(member).parameters()), name, group


def _alike(first: set[tuple[str, tuple[int, ...]]], second: set[tuple[str, tuple[int, ...]]]) -> bool:
    """Tell whether two blocks are the same but for a small extra, such as a bias table that only the first one has."""
    return len(first & second) >= ALIKE * max(len(first), len(second))


class _Seen:
    """What modules return: an observer for `observe`."""

    def __init__(self, members: list[str], logits: Tensor) -> None:
        self.members, self.logits = set(members), logits
        self.norms: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.convolutions: dict[str, tuple[int, ...]] = {}
        self.widest: str | None = None

    def __call__(self, name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        """Take in one module's call."""
        result, argument = first_tensor(output), first_tensor(given)
        if result is None:
            return
        if name in self.members:
            self.shapes.setdefault(name, tuple(result.shape))
        if next(child.children(), None) is not None:
            return
        if isinstance(child, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            self.convolutions.setdefault(name, tuple(result.shape))
        if name not in self.norms and argument is not None and _normalises(child, argument, result):
            self.norms.append(name)
        if result.shape[-1:] == self.logits.shape[-1:] and next(child.parameters(), None) is not None:
            self.widest = name


def _normalises(child: nn.Module, argument: Tensor, result: Tensor) -> bool:
    """Tell whether a module without parts normalises: its output stays when its input doubles."""
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    if isinstance(child, known):
        return True
    sizes = [p.dim() for p in child.parameters()]
    if not sizes or max(sizes) > 1 or argument.shape != result.shape or not argument.is_floating_point():
        return False
    try:
        doubled = first_tensor(child.forward(argument * 2))
    except Exception:
        return False
    return doubled is not None and bool(((doubled - result).abs().max() <= 0.05 * result.abs().max()).item())


def _head(last: Trace | None, seen: _Seen) -> Detection[str | None]:
    """Name the module that makes the logits."""
    layers: list[Layer] = [] if last is None else [last.layer] if last.layer is not None else list(last.last)
    if len(layers) == 1:
        return Detection(layers[0].where, "the logits are the output of this linear layer")
    if seen.widest is not None:
        return Detection(seen.widest, "the last module with parameters whose output is as wide as the logits")
    return Detection(None, "no module returns something as wide as the logits")


def _width(seen: _Seen, main: list[str]) -> Detection[int | None]:
    """Return the width of what the blocks of the largest stack hand on."""
    shapes = [seen.shapes[name] for name in main if name in seen.shapes]
    if not shapes:
        return Detection(None, "there are no repeated blocks that return a tensor")
    widths = Counter(shape[1] if len(shape) == 4 else shape[-1] for shape in shapes)
    width, count = widths.most_common(1)[0]
    return Detection(width, f"width of the output of {count} of {len(shapes)} blocks")


def _stages(seen: _Seen) -> Detection[list[Stage]]:
    """Group convolutions by the resolution of what they return."""
    stages: list[Stage] = []
    for name, shape in seen.convolutions.items():
        resolution = tuple(shape[2:])
        if stages and stages[-1].resolution == resolution:
            stages[-1] = Stage((*stages[-1].modules, name), shape[1], resolution)
        else:
            stages.append(Stage((name,), shape[1], resolution))
    return Detection(stages, f"{len(seen.convolutions)} convolutions in order, grouped by the size of their output")


def _embeddings(adapter: ModelAdapter, inputs: dict[str, Tensor], seen: _Seen) -> Detection[list[EmbeddingTable]]:
    """Find tables by what they are asked for, and position parameters by their shape."""
    found: list[EmbeddingTable] = []
    module = adapter.module
    if adapter.modality == "tokens":
        for use in embedding_uses(module, lambda: adapter.logits(inputs), inputs, adapter.main_input):
            kind = (
                "token"
                if use.reads_tokens or _decoder(use.reads)
                else "position"
                if use.offset is not None
                else "other"
            )
            width = int(getattr(module.get_submodule(use.name), "embedding_dim", 0))
            found.append(EmbeddingTable(use.name, kind, use.rows, width))
    lengths = {shape[1:] for shape in seen.shapes.values() if len(shape) == 3}
    leaves = {id(p) for child in module.modules() if not any(child.children()) for p in child.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        shape = (
            tuple(parameter.shape[1:]) if parameter.dim() == 3 and parameter.shape[0] == 1 else tuple(parameter.shape)
        )
        if id(parameter) not in leaves and len(shape) == 2 and shape[0] > 1 and any(
            shape[1] == width and length - 2 <= shape[0] <= length for length, width in lengths
        ):  # fmt: skip
            found.append(EmbeddingTable(name, "position", *shape))
    return Detection(found, "tables by the numbers they are asked for; parameters with one vector per place")


def _decoder(reads: str | None) -> bool:
    """Tell whether a table reads the ids of another side of the model."""
    return reads is not None and not reads.endswith(("type_ids", "position_ids", "mask"))
