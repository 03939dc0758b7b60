"""Do train() and eval() do what they say? The modes of all modules, and what dropout and batch statistics make of them.

Only what train mode should change is asked for: a model without dropout and batch normalisation has nothing to switch.
Parts that are frozen on purpose may stay in eval mode.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.adapters.capture import observe
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.isolation import preserved
from utils.runtime.resources import LARGE_MODEL
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.determinism import Inputs, copied, example, mutations
from utils.validation.probing import ModelCrash, guarded
from utils.validation.relocation import awakened, swapped
from utils.validation.watching import Running, alike, first_difference, running_modules, values

DROPOUTS = (nn.modules.dropout._DropoutNd,)
NORMS = (nn.modules.batchnorm._BatchNorm,)
RATE_NAMES = ("p", "drop_prob", "drop_rate", "dropout_p", "drop_path", "rate", "prob", "dropout")
"""Where a dropout or drop-path layer of the user's own keeps its probability."""
DROPOUT_FUNCTIONS = {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
                     functional.alpha_dropout, functional.feature_alpha_dropout, torch.dropout}  # fmt: skip
MODE_HINT = (
    "Leave train() and eval() as nn.Module defines them, or call super().train(mode) with the mode given; never call "
    "them in forward()."
)
SEED_HINT = "Set the seed once, before training starts, and never in forward()."
SEED_LINES = (
    "import torch; from utils.adapters import ModelAdapter\n"
    "adapter = ModelAdapter(model); model.train(); inputs = adapter.example_inputs()\n"
    "for seed in (1, 2):\n    torch.manual_seed(seed); adapter.forward(inputs); print(torch.rand(3))  # the same"
)
PINNED_HINT = "Write functional.dropout(x, p, training=self.training), or use nn.Dropout and its result."


DROPPED_CALLS, DROPPED_VALUES = 16, 65536
NEVER = 1e-9
"""Probability at which two draws are not the same by chance."""
RARE = 1e-4
"""Probability at which a random layer may have done nothing by chance in all tries."""


@dataclass
class _Run:
    """One forward pass and the modes around it."""

    asked: bool
    """True after ``train()``, False after ``eval()``."""
    before: dict[str, bool]
    after: dict[str, bool] = field(default_factory=dict)
    output: list[Any] = field(default_factory=list)
    pinned: list[str] = field(default_factory=list)
    """Modules that called a function of dropout or batch normalisation with the other mode's flag."""
    acted: dict[str, bool] = field(default_factory=dict)
    """Layers that ran, and whether their output was another than their input."""
    callers: dict[str, str] = field(default_factory=dict)
    """Modules that called them."""
    dropped: list[tuple[str, Tensor]] = field(default_factory=list)
    """What calls of dropout made zero, with the module that called: the start of it, where chance cannot repeat it."""


class _Pinned(TorchFunctionMode):
    """Notes functions that are told another mode than that of the module they work for."""

    def __init__(self, adapter: ModelAdapter, running: Running, run: _Run) -> None:
        super().__init__()
        self.adapter, self.running, self.run = adapter, running, run
        layers = (layer for layer in adapter.module.modules() if isinstance(layer, NORMS))
        self.norms = {id(layer.running_mean): layer for layer in layers if layer.running_mean is not None}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one call."""
        given = dict(kwargs or {})
        if func is functional.batch_norm:
            mean = given.get("running_mean", args[1] if len(args) > 1 else None)
            training = given.get("training", args[5] if len(args) > 5 else False)
            owner = self.norms.get(id(mean))
            if owner is not None and owner.training is not bool(training):
                self.run.pinned.append(self.running.name)
        if self.run.asked and func in DROPOUT_FUNCTIONS:
            rate = given.get("p", args[1] if len(args) > 1 else 0.5)
            training = given.get("training", given.get("train", args[2] if len(args) > 2 else True))
            name = self.running.name
            if rate > 0 and not training and self.adapter.module.get_submodule(name).training:
                self.run.pinned.append(name)
            value = given.get("input", args[0] if args else None)
            if training and 0 < rate < 1 and isinstance(value, Tensor) and len(self.run.dropped) < DROPPED_CALLS:
                return self._note(name, rate, value, lambda: func(*args, **given))
        return func(*args, **given)

    def _note(self, name: str, rate: float, value: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """Run a call of dropout and keep which values it dropped."""
        there = value.detach().flatten()[:DROPPED_VALUES] != 0
        result = call()
        units = int(there.sum()) if self.elementwise(value, result) else 0
        if units * math.log(rate**2 + (1 - rate) ** 2) < math.log(NEVER):
            self.run.dropped.append((name, there & (result.detach().flatten()[:DROPPED_VALUES] == 0)))
        return result

    @staticmethod
    def elementwise(value: Tensor, result: Tensor) -> bool:
        """Tell whether single values were dropped, and no whole channels, which are too few to tell chance by."""
        return value.shape == result.shape and bool((result == 0).any())


def check_modes(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Switch to train mode and to eval mode, and require dropout and batch normalisation to follow.

    Codes: ``train_eval_ignored``, and ``input_mutation`` for what only train mode changes.
    """
    module = adapter.module
    layers = {name: child for name, child in module.named_modules() if switches(child)}
    inputs = example(adapter, 0, 2 if adapter.num_parameters > LARGE_MODEL else 4)
    runs: list[_Run] = []
    with preserved(module):
        in_eval = _run(adapter, inputs, False)
        try:
            afterwards = _run(adapter, inputs, True)
        except ModelCrash:
            afterwards = None
    with preserved(module):
        module.train()
        try:
            findings = mutations(adapter, inputs, lambda given: runs.append(_run(adapter, given, True, copy=False)))
        except ModelCrash as crash:
            # What only train mode breaks is said once, by the check of gradients.
            raise Skipped(f"a forward pass in train mode raises ({crash})") from crash
        in_train = runs[0]
    if findings and mutations(adapter, inputs, adapter.forward):
        # What eval mode changes as well is said once, by the check of determinism.
        findings = []
    faults = _stuck(adapter, in_eval, layers) or _stuck(adapter, in_train, layers)
    faults = faults or [
        _pinned(adapter, run, name) for run in (in_eval, in_train) for name in dict.fromkeys(run.pinned)
    ]
    # Parts that stay in eval mode on purpose have nothing to say.
    layers = {name: layer for name, layer in layers.items() if in_train.before[name]}
    faults += _left_over(adapter, inputs, in_train, afterwards) if not faults else []
    if in_train.dropped and not faults:
        faults = _reseeded(adapter, inputs, in_train)
    if layers and not faults and alike(in_eval.output, in_train.output):
        faults = _same(adapter, inputs, layers, in_train, budget)
    why = "train and eval mode reach every layer that depends on them" if layers else "no layer depends on the mode"
    return Outcome(f"{len(layers)} layers depend on the mode", "all follow it", why, findings + faults)


def switches(module: nn.Module) -> bool:
    """Tell whether a layer by itself should do different things in train and eval mode."""
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, NORMS):
        return bool(module.track_running_stats)
    return drop_rate(module) > 0


def drop_rate(module: nn.Module) -> float:
    """Return the probability of a dropout or drop-path layer, 0 for any other module.

    A layer of the user's own is one without parameters and parts whose only number between 0 and 1 has a usual name.
    """
    if isinstance(module, DROPOUTS):
        return float(module.p)
    if type(module).__module__.startswith("torch.") or any(True for _ in module.parameters()):
        return 0.0
    rates = [getattr(module, name, None) for name in RATE_NAMES] if not any(True for _ in module.children()) else []
    return next((rate for rate in rates if isinstance(rate, float) and 0 < rate < 1), 0.0)


def _run(adapter: ModelAdapter, inputs: Inputs, train: bool, seed: int = 0, copy: bool = True) -> _Run:
    """Set the mode as a user would, run the model once on a copy of the inputs and note what happened to the modes."""
    module = adapter.module
    given = copied(inputs) if copy else inputs
    module.train() if train else module.eval()
    run = _Run(train, {name: child.training for name, child in module.named_modules()})

    running = Running()

    def note(name: str, child: nn.Module, received: tuple[Any, ...], output: Any) -> None:
        if switches(child) and not isinstance(child, NORMS):
            run.callers[name] = running.stack[-2] if len(running.stack) > 1 else ""
            run.acted[name] = run.acted.get(name, False) or not alike(values(output), values(received[:1]))

    def call() -> Any:
        seed_streams(seed, "determinism")
        with (
            torch.no_grad(),
            observe(module, note),
            running_modules(module, running=running),
            _Pinned(adapter, running, run),
        ):
            return adapter.forward_in_training(given) if train else adapter.forward(given)

    run.output = [tensor for tensor in values(guarded(adapter, inputs, "", call)) if tensor.is_floating_point()]
    run.after = {name: child.training for name, child in module.named_modules()}
    return run


def _stuck(adapter: ModelAdapter, run: _Run, layers: dict[str, nn.Module]) -> list[Finding]:
    """Find parts that are in the wrong mode although the model was switched, or that forward() switches back."""
    verb = "train()" if run.asked else "eval()"
    wrong = [name for name, mode in run.before.items() if mode != run.asked]
    # Parts made during the pass are gone again.
    after = {name: mode for name, mode in run.after.items() if name in run.before}
    how = f"stays in {'eval' if run.asked else 'train'} mode after model.{verb}"
    if not wrong:
        wrong = [name for name, mode in after.items() if mode != run.asked]
        how = f"is switched to {'eval' if run.asked else 'train'} mode by forward() after model.{verb}"
    findings: list[Finding] = []
    topmost = [name for name in wrong if not any(_inside(name, other) for other in wrong if other != name)]
    for name in topmost:
        inside = {key: layer for key, layer in layers.items() if key == name or _inside(key, name)}
        part = adapter.module.get_submodule(name)
        parameters = list(part.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        # A single layer that goes on dropping or normalising by batch in eval mode is found by what it does.
        alone = not run.asked and not any(True for _ in part.children())
        # Running statistics are kept as they are on purpose, in detection and in small batches.
        kept = run.asked and all(isinstance(layer, NORMS) for layer in inside.values())
        if not inside or frozen or alone or kept:
            continue
        message = f"this part {how}; {len(inside)} layers in it depend on the mode, {next(iter(inside))!r} first"
        reproduction = (
            f"model.{verb}\nprint([name for name, m in model.named_modules() if m.training is {not run.asked}])"
        )
        findings.append(Finding("train_eval_ignored", "fail", name or adapter.name, message, MODE_HINT, reproduction))
    return findings


def _inside(name: str, other: str) -> bool:
    """Tell whether a module is a part of another, by name."""
    return other == "" or name.startswith(f"{other}.")


def _pinned(adapter: ModelAdapter, run: _Run, name: str) -> Finding:
    """Describe a function that is told the wrong mode."""
    asked, told = ("train", "False") if run.asked else ("eval", "True")
    message = f"in {asked} mode dropout or batch normalisation is called with training={told} here, as a constant"
    return Finding("train_eval_ignored", "fail", name or adapter.name, message, PINNED_HINT)


def _left_over(adapter: ModelAdapter, inputs: Inputs, fresh: _Run, afterwards: _Run | None) -> list[Finding]:
    """Find train mode that is another after a pass in eval mode; both runs are on the same random streams."""

    def train() -> _Run:
        return _run(adapter, inputs, True)

    def train_fresh() -> _Run:
        with preserved(adapter.module):
            return train()

    if afterwards is not None and alike(fresh.output, afterwards.output):
        return []
    if not alike(train_fresh().output, fresh.output):
        return []
    message = "after one pass in eval mode the same pass in train mode gives another answer, on the same random numbers"
    try:
        with preserved(adapter.module):
            where = first_difference(adapter, train_fresh, train, lambda: _run(adapter, inputs, False))
    except ModelCrash as crash:
        where, message = crash.where, f"after one pass in eval mode train mode raises ({crash})"
    hint = "Decide by self.training in each call, and change nothing on self in forward()."
    return [Finding("state_across_calls", "fail", where or adapter.name, message, hint)]


def _reseeded(adapter: ModelAdapter, inputs: Inputs, run: _Run) -> list[Finding]:
    """Find dropout that drops the same values on any random stream, because forward() sets the seed."""
    for seed in (1, 2):
        with preserved(adapter.module):
            other = _run(adapter, inputs, True, seed)
        pairs = zip(run.dropped, other.dropped, strict=False)
        same = [name for (name, before), (twin, after) in pairs if name == twin and torch.equal(before, after)]
        if not same:
            return []
    message = (
        f"dropout in `{same[0] or adapter.name}` drops the same values in every training step, whatever the random "
        "streams hold: they are set to a fixed seed here, and all that is drawn after it repeats too"
    )
    where = _seeding_module(adapter, inputs) or adapter.name
    return [Finding("train_eval_ignored", "fail", where, message, SEED_HINT, SEED_LINES)]


def _seeding_module(adapter: ModelAdapter, inputs: Inputs) -> str:
    """Return the module in whose own code torch's stream, differently seeded before, becomes the same."""
    runs: list[list[tuple[str | None, bytes]]] = []
    for seed in (1, 2):
        states: list[tuple[str | None, bytes]] = []

        def note(name: str | None, states: list[tuple[str | None, bytes]] = states) -> None:
            states.append((name, bytes(torch.get_rng_state().numpy())))

        with preserved(adapter.module), running_modules(adapter.module, note), torch.no_grad():
            adapter.module.train()
            seed_streams(seed, "determinism")
            adapter.forward_in_training(copied(inputs))
        runs.append(states)
    met = (name for (name, first), (_, second) in zip(*runs, strict=False) if first == second)
    return next(met, "") or ""


def _same(
    adapter: ModelAdapter, inputs: Inputs, layers: dict[str, nn.Module], run: _Run, budget: Budget
) -> list[Finding]:
    """Judge a model that answers the same in both modes."""
    # A branch that starts at zero hides what happens inside it.
    with swapped(adapter.module, awakened), preserved(adapter.module):
        seeds = _tries(layers)
        base = _run(adapter, inputs, False).output
        if alike(_run(adapter, example(adapter, 1, len(inputs[adapter.main_input])), False).output, base):
            # Nothing reaches the output at all, which has a code of its own.
            return []
        for seed in range(seeds):
            if seed and not budget.afford(0.2, f"{seed} of {seeds} seeds were tried for random layers"):
                return []
            if not alike(_run(adapter, inputs, True, seed).output, base):
                return []
    if not run.acted and adapter.unfilled_inputs:
        # They may belong to a part that waits for an input that was not given, such as an image or a sound.
        return []
    idle = [name for name, acted in run.acted.items() if not acted]
    acting = [name for name, acted in run.acted.items() if acted]
    evidence = "the model's output is the same in train mode as in eval mode"
    if idle:
        where, message = idle[0], f"{evidence}: this layer ran in train mode and changed nothing"
    elif acting:
        where, message = run.callers[acting[0]], f"{evidence}: the result of `{acting[0]}` is not used here"
    else:
        where, message = next(iter(layers)), f"{evidence}: this layer and {len(layers) - 1} like it never run"
    severity = "fail" if run.acted or all(isinstance(layer, NORMS) for layer in layers.values()) else "warn"
    return [Finding("train_eval_ignored", severity, where or adapter.name, message, PINNED_HINT)]


def _tries(layers: dict[str, nn.Module]) -> int:
    """Return how many seeds leave no chance that layers dropped nothing; torch's own rescale what they keep."""
    if any(type(layer).__module__.startswith("torch.") for layer in layers.values()):
        return 1
    rate = max(drop_rate(layer) for layer in layers.values())
    return math.ceil(math.log(RARE) / math.log(1 - rate))
