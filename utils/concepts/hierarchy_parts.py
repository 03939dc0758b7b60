"""What a hierarchy of concepts is made of: concepts, and sentences that relate two of them; all checked."""

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.concepts.hierarchy_order import HierarchyError
from utils.runtime.settings import shown

REQUIRES, IS_A = "requires", "is-a"
RELATIONS = (REQUIRES, IS_A)
LONGEST_NAME, MOST_FACTS, LONGEST_FACT = 200, 64, 2000
"""Characters of a name, facts of a concept or relation, characters of a fact."""
RELATION_PARTS = ("concept", "relation", "parent")
Fact = str | int | float | bool | None


@dataclass(frozen=True)
class Concept:
    """What is known about a concept."""

    name: str
    difficulty: float = 0.0
    """Among concepts that could be learned next, the easiest comes first."""
    domain: str = ""
    """The field that it belongs to; empty for none."""
    facts: Mapping[str, Fact] = field(default_factory=dict, hash=False)
    """Anything else, shown in the picture and kept in files."""

    def __post_init__(self) -> None:
        """Check.

        Raises:
            HierarchyError: A name or a number cannot be used.
        """
        check_name(self.name, "concept")
        if not isinstance(self.domain, str) or self.domain:
            check_name(self.domain, "domain")
        number = self.difficulty
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise HierarchyError(
                f"The concept {self.name!r} has the difficulty {number!r}.",
                "A finite number was expected.",
                "Give what orders concepts, such as an error rate or a length.",
            )
        object.__setattr__(self, "difficulty", float(number))
        object.__setattr__(self, "facts", checked_facts(self.facts, repr(self.name)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.name, "difficulty": self.difficulty, "domain": self.domain, "facts": dict(self.facts)}


@dataclass(frozen=True)
class Relation:
    """A sentence: `concept` requires, or is, `parent`."""

    concept: str
    relation: str
    parent: str
    facts: Mapping[str, Fact] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        """Say it."""
        return f"{self.concept} {self.relation} {self.parent}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "concept": self.concept, "relation": self.relation, "parent": self.parent, "facts": dict(self.facts),
        }  # fmt: skip


def check_name(name: Any, what: str) -> None:
    """Check a name.

    Raises:
        HierarchyError: It is no text, empty, too long, or holds characters that files cannot keep.
    """
    if not isinstance(name, str) or not name.strip() or name != name.strip() or len(name) > LONGEST_NAME:
        said = f"a {type(name).__name__}" if not isinstance(name, str) else repr(name[:60])
        raise HierarchyError(
            f"The name of a {what} is {said}.",
            f"A text of 1 to {LONGEST_NAME} characters without spaces around it was expected.",
            "Give another name.",
        )
    if any(unicodedata.category(sign) in ("Cc", "Cs") or ord(sign) & 0xFFFE == 0xFFFE for sign in name):
        raise HierarchyError(
            f"The name of a {what}, {name[:60]!r}, holds control characters.",
            "Characters that every file format can keep were expected.",
            "Remove line breaks, tabs and other control characters.",
        )


def checked_facts(facts: Any, owner: str) -> dict[str, Fact]:
    """Return facts as a dict of plain values.

    Raises:
        HierarchyError: A name is no text, or a value is neither text, finite number, truth value nor None.
    """
    if not isinstance(facts, Mapping) or len(facts) > MOST_FACTS:
        said = f"{len(facts)} in number" if isinstance(facts, Mapping) else f"a {type(facts).__name__}"
        raise HierarchyError(
            f"The facts of {owner} are {said}.",
            f"At most {MOST_FACTS} names with values were expected.",
            "Keep what a reader of the picture should see.",
        )
    for name, value in facts.items():
        check_name(name, f"fact of {owner}")
        if not _is_fact(value):
            said = f"{value[:60]!r}" if isinstance(value, str) else f"a {type(value).__name__}"
            raise HierarchyError(
                f"The fact {name!r} of {owner} is {said}.",
                f"A text of at most {LONGEST_FACT} characters, a finite number of at most 64 bits, a truth value or "
                "None was expected.",
                "Turn it into one of these.",
            )
    return dict(facts)


def _is_fact(value: Any) -> bool:
    """Return whether every file format can keep a value."""
    if isinstance(value, str):
        return len(value) <= LONGEST_FACT and not any("\ud800" <= sign <= "\udfff" for sign in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 2**63)


def sentences(given: Any) -> list["Relation"]:
    """Return sentences that a user gave as relations, their names checked.

    Raises:
        HierarchyError: They are no list, or one of them is no sentence of three names.
    """
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise HierarchyError(
            f"The relations are {shown(given)}.",
            "Expected a list of sentences (concept, relation, parent).",
            f"Write for example [('poodle', {IS_A!r}, 'dog')].",
        )
    made = []
    for said in given:
        one = said if isinstance(said, Relation) else Relation(*triple(said))
        for name in (one.concept, one.parent):
            check_name(name, "concept")
        made.append(one)
    return made


def listed_names(names: Any) -> list[Any]:
    """Return names of concepts that a user gave; one name by itself is a list of one, not of its letters.

    Raises:
        HierarchyError: They are no list.
    """
    if isinstance(names, str):
        return [names]
    if not isinstance(names, Iterable):
        raise HierarchyError(
            f"The names of concepts are {shown(names)}.", "Expected a list of names.", "Put a name into a list."
        )
    return list(names)


def triple(said: Any) -> tuple[str, str, str]:
    """Check that a sentence has three words."""
    if not isinstance(said, (tuple, list)) or len(said) != 3:
        raise HierarchyError(
            f"{shown(said)} is no relation.",
            "Three names were expected: concept, relation, parent.",
            f"Write for example ('poodle', {IS_A!r}, 'dog').",
        )
    return (said[0], said[1], said[2])


def records(values: Any, name: str, known: tuple[str, ...], needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a list of plain records out of untrusted values."""
    parts = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(parts, list):
        raise HierarchyError(
            f"There is no list of {name}.",
            "Expected a mapping with the lists concepts and relations.",
            "Use what to_dict() of a hierarchy returned.",
        )
    for number, part in enumerate(parts):
        good = isinstance(part, dict) and set(needed) <= set(part) <= set(known)
        if not good or not all(isinstance(part[one], str) for one in needed):
            raise HierarchyError(
                f"Entry {number} of {name} is {str(part)[:80]!r}.",
                f"Expected texts for {', '.join(needed)}; of others only {', '.join(known)} are known.",
                "Use what to_dict() of a hierarchy returned.",
            )
    return parts
