"""training.ipynb as a user has it: its kernel vanishes while it trains, and running all cells again continues."""

import csv
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

STEPS, KILLED_AFTER = 150, 50
"""The notebook's preset saves every 50 steps."""
MODEL = '''
import time

from torch import nn


class Model(nn.Module):
    """A tiny language model that takes its time, so that it can be killed in the middle."""

    def __init__(self, vocab_size=300, d_model=16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.drop = nn.Dropout(0.1)
        self.mixer = nn.GRU(d_model, d_model, batch_first=True)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, input_ids):
        if self.training:
            time.sleep(0.02)
        return self.head(self.mixer(self.drop(self.embedding(input_ids)))[0])
'''


def prepare(folder):
    """Make a notebook's working directory; the references in it are relative, so that equal runs get equal names."""
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "model.py").write_text(MODEL)
    (folder / "tiny" / "config.json").write_text('{"vocab_size": 300, "d_model": 16}')
    (folder / "text.txt").write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400)))
    return folder


def run_all(root, folder, kill_when=None):
    """Run all cells in a new kernel and return the notebook, and in which cell the kernel was killed.

    Args:
        root: The checkout.
        folder: Where the notebook runs.
        kill_when: Asked again and again; the kernel is killed once it says so.
    """
    notebook = nbformat.read(root / "training.ipynb", as_version=4)
    cells, killed, over = [], [], threading.Event()
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
        on_cell_start=lambda cell, cell_index: cells.append(cell.id), extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )  # fmt: skip

    def watch():
        while not over.wait(0.02):
            if kill_when():
                os.kill(client.km.provisioner.pid, signal.SIGKILL)
                killed.append(cells[-1])
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if kill_when is not None:
        watcher.start()
    try:
        client.execute()
    except DeadKernelError:
        if not killed:
            raise
    finally:
        over.set()
    return notebook, killed


def newest(directory):
    """Return the step of the newest checkpoint that is whole, or -1."""
    manifests = directory.glob("checkpoints/step-*/manifest.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in manifests), default=-1)


def rows(directory, upto=STEPS, timed=False):
    """Return the metrics up to a step, with or without what depends on the clock."""
    with open(directory / "metrics.csv", encoding="utf-8", newline="") as stream:
        found = [row for row in csv.DictReader(stream) if int(row["step"]) <= upto]
    clock = () if timed else ("seconds", "samples_per_second")
    return [{name: value for name, value in row.items() if name not in clock} for row in found]


def shown(notebook, identifier):
    """Return what a cell shows, as text."""
    cell = next(cell for cell in notebook.cells if cell.id == identifier)
    return "".join(str(one.get("text", one.get("data", {}).get("text/plain", ""))) for one in cell.outputs)


def equal(one, other):
    """Tell whether two nested states are the same, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def continued(root, broken):
    """Run all cells again after a kill; return the run's folder and its record."""
    (run_dir,) = broken.glob("runs/*")
    record, saved = (run_dir / "run.json").read_bytes(), newest(run_dir)
    before = rows(run_dir, saved, timed=True)
    assert KILLED_AFTER <= saved < STEPS and len(before) > 4
    assert not (run_dir / "export").exists()

    again, _ = run_all(root, broken)
    assert "1 unfinished run." in shown(again, "unfinished")
    names = sorted(path.name for path in broken.glob("runs/*"))
    sections = ["", "-digits-consolidation", "-digits-naive", "-grown-60"]
    assert names == [run_dir.name + end for end in sections], "beside those of the sections, no second one was begun"
    assert (run_dir / "run.json").read_bytes() == record
    assert rows(run_dir, saved, timed=True) == before, "what was trained before the kill was not trained again"
    return run_dir, json.loads(record)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_running_all_cells_again_continues_the_run_that_a_kill_left(root, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SEEDBED_") and name != "SEEDBED_CACHE"]:
        monkeypatch.delenv(name)
    variables = {"SOURCE": str(root), "MODEL": "tiny", "DATA": "file:text.txt", "MAX_STEPS": str(STEPS)}
    for name, value in variables.items():
        monkeypatch.setenv(f"SEEDBED_{name}", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    broken, whole = prepare(tmp_path / "broken"), prepare(tmp_path / "whole")

    def is_in_the_middle():
        return any(newest(directory) >= KILLED_AFTER for directory in broken.glob("runs/*"))

    with ThreadPoolExecutor(1) as beside:
        undisturbed = beside.submit(run_all, root, whole)
        _, killed = run_all(root, broken, is_in_the_middle)
        # On a slow machine the first session, which is short on purpose, may be over.
        assert killed in (["train"], ["resume"])
        run_dir, record = continued(root, broken)
        undisturbed.result()

    summary, other = json.loads((run_dir / "summary.json").read_text()), whole / "runs" / run_dir.name
    assert (summary["status"], summary["step"]) == ("finished", STEPS)
    assert summary.pop("sessions") >= 2
    expected = json.loads((other / "summary.json").read_text())
    assert {**summary, "sessions": expected["sessions"]} == expected
    assert json.loads((other / "run.json").read_text())["id"] != record["id"]
    assert rows(run_dir) == rows(other)
    last = f"checkpoints/step-{STEPS:08d}"
    for name in (f"{last}/model.safetensors", "export/model.safetensors"):
        assert (run_dir / name).read_bytes() == (other / name).read_bytes(), name
    ends = [torch.load(one / last / "state.pt", weights_only=True)["optimizer"] for one in (run_dir, other)]
    assert equal(*ends)
