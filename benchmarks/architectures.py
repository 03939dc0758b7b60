"""Every architecture of transformers, timm and torchvision that can be built small goes through Tier 1.

    python benchmarks/architectures.py                          all families of transformers
    python benchmarks/architectures.py --family causal_lm --limit 20
    python benchmarks/architectures.py --only mamba --json out.json
    python benchmarks/architectures.py --timm                   one small model of every module of timm
    python benchmarks/architectures.py --torchvision            every classifier of torchvision
    python benchmarks/architectures.py --detect-only            stop after the adapter

Nothing is downloaded and no architecture is exempt: what `benchmarks/small_configs.py` can shrink and what runs forward
on natural inputs here, without Seedbed, must be handled by `utils.validate` without a crash and without a `fail`. One
worker process takes one model after another; a model that hangs or kills it counts as a crash.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS_PER_MODEL = 60.0
FAMILIES = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio_classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "text_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "multiple_choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
}
"""The mapping of transformers that lists each family."""
DEFAULT_FAMILIES = ("causal_lm", "masked_lm", "seq2seq", "image_classification", "audio_classification")
Job = tuple[str, str, str]
"""Library or family, model type, class name."""


def transformers_jobs(family: str) -> list[Job]:
    """List a family's model types with their classes."""
    from transformers.models.auto import modeling_auto

    jobs = []
    for model_type, names in getattr(modeling_auto, FAMILIES[family]).items():
        classes = (names,) if isinstance(names, str) else names
        jobs += [(family, model_type, name) for name in classes]
    return list(dict.fromkeys(jobs))


def timm_jobs() -> list[Job]:
    """List the smallest model by name of every module of timm."""
    import timm

    small = ("test", "pico", "nano", "atto", "femto", "tiny", "xxs", "small", "_s", "18", "26", "50")
    jobs = []
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        names.sort(key=lambda name: next((rank for rank, word in enumerate(small) if word in name), len(small)))
        jobs += [("timm", module, name) for name in names[:1]]
    return jobs


def torchvision_jobs() -> list[Job]:
    """List the classifiers of torchvision."""
    from torchvision import models

    return [("torchvision", name, name) for name in models.list_models(module=models)]


def build(job: Job) -> Any:
    """Build a job's model small, run it forward on natural inputs, and return it."""
    import torch

    from benchmarks.small_configs import natural_inputs, small_model

    family, kind, name = job
    torch.manual_seed(0)
    if family == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=10)
        inputs: dict[str, Any] = {"x": torch.randn(2, *model.default_cfg["input_size"])}
    elif family == "torchvision":
        from torchvision import models

        extra = {"init_weights": True} if kind in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=10, **extra)
        inputs = {
            "x": torch.randn(2, 3, 299 if kind == "inception_v3" else 224, 299 if kind == "inception_v3" else 224)
        }
    else:
        model = small_model(kind, name, decoder=family == "causal_lm")
        inputs = natural_inputs(model, family)
    with torch.no_grad():
        model.eval()(**inputs)
    return model


def examine(job: Job, detect_only: bool) -> dict[str, Any]:
    """Build and validate one model; every outcome is plain values."""
    answer: dict[str, Any] = {"family": job[0], "type": job[1], "class": job[2], "built": False}
    started = time.perf_counter()
    try:
        model = build(job)
    except Exception as error:
        return answer | {"why": f"{type(error).__name__}: {str(error)[:300]}"}
    answer |= {"built": True, "parameters": sum(p.numel() for p in model.parameters())}
    answer["build_seconds"] = time.perf_counter() - started
    from utils.adapters import ModelAdapter
    from utils.tier1_critical_validation import validate

    started = time.perf_counter()
    try:
        adapter = ModelAdapter(model)
        facts = {row["name"]: str(row["value"]) for row in adapter.describe()} if adapter.failure is None else {}
        answer |= {"failure": adapter.failure, "facts": facts, "detect_seconds": time.perf_counter() - started}
        expected = {"timm": "image_classification", "torchvision": "image_classification"}.get(job[0], job[0])
        answer["task_found"] = adapter.task.value == expected
        if not detect_only:
            report = validate(adapter, progress=False)
            answer["findings"] = [
                {"check": result.check, **finding.to_dict()} for result in report.results for finding in result.findings
            ]
            answer["skipped"] = {r.check: r.why for r in report.results if r.status == "skip"}
            answer["could_not_run"] = {r.check: r.why for r in report.results if r.could_not_run}
            answer["check_seconds"] = {result.check: round(result.seconds, 3) for result in report.results}
    except Exception:
        answer["crash"] = traceback.format_exc(limit=-3)
    answer["seconds"] = time.perf_counter() - started
    return answer


def work(connection: Connection, detect_only: bool) -> None:
    """Answer jobs until the pipe closes."""
    import torch
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        while True:
            connection.send(examine(connection.recv(), detect_only))
    except EOFError:
        return


class Worker:
    """One process at a time; it is replaced when a model hangs or kills it."""

    def __init__(self, detect_only: bool) -> None:
        """Start nothing yet."""
        self.detect_only = detect_only
        self.process: Any = None

    def run(self, job: Job, seconds: float) -> dict[str, Any]:
        """Examine one model within a time limit."""
        if self.process is not None and not self.process.is_alive():
            self.close()
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs, self.detect_only), daemon=True)
            self.process.start()
            theirs.close()
        self.connection.send(job)
        problem = f"no answer within {seconds:.0f} s"
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            problem = f"the process died with exit code {self.process.exitcode}"
        self.close()
        return {"family": job[0], "type": job[1], "class": job[2], "built": True, "crash": problem}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def handled(answer: dict[str, Any]) -> bool:
    """Tell whether every check gave its answer."""
    return not (answer.get("crash") or answer.get("failure") or answer.get("could_not_run"))


def summary(answers: list[dict[str, Any]]) -> str:
    """Say how many were handled, and list everything that is not as it should be."""
    built = [answer for answer in answers if answer["built"]]
    fails = [a for a in built if any(f["severity"] == "fail" for f in a.get("findings", ()))]
    warned = [a for a in built if any(f["severity"] == "warn" for f in a.get("findings", ())) and a not in fails]
    lines = [
        f"not built or not runnable by itself: {a['family']} {a['class']}: {a['why']}"
        for a in answers
        if not a["built"]
    ]
    for answer in built:
        label = f"{answer['family']} {answer['class']} ({answer['type']})"
        for key in ("crash", "failure", "could_not_run"):
            if answer.get(key):
                lines.append(f"{key}: {label}: {answer[key]}")
        if not answer.get("task_found", True):
            lines.append(f"other task: {label}: {answer['facts'].get('task')}")
        for finding in answer.get("findings", ()):
            lines.append(
                f"{finding['severity']}: {label}: {finding['check']} {finding['code']} at {finding['where']}: "
                f"{finding['message']}"
            )
    seconds = [answer["seconds"] for answer in built if "seconds" in answer]
    count = max(1, len(built))
    lines.append(f"handled {sum(map(handled, built))} / {len(built)} ({len(answers) - len(built)} do not build small)")
    lines.append(f"with a fail {len(fails)}, with warns only {len(warned)} ({100 * len(warned) / count:.1f}%)")
    lines.append(f"task as in the library's list {sum(a.get('task_found', False) for a in built)} / {len(built)}")
    if seconds:
        slowest = max(built, key=lambda answer: answer.get("seconds", 0.0))
        lines.append(
            f"seconds: median {statistics.median(seconds):.2f}, most {max(seconds):.2f} ({slowest['class']}), "
            f"all {sum(seconds):.0f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line; the exit code is 1 when something was not handled or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="repeatable; default: the first five")
    parser.add_argument("--timm", action="store_true", help="one small model of every module of timm instead")
    parser.add_argument("--torchvision", action="store_true", help="the classifiers of torchvision instead")
    parser.add_argument("--only", action="append", help="model types or class names; repeatable")
    parser.add_argument("--limit", type=int, help="stop after so many models")
    parser.add_argument("--every", type=int, default=1, help="take every n-th model only")
    parser.add_argument("--detect-only", action="store_true", help="stop after the adapter")
    parser.add_argument("--timeout", type=float, default=SECONDS_PER_MODEL, help="seconds for one model")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    jobs: list[Job] = []
    if arguments.timm or arguments.torchvision:
        jobs += timm_jobs() if arguments.timm else []
        jobs += torchvision_jobs() if arguments.torchvision else []
    else:
        for family in arguments.family or DEFAULT_FAMILIES:
            jobs += transformers_jobs(family)
    if arguments.only:
        jobs = [job for job in jobs if job[1] in arguments.only or job[2] in arguments.only]
    jobs = jobs[:: arguments.every][: arguments.limit]
    worker = Worker(arguments.detect_only)
    answers = []
    for number, job in enumerate(jobs, 1):
        answers.append(worker.run(job, arguments.timeout))
        state = "ok" if handled(answers[-1]) and answers[-1]["built"] else "--"
        print(f"\r{number}/{len(jobs)} {state} {job[2]:50.50}", end="", file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(answers, indent=1))
    worker.close()
    print("", file=sys.stderr)
    print(summary(answers))
    built = [answer for answer in answers if answer["built"]]
    fails = any(f["severity"] == "fail" for answer in built for f in answer.get("findings", ()))
    return 0 if all(map(handled, built)) and not fails else 1


if __name__ == "__main__":
    raise SystemExit(main())
