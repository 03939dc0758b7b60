"""ipywidgets 7 and 8 as one: only core widgets, and the few names that differ between the two."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from utils.runtime.optional import require


def widgets() -> ModuleType:
    """Return ipywidgets.

    Raises:
        MissingPackageError: It is not installed.
    """
    return require("ipywidgets", "show a form in a notebook")


def major_version() -> int:
    """Return 7 or 8."""
    return int(str(widgets().__version__).partition(".")[0])


def with_tooltip(widget: Any, text: str) -> Any:
    """Give a widget a text to show when the pointer rests on it; its trait has another name in 7."""
    old = "description_tooltip" if "description_tooltip" in widget.keys else "tooltip"
    setattr(widget, "tooltip" if major_version() >= 8 else old, text)
    return widget


def folded(parts: Sequence[tuple[str, Any]]) -> Any:
    """Return an accordion with a title for each part, all folded."""
    box = widgets().Accordion(children=[part for _, part in parts])
    for index, (title, _) in enumerate(parts):
        box.set_title(index, title)
    box.selected_index = None
    return box


def uploaded_files(value: Any) -> list[tuple[str, bytes]]:
    """Return names and contents from the value of a FileUpload: a dict of dicts in 7, a tuple of dicts in 8."""
    if isinstance(value, Mapping):
        return [(str(name), bytes(entry["content"])) for name, entry in value.items()]
    return [(str(entry["name"]), bytes(entry["content"])) for entry in value]


def clear_upload(upload: Any) -> None:
    """Forget what was uploaded, so that the same file can be chosen again."""
    if isinstance(upload.value, Mapping):
        # In 7 the value is made from these whenever the browser counts one more upload.
        upload.metadata, upload.data, upload._counter = [], [], 0
        upload.set_trait("value", {})
    else:
        upload.value = ()
