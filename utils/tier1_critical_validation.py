"""Tier 1: is this model sound? The ordered list of checks that every model passes through, in about a minute at most.

This is the one place where checks are registered; each is a small function in `utils.validation`.
"""

from collections.abc import Sequence
from typing import Any

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError
from utils.validation.causality import check_causality
from utils.validation.check import Check
from utils.validation.gradient_flow import check_gradient_flow
from utils.validation.inference_speed import check_inference_speed
from utils.validation.initialization import check_initialization
from utils.validation.memory_footprint import check_memory_footprint
from utils.validation.numerical_stability import check_numerical_stability
from utils.validation.report import ValidationReport
from utils.validation.runner import run_checks
from utils.validation.shape_robustness import check_shape_robustness

TIER1: tuple[Check, ...] = (
    Check("shape_robustness", 1, "does it take every legal shape?", check_shape_robustness, share=4),
    Check("causality", 1, "can a position see later tokens?", check_causality, share=4),
    Check("gradient_flow", 1, "does every parameter train?", check_gradient_flow, share=2),
    Check("numerical_stability", 1, "is everything finite?", check_numerical_stability, share=3),
    Check("initialization", 1, "do the weights start well?", check_initialization, share=1),
    Check("memory_footprint", 1, "does it fit?", check_memory_footprint, share=1.5),
    Check("inference_speed", 1, "how fast is it?", check_inference_speed, share=1),
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
) -> ValidationReport:
    """Check a model and return the verdict with its evidence. The model comes back exactly as it was.

    Args:
        model: A loaded model, a `ModelAdapter` or a module.
        tiers: Which tiers to run: 1 judges, 2 describes.
        spec: What you know about the model; everything else is detected.
        config: Settings of the model, if it does not carry them.
        time_budget: Seconds for everything. A short budget samples less, and the report says what was reduced.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: A tier that does not exist in this version, or a budget that is no positive number.
        AdapterError: `model` is no module, or forward needs arguments that nobody can guess.
    """
    if isinstance(tiers, int):
        tiers = (tiers,)
    unknown = [tier for tier in tiers if tier not in (1, 2)]
    if unknown or not tiers:
        raise ConfigError(
            f"Tier {unknown[0]} was asked for." if unknown else "No tier was asked for.",
            "Validation has Tier 1 (is it sound?) and Tier 2 (what does it do with its input?).",
            "Call validate(model) or validate(model, tiers=(1, 2)).",
        )
    if time_budget is not None and (isinstance(time_budget, bool) or not time_budget > 0):
        raise ConfigError(f"time_budget is {time_budget!r}.", "Expected seconds, more than 0.", "Or leave it out.")
    keep = isinstance(model, ModelAdapter) and spec is None and config is None
    checks = [*(TIER1 if 1 in tiers else ()), *(_tier2() if 2 in tiers else ())]
    return run_checks(model if keep else ModelAdapter(model, config, spec), checks, time_budget, progress)


def _tier2() -> tuple[Check, ...]:
    """Return the diagnostics of Tier 2, which are imported only when somebody wants them."""
    from utils.tier2_advanced_analysis import TIER2

    return TIER2


__all__ = ["TIER1", "run_tier1", "validate"]
