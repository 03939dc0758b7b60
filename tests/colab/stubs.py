"""Metadata-only stand-ins for the packages of a `pip freeze` list, so that a resolver believes they are installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

COLAB_PYTHON = "3.13"


def canonical(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def frozen_versions(text: str) -> dict[str, str]:
    """Return the versions in a `pip freeze` list, by canonical name; entries without a version are left out."""
    versions = {}
    for line in text.splitlines():
        line = line.strip()
        if match := re.fullmatch(r"([\w.-]+)==([^\s;]+)", line):
            versions[canonical(match[1])] = match[2]
        elif match := re.fullmatch(r"([\w.-]+) @ \S*/[\w.]+?-([^-/]+)-\S+\.whl\S*", line):
            versions[canonical(match[1])] = unquote(match[2])
    return versions


def write_stubs(versions: dict[str, str], folder: Path) -> None:
    """Write one `.dist-info` folder for each package."""
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")


def would_install(requirements: list[str], stubs: Path) -> dict[str, str]:
    """Ask pip what it would install on Colab on top of the stubs.

    Args:
        requirements: Arguments of `pip install`, for example ``["-r", "requirements-training.txt"]``.
        stubs: What `write_stubs` wrote.

    Raises:
        RuntimeError: pip could not answer; the text ends with its own words.
    """
    import pip

    report, alone = stubs.with_suffix(".json"), stubs.with_suffix(".pip")
    # With -S nothing of the environment that runs the tests counts as installed; pip itself is reached through a link.
    alone.mkdir(exist_ok=True)
    link = alone / "pip"
    if not link.exists():
        link.symlink_to(Path(pip.__file__).parent)
    code = "import runpy, sys; sys.path[:0] = sys.argv[1:3]; del sys.argv[1:3]; "
    code += "runpy.run_module('pip', run_name='__main__')"
    command = [sys.executable, "-S", "-c", code, str(stubs), str(alone), "install", "--dry-run", "--quiet"]
    command += ["--report", str(report), "--python-version", COLAB_PYTHON, "--only-binary", ":all:", *requirements]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    if result.returncode != 0:
        raise RuntimeError(f"pip could not answer: {result.stderr.strip()[-2000:]}")
    items = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in items}
