"""Running a model that may hang, print, end the process or take all memory.

The first passes in eval and in train mode, forward and backward, run in a forked copy of the process
(`utils.runtime.rehearsal`). Only a model that survives them is run here, with a time limit, a memory limit and its
output caught.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from utils.adapters.capture import named_tensors
from utils.adapters.location import code_location
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.spec import ModelSpec
from utils.runtime.printing import Printed, captured_output
from utils.runtime.rehearsal import Notes, Rehearsal, rehearse
from utils.runtime.resources import LARGE_MODEL, allocation_limit
from utils.runtime.watchdog import TimedOut, failing_module, time_limit
from utils.validation.check import NOT_RUN as NOT_RUN
from utils.validation.check import Check, CheckResult, Finding
from utils.validation.report import ValidationReport

REHEARSAL_SECONDS, SECONDS_PER_BILLION = 15.0, 30.0
"""Limit of a rehearsal, and what each billion of parameters adds to it."""
OPENING_SECONDS = 60.0
"""Least limit for finding out in this process how a model is called."""
REHEARSED_LENGTH = 128
"""The longest text of a rehearsal; `ModelAdapter.legal_length` tries shorter ones."""
CONFIRMING_SECONDS = 8.0
"""The same for a model that was seen waiting in a copy of the process, perhaps for something that was not copied."""

MEMORY_COPIES, MEMORY_BYTES = 6, 2e9
"""A pass that does not end and has taken so many times the model's size, and so much more, only takes memory."""

MEMORY_HINT = (
    "Look for tensors that grow with the product of two sizes, and for lists that grow in a loop; or"
    " use a smaller model or a larger device."
)
HINTS = {
    "process_died": "Look for sys.exit, os._exit, os.kill and code outside Python (ctypes, custom kernels) that runs in"
    " this pass.",
    "timed_out": "Look for a loop whose condition never changes, and for waiting: sleep, locks, queues, downloads.",
    "out_of_memory": MEMORY_HINT,
}


class UnusableModel(Exception):
    """A model that cannot be run in this process.

    Attributes:
        finding: Why.
        name: The model's class name.
        parameters: How many it has.
    """

    def __init__(self, finding: Finding, module: nn.Module) -> None:
        """Keep what a report needs."""
        super().__init__(finding.message)
        self.finding = replace(finding, location=code_location(module, finding.where))
        self.name = type(module).__name__
        self.parameters = sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def contained(module: nn.Module, seconds: float) -> Iterator[Printed]:
    """Run a block that calls the model, with limits of time and memory and with its output caught.

    Args:
        module: The model.
        seconds: Limit of the block.

    Yields:
        What the block prints.

    Raises:
        UnusableModel: The block took longer, or tried to end the process.
    """
    name = type(module).__name__
    try:
        with captured_output() as printed, allocation_limit(), time_limit(seconds, module):
            yield printed
    except TimedOut as error:
        message = f"no answer within {seconds:.3g} s"
        raise UnusableModel(
            Finding("timed_out", "fail", error.where or name, message, HINTS["timed_out"]), module
        ) from None
    except SystemExit as error:
        message = f"it raises SystemExit({error}), which ends the program that calls it"
        where = failing_module(module, error) or name
        raise UnusableModel(Finding("process_died", "fail", where, message, HINTS["process_died"]), module) from None


def open_model(model: Any, config: Any = None, spec: ModelSpec | None = None, isolate: bool = True) -> ModelAdapter:
    """Make a model's adapter, after a rehearsal of its first passes.

    Args:
        model: A module, a loaded model, or an adapter, which is returned as it is when nothing else is given.
        config: As for `ModelAdapter`.
        spec: As for `ModelAdapter`.
        isolate: Whether to rehearse.

    Raises:
        UnusableModel: It does not come back from a pass, ends the process or takes more memory than there is.
        AdapterError: As for `ModelAdapter`.
    """
    module = module_of(model)
    if module is None:
        return ModelAdapter(model, config, spec)
    limit = REHEARSAL_SECONDS + SECONDS_PER_BILLION * _size(module) / 1e9
    opening_limit = max(OPENING_SECONDS, 2 * limit)
    if isolate and all(p.device.type == "cpu" for p in module.parameters()):
        rehearsal = rehearse(lambda notes: _first_passes(notes, module, model, config, spec), limit, module)
        waiting = rehearsal.outcome == "timed_out" and not rehearsal.busy
        if not rehearsal.ok and not waiting:
            raise UnusableModel(_finding(rehearsal, module), module)
        opening_limit = CONFIRMING_SECONDS if waiting else opening_limit
    if isinstance(model, ModelAdapter) and spec is None and config is None:
        return model
    with contained(module, opening_limit):
        return ModelAdapter(model, config, spec)


def _size(module: nn.Module) -> int:
    """Return the number of parameters that have a shape already."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def _bytes(module: nn.Module) -> int:
    """Return the size of the parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not is_lazy(p))


def module_of(model: Any) -> nn.Module | None:
    """Return the module inside whatever `utils.validate` takes, or None."""
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    return module if isinstance(module, nn.Module) else None


def unusable_report(error: UnusableModel, checks: Sequence[Check], seconds: float) -> ValidationReport:
    """Return the report on a model that could not be opened: one fault, and no check that could run."""
    finding = error.finding
    first = checks[0]
    result = CheckResult(first.id, first.tier, "fail", "unusable", "usable", finding.message, seconds, {}, (finding,))
    reason = NOT_RUN
    others = (CheckResult(c.id, c.tier, "skip", None, None, reason, 0.0, {"could_not_run": True}) for c in checks[1:])
    return ValidationReport(
        results=(result, *others),
        model=error.name,
        task=None,
        parameters=error.parameters,
        seconds=seconds,
        tiers=tuple(sorted({check.tier for check in checks})),
    )


def _finding(rehearsal: Rehearsal, module: nn.Module) -> Finding:
    """Say what a rehearsal ended with; the process it speaks of is a copy, made for that."""
    code = "process_died" if rehearsal.outcome == "died" else rehearsal.outcome
    message = f"the process {rehearsal.reason} in {rehearsal.stage}"
    if rehearsal.outcome == "timed_out" and rehearsal.taken > MEMORY_COPIES * _bytes(module) + MEMORY_BYTES:
        # It would have run out of memory had it had the time.
        code = "out_of_memory"
    if rehearsal.outcome == "out_of_memory":
        message = f"memory ran out in {rehearsal.stage} on two short samples"
    elif "SIGKILL" in rehearsal.reason:
        message += ", as happens when memory runs out"
    return Finding(code, "fail", rehearsal.where or type(module).__name__, message, HINTS[code])


def _announce(notes: Notes, module: nn.Module) -> None:
    """Have every module write its name when it starts and its caller's name when it ends."""
    running = [""]

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            running.append(name)
            notes.where = name

        return hook

    def leave(*_: Any) -> None:
        running.pop()
        notes.where = running[-1]

    for name, child in module.named_modules():
        child.register_forward_pre_hook(enter(name), prepend=True)
        child.register_forward_hook(leave, always_call=True)


def _first_passes(notes: Notes, module: nn.Module, model: Any, config: Any, spec: ModelSpec | None) -> None:
    """Do what every check does, once: passes in eval mode, one in train mode, one backward."""
    _announce(notes, module)
    notes.stage = "the first forward pass"
    adapter = model if isinstance(model, ModelAdapter) else ModelAdapter(model, config, spec)
    if adapter.failure is not None:
        return
    notes.stage = "a forward pass in eval mode"
    adapter.module.eval()
    with torch.no_grad():
        adapter.logits(adapter.example_inputs(1))
    notes.stage = "a forward pass in train mode"
    adapter.module.train()
    output = adapter.forward_in_training(adapter.example_inputs())
    total = sum(t.float().sum() for _, t in named_tensors(output) if t.is_floating_point() and t.requires_grad)
    if isinstance(total, torch.Tensor):
        notes.stage = "a backward pass"
        trained = [p for p in adapter.module.parameters() if p.requires_grad]
        if adapter.num_parameters > LARGE_MODEL:
            # The gradient of an early, small parameter passes through nearly everything and takes no memory.
            trained = [min(trained[: max(1, len(trained) // 4)], key=torch.Tensor.numel)]
        torch.autograd.grad(total, trained, allow_unused=True)
    if adapter.modality == "tokens" and adapter.num_parameters < LARGE_MODEL:
        adapter.module.eval()
        notes.stage = "a forward pass at another length"
        longest = adapter.legal_length(min(REHEARSED_LENGTH, adapter.max_length.value or REHEARSED_LENGTH))
        adapter.run_length(longest)
