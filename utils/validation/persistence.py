"""Does everything that the answer depends on survive being saved, loaded and moved?

Tensors outside ``state_dict()`` are harmless as long as the constructor makes them anew and forward() moves them. They
are a fault when the model cannot run elsewhere because of them, when training changes them, or when their values are
random: another instance has others, and the saved weights do not fit those.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.isolation import preserved
from utils.runtime.seeding import isolated_streams, seed_streams
from utils.validation.check import Budget, Finding, Outcome
from utils.validation.determinism import answer, example
from utils.validation.hidden import Hidden, hidden_items
from utils.validation.portability import Failure, dtypes, run_cast, run_elsewhere
from utils.validation.probing import ModelCrash
from utils.validation.registration import altered, influences
from utils.validation.watching import alike

MOST_PARTS = 16
FEWEST_VALUES = 12
"""Fewer values than this do not tell whether they are random."""
LARGEST_CORRELATION = 0.4
HINT = (
    "Register it: self.register_buffer('{name}', tensor) (persistent=False only if __init__ always makes the same "
    "values), or nn.Parameter if it should learn."
)


def check_persistence(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Look at tensors that ``state_dict()`` or ``to()`` leave behind, and at a saved and reloaded model.

    Code: ``buffer_not_registered``.
    """
    # Nothing can be proved about a model that does not run.
    example(adapter, 0)
    held = hidden_items(adapter.module)
    plain = [item for item in held if isinstance(item.item, Tensor) and not item.trains]
    findings: dict[str, Finding] = {}
    stuck = _left_behind(held, plain, lambda moved: run_elsewhere(adapter, moved))
    real = [item for item in plain if item.tensors[0].is_floating_point()]
    for dtype in dtypes(adapter)[:1]:
        stuck += _left_behind(held, real, lambda moved, dtype=dtype: run_cast(adapter, dtype, moved))  # type: ignore[misc]
    for item in stuck:
        what = "stays where it is when the model is moved or cast, and the forward pass then raises"
        if not _made_anew(adapter, item):
            _add(findings, item.where, what)
        elif not _keyed_by_device(item):
            # Whoever moves the model before the first call never meets it.
            _add(findings, item.where, f"is kept from an earlier call; it {what}", "warn")
    for item in _trained(adapter, plain):
        _add(findings, item.where, "changes in train mode and the output depends on it, but state_dict() lacks it")
    buffers = _temporary_buffers(adapter.module)
    other = _second_instance(adapter) if plain or buffers else None
    for item in plain:
        if item.where not in findings and _differs(item.where, item.item, other) and influences(adapter, [item]):
            _add(findings, item.where, _lost(other))
    for name, buffer in buffers.items():
        if _differs(name, buffer, other) and _buffer_influences(adapter, name):
            # Without a second instance its values only look random; a seeded draw looks the same.
            severity = "warn" if other is None else "fail"
            _add(findings, name, f"is a buffer with persistent=False and {_lost(other)}", severity)
    findings |= {finding.where: finding for finding in _reload(adapter)}
    why = f"nothing outside state_dict() is lost ({len(plain)} plain tensors, {len(buffers)} temporary buffers)"
    return Outcome(len(plain) + len(buffers), "none lost", why, list(findings.values()))


def _made_anew(adapter: ModelAdapter, item: Hidden) -> bool:
    """Tell whether forward makes a tensor again where it is missing, with the same answer."""
    with preserved(adapter.module):
        before = answer(adapter, example(adapter, 0))
        for space, key, value in item.slots:
            space[key] = type(value)() if isinstance(value, (dict, list)) else None
        try:
            return torch.equal(answer(adapter, example(adapter, 0)), before)
        except ModelCrash:
            return False
        finally:
            for space, key, value in item.slots:
                space[key] = value


def _keyed_by_device(item: Hidden) -> bool:
    """Tell whether a tensor lies in a dict under its own device, where another device finds a place of its own."""
    device = {str(item.tensors[0].device), item.tensors[0].device.type}
    held = [value for _, _, value in item.slots if isinstance(value, dict)]
    return bool(held) and all(any(str(part) in device for key in space for part in _parts(key)) for space in held)


def _parts(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _add(findings: dict[str, Finding], where: str, what: str, severity: str = "fail") -> None:
    """Add a finding on one tensor, if there is none yet."""
    reproduction = f"print({where.rpartition('.')[2]!r}, [key for key in model.state_dict() if {where!r} in key])"
    hint = HINT.format(name=where.rpartition(".")[2])
    message = f"this tensor {what}"
    findings.setdefault(where, Finding("buffer_not_registered", severity, where, message, hint, reproduction))


def _lost(other: nn.Module | None) -> str:
    """Say how values get lost."""
    if other is None:
        return "holds random values that state_dict() lacks, and the output depends on them"
    return "has other values in a second instance, and state_dict() lacks it, so a reloaded model answers differently"


def _left_behind(
    held: list[Hidden], plain: list[Hidden], run: Callable[[list[Hidden]], Failure | None]
) -> list[Hidden]:
    """Return the plain tensors because of which a model does not run elsewhere.

    Args:
        held: Everything hidden in the model.
        plain: The tensors in question.
        run: Runs the model elsewhere with some hidden items converted too, and returns how it failed.
    """

    def mixes(moved: list[Hidden]) -> Failure | None:
        failure = run(moved)
        return failure if failure is not None and failure.mixed else None

    if not plain or mixes([item for item in held if item not in plain]) is None:
        return []
    # What fails with everything moved is the doing of forward(), not of a tensor that stays behind.
    anyway = mixes(held)
    found = []
    for item in plain[:MOST_PARTS]:
        failure = mixes([other for other in held if other is not item])
        if failure is not None and (anyway is None or failure.message != anyway.message):
            found.append(item)
    return found


def _trained(adapter: ModelAdapter, plain: list[Hidden]) -> list[Hidden]:
    """Return the plain tensors that a pass in train mode changes, and that the output in eval mode depends on."""
    if not plain:
        return []
    changed = {}
    for train in (False, True):
        with preserved(adapter.module), torch.no_grad():
            before = {item.where: item.tensors[0].detach().clone() for item in plain}
            adapter.module.train(train)
            seed_streams(0, "persistence")
            try:
                adapter.forward_in_training(example(adapter, 0)) if train else adapter.forward(example(adapter, 0))
            except Exception:
                return []
            now = {item.where: item.item for item in hidden_items(adapter.module) if isinstance(item.item, Tensor)}
            # A tensor that is gone was a cache; one that eval mode changes too is state, which has its own check.
            changed[train] = {
                key for key, value in before.items() if key in now and not alike([now[key].detach()], [value])
            }
    return [item for item in plain if item.where in changed[True] - changed[False] and influences(adapter, [item])]


def _temporary_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that ``state_dict()`` lacks."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name not in kept}


def _second_instance(adapter: ModelAdapter) -> nn.Module | None:
    """Build the model again with other random numbers, if it is known how or its class needs nothing."""
    build = adapter.factory or type(adapter.module)
    with isolated_streams("second instance"):
        try:
            other = build()
        except Exception:
            return None
    if adapter.factory is not None:
        return other
    # Built with its defaults it is another instance only if it holds the same things.
    return other if _holdings(other) == _holdings(adapter.module) else None


def _holdings(module: nn.Module) -> dict[str, Any]:
    """Return the shapes of everything that a model holds, registered or not, by name."""
    held = {item.where: [tensor.shape for tensor in item.tensors] for item in hidden_items(module)}
    registered = [*module.named_parameters(), *module.named_buffers()]
    return {**held, **{name: tensor.shape for name, tensor in registered}}


def _differs(where: str, tensor: Any, other: nn.Module | None) -> bool:
    """Tell whether a tensor is another in a second instance; without one, whether it looks drawn at random."""
    if other is None:
        return looks_random(tensor)
    twins = {item.where: item.item for item in hidden_items(other)} | dict(other.named_buffers())
    twin = twins.get(where)
    return isinstance(twin, Tensor) and not alike([twin.detach().to(tensor.device)], [tensor.detach()])


def looks_random(tensor: Tensor) -> bool:
    """Tell whether values look independent: mostly distinct, and not like their neighbours along any dimension.

    Tables that a formula makes (ramps, sinusoids, masks, slopes) are smooth along one dimension at least, or repeat few
    values. The correlation of n independent neighbours has a standard deviation of 1/sqrt(n).
    """
    values = tensor.detach().double().cpu()
    if values.numel() < FEWEST_VALUES or not bool(values.isfinite().all()):
        return False
    if values.unique().numel() < 0.8 * values.numel():
        return False
    bound = max(LARGEST_CORRELATION, 3 / math.sqrt(values.numel()))
    for dimension, size in enumerate(values.shape):
        for step in (1, 2):
            if size <= step + 2:
                continue
            first = values.narrow(dimension, 0, size - step).flatten()
            second = values.narrow(dimension, step, size - step).flatten()
            correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
            if not bool(correlation.abs() < bound):
                return False
    return True


def _buffer_influences(adapter: ModelAdapter, name: str) -> bool:
    """Tell whether the output changes with a buffer's values."""
    owner_name, _, key = name.rpartition(".")
    owner = adapter.module.get_submodule(owner_name)
    inputs = example(adapter, 0)
    with preserved(adapter.module):
        base = answer(adapter, inputs)
    held = owner._buffers[key]
    with preserved(adapter.module):
        owner._buffers[key] = altered(held) if held is not None else None
        try:
            return not alike(answer(adapter, inputs), base)
        finally:
            owner._buffers[key] = held


def _reload(adapter: ModelAdapter) -> list[Finding]:
    """Compare what ``state_dict()`` holds with what the model holds."""
    module = adapter.module
    kept = module.state_dict(keep_vars=True)
    held = {id(value) for value in kept.values()}
    storages = {value.data_ptr() for value in kept.values() if isinstance(value, Tensor)}
    missing = [
        name
        for name, parameter in module.named_parameters()
        if name not in kept and id(parameter) not in held and parameter.data_ptr() not in storages
    ]
    if not missing:
        return []
    message = f"state_dict() lacks {len(missing)} parameters, this one first: a saved model loses them"
    hint = "Do not filter keys in state_dict(); or put them back when loading."
    reproduction = f"print({missing[0]!r} in model.state_dict())"
    return [Finding("buffer_not_registered", "fail", missing[0], message, hint, reproduction)]
