"""All notebooks run with Colab's versions, and what Colab has preinstalled is the same afterwards."""

from pathlib import Path

import nbformat
import pytest

from tools import environment
from tools.replica import execute, installed, make_overlay

pytestmark = [pytest.mark.replica, pytest.mark.slow, pytest.mark.timeout(1800)]
QUICK = {"SEEDBED_MODEL": "example:gpt", "SEEDBED_MAX_STEPS": "20"}


@pytest.fixture(scope="module")
def replica() -> Path:
    """The environment with Colab's versions, built the first time."""
    return Path(environment.ensure("replica"))


@pytest.fixture
def overlay(replica, tmp_path):
    """The interpreter of a fresh environment on top of the replica."""
    return make_overlay(replica, tmp_path / "overlay")


@pytest.fixture
def content(tmp_path):
    """A working directory, as empty as Colab's."""
    folder = tmp_path / "content"
    folder.mkdir()
    return folder


def notebook(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


def output_text(document):
    outputs = [output for cell in document.cells for output in cell.get("outputs", [])]
    return "".join(str(output.get("text", "")) + str(output.get("data", {})) for output in outputs)


def test_the_overlay_takes_what_a_notebook_installs_and_the_replica_stays(replica, overlay, content, tmp_path):
    before, pristine = installed(overlay), installed(replica / "bin" / "python")
    assert before == pristine
    path = notebook(
        tmp_path / "install.ipynb",
        "import IPython, numpy, sys; print(IPython.__version__, numpy.__version__, sys.prefix)",
        "%pip install -q --no-deps colorlog==6.12.0",
        "import colorlog; print(colorlog.__file__)",
        "!pip install -q --no-deps tqdm==4.66.0",
    )
    text = output_text(execute(path, overlay, content))
    assert "7.34.0 2.1.3" in text
    assert str(overlay.parent.parent) in text
    after = installed(overlay)
    assert after["colorlog"] == "6.12.0"
    assert after["tqdm"] == "4.66.0" != before["tqdm"], "a changed package must be seen"
    assert installed(replica / "bin" / "python") == pristine


def test_a_failing_cell_fails_the_execution(overlay, content, tmp_path):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="deliberate"):
        execute(notebook(tmp_path / "fail.ipynb", "raise RuntimeError('deliberate')"), overlay, content)


def test_template_runs_with_nothing_installed(root, overlay, content):
    before = installed(overlay)
    assert not {"pytorch-lightning", "optuna", "torchmetrics", "onnx"} & before.keys()
    document = execute(root / "template.ipynb", overlay, content, SEEDBED_SOURCE=str(root), **QUICK)
    assert installed(overlay) == before
    assert "READY" in output_text(document)


def test_training_installs_what_is_missing_and_changes_nothing(root, overlay, content):
    before = installed(overlay)
    document = execute(root / "training.ipynb", overlay, content, SEEDBED_SOURCE=str(root), **QUICK)
    after = installed(overlay)
    assert {name: after.get(name) for name in before} == before
    assert {"pytorch-lightning", "torchmetrics"} <= after.keys() - before.keys()
    assert "0 of them changed" in output_text(document)
    assert list(content.rglob("*.safetensors")), "training.ipynb exports a model"


def test_concepts_installs_faiss_alone(root, overlay, content):
    before = installed(overlay)
    document = execute(root / "concepts.ipynb", overlay, content, SEEDBED_SOURCE=str(root))
    after = installed(overlay)
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys() == {"faiss-cpu"}
    assert "0 of them changed" in output_text(document)
    assert list(content.rglob("hierarchy.graphml")), "concepts.ipynb keeps its graph"
