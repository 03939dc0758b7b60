"""Several devices: one process each, started by torchrun, each opening the same run directory."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from utils.runtime import project
from utils.runtime.errors import RunError
from utils.training.clean_stop import LAUNCHER, STOP_FILE, CleanStop
from utils.training.config import TrainingConfig

PATIENCE = 3600.0
"""Seconds that a process waits for the first one to prepare the data and make the run."""


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and how many train together, as torchrun says it; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """Return how many of the processes that train together are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", rank_and_world()[1]))


def is_started_here() -> bool:
    """Tell whether a process that holds the run's lock has started this one."""
    return LAUNCHER in os.environ


def python_path() -> str:
    """Return the search path with which a process finds this package, wherever it is started."""
    root = str(Path(project.__file__).resolve().parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def devices_here(config: TrainingConfig, devices: int | None = None) -> int:
    """Return on how many devices a session runs.

    Args:
        config: The run's settings.
        devices: What the user asked for; None takes as many as the run was started with, or as this machine has.
    """
    _, world = rank_and_world()
    if world > 1:
        return world
    if devices is not None:
        return devices
    return min(config.devices, torch.cuda.device_count()) if torch.cuda.is_available() else config.devices


def agreed(flag: bool) -> bool:
    """Return whether any of the processes that train together says yes; all of them ask at the same point."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return flag
    on_gpu = torch.distributed.get_backend() == "nccl"
    said = torch.tensor(float(flag), device=torch.cuda.current_device() if on_gpu else "cpu")
    torch.distributed.all_reduce(said)
    return bool(said)


def adapted(config: TrainingConfig, devices: int, strategy: str | None = None) -> TrainingConfig:
    """Return the settings with which this machine takes the same steps as the one that the run was started on.

    A step keeps its samples: fewer devices accumulate more batches, or more devices fewer. Without a GPU float16, which
    no CPU trains in, becomes float32.

    Args:
        config: The run's settings.
        devices: Number of devices now.
        strategy: How several devices share the work from now on; None keeps the run's own.

    Raises:
        RunError: So many devices cannot share the samples of a step evenly.
    """
    if config.precision == "16-mixed" and not torch.cuda.is_available():
        config = config.with_changes(precision="32-true")
    if strategy is not None:
        config = config.with_changes(strategy=strategy)
    if devices == config.devices:
        return config
    samples, rest = divmod(config.samples_per_step, devices) if devices > 0 else (0, 1)
    if rest:
        raise RunError(
            f"A step of this run takes {config.samples_per_step} samples, and there would be {devices} devices.",
            "Expected a number of devices that divides the samples: another step would be another run.",
            f"Pass devices=1, or as many as the run was started with ({config.devices}).",
        )
    batch = next(size for size in range(min(config.batch_size, samples), 0, -1) if samples % size == 0)
    return config.with_changes(
        devices=devices,
        batch_size=batch,
        accumulate=samples // batch,
        strategy=config.strategy if devices > 1 else "auto",
    )


def wait_for_run(record: Path) -> None:
    """Wait until the first of the processes that torchrun started has made the run that all of them train.

    Args:
        record: The file that is written last.

    Raises:
        RunError: It does not come.
    """
    deadline = time.monotonic() + PATIENCE
    while not record.exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"{record} has not come within {PATIENCE / 60:.0f} minutes.",
                "Expected the first process to make the run in a folder that all machines share.",
                "Name such a folder as the run's directory, and read the first process's messages.",
            )
        time.sleep(0.2)


def launch(directory: Path, devices: int, arguments: list[str]) -> int:
    """Train a run with several processes and return their exit status.

    An interrupt or SIGTERM reaches them as a file that the first looks for after each step: what torchrun does with
    signals leaves little time to save. They stop as well when this process has vanished.

    Args:
        directory: The run.
        devices: How many processes.
        arguments: Further arguments of ``python -m utils resume``.

    Raises:
        RunError: The processes could not be started.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices),
        "--module", "utils", "resume", str(directory), *arguments,
    ]  # fmt: skip
    stop = CleanStop()
    with tempfile.TemporaryDirectory(prefix="seedbed-") as folder, stop.listening():
        asked = Path(folder) / "stop"
        environment = {
            **os.environ, "PYTHONPATH": python_path(), LAUNCHER: str(os.getpid()), STOP_FILE: str(asked),
            # What torchrun sets too, but with a banner.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }  # fmt: skip
        try:
            # The caller says how the run stands; the processes only show their progress and their warnings.
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
        except OSError as error:
            raise RunError(
                f"The processes for {devices} devices could not be started: {error}.",
                "Expected torchrun, which comes with PyTorch.",
                f"Start them yourself: torchrun --nproc-per-node {devices} -m utils resume {directory}",
            ) from error
        try:
            while True:
                try:
                    return process.wait(0.2)
                except subprocess.TimeoutExpired:
                    if stop.reason is not None and not asked.exists():
                        asked.write_text(stop.reason, encoding="utf-8")
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
