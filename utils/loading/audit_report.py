"""What an audit found, as a value: text, HTML and plain data."""

import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from utils.runtime.errors import AuditError


@dataclass(frozen=True)
class AuditItem:
    """One thing the source does."""

    category: str
    """"import", "unknown import", "file", "network", "process", "dynamic code" or "changes other code"."""
    file: str
    """Name of the file, the model's own by the name that its author gave it."""
    line: int
    """Line number, from 1."""
    source: str
    """The line itself."""
    what: str
    """What it touches."""
    harmless: bool
    """Whether it passes without the user's consent."""
    missing: bool = False
    """Whether it imports a package that is not installed."""


@dataclass(frozen=True)
class AuditReport:
    """What a model's source would touch if it ran."""

    items: tuple[AuditItem, ...]
    """Everything found, in order of file and line."""
    lines: int
    """How many lines were read."""

    @property
    def harmless(self) -> bool:
        """Whether the code may run without the user's consent."""
        return all(item.harmless for item in self.items)

    @property
    def concerns(self) -> tuple[AuditItem, ...]:
        """The items that need the user's consent."""
        return tuple(item for item in self.items if not item.harmless)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"harmless": self.harmless, "lines": self.lines, "items": [asdict(item) for item in self.items]}

    def text(self) -> str:
        """Return the report as text: the verdict, then one line per item."""
        if self.harmless:
            imports = ", ".join(sorted({item.what for item in self.items}))
            return f"audit: harmless, {self.lines} lines" + (f"; imports {imports}" if imports else "; no imports")
        count = len(self.concerns)
        kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(i.category for i in self.concerns).items())
        head = f"audit: {count} line{'s' if count > 1 else ''} to read before this runs ({kinds})"
        return "\n".join([head, *self._listing()])

    def _listing(self) -> Iterator[str]:
        for item in self.concerns:
            yield f"  {item.file}:{item.line}  {item.category}: {item.what}"
            yield f"      {item.source.strip()[:160]}"

    def require_harmless(self) -> None:
        """Raise an `AuditError` that shows the lines unless the code is harmless."""
        if self.harmless:
            return
        unknown = all(item.category == "unknown import" for item in self.concerns)
        found = "imports a package that is not known to be harmless" if unknown else "does more than model code needs"
        action = "Read these lines; if you trust them, load again with trust=True."
        if missing := sorted({item.what.split()[0].split(".")[0] for item in self.concerns if item.missing}):
            action += f" That alone will not help: install {', '.join(missing)} first."
        raise AuditError(
            f"The model's code {found}:\n" + "\n".join(self._listing()) + "\n",
            "Expected only imports and calls known to be harmless.",
            action,
        )

    def _repr_html_(self) -> str:
        verdict = "harmless" if self.harmless else f"{len(self.concerns)} lines to read before this runs"
        rows = "".join(
            f"<tr><td>{html.escape(item.file)}:{item.line}</td><td>{html.escape(item.category)}</td>"
            f"<td>{'passes' if item.harmless else '<b>needs consent</b>'}</td><td>{html.escape(item.what)}</td>"
            f"<td style='text-align:left'><code>{html.escape(item.source.strip()[:160])}</code></td></tr>"
            for item in sorted(self.items, key=lambda item: item.harmless)
        )
        return (
            f"<b>Audit: {html.escape(verdict)}</b> ({self.lines} lines)"
            f"<table><tr><th>line</th><th>kind</th><th></th><th>what</th><th>source</th></tr>{rows}</table>"
        )
