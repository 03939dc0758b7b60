"""What template.ipynb shows of a model that does not come back from a pass: a report, like the command line."""

import json
from pathlib import Path

import pytest

import utils
from utils.runtime.rehearsal import can_rehearse

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = """
from torch import nn

class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x):
        while True:
            x = self.cell(x)
"""


@pytest.mark.skipif(not can_rehearse(), reason="needs a process that can be copied")
def test_a_model_that_hangs_is_reported_and_not_raised(tmp_path, monkeypatch):
    """Every cell from the choice to Tier 2 runs, and the gravest finding is shown."""
    monkeypatch.setattr("utils.validation.containment.REHEARSAL_SECONDS", 1.0)
    (tmp_path / "endless.py").write_text(SOURCE)
    document = json.loads((ROOT / "template.ipynb").read_text(encoding="utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in document["cells"]}
    cells["choose"] = cells["choose"].replace('MODEL = ""', f"MODEL = {str(tmp_path / 'endless.py')!r}")
    scope = {"utils": utils}
    for name in ("choose", "read", "load", "tier1", "show", "tier2"):
        exec(cells[name], scope)
    assert [finding.code for finding in scope["report"].findings] == ["timed_out"]
    assert "no answer within 1" in scope["report"].text() and scope["shown"][0].found
    assert scope["analysis"].verdict == "NOT READY"
