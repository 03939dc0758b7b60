"""What a causal language model makes of every position: the vector that a memory is looked up by, and the logits.

Both come from one forward pass. The vector is the tensor that a layer reads or makes, by default what the layer that
makes the logits reads; no layer is known by its name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.activations import Place, captured, default_layer, layer_named
from utils.adapters.objectives import IGNORED
from utils.runtime.arguments import described, one_of
from utils.runtime.errors import AdapterError, ConfigError, DataError
from utils.runtime.files import sha256_bytes
from utils.runtime.isolation import preserved
from utils.training.batch_inputs import model_inputs

SIDES = ("input", "output")
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that token ids may have."""


class KeyReader:
    """Reads vectors and logits off a causal language model."""

    def __init__(self, model: Any, layer: str | None = None, side: str | None = None) -> None:
        """Choose the layer.

        Args:
            model: A run, a loaded model, an adapter or a module.
            layer: Qualified name; None takes the layer that makes the logits.
            side: ``"input"`` or ``"output"`` of the layer; None takes the input of the default layer and the output of
                a named one.

        Raises:
            ConfigError: No such layer or side, or the model does not predict the next token.
            AdapterError: The model cannot be called, or no layer makes its logits.
        """
        self.adapter = adapter_of(model)
        if self.adapter.failure is not None:
            raise AdapterError(self.adapter.failure)
        if self.adapter.task.value != "causal_lm":
            raise ConfigError(
                f"{self.adapter.name} is no causal language model but for {self.adapter.task.value} "
                f"({self.adapter.task.reason}).",
                "Expected a model that predicts the next token.",
                "Use a model of another kind with LongTermMemory, by its representations.",
            )
        if side is not None:
            one_of(side, "The side", SIDES, "Choose one of them, or leave it out.")
        if layer is None:
            self.layer, natural, self.reason = default_layer(self.adapter)
        else:
            self.layer, natural, self.reason = layer, "output", f"`{layer}` was asked for"
        self.side = side or natural
        layer_named(self.adapter.module, self.layer)

    @contextmanager
    def reading(self) -> Iterator["Reading"]:
        """Hook the layer while the block runs; the model is in eval mode and comes back as it was."""
        place = self.layer, self.side
        with preserved(self.adapter.module, 0, "keys"), torch.no_grad(), captured(self.adapter.module, [place]) as held:
            self.adapter.module.eval()
            yield Reading(self, held)


class Reading:
    """A model whose layer is hooked."""

    def __init__(self, reader: KeyReader, held: dict[Place, Tensor]) -> None:
        self._reader, self._held = reader, held

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run a batch.

        Args:
            ids: Token ids, int64 ``(batch, length)``.

        Returns:
            The vectors ``(batch, length, width)``, float32, and the logits ``(batch, length, vocabulary)``, float32.

        Raises:
            AdapterError: The layer makes no vector for every position.
        """
        adapter = self._reader.adapter
        self._held.clear()
        logits = adapter.logits(model_inputs(adapter, {"input_ids": ids.to(adapter.device)}))
        return self.held_vectors(*ids.shape), logits.float()

    def held_vectors(self, batch: int = 1, length: int | None = None) -> Tensor:
        """Return what the layer's last call gave, ``(batch, length, width)``.

        Args:
            batch: Texts in that call.
            length: Tokens in each; None for any number.

        Raises:
            AdapterError: It was not called, or gave no vector for every position.
        """
        layer, side = self._reader.layer, self._reader.side
        vectors = self._held.get((layer, side))
        if vectors is not None and vectors.dim() == 2 and len(vectors) % batch == 0:
            vectors = vectors.unflatten(0, (batch, -1))
        if vectors is not None and vectors.dim() == 3 and len(vectors) != batch == vectors.shape[1]:
            # Recurrent layers put positions before samples.
            vectors = vectors.transpose(0, 1)
        fits = vectors is not None and vectors.dim() == 3 and vectors.is_floating_point() and len(vectors) == batch
        if vectors is None or not fits or length not in (None, vectors.shape[1]):
            shape = "was not called" if vectors is None else f"has the shape {tuple(vectors.shape)}"
            raise AdapterError(
                f"The {side} of `{layer}` {shape} for {batch} texts of {length or 'some'} tokens.",
                "Expected a vector for every token: (texts, tokens, features).",
                "Name another layer, such as one of the model's blocks.",
            )
        return vectors.detach().float()


def adapter_of(model: Any) -> ModelAdapter:
    """Return the adapter of a run, a loaded model, an adapter or a module."""
    held = getattr(model, "adapter", None)
    if isinstance(held, ModelAdapter):
        return held
    return model if isinstance(model, ModelAdapter) else ModelAdapter(model)


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """Return the tokenizer given, else that of a run, else None."""
    return tokenizer if tokenizer is not None else getattr(getattr(model, "data", None), "tokenizer", None)


def check_tokenizer(tokenizer: Any, *methods: str) -> None:
    """Check that a tokenizer, where there is one, can do what it is asked for.

    Args:
        tokenizer: What was given; None passes.
        methods: Names of what it must be able to do.

    Raises:
        ConfigError: It cannot.
    """
    given = tokenizer is not None
    # Texts have a method `encode` too.
    text = isinstance(tokenizer, (str, bytes))
    missing = [name for name in methods if given and (text or not callable(getattr(tokenizer, name, None)))]
    if missing:
        raise ConfigError(
            f"The tokenizer is {described(tokenizer)}, without {', '.join(f'`{name}`' for name in missing)}.",
            "Expected a TextTokenizer of utils.tokenization.",
            "Give the one that made the ids, such as run.data.tokenizer, or None.",
        )


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Return the SHA-256 of a tokenizer's file; None without a tokenizer.

    Raises:
        ConfigError: It is no tokenizer.
    """
    check_tokenizer(tokenizer, "to_json")
    return None if tokenizer is None else sha256_bytes(tokenizer.to_json().encode("utf-8"))


def checked_windows(adapter: ModelAdapter, ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return token ids and what follows each, both int64 ``(n, length)`` on the CPU.

    Args:
        adapter: The model.
        ids: Token ids ``(n, length)``.
        labels: The token after each, `IGNORED` where it counts for nothing, as `pack_causal` returns them; None takes
            the next token of the same row, and nothing for the last.

    Raises:
        DataError: Shapes, types or ids that do not fit, or nothing to predict.
    """
    for name, tensor in (("ids", ids), ("labels", labels)):
        if name == "labels" and tensor is None:
            continue
        fits = isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.numel() and tensor.dtype in WHOLE
        if not fits:
            raise DataError(
                f"The {name} are {described(tensor)}.",
                "Expected whole numbers of shape (texts, tokens), at least one, as a tensor.",
                "Give token ids, such as the windows that pack_causal makes.",
            )
    ids = ids.detach().cpu().long()
    if labels is None:
        labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)), 1)
    labels = labels.detach().cpu().long()
    if labels.shape != ids.shape:
        raise DataError(
            f"There are ids of shape {tuple(ids.shape)} and labels of shape {tuple(labels.shape)}.",
            "Expected one label for each id.",
            "Give labels as pack_causal returns them, or none.",
        )
    limit = adapter.max_length.value
    if limit is not None and ids.shape[1] > limit:
        raise DataError(
            f"The windows are {ids.shape[1]} tokens long.",
            f"Expected at most {limit}, which {adapter.name} reads at once.",
            "Pack the text into shorter windows.",
        )
    known = adapter.readable_ids()
    real = labels[labels != IGNORED]
    wrong = [*ids[(ids < 0) | (ids >= known)].tolist()[:1], *real[(real < 0) | (real >= known)].tolist()[:1]]
    if wrong:
        raise DataError(
            f"A token id is {wrong[0]}.", f"Expected ids from 0 to {known - 1}.", "Use the model's own tokenizer."
        )
    if not len(real):
        raise DataError(
            "No token has one after it to be remembered or predicted.",
            "Expected texts of two tokens at least.",
            "Give longer windows, or labels.",
        )
    return ids, labels
