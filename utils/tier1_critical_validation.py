"""Tier 1: is this model sound? The ordered list of checks that every model passes through, in about a minute at most.

This is the one place where checks are registered; each is a small function in `utils.validation`.
"""

import time
from collections.abc import Sequence
from typing import Any

from utils.adapters import ModelSpec
from utils.runtime.errors import ConfigError
from utils.runtime.printing import captured_output
from utils.validation.attention_arithmetic import check_attention_arithmetic
from utils.validation.batch_independence import check_batch_independence
from utils.validation.causality import check_causality
from utils.validation.check import Check
from utils.validation.containment import UnusableModel, open_model, unusable_report
from utils.validation.costs import check_costs
from utils.validation.determinism import check_determinism
from utils.validation.embedding_scale import check_embedding_scale
from utils.validation.gradient_flow import check_gradient_flow
from utils.validation.inference_speed import check_inference_speed
from utils.validation.initialization import check_initialization
from utils.validation.input_influence import check_input_influence
from utils.validation.learnability import check_learnability
from utils.validation.low_precision import check_low_precision
from utils.validation.memory_footprint import check_memory_footprint
from utils.validation.modes import check_modes
from utils.validation.numerical_stability import check_numerical_stability
from utils.validation.objective import check_objective
from utils.validation.padding import check_padding
from utils.validation.padding_row import check_padding_row
from utils.validation.persistence import check_persistence
from utils.validation.portability import check_portability
from utils.validation.positions import check_positions
from utils.validation.registration import check_registration
from utils.validation.report import ValidationReport
from utils.validation.runner import run_checks
from utils.validation.scaling import check_memory_growth, check_memory_scaling
from utils.validation.shape_robustness import check_shape_robustness
from utils.validation.show import Shown, reproduce
from utils.validation.signal_propagation import check_signal_propagation

TIER1: tuple[Check, ...] = (
    Check(
        "shape_robustness",
        1,
        "does it take every legal shape?",
        check_shape_robustness,
        share=4,
        codes=("shape_crash", "shape_limit", "vocab_mismatch", "hardcoded_device", "out_of_memory"),
    ),
    Check(
        "determinism",
        1,
        "is the answer a function of the input?",
        check_determinism,
        share=1.5,
        codes=("dropout_in_eval", "nondeterministic_forward", "state_across_calls", "input_mutation"),
    ),
    Check(
        "modes",
        1,
        "do train and eval mode work?",
        check_modes,
        share=1,
        codes=("train_eval_ignored", "state_across_calls", "input_mutation"),
    ),
    Check(
        "registration",
        1,
        "is every part known to torch, once?",
        check_registration,
        share=0.5,
        codes=("unregistered_layer", "lazy_parameter", "shared_weight"),
    ),
    Check(
        "persistence",
        1,
        "does everything survive saving and moving?",
        check_persistence,
        share=0.5,
        codes=("buffer_not_registered",),
    ),
    Check(
        "portability",
        1,
        "does it run on another device and dtype?",
        check_portability,
        share=1,
        codes=("hardcoded_device", "hardcoded_dtype"),
    ),
    Check("causality", 1, "can a position see later tokens?", check_causality, share=4, codes=("future_leakage",)),
    Check(
        "batch_independence",
        1,
        "does one sample influence another?",
        check_batch_independence,
        share=1,
        codes=("batch_leakage",),
    ),
    Check(
        "padding",
        1,
        "does padding stay outside?",
        check_padding,
        share=1,
        codes=("padding_leakage", "nan_padding"),
    ),
    Check(
        "padding_row",
        1,
        "is the padding's row the padding's?",
        check_padding_row,
        share=0.2,
        codes=("padding_idx_wrong",),
    ),
    Check("positions", 1, "does the order matter?", check_positions, share=1, codes=("position_absent",)),
    Check(
        "input_influence",
        1,
        "does every input matter?",
        check_input_influence,
        share=1,
        codes=("constant_output", "ignored_input"),
    ),
    Check(
        "attention_arithmetic",
        1,
        "does attention choose among keys?",
        check_attention_arithmetic,
        share=0.5,
        codes=("wrong_softmax_dim", "missing_attention_scale"),
    ),
    Check(
        "gradient_flow",
        1,
        "does every parameter train?",
        check_gradient_flow,
        share=2,
        codes=(
            "detached_submodule",
            "unused_parameter",
            "frozen_parameter",
            "backward_crash",
            "exploding_gradient",
            "zero_gradient",
            "dead_relu",
            "nan_output",
        ),
    ),
    Check(
        "numerical_stability",
        1,
        "is everything finite?",
        check_numerical_stability,
        share=3,
        codes=("nan_output", "nan_long_sequence"),
    ),
    Check(
        "initialization",
        1,
        "do the weights start well?",
        check_initialization,
        share=1,
        codes=("exploding_init", "vanishing_init", "symmetric_init", "zero_init", "exploding_gradient"),
    ),
    Check(
        "signal_propagation",
        1,
        "does the gradient reach the first layers?",
        check_signal_propagation,
        share=1,
        codes=("vanishing_gradient", "exploding_gradient", "missing_residual", "constant_output"),
    ),
    Check("embedding_scale", 1, "is the content heard?", check_embedding_scale, share=0.5, codes=("embedding_scale",)),
    Check(
        "low_precision",
        1,
        "does it run in bfloat16 and float16?",
        check_low_precision,
        share=1,
        codes=("low_precision_unsafe",),
    ),
    Check(
        "objective",
        1,
        "is the loss the right one?",
        check_objective,
        share=1.5,
        codes=("double_softmax", "wrong_softmax_dim", "wrong_builtin_loss", "label_shift"),
    ),
    Check("learnability", 1, "can it learn one batch?", check_learnability, share=1, codes=("cannot_learn",)),
    Check(
        "memory_growth", 1, "does it keep more in each call?", check_memory_growth, share=1, codes=("memory_growth",)
    ),
    Check(
        "memory_scaling",
        1,
        "how does memory grow with the length?",
        check_memory_scaling,
        share=0.5,
        codes=("quadratic_memory",),
    ),
    Check("memory_footprint", 1, "does it fit?", check_memory_footprint, share=1.5, codes=("out_of_memory",)),
    Check("costs", 1, "where does the time go?", check_costs, share=0.5),
    Check("inference_speed", 1, "how fast is it?", check_inference_speed, share=1, codes=("slow_python_loop",)),
)
"""Every Tier 1 check in the order of the report: what would make the others meaningless comes first."""


def run_tier1(
    model: Any,
    config: Any = None,
    spec: ModelSpec | None = None,
    time_budget: float | None = None,
    progress: bool = True,
) -> ValidationReport:
    """Run all Tier 1 checks; see `validate`."""
    return validate(model, (1,), spec, config, time_budget, progress)


def validate(
    model: Any,
    tiers: Sequence[int] = (1,),
    spec: ModelSpec | None = None,
    config: Any = None,
    time_budget: float | None = None,
    progress: bool = True,
    isolate: bool = True,
) -> ValidationReport:
    """Check a model and return the verdict with its evidence. The model comes back exactly as it was.

    Args:
        model: A loaded model, a `ModelAdapter` or a module.
        tiers: Which tiers to run: 1 judges, 2 describes.
        spec: What you know about the model; everything else is detected.
        config: Settings of the model, if it does not carry them.
        time_budget: Seconds for everything. A short budget samples less, and the report says what was reduced.
        progress: Whether to show a progress bar.
        isolate: Whether the first passes run in a copy of this process, so that a model which hangs there, ends the
            process or takes all memory does no harm; on Linux, for models on the CPU.

    Raises:
        ConfigError: A tier that does not exist in this version, or a budget that is no positive number.
        AdapterError: `model` is no module, or forward needs arguments that nobody can guess.
    """
    if isinstance(tiers, str):
        raise ConfigError(f"tiers is the text {tiers!r}.", "Expected numbers.", "Pass (1,), (2,) or (1, 2).")
    if isinstance(tiers, int) or not isinstance(tiers, Sequence):
        tiers = (tiers,)
    if spec is not None and not isinstance(spec, ModelSpec):
        raise ConfigError(f"spec is a {type(spec).__name__}.", "Expected a utils.ModelSpec.", "ModelSpec(task=...).")
    unknown = [tier for tier in tiers if tier not in (1, 2)]
    if unknown or not tiers:
        raise ConfigError(
            f"Tier {unknown[0]!r} was asked for." if unknown else "No tier was asked for.",
            "Validation has Tier 1 (is it sound?) and Tier 2 (what does it do with its input?).",
            "Call validate(model) or validate(model, tiers=(1, 2)).",
        )
    number = isinstance(time_budget, (int, float)) and not isinstance(time_budget, bool)
    if time_budget is not None and not (number and 0 < time_budget < float("inf")):
        raise ConfigError(f"time_budget is {time_budget!r}.", "Expected seconds, more than 0.", "Or leave it out.")
    started = time.perf_counter()
    checks = [*(TIER1 if 1 in tiers else ()), *(_tier2() if 2 in tiers else ())]
    try:
        adapter = open_model(model, config, spec, isolate)
    except UnusableModel as error:
        return unusable_report(error, checks, time.perf_counter() - started)
    return run_checks(adapter, checks, time_budget, progress, started=started)


def show(code: str, model: Any, spec: ModelSpec | None = None, config: Any = None) -> Shown:
    """Reproduce one finding: run the checks that look for it again, alone, and show their evidence.

    Args:
        code: Code of the finding, for example ``"future_leakage"``.
        model: What `validate` takes.
        spec: Facts that override detection.
        config: Settings of the model.

    Raises:
        ConfigError: No check looks for this code.
    """
    try:
        adapter = open_model(model, config, spec, isolate=True)
    except UnusableModel as error:
        # Running it here would end this process as well; what the rehearsal saw is all there is.
        report = unusable_report(error, TIER1[:1], 0.0)
        text = f"{error.finding.where}: {error.finding.message}"
        return Shown(code, error.finding.code == code, text, {}, (), report.results)
    with captured_output():
        return reproduce(code, adapter, TIER1)


def _tier2() -> tuple[Check, ...]:
    """Return the diagnostics of Tier 2, which are imported only when somebody wants them."""
    from utils.tier2_advanced_analysis import TIER2

    return TIER2


__all__ = ["TIER1", "run_tier1", "show", "validate"]
