"""What every notebook must be before anyone runs it."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools.colab_links import bootstrap_cells, current_address

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
MAX_CODE_LINES, MAX_WORDS = 12, 60
INSTALL = re.compile(
    r"\b(?:pip3?|conda|mamba|uv|apt|apt-get|npm)\b[^\n]*\binstall\b|\binstall_missing\b|\bsubprocess\b|\bos\.system\b|^\s*!",
    re.MULTILINE,
)
FROM_INSTALL = {"pytorch_lightning", "lightning", "torchmetrics", "optuna", "onnx", "onnxruntime", "onnxscript"}


def test_all_notebooks_are_there():
    assert [path.name for path in NOTEBOOKS] == ["concepts.ipynb", "template.ipynb", "training.ipynb"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    """The name and the parsed JSON of one notebook."""
    return request.param.name, json.loads(request.param.read_text(encoding="utf-8"))


def source(cell) -> str:
    return "".join(cell["source"])


def code_cells(document, bootstrap=False):
    """Return the code cells, with or without the bootstrap cell."""
    skip = [] if bootstrap else bootstrap_cells(document)
    return [cell for cell in document["cells"] if cell["cell_type"] == "code" and cell not in skip]


def plain_python(text: str) -> str:
    """Return a cell's text with magics and shell lines taken out."""
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines())


def parsed(document, bootstrap=False):
    return [ast.parse(plain_python(source(cell))) for cell in code_cells(document, bootstrap)]


def test_format_is_valid_and_ids_are_unique(notebook):
    _, document = notebook
    nbformat.validate(document)
    assert (document["nbformat"], document["nbformat_minor"] >= 5) == (4, True)
    ids = [cell["id"] for cell in document["cells"]]
    assert len(ids) == len(set(ids))


def test_text_is_as_nbformat_writes_it(notebook):
    name, document = notebook
    expected = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    assert (ROOT / name).read_text(encoding="utf-8") == expected


def test_there_are_no_outputs(notebook):
    _, document = notebook
    for cell in code_cells(document, bootstrap=True):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert "widgets" not in document["metadata"]


def test_bootstrap_cell_is_the_first_code_and_the_canonical_text(notebook):
    _, document = notebook
    cells = bootstrap_cells(document)
    assert len(cells) == 1
    assert code_cells(document, bootstrap=True)[0] is cells[0]
    expected = (ROOT / "tools" / "bootstrap_cell.py").read_text(encoding="utf-8").rstrip("\n")
    assert source(cells[0]) == expected, "run: make notebooks"


def test_code_cells_are_short(notebook):
    _, document = notebook
    long = {cell["id"]: len(source(cell).splitlines()) for cell in code_cells(document)}
    assert {name: count for name, count in long.items() if count > MAX_CODE_LINES} == {}


def test_text_cells_are_short(notebook):
    _, document = notebook
    words = {cell["id"]: len(source(cell).split()) for cell in document["cells"] if cell["cell_type"] == "markdown"}
    assert words, "a notebook without a word of explanation"
    assert {name: count for name, count in words.items() if count > MAX_WORDS} == {}


def test_only_the_bootstrap_cell_defines_anything(notebook):
    _, document = notebook
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert [node.lineno for tree in parsed(document) for node in ast.walk(tree) if isinstance(node, kinds)] == []


def test_template_installs_nothing():
    document = json.loads((ROOT / "template.ipynb").read_text(encoding="utf-8"))
    for cell in code_cells(document):
        assert not INSTALL.search(source(cell)), source(cell)
        assert not re.search(r"^\s*%(?!matplotlib\b)", source(cell), re.MULTILINE), source(cell)
    imported = {name for tree in parsed(document, bootstrap=True) for name in top_level_imports(tree)}
    assert imported & FROM_INSTALL == set()
    assert "pip install" not in source(bootstrap_cells(document)[0])


def top_level_imports(tree) -> set[str]:
    """Return the first part of every imported module's name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("name", "requirements"),
    [("training.ipynb", "requirements-training.txt"), ("concepts.ipynb", "requirements-memory.txt")],
)
def test_installing_goes_through_the_guarded_call_before_it_imports(name, requirements):
    document = json.loads((ROOT / name).read_text(encoding="utf-8"))
    cells = code_cells(document)
    installing = [index for index, cell in enumerate(cells) if "install_missing" in source(cell)]
    assert len(installing) == 1
    assert f'install_missing(root / "{requirements}")' in source(cells[installing[0]])
    for cell in cells:
        assert not re.search(r"^\s*[!%]\s*(?:pip|conda|apt)", source(cell), re.MULTILINE), source(cell)
    for index, tree in enumerate(parsed(document)):
        if index <= installing[0]:
            assert top_level_imports(tree) & FROM_INSTALL == set()
            assert "torch" not in top_level_imports(tree), "packages are installed before torch is loaded"


def test_concepts_need_faiss_at_most_and_nothing_else_that_is_installed():
    lines = (ROOT / "requirements-memory.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["faiss-cpu>=1.9,<2"]
    document = json.loads((ROOT / "concepts.ipynb").read_text(encoding="utf-8"))
    modules = sorted({name.rpartition(".")[0] or name for tree in parsed(document) for name in utils_names(tree)})
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FROM_INSTALL | {"faiss"}!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


def test_nothing_is_forced_and_no_data_is_taken_unasked(notebook):
    _, document = notebook
    for cell in code_cells(document, bootstrap=True):
        text = source(cell)
        assert "force-reinstall" not in text
        assert "--upgrade " not in text
        assert "drive.mount" not in text, "Drive is offered through utils.runtime.drive"
        assert "enable_custom_widget_manager" not in text
    assert not re.search(r"mount\s*=\s*True(?!\s*#\s*@param)", "\n".join(map(source, code_cells(document))))


def resolve(path: str):
    """Import or look up a dotted name below utils."""
    parts = path.split(".")
    value = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(".".join(parts[:index]))
    return value


def dotted(node) -> str:
    """Return ``a.b.c`` for a chain of attributes of a name, else an empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def utils_names(tree) -> set[str]:
    """Return every dotted name below utils that a cell uses."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "utils"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "utils":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("utils."):
            names.add(dotted(node))
    return names - {"utils.__file__"}


def test_every_name_of_utils_exists(notebook):
    _, document = notebook
    names = {name for tree in parsed(document) for name in utils_names(tree)}
    assert names, "a notebook that does not use utils"
    for name in sorted(names):
        try:
            resolve(name)
        except (AttributeError, ImportError) as error:
            pytest.fail(f"{name} is used in a cell and does not exist: {error}")


def test_there_is_one_repository_address_everywhere(notebook):
    _, document = notebook
    address = current_address(ROOT)
    text = "\n".join(source(cell) for cell in document["cells"])
    for found in re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)/(?:blob|tree|archive)/", text):
        assert found == address
    assert re.findall(r'^REPOSITORY = "(.*)"', text, re.MULTILINE) == [address]


def test_forms_are_plain_assignments_and_stay_folded(notebook):
    _, document = notebook
    for cell in code_cells(document, bootstrap=True):
        for line in source(cell).splitlines():
            if "# @param" in line:
                assert re.match(r"^\w+ = (?:\"[^\"]*\"|-?[\d.]+|True|False|None)\s+# @param", line), line
        if 'display-mode: "form"' in source(cell):
            assert cell["metadata"].get("cellView") == "form", source(cell)


class TestTheRulesThemselves:
    """Each rule finds what it is there to find."""

    @pytest.mark.parametrize(
        "text",
        ["!ls", "%pip install x", "!pip3 install x", "import subprocess", "os.system('x')", "x\n  !apt-get install y"],
    )
    def test_installs_are_recognised(self, text):
        assert INSTALL.search(text)

    def test_plain_text_is_no_install(self):
        assert not INSTALL.search("report = utils.validate(model)\nassert a != b")

    def test_names_are_resolved_and_missing_ones_are_not(self):
        tree = ast.parse("import utils\nfrom utils.runtime.colab import in_colab\nutils.runtime.drive.drive_folder()")
        names = utils_names(tree)
        assert {"utils", "utils.runtime.colab.in_colab", "utils.runtime.drive.drive_folder"} <= names
        for name in names:
            resolve(name)
        with pytest.raises((AttributeError, ImportError)):
            resolve("utils.runtime.drive.no_such_name")
