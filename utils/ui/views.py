"""A run in a notebook while it trains: curves, numbers and samples in one output that is updated in place."""

import base64
import re
import sys
import time
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from utils.runtime.errors import MissingPackageError
from utils.runtime.resources import format_bytes, resident_memory
from utils.training.figures import figure_png
from utils.training.growth_rows import read_growth
from utils.training.run import read_record
from utils.ui.estimates import duration, tokens_per_sample
from utils.ui.generations import Generation, generate

if TYPE_CHECKING:
    from utils.training.run import Run

REDRAW_SECONDS = 3.0
SHOWN_GENERATIONS = 3
PIECE = (
    "display:inline-block;margin:0 22px 4px 0;white-space:nowrap",
    "color:gray;font-size:11px;display:block;line-height:1.2",
)


def in_notebook() -> bool:
    """Tell whether this code runs in a notebook's kernel, where pictures can be shown."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def closer(text: str) -> str:
    """Return a text without empty lines, which a model that knows little writes many of."""
    return re.sub(r"\n\s*\n", "\n", text)


class LiveCurve:
    """Shows how a run goes in the output of the running cell, redrawn at most every few seconds."""

    def __init__(self, generations: bool = True) -> None:
        """Show nothing until there are rows.

        Args:
            generations: Let a language model write a short text at each measurement.
        """
        self.wanted = generations
        self.generations: list[tuple[int, Generation]] = []
        self._run: Run | None = None
        self._handle: Any = None
        self._drawn = 0.0
        self._begun = (0, 0.0)
        self._seen = 0
        self._parameters: int | None = None

    def start(self, run: "Run") -> None:
        """Take note of the run."""
        self._run = run
        self._seen = len(run.metrics)
        self._parameters = read_record(run.directory)["model"].get("parameters")
        self._begun = (run.step, time.monotonic())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Take the newest row, let the model write when it was measured, and redraw when it is time."""
        new, self._seen = rows[min(self._seen, len(rows) - 1) :], len(rows)
        if self.wanted and any(row["split"] == "validation" for row in new):
            self._write(rows[-1]["step"])
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw(rows)

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Draw everything at the end of a session."""
        if rows:
            self._draw(rows)

    def _write(self, step: int) -> None:
        """Let the model continue a text."""
        assert self._run is not None
        written = generate(self._run.adapter, self._run.data, self._run.config.seed)
        if written is None:
            self.wanted = False
        else:
            self.generations = [*self.generations, (step, written)][-SHOWN_GENERATIONS:]

    def numbers(self, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Return what is shown above the curves, as pairs of name and text."""
        run = self._run
        assert run is not None
        train: dict[str, Any] = next((row for row in reversed(rows) if row["split"] == "train"), {})
        held: dict[str, Any] = next((row for row in reversed(rows) if row["split"] == "validation"), {})
        shown = [("step", f"{run.step:,} of {run.total_steps:,}")]
        if left := self._time_left():
            shown.append(("time left", left))
        for name, row, key, form in (
            ("loss", train, "loss", "{:.3f}"),
            ("held out", held, "loss", "{:.3f}"),
            ("bits per byte", held, "bits_per_byte", "{:.3f}"),
            ("accuracy", held, "accuracy", "{:.1%}"),
            ("learning rate", train, "learning_rate", "{:.2e}"),
            ("gradient norm", train, "gradient_norm", "{:.2f}"),
        ):
            if key in row:
                shown.append((name, form.format(row[key])))
        if "samples_per_second" in train:
            tokens = tokens_per_sample(run.data)
            unit, each = ("tokens", tokens) if tokens is not None else ("samples", 1)
            shown.append((f"{unit} per second", f"{train['samples_per_second'] * each:,.0f}"))
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            peak = torch.cuda.max_memory_allocated()
            shown.append(("GPU memory, peak", f"{format_bytes(peak)} of {format_bytes(total)}"))
        shown.append(("memory", format_bytes(resident_memory())))
        return shown

    def _time_left(self) -> str:
        """Say how long the rest of the run takes at the speed of this session."""
        assert self._run is not None
        step, started = self._begun
        done, left = self._run.step - step, self._run.total_steps - self._run.step
        return duration((time.monotonic() - started) / done * left) if done and left else ""

    def html(self, rows: list[dict[str, Any]]) -> str:
        """Return everything as HTML: numbers, curves, texts."""
        run = self._run
        assert run is not None
        block, label = PIECE
        numbers = "".join(
            f'<span style="{block}"><span style="{label}">{escape(name)}</span>{escape(text)}</span>'
            for name, text in self.numbers(rows)
        )
        try:
            marks = [step for step, _ in read_growth(run.directory, self._parameters).marks]
            png = figure_png(rows, run.data.facts.get("zlib_bits_per_byte"), dpi=100, marks=marks)
        except MissingPackageError as error:
            drawn = f"<p>{escape(str(error))}</p>"
        else:
            picture = base64.b64encode(png).decode("ascii")
            drawn = (
                f'<img alt="training curves" style="width:100%;max-width:1100px" src="data:image/png;base64,{picture}">'
            )
        texts = "".join(
            f'<div style="margin:6px 0"><span style="{label}">written at step {step:,}'
            f"{'' if one.complete else ', cut off: it took too long'}</span>"
            f'<span style="white-space:pre-wrap;font-family:monospace;font-size:12px">'
            f'<span style="color:gray">{escape(one.prompt)}</span>{escape(closer(one.text))}</span></div>'
            for step, one in reversed(self.generations)
        )
        return f'<div style="max-width:1100px"><div>{numbers}</div>{drawn}{texts}</div>'

    def _draw(self, rows: list[dict[str, Any]]) -> None:
        """Redraw; a notebook keeps only the newest state."""
        from IPython.display import HTML, display

        content = HTML(self.html(rows))
        if self._handle is None:
            self._handle = display(content, display_id=True)
        else:
            self._handle.update(content)
        self._drawn = time.monotonic()
