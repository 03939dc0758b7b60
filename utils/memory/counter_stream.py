"""Random numbers addressed by their number: the one for the n-th sample is the same however the stream is cut.

Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC11) computes any word of its
sequence from a key and a counter. NumPy keeps the words of its bit generators the same in all versions, so that
decisions drawn from them are the same on every machine.
"""

import numpy as np

WORDS = 4
"""Words for each value of Philox's counter."""
SHIFT = np.uint64(11)
"""From 64 bits to the 53 of a float64."""


class CounterStream:
    """The words of one or more keys, from any place on."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        # Putting the state in is several times faster than a new generator, which asks the system for entropy.
        self._state = self._philox.state

    def words(self, key: int, start: int, count: int) -> np.ndarray:
        """Return random words.

        Args:
            key: Which sequence, 0 to 2^64 - 1.
            start: Number of the first word.
            count: How many.

        Returns:
            uint64 [count].
        """
        self._state["state"]["key"][0] = key
        self._state["state"]["counter"][0] = start // WORDS
        self._philox.state = self._state
        words: np.ndarray = self._philox.random_raw(start % WORDS + count)
        return words[start % WORDS :]

    def uniforms(self, key: int, start: int, count: int) -> np.ndarray:
        """Return random numbers of [0, 1), float64 [count], each a multiple of 2^-53; arguments as for `words`."""
        uniforms: np.ndarray = (self.words(key, start, count) >> SHIFT) * 2.0**-53
        return uniforms


def drawn(stream: CounterStream, key: int, count: int, total: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Draw places without putting any back.

    Args:
        stream: Gives the random numbers.
        key: Which sequence of them.
        count: How many places; at most `total`.
        total: How many there are.
        weights: float64 [total], at least 0: the next place is drawn with a probability proportional to its weight
            among those left (exponential keys, Efraimidis & Spirakis 2006, "Weighted random sampling with a
            reservoir"); those of weight 0 come when no others are left.

    Returns:
        int64 [count], in the order in which they were drawn.
    """
    if weights is not None and weights.max(initial=0.0) > 0:
        waits = -np.log1p(-stream.uniforms(key, 0, total))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            keys = np.where(weights > 0, waits / (weights / weights.max()), np.inf)
        # Only the smallest need an order; sorting all would take most of the time in a large buffer.
        first = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
        return first[np.lexsort((waits[first], keys[first]))[:count]]
    if total <= 16 * count:
        return np.argsort(stream.words(key, 0, total), kind="stable")[:count]
    # Of many places few are drawn twice: draw on until there are enough different ones.
    places: dict[int, None] = {}
    start = 0
    while len(places) < count:
        places.update(dict.fromkeys((stream.uniforms(key, start, count) * total).astype(np.int64).tolist()))
        start += count
    return np.array(list(places)[:count], dtype=np.int64)
