"""Run all notebooks on the built-in examples and gather what they made in ``runs/demo/``.

Results: ``template.html``, ``training.html`` and ``concepts.html`` (the notebooks with their outputs),
``validation_report.html`` and ``.json``, ``run/`` (checkpoints, metrics, figures), ``training.png``, ``export/``,
``concepts/`` (a memory, a hierarchy of concepts), and eleven lines on the screen.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "runs" / "demo"
NOTEBOOKS = ("template.ipynb", "training.ipynb", "concepts.ipynb")


def execute(name: str, folder: Path) -> float:
    """Run a notebook in `folder`, write it there as HTML and return the seconds it took."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    started = time.monotonic()
    total = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=total, desc=name, unit="cell") as bar, showing_steps(bar, folder / "run" / "metrics.csv"):
        client = NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            on_cell_start=lambda cell, cell_index: bar.set_postfix_str(cell.id),
            on_cell_executed=lambda cell, cell_index, execute_reply: bar.update(1),
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        try:
            client.execute()
        finally:
            page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
            (folder / name.replace(".ipynb", ".html")).write_text(page, encoding="utf-8")
    return time.monotonic() - started


@contextmanager
def showing_steps(bar: Any, metrics: Path) -> Iterator[None]:
    """Show the newest step beside the bar while a cell trains."""
    done = threading.Event()

    def watch() -> None:
        shown = ""
        while not done.wait(1.0):
            lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
            step = lines[-1].partition(",")[0] if len(lines) > 1 else ""
            if step != shown:
                shown = step
                bar.set_postfix_str(f"step {step}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def summary(folder: Path, seconds: dict[str, float]) -> list[str]:
    """Return what was found, trained, exported and looked into, in eleven lines."""
    from utils.concepts.hierarchy_files import load_hierarchy

    report = _read(folder / "validation_report.json")
    run = _read(folder / "run" / "summary.json")
    exported = _read(folder / "run" / "export" / "export.json")
    results = ", ".join(f"{result['check']} {result['status']}" for result in report["results"])
    comparison = "better" if run["bits_per_byte"] < run["zlib_bits_per_byte"] else "NOT better"
    formats = ", ".join(_format_line(result) for result in exported["results"])
    graph = load_hierarchy(folder / "concepts" / "hierarchy.graphml")
    return [
        f"model       {run['model']}, {run['parameters']:,} parameters, {run['task']}",
        f"verdict     {report['verdict']}",
        f"checks      {results}",
        f"data        {run['data']}",
        f"training    {run['status']} at step {run['step']} of {run['total_steps']}, {run['sessions']} session(s)",
        f"held out    {run['validation_loss']:.3f} nats per token, {run['bits_per_byte']:.3f} bits per byte",
        f"zlib -9     {run['zlib_bits_per_byte']:.3f} bits per byte: the model is {comparison}",
        f"export      {formats}",
        f"concepts    {len(graph)} in a hierarchy of {len(graph.relations())} relations",
        "time        " + ", ".join(f"{name.removesuffix('.ipynb')} {seconds[name]:.0f} s" for name in NOTEBOOKS),
        f"results     {folder.relative_to(ROOT)}/",
    ]


def _format_line(result: dict[str, Any]) -> str:
    difference = result["max_difference"]
    return f"{result['format']} {result['status']}" + (f" ({difference:.0e})" if difference is not None else "")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def main() -> int:
    """Run the demo."""
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir(parents=True)
    for name in [name for name in os.environ if name.startswith("SEEDBED_") and name != "SEEDBED_CACHE"]:
        del os.environ[name]
    os.environ |= {"SEEDBED_SOURCE": str(ROOT), "SEEDBED_RUN_DIR": str(DEMO / "run"), "TOKENIZERS_PARALLELISM": "false"}
    # Two threads on two cores lose most of their speed as soon as anything else runs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seconds = {}
    for name in NOTEBOOKS:
        try:
            seconds[name] = execute(name, DEMO)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
            print(f"{name} stopped: {error}", file=sys.stderr)
            return 1
    shutil.copy(DEMO / "run" / "figures" / "training.png", DEMO / "training.png")
    shutil.copytree(DEMO / "run" / "export", DEMO / "export")
    lines = summary(DEMO, seconds)
    (DEMO / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
