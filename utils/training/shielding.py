"""What follows a run can fail; the run goes on, and the first failure is told once."""

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.training.run import Run
    from utils.training.session_callback import Observer


class Shielded:
    """An observer whose exceptions end its own work and nothing else; an interrupt by the user passes."""

    def __init__(self, observer: "Observer") -> None:
        """Shield an observer."""
        self.observer = observer
        self.failed = False

    def start(self, run: "Run") -> None:
        """Get ready."""
        self._call("start", run)

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Hand the metrics on."""
        self._call("update", rows)

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Hand all metrics on at the end."""
        self._call("close", rows)

    def _call(self, verb: str, argument: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self.observer, verb)(argument)
        except Exception as error:  # whatever it is, the training is worth more
            self.failed = True
            warnings.warn(
                f"{type(self.observer).__name__} stopped following the run ({type(error).__name__}: {error}). Training "
                "goes on without it; metrics.csv has all numbers.",
                stacklevel=3,
            )
