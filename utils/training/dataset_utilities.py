"""From a data reference to samples that fit a model: split, tokenize, pack.

Whole documents are held out, chosen by the hash of their text, so that a document hardly ever changes sides when the
rest of the data changes. The tokenizer is trained on the training side only.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError, DataError
from utils.tokenization import TextTokenizer, choose_tokenizer, pack_causal, pack_masked
from utils.training.config import TrainingConfig
from utils.training.corpora import (
    IMAGE_BUILTINS,
    TEXT_BUILTINS,
    describe_references,
    load_digits,
    load_texts,
    without_duplicates,
)
from utils.training.prepared_data import PreparedData, load_prepared

__all__ = ["PreparedData", "load_data", "load_prepared", "prepare_data"]

TEXT_TASKS = ("causal_lm", "masked_lm")
IMAGE_TASKS = ("image_classification",)
DEFAULT_LENGTH = 256
"""Longest window unless the user says otherwise; the whole length of models that read less."""
SHORTEST_LENGTH = 8
DIGIT_CLASSES = 10


def load_data(
    reference: object,
    *,
    task: str,
    vocab_size: int | None = None,
    max_length: int | None = None,
    num_labels: int | None = None,
    image_shape: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    validation_share: float | None = None,
) -> PreparedData:
    """Load data and prepare it for a model.

    Args:
        reference: ``builtin:python-docs``, ``builtin:python-code``, ``builtin:digits`` or ``file:PATH``.
        task: The model's task; it must fit the data.
        vocab_size: Number of token ids the model knows; needed for text.
        max_length: Tokens in a window; 256 when the model has no limit.
        num_labels: Number of classes the model tells apart; needed for images.
        image_shape: Channels, height and width the model takes; (1, 8, 8) when unknown.
        pad_token_id: The id the model keeps for padding.
        seed: Chooses what is held out.
        validation_share: Share held out; 0.05 of a text and 0.2 of the images by default.

    Raises:
        DataError: The reference is not available, does not fit the task, or its data does not fit the model.
    """
    if not isinstance(reference, str):
        raise DataError(
            f"Data given as {type(reference).__module__}.{type(reference).__qualname__} is not available.",
            describe_references(),
        )
    if validation_share is not None and not 0 < validation_share < 1:
        raise DataError(
            f"The validation share is {validation_share}.", "Expected a number between 0 and 1, such as 0.05."
        )
    if reference in IMAGE_BUILTINS:
        _check_task(reference, "images with class labels", task, IMAGE_TASKS, TEXT_BUILTINS[0])
        data = _prepare_digits(reference, task, num_labels, image_shape, seed, validation_share or 0.2)
    elif reference in TEXT_BUILTINS or reference.startswith("file:"):
        _check_task(reference, "plain text", task, TEXT_TASKS, IMAGE_BUILTINS[0])
        length = _check_length(max_length)
        if vocab_size is None:
            raise DataError(
                "The model's vocabulary size is unknown.",
                "A tokenizer of exactly that size is trained on the text.",
                "Say it with ModelSpec(vocab_size=...).",
            )
        data = _prepare_text(reference, task, vocab_size, length, pad_token_id, seed, validation_share or 0.05)
    else:
        raise DataError(f"The data reference {reference!r} is not available.", describe_references())
    return replace(data, facts={**data.facts, "seed": seed, "sha256": data.fingerprint()})


def prepare_data(model: Any, reference: object, config: TrainingConfig | None = None) -> PreparedData:
    """Load data in the form that fits a model and its training settings.

    Args:
        model: A loaded model, an adapter or a module.
        reference: See `load_data`.
        config: Says the context length, the seed and the share that is held out.

    Raises:
        ConfigError: The context is longer than the model can read.
        DataError: See `load_data`.
    """
    adapter = model if isinstance(model, ModelAdapter) else ModelAdapter(model)
    config = config or TrainingConfig()
    limit = adapter.max_length.value
    if config.context_length is not None and limit is not None and config.context_length > limit:
        raise ConfigError(
            f"TrainingConfig.context_length is {config.context_length}, and the model takes at most {limit} tokens "
            f"({adapter.max_length.reason}).",
            "Expected a context that the model can read.",
            f"Set context_length to {limit} or less.",
        )
    return load_data(
        reference,
        task=adapter.task.value,
        vocab_size=adapter.vocab_size.value,
        max_length=config.context_length or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH),
        num_labels=adapter.num_labels.value,
        image_shape=adapter.image_shape.value,
        pad_token_id=adapter.pad_token_id.value,
        seed=config.seed,
        validation_share=config.validation_share,
    )


def _check_task(reference: str, content: str, task: str, possible: tuple[str, ...], other: str) -> None:
    if task in possible:
        return
    if task in (*TEXT_TASKS, *IMAGE_TASKS):
        action = f"Use {other} for this model."
    else:
        action = f"Data for {task} is not available in this version; {describe_references()}"
    raise DataError(
        f"{reference} holds {content}, and the model's task is {task}.",
        f"This data fits {' and '.join(possible)}.",
        action + " If the task was detected wrongly, say ModelSpec(task=...).",
    )


def _check_length(max_length: int | None) -> int:
    length = DEFAULT_LENGTH if max_length is None else max_length
    if length < SHORTEST_LENGTH:
        raise DataError(
            f"The model's context is {length} tokens.",
            f"Text needs windows of at least {SHORTEST_LENGTH}.",
            "Build the model with a longer context.",
        )
    return length


def _prepare_text(
    reference: str, task: str, vocab_size: int, length: int, pad_token_id: int | None, seed: int, share: float
) -> PreparedData:
    """Split, tokenize and pack text."""
    documents = load_texts(reference)
    unique = without_duplicates(documents)
    train_texts, held_out = split_documents(unique, share, length, seed)
    tokenizer = choose_tokenizer(train_texts, vocab_size, task, pad_token_id)
    train, train_tokens = _pack(tokenizer, train_texts, task, length)
    validation, validation_tokens = _pack(tokenizer, held_out, task, length)
    if min(train_tokens, validation_tokens) < length:
        raise DataError(
            f"{reference} is too small: it gives {train_tokens} tokens to train on and {validation_tokens} held out.",
            f"Each side needs at least one window of {length} tokens.",
            "Use a longer text, or a shorter sequence length.",
        )
    blob = "\n".join(held_out).encode("utf-8")
    facts: dict[str, Any] = {
        "documents": len(unique),
        "duplicates_removed": len(documents) - len(unique),
        "train_documents": len(train_texts),
        "validation_documents": len(held_out),
        "length": length,
        "train_tokens": train_tokens,
        "validation_tokens": validation_tokens,
        "train_bytes": sum(len(text.encode("utf-8")) + 1 for text in train_texts) - 1,
        "validation_bytes": len(blob),
        "zlib_bits_per_byte": 8 * len(zlib.compress(blob, 9)) / len(blob),
    }
    return PreparedData(reference, task, train, validation, tokenizer, facts)


def _pack(tokenizer: TextTokenizer, texts: list[str], task: str, length: int) -> tuple[dict[str, Tensor], int]:
    """Return the windows of some documents and the number of tokens in them that can be predicted."""
    eos = tokenizer.eos_id
    assert eos is not None, "every tokenizer made by choose_tokenizer has one"
    pack = pack_causal if task == "causal_lm" else pack_masked
    inputs, labels = pack(tokenizer.encode(texts), length, eos, tokenizer.pad_id)
    return {"input_ids": inputs, "labels": labels}, int((labels >= 0).sum())


def split_documents(texts: list[str], share: float, length: int, seed: int) -> tuple[list[str], list[str]]:
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
    for index in sorted(range(len(texts)), key=lambda i: _hash(seed, texts[i].encode("utf-8"))):
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


def _boundary(text: str, position: int) -> int:
    """Return the paragraph, line or word boundary at or before a position, or the position when none is near."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, max(0, position * 9 // 10), position)
        if found > 0:
            return found + len(mark)
    return max(1, position)


def _hash(seed: int, content: bytes) -> bytes:
    """Return a number for a sample that depends on the seed and its content alone."""
    return hashlib.blake2b(content, digest_size=16, key=str(seed).encode()).digest()


def _prepare_digits(
    reference: str, task: str, num_labels: int | None, image_shape: Sequence[int] | None, seed: int, share: float
) -> PreparedData:
    """Resize, normalise and split the digits, the same share of every class held out."""
    if num_labels is not None and num_labels < DIGIT_CLASSES:
        raise DataError(
            f"{reference} has labels 0 to {DIGIT_CLASSES - 1}, and the model tells {num_labels} classes apart.",
            f"Expected a model with at least {DIGIT_CLASSES} outputs.",
            f"Build it with num_classes={DIGIT_CLASSES}.",
        )
    shape = (1, 8, 8) if image_shape is None else tuple(image_shape)
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise DataError(f"The model's image shape is {shape}.", "Expected channels, height and width.")
    images, labels = load_digits()
    validation = np.zeros(len(labels), dtype=bool)
    for label in range(DIGIT_CLASSES):
        members = np.flatnonzero(labels == label)
        order = sorted(members, key=lambda index: _hash(seed, images[index].tobytes()))
        validation[order[: max(1, round(share * len(members)))]] = True
    resized = _resize(torch.from_numpy(images)[:, None], shape[1:])
    train_mask = torch.from_numpy(~validation)
    mean, deviation = float(resized[train_mask].mean()), float(resized[train_mask].std())
    pixels = ((resized - mean) / deviation).expand(-1, shape[0], -1, -1)
    targets = torch.from_numpy(labels)
    parts = [{"pixel_values": pixels[mask].contiguous(), "labels": targets[mask]} for mask in (train_mask, ~train_mask)]
    facts = {
        "samples": len(labels),
        "classes": DIGIT_CLASSES,
        "largest_class": float(parts[1]["labels"].bincount().max() / len(parts[1]["labels"])),
        "image_shape": list(shape),
        "mean": mean,
        "deviation": deviation,
    }
    return PreparedData(reference, task, parts[0], parts[1], None, facts)


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize images (samples, 1, height, width): averaged where they shrink, interpolated where they grow."""
    if size == tuple(images.shape[2:]):
        return images
    if size[0] <= images.shape[2] and size[1] <= images.shape[3]:
        return torch.nn.functional.interpolate(images, size=size, mode="area")
    return torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
