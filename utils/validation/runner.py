"""Runs checks one after another so that none can hurt the model, the others or the caller."""

import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from utils.adapters.location import code_location
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.garbage import old_objects_aside
from utils.runtime.isolation import ModelChangedError, preserved
from utils.runtime.printing import Printed
from utils.runtime.progress import progress_bar
from utils.runtime.resources import LARGE_MODEL
from utils.validation.check import Budget, Check, CheckResult, Finding, Outcome, Skipped
from utils.validation.codes import CALLED, MADE, OF_NAN, RAISED
from utils.validation.containment import NOT_RUN, UnusableModel, contained
from utils.validation.probing import ModelCrash, crash_line, first_line, is_out_of_memory
from utils.validation.report import ValidationReport
from utils.validation.reproduction import copyable, default_lines, more_arguments, on_a_copy

CHANGED = "state_across_calls"
CRASHED = "crash on a legal input"
WITHOUT_LINES = "without_lines"
"""What the details of a result call the errors of lines that could not be made."""
DEFAULT_SECONDS = {1: 22.0, 2: 150.0}
OVERRUN_SECONDS = 0.5
"""How much longer than its share of a stated budget a check may take without saying so."""
HANGING_SECONDS, HANGING_AGAIN_SECONDS = 60.0, 5.0
"""A check is ended after so long, or after four times its budget if that is more; less once one had to be ended."""


def run_checks(
    adapter: ModelAdapter,
    checks: Sequence[Check],
    time_budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
    started: float | None = None,
) -> ValidationReport:
    """Run checks in order and collect their results.

    Each check runs in eval mode on its own random streams inside `preserved`, so the model comes back as it was.
    An exception inside a check becomes that check's result.

    Args:
        adapter: The model.
        checks: What to run.
        time_budget: Seconds for everything; None gives each tier its usual time. It is divided among the checks by
            their shares, and what one leaves over goes to the next.
        progress: Whether to show a progress bar.
        seed: Seed of everything random in the checks.
        started: When the time began to count, by `time.perf_counter`; now by default.
    """
    started = time.perf_counter() if started is None else started
    weights = _weights(checks)
    total = time_budget if time_budget is not None else sum(DEFAULT_SECONDS[tier] for tier in {c.tier for c in checks})
    results: list[CheckResult] = []
    changed = adapter.changed
    with progress_bar(len(checks), "validating", enabled=progress) as bar:
        try:
            # One outermost block, so that the parameters are copied once and not by every check.
            with preserved(adapter.module, seed, "checks"):
                for index, check in enumerate(checks):
                    bar.set_description_str(check.title)
                    left = max(0.0, total - (time.perf_counter() - started))
                    share = weights[index] / sum(weights[index:])
                    ended = any(finding.code == "timed_out" for result in results for finding in result.findings)
                    hanging = HANGING_AGAIN_SECONDS if ended else HANGING_SECONDS
                    result = _told_once(adapter, run_check(adapter, check, left * share, seed, hanging), results)
                    results.append(_overrun(result, left * share) if time_budget is not None else result)
                    bar.update()
        except ModelChangedError as error:
            changed = changed or error
    if changed is not None and results and not any(f.code == CHANGED for r in results for f in r.findings):
        results[0] = _with_finding(results[0], _changed_finding(adapter, changed))
    return ValidationReport(
        results=tuple(_consequences(results)),
        model=adapter.name,
        task=adapter.task.value if adapter.failure is None else None,
        parameters=adapter.num_parameters,
        seconds=time.perf_counter() - started,
        tiers=tuple(sorted({check.tier for check in checks})),
        detections=tuple(adapter.describe() if adapter.failure is None else ()),
        arguments=more_arguments(adapter),
    )


def _weights(checks: Sequence[Check]) -> list[float]:
    """Return how the time is divided: among the tiers as they usually take, within a tier by the checks' shares."""
    shares = {tier: sum(check.share for check in checks if check.tier == tier) for tier in DEFAULT_SECONDS}
    return [DEFAULT_SECONDS[check.tier] * check.share / shares[check.tier] for check in checks]


@old_objects_aside()
def run_check(
    adapter: ModelAdapter, check: Check, seconds: float, seed: int = 0, hanging: float = HANGING_SECONDS
) -> CheckResult:
    """Run one check in isolation and turn whatever happens into its result.

    Args:
        adapter: The model.
        check: What to run.
        seconds: Its time budget, which it keeps by doing less.
        seed: Seed of everything random in it.
        hanging: Seconds after which it is ended, if that is more than four times its budget.
    """
    budget = Budget(seconds)
    outcome: Outcome | None = None
    skipped, could_not_run = "", False
    printed = Printed()
    try:
        with preserved(adapter.module, seed, check.id), torch.enable_grad():
            adapter.module.eval()
            with contained(adapter.module, max(hanging, 4 * seconds)) as printed:
                outcome = check.run(adapter, budget)
    except UnusableModel as reason:
        outcome = Outcome("ended", "an answer", "", (reason.finding,))
        if check.tier > 1 and reason.finding.code == "timed_out":
            # A diagnostic runs the model many times, so that its time says nothing about a single pass.
            outcome, skipped, could_not_run = None, f"could not run: {reason.finding.message}", True
    except Skipped as reason:
        skipped = str(reason)
    except ModelChangedError as error:
        # It is raised at the end of the block, when the check has its answer.
        finding = _changed_finding(adapter, error)
        known = outcome or Outcome("changed", "unchanged", "")
        outcome = Outcome(known.value, known.threshold, known.why, (finding, *known.findings), known.details)
    except ModelCrash as crash:
        hint = "Make the model take every legal input; shape_robustness lists what was tried."
        finding = Finding("shape_crash", "fail", crash.where, str(crash), hint)
        outcome = Outcome(CRASHED, "no crash", str(crash), (finding,))
        if adapter.failure is not None:
            # Inputs that never ran prove nothing; what they mean is for shape_robustness to say.
            outcome, skipped, could_not_run = None, "could not run: no forward pass succeeded", True
        elif check.tier > 1:
            # A description is no verdict; whether this input is legal is for Tier 1 to say.
            outcome, skipped, could_not_run = None, f"could not run: {crash}", True
    except AdapterError as error:
        skipped, could_not_run = f"could not run: {first_line(error)}", True
    except (Exception, SystemExit, GeneratorExit) as error:
        # Anything else, Ctrl-C and an alarm of the caller's own among it, is not the model's doing and passes through.
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        skipped, could_not_run = f"could not run: {kind}: {first_line(error)}", True
    finally:
        # Only large garbage is worth a collection.
        if could_not_run or adapter.num_parameters > LARGE_MODEL:
            _release()
    output = {"printed": printed.count, "printed_start": printed.start} if printed.count else {}
    if outcome is None:
        gap = {"could_not_run": True} if could_not_run else {}
        return CheckResult(check.id, check.tier, "skip", None, None, skipped, budget.spent(), {**gap, **output})
    ordered = sorted(outcome.findings, key=lambda finding: finding.severity != "fail")
    findings, lost = _completed(adapter, ordered) if ordered else ((), {})
    status = findings[0].severity if findings else "pass"
    reduced = {"reduced": list(budget.reduced)} if budget.reduced else {}
    details = {**outcome.details, **reduced, **output, **({WITHOUT_LINES: lost} if lost else {})}
    why = findings[0].message if findings else outcome.why
    return CheckResult(
        check.id, check.tier, status, outcome.value, outcome.threshold, why, budget.spent(), details, findings,
        tuple(outcome.pictures),
    )  # fmt: skip


def _completed(adapter: ModelAdapter, findings: Sequence[Finding]) -> tuple[tuple[Finding, ...], dict[str, str]]:
    """Add the place in the code, and lines that show the fault where the check gave none; and what went wrong there."""
    placed = []
    for finding in findings:
        location = finding.location
        if not location and finding.code in RAISED:
            location = crash_line(adapter, finding.where)
        if not location:
            at = "made" if finding.code in MADE else "called" if finding.code in CALLED else "inside"
            location = code_location(adapter.module, finding.where, at)
        placed.append(replace(finding, location=location))
    lines, lost = _lines(adapter, placed)
    return tuple(replace(finding, reproduction=text) for finding, text in zip(placed, lines, strict=True)), lost


def _lines(adapter: ModelAdapter, findings: Sequence[Finding]) -> tuple[list[str], dict[str, str]]:
    """Return the lines that show each finding, and the errors of those that could not be made, by code."""
    lines = [finding.reproduction for finding in findings]
    lost: dict[str, str] = {}
    index, possible, code = 0, True, findings[0].code
    try:
        with preserved(adapter.module, 0, "reproduction"), contained(adapter.module, HANGING_AGAIN_SECONDS):
            possible = copyable(adapter)
            for index, finding in enumerate(findings):
                code = finding.code
                adapter.module.eval()
                try:
                    lines[index] = on_a_copy(lines[index] or default_lines(adapter, finding), possible)
                except Exception as error:
                    # Not worth a finding: the next one may do better, and the result tells of this one.
                    lost[code] = f"{type(error).__name__}: {first_line(error)}"
    except (UnusableModel, ModelChangedError) as error:
        lost[code] = f"{type(error).__name__}: {first_line(error)}"
        lines[index:] = [on_a_copy(text, possible) for text in lines[index:]]
    return lines, lost


def _overrun(result: CheckResult, seconds: float) -> CheckResult:
    """Say that the least a check does took longer than the time that the caller left for it."""
    if result.seconds <= seconds + OVERRUN_SECONDS:
        return result
    note = f"took {result.seconds:.1f} s, the least it does, where {seconds:.1f} s were left for it"
    return replace(result, details={**result.details, "reduced": [*result.details.get("reduced", ()), note]})


def _changed_finding(adapter: ModelAdapter, error: ModelChangedError) -> Finding:
    """Describe a forward pass that changes parameters."""
    return Finding(CHANGED, "fail", error.names[0], str(error), error.action)


def _told_once(adapter: ModelAdapter, result: CheckResult, earlier: Sequence[CheckResult]) -> CheckResult:
    """Point to the check that has already reported a crash, instead of telling all of it again."""
    result = _printed_once(result, earlier)
    if adapter.failure is not None and result.status == "skip" and any(r.findings or r.could_not_run for r in earlier):
        return replace(result, why=NOT_RUN)
    known = next((r.check for r in earlier for f in r.findings if f.code == "shape_crash" and f.severity == "fail"), "")
    if known and result.value == CRASHED and all(finding.code == "shape_crash" for finding in result.findings):
        why = f"could not run: the model crashed on a legal input, see {known}"
        gap = {**result.details, "could_not_run": True}
        return replace(result, status="skip", value=None, threshold=None, why=why, findings=(), details=gap)
    return result


def _printed_once(result: CheckResult, earlier: Sequence[CheckResult]) -> CheckResult:
    """Leave out of what the model printed the lines that an earlier check has shown."""
    if "printed_start" not in result.details:
        return result
    shown = {line for r in earlier for line in r.details.get("printed_start", "").splitlines()}
    lines = result.details["printed_start"].splitlines(keepends=True)
    new = "".join(dict.fromkeys(line for line in lines if line.rstrip("\r\n") not in shown))
    details = {key: value for key, value in result.details.items() if key != "printed_start"}
    return replace(result, details={**details, "printed_start": new} if new.strip() else details)


def _consequences(results: Sequence[CheckResult]) -> list[CheckResult]:
    """Leave out warnings that an output of NaN explains."""
    source = next((r.check for r in results for f in r.findings if f.code == "nan_output" and f.severity == "fail"), "")
    kept = []
    for result in results:
        told = tuple(f for f in result.findings if f.severity == "fail" or f.code not in OF_NAN)
        if source and len(told) < len(result.findings):
            why = f"not judged: something is not finite (see {source})"
            status = told[0].severity if told else "skip"
            result = replace(result, status=status, findings=told, why=told[0].message if told else why)
        kept.append(result)
    return kept


def _with_finding(result: CheckResult, finding: Finding) -> CheckResult:
    """Add a fault to a result."""
    findings = (finding, *result.findings)
    return replace(result, status=finding.severity, why=finding.message, findings=findings)


def _release() -> None:
    """Give memory back between checks."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
