"""Which samples are held out: decided by the hash of their content, so that they hardly ever change sides.

Nothing else of the data moves a sample from one side to the other, and equal samples are always on the same side.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from utils.runtime.errors import DataError


def content_hash(seed: int, content: bytes) -> bytes:
    """Return a number for a sample that depends on the seed and its content alone."""
    return hashlib.blake2b(content, digest_size=16, key=str(seed).encode()).digest()


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Tell whether a document of a stream, whose end nobody knows, belongs to the held-out share."""
    number = int.from_bytes(content_hash(seed, text.strip().encode("utf-8", "replace"))[:8], "big")
    return number < share * 2**64


def split_documents(texts: Sequence[str], share: float, length: int, seed: int) -> tuple[list[str], list[str]]:
    """Hold out whole documents, or the end of the largest one when there are too few.

    Args:
        texts: Different documents.
        share: Share of the bytes to hold out; more when that would not fill one window.
        length: Tokens in a window.
        seed: Chooses the documents.

    Returns:
        Training and held-out documents, each in the order given.
    """
    sizes = [len(text.encode("utf-8")) for text in texts]
    # No tokenizer of ordinary text averages more than eight bytes a token, so this many bytes fill one window.
    target = min(max(share * sum(sizes), 8 * length), sum(sizes) / 2)
    held, chosen = 0, set()
    for index in sorted(range(len(texts)), key=lambda i: content_hash(seed, texts[i].encode("utf-8"))):
        # A document that would overshoot by more than it is missing now would distort the share.
        if held < target and held + sizes[index] <= 2 * target - held:
            chosen.add(index)
            held += sizes[index]
    if held < target / 2:
        largest = max(range(len(texts)), key=sizes.__getitem__)
        text = texts[largest]
        cut = _boundary(text, len(text) - max(1, round(target / sizes[largest] * len(text))))
        return [*texts[:largest], text[:cut], *texts[largest + 1 :]], [text[cut:]]
    return (
        [text for index, text in enumerate(texts) if index not in chosen],
        [text for index, text in enumerate(texts) if index in chosen],
    )


def split_rows(
    keys: Sequence[bytes],
    groups: Sequence[int] | np.ndarray | None,
    share: float,
    seed: int,
    origin: str,
    fixed: Sequence[bool] | None = None,
) -> np.ndarray:
    """Hold out the same share of every group.

    Args:
        keys: Content of each sample; samples of equal content stay together.
        groups: The class of each sample, or None when there are none.
        share: Share to hold out; at least one sample, and of a class with two or more samples one of each.
        seed: Chooses the samples.
        origin: Where the samples are from, for the message.
        fixed: Which samples are held out, where the data itself says so.

    Returns:
        Booleans, shape (samples,): whether each sample is held out.

    Raises:
        DataError: There are too few different samples for two sides.
    """
    if fixed is not None and 0 < sum(fixed) < len(fixed):
        return np.array(fixed, dtype=bool)
    hashes = [content_hash(seed, key) for key in keys]
    if len(set(hashes)) < 2:
        raise DataError(
            f"{origin} holds {len(set(hashes))} different sample{'' if len(set(hashes)) == 1 else 's'}.",
            "Expected at least two: one to train on and one to measure on.",
            "Use more data.",
        )
    members: dict[int, list[int]] = defaultdict(list)
    first: dict[bytes, int] = {}
    for index, key in enumerate(hashes):
        # Equal content with two different labels goes by the label that comes first.
        group = 0 if groups is None else int(groups[index])
        members[first.setdefault(key, group)].append(index)
    held: set[bytes] = set()
    for indices in members.values():
        order = sorted({hashes[index] for index in indices})
        if len(order) > 1:
            held.update(order[: min(max(1, round(share * len(order))), len(order) - 1)])
    if not held:
        held.add(min(hashes))
    return np.array([key in held for key in hashes])


def _boundary(text: str, position: int) -> int:
    """Return the paragraph, line or word boundary at or before a position, or the position when none is near."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, max(0, position * 9 // 10), position)
        if found > 0:
            return found + len(mark)
    return max(1, position)
