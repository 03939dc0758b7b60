"""What Tier 1 finds in the zoo of broken models, and what it says wrongly of sound ones.

    python benchmarks/validation_quality.py                        everything, one seed
    python benchmarks/validation_quality.py --set holdout          models that no check was tuned on
    python benchmarks/validation_quality.py --set unseen_a         written apart too; checks were mended by it since
    python benchmarks/validation_quality.py --set unseen_b         first run when the checks were done
    python benchmarks/validation_quality.py --set unseen_c         written after that; mended by it since its first run
    python benchmarks/validation_quality.py --public               bugs of public trackers only
    python benchmarks/validation_quality.py --sound --seeds 3      sound models only, three seeds each
    python benchmarks/validation_quality.py --code future_leakage --json answers.json

Detection: any finding of the expected severity. Right code: one of the accepted codes among them. Right module: that
finding names an accepted module or parameter. Rates are over all broken models of the run.
"""

import argparse
import contextlib
import io
import json
import signal
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import holdout, unseen_a, unseen_b, unseen_c, zoo
from benchmarks.zoo import Entry

SETS = {"zoo": (zoo,), "holdout": (holdout,), "unseen_a": (unseen_a,), "unseen_b": (unseen_b,), "unseen_c": (unseen_c,)}
SETS["all"] = tuple(source for sources in SETS.values() for source in sources)
LEVEL = {"warn": 1, "fail": 2}


class TooSlow(BaseException):
    """Raised by the timer; no check that tells crashes apart catches it."""


def on_timer(*_: Any) -> None:
    """Stop the model under test."""
    raise TooSlow


def fresh(value: Any) -> Any:
    """Copy example inputs, which some broken models change."""
    return {name: item.clone() for name, item in value.items()} if isinstance(value, dict) else value


def examine(entry: Entry, seed: int, timeout: float) -> dict[str, Any]:
    """Validate one model and return its verdict, its findings and the seconds it took."""
    from utils import ModelSpec, validate

    answer: dict[str, Any] = {"name": entry.name, "seed": seed, "codes": entry.codes, "findings": [], "error": ""}
    answer["source"] = entry.source
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            model = entry.make(seed)
            answer["root"] = type(model).__name__
            spec = ModelSpec(**{name: fresh(value) for name, value in entry.spec.items()}) if entry.spec else None
            report = validate(model, spec=spec, config=entry.config, progress=False)
        answer["verdict"] = report.verdict
        answer["findings"] = [finding.to_dict() for result in report.results for finding in result.findings]
        answer["crashed"] = [result.check for result in report.results if result.could_not_run]
    except TooSlow:
        answer["error"] = f"took more than {timeout:g} s"
    except Exception as problem:  # The benchmark goes on with the next model.
        answer["error"] = f"{type(problem).__name__}: {str(problem)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    answer["seconds"] = time.perf_counter() - started
    return answer


def judge(entry: Entry, answer: dict[str, Any]) -> None:
    """Add to an answer about a broken model what of it is right."""
    heard = [f for f in answer["findings"] if LEVEL[f["severity"]] >= LEVEL[entry.severity]]
    right = [f for f in heard if f["code"] in entry.codes]
    answer["detected"], answer["coded"] = bool(heard), bool(right)
    answer["placed"] = any(entry.names(f["where"], answer.get("root", "")) for f in right)
    answer["extra"] = sorted(
        {f["code"] for f in answer["findings"] if f["severity"] == "fail" and f["code"] not in entry.codes}
    )


def said(answer: dict[str, Any]) -> str:
    """Return what was reported, in one line."""
    if answer["error"]:
        return answer["error"]
    parts = [f"{f['severity']} {f['code']} at {f['where'] or '(root)'}" for f in answer["findings"]]
    shown = "; ".join(parts[:4]) + (f"; {len(parts) - 4} more" if len(parts) > 4 else "")
    return shown or f"nothing, verdict {answer['verdict']!r}"


def print_broken(answers: list[dict[str, Any]]) -> None:
    """Print rates, the table by code, misses and further fails."""
    total = len(answers)
    by_code: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        by_code[answer["codes"][0]].append(answer)
    print(f"\nBroken models: {total}, of {len(by_code)} codes")
    for key, title in (("detected", "detected"), ("coded", "right code"), ("placed", "right module")):
        count = sum(answer[key] for answer in answers)
        print(f"  {title:<14}{count:>5} / {total}  {count / total:.1%}")
    if public := [answer for answer in answers if answer["source"]]:
        print(f"  of public trackers: {sum(a['coded'] for a in public)} / {len(public)} with the right code")
    print(f"\n{'code':<26}{'models':>7}{'found':>7}{'code':>7}{'module':>8}")
    for code, group in sorted(by_code.items()):
        counts = [sum(answer[key] for answer in group) for key in ("detected", "coded", "placed")]
        print(f"{code:<26}{len(group):>7}{counts[0]:>7}{counts[1]:>7}{counts[2]:>8}")
    for key, title in (("coded", "Missed, or another code"), ("placed", "Right code, another place")):
        rows = [a for a in answers if not a[key] and (key == "coded" or a["coded"])]
        print(f"\n{title}: {len(rows)}")
        for answer in rows:
            print(f"  {answer['name']} [{answer['seed']}]: {said(answer)}")
    extras = Counter(code for answer in answers for code in answer["extra"])
    print(f"\nFurther fails on broken models: {sum(extras.values())}  {dict(extras.most_common())}")
    for answer in answers:
        if answer["extra"]:
            print(f"  {answer['name']} [{answer['seed']}]: {', '.join(answer['extra'])}")


def print_sound(answers: list[dict[str, Any]]) -> None:
    """Print false alarms."""
    failed = [a for a in answers if a["error"] or any(f["severity"] == "fail" for f in a["findings"])]
    warned = [a for a in answers if a not in failed and a["findings"]]
    print(f"\nSound models: {len(answers)}; with a fail or an error: {len(failed)}; with a warn only: {len(warned)}")
    for title, rows in (("fail", failed), ("warn", warned)):
        for answer in rows:
            print(f"  {title} {answer['name']} [{answer['seed']}]: {said(answer)}")


def print_costs(answers: list[dict[str, Any]], seeds: int) -> None:
    """Print seconds, crashes of checks, and how steady verdicts are over seeds."""
    seconds = sorted(answer["seconds"] for answer in answers)
    slowest = max(answers, key=lambda answer: answer["seconds"])
    print(f"\nSeconds: median {statistics.median(seconds):.2f}, most {seconds[-1]:.2f} ({slowest['name']})")
    for answer in answers:
        if answer.get("crashed"):
            print(f"  could not run for {answer['name']}: {', '.join(answer['crashed'])}")
    if seeds > 1:
        verdicts: dict[str, list[str]] = defaultdict(list)
        for answer in answers:
            verdicts[answer["name"]].append(answer.get("verdict", "error"))
        others = sum(len(group) - Counter(group).most_common(1)[0][1] for group in verdicts.values())
        print(f"Verdicts that differ from the usual one of their model: {others} / {len(answers)}")


def main() -> None:
    """Run the selection and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=tuple(SETS), default="zoo", help="models of the zoo or those kept apart")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--code", action="append", default=[], help="models of this code; may be repeated")
    parser.add_argument("--public", action="store_true", help="bugs of public trackers only")
    parser.add_argument("--sound", action="store_true", help="sound models only")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per model")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per model")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--json", type=Path, help="write all answers here")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    signal.signal(signal.SIGALRM, on_timer)
    selection = [
        entry
        for source in SETS[chosen.set]
        for entry in source.entries(
            sound=not chosen.public, public=not chosen.sound, broken=not (chosen.public or chosen.sound)
        )
        if chosen.only in entry.name and (not chosen.code or (entry.codes and entry.codes[0] in chosen.code))
    ]
    answers: list[dict[str, Any]] = []
    for number, entry in enumerate(selection):
        for seed in range(chosen.seeds):
            answers.append(examine(entry, seed, chosen.timeout))
            if entry.codes:
                judge(entry, answers[-1])
        print(f"\r{number + 1} / {len(selection)} {entry.name[:60]:<60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    broken = [answer for answer in answers if answer["codes"]]
    if broken:
        print_broken(broken)
    if sound := [answer for answer in answers if not answer["codes"]]:
        print_sound(sound)
    if answers:
        print_costs(answers, chosen.seeds)
    if chosen.json:
        chosen.json.write_text(json.dumps(answers, indent=1, default=str))


if __name__ == "__main__":
    main()
