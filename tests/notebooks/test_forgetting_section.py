"""What training.ipynb teaches about forgetting is true, and its two cells can be run again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import utils
from utils.continual.accuracy_matrix import MATRIX
from utils.tier3_training_utilities import train_or_resume

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_old_tasks_fall_to_zero_and_the_cure_keeps_them(tmp_path):
    document = json.loads((ROOT / "training.ipynb").read_text(encoding="utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in document["cells"]}
    scope = {"utils": utils, "train_or_resume": train_or_resume, "run": SimpleNamespace(directory=tmp_path / "main")}

    def run_section():
        shown = []
        for name in ("forget", "cure"):
            *lines, last = cells[name].splitlines()
            exec("\n".join(lines), scope)
            shown.append(eval(last, scope))
        return shown

    naive, comparison = run_section()
    learned = [naive.rows[task][task] for task in range(5)]
    assert min(learned) > 0.85 and max(naive.rows[-1][:-1]) < 0.05
    assert comparison.matrices["naive"] == naive
    cured = comparison.matrices["consolidation"]
    assert cured.untrained == naive.untrained, "both begin with the same weights"
    assert min(cured.rows[-1]) > 0.7 and cured.average_accuracy > 0.85 and cured.forgetting < 0.15
    assert cured.costs[-1].stored_samples == 100, "what the text says"

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{MATRIX}")}
    assert [path.parent.name for path in sorted(written)] == ["main-digits-consolidation", "main-digits-naive"]
    assert [str(one) for one in run_section()] == [str(naive), str(comparison)]
    assert all(path.stat().st_mtime_ns == before for path, before in written.items()), "nothing was trained again"
