"""Tier 2: what does this model do with its input? Diagnostics in about three minutes, none of which fails a model.

This is the one place where they are registered; each is a small function in `utils.validation`.
"""

from typing import Any

from utils.adapters import ModelSpec
from utils.tier1_critical_validation import validate
from utils.validation.adversarial import check_adversarial
from utils.validation.attention_patterns import check_attention_patterns
from utils.validation.attribution import check_attribution
from utils.validation.check import Check
from utils.validation.position_use import check_position_use
from utils.validation.report import ValidationReport
from utils.validation.representation import check_representation
from utils.validation.saliency import check_saliency
from utils.validation.sensitivity import check_sensitivity

TIER2: tuple[Check, ...] = (
    Check(
        "attention_patterns",
        2,
        "where does each head look?",
        check_attention_patterns,
        share=2,
        codes=("symmetric_init",),
    ),
    Check("attribution", 2, "which part of the input made the answer?", check_attribution, share=4),
    Check("saliency", 2, "which pixels matter?", check_saliency, share=2),
    Check("sensitivity", 2, "how much do small changes move it?", check_sensitivity, share=3),
    Check("adversarial", 2, "how few changes flip the answer?", check_adversarial, share=3),
    Check("representation", 2, "how much of its width is used?", check_representation, share=2),
    Check("position_use", 2, "how far back does it look?", check_position_use, share=2),
)
"""Every Tier 2 diagnostic in the order of the report."""


def run_tier2(
    model: Any,
    config: Any = None,
    spec: ModelSpec | None = None,
    time_budget: float | None = None,
    progress: bool = True,
) -> ValidationReport:
    """Run all Tier 2 diagnostics; see `utils.validate`."""
    return validate(model, (2,), spec, config, time_budget, progress)


__all__ = ["TIER2", "run_tier2"]
