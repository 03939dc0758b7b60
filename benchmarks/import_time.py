"""Seconds that `import utils` takes beyond torch: `python benchmarks/import_time.py`.

Each number is the median of fresh processes, run in turns so that a busy machine slows both alike.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 9
STATEMENTS = {"torch": "import torch", "torch and utils": "import torch, utils", "python alone": "pass"}


def seconds(statement: str) -> float:
    """Return the wall time of a fresh interpreter that runs one statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(REPEATS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:<16} {value:.3f} s (median of {REPEATS})")
    differences = [both - alone for both, alone in zip(times["torch and utils"], times["torch"], strict=True)]
    print(f"utils beyond torch: {statistics.median(differences):.3f} s (median of paired differences)")


if __name__ == "__main__":
    main()
