"""A language model that also asks a memory: a nearest-neighbour head on any causal model, without training it.

The memory is a `Datastore` that the same model made; `utils.memory.neighbour_mixture` has the equations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.adapters.objectives import IGNORED
from utils.memory.datastore import BATCH, Datastore
from utils.memory.exact_search import BLOCK, nearest
from utils.memory.key_reader import KeyReader, checked_windows, tokenizer_fingerprint, tokenizer_of
from utils.memory.neighbour_mixture import Lookup, NeighbourConfig, mixed, window_hashes
from utils.memory.vector_index import FaissIndex, IndexConfig, make_index
from utils.memory.weight_watch import WeightWatch
from utils.runtime.arguments import described, instance_of, whole
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.resources import format_bytes
from utils.runtime.settings import settings_of


@dataclass(frozen=True, eq=False)
class Mixture:
    """The answers of model and memory for a number of places."""

    log_probabilities: Tensor
    """Of every token, float32 ``(n, vocabulary)``."""
    model: Tensor
    """The model's own, float32 ``(n, vocabulary)``."""
    weights: Tensor
    """The memory's share of each answer, ``(n,)``."""
    shares: Tensor
    """How much each neighbour counts within the memory, ``(n, k)``, rows of sum 1."""
    distances: Tensor
    """Their squared distances, ``(n, k)``, ascending."""
    rows: Tensor
    """Which memories they are, int64 ``(n, k)``."""
    values: Tensor
    """Their tokens, int64 ``(n, k)``."""


class NearestNeighbourHead:
    """A causal language model whose answers are mixed with those of a memory; the model itself is never changed."""

    def __init__(
        self,
        model: Any,
        datastore: Datastore,
        config: NeighbourConfig | Mapping[str, Any] | None = None,
        *,
        index: IndexConfig | Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Join a model with its memory.

        Args:
            model: A run, a loaded model, an adapter or a module: the one that made the datastore.
            datastore: Its memory.
            config: How it answers, as settings or as their names and values; see
                `utils.memory.memory_evaluation.choose_settings`.
            index: How neighbours are searched; None takes FAISS where it is installed, otherwise an exact search in
                torch.
            tokenizer: Shows memories as text; None takes a run's.

        Raises:
            ConfigError: The datastore is none, or another model's, or another tokenizer's, or settings are none.
            DataError: It holds tokens that the model does not know.
        """
        instance_of(
            datastore, Datastore, "The datastore", "Expected what build_datastore or load_datastore returns.",
            "Load it first, or build it.",
        )  # fmt: skip
        self.datastore, self.config = datastore, settings_of(NeighbourConfig, config)
        self.index_config = settings_of(IndexConfig, index)
        self.reader = KeyReader(model, datastore.layer, datastore.side)
        self.tokenizer = tokenizer_of(model, tokenizer)
        self._watch = WeightWatch(self.reader.adapter.module)
        if self._watch.sha256 != datastore.model:
            raise ConfigError(
                f"The datastore was made by a model whose weights have the SHA-256 {datastore.model[:12]}, and those "
                f"of this one have {self._watch.sha256[:12]}.",
                "Expected the model whose vectors are the keys, with the same weights.",
                "Build the datastore anew with this model.",
            )
        self._largest = int(datastore.values.max())
        if self._largest >= self.adapter.readable_ids():
            raise DataError(
                f"The datastore holds the token {self._largest}.",
                f"Expected ids from 0 to {self.adapter.readable_ids() - 1}.",
                "Build it anew with this model.",
            )
        read_by = tokenizer_fingerprint(self.tokenizer)
        if read_by is not None and datastore.tokenizer is not None and read_by != datastore.tokenizer:
            raise ConfigError(
                f"The datastore was made with a tokenizer that has the SHA-256 {datastore.tokenizer[:12]}, and this "
                f"one has {read_by[:12]}.",
                "Expected the tokenizer that made its ids.",
                "Give that tokenizer, or build the datastore anew.",
            )

    @property
    def adapter(self) -> Any:
        """The model's adapter."""
        return self.reader.adapter

    @property
    def method(self) -> str:
        """How neighbours are searched, in words."""
        if self._index is None:
            return "torch, exact: every key is compared"
        return "FAISS, exact: every key is compared" if self._index.exact else f"FAISS, lists; {self._index.recall}"

    @property
    def nbytes(self) -> int:
        """Bytes of the datastore, and of the index where that holds a copy of the keys."""
        return self.datastore.nbytes + (0 if self._index is None else self._index.nbytes)

    def __repr__(self) -> str:
        """Return model, memory and settings in a line."""
        about = self.config
        share = "a gate" if about.gate else f"{about.weight:g}"
        return (
            f"NearestNeighbourHead({self.adapter.name}, {len(self.datastore):,} keys, {format_bytes(self.nbytes)}, "
            f"k={about.neighbours}, T={about.temperature:g}, lambda={share})"
        )

    def with_config(self, config: NeighbourConfig | Mapping[str, Any]) -> "NearestNeighbourHead":
        """Return a head with the same model, memory and index, and other settings.

        Raises:
            ConfigError: They are no settings.
        """
        other = object.__new__(NearestNeighbourHead)
        other.__dict__.update(self.__dict__)
        other.config = settings_of(NeighbourConfig, config)
        return other

    @cached_property
    def _index(self) -> FaissIndex | None:
        """The FAISS index over the keys; None to compare with the keys where they lie."""
        keys = self.datastore.keys.numpy()
        made = make_index(keys.shape[1], "l2", self.index_config)
        if not isinstance(made, FaissIndex):
            return None
        made.add(np.arange(len(keys)), keys)
        return made

    def neighbours(self, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the nearest memories of vectors as the layer gives them.

        Args:
            vectors: float32 ``(n, width)``, unscaled.
            count: How many; fewer where there are fewer.

        Returns:
            Squared distances, ascending, and numbers of memories, both ``(n, count)``.

        Raises:
            ConfigError: `count` is no whole number from 1 on.
            DataError: The model has learned since, the vectors are of another shape or type, or one holds a number
                that is not finite.
        """
        if not self._watch.unchanged():
            raise DataError(
                f"The weights of the {self.adapter.name} have changed since its memory was joined to it.",
                "Expected the model whose vectors are the keys: those from before and after cannot be compared.",
                "Put the weights back, or build the datastore anew with the model as it is.",
            )
        count = min(checked_count(count), len(self.datastore))
        self._check_rows(vectors, "vectors", self.datastore.keys.shape[1])
        queries = self.datastore.scaling(vectors.float().cpu()).contiguous()
        if not bool(torch.isfinite(queries).all()):
            raise DataError(
                f"The {self.reader.side} of `{self.reader.layer}` holds numbers that are not finite.",
                "Expected finite vectors, or no distance could be measured.",
                "Look for NaN in the weights.",
            )
        if self._index is not None:
            distances, rows = self._index.search(queries.numpy(), count, None)
        else:
            keys = self.datastore.keys.numpy()
            chunks = (
                (np.arange(start, min(start + BLOCK, len(keys))), keys[start : start + BLOCK])
                for start in range(0, len(keys), BLOCK)
            )
            distances, rows = nearest(queries.numpy(), chunks, count, "l2")
        return torch.from_numpy(distances).clamp_min(0), torch.from_numpy(rows)

    def lookup(self, ids: Tensor, labels: Tensor | None = None, neighbours: int | None = None) -> Lookup:
        """Run the model over text and look up every place that has a next token.

        Args:
            ids: Token ids ``(n, length)``.
            labels: The token after each, as `pack_causal` returns them; None takes the next id of the same row.
            neighbours: How many to look up; None takes the head's own.

        Raises:
            ConfigError: `neighbours` is no whole number from 1 on.
            DataError: The text does not fit the model, or holds nothing to predict.
        """
        ids, labels = checked_windows(self.adapter, ids, labels)
        count = self.config.neighbours if neighbours is None else checked_count(neighbours)
        hashes = window_hashes(ids)
        parts: list[tuple[Tensor, ...]] = []
        with self.reader.reading() as read:
            for start in range(0, len(ids), BATCH):
                follows = labels[start : start + BATCH]
                windows, places = (follows != IGNORED).nonzero(as_tuple=True)
                if not len(windows):
                    continue
                vectors, logits = read(ids[start : start + BATCH])
                answers = logits[windows, places].log_softmax(-1).cpu()
                distances, rows = self.neighbours(vectors[windows, places], count)
                targets = follows[windows, places]
                entropy = torch.special.entr(answers.exp()).sum(-1)
                own = answers.gather(1, targets[:, None])[:, 0]
                values = self.datastore.values.long()[rows]
                windows = windows + start
                parts.append(
                    (distances, rows, values, entropy, answers.amax(-1), targets, own, windows, hashes[windows])
                )
        return Lookup(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def mixture(self, vectors: Tensor, logits: Tensor) -> Mixture:
        """Mix the model's answers for some places with those of the memory.

        Args:
            vectors: What the layer gave there, ``(n, width)``.
            logits: The model's logits, ``(n, vocabulary)``.

        Raises:
            DataError: They are of another shape or type, or not finite.
        """
        self._check_rows(logits, "logits", None)
        self._check_rows(vectors, "vectors", self.datastore.keys.shape[1])
        if len(vectors) != len(logits) or logits.shape[1] <= self._largest:
            raise DataError(
                f"There are logits {list(logits.shape)} for {len(vectors)} vectors.",
                f"Expected as many, of a vocabulary that holds the memory's token {self._largest}.",
                "Give what the model made of the same places.",
            )
        model = logits.detach().float().cpu().log_softmax(-1)
        distances, rows = self.neighbours(vectors, self.config.neighbours)
        values = self.datastore.values.long()[rows]
        # The answer for every token needs no token that followed.
        none = torch.zeros(len(model), dtype=torch.int64)
        entropy = torch.special.entr(model.exp()).sum(-1)
        found = Lookup(distances, rows, values, entropy, model.amax(-1), none, model[:, 0], none, none)
        shares, weight_logits = found.shares(self.config), found.weight_logits(self.config)
        memory = torch.zeros_like(model).scatter_add_(1, values, shares)
        answers = mixed(model, memory, weight_logits[:, None])
        return Mixture(answers, model, weight_logits.sigmoid(), shares, distances, rows, values)

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """Return the log probabilities of every next token, float32 ``(n, length, vocabulary)``.

        Args:
            ids: Token ids ``(n, length)``.

        Raises:
            DataError: The text does not fit the model.
        """
        ids, _ = checked_windows(self.adapter, ids, ids)
        with self.reader.reading() as read:
            parts = []
            for part in ids.split(BATCH):
                vectors, logits = read(part)
                mixture = self.mixture(vectors.flatten(0, 1), logits.flatten(0, 1))
                parts.append(mixture.log_probabilities.unflatten(0, tuple(part.shape)))
        return torch.cat(parts)

    def _check_rows(self, values: Any, name: str, width: int | None) -> None:
        """Refuse what is no table of real numbers, of a width where that is known."""
        fits = isinstance(values, Tensor) and values.is_floating_point() and values.dim() == 2
        if not fits or width not in (None, values.shape[1]):
            shape = f"(places, {'vocabulary' if width is None else width})"
            raise DataError(
                f"The {name} are {described(values)}.",
                f"Expected a tensor of floating-point numbers of the shape {shape}.",
                f"Give what the model makes of token ids, or use `lookup`, which reads it off {self.reader.layer}.",
            )


def checked_count(count: Any) -> int:
    """Return how many neighbours are asked for.

    Raises:
        ConfigError: It is no whole number from 1 on.
    """
    return whole(count, "The number of neighbours", 1, "Leave it out to take the head's own.")


def check_head(head: Any) -> None:
    """Check that something is a model with its memory.

    Raises:
        ConfigError: It is something else.
    """
    instance_of(
        head, NearestNeighbourHead, "The head", "Expected a NearestNeighbourHead: a model with its memory.",
        "Make one: NearestNeighbourHead(model, build_datastore(model, ids, labels)).",
    )  # fmt: skip
