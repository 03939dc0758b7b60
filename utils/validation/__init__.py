"""Checks that say whether a model is sound: one family per file, a runner, a report, and pictures of single findings.

A check is one small function of an adapter and a budget that returns an `Outcome`; the tier modules above list them in
order. Nothing here knows how to call a model (that is `utils.adapters`) or changes it (`utils.runtime.isolation`).
"""

from utils.validation.check import Budget, Check, CheckResult, Finding, Outcome, Skipped
from utils.validation.report import ValidationReport
from utils.validation.runner import run_checks

__all__ = ["Budget", "Check", "CheckResult", "Finding", "Outcome", "Skipped", "ValidationReport", "run_checks"]
