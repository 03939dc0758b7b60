"""What an episodic buffer holds, as plain values and as a table for a notebook."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from utils.runtime.resources import format_bytes

if TYPE_CHECKING:
    from utils.memory.episodic_buffer import EpisodicBuffer

MOST_ROWS = 40
"""Groups shown in a notebook."""
WIDEST = 12
"""Of a bar, in units of the letters."""


def summary(buffer: EpisodicBuffer) -> dict[str, Any]:
    """Return bounds, content and use of a buffer as plain values."""
    about = buffer.about()
    times = about["times"]
    return {
        "policy": buffer.policy,
        "samples": len(buffer),
        "capacity": buffer.capacity,
        "bytes": buffer.nbytes,
        "max_bytes": buffer.max_bytes,
        "seen": buffer.seen,
        "groups": {str(group): count for group, count in buffer.counts.items()},
        "fields": {name: str(layout) for name, layout in buffer.layouts.items()},
        "oldest": int(times.min()) if len(times) else None,
        "newest": int(times.max()) if len(times) else None,
        "rehearsals": int(about["rehearsals"].sum()),
        "on_disk": buffer.directory is not None,
        "source": buffer.source,
    }


def buffer_table(buffer: EpisodicBuffer) -> str:
    """Return HTML with a few numbers and a bar for each of the largest groups."""
    facts = summary(buffer)
    most = "" if buffer.max_bytes is None else f" of at most {format_bytes(buffer.max_bytes)}"
    where = "on disk" if facts["on_disk"] else "in memory"
    lines = [f"{format_bytes(buffer.nbytes)}{most} {where}; its samples were drawn {facts['rehearsals']} times"]
    if facts["source"]:
        lines.append(f"source: {facts['source']}")
    if len(buffer):
        lines.append(f"time-stamps {facts['oldest']} to {facts['newest']}")
        lines.append("fields: " + ", ".join(f"{name} ({layout})" for name, layout in facts["fields"].items()))
    counts = buffer.counts
    shown = sorted(sorted(counts, key=lambda group: (-counts[group], group))[:MOST_ROWS])
    if len(shown) < len(counts):
        lines.append(f"the {len(shown)} largest of {len(counts)} groups:")
    largest = max(counts.values(), default=1)
    rows = "".join(
        f"<tr><td>{group}</td><td>{counts[group]}</td><td style='text-align:left'><div style='background:#4878a8;"
        f"height:0.8em;width:{WIDEST * counts[group] / largest:.2f}em'></div></td></tr>"
        for group in shown
    )
    table = f"<table><tr><th>group</th><th>samples</th><th></th></tr>{rows}</table>" if counts else ""
    return f"<p><b>{html.escape(repr(buffer))}</b><br>{'<br>'.join(map(html.escape, lines))}</p>{table}"
