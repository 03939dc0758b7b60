"""Does the input of every repeated block reach its output past the block's own layers?

A proof, not a threshold: with all matrices of a block at zero, the logits no longer tell two samples apart if nothing
leads around the block, and still do if something does. Norms keep their weights, so a norm after the addition passes,
and so do concatenation, gating and any other way around, inside the block or in the code that calls it. One pass with
all blocks at zero clears a model of residual blocks; only suspects cost more.

Stacks without skip connections are a legal design (VGG, plain MLPs). A block is at fault where its sisters of the same
shape have what it lacks, or where it holds attention, which no working design stacks bare.
"""

import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.adapters.capture import first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Finding
from utils.validation.probing import ModelCrash, logits
from utils.validation.silencing import Probe, differ, gap, matrices
from utils.validation.substitution import parameters_as, zero

HINT = "Add the block's input to its output: x = x + branch(norm(x))."
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
FEWEST_MATRICES = 3
"""Matrices in a normalised block from which it counts as more than one plain layer."""
LARGEST_FAMILY = 100
SHOWN = 3
FUSED = {
    functional.scaled_dot_product_attention,
    functional.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
}
SOFTMAX = {functional.softmax, torch.softmax, Tensor.softmax}


class AttentionWatch(TorchFunctionMode):
    """Notes in which modules attention runs: the fused call, or a softmax over scores of at least three axes.

    Attributes:
        inside: Names of the modules that ran at such a call, and of those around the layer that ended before it.
    """

    def __init__(self, module: nn.Module) -> None:
        """Prepare to follow the calls of `module`'s parts."""
        super().__init__()
        self.inside: set[str] = set()
        self._running: list[str] = []
        self._last = ""
        self._handles = []
        for name, child in module.named_modules():
            self._handles.append(child.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            self._handles.append(child.register_forward_hook(lambda *_: self._leave()))

    def _leave(self) -> None:
        self._last = self._running.pop()

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and note attention."""
        if func in FUSED or (func in SOFTMAX and args and args[0].dim() >= 3 and args[0].shape[-1] > 1):
            self.inside.update(self._running)
            self.inside.update(self._last[: dot.start()] for dot in re.finditer(r"\.", self._last))
        return func(*args, **(kwargs or {}))


def missing_residuals(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> list[Finding]:
    """Find repeated blocks, or halves of them, that no skip connection leads around.

    Codes: ``missing_residual``.

    Args:
        adapter: The model, in eval mode.
        inputs: Two samples of different content.
    """
    families = block_families(adapter.module)
    try:
        found = _missing(adapter, inputs, families) if families else []
        found = found or _bare_halves(adapter, inputs, families)
        return found or _odd_kin(adapter, inputs)
    except ModelCrash:
        # Kernels of some layers refuse what stands in for their weights; the model itself runs.
        return []


def _missing(adapter: ModelAdapter, inputs: dict[str, Tensor], families: list[list[str]]) -> list[Finding]:
    shapes_kept, passing, order, rest = _first_look(adapter, inputs, families)
    if rest > 0 or all(passing.get(name, True) for family in families for name in family):
        return []
    probe = Probe(adapter, inputs)
    watch = AttentionWatch(adapter.module)
    informed: set[str] = set()

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        before = first_tensor(given)
        if before is not None and before.dim() > 1 and differ(before):
            informed.update((name, name.rpartition(".")[0]))

    try:
        with watch, observe(adapter.module, note):
            logits(adapter, inputs)
    finally:
        watch.remove()
    findings: list[Finding] = []
    for family in families:
        # What enters the same for any sample (learned queries, latents) carries nothing that could be led around.
        blocks = [name for name in family if shapes_kept.get(name) and name in informed]
        lacking = [name for name in blocks if not passing[name] and probe.cuts(name)]
        if not lacking:
            continue
        stray = len(lacking) * 2 < len(blocks) and all(probe.matters(name) for name in blocks if name not in lacking)
        if stray and (_set_apart(adapter.module, lacking, blocks) or _leapt_over(probe, lacking, blocks, order)):
            continue
        needed = _alternate(family, families, watch.inside, order)
        suspects = [
            (name, part)
            for name in lacking
            if (stray or needed or _must_be_bypassed(adapter, name, watch.inside))
            and (part := _bare_part(probe, name, watch.inside, stray or needed)) is not None
        ]
        if suspects:
            mild = stray and not needed and not _of_one_list(adapter.module, blocks)
            mild = mild and not any(_must_be_bypassed(adapter, name, watch.inside) for name, _ in suspects)
            findings += _findings(adapter, suspects, family, stray, "warn" if mild else "fail")
    # Separate lists of attention and feed-forward parts are at fault together.
    return list({finding.where: finding for finding in reversed(findings)}.values())[::-1]


def _leapt_over(probe: Probe, lacking: list[str], blocks: list[str], order: list[str]) -> bool:
    """Tell whether blocks lack a way around only because no sister follows that reads what came before them.

    Cells of NASNet read the two cells before each: any one can be leapt over but the last, and two in a row cannot. A
    true skip connection holds however many are silenced, so the others together would let the last ones be reached.
    """
    others = [name for name in blocks if name not in lacking]
    last = [name for name in order if name in blocks][-len(lacking) :]
    return set(last) == set(lacking) and all(probe.hidden(others))


def _bare_halves(adapter: ModelAdapter, inputs: dict[str, Tensor], families: list[list[str]]) -> list[Finding]:
    """Find feed-forward halves kept as lists of single layers, beside a list of attention, that nothing leads around.

    Only the widening layer is looked at: it starts a branch, while one that narrows may merge streams.
    """
    lists = _widening_lists(adapter.module)
    lists = [wide for wide in lists if any(len(wide) == len(family) for family in families)]
    if not lists:
        return []
    watch = AttentionWatch(adapter.module)
    order: list[str] = []

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        order.append(name)

    try:
        with watch, observe(adapter.module, note):
            logits(adapter, inputs)
    finally:
        watch.remove()
    probe: Probe | None = None
    for wide in lists:
        if _alternate(wide, families, watch.inside, order):
            probe = probe or Probe(adapter, inputs)
            if lacking := [name for name in wide if probe.cuts(name)]:
                suspects = [(name, name) for name in lacking]
                return _findings(adapter, suspects, wide, stray=len(lacking) < len(wide))
    return []


def _widening_lists(module: nn.Module) -> list[list[str]]:
    """Return the lists of at least two linear layers of one shape that put out more than they read."""
    found = []
    for name, parent in module.named_modules():
        children = dict(parent.named_children())
        shapes = {tuple(c.weight.shape) if isinstance(c, nn.Linear) else (0, 0) for c in children.values()}
        if isinstance(parent, nn.ModuleList) and 1 < len(children) <= LARGEST_FAMILY and len(shapes) == 1:
            rows, columns = shapes.pop()
            if rows > columns > 1:
                found.append([f"{name}.{child}" if name else child for child in children])
    return found


def _odd_kin(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> list[Finding]:
    """Find the unit that lacks what all units of the same build, of any width and anywhere, do inside: pass input on.

    What the caller adds is no part of a unit, and says nothing about units elsewhere. Of units outside of one list it
    is only worth a look: they may have another job, as a projector behind the blocks has.
    """
    groups = _kin(adapter.module)
    if not groups:
        return []
    kept, passing = _pass_inside(adapter, inputs, [name for group in groups for name in group])
    probe: Probe | None = None
    for group in groups:
        units = [name for name in group if kept.get(name) and name in passing]
        lacking = [name for name in units if not passing[name]]
        if not lacking or len(lacking) * 2 >= len(units) or _set_apart(adapter.module, lacking, units):
            continue
        probe = probe or Probe(adapter, inputs)
        if all(probe.cuts(name) for name in lacking):
            severity = "fail" if _of_one_list(adapter.module, units) else "warn"
            return _findings(adapter, [(name, name) for name in lacking], units, stray=True, severity=severity)
    return []


def _of_one_list(module: nn.Module, units: list[str]) -> bool:
    """Tell whether units are members of one list, or stand at places whose names differ in numbers only.

    So do the units of the stages of one trunk.
    """
    if len({re.sub(r"\d+", "#", name) for name in units}) == 1:
        return True
    parents = {name.rpartition(".")[0] for name in units}
    return len(parents) == 1 and isinstance(module.get_submodule(parents.pop()), (nn.ModuleList, nn.Sequential))


def _set_apart(module: nn.Module, lacking: list[str], units: list[str]) -> bool:
    """Tell whether settings say why some units differ: a number or flag that none of the others has.

    A number that no two units share counts them, and says nothing about those of another class.
    """
    settings = {name: _settings(module.get_submodule(name)) for name in units}
    others = [name for name in units if name not in lacking]
    kinds = [{type(module.get_submodule(name)) for name in group} for group in (lacking, others)]
    for key in set[tuple[str, str]]().union(*(settings[name] for name in lacking)):
        values = [settings[name].get(key) for name in units]
        counts = len(set(values)) == len(values)
        if {settings[name].get(key) for name in lacking}.isdisjoint(settings[name].get(key) for name in others) and (
            kinds[0] <= kinds[1] or not counts
        ):
            return True
    return False


def _settings(unit: nn.Module) -> dict[tuple[str, str], int]:
    """Return the whole numbers and flags that a unit and the parts of it that are no layers of torch's hold."""
    return {
        (part, key): value
        for part, child in unit.named_modules()
        if not type(child).__module__.startswith("torch.")
        for key, value in vars(child).items()
        if isinstance(value, int) and not key.startswith("_") and key != "training"
    }


def _kin(module: nn.Module) -> list[list[str]]:
    """Return the groups of three modules or more with parts of the same names and types and at least two matrices."""
    groups: dict[Any, list[str]] = {}
    for name, child in module.named_modules():
        if name and next(child.children(), None) is not None and not isinstance(child, (nn.Sequential, nn.ModuleList)):
            build = tuple((key, type(part)) for key, part in child.named_modules() if key)
            groups.setdefault(build, []).append(name)
    return [
        group for group in groups.values() if 2 < len(group) <= LARGEST_FAMILY and len(matrices(module, group[0])) > 1
    ]


def _pass_inside(
    adapter: ModelAdapter, inputs: dict[str, Tensor], units: list[str]
) -> tuple[dict[str, bool], dict[str, bool]]:
    """Return which units keep their input's shape, and which, silenced, still put out what differs by sample.

    Behind a unit that stops everything no other can be judged, so it is left as it is in the next pass.
    """
    kept: dict[str, bool] = {}
    passing: dict[str, bool] = {}

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        before, after = first_tensor(given), first_tensor(output)
        if name in left and before is not None and after is not None and before.dim() > 1:
            kept[name] = before.is_floating_point() and before.shape == after.shape and kept.get(name, True)
            if differ(before):
                passing[name] = differ(after) and passing.get(name, True)

    left = set(units)
    for _ in range(SHOWN):
        known = {name for name, passes in passing.items() if not passes or not kept[name]}
        left -= known
        names = [name for part in left for name in matrices(adapter.module, part)]
        with parameters_as(adapter, names, zero), observe(adapter.module, note):
            logits(adapter, inputs)
        if all(passing.get(name, False) for name in left):
            break
    return kept, passing


def block_families(module: nn.Module) -> list[list[str]]:
    """Return the groups of sister modules with the same parameter names and shapes, outermost groups only.

    Sisters are children of one parent that have parts of their own and at least one matrix.
    """
    families: list[list[str]] = []
    taken: list[str] = []
    for name, parent in module.named_modules():
        if any(name == member or name.startswith(f"{member}.") for member in taken):
            continue
        groups: dict[Any, list[str]] = {}
        for child_name, child in parent.named_children():
            if next(child.children(), None) is None:
                continue
            layout = tuple((key, tuple(p.shape)) for key, p in child.named_parameters())
            if any(len(shape) > 1 for _, shape in layout):
                groups.setdefault(layout, []).append(f"{name}.{child_name}" if name else child_name)
        for group in groups.values():
            if 1 < len(group) <= LARGEST_FAMILY:
                families.append(group)
                taken += group
    return families


def _first_look(
    adapter: ModelAdapter, inputs: dict[str, Tensor], families: list[list[str]]
) -> tuple[dict[str, bool], dict[str, bool], list[str], float]:
    """Run the model with all blocks silenced.

    Returns:
        Which blocks keep the shape of a real input; in which of these the samples still differ on the way out; the
        order in which they ran; by how much the samples differ in the logits, beyond rounding.
    """
    every = {name for family in families for name in family}
    shapes_kept: dict[str, bool] = {}
    passing: dict[str, bool] = {}

    # A plain container never runs: what enters its first layer and leaves its last one stands for it.
    plain = {name for name in every if isinstance(adapter.module.get_submodule(name), (nn.ModuleDict, nn.ModuleList))}
    entering: dict[str, Tensor] = {}

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        before, after = first_tensor(given), first_tensor(output)
        if before is None or after is None:
            return
        for block in (part for part in plain if name.startswith(f"{part}.")):
            shapes_kept[block] = entering.setdefault(block, before).shape == after.shape
            passing[block] = False
        if name in every:
            kept = before.is_floating_point() and before.dim() > 1 and before.shape == after.shape
            shapes_kept[name] = kept and shapes_kept.get(name, True)
            passing[name] = shapes_kept[name] and differ(before) and differ(after)

    names = [name for part in every for name in matrices(adapter.module, part)]
    with parameters_as(adapter, names, zero), observe(adapter.module, note):
        result = logits(adapter, inputs)
    rest = gap(result) if len(adapter.input_names) == 1 and bool(torch.isfinite(result).all()) else 0.0
    return shapes_kept, passing, list(passing), rest if rest > 1e-5 * float(result.abs().max()) else 0.0


def _bare_part(probe: Probe, block: str, attending: set[str], sure: bool) -> str | None:
    """Return the part of a block without a way around it: one child if it alone cuts the block, else the block.

    A single square or narrowing layer in the way (a projection in front of the branches, a merge of two streams) is
    linear and lets everything pass, so it is none.
    """
    module = probe.adapter.module
    parts = [f"{block}.{name}" for name, _ in module.get_submodule(block).named_children()]
    cut = [part for part in parts if matrices(module, part) and probe.cuts(part)]
    heavy = [part for part in cut if part in attending or _is_branch(module.get_submodule(part))]
    if len(heavy) == 1:
        return heavy[0]
    return block if heavy or sure or not cut or not _is_whole_block(probe.adapter, block) else None


def _is_branch(module: nn.Module) -> bool:
    """Tell whether a part of a block does more than one linear map that keeps the width."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    return len(weights) > 1 or weights[0].shape[0] > weights[0].shape[1] > 1


def _must_be_bypassed(adapter: ModelAdapter, block: str, attending: set[str]) -> bool:
    """Tell whether no working design stacks such blocks bare: they hold attention, or a norm and several matrices."""
    if block in attending:
        return True
    module = adapter.module.get_submodule(block)
    normalised = any(isinstance(child, NORMS) for child in module.modules())
    return normalised and len(matrices(adapter.module, block)) >= FEWEST_MATRICES


def _alternate(family: list[str], families: list[list[str]], attending: set[str], order: list[str]) -> bool:
    """Tell whether the members take turns with modules of attention, as the halves of transformer blocks do."""
    for other in families:
        if other is not family and len(other) == len(family) and set(other) <= attending:
            turns = [name in other for name in order if name in other or name in family]
            if len(turns) == 2 * len(family) and all(a != b for a, b in pairwise(turns)):
                return True
    return False


def _findings(
    adapter: ModelAdapter, suspects: list[tuple[str, str]], family: list[str], stray: bool, severity: str = "fail"
) -> list[Finding]:
    """Describe the blocks of one family that lack a skip connection."""
    block, part = suspects[0]
    # A bare attention or feed-forward module has no way to know its place: whoever calls it adds its input.
    caller = block.rpartition(".")[0].rpartition(".")[0] or adapter.name
    inside = f" around {part.removeprefix(block + '.')}" if part != block else ""
    message = (
        f"no skip connection leads{inside or ' around it'} ({len(suspects)} of {len(family)} sister blocks lack it): "
        f"with the matrices of {part} at zero, two samples get the same logits"
    )
    reproduction = (
        f"part = model.get_submodule({part!r})\n"
        "from utils import ModelAdapter; matrices = [p.data.zero_() for p in part.parameters() if p.dim() > 1]\n"
        "a = ModelAdapter(model); y = a.logits(a.example_inputs()); print((y[0] - y[-1]).abs().max())"
    )
    whole = stray or _is_whole_block(adapter, block)
    places = [name for name, _ in suspects] if whole else [caller]
    if len(places) > SHOWN or len(places) == len(family):
        places = places[:1]
    return [Finding("missing_residual", severity, place, message, HINT, reproduction) for place in places]


def _is_whole_block(adapter: ModelAdapter, block: str) -> bool:
    """Tell whether a module's own code puts branches together, rather than being one branch of its caller's."""
    module = adapter.module.get_submodule(block)
    if isinstance(module, (nn.Sequential, nn.MultiheadAttention)):
        return False
    return any(isinstance(child, NORMS) for child in module.modules()) or len(matrices(adapter.module, block)) > 4
