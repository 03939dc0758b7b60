"""Execute a notebook as a Colab runtime would: `python tools/replica.py template.ipynb`.

The environment with Colab's versions is built once and must stay as it is, yet training.ipynb installs packages. So
each execution gets an overlay: an empty virtual environment that sees the replica's packages through a path file and
takes whatever the notebook installs. Run this file with the development environment, which brings nbclient.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import environment  # noqa: E402

VERSIONS = """
import json
from importlib import metadata
versions = {}
for item in metadata.distributions():
    versions.setdefault(item.metadata["Name"].lower().replace("_", "-"), item.version)
print(json.dumps(versions))
"""


def make_overlay(replica: Path, directory: Path) -> Path:
    """Create an environment on top of another; return its interpreter.

    Args:
        replica: A virtual environment, which stays as it is.
        directory: Where the overlay goes.
    """
    base = getattr(sys, "_base_executable", None) or sys.executable
    subprocess.run([base, "-m", "venv", "--without-pip", str(directory)], check=True)
    (packages,) = (replica / "lib").glob("python*/site-packages")
    (own,) = (directory / "lib").glob("python*/site-packages")
    # addsitedir, unlike a bare path, also reads the path files of the replica itself.
    (own / "replica.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n", encoding="utf-8")
    python = directory / "bin" / "python"
    for name in ("pip", "pip3"):  # for cells that say !pip
        script = directory / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{python}" -m pip "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return python


def installed(python: Path) -> dict[str, str]:
    """Return the version of every distribution that an interpreter sees, by name."""
    environment_variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = subprocess.run(
        [str(python), "-c", VERSIONS], env=environment_variables, capture_output=True, text=True, check=True, cwd="/"
    )
    versions: dict[str, str] = json.loads(answer.stdout)
    return versions


def execute(notebook: Path, python: Path, folder: Path, timeout: int = 900, **variables: str) -> Any:
    """Run a notebook top to bottom; return it with its outputs.

    Args:
        notebook: The file; it is not changed.
        python: The interpreter of the kernel.
        folder: The kernel's working directory, in which Jupyter's and IPython's own files go as well.
        timeout: Seconds that one cell may take.
        **variables: Environment variables of the kernel.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed; the text has the cell and the traceback.
    """
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    kernel = folder / ".jupyter" / "kernels" / "replica"
    kernel.mkdir(parents=True, exist_ok=True)
    settings = {
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),
        "VIRTUAL_ENV": str(python.parent.parent),
        "IPYTHONDIR": str(folder / ".ipython"),
        "MPLCONFIGDIR": str(folder / ".matplotlib"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        **variables,
    }
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab replica",
        "language": "python",
        "env": settings,
    }
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    specs = KernelSpecManager(kernel_dirs=[str(kernel.parent)], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name="replica", kernel_spec_manager=specs)
    document = nbformat.read(notebook, as_version=4)
    inherited = os.environ.pop("PYTHONPATH", None)  # the tests' own path must not reach the kernel
    try:
        client = NotebookClient(
            document, km=manager, timeout=timeout, resources={"metadata": {"path": str(folder)}}, kernel_name="replica"
        )
        return client.execute()
    finally:
        if inherited is not None:
            os.environ["PYTHONPATH"] = inherited


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Execute notebooks with the package versions of a Colab runtime.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    try:
        replica = Path(environment.ensure("replica"))
    except environment.EnvironmentFailure as error:
        print(error, file=sys.stderr)
        return 1
    for notebook in options.notebooks:
        with tempfile.TemporaryDirectory(prefix="seedbed-") as folder:
            python = make_overlay(replica, Path(folder) / "overlay")
            before = installed(python)
            work = Path(folder) / "content"
            work.mkdir()
            execute(notebook.resolve(), python, work, SEEDBED_SOURCE=str(ROOT))
            after = installed(python)
        changed = [name for name in before if after.get(name) != before[name]]
        added = sorted(after.keys() - before.keys())
        print(f"{notebook}: executed; {len(before)} packages before, {len(changed)} changed, added: {added or 'none'}")
        if changed:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
