"""Several devices: one process each, started by torchrun, each opening the same run directory."""

import os
import sys
from pathlib import Path

from utils.runtime.errors import RunError

LAUNCHED = "SEEDBED_LAUNCHED"
"""Environment variable of the processes that `launch` starts."""


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and how many train together, as torchrun says it; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_started_here() -> bool:
    """Tell whether a process that holds the run's lock has started this one."""
    return LAUNCHED in os.environ


def python_path() -> str:
    """Return the search path with which a process finds this package, wherever it is started."""
    import utils

    root = str(Path(utils.__file__).resolve().parents[1])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def launch(directory: Path, devices: int, arguments: list[str]) -> int:
    """Train a run with several processes and return their exit status.

    Args:
        directory: The run.
        devices: How many processes.
        arguments: Further arguments of ``python -m utils resume``.

    Raises:
        RunError: The processes could not be started.
    """
    import subprocess

    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices),
        "--module", "utils", "resume", str(directory), *arguments,
    ]  # fmt: skip
    try:
        # The caller says how the run stands; the processes only show their progress and their warnings.
        return subprocess.call(
            command, stdout=subprocess.DEVNULL, env={**os.environ, LAUNCHED: "1", "PYTHONPATH": python_path()}
        )
    except OSError as error:
        raise RunError(
            f"The processes for {devices} devices could not be started: {error}.",
            "Expected torchrun, which comes with PyTorch.",
            f"Start them yourself: torchrun --nproc-per-node {devices} -m utils resume {directory}",
        ) from error
