"""The form in JupyterLab and the run report, in a real browser; pictures are kept beside the test's other files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import environment

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(900)]
DRIVER = Path(__file__).with_name("browser_driver.py")
CELL = """
import json, sys
from pathlib import Path
sys.path.insert(0, ROOT)
import torch
torch.set_num_threads(1)
from utils.ui.setup_wizard import SetupWizard

wizard = SetupWizard("example:gpt", data="file:text.txt", batch_size=2, context_length=16)
wizard._button.on_click(lambda button: Path("settings.json").write_text(json.dumps(wizard.to_dict())))
wizard
"""


@pytest.fixture(scope="module")
def chromium():
    """The browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def lab():
    """The interpreter of the environment with JupyterLab and Playwright, built the first time."""
    try:
        return Path(environment.ensure("browser")) / "bin" / "python"
    except environment.EnvironmentFailure as error:
        pytest.skip(f"JupyterLab and Playwright cannot be installed: {error}")


def drive(lab, *arguments):
    result = subprocess.run(
        [str(lab), str(DRIVER), *map(str, arguments)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def test_the_form_works_in_jupyterlab(root, lab, chromium, tmp_path):
    text = "\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    cell = nbformat.v4.new_code_cell(CELL.replace("ROOT", repr(str(root))).strip())
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "wizard.ipynb")
    drive(lab, "wizard", tmp_path, sys.executable, chromium)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["data"] == "file:text.txt"
    assert (settings["config"]["max_steps"], settings["config"]["batch_size"]) == (4, 2)
    assert settings["config"]["val_every_steps"] == 150, "the preset that was chosen in the browser"
    for name in ("wizard", "wizard-error", "wizard-estimate"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_the_report_asks_for_nothing_and_fits_the_window(lab, chromium, tmp_path):
    import utils
    from utils.training.config import TrainingConfig
    from utils.training.resume import train
    from utils.training.run_report import run_report

    (tmp_path / "text.txt").write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(2000)))
    small = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}
    for name, rate in (("quick", 3e-3), ("careful", 3e-4), ("wild", 3e-2)):
        config = TrainingConfig(max_steps=60, batch_size=8, learning_rate=rate, log_every_steps=2, val_every_steps=10)
        loaded = utils.load_model("example:gpt", config=small)
        train(loaded, f"file:{tmp_path / 'text.txt'}", config, tmp_path / "runs" / name, progress=False)
    drive(lab, "report", run_report(tmp_path / "runs" / "quick").path, tmp_path, chromium)
    for name in ("light", "dark", "narrow"):
        assert (tmp_path / f"report-{name}.png").stat().st_size > 20_000
