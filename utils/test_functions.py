"""The historical names of the Tier 1 tests: ``test_shape_robustness(model, config)`` and friends.

Existing notebooks call these. They are aliases of the ``check_*`` functions below and not tests of this package:
``__test__ = False`` keeps pytest from collecting them.
"""

from typing import Any

from utils.adapters import ModelAdapter, ModelSpec
from utils.tier1_critical_validation import TIER1, run_tier1
from utils.validation.check import CheckResult
from utils.validation.report import ValidationReport
from utils.validation.runner import DEFAULT_SECONDS, run_check

_CHECKS = {check.id: check for check in TIER1}


def _run(check: str, model: Any, config: Any, spec: ModelSpec | None) -> CheckResult:
    """Run one Tier 1 check with the whole tier's time."""
    adapter = model if isinstance(model, ModelAdapter) and spec is None else ModelAdapter(model, config, spec)
    return run_check(adapter, _CHECKS[check], DEFAULT_SECONDS[1])


def check_shape_robustness(model: Any, config: Any = None, spec: ModelSpec | None = None) -> CheckResult:
    """Does the model take every legal batch size, length and id?"""
    return _run("shape_robustness", model, config, spec)


def check_causality(model: Any, config: Any = None, spec: ModelSpec | None = None) -> CheckResult:
    """Can a position of a causal model see later tokens?"""
    return _run("causality", model, config, spec)


def check_gradient_flow(model: Any, config: Any = None, spec: ModelSpec | None = None) -> CheckResult:
    """Does every trainable parameter get a finite gradient?"""
    return _run("gradient_flow", model, config, spec)


def check_output_stability(model: Any, config: Any = None, spec: ModelSpec | None = None) -> CheckResult:
    """Are outputs and loss finite for ordinary and extreme input?"""
    return _run("numerical_stability", model, config, spec)


def check_parameter_initialization(model: Any, config: Any = None, spec: ModelSpec | None = None) -> CheckResult:
    """Do the weights start where training can work?"""
    return _run("initialization", model, config, spec)


def check_memory_footprint(model: Any, config: Any = None, spec: ModelSpec | None = None) -> CheckResult:
    """What does the model need to run and to train, and what batch fits?"""
    return _run("memory_footprint", model, config, spec)


def check_inference_speed(model: Any, config: Any = None, spec: ModelSpec | None = None) -> CheckResult:
    """How fast is a forward pass, and does Python loop over positions or samples?"""
    return _run("inference_speed", model, config, spec)


def check_all_tier1(model: Any, config: Any = None, spec: ModelSpec | None = None) -> ValidationReport:
    """Run all Tier 1 checks."""
    return run_tier1(model, config, spec)


test_shape_robustness = check_shape_robustness
test_causality = check_causality
test_gradient_flow = check_gradient_flow
test_output_stability = check_output_stability
test_parameter_initialization = check_parameter_initialization
test_memory_footprint = check_memory_footprint
test_inference_speed = check_inference_speed
run_all_tier1_tests = check_all_tier1

for _alias in (
    test_shape_robustness, test_causality, test_gradient_flow, test_output_stability,
    test_parameter_initialization, test_memory_footprint, test_inference_speed,
):  # fmt: skip
    _alias.__test__ = False  # type: ignore[attr-defined]
