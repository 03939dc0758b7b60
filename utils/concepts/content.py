"""Examples as they were given, as texts or as tensors: kept, told apart by their hashes, and put to any model."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from utils.adapters.roles import role_of
from utils.concepts.checks import as_tensor, with_tensors
from utils.runtime.arguments import described
from utils.runtime.errors import ConfigError, DataError

ALONE = ""
"""Name of a tensor that was given by itself: it is the main input of whatever model reads it."""


@dataclass(frozen=True, eq=False)
class Content:
    """Samples without a model: texts, or tensors by the names of inputs."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """On the CPU, samples first; under `ALONE` a main input given by itself. Empty for texts."""
    texts: tuple[str, ...] = ()
    """Empty for tensors."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else len(self.texts)

    @property
    def given(self) -> Any:
        """What `utils.concepts.examples.example_batches` takes."""
        return list(self.texts) if self.texts else self.tensors.get(ALONE, self.tensors)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(value.nbytes for value in self.tensors.values()) + sum(len(text.encode()) for text in self.texts)

    def hashes(self) -> tuple[str, ...]:
        """Return a SHA-256 for each sample; equal ones are of the same content.

        White space round a text, the shape of a sample, the width of its type and positions that a mask hides do not
        count. Samples that are nearly the same have different hashes.
        """
        if self.texts:
            return tuple(hashlib.sha256(b"text\0" + text.strip().encode()).hexdigest() for text in self.texts)
        masks = {name: value for name, value in self.tensors.items() if role_of(name) in ("mask", "padding")}
        content = {name: value for name, value in self.tensors.items() if name not in masks}
        return tuple(self._hash(number, content, masks) for number in range(len(self)))

    def _hash(self, number: int, content: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256()
        for _, value in sorted(content.items()):
            row = value[number]
            for name, mask in masks.items():
                if mask.shape == value.shape:
                    row = row[mask[number].bool() == (role_of(name) == "mask")]
            wide = row.double() if row.is_floating_point() else row.long()
            digest.update(f"{'real' if row.is_floating_point() else 'whole'}:{row.numel()}\0".encode())
            digest.update(wide.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def joined(self, other: "Content") -> "Content":
        """Return these samples and then the other ones.

        Raises:
            DataError: They are of different kinds or shapes.
        """
        same = bool(self.texts) == bool(other.texts) and self.tensors.keys() == other.tensors.keys()
        if not same or any(_kind(value) != _kind(other.tensors[name]) for name, value in self.tensors.items()):
            raise DataError(
                f"Some examples are {self.said} and others {other.said}.",
                "Expected all of one kind and of one shape but for their number.",
                "Give texts, or cut or fill up the tensors to one size and give a mask with them.",
            )
        return Content(
            {name: torch.cat([value, other.tensors[name]]) for name, value in self.tensors.items()},
            self.texts + other.texts,
        )

    @property
    def said(self) -> str:
        """The kind of the samples in words."""
        if self.texts:
            return "texts"
        named = [f"{name} {_kind(v)}" if name else f"tensors {_kind(v)}" for name, v in self.tensors.items()]
        return ", ".join(named).replace("torch.", "")


def _kind(value: Tensor) -> str:
    return f"of shape {tuple(value.shape[1:])} and type {value.dtype}"


def read_content(examples: Any, what: str = "examples") -> Content:
    """Return examples that a user gave.

    Args:
        examples: Texts; a tensor of main inputs or a mapping of all inputs, samples first; several mappings; `Content`.
            NumPy arrays are taken like tensors, those of float64 as float32.
        what: How they are called in errors.

    Raises:
        DataError: There is none, or they are nothing of this.
    """
    if isinstance(examples, Content):
        return examples
    examples = with_tensors(examples)
    alone = isinstance(examples, (str, Tensor, Mapping))
    parts: list[Any] = [examples] if alone else list(_iterable(examples, what))
    if not parts:
        raise DataError(f"There are no {what}.", "Expected one at least.", "Give texts or model inputs.")
    if all(isinstance(part, str) for part in parts):
        if empty := sum(not part.strip() for part in parts):
            raise DataError(f"{empty} of the {what} are empty texts.", "Expected texts.", "Leave them out.")
        return Content(texts=tuple(parts))
    refuse_tensor_lists(parts, what)
    made: Content | None = None
    for part in parts:
        named = {ALONE: part} if isinstance(part, Tensor) else part
        if not isinstance(named, Mapping) or not named or not all(isinstance(v, Tensor) for v in named.values()):
            raise DataError(
                f"Among the {what} is a {type(part).__name__}.",
                "Expected texts, tensors, or mappings from the names of inputs to tensors; not several kinds.",
                "Give tensors whose first axis counts samples.",
            )
        tensors = {name: value.detach().cpu().contiguous() for name, value in named.items()}
        if any(not value.ndim for value in tensors.values()) or len({len(value) for value in tensors.values()}) > 1:
            raise DataError(
                f"Tensors of the {what} have the shapes {', '.join(str(tuple(v.shape)) for v in tensors.values())}.",
                "Expected samples as the first axis of each, as many in all.",
                "Add the axis of samples.",
            )
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"The {what} hold values that are not finite{f' in {name!r}' if name else ''}.",
                    "Expected numbers.",
                    "Clean the data first.",
                )
        made = Content(tensors) if made is None else made.joined(Content(tensors))
    assert made is not None
    if not len(made):
        raise DataError(f"There are no {what}.", "Expected one at least.", "Give texts or model inputs.")
    return made


def refuse_tensor_lists(parts: Sequence[Any], what: str = "examples") -> None:
    """Refuse several tensors, of which nobody can say whether each is a sample or a batch.

    Raises:
        DataError: There are several.
    """
    if len(parts) > 1 and all(isinstance(part, Tensor) for part in parts):
        raise DataError(
            f"The {what} are a list of {len(parts)} tensors, of the shape {tuple(parts[0].shape)} at first.",
            "Expected one tensor: each of a list could be a sample or a batch of them.",
            "Join samples with torch.stack, and batches with torch.cat.",
        )


def _iterable(examples: Any, what: str) -> Iterable[Any]:
    if not isinstance(examples, Iterable):
        raise DataError(
            f"The {what} are of the type {type(examples).__name__}.",
            "Expected texts, or tensors of model inputs.",
            "Give a list of texts, or a tensor whose first axis counts samples.",
        )
    return examples


def paired_groups(
    groups: Any, counts: tuple[int, int], names: tuple[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the group of each sample on either side as text; empty where none are given.

    Args:
        groups: A pair, or None.
        counts: How many samples there are on either side.
        names: How they are called in errors.

    Raises:
        DataError: They are no pair, or not as many as samples.
    """
    if groups is None:
        return (), ()
    if not isinstance(groups, (tuple, list)) or len(groups) != 2:
        raise DataError(
            f"The groups are of the type {type(groups).__name__} and not a pair.",
            f"Expected those of the {names[0]} and those of the {names[1]}.",
            f"Write groups=({names[0].split()[0]}, {names[1].split()[0]}), each a list with one entry for each sample.",
        )
    return checked_groups(groups[0], counts[0], names[0]), checked_groups(groups[1], counts[1], names[1])


def checked_groups(groups: Any, count: int, what: str) -> tuple[str, ...]:
    """Return the group of each sample as text; empty where none are given.

    Args:
        groups: A list, a tensor or an array with one entry for each sample, or None.
        count: How many samples there are.
        what: How they are called in errors.

    Raises:
        DataError: They are no list, or there are not as many as samples.
    """
    if groups is None:
        return ()
    groups = as_tensor(groups)
    listed = isinstance(groups, (Sequence, Tensor)) or (hasattr(groups, "__len__") and hasattr(groups, "__getitem__"))
    if not listed or isinstance(groups, (str, bytes, Mapping)) or (isinstance(groups, Tensor) and groups.ndim != 1):
        raise DataError(
            f"The groups of {count} {what} are {described(groups)}.",
            "Expected one for each: what samples of one source or template have in common.",
            "Give a list as long as the samples, or none.",
        )
    if len(groups) != count:
        raise DataError(
            f"There are {len(groups)} groups for {count} {what}.",
            "Expected one for each: what samples of one source or template have in common.",
            "Give a list as long as the samples, or none.",
        )
    return tuple(str(value.item() if isinstance(value, Tensor) else value) for value in groups)


def paired_content(given: Any, counts: tuple[int, int], name: str, what: str, expected: str, action: str) -> Content:
    """Return the samples of a pair, those with a concept first, in another form than the ones known.

    Args:
        given: What a user gave.
        counts: How many there are of those known, with the concept and without.
        name: Of the argument.
        what: How the samples are called, such as "test samples".
        expected: Whose order they are in, for the message.
        action: What to do if they are not as many.

    Raises:
        ConfigError: They are no pair.
        DataError: They are not as many, or of different kinds.
    """
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ConfigError(
            f"{name} is a {type(given).__name__}.",
            f"Expected a pair: the {what} with the concept and those without.",
            f"Write {name}=(examples, counter_examples).",
        )
    sides = [read_content(part, f"student's {what}") for part in given]
    if (len(sides[0]), len(sides[1])) != counts:
        raise DataError(
            f"There are {len(sides[0])} and {len(sides[1])} {what} for the student.",
            f"Expected {counts[0]} and {counts[1]}, {expected}.",
            action,
        )
    return sides[0].joined(sides[1])
