"""The classes of several parts of data, numbered together by their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from utils.runtime.errors import DataError
from utils.training.labels import encode_labels
from utils.training.prepared_data import PreparedData
from utils.training.tables import to_number


@dataclass(frozen=True)
class ClassUnion:
    """The classes of all parts."""

    names: list[str]
    """What each stands for."""
    maps: list[Tensor]
    """By part: the common number of each of its own classes."""
    reason: str
    """How they were numbered."""


def unite_classes(parts: Sequence[tuple[str, PreparedData]], limit: int | None, one_source: bool) -> ClassUnion:
    """Number the classes of all parts together, by name.

    Whole numbers keep their value where they count from 0; words are numbered in the order in which they come.

    Args:
        parts: Name and data of each part.
        limit: How many classes the model tells apart; None where it does not say.
        one_source: The parts are of one table, whose labels mean the same everywhere.

    Raises:
        DataError: Labels seem to be counted in two ways, or there are more classes than the model tells apart.
    """
    lists = [[str(name) for name in part.facts["class_names"]] for _, part in parts]
    same = f"{len(lists[0])} classes, the same in all parts"
    if all(names == lists[0] for names in lists):
        return ClassUnion(lists[0], [torch.arange(len(lists[0]))] * len(parts), same)
    present = [
        [names[int(one)] for one in torch.cat([part.train["labels"], part.validation["labels"]]).unique()]
        for names, (_, part) in zip(lists, parts, strict=True)
    ]
    whole = [
        all((number := to_number(name)) is not None and number.is_integer() for name in names) for names in present
    ]
    if any(whole) and not all(whole):
        words = parts[whole.index(False)][0], parts[whole.index(True)][0]
        raise DataError(
            f"The labels of part {words[0]!r} are words, and those of part {words[1]!r} are numbers.",
            "Expected the same labels in all parts: a class is known by its name.",
            "Write the names of the classes in all parts.",
        )
    if whole[0]:
        numbers = [sorted({int(float(name)) for name in names}) for names in present]
        if not one_source:
            _check_shift([name for name, _ in parts], numbers)
        union = sorted({number for each in numbers for number in each})
        every = encode_labels(union, limit, "All parts together")
        place = dict(zip(map(str, union), every.numbers.tolist(), strict=True))
        names, reason = every.names, every.reason
        keyed = [[str(int(number)) if (number := to_number(one)) is not None else one for one in own] for own in lists]
    else:
        names = list(dict.fromkeys(name for each in lists for name in each))
        if limit is not None and len(names) > max(2, limit):
            raise DataError(
                f"All parts together have {len(names)} classes, and the model tells {max(2, limit)} apart.",
                f"Expected at most {max(2, limit)} classes.",
                f"Build the model with num_classes={len(names)}.",
            )
        place, keyed = {name: number for number, name in enumerate(names)}, lists
        reason = "classes of all parts by name, those of earlier parts first"
    # A name without a sample may have no place; no label points at it.
    return ClassUnion(names, [torch.tensor([place.get(name, -1) for name in own]) for own in keyed], reason)


def _check_shift(names: Sequence[str], numbers: Sequence[Sequence[int]]) -> None:
    """Refuse parts that look as if one counted its classes from 0 and the other from 1."""
    for (first, one), (second, other) in combinations(zip(names, numbers, strict=True), 2):
        shift = other[0] - one[0]
        if abs(shift) == 1 and len(one) > 1 and [number + shift for number in one] == list(other):
            raise DataError(
                f"The labels of part {first!r} are {one[0]} to {one[-1]}, and those of part {second!r} {other[0]} to "
                f"{other[-1]}.",
                "Expected labels that mean the same in all parts; these look as if one part counted from 0 and the "
                "other from 1.",
                "Count alike in all parts, or write the names of the classes.",
            )
