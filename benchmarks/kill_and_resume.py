"""How often a run that is killed at random steps ends bitwise like one that nobody touched.

Each setting is trained once without interruption. Then sessions of it are killed with SIGKILL at random moments,
continued, killed again and in the end left to finish; weights, optimizer, schedule, averages and every logged number
are compared bit by bit. After each kill all files under a final name, in the run and in its second copy, must verify.

Most sessions are forks of a process that has imported what a session needs, and has done nothing else: importing takes
longer than the training. A share of them are new processes (`--fresh`), and so are always those that train on several
devices. As many runs as there are processors are killed at the same time.

    python benchmarks/kill_and_resume.py                        100 kills over all settings
    python benchmarks/kill_and_resume.py --kills 20 --settings shuffled,average --fresh 1
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
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


GROWTH = {
    "schedule": [
        {"at": 9, "operator": "depth", "amount": 1, "where": 0},
        {"at": 17, "operator": "feed_forward", "amount": 24},
        {"at": 28, "operator": "depth", "amount": 1},
    ]
}
TRIGGERED = {
    "operators": ["depth", "feed_forward"], "triggers": ["plateau", "benefit"], "needed": 1, "check_every_steps": 5,
    "cooldown_steps": 10, "patience": 1, "improvement": 0.5, "benefit_threshold": 0.01, "hysteresis": 1.0,
}  # fmt: skip
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
    "growth": Setting(changes={"growth": GROWTH, "ema_decay": 0.99, "schedule": "wsd"}),
    "growth-by-triggers": Setting(changes={"growth": TRIGGERED}),
    "growth-two-processes": Setting(changes={"growth": GROWTH, "devices": 2, "max_steps": 40}),
    "two-processes": Setting(changes={"devices": 2, "accumulate": 2, "log_every_steps": 3, "max_steps": 40}),
    "two-parts": Setting(
        changes={"devices": 2, "strategy": "fsdp", "accumulate": 2, "ema_decay": 0.9, "max_steps": 24}
    ),
}


@dataclass(frozen=True)
class Job:
    """A run that is to be killed some times; without kills, the one that nobody touches."""

    setting: str
    directory: Path
    text: Path
    kills: int = 0
    fresh: float = 0.0
    """Share of the sessions that are new processes."""
    seed: str = ""

    @property
    def whole(self) -> Path:
        """The run that nobody touches."""
        return self.directory.parent / f"{self.setting}-whole"


@dataclass
class Outcome:
    """What came of one run."""

    job: Job
    kills: int = 0
    fresh: int = 0
    """Kills of new processes."""
    survived: bool = False
    torn: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    log: str = ""
    seconds: float = 0.0

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


class Fresh:
    """A session in a new process, with what is needed of the interface of `multiprocessing.Process`."""

    def __init__(self, setting: str, directory: Path, text: Path) -> None:
        """Start it."""
        command = [sys.executable, __file__, "--session", setting, str(directory), str(text)]
        self.process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.pid = self.process.pid

    @property
    def exitcode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.exitcode is None

    def join(self, seconds: float | None = None) -> None:
        """Wait for its end."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


def start(job: Job, fresh: bool) -> Any:
    """Start a session: a new process, or a fork, which is a process like any other, but has imported all it needs."""
    if fresh:
        return Fresh(job.setting, job.directory, job.text)
    arguments = (SETTINGS[job.setting], job.directory, job.text)
    process = multiprocessing.get_context("fork").Process(target=session, args=arguments)
    process.start()
    return process


def rows(directory: Path) -> int:
    """Return how many numbers were logged so far."""
    try:
        return (directory / "metrics.csv").read_bytes().count(b"\n")
    except OSError:
        return 0


def kill(process: Any, job: Job, draw: random.Random, seconds: float) -> bool:
    """Kill a session at a random moment; return False when it ended before.

    Args:
        process: The session.
        job: What it is a session of.
        draw: Says when.
        seconds: What the session of a whole run takes.
    """
    # Two thirds of the kills come at a random step, the others at any moment from the start of the process on.
    total, target = rows(job.whole), 0
    if draw.random() < 0.67:
        target = rows(job.directory) + draw.randrange(1, max(3, 2 * total // (job.kills + 1)))
    deadline = time.monotonic() + 200
    while rows(job.directory) < target and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.004)
    time.sleep(draw.random() * (seconds / total if target else 0.8 * seconds))
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
        for path in place.rglob("*.json"):
            if not any(part.startswith(".") for part in path.relative_to(place).parts):
                try:
                    json.loads(path.read_text())
                except ValueError:
                    found.append(f"{place.name}/{path.relative_to(place)}")
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
        for event in state.get("growth", {}).get("events", ()):
            event.pop("seconds")
    found += [name for name in states[0] if not same(states[0][name], states[1].get(name))]
    logs = [
        [{n: v for n, v in row.items() if n not in TIMINGS} for row in read_metrics(place / "metrics.csv")]
        for place in (one, two)
    ]
    return found + ["logged numbers"] * (not same(logs[0], logs[1]))


def finish(job: Job, fresh: bool = False) -> bool:
    """Let a session run to its end."""
    process = start(job, fresh)
    process.join(400)
    if process.is_alive():
        with_group(process.pid)
        process.join()
    return bool(process.exitcode == 0)


def run(job: Job, seconds: float = 0.0) -> Outcome:
    """Kill a run some times, let it finish, and compare.

    Args:
        job: The run.
        seconds: What the session of a whole run takes.
    """
    outcome, draw, started = Outcome(job), random.Random(job.seed), time.monotonic()
    for _ in range(job.kills):
        fresh = draw.random() < job.fresh
        if not kill(start(job, fresh), job, draw, seconds):
            break
        outcome.kills += 1
        outcome.fresh += fresh
        outcome.torn += torn(job.directory)
    outcome.survived = finish(job, fresh=job.fresh == 1)
    outcome.seconds = time.monotonic() - started
    outcome.torn += torn(job.directory)
    if outcome.survived and job.kills:
        try:
            outcome.different = differences(job.whole, job.directory)
        except (SeedbedError, OSError) as error:
            outcome.different = [str(error)]
    if not outcome.survived:
        outcome.log = job.directory.with_suffix(".log").read_text()[-3000:]
    return outcome


def corpus(folder: Path) -> Path:
    """Write texts to train on: one file, and the same as documents, for what is split by whole ones."""
    from pydoc_data.topics import topics

    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    text.with_suffix("").mkdir(exist_ok=True)
    for name in sorted(topics)[:40]:
        (text.with_suffix("") / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return text


def imported(names: list[str], text: Path, folder: Path, found: Path) -> None:
    """Train a little of some settings and note the names of all modules that were imported."""
    for name in names:
        setting = SETTINGS[name]
        few = {**setting.changes, "max_steps": 2, "checkpoint_every_steps": 1, "val_every_steps": 1}
        session(Setting(setting.model, setting.config, setting.data, few), folder / name, text)
    found.write_text(json.dumps([name for name in sys.modules if not name.startswith(("seedbed_", "__"))]))


def warm_up(names: list[str], text: Path, folder: Path) -> None:
    """Import what sessions import; another process finds out what that is, so that nothing else is done in this one."""
    folder.mkdir()
    found = folder / "modules.json"
    arguments = ([name for name in names if SETTINGS[name].changes.get("devices", 1) == 1], text, folder, found)
    process = multiprocessing.get_context("fork").Process(target=imported, args=arguments)
    process.start()
    process.join()
    if found.exists():
        for name in json.loads(found.read_text()):
            # Some modules exist under names by which they cannot be imported.
            with suppress(Exception):
                importlib.import_module(name)
    shutil.rmtree(folder, ignore_errors=True)


def jobs_for(names: list[str], kills: int, first: int, folder: Path, text: Path, options: Any) -> list[Job]:
    """Plan runs with so many kills in all, over all settings in turn."""
    jobs: list[Job] = []
    while kills:
        number = first + len(jobs)
        name, seed = names[number % len(names)], f"{options.seed}-{number}"
        count = min(kills, random.Random(seed).randint(1, options.kills_per_run))
        jobs.append(Job(name, folder / f"{name}-{number}", text, count, options.fresh, seed))
        kills -= count
    return jobs


def show(outcome: Outcome) -> None:
    """Print what came of one run."""
    verdict = "equal" if outcome.equal else f"DIFFERENT: {outcome.different or 'did not finish'}"
    torn_files = "".join(f"  TORN {item}" for item in outcome.torn)
    print(f"{outcome.job.setting:26} {outcome.kills} kills  {verdict}{torn_files}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 when every run survived, ended equal and left nothing torn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--kills-per-run", type=int, default=5, help="at most")
    parser.add_argument("--fresh", type=float, default=0.1, help="share of the sessions that are new processes")
    parser.add_argument("--lanes", type=int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--keep", metavar="DIR", help="leave the runs here")
    parser.add_argument("--session", nargs=3, metavar=("SETTING", "RUN", "TEXT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.session:
        name, directory, source = options.session
        session(SETTINGS[name], Path(directory), Path(source))
        return 0
    started = time.monotonic()
    names = [name.strip() for name in options.settings.split(",")]
    folder = Path(options.keep or tempfile.mkdtemp(prefix="seedbed-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    text = corpus(folder)
    if options.fresh < 1:
        warm_up(names, text, folder / "warm-up")
    outcomes: list[Outcome] = []
    # Processes, not threads: a process that forks must have no other thread.
    with ProcessPoolExecutor(options.lanes, multiprocessing.get_context("fork")) as pool:
        wholes = list(pool.map(run, [Job(name, folder / f"{name}-whole", text) for name in names]))
        for outcome in wholes:
            if not outcome.survived:
                print(outcome.log, file=sys.stderr)
                return 2
        seconds = {outcome.job.setting: outcome.seconds for outcome in wholes}
        number = 0
        # A session that ends before its kill comes is made up for by other runs.
        for _ in range(10):
            left = options.kills - sum(outcome.kills for outcome in outcomes)
            jobs = jobs_for(names, left, number, folder, text, options)
            number += len(jobs)
            futures: list[Future[Outcome]] = [pool.submit(run, job, seconds[job.setting]) for job in jobs]
            for future in as_completed(futures):
                outcome = future.result()
                outcomes.append(outcome)
                if not options.json:
                    show(outcome)
                if outcome.log:
                    print(outcome.log, file=sys.stderr)
                if not options.keep:
                    shutil.rmtree(outcome.job.directory, ignore_errors=True)
    result = {
        "kills": sum(outcome.kills for outcome in outcomes),
        "of_new_processes": sum(outcome.fresh for outcome in outcomes),
        "runs": len(outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "equal": sum(outcome.equal for outcome in outcomes),
        "torn": [item for outcome in outcomes for item in outcome.torn],
        "different": {outcome.job.setting: outcome.different for outcome in outcomes if outcome.different},
        "kills_by_setting": {
            name: sum(outcome.kills for outcome in outcomes if outcome.job.setting == name) for name in names
        },
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['kills']} kills of {result['runs']} runs in {result['minutes']} minutes, "
            f"{result['of_new_processes']} of them of new processes: {result['survived']} runs survived, "
            f"{result['equal']} ended bitwise equal, {len(result['torn'])} torn files under a final name"
        )
        print("kills by setting:", ", ".join(f"{name} {count}" for name, count in result["kills_by_setting"].items()))
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    whole = result["equal"] == result["runs"] and not result["torn"]
    return 0 if whole and result["kills"] == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
