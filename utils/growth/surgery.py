"""Plans are applied to a live model here, and undone: the very objects that were there come back.

The model stays the same object, so whatever holds it (a trainer, an average of the weights, an adapter) need not be
told. Each parameter that changes becomes a new object; the old one, untouched, waits in the undo.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.growth.edits import (
    Edit,
    Gate,
    GrowthError,
    GrowthRefusedError,
    InsertBlock,
    InsertLayer,
    KeepBlocks,
    LineageError,
    Number,
    Overwrite,
    Plan,
    Scale,
    Widen,
)
from utils.growth.gated_block import GatedBlock
from utils.runtime.seeding import derive_seed, isolated_streams
from utils.training.state import Insertion, ModelChange, TensorChange

Place = tuple[dict[str, Any], str]
"""A module's table of parameters or buffers, and the name in it."""


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of a name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


class Surgery:
    """One plan on one model.

    Attributes:
        change: What parts of a run's state must know.
    """

    def __init__(
        self, module: nn.Module, plan: Plan, seed: int = 0, step: int = 0, mean: bool = False, number: int = 0
    ) -> None:
        """Apply a plan; when an edit fails, the model is as it was.

        Args:
            module: The model.
            plan: What to do.
            seed: Seed of what is drawn.
            step: Optimizer steps done, for the change.
            mean: See `ModelChange.mean`.
            number: Of the event, so that two at one step draw different numbers.

        Raises:
            LineageError: The plan does not fit the model.
            GrowthRefusedError: A parameter has hooks, or is of a kind of its own, that a larger one would lose.
        """
        self.module = module
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "growth", step, number))
        self._undos: list[Callable[[], None]] = []
        before = dict(module.named_parameters())
        self._history: dict[int, TensorChange] = {
            id(tensor): TensorChange(source=name) for name, tensor in (*before.items(), *module.named_buffers())
        }
        try:
            # Constructors and copies may draw; what the caller draws next does not depend on that.
            with isolated_streams():
                for edit in plan.edits:
                    self._apply(edit)
        except GrowthError:
            self.undo()
            raise
        except Exception as error:
            self.undo()
            raise LineageError(
                f"The growth step {plan.describe()} does not fit {type(module).__name__}: {error}",
                "Expected the model for which it was planned.",
                "Use the source and the lineage of the same run.",
            ) from error
        after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        changes = {
            name: self._history[id(tensor)]
            for name, tensor in after.items()
            if self._history[id(tensor)] != TensorChange(source=name)
        }
        self.change = ModelChange(
            plan.operator, step, dict(module.named_parameters()), dict(module.named_buffers()), changes, before, mean
        )

    def undo(self) -> None:
        """Put everything back as it was."""
        while self._undos:
            self._undos.pop()()

    def _apply(self, edit: Edit) -> None:
        """Apply one edit."""
        if isinstance(edit, Widen):
            self._widen(edit)
        elif isinstance(edit, Scale):
            how = self._of(edit.name)
            moved = (self._tensor(edit.name) - edit.around) * edit.factor + edit.around
            self._renew(edit.name, moved, TensorChange(
                how.source, how.like, how.insertions, how.factor * edit.factor, edit.around
            ))  # fmt: skip
        elif isinstance(edit, Overwrite):
            how = self._of(edit.name)
            new = torch.full_like(self._tensor(edit.name), edit.value)
            self._renew(edit.name, new, TensorChange(like=how.source or how.like))
        elif isinstance(edit, Number):
            self._number(edit)
        elif isinstance(edit, InsertBlock):
            self._insert(edit)
        elif isinstance(edit, InsertLayer):
            self._insert_layer(edit)
        elif isinstance(edit, KeepBlocks):
            blocks = self._blocks(edit.container)
            del blocks[edit.first : edit.last]
            self._hold(edit.container, blocks)
        else:
            self._gate(edit)

    def _tensor(self, name: str) -> Tensor:
        """Return the values of a parameter or buffer."""
        return tensor_of(self.module, name).detach()

    def _of(self, name: str) -> TensorChange:
        how = self._history.get(id(tensor_of(self.module, name)))
        if how is None:
            raise ValueError(f"{name} is computed, and no parameter or buffer")
        return how

    def _widen(self, edit: Widen) -> None:
        old, how = self._tensor(edit.name), self._of(edit.name)
        if edit.axis >= old.dim() or any(place > old.shape[edit.axis] for place, _ in edit.places):
            raise ValueError(f"{edit.name} has the shape {tuple(old.shape)}")
        insertion = Insertion(edit.axis, edit.places, edit.fill == "mean")
        new = insertion.applied(old, lambda shape: self._filled(edit, old, shape))
        change = TensorChange(how.source, how.like, (*how.insertions, insertion), how.factor, how.around)
        self._renew(edit.name, new, change)

    def _filled(self, edit: Widen, old: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Make the new entries of one place."""
        if edit.fill == "like":
            deviation = float(old.float().std(unbiased=False)) if old.numel() > 1 else 0.0
            return torch.randn(shape, generator=self.generator) * deviation
        if edit.fill == "mean":
            return old.mean(edit.axis, keepdim=True).expand(shape)
        if edit.fill == "copy":
            return old.narrow(edit.axis, int(edit.value), 1).expand(shape)
        values = {"zero": 0.0, "one": 1.0, "value": edit.value}
        if edit.fill not in values:
            raise ValueError(f"nothing is known of the filling {edit.fill!r}")
        return torch.full(shape, values[edit.fill])

    def _renew(self, name: str, values: Tensor, how: TensorChange) -> None:
        """Put a new tensor wherever the old one of a name is."""
        old = tensor_of(self.module, name)
        places: list[Place] = [
            (table, key)
            for child in self.module.modules()
            for table in (child._parameters, child._buffers)
            for key, held in table.items()
            if held is old
        ]
        values = values.detach().to(old.dtype).contiguous()
        if isinstance(old, nn.Parameter):
            _check_plain(name, old)
            new: Tensor = nn.Parameter(values, old.requires_grad)
        else:
            new = values
        new.__dict__.update(old.__dict__)
        self._history[id(new)] = how
        for table, key in places:
            self._put(table, key, new)

    def _put(self, table: dict[str, Any], key: str, value: Any) -> None:
        """Set an entry of a table; the undo puts the old one back."""
        old = table[key]
        table[key] = value
        self._undos.append(lambda: table.__setitem__(key, old))

    def _number(self, edit: Number) -> None:
        """Set a number in a module or its config."""
        holder: Any = self.module.get_submodule(edit.owner)
        if any(name.startswith("__") for name in edit.path) or isinstance(edit.after, str):
            raise ValueError(f"{'.'.join(edit.path)} is no size")
        for name in edit.path[:-1]:
            holder = _entry(holder, name)
        name = edit.path[-1]
        found = _entry(holder, name)
        if _comparable(found) != _comparable(edit.before):
            raise ValueError(f"{'.'.join((edit.owner, *edit.path)).lstrip('.')} is {found!r} and not {edit.before!r}")
        after = type(found)(edit.after) if isinstance(edit.after, tuple) else edit.after
        table = getattr(holder, "__dict__", {})
        if isinstance(holder, (dict, nn.Module)) or name in table:
            _set(holder, name, after)
            self._undos.append(lambda: _set(holder, name, found))
            return
        # A number that is computed from other entries, such as a count of label names: what is set are those.
        kept = dict(table)
        setattr(holder, name, after)
        for key, old in kept.items():
            if isinstance(old, dict) and isinstance(table[key], dict) and table[key] is not old:
                taken = set(map(repr, old.values()))
                fresh = {k: v for k, v in table[key].items() if k not in old and repr(v) not in taken}
                table[key] = {**old, **fresh}

        def undo() -> None:
            table.clear()
            table.update(kept)

        self._undos.append(undo)
        if getattr(holder, name) != after:
            raise ValueError(f"{name} stays {getattr(holder, name)!r}")

    def _insert(self, edit: InsertBlock) -> None:
        """Insert a copy of a block."""
        blocks = self._blocks(edit.container)
        if not 0 <= edit.source < len(blocks) or not 0 <= edit.index <= len(blocks):
            raise ValueError(f"{edit.container} holds {len(blocks)} blocks")
        prefix = f"{edit.container}." if edit.container else ""
        source = blocks[edit.source]
        block = copy.deepcopy(source, {id(value): value for value in _shared_settings(self.module, source)})
        for name, tensor in (*source.named_parameters(), *source.named_buffers()):
            known = self._history[id(tensor)]
            made = block.get_parameter(name) if isinstance(tensor, nn.Parameter) else block.get_buffer(name)
            made.grad = None
            made.__dict__.update(tensor.__dict__)
            self._history[id(made)] = TensorChange(like=known.source or known.like or f"{prefix}{edit.source}.{name}")
            self._begin(edit, name, made)
        blocks.insert(edit.index, block)
        self._hold(edit.container, blocks)

    def _insert_layer(self, edit: InsertLayer) -> None:
        """Insert a layer that is the identity, and the activation once more."""
        blocks = self._blocks(edit.container)
        if not 0 <= edit.activation < edit.index <= len(blocks):
            raise ValueError(f"{edit.container} holds {len(blocks)} modules")
        front = next((block for block in reversed(blocks[: edit.index]) if "weight" in block._parameters), None)
        if front is None:
            raise ValueError(f"{edit.container} has no layer in front of {edit.index}")
        weight = front.get_parameter("weight")
        options = {"dtype": weight.dtype, "device": weight.device}
        layer: nn.Module
        if edit.axes:
            convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[edit.axes - 1]
            layer = convolution(edit.width, edit.width, edit.kernel, padding=edit.kernel // 2, **options)  # type: ignore[arg-type]
            nn.init.dirac_(layer.get_parameter("weight"))
        else:
            layer = nn.Linear(edit.width, edit.width, **options)  # type: ignore[arg-type]
            nn.init.eye_(layer.get_parameter("weight"))
        nn.init.zeros_(layer.get_parameter("bias"))
        layer.train(front.training)
        for name, made in layer.named_parameters():
            made.requires_grad_(weight.requires_grad)
            known = self._history[
                id(front._parameters.get(name) if front._parameters.get(name) is not None else weight)
            ]
            self._history[id(made)] = TensorChange(like=known.source or known.like)
        blocks[edit.index : edit.index] = [layer, copy.deepcopy(blocks[edit.activation])]
        self._hold(edit.container, blocks)

    def _blocks(self, container: str) -> list[nn.Module]:
        """Return what a container of numbered blocks holds."""
        table = self.module.get_submodule(container)._modules
        if list(table) != [str(number) for number in range(len(table))]:
            raise ValueError(f"the blocks of {container} are not numbered")
        return [child for child in table.values() if child is not None]

    def _hold(self, container: str, blocks: list[nn.Module]) -> None:
        """Let a container hold other blocks."""
        table = self.module.get_submodule(container)._modules
        before = dict(table)
        table.clear()
        table.update({str(number): child for number, child in enumerate(blocks)})

        def undo() -> None:
            table.clear()
            table.update(before)

        self._undos.append(undo)

    def _begin(self, edit: InsertBlock, name: str, made: Tensor) -> None:
        """Give a tensor of a new block the values to begin with."""
        with torch.no_grad():
            if name in edit.zeroed:
                made.zero_()
            elif edit.drawn and made.dim() > 1 and isinstance(made, nn.Parameter):
                drawn = torch.randn(made.shape, generator=self.generator) * float(made.float().std(unbiased=False))
                made.copy_(drawn.to(made))

    def _gate(self, edit: Gate) -> None:
        """Wrap a block."""
        table = self.module.get_submodule(edit.container)._modules
        key = str(edit.index)
        block = table[key]
        assert block is not None
        wrapped = GatedBlock(block).train(block.training)
        first = next(iter(block.parameters()), None)
        # An optimizer with groups of its own trains the gate as it trains the block.
        like = None if first is None else self._history[id(first)]
        self._history[id(wrapped.gate)] = TensorChange(like=None if like is None else like.source or like.like)
        self._put(table, key, wrapped)


def _check_plain(name: str, parameter: nn.Parameter) -> None:
    """Refuse a parameter with something that a new one in its place cannot have."""
    if type(parameter) is not nn.Parameter:
        raise GrowthRefusedError(
            f"The parameter {name} is of the class {type(parameter).__name__}, which may do more than hold numbers.",
            "Expected an nn.Parameter: a larger one in its place would not be of that class.",
            "Make it an nn.Parameter, or grow another part.",
        )
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise GrowthRefusedError(
            f"The parameter {name} has hooks on its gradient.",
            "Expected none: a larger parameter in its place would not have them, and nothing tells how to make them.",
            "Remove the hooks before the model grows and register them afterwards, or grow another part.",
        )


def _shared_settings(module: nn.Module, block: nn.Module) -> list[Any]:
    """Return the configs and other plain objects that a block has in common with modules around it."""
    inside = set(block.modules())
    around = {id(value) for child in module.modules() if child not in inside for value in vars(child).values()}
    return [
        value
        for child in inside
        for value in vars(child).values()
        if id(value) in around and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type))
    ]


def _entry(holder: Any, name: str) -> Any:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def _comparable(value: Any) -> Any:
    """Return a number, or a tuple of numbers for any sequence of them."""
    if isinstance(value, (list, tuple, torch.Size)):
        return tuple(value)
    return round(value, 12) if isinstance(value, float) and math.isfinite(value) else value
