"""Lines that one text repeats from another, taken out.

A memory that is asked for what it holds word by word looks better than it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from utils.runtime.arguments import flag, whole
from utils.runtime.errors import DataError

SHORTEST = 16
"""Characters from which a line counts: shorter ones, such as ``return None``, are a language's own words."""


@dataclass(frozen=True)
class WithoutRepeats:
    """Texts in which no line occurs twice, and what was taken out."""

    texts: dict[str, list[str]]
    """Documents by split; those with nothing left are gone."""
    documents: dict[str, list[int]]
    """Number of each document among those given, by split."""
    lines: dict[str, int]
    """Lines given, by split, empty ones aside."""
    removed: dict[str, int]
    """Lines taken out, by split."""
    shortest: int
    """Characters from which a line counted."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, without the texts."""
        facts = asdict(self)
        return {name: facts[name] for name in ("lines", "removed", "shortest")}

    def __str__(self) -> str:
        """Say what was taken out of each split."""
        told = ", ".join(
            f"{self.removed[name]:,} of {self.lines[name]:,} lines of {name}"
            + (f" ({self.removed[name] / self.lines[name]:.0%})" if self.lines[name] else "")
            for name in self.texts
        )
        return f"repeated lines of {self.shortest} characters or more taken out: {told}"


def without_repeated_lines(
    splits: Mapping[str, Sequence[str]], shortest: int = SHORTEST, within: bool = True
) -> WithoutRepeats:
    """Take out every line that an earlier document has, over all splits in the order given.

    Lines are compared without the white space around them.

    Args:
        splits: Documents by split; give what is remembered first, then what is measured on.
        shortest: Characters from which a line counts.
        within: Also take out lines that occurred in the same split; False takes out only those of earlier splits.

    Raises:
        ConfigError: `shortest` is below 1.
        DataError: The splits are no lists of documents under names.
    """
    shortest = whole(shortest, "shortest", 1, "1 compares every line that is not empty.")
    flag(within, "within", "True also takes out lines that occurred in the same split.")
    if not isinstance(splits, Mapping) or not all(map(_are_documents, splits.values())):
        kinds = [splits] if not isinstance(splits, Mapping) else list(splits.values())
        raise DataError(
            f"Documents are given as {', '.join(sorted({type(kind).__name__ for kind in kinds}))}.",
            "Expected a list of texts for each split, under its name.",
            'Give, for example, {"memory": [text, text], "test": [text]}.',
        )
    seen: set[str] = set()
    result = WithoutRepeats({}, {}, {}, {}, shortest)
    for split, documents in splits.items():
        own: set[str] = set()
        texts, numbers, total, removed = [], [], 0, 0
        for number, document in enumerate(documents):
            kept: list[str] = []
            for line in document.splitlines(keepends=True):
                bare = line.strip()
                total += bool(bare)
                if len(bare) >= shortest:
                    if bare in seen or (within and bare in own):
                        removed += 1
                        continue
                    own.add(bare)
                kept.append(line)
            if "".join(kept).strip():
                texts.append("".join(kept))
                numbers.append(number)
        seen |= own
        result.texts[split], result.documents[split] = texts, numbers
        result.lines[split], result.removed[split] = total, removed
    return result


def _are_documents(split: Any) -> bool:
    """Tell whether a split is several texts; one text is none, though its characters are texts."""
    return isinstance(split, Sequence) and not isinstance(split, str) and all(isinstance(one, str) for one in split)
