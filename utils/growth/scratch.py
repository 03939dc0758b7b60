"""A copy of a model on which plans are tried before the model itself is touched."""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, observe
from utils.growth.edits import GrowthRefusedError, InsertBlock, InsertLayer, LineageError, Plan, Widen
from utils.growth.surgery import Surgery, tensor_of
from utils.runtime.printing import captured_output
from utils.runtime.resources import available_memory, format_bytes
from utils.runtime.seeding import isolated_streams
from utils.validation.padding_masks import masks_of

CLOSE = 1e-4
"""Largest change of the output, as a share of its size, of what counts as kept; the certificate decides."""
ANY = math.inf
"""The same, where any change may pass."""
LEARNS = 1e-12
"""A gradient of the new entries above this share of the largest one is one."""
LONGER = 5
"""Positions by which the other question is longer than the first."""


@dataclass(frozen=True)
class Trial:
    """What became of a plan on the copy."""

    problem: str | None
    """Why it does not fit; None when it does."""
    difference: float = 0.0
    """Largest change of the output, as a share of its size."""
    ran: bool = True
    """It did not crash."""


class Scratch:
    """A copy of a model in eval mode, in double precision where it can compute in it, on the CPU.

    Attributes:
        adapter: An adapter of the copy.
        inputs: What it is tried on.
        expected: What the copy answers as it is.
        other: A longer question with padding, its mask and a cache, as far as the copy takes these, and the answer.
        exact: Whether it is in double precision.
        close: Largest change of the output, as a share of its size, that a trial lets pass.
    """

    def __init__(self, adapter: ModelAdapter, batch_size: int = 2, close: float = CLOSE) -> None:
        """Copy a model.

        Raises:
            GrowthRefusedError: It cannot be copied, or does not run.
        """
        self.close = close
        last: Exception | None = None
        for double in (True, False):
            try:
                self.adapter, self.inputs, self.expected = _twin(adapter, double, batch_size)
                self.exact, self.other = double, _other(self.adapter)
                return
            except Exception as error:
                last = error
        raise GrowthRefusedError(
            f"{adapter.name} cannot be copied and run ({type(last).__name__}: {last}).",
            "Expected a model that copy.deepcopy copies: every growth step is tried on a copy first.",
            "Move what cannot be copied (files, locks, handles) out of the module.",
        ) from last

    @property
    def module(self) -> nn.Module:
        """The copy."""
        return self.adapter.module

    def attempt(
        self,
        plan: Plan,
        must_run: Iterable[str] = (),
        seed: int = 0,
        also: Callable[[Surgery], str | None] | None = None,
        learns: bool = True,
    ) -> Trial:
        """Try a plan; the copy comes back as it was.

        Args:
            plan: What to try.
            must_run: Names of modules, after the change, that a forward pass has to reach.
            seed: Seed of what is drawn.
            also: Called with the change while it is made; returns a problem, or None.
            learns: A gradient has to reach something that is new.
        """
        needed, free = 2 * _new_numbers(self.module, plan) * (8 if self.exact else 4), available_memory()
        if needed > free:
            return Trial(f"it takes {format_bytes(needed)} to try, and {format_bytes(free)} are free", ran=False)
        try:
            surgery = Surgery(self.module, plan, seed)
        except LineageError as error:
            return Trial(str(error.found), ran=False)
        try:
            reached: set[str] = set()
            try:
                with captured_output(), isolated_streams("growth"), torch.enable_grad():
                    with observe(self.module, lambda name, *_: reached.add(name)):
                        output = self.adapter.logits(self.inputs)
                    missing = [name for name in must_run if name not in reached]
                    if missing:
                        return Trial(f"{missing[0]} is never run")
                    difference = changed_by(self.expected, output, plan.outputs)
                    if difference <= self.close and learns and not self._learns(surgery):
                        frozen = all(not p.requires_grad for p in _fresh(surgery).values())
                        why = "would be frozen, as what it belongs to" if frozen else "gets no gradient"
                        return Trial(f"what is new {why}", difference)
                    if difference <= self.close and self.other is not None:
                        asked, known = self.other
                        with torch.no_grad():
                            second = changed_by(known, self.adapter.logits(asked), plan.outputs)
                        if second > self.close:
                            how = ", ".join(name for name in asked if name not in self.inputs) or "a longer input"
                            return Trial(f"with {how} the output changes by {second:.2g} of its size", second)
                    if difference <= self.close and also is not None:
                        problem = also(surgery)
                        if problem is not None:
                            return Trial(problem, difference)
            except Exception as error:
                return Trial(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", ran=False)
        finally:
            surgery.undo()
            for parameter in self.module.parameters():
                parameter.grad = None
        if difference > self.close:
            return Trial(f"the output changes by {difference:.2g} of its size", difference)
        return Trial(None, difference)

    def _learns(self, surgery: Surgery) -> bool:
        """Tell whether a gradient reaches something that is new."""
        output = self.adapter.logits(self.inputs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        fresh = _fresh(surgery)
        trained = {name: parameter for name, parameter in fresh.items() if parameter.requires_grad}
        if not trained:
            # What was frozen stays so; what is new in it has nothing to learn.
            return not fresh
        gradients = torch.autograd.grad((output * weights).sum(), list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                continue
            how = surgery.change.changes[name]
            old = gradient
            for insertion in reversed(how.insertions):
                old = _without(old, insertion.axis, insertion.places)
            whole, kept = float(gradient.abs().sum()), float(old.abs().sum()) if how.source is not None else 0.0
            if whole - kept > LEARNS * max(whole, 1e-30) and whole > 0:
                return True
        return False

    def block_call(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a module of the copy is called with.

        Raises:
            GrowthRefusedError: It is not called.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        handle = self.module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad(), captured_output(), isolated_streams("growth"):
                self.adapter.logits(self.inputs)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise GrowthRefusedError(
                f"The block {name} runs {len(calls)} times in one forward pass.",
                "Expected once: a block that is shared or skipped has no neighbour of its own.",
                "Grow another part, such as the feed-forward width.",
            )
        return calls[0]


def _fresh(surgery: Surgery) -> dict[str, Tensor]:
    """Return the parameters that are new or have new entries."""
    change = surgery.change
    return {
        name: change.parameters[name]
        for name, how in change.changes.items()
        if (how.insertions or how.source is None) and name in change.parameters
    }


def _new_numbers(module: nn.Module, plan: Plan) -> int:
    """Return about how many numbers a plan adds; what does not fit the model counts for nothing."""
    total = 0
    for edit in plan.edits:
        with suppress(Exception):
            if isinstance(edit, Widen):
                tensor = tensor_of(module, edit.name)
                total += tensor.numel() // max(1, tensor.shape[edit.axis]) * sum(count for _, count in edit.places)
            elif isinstance(edit, InsertBlock):
                block = module.get_submodule(f"{edit.container}.{edit.source}".lstrip("."))
                total += sum(parameter.numel() for parameter in block.parameters())
            elif isinstance(edit, InsertLayer):
                total += edit.width**2 * (edit.kernel**edit.axes)
    return total


def changed_by(before: Tensor, after: Tensor, outputs: int | None = None) -> float:
    """Return the largest change of an output as a share of its size; infinite when the shapes differ.

    Args:
        before: The old answer.
        after: The new one.
        outputs: Compare so many entries of the last axis, where the new answer has more.
    """
    if outputs is not None:
        after = after[..., :outputs]
    if before.shape != after.shape:
        return float("inf")
    finite = torch.isfinite(before)
    if not bool((finite == torch.isfinite(after)).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    old, new = before[finite].detach().double(), after[finite].detach().double()
    size = float((old - old.mean()).square().mean().sqrt()) or float(old.abs().max()) or 1.0
    return float((new - old).abs().max()) / size


def _without(value: Tensor, axis: int, places: tuple[tuple[int, int], ...]) -> Tensor:
    """Return what was there before new entries were inserted."""
    kept, start, shift = [], 0, 0
    for place, count in places:
        kept.append(value.narrow(axis, start + shift, place - start))
        shift, start = shift + count, place
    kept.append(value.narrow(axis, start + shift, value.shape[axis] - start - shift))
    return torch.cat(kept, axis)


def _twin(adapter: ModelAdapter, double: bool, batch_size: int) -> tuple[ModelAdapter, dict[str, Tensor], Tensor]:
    """Return an adapter of a copy, inputs for it and its answer."""
    twin = copy.copy(adapter)
    with captured_output():
        module = copy.deepcopy(adapter.module).to("cpu").eval()
        for parameter in module.parameters():
            parameter.grad = None
        twin.module = module.double() if double else module
        inputs = twin.example_inputs(batch_size)
        with isolated_streams("growth"), torch.no_grad():
            expected = twin.logits(inputs)
    if double and expected.dtype != torch.float64:
        raise TypeError("a part computes in single precision whatever its input")
    return twin, inputs, expected


def _other(twin: ModelAdapter) -> tuple[dict[str, Any], Tensor] | None:
    """Return another question and a copy's answer to it; None for what is asked with no tokens.

    It is longer than the first one, and comes with padding, its mask and a cache, as far as the model takes these. Code
    often goes another way with them, and reads other numbers there.
    """
    if twin.modality != "tokens" or not twin.batched:
        return None
    cache = {"use_cache": True} if "use_cache" in twin.argument_names else {}
    masks = [mask for mask in masks_of(twin) if mask.name is not None]
    for length in (twin.probe_length + LONGER, twin.probe_length):
        with suppress(Exception), captured_output():
            inputs = twin.example_inputs(2, length, seed=1)
            real = torch.ones(inputs[twin.main_input].shape, dtype=torch.bool)
            real[1, real.shape[1] // 2 :] = False
            hiding = [mask.argument(real, twin.real_dtype) for mask in masks if mask.name not in inputs]
            for more in ({**hidden, **kept} for hidden in (*hiding, {}) for kept in (cache, {})):
                asked: dict[str, Any] = {**inputs, **more}
                with suppress(Exception), isolated_streams("growth"), torch.no_grad():
                    return asked, twin.logits(asked)
    return None


def identity_error(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return by how much a block changes its first tensor, as a share of its size; infinite when the shape differs."""
    with torch.no_grad(), suppress(Exception), captured_output(), isolated_streams("growth"):
        answer, given = first_tensor(block(*args, **kwargs)), first_tensor((args, tuple(kwargs.values())))
        if answer is not None and given is not None:
            return changed_by(given, answer)
    return float("inf")
