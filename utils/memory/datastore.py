"""The memory of a nearest-neighbour language model: for every position of some text a key and the token that followed.

Khandelwal et al. 2020, "Generalization through memorization: nearest neighbor language models" (ICLR,
arXiv:1911.00172), equation 1. A datastore is bounded: of more positions than it may hold, it keeps a uniform sample
(Vitter 1985, "Random sampling with a reservoir", ACM TOMS 11(1), algorithm R).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.adapters.objectives import IGNORED
from utils.memory.key_reader import (
    KeyReader,
    check_tokenizer,
    checked_windows,
    tokenizer_fingerprint,
    tokenizer_of,
)
from utils.runtime.arguments import LARGEST, flag, instance_of, one_of, whole
from utils.runtime.errors import AdapterError, ConfigError, DataError
from utils.runtime.resources import format_bytes
from utils.runtime.seeding import derive_seed
from utils.training.weights import weights_sha256

SCALINGS = ("none", "standardise", "whiten")
"""What is done to keys before distances are measured: nothing; each feature to deviation 1; all directions alike."""
BATCH = 16
"""Windows per forward pass."""
PIECE = 1 << 16
"""Keys that are worked on at a time."""
LEAST_VARIANCE = 1e-4
"""Share of the mean variance below which a direction counts as constant: to stretch it would only raise noise."""


@dataclass(frozen=True)
class Scaling:
    """An affine map of keys, ``(key - mean) @ matrix``."""

    kind: str
    """One of `SCALINGS`."""
    mean: Tensor
    """float32 ``(width,)``."""
    matrix: Tensor
    """float32 ``(width, width)``."""

    def __call__(self, keys: Tensor) -> Tensor:
        """Map keys ``(n, width)``."""
        return keys if self.kind == "none" else (keys - self.mean) @ self.matrix

    @classmethod
    def fit(cls, kind: str, keys: Tensor) -> "Scaling":
        """Find the map from keys ``(n, width)``.

        Euclidean distance after ``"whiten"`` is Mahalanobis distance before it.
        """
        width = keys.shape[1]
        mean, matrix = torch.zeros(width), torch.eye(width)
        if kind != "none":
            # Piece by piece, or float64 would take twice the memory of all keys.
            mean = torch.stack([part.double().sum(0) for part in keys.split(PIECE)]).sum(0).div(len(keys)).float()
            covariance = torch.zeros(width, width, dtype=torch.float64)
            for part in keys.split(PIECE):
                apart = (part - mean).double()
                covariance += apart.T @ apart / len(keys)
            if kind == "standardise":
                matrix = torch.diag(_stretch(covariance.diagonal())).float()
            else:
                values, vectors = torch.linalg.eigh(covariance)
                matrix = (vectors * _stretch(values)).float()
        return cls(kind, mean, matrix)


def _stretch(variances: Tensor) -> Tensor:
    """Return the factors that bring variances ``(width,)`` to one; 1 for all where nothing varies."""
    least = LEAST_VARIANCE * variances.mean()
    if not float(least) > 0:
        return torch.ones_like(variances)
    return variances.clamp_min(least).rsqrt()


@dataclass(frozen=True, eq=False, repr=False)
class Datastore:
    """Keys with the token that followed each, and where they are from."""

    keys: Tensor
    """float32 ``(n, width)``, scaled."""
    values: Tensor
    """int32 ``(n,)``: the token after each position."""
    windows: Tensor
    """int32 ``(n,)``: which window of `source` a key is of."""
    positions: Tensor
    """int32 ``(n,)``: its position there."""
    source: Tensor
    """int32 ``(windows, length)``: the text that was read, as token ids, so that a memory can be shown; 0 windows where
    it was not kept."""
    scaling: Scaling
    """What was done to the keys, and is to be done to queries."""
    layer: str
    """The layer that gave the keys."""
    side: str
    """``"input"`` or ``"output"`` of it."""
    seen: int
    """Positions that were offered; more than there are keys where the bound was reached."""
    model: str
    """SHA-256 of the model's weights."""
    tokenizer: str | None
    """SHA-256 of the tokenizer; None without one."""

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self.keys)

    def __repr__(self) -> str:
        """Return sizes in a line."""
        of = f" of {self.seen:,} positions" if self.seen > len(self) else ""
        return (
            f"Datastore({len(self):,} keys{of}, {self.keys.shape[1]} wide, {self.side} of {self.layer}, "
            f"{format_bytes(self.nbytes)})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, places and text; an index for approximate search copies the keys once more."""
        return sum(t.nbytes for t in (self.keys, self.values, self.windows, self.positions, self.source))

    def shuffled(self, seed: int = 0) -> "Datastore":
        """Return the same keys with the values dealt out at random: what is left is how often each token occurs.

        Raises:
            ConfigError: The seed is no whole number.
        """
        seed = whole(seed, "The seed", -LARGEST, "0 is usual.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(derive_seed(seed, "shuffled values")))
        return replace(self, values=self.values[order])

    def text(self, row: int, tokenizer: Any, before: int = 8) -> tuple[str, str]:
        """Return what stands before the token of a memory, and the token, as text.

        Args:
            row: Number of the memory.
            tokenizer: Reads the ids; without one they are shown as numbers.
            before: Tokens of context.

        Raises:
            ConfigError: There is no memory of that number, or `before` is no whole number from 0 on.
        """
        row = whole(row, "The number of the memory", 0, "Take one of `Lookup.rows`.", most=len(self) - 1)
        before = whole(before, "before", 0, "8 is usual.")
        check_tokenizer(tokenizer, "encode", "decode")
        window, position = int(self.windows[row]), int(self.positions[row])
        ids = self.source[window, max(0, position + 1 - before) : position + 1].tolist() if len(self.source) else []
        after = [int(self.values[row])]
        if tokenizer is None:
            return " ".join(map(str, ids)), str(after[0])
        both, head = tokenizer.decode([*ids, *after]), tokenizer.decode(ids)
        return (head, both[len(head) :]) if both.startswith(head) else (head, tokenizer.decode(after))

    def to_dict(self) -> dict[str, Any]:
        """Return what describes the datastore, as plain values."""
        return {
            "keys": len(self), "width": self.keys.shape[1], "seen": self.seen, "bytes": self.nbytes,
            "layer": self.layer, "side": self.side, "scaling": self.scaling.kind, "windows": len(self.source),
            "model": self.model, "tokenizer": self.tokenizer,
        }  # fmt: skip


def build_datastore(
    model: Any,
    batches: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]],
    labels: Tensor | None = None,
    *,
    layer: str | None = None,
    side: str | None = None,
    scaling: str = "none",
    max_keys: int | None = None,
    max_bytes: int | None = None,
    keep_source: bool = True,
    seed: int = 0,
    tokenizer: Any = None,
) -> Datastore:
    """Read text with a model and remember each position; the model is left as it was.

    Args:
        model: A run, a loaded model, an adapter or a module.
        batches: Token ids ``(n, length)``, or an iterable of such tensors or of pairs of ids and labels; all of one
            length.
        labels: The token after each, `IGNORED` where there is none, as `pack_causal` returns them; None takes the next
            id of the same row. For a tensor of ids only.
        layer: Whose vectors are the keys; None takes what the layer that makes the logits reads.
        side: ``"input"`` or ``"output"`` of the layer.
        scaling: One of `SCALINGS`.
        max_keys: Most keys; of more positions a uniform sample is kept.
        max_bytes: Most bytes of keys, values and places, the text aside.
        keep_source: Keep the text, 4 bytes a token, to show memories by.
        seed: Of the sample.
        tokenizer: What made the ids, so that another tokenizer is refused later; None takes a run's.

    Raises:
        ConfigError: A setting is out of range, there is no such layer, or the model does not predict the next token.
        DataError: The text does not fit the model, or holds nothing to remember.
        AdapterError: The layer gives no vector for every position, or one that is not finite.
    """
    one_of(scaling, "The scaling", SCALINGS, '"whiten" is usual for the keys of a language model.')
    for name, bound in (("max_keys", max_keys), ("max_bytes", max_bytes)):
        if bound is not None:
            whole(bound, name, 1, "Give another bound, or None to keep every position.")
    flag(keep_source, "keep_source", "True keeps the text, to show memories by.")
    seed = whole(seed, "The seed of the sample", -LARGEST, "0 is usual.")
    used = tokenizer_of(model, tokenizer)
    fingerprint = tokenizer_fingerprint(used)
    reader = KeyReader(model, layer, side)
    kept = _Reservoir(max_keys, max_bytes, seed)
    source: list[Tensor] = []
    count = 0
    with reader.reading() as read:
        for ids, follows in _pairs(reader, batches, labels):
            for start in range(0, len(ids), BATCH):
                part, after = ids[start : start + BATCH], follows[start : start + BATCH]
                rows, places = (after != IGNORED).nonzero(as_tuple=True)
                vectors = read(part)[0][rows, places].cpu()
                if not bool(torch.isfinite(vectors).all()):
                    raise AdapterError(
                        f"The {reader.side} of `{reader.layer}` holds numbers that are not finite.",
                        "Expected finite vectors, or no distance could be measured.",
                        "Look for NaN in the weights, or name another layer.",
                    )
                kept.offer(vectors, torch.stack((after[rows, places], rows + count, places), 1).int())
                count += len(part)
            if keep_source:
                source.append(ids.int())
    if not kept.seen:
        raise DataError("There is no text to remember.", "Expected one batch at least.", "Give windows of token ids.")
    keys, about = kept.content()
    made = Scaling.fit(scaling, keys)
    if scaling != "none":
        for part in keys.split(PIECE):
            part.copy_(made(part))
    length = source[0].shape[1] if source else 0
    return Datastore(
        keys=keys, values=about[:, 0].contiguous(), windows=about[:, 1].contiguous(),
        positions=about[:, 2].contiguous(),
        source=torch.cat(source) if source else torch.zeros(0, length, dtype=torch.int32),
        scaling=made, layer=reader.layer, side=reader.side, seen=kept.seen,
        model=weights_sha256(reader.adapter.module), tokenizer=fingerprint,
    )  # fmt: skip


def _pairs(
    reader: KeyReader, batches: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]], labels: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield checked ids and labels of each batch."""
    if isinstance(batches, Tensor):
        yield checked_windows(reader.adapter, batches, labels)
        return
    if labels is not None:
        raise ConfigError(
            "There are labels beside an iterable of batches.",
            "Expected labels only beside one tensor of ids.",
            "Give pairs of ids and labels instead.",
        )
    instance_of(
        batches, Iterable, "The text to remember", "Expected token ids (texts, tokens), or several such tensors.",
        "Give, for example, what pack_causal returns: build_datastore(model, ids, labels).", error=DataError,
    )  # fmt: skip
    length = None
    for batch in batches:
        pair = batch if isinstance(batch, tuple) else (batch, None)
        if len(pair) != 2:
            raise DataError(
                f"A batch is a tuple of {len(pair)}.",
                "Expected token ids (texts, tokens), or a pair of ids and labels.",
                "Give pairs as pack_causal returns them.",
            )
        ids, follows = checked_windows(reader.adapter, *pair)
        if length not in (None, ids.shape[1]):
            raise DataError(
                f"A batch holds windows of {ids.shape[1]} tokens, and an earlier one of {length}.",
                "Expected windows of one length.",
                "Pack the text with pack_causal.",
            )
        length = ids.shape[1]
        yield ids, follows


class _Reservoir:
    """At most so many rows of a stream, each position with the same chance."""

    def __init__(self, max_keys: int | None, max_bytes: int | None, seed: int) -> None:
        self.seen = 0
        self._max_keys, self._max_bytes = max_keys, max_bytes
        self._generator = np.random.default_rng(derive_seed(seed, "datastore"))
        self._keys: list[Tensor] = []
        self._about: list[Tensor] = []

    def offer(self, keys: Tensor, about: Tensor) -> None:
        """Take in keys ``(n, width)`` and what is known of each, int32 ``(n, 3)``."""
        most = self._most(keys.shape[1])
        free = len(keys) if most is None else min(len(keys), max(0, most - self.seen))
        if free:
            self._keys.append(keys[:free].clone())
            self._about.append(about[:free].clone())
        if free < len(keys):
            self.content()
            numbers = np.arange(self.seen + free, self.seen + len(keys))
            # Item i, counted from 0, takes a place drawn from 0 to i, if there is such a place.
            places = (self._generator.random(len(numbers)) * (numbers + 1)).astype(np.int64)
            assert most is not None
            inside = np.flatnonzero(places < most)
            # Of several that take one place, the last stays.
            _, last = np.unique(places[inside][::-1], return_index=True)
            chosen = inside[::-1][last]
            index = torch.from_numpy(places[chosen])
            rows = torch.from_numpy(chosen + free)
            self._keys[0][index] = keys[rows]
            self._about[0][index] = about[rows]
        self.seen += len(keys)

    def content(self) -> tuple[Tensor, Tensor]:
        """Return what is kept, as one tensor each."""
        if len(self._keys) > 1:
            self._keys, self._about = [torch.cat(self._keys)], [torch.cat(self._about)]
        return self._keys[0], self._about[0]

    def _most(self, width: int) -> int | None:
        """Return how many rows are kept at most."""
        bounds = [] if self._max_keys is None else [self._max_keys]
        if self._max_bytes is not None:
            row = 4 * (width + 3)
            bounds.append(self._max_bytes // row)
            if not bounds[-1]:
                raise ConfigError(
                    f"max_bytes is {self._max_bytes}, and one key takes {row} bytes.",
                    "Expected room for one key at least.",
                    "Give more bytes.",
                )
        return min(bounds, default=None)
