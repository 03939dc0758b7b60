"""A run's curves in a notebook: one picture, redrawn in place."""

import io
import sys
import time
from typing import TYPE_CHECKING, Any

from utils.training.figures import training_figure

if TYPE_CHECKING:
    from utils.training.run import Run

REDRAW_SECONDS = 3.0


def in_notebook() -> bool:
    """Tell whether this code runs in a notebook's kernel, where pictures can be shown."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class LiveCurve:
    """Shows the training curves in the output of the running cell, at most every few seconds."""

    def __init__(self) -> None:
        """Show nothing until there are rows."""
        self.zlib_bits_per_byte: float | None = None
        self._handle: Any = None
        self._drawn = 0.0

    def start(self, run: "Run") -> None:
        """Take the baseline of the run's data."""
        self.zlib_bits_per_byte = run.data.facts.get("zlib_bits_per_byte")

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Redraw when enough time has passed since the last picture."""
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw(rows)

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Draw everything at the end of a session."""
        if rows:
            self._draw(rows)

    def _draw(self, rows: list[dict[str, Any]]) -> None:
        """Redraw; a notebook keeps only the newest picture."""
        from IPython.display import Image, display

        picture = io.BytesIO()
        training_figure(rows, self.zlib_bits_per_byte).savefig(picture, format="png", dpi=100)
        image = Image(data=picture.getvalue(), format="png")
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        self._drawn = time.monotonic()
