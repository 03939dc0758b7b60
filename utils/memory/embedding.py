"""Texts, images or any samples as vectors for a memory, by the user's own model or by a function, with a fingerprint.

Vectors of two embeddings cannot be compared, and nothing in their numbers says so: the fingerprint does. It is made
from weights, layer, pooling and tokenizer, and asked for again whenever the weights were written to since.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.adapters.activations import default_layer, layer_named, representations
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.roles import may_be_labels, role_of
from utils.adapters.spec import ModelSource
from utils.memory.key_reader import SIDES, tokenizer_fingerprint
from utils.memory.vector_checks import as_vectors
from utils.memory.weight_watch import WeightWatch
from utils.runtime.arguments import LARGEST, described, instance_of, one_of, whole
from utils.runtime.errors import AdapterError, ConfigError, DataError
from utils.tokenization import TextTokenizer
from utils.training.run import Run
from utils.training.weights import weights_sha256

POOLS = ("auto", "mean", "last", "flat")
"""Those that make one vector of a sample."""
PROBES = ("The quick brown fox jumps over 13 lazy dogs.", "déjà vu, naïve: 東京 🙂", "def f(x):\n\treturn x**2  # ok")
"""Texts whose ids tell tokenizers apart that have no file to hash."""


@dataclass(frozen=True)
class Embedder:
    """What makes vectors of items; see `model_embedder` and `function_embedder`."""

    encode: Callable[[Any], Any] = field(repr=False)
    """From items to vectors ``[n, width]``."""
    fingerprint: str
    """Equal where vectors may be compared."""
    description: str
    """What it is, for people."""
    module: nn.Module | None = field(default=None, repr=False)
    """Whose weights the fingerprint covers."""
    weights: str = field(default="", repr=False)
    """Their hash, where it is known."""
    _watch: list[WeightWatch] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Remember the weights.

        Raises:
            ConfigError: There is no fingerprint or description, or nothing to call.
        """
        if not callable(self.encode):
            raise ConfigError(
                f"The function of the embedder is {described(self.encode)}.",
                "Expected a function from items to vectors.",
                "Give one, such as the method `encode` of a model.",
            )
        if not isinstance(self.fingerprint, str) or not self.fingerprint.strip():
            raise ConfigError(
                f"The fingerprint of the embedder is {described(self.fingerprint)}.",
                "Expected a text that names what makes its vectors.",
                'Give, for example, fingerprint="name of the model, version 3".',
            )
        action = "Say in a few words what it is."
        instance_of(self.description, str, "The description of the embedder", "Expected a text.", action)
        if self.module is not None:
            self._watch[:] = [WeightWatch(self.module, self.weights)]

    def __call__(self, items: Any) -> np.ndarray:
        """Return the vectors of items, float32 ``[n, width]``.

        Raises:
            DataError: The model has learned since, or no vectors came out.
        """
        if not all(watch.unchanged() for watch in self._watch):
            raise DataError(
                f"The weights of the embedder have changed since it was made ({self.description}).",
                "Expected the same model for all vectors: those from before and after cannot be compared.",
                "Put the weights back, or make a new embedder and a new memory.",
            )
        return as_vectors(self.encode(items), None, "vectors that the embedder made")

    def to_dict(self) -> dict[str, str]:
        """Return what tells it from others."""
        return {"fingerprint": self.fingerprint, "description": self.description}


def as_embedder(model: Any) -> Embedder:
    """Return an embedder for a model, a run, a loaded model, an adapter, or a method of a model such as ``encode``.

    Raises:
        ConfigError: It is none of these; a plain function needs a name, see `function_embedder`.
        AdapterError: The model cannot be called, or has no layer that stands for a sample.
    """
    if isinstance(model, Embedder):
        return model
    if isinstance(model, (nn.Module, ModelAdapter, ModelSource, Run)):
        return model_embedder(model)
    return function_embedder(model)


def function_embedder(function: Callable[[Any], Any], fingerprint: str | None = None) -> Embedder:
    """Return an embedder that calls a function, such as ``encode`` of a sentence-embedding model.

    Args:
        function: From items to vectors ``[n, width]``.
        fingerprint: Names what makes the vectors; it may be left out for a method of an `nn.Module`, whose weights are
            hashed.

    Raises:
        ConfigError: No function, or one that cannot be told from others.
    """
    owner = getattr(function, "__self__", None)
    module = owner if isinstance(owner, nn.Module) else None
    if not callable(function):
        own = callable(getattr(function, "encode", None))
        raise ConfigError(
            f"The embedder is of the type {type(function).__name__}{', which has a method `encode`' * own}.",
            "Expected a model, a run, a method of a model, or a function with a fingerprint.",
            f'Use function_embedder({"m.encode" if own else "function"}, fingerprint="name of the model, version 3") '
            f"of utils.memory.embedding{', where m is that object' * own}.",
        )
    if fingerprint is None and module is None:
        raise ConfigError(
            "The embedder is a function, and nothing says what its vectors are made by.",
            "Expected a fingerprint, which names that: vectors of two embedders cannot be compared.",
            'Use function_embedder(function, fingerprint="name of the model, version 3") of utils.memory.embedding.',
        )
    name = getattr(function, "__name__", type(function).__name__)
    if fingerprint is None and module is not None:
        weights = weights_sha256(module)
        digest = hashlib.sha256(f"{name}\n{weights}".encode()).hexdigest()
        return Embedder(function, digest, f"{name} of {type(module).__name__}", module, weights)
    return Embedder(function, "" if fingerprint is None else fingerprint, f"{name}: {fingerprint}")


def model_embedder(
    model: Any,
    tokenizer: Any = None,
    layer: str | None = None,
    pool: str = "auto",
    *,
    side: str = "output",
    channels: int | None = None,
    batch_size: int = 32,
) -> Embedder:
    """Return an embedder that reads a layer of a model of any kind, which is left as it was.

    It takes a text or texts where there is a tokenizer, otherwise the model's main input (images, rows of features,
    token ids) as a tensor or array with samples first, or a mapping of inputs by name; names that the model does not
    take, such as labels, are passed over. A text longer than the model can read is read in windows: their mean counts
    every token once, ``"last"`` reads the end of the text.

    Args:
        model: A run, which brings its tokenizer, a loaded model, an adapter or a module.
        tokenizer: A `TextTokenizer`, or a function from a list of texts to a list of ids each, or with ``input_ids``.
        layer: Qualified name; None for what the layer that makes the logits reads.
        pool: ``"mean"`` or ``"last"`` of the positions, ``"flat"`` for all in one vector, ``"auto"`` for the mean.
        side: The layer's ``"output"`` or its ``"input"``.
        channels: The axis of features, where the shape leaves it open.
        batch_size: Samples that are run at a time.

    Raises:
        ConfigError: No such layer, or a pool that makes no single vector of a sample.
        AdapterError: The model cannot be called, or no layer makes its logits.
    """
    if isinstance(model, Run):
        model, tokenizer = model.adapter, tokenizer or model.data.tokenizer
    adapter = model if isinstance(model, ModelAdapter) else ModelAdapter(model)
    if adapter.failure is not None:
        raise AdapterError(adapter.failure)
    one_of(pool, "The pool of the embedder", POOLS, 'Leave it out for "auto", which makes one vector of a sample.')
    one_of(side, "The side", SIDES, "Choose one of them, or leave it out.")
    batch_size = whole(batch_size, "The batch_size of the embedder", 1, "32 is usual; fewer take less memory.")
    if channels is not None:
        channels = whole(channels, "The axis of channels", -LARGEST, "1 is usual for images; leave it out otherwise.")
    if tokenizer is not None and not isinstance(tokenizer, TextTokenizer) and not callable(tokenizer):
        raise ConfigError(
            f"The tokenizer of the embedder is {described(tokenizer)}.",
            "Expected a TextTokenizer, or a function from texts to ids.",
            "Give a run, which brings its own, or the tokenizer that the model was trained with.",
        )
    if layer is None:
        layer, side, _ = default_layer(adapter)
    layer_named(adapter.module, layer)
    reading = _Reading(adapter, tokenizer, layer, "mean" if pool == "auto" else pool, side, channels, batch_size)
    said = {"layer": layer, "side": side, "pool": reading.pool, "channels": channels, "tokenizer": reading.ids_of}
    weights = weights_sha256(adapter.module)
    digest = hashlib.sha256(f"{json.dumps(said)}\n{weights}".encode()).hexdigest()
    return Embedder(reading, digest, f"{side} of {layer} in {adapter.name}, {reading.pool}", adapter.module, weights)


@dataclass(frozen=True)
class _Reading:
    """From items to what one layer makes of them."""

    adapter: ModelAdapter
    tokenizer: Any
    layer: str
    pool: str
    side: str
    channels: int | None
    batch_size: int

    @property
    def ids_of(self) -> str | None:
        """What tells the tokenizer from others."""
        if self.tokenizer is None:
            return None
        if isinstance(self.tokenizer, TextTokenizer):
            return tokenizer_fingerprint(self.tokenizer)
        return hashlib.sha256(json.dumps([ids.tolist() for ids in self._tokens(list(PROBES))]).encode()).hexdigest()

    def __call__(self, items: Any) -> Tensor:
        """Return vectors ``[n, width]``."""
        if isinstance(items, str):
            return self._texts([items])
        if isinstance(items, Mapping):
            return self._samples(items)
        if isinstance(items, (Tensor, np.ndarray)):
            return self._samples({self.adapter.main_input: items})
        if isinstance(items, Sequence) and items and all(isinstance(item, str) for item in items):
            return self._texts(list(items))
        if isinstance(items, Sequence) and items and all(isinstance(item, Tensor) for item in items):
            if len({item.shape for item in items}) == 1:
                return self._samples({self.adapter.main_input: torch.stack(list(items))})
            return torch.cat([self({self.adapter.main_input: item[None]}) for item in items])
        raise DataError(
            f"The items are of the type {type(items).__name__}, or of several types, or there are none.",
            "Expected texts, samples as a tensor or an array, or a mapping of tensors by the names of the model's "
            "inputs.",
            "Give one of these, or vectors as vectors=...",
        )

    def _samples(self, items: Mapping[str, Any]) -> Tensor:
        names = self.adapter.argument_names or self.adapter.input_names
        given = {
            name: torch.as_tensor(value)
            for name, value in items.items()
            if name in names and _is_numeric(value) and not may_be_labels(name)
        }
        rows = {len(value) if value.ndim else -1 for value in given.values()}
        if self.adapter.main_input not in given or len(rows) != 1 or not min(rows, default=0) > 0:
            raise DataError(
                f"The samples are named {', '.join(sorted(map(str, items))) or 'nothing'}, with {sorted(rows)} rows.",
                f"Expected {self.adapter.main_input!r}, and as many rows, one at least, of everything else.",
                "Give the inputs of the model by the names of its forward, samples first.",
            )
        count = min(rows)
        starts = range(0, count, self.batch_size)
        batches = ({name: value[start : start + self.batch_size] for name, value in given.items()} for start in starts)
        return self._read(batches, self.pool)[0]

    def _read(self, batches: Iterator[dict[str, Tensor]], pool: str) -> tuple[Tensor, Tensor]:
        found = representations(self.adapter, batches, self.layer, pool, side=self.side, channels=self.channels)
        return found.values, found.samples

    def _tokens(self, texts: list[str]) -> list[np.ndarray]:
        if isinstance(self.tokenizer, TextTokenizer):
            return [ids.astype(np.int64) for ids in self.tokenizer.encode(texts)]
        encoded: Any = self.tokenizer(texts)
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) or hasattr(encoded, "input_ids") else encoded
        try:
            rows = [np.asarray(row, dtype=np.int64).reshape(-1) for row in ids]
        except (TypeError, ValueError, OverflowError):
            rows = []
        if len(rows) != len(texts):
            raise ConfigError(
                f"The tokenizer makes of {len(texts)} texts what is {described(ids)}.",
                "Expected a list of ids for each text.",
                "Give a TextTokenizer, or a function from a list of texts to a list of ids each.",
            )
        return rows

    def _texts(self, texts: list[str]) -> Tensor:
        """Return the vectors of texts; those of equal length are run together, so that none depends on others."""
        if self.tokenizer is None:
            raise DataError(
                f"The items are {len(texts)} texts, and the embedder has no tokenizer.",
                "Expected the tokenizer that the model was trained with.",
                "Give a run, which brings its own, or model_embedder(model, tokenizer=...).",
            )
        if self.pool == "flat":
            raise ConfigError(
                'Texts are to be embedded with pool="flat".',
                "Expected vectors of one width for texts of any length.",
                'Choose pool="mean" or pool="last".',
            )
        rows = self._tokens(texts)
        empty = [number for number, ids in enumerate(rows) if not len(ids)]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(texts)} texts have no token: number {empty[0]} first.",
                "Expected something to remember in each.",
                "Leave empty texts out.",
            )
        windows = [(number, part) for number, ids in enumerate(rows) for part in self._windows(ids)]
        # Runs of one length; the order within it does not matter, the order of windows of one text does not either.
        windows.sort(key=lambda window: len(window[1]))
        sums: Tensor | None = None
        weights = torch.zeros(len(texts), 1)
        for group in self._groups(windows):
            values = self._window_means([ids for _, ids in group])
            owners = torch.tensor([number for number, _ in group])
            sizes = torch.tensor([[float(len(ids))] for _, ids in group])
            sums = torch.zeros(len(texts), values.shape[1]) if sums is None else sums
            sums.index_add_(0, owners, values * sizes)
            weights.index_add_(0, owners, sizes)
        assert sums is not None
        return sums / weights

    def _windows(self, ids: np.ndarray) -> list[np.ndarray]:
        """Cut a text into pieces that the model can read."""
        limit = self.adapter.max_length.value
        lengths = self.adapter.lengths.value
        most = lengths.legal(len(ids) if limit is None else limit)
        if limit is None and not lengths.fixed:
            most = max(most, len(ids))
        if self.pool == "last":
            return [ids[-most:]]
        return [ids[start : start + most] for start in range(0, len(ids), most)]

    def _groups(self, windows: list[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
        group: list[tuple[int, np.ndarray]] = []
        for window in windows:
            if group and (len(group) == self.batch_size or len(window[1]) != len(group[0][1])):
                yield group
                group = []
            group.append(window)
        if group:
            yield group

    def _window_means(self, pieces: list[np.ndarray]) -> Tensor:
        """Return one vector for each of several windows of equal length, ``[windows, width]``."""
        size = len(pieces[0])
        lengths = self.adapter.lengths.value
        padded = max(lengths.shortest, -(-size // lengths.step) * lengths.step)
        padded = lengths.shortest if lengths.fixed else padded
        fill = self.tokenizer.fill_id if isinstance(self.tokenizer, TextTokenizer) else 0
        ids = torch.full((len(pieces), padded), fill, dtype=torch.int64)
        ids[:, :size] = torch.from_numpy(np.stack(pieces))
        batch = {self.adapter.main_input: ids}
        others = [name for name in self.adapter.input_names if name != self.adapter.main_input]
        masks = [name for name in others if role_of(name) == "mask"]
        if len(masks) < len(others):
            raise AdapterError(
                f"{self.adapter.name} reads {', '.join(sorted(set(others) - set(masks)))} beside the text.",
                "Expected a model that needs nothing but token ids and a mask.",
                "Give the samples as a mapping of all inputs instead of texts.",
            )
        if not masks and padded > size:
            masks = [name for name in self.adapter.argument_names if role_of(name) == "mask"][:1]
        for name in masks:
            batch[name] = (torch.arange(padded) < size).long().expand(len(pieces), padded).clone()
        values, samples = self._read(iter([batch]), "positions")
        positions = len(values) // len(pieces)
        table = values.view(len(pieces), positions, -1)
        assert torch.equal(samples, torch.arange(len(pieces)).repeat_interleave(positions))
        # A mask that fits has hidden the padding already; a layer without positions has one row for all.
        table = table[:, :size] if positions > size and positions == padded else table
        return table[:, -1] if self.pool == "last" else table.mean(1)


def _is_numeric(value: Any) -> bool:
    """Tell whether a value is a tensor, or an array that can be one."""
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")
