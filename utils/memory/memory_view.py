"""What a long-term memory is and how much it holds, as plain values and as a table for a notebook."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from utils.memory.search_result import html_table
from utils.runtime.resources import format_bytes

if TYPE_CHECKING:
    from utils.memory.long_term_memory import LongTermMemory

MOST_DOMAINS = 40
"""Domains shown in a notebook."""


def memory_facts(memory: LongTermMemory) -> dict[str, Any]:
    """Return size, domains, embedder and how it searches, as plain values."""
    return {
        "memories": len(memory),
        "dimension": memory.dimension,
        "metric": memory.metric,
        "domains": memory.domains,
        "bytes": memory.nbytes,
        "method": memory.method,
        "recall": None if memory.recall is None else memory.recall.to_dict(),
        "embedder": memory.embedded_by,
        "config": asdict(memory.config),
    }


def memory_table(memory: LongTermMemory) -> str:
    """Return the same as HTML, the largest domains first."""
    counts = memory.domains
    shown = sorted(counts, key=lambda name: (-counts[name], name))[:MOST_DOMAINS]
    facts = [
        ("memories", f"{len(memory):,} of width {memory.dimension or 'not known yet'}, {format_bytes(memory.nbytes)}"),
        ("metric", memory.metric),
        ("search", memory.method),
        ("embedder", (memory.embedded_by or {}).get("description", "none: vectors are given")),
        *((f"domain {name}", f"{counts[name]:,}") for name in shown),
    ]
    if len(shown) < len(counts):
        facts.append(("more domains", f"{len(counts) - len(shown):,}"))
    return "<b>Long-term memory</b>" + html_table(("", ""), facts)
