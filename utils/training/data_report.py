"""What a reader should know about data before training on it: counts, lengths, repetitions, what is lost, what leaks.

The report is made while the data is prepared and kept with it, so that a run still shows it years later.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np

WORDS_IN_COMMON = 13
"""Words in a row that count as the same passage when two documents share them."""
SEARCHED = 20_000_000
"""Characters of training text that are searched for passages of the held-out text."""
BINS = 12
BARS = " ▁▂▃▄▅▆▇█"
SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Overlap:
    """How much of the held-out data is also in the training data."""

    exact: int
    """Held-out samples that are training samples too, white space around them aside."""
    near: int
    """Held-out samples that share `WORDS_IN_COMMON` words in a row with a training sample, the exact ones included."""
    checked: int
    """Held-out samples that were looked at."""
    searched_share: float = 1.0
    """Share of the training text that was searched."""


@dataclass(frozen=True, repr=False)
class DataReport:
    """The report; shows itself in a notebook."""

    unit: str
    """What a sample is made from: documents, texts, pairs, images, rows."""
    train: int
    """Units to train on."""
    validation: int
    """Units held out."""
    duplicates: int = 0
    """Exact repetitions that were left out."""
    contradictions: int = 0
    """Units of equal content with different labels; they are kept."""
    lengths: Mapping[str, Any] | None = None
    """Tokens per unit: shortest, median, longest, edges and counts of a histogram."""
    cut_units: int = 0
    """Units longer than the model reads."""
    cut_share: float = 0.0
    """Share of all tokens that is cut off."""
    unknown_share: float = 0.0
    """Share of all tokens that have no id of their own."""
    overlap: Mapping[str, Any] | None = None
    """See `Overlap`; None where it means nothing."""
    classes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Training and held-out samples by class."""
    targets: Mapping[str, float] | None = None
    """Mean, deviation, smallest and largest number to predict."""
    notes: Sequence[str] = ()
    """What was decided, and why."""
    warnings: Sequence[str] = ()
    """What the reader should look at."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "notes": list(self.notes), "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataReport":
        """Make a report from what `to_dict` returned; entries of a later version are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def rows(self) -> list[tuple[str, str]]:
        """Return what is worth showing, as pairs of name and text."""
        rows = [(self.unit, f"{self.train:,} to train, {self.validation:,} held out")]
        if self.duplicates or self.contradictions:
            more = f"; {self.contradictions:,} with equal content and different labels" if self.contradictions else ""
            rows.append(("repetitions", f"{self.duplicates:,} left out{more}"))
        if self.lengths:
            one = self.lengths
            bars = "".join(BARS[-(-8 * count // max(1, *one["counts"]))] for count in one["counts"])
            rows.append(
                ("lengths", f"{one['shortest']:,} to {one['longest']:,} tokens, half up to {one['median']:,}  |{bars}|")
            )
        if self.cut_units:
            rows.append(("cut off", f"{self.cut_units:,} {self.unit}, {self.cut_share:.1%} of the tokens"))
        if self.unknown_share:
            rows.append(("unknown", f"{self.unknown_share:.2%} of the tokens"))
        if self.overlap is not None:
            seen = self.overlap
            part = (
                "" if seen["searched_share"] == 1 else f" ({seen['searched_share']:.0%} of the training text searched)"
            )
            rows.append(
                (
                    "overlap",
                    f"of {seen['checked']:,} held out {seen['exact']:,} are in the training data, {seen['near']:,} "
                    f"share {WORDS_IN_COMMON} words in a row with it{part}",
                )
            )
        if self.classes:
            rows.append(("classes", self._class_line()))
        if self.targets:
            one = self.targets
            rows.append(
                ("targets", f"{one['smallest']:.4g} to {one['largest']:.4g}, mean {one['mean']:.4g}, "
                            f"deviation {one['deviation']:.4g}")
            )  # fmt: skip
        rows += [("note", note) for note in self.notes]
        return rows + [("look", warning) for warning in self.warnings]

    def _class_line(self) -> str:
        total = max(1, sum(counts[0] for counts in self.classes.values()))
        parts = [f"{name} {counts[0] / total:.1%}" for name, counts in list(self.classes.items())[:SHOWN_CLASSES]]
        more = f" and {len(self.classes) - SHOWN_CLASSES} more" if len(self.classes) > SHOWN_CLASSES else ""
        return f"{len(self.classes)}: {', '.join(parts)}{more}"

    def text(self) -> str:
        """Return the report as aligned text."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    __repr__ = text

    def pictures(self) -> str:
        """Return the small plots as inline SVG; empty when there is nothing to plot."""
        drawn = []
        if self.lengths and len(self.lengths["counts"]) > 1:
            edges = self.lengths["edges"]
            names = [f"{int(low):,} to {int(high):,} tokens" for low, high in pairwise(edges)]
            ends = (f"{self.lengths['shortest']:,}", f"{self.lengths['longest']:,} tokens")
            widening = edges[-1] - edges[-2] > 2 * (edges[1] - edges[0])
            title = f"lengths of {self.unit}{' in bins that widen' if widening else ''}"
            drawn.append(_bars(title, names, self.lengths["counts"], ends))
        if len(self.classes) > 1:
            shown = list(self.classes.items())[: 3 * SHOWN_CLASSES]
            ends = (shown[0][0], shown[-1][0])
            drawn.append(_bars("samples by class", [name for name, _ in shown], [n[0] for _, n in shown], ends))
        return "".join(drawn)

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        return html_table(self.rows()) + self.pictures()


def html_table(rows: Sequence[tuple[str, str]]) -> str:
    """Return pairs of name and text as a table."""
    cells = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def _bars(title: str, names: Sequence[str], counts: Sequence[int], ends: tuple[str, str]) -> str:
    """Draw upright bars from zero in the colour of the page's text; hovering names each."""
    width, height, top = 320, 80, 18
    step, largest = width / len(counts), max(1, *counts)
    bars = "".join(
        f'<rect x="{index * step:.1f}" y="{top + height - count / largest * height:.1f}" width="{step * 0.86:.1f}" '
        f'height="{max(count / largest * height, 1.0 if count else 0.0):.1f}" fill="#4c78a8">'
        f"<title>{html.escape(name)}: {count:,}</title></rect>"
        for index, (name, count) in enumerate(zip(names, counts, strict=True))
    )
    words = "font-size='11' fill='currentColor' font-family='sans-serif'"
    last = top + height
    return (
        f'<svg viewBox="0 0 {width} {last + 16}" width="{width}" role="img" aria-label="{html.escape(title)}" '
        f'style="margin:6px 24px 0 0">'
        f'<text x="0" y="11" {words}>{html.escape(title)} (largest {largest:,})</text>{bars}'
        f'<line x1="0" x2="{width}" y1="{last}" y2="{last}" stroke="currentColor" stroke-width="0.5"/>'
        f'<text x="0" y="{last + 13}" {words}>{html.escape(ends[0])}</text>'
        f'<text x="{width}" y="{last + 13}" text-anchor="end" {words}>{html.escape(ends[1])}</text></svg>'
    )


def describe_lengths(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Return a histogram of lengths, with bins that widen where lengths differ by orders of magnitude."""
    if not len(lengths):
        return None
    values = np.asarray(lengths, dtype=np.int64)
    low, high = int(values.min()), int(values.max())
    if high > 20 * max(1, low):
        edges = np.unique(np.geomspace(max(1, low), high + 1, BINS + 1).astype(np.int64))
        edges[0] = low
    else:
        edges = np.unique(np.linspace(low, high + 1, min(BINS, high - low + 1) + 1).astype(np.int64))
    counts, _ = np.histogram(values, edges)
    return {
        "shortest": low,
        "median": int(np.median(values)),
        "longest": high,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def find_overlap(train: Sequence[str], validation: Sequence[str]) -> dict[str, Any]:
    """Count held-out texts that are also in the training data, whole or in part.

    Passages are compared by 64-bit hashes of `WORDS_IN_COMMON` words; of very long training text only the first
    `SEARCHED` characters are searched, and the share is told.
    """
    known = {text.strip() for text in train}
    exact = {index for index, text in enumerate(validation) if text.strip() in known}
    numbers: dict[str, int] = {}
    wanted = [_passages(text, numbers) for text in validation]
    near = set(exact)
    searched, total = 0, sum(map(len, train))
    if len(every := np.unique(np.concatenate([np.zeros(0, np.uint64), *wanted]))):
        seen = np.zeros(len(every), dtype=bool)
        for text in train:
            if searched >= SEARCHED:
                break
            searched += len(text)
            passages = _passages(text, numbers)
            places = np.minimum(np.searchsorted(every, passages), len(every) - 1)
            seen[places[every[places] == passages]] = True
        shared = every[seen]
        near |= {index for index, passages in enumerate(wanted) if np.isin(passages, shared).any()}
    share = searched / total if 0 < searched < total else 1.0
    return asdict(Overlap(len(exact), len(near), len(validation), share))


def _passages(text: str, numbers: dict[str, int]) -> np.ndarray:
    """Return a hash of each run of words in a text."""
    words = text.split()
    count = len(words) - WORDS_IN_COMMON + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    ids = np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], dtype=np.uint64)
    # A polynomial in an odd number, modulo 2^64; multiplied through once more so that small numbers spread.
    factor, total = np.uint64(0x9E3779B97F4A7C15), np.zeros(count, dtype=np.uint64)
    for offset in range(WORDS_IN_COMMON):
        mixed = (ids[offset : offset + count] ^ (ids[offset : offset + count] << np.uint64(29))) * factor
        total = total * np.uint64(0xD6E8FEB86659FD93) + mixed
    return total


def class_counts(names: Sequence[str], train: np.ndarray, validation: np.ndarray) -> dict[str, list[int]]:
    """Count samples of each class on both sides; ``train`` and ``validation`` are class numbers."""
    sides = [np.bincount(side, minlength=len(names)) for side in (train, validation)]
    return {name: [int(sides[0][index]), int(sides[1][index])] for index, name in enumerate(names)}


def class_warnings(classes: Mapping[str, Sequence[int]]) -> list[str]:
    """Say which classes are missing or rare."""
    counts = {name: both[0] for name, both in classes.items()}
    missing = [name for name, count in counts.items() if not count]
    found = []
    if missing:
        found.append(f"no training sample of {len(missing)} class{'es' if len(missing) > 1 else ''}: "
                     f"{', '.join(missing[:5])}")  # fmt: skip
    present = [count for count in counts.values() if count]
    if len(present) > 1 and max(present) >= 10 * min(present):
        found.append(f"the largest class has {max(present) / min(present):.0f} times as many samples as the smallest")
    return found
