"""What a long-term memory answers, and what it holds under ids, as plain values that later changes do not touch."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from utils.memory.recall import Recall

MOST_SHOWN = 20
"""Rows of a table in a notebook."""
LONGEST = 160
"""Characters of the metadata in a table."""


@dataclass(frozen=True)
class Match:
    """One memory that was found."""

    id: int
    """Of the memory."""
    score: float
    """Cosine similarity, or squared Euclidean distance."""
    domain: str
    """Where it belongs."""
    metadata: dict[str, Any]
    """A copy."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The nearest memories of each query, the best first.

    There are never rows that stand for nothing: where fewer memories fit than were asked for, all columns are fewer.
    """

    ids: np.ndarray
    """int64 ``[queries, found]``."""
    scores: np.ndarray
    """float32 ``[queries, found]``: cosine similarity, higher is nearer, or squared Euclidean distance, lower is."""
    k: int
    """How many were asked for."""
    candidates: int
    """How many memories there were to choose from, in the domain and under the conditions asked for."""
    metric: str
    """``"cosine"`` or ``"l2"``."""
    method: str
    """What answered: FAISS or torch, with every vector or with inverted lists."""
    exact: bool
    """Every candidate was compared."""
    recall: Recall | None = None
    """What inverted lists found of held-out queries; None where the answer is exact."""
    _domains: np.ndarray = field(default_factory=lambda: np.empty((0, 0), dtype=object), repr=False)
    _entries: Sequence[Sequence[dict[str, Any]]] | None = field(default=None, repr=False)

    @property
    def found(self) -> int:
        """Memories found for each query."""
        return int(self.ids.shape[1])

    @property
    def complete(self) -> bool:
        """As many were found as were asked for."""
        return self.found == self.k

    @property
    def note(self) -> str:
        """Why there are fewer than were asked for; empty when there are not."""
        if self.complete:
            return ""
        if not self.candidates:
            return f"nothing found for k = {self.k}: no memory fits, or there are none"
        return f"{self.found} found for k = {self.k}: no more memories fit"

    @property
    def metadata(self) -> list[list[dict[str, Any]]]:
        """Metadata of each, copies; empty mappings where the search was told to leave them out."""
        if self._entries is None:
            return [[{} for _ in row] for row in self.ids]
        return [[copy.deepcopy(entry) for entry in row] for row in self._entries]

    @property
    def domains(self) -> list[list[str]]:
        """Domain of each."""
        names: list[list[str]] = self._domains.tolist()
        return names

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.ids)

    def __getitem__(self, query: int) -> list[Match]:
        """Return what was found for one query, the best first."""
        ids, scores = self.ids[query].tolist(), self.scores[query].tolist()
        domains: list[str] = self._domains[query].tolist()
        entries: Sequence[dict[str, Any]] = [{}] * len(ids) if self._entries is None else self._entries[query]
        columns = zip(ids, scores, domains, entries, strict=True)
        return [Match(key, score, domain, copy.deepcopy(entry)) for key, score, domain, entry in columns]

    def __iter__(self) -> Iterator[list[Match]]:
        """Go through the queries."""
        return (self[query] for query in range(len(self)))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "ids": self.ids.tolist(),
            "scores": self.scores.tolist(),
            "domains": self.domains,
            "metadata": self.metadata,
            "k": self.k,
            "candidates": self.candidates,
            "complete": self.complete,
            "note": self.note,
            "metric": self.metric,
            "method": self.method,
            "exact": self.exact,
            "recall": None if self.recall is None else self.recall.to_dict(),
        }

    def __str__(self) -> str:
        """Say in a line what was found and by whom."""
        said = f"{self.found} of {self.candidates:,} memories for each of {len(self)} queries ({self.method})"
        return f"{said}; {self.note}" if self.note else said

    def _repr_html_(self) -> str:
        """Show the matches in a notebook."""
        score = "cosine" if self.metric == "cosine" else "squared distance"
        rows = [
            (str(query), str(match.id), f"{match.score:.4f}", match.domain, _short(match.metadata))
            for query, matches in zip(range(MOST_SHOWN), self, strict=False)
            for match in matches
        ]
        more = f"<p>and {len(rows) - MOST_SHOWN} rows or more</p>" if len(rows) > MOST_SHOWN else ""
        shown = html_table(("query", "id", score, "domain", "metadata"), rows[:MOST_SHOWN])
        return f"<p>{escape(str(self))}</p>{shown}{more}"


@dataclass(frozen=True, eq=False)
class MemoryRecords:
    """What a long-term memory holds under some ids, in their order."""

    ids: np.ndarray
    """int64 ``[n]``."""
    vectors: np.ndarray
    """float32 ``[n, width]``; of norm 1 under cosine."""
    domains: tuple[str, ...]
    """Domain of each."""
    metadata: tuple[dict[str, Any], ...]
    """Metadata of each, copies."""

    def __len__(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "ids": self.ids.tolist(),
            "vectors": self.vectors.tolist(),
            "domains": list(self.domains),
            "metadata": copy.deepcopy(list(self.metadata)),
        }

    def _repr_html_(self) -> str:
        """Show ids, domains and metadata in a notebook."""
        rows = [
            (str(key), domain, _short(entry))
            for key, domain, entry in zip(self.ids.tolist(), self.domains, self.metadata, strict=True)
        ]
        more = f"<p>and {len(rows) - MOST_SHOWN} more</p>" if len(rows) > MOST_SHOWN else ""
        return html_table(("id", "domain", "metadata"), rows[:MOST_SHOWN]) + more


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts; empty without rows."""
    if not rows:
        return ""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    cells = (f"<td style='text-align:left'>{escape(cell)}</td>" for row in rows for cell in row)
    body = "".join(f"<tr>{''.join(next(cells) for _ in row)}</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _short(metadata: dict[str, Any]) -> str:
    text = ", ".join(f"{key}: {value}" for key, value in metadata.items())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
