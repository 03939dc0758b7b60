"""Progress bars for long work: one bar, updated in place, in a terminal and in a notebook."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class ProgressBar(Protocol):
    """What callers may do with a bar."""

    def update(self, n: int = 1) -> object:
        """Advance by `n`."""

    def set_postfix_str(self, s: str) -> object:
        """Show a few words at the end of the bar."""

    def set_description_str(self, desc: str) -> object:
        """Show what is being done now."""


class SilentBar:
    """A bar that shows nothing, for ``progress=False``."""

    def update(self, n: int = 1) -> None:
        """Ignore."""

    def set_postfix_str(self, s: str) -> None:
        """Ignore."""

    def set_description_str(self, desc: str) -> None:
        """Ignore."""


def say(text: str, enabled: bool = True) -> None:
    """Tell something that was found out, where bars are shown; nothing when disabled."""
    if enabled:
        print(text, file=sys.stderr)


@contextmanager
def progress_bar(total: int, description: str, enabled: bool = True, initial: int = 0) -> Iterator[ProgressBar]:
    """Show progress of `total` units while the block runs; silent when disabled or tqdm is absent."""
    if not enabled:
        yield SilentBar()
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        print(f"{description} ...", file=sys.stderr)
        yield SilentBar()
        return
    with tqdm(total=total, desc=description, initial=initial, mininterval=0.5, leave=False, dynamic_ncols=True) as bar:
        yield bar
