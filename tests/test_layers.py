"""The layers hold, and a planted wrong import is found."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")

LINT = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess:
    """Run import-linter in a folder that has a pyproject.toml and a utils package."""
    return subprocess.run(
        [str(LINT), "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin"},
    )


def test_every_contract_is_kept(root):
    result = lint(root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("place", "line", "expected"),
    [
        ("runtime/files.py", "import utils.loading", "utils.runtime is not allowed to import utils.loading"),
        ("loading/planted.py", "import utils.adapters", "utils.loading is not allowed to import utils.adapters"),
        ("validation/planted.py", "import pytorch_lightning", "import pytorch_lightning"),
        ("adapters/planted.py", "def late():\n    import onnx", "import onnx"),
    ],
)
def test_a_planted_import_is_found(root, tmp_path, place, line, expected):
    shutil.copytree(root / "utils", tmp_path / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    target = tmp_path / "utils" / place
    target.write_text((target.read_text(encoding="utf-8") if target.exists() else "") + f"\n{line}\n", encoding="utf-8")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert expected.split()[-1] in result.stdout
    assert "BROKEN" in result.stdout


def test_every_requirement_is_pinned_and_every_version_is_one(root):
    import re

    names = set()
    for file in ("requirements-dev.txt", "requirements-training.txt"):
        for line in (root / file).read_text(encoding="utf-8").splitlines():
            if match := re.match(r"[A-Za-z][\w.-]*", line.split("#")[0].strip()):
                names.add(re.sub(r"[-_.]+", "-", match[0]).lower())
    pins = {}
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    assert names - pins.keys() == set()
    assert not [version for version in pins.values() if "+" in version], "a local version exists on one machine only"
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_the_version_is_the_same_everywhere(root):
    import utils
    from utils.runtime.project import TAG, VERSION

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION == utils.__version__
    assert f"v{VERSION}" == TAG
    assert f"## {VERSION}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'"{TAG}"' in (root / "tools" / "bootstrap_cell.py").read_text(encoding="utf-8")


def test_no_file_is_over_500_lines_or_vaguely_named(root):
    files = [path for folder in ("utils", "tools") for path in (root / folder).rglob("*.py")]
    assert not [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 500]
    assert not [path for path in files if path.stem in ("helpers", "misc", "common", "util", "tools")]
