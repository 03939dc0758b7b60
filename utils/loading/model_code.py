"""A model's code, read and audited and not yet run: what a user looks at before saying yes."""

import html
from dataclasses import dataclass
from typing import Any

from utils.loading.audit import AuditReport
from utils.loading.reference import Reference
from utils.loading.source import Source


@dataclass(frozen=True, repr=False)
class ModelCode:
    """The source behind a reference. `utils.load_model` takes it and runs exactly this text."""

    reference: Reference
    """What was asked for."""
    source: Source | None = None
    """The files; None where transformers builds the model and no code of the author runs."""
    audit: AuditReport | None = None
    """What the source would touch."""

    def __repr__(self) -> str:
        """Return origin, size and verdict in one line."""
        if self.source is None or self.audit is None:
            return f"ModelCode({self.reference.text[:80]}, built by transformers)"
        verdict = "harmless" if self.audit.harmless else f"{len(self.audit.concerns)} lines to read"
        return f"ModelCode({self.reference.text[:80]}, {len(self.source.files)} files, {verdict})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "reference": self.reference.text,
            "revision": self.source.revision if self.source else None,
            "sha256": self.source.sha256 if self.source else None,
            "files": dict(self.source.files) if self.source else {},
            "audit": self.audit.to_dict() if self.audit else None,
        }

    def text(self) -> str:
        """Return the audit and then every file with line numbers."""
        if self.source is None or self.audit is None:
            return f"{self.reference.text}: built by transformers from its config; no code of the author runs."
        parts = [self.audit.text()]
        for name, content in self.source.files.items():
            numbered = (f"{number:4}  {line}" for number, line in enumerate(content.splitlines(), 1))
            parts.append("\n".join([f"--- {self.source.shown(name)}", *numbered]))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        """Show the audit, and each file folded."""
        if self.source is None or self.audit is None:
            return f"<p>{html.escape(self.text())}</p>"
        files = "".join(
            f"<details><summary><code>{html.escape(self.source.shown(name))}</code>, "
            f"{len(content.splitlines())} lines</summary>"
            f"<pre style='max-height:30em;overflow:auto'>{html.escape(content)}</pre></details>"
            for name, content in self.source.files.items()
        )
        origin = f" at {self.source.revision[:12]}" if self.source.revision else ""
        head = f"<p><b>{html.escape(self.reference.text)}</b>{html.escape(origin)}</p>"
        return head + self.audit._repr_html_() + files
