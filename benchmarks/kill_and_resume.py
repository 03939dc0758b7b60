"""How often a run that is killed at random steps ends bitwise like one that nobody touched.

Each setting is trained once without interruption. Then sessions of it are killed with SIGKILL at random moments,
continued, killed again and in the end left to finish; weights, optimizer, schedule, averages and every logged number
are compared bit by bit. After each kill all files under a final name, in the run and in its second copy, must verify.

    python benchmarks/kill_and_resume.py                        100 kills over all settings
    python benchmarks/kill_and_resume.py --kills 20 --settings shuffled,ema
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import utils  # noqa: E402
from utils.runtime.errors import SeedbedError  # noqa: E402
from utils.training.checkpoint_manager import STATE, CheckpointManager  # noqa: E402
from utils.training.config import TrainingConfig  # noqa: E402
from utils.training.metrics import read_metrics  # noqa: E402
from utils.training.resume import resume, train  # noqa: E402
from utils.training.weights import read_weights  # noqa: E402

GPT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.1}
BERT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}
VIT = {"d_model": 32, "nhead": 2, "num_layers": 1}
BASE = {
    "max_steps": 60, "batch_size": 4, "log_every_steps": 1, "val_every_steps": 7, "checkpoint_every_steps": 4,
    "learning_rate": 3e-3, "keep_best": 1,
}  # fmt: skip
OF_A_SESSION = ("seconds", "sessions")
TIMINGS = ("seconds", "samples_per_second")


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    model: str = "gpt"
    config: dict[str, Any] = field(default_factory=lambda: dict(GPT))
    data: str = "file:{text}"
    changes: dict[str, Any] = field(default_factory=dict)
    mirrored: bool = False


SETTINGS = {
    "shuffled": Setting(),
    "workers": Setting(changes={"workers": 2, "max_steps": 40}),
    "accumulation": Setting(changes={"accumulate": 3, "log_every_steps": 2}),
    "pending-losses": Setting(changes={"log_every_steps": 7, "checkpoint_every_steps": 3}),
    "checkpoint-on-validation": Setting(changes={"val_every_steps": 4, "checkpoint_every_steps": 4}),
    "epoch-boundaries": Setting(changes={"batch_size": 48, "max_steps": 30}),
    "streaming-text": Setting(data="file:{folder}?stream=true", changes={"max_steps": 40}),
    "masked-lm": Setting("bert", dict(BERT)),
    "images-augmented": Setting("vit", dict(VIT), "builtin:digits", {"augment": True}),
    "average": Setting(changes={"ema_decay": 0.99, "val_every_steps": 3}),
    "bf16": Setting(changes={"precision": "bf16-mixed"}),
    "wsd-smoothing": Setting(changes={"schedule": "wsd", "label_smoothing": 0.1}),
    "mirrored": Setting(mirrored=True, changes={"keep_every_steps": 20}),
    "two-processes": Setting(changes={"devices": 2, "accumulate": 2, "log_every_steps": 3, "max_steps": 40}),
}


@dataclass
class Outcome:
    """What came of one run that was killed."""

    setting: str
    kills: int = 0
    survived: bool = False
    torn: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether it ended like the uninterrupted run."""
        return self.survived and not self.different


def session(setting: Setting, directory: Path, text: Path) -> None:
    """Start a run, or continue it, in a process of its own."""
    os.setsid()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(directory.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    mirror = directory.with_name(f"{directory.name}-copy") if setting.mirrored else None
    if (directory / "run.json").exists():
        resume(directory, mirror=mirror, progress=False)
    else:
        torch.manual_seed(0)
        model = utils.load_model(f"example:{setting.model}", config=setting.config)
        data = setting.data.format(text=text, folder=text.with_suffix(""))
        config = TrainingConfig(**{**BASE, **setting.changes})
        train(model, data, config, directory, mirror=mirror, progress=False)


def start(setting: Setting, directory: Path, text: Path) -> Any:
    """Fork a session: a process like any other, without the seconds that importing torch takes."""
    process = multiprocessing.get_context("fork").Process(target=session, args=(setting, directory, text))
    process.start()
    return process


def rows(directory: Path) -> int:
    """Return how many numbers were logged so far."""
    try:
        return (directory / "metrics.csv").read_bytes().count(b"\n")
    except OSError:
        return 0


def kill(process: Any, directory: Path, draw: random.Random, total: int) -> bool:
    """Kill a session at a random moment; return False when it ended before."""
    # Half of the kills come while training, the others at any moment from the start of the process on.
    target = rows(directory) + draw.randrange(1, max(2, total // 2)) if draw.random() < 0.7 else 0
    deadline = time.monotonic() + 200
    while rows(directory) < target and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(draw.random() * (0.03 if target else 1.5))
    alive = process.is_alive()
    with_group(process.pid)
    process.join()
    return bool(alive and process.exitcode == -signal.SIGKILL)


def with_group(leader: int) -> None:
    """Kill a process and all that it has started, in whatever session they are."""
    victims = [leader]
    for victim in victims:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == victim:
                victims.append(int(path.parent.name))
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue


def torn(directory: Path) -> list[str]:
    """Return everything under a final name, in a run and its copy, that is not whole."""
    found = []
    for place in (directory, directory.with_name(f"{directory.name}-copy")):
        checkpoints = place / "checkpoints"
        manager = CheckpointManager(checkpoints)
        for path in checkpoints.glob("step-*") if (place / "run.json").exists() else ():
            problem = manager.problem(path)
            if problem is not None:
                found.append(f"{place.name}/{path.name}: {problem}")
        for name in ("run.json", "summary.json"):
            if (place / name).exists():
                try:
                    json.loads((place / name).read_text())
                except ValueError:
                    found.append(f"{place.name}/{name}")
    return found


def same(first: Any, second: Any) -> bool:
    """Compare nested values bit by bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second or (first != first and second != second))


def differences(one: Path, two: Path) -> list[str]:
    """Name the parts in which two finished runs differ."""
    ends = [CheckpointManager(place / "checkpoints").latest() for place in (one, two)]
    if ends[0].step != ends[1].step:
        return [f"step {ends[0].step} and {ends[1].step}"]
    found = []
    weights = [read_weights(end.directory / "model.safetensors") for end in ends]
    if not same(weights[0], weights[1]):
        found.append("weights")
    states = [torch.load(end.directory / STATE, weights_only=True) for end in ends]
    for state in states:
        for name in OF_A_SESSION:
            state["progress"].pop(name)
    found += [name for name in states[0] if not same(states[0][name], states[1].get(name))]
    logs = [
        [{n: v for n, v in row.items() if n not in TIMINGS} for row in read_metrics(place / "metrics.csv")]
        for place in (one, two)
    ]
    return found + ["logged numbers"] * (not same(logs[0], logs[1]))


def finish(setting: Setting, directory: Path, text: Path) -> bool:
    """Let a session run to its end."""
    process = start(setting, directory, text)
    process.join(400)
    if process.is_alive():
        with_group(process.pid)
        process.join()
    return bool(process.exitcode == 0)


def survive(name: str, whole: Path, directory: Path, text: Path, kills: int, draw: random.Random) -> Outcome:
    """Kill a run some times, let it finish, and compare."""
    setting, outcome = SETTINGS[name], Outcome(name)
    total = {**BASE, **setting.changes}["max_steps"]
    for _ in range(3 * kills):
        if outcome.kills == kills:
            break
        if not kill(start(setting, directory, text), directory, draw, total):
            break
        outcome.kills += 1
        outcome.torn += torn(directory)
    outcome.survived = finish(setting, directory, text)
    outcome.torn += torn(directory)
    if outcome.survived:
        try:
            outcome.different = differences(whole, directory)
        except (SeedbedError, OSError) as error:
            outcome.different = [str(error)]
    return outcome


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 when every run survived, ended equal and left nothing torn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--kills-per-run", type=int, default=3, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--keep", metavar="DIR", help="leave the runs here")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.settings.split(",")]
    draw = random.Random(options.seed)
    folder = Path(options.keep or tempfile.mkdtemp(prefix="seedbed-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "topics.txt"
    from pydoc_data.topics import topics

    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    # The same as documents, for what is split by whole ones.
    text.with_suffix("").mkdir(exist_ok=True)
    for name in sorted(topics)[:40]:
        (text.with_suffix("") / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    outcomes: list[Outcome] = []
    number = 0
    while sum(outcome.kills for outcome in outcomes) < options.kills:
        name = names[number % len(names)]
        whole = folder / f"{name}-whole"
        if not whole.exists() and not finish(SETTINGS[name], whole, text):
            print(whole.with_suffix(".log").read_text()[-3000:], file=sys.stderr)
            return 2
        left = options.kills - sum(outcome.kills for outcome in outcomes)
        directory = folder / f"{name}-{number}"
        outcome = survive(name, whole, directory, text, min(left, draw.randint(1, options.kills_per_run)), draw)
        outcomes.append(outcome)
        if not options.json:
            verdict = "equal" if outcome.equal else f"DIFFERENT: {outcome.different or 'did not finish'}"
            print(f"{name:26} {outcome.kills} kills  {verdict}  {' '.join(outcome.torn)}", flush=True)
        if not outcome.survived:
            print(directory.with_suffix(".log").read_text()[-3000:], file=sys.stderr)
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
        number += 1
    result = {
        "kills": sum(outcome.kills for outcome in outcomes),
        "runs": len(outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "equal": sum(outcome.equal for outcome in outcomes),
        "torn": [item for outcome in outcomes for item in outcome.torn],
        "different": {outcome.setting: outcome.different for outcome in outcomes if outcome.different},
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['kills']} kills of {result['runs']} runs: {result['survived']} survived, {result['equal']} ended "
            f"bitwise equal, {len(result['torn'])} torn files under a final name"
        )
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if result["equal"] == result["runs"] and not result["torn"] else 1


if __name__ == "__main__":
    sys.exit(main())
