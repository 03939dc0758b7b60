"""Real processes, killed at random moments: every setting ends bitwise like the run that nobody touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "shuffled", "workers", "accumulation", "pending-losses", "checkpoint-on-validation", "epoch-boundaries",
    "streaming-text", "masked-lm", "images-augmented", "average", "bf16", "wsd-smoothing", "mirrored",
    "growth", "growth-by-triggers", "growth-two-processes", "two-processes",
    "two-parts",
)  # fmt: skip
QUICK = "checkpoint-on-validation"
ONCE = (QUICK, "two-processes", "two-parts", "growth-two-processes")
"""Killed once only: most of their time goes into starting."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in SETTINGS]
)
def test_a_run_that_is_killed_ends_bitwise_like_one_that_is_not(tmp_path, setting):
    result = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "kill_and_resume.py"), "--settings", setting, "--json",
            "--kills", "1" if setting in ONCE else "2", "--keep", str(tmp_path),
            # New processes once; forks, which take a third of the time, otherwise.
            "--fresh", "1" if setting == QUICK else "0",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=550, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    outcome = json.loads(result.stdout)
    assert outcome["survived"] == outcome["equal"] == outcome["runs"] > 0
    assert outcome["torn"] == []
    assert outcome["kills"] >= 1
    assert outcome["of_new_processes"] == (outcome["kills"] if setting == QUICK else 0)


def test_all_settings_of_the_benchmark_are_tested():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import kill_and_resume as k; print(*k.SETTINGS)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tuple(found.stdout.split()) == SETTINGS
