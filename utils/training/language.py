"""Text for language models: split, tokenized, packed into windows; large corpora by way of a file of token ids."""

import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils.runtime.errors import DataError
from utils.runtime.progress import progress_bar
from utils.runtime.resources import format_bytes
from utils.tokenization import TextTokenizer, pack_causal, pack_masked
from utils.training.corpora import without_duplicates
from utils.training.data_report import DataReport, describe_lengths, find_overlap
from utils.training.needs import Needs
from utils.training.prepared_data import PreparedData, TokenFile
from utils.training.splitting import is_held_out, split_documents
from utils.training.text_samples import unknown_share

SAMPLE_FOR_TOKENIZER = 50_000_000
"""Bytes of a large corpus that its tokenizer is trained on: the first ones."""
MOST_HELD_OUT = 20_000_000
"""Bytes of a large corpus that are measured on at most."""
AT_ONCE = 4_000_000
"""Bytes of text that are tokenized together."""
SPARE = 500_000_000
SHOWN_FROM = 1_000_000_000
"""Bytes of text from which a progress bar shows how far the tokenizing is."""


def prepare_language(
    texts: Sequence[str],
    needs: Needs,
    reference: str,
    held_out: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> PreparedData:
    """Split, tokenize and pack text that fits into memory.

    Args:
        texts: The documents.
        needs: What the model needs.
        reference: Where the data is from.
        held_out: Documents to measure on; None to hold some of `texts` out.
        notes: What was decided before, for the report.

    Raises:
        DataError: There is too little text for one window on each side.
    """
    unique = without_duplicates(texts)
    duplicates = len(texts) - len(unique)
    length = needs.length
    if held_out is None:
        train_texts, held_texts = split_documents(unique, needs.share_of_text, length, needs.seed)
    else:
        train_texts, held_texts = unique, without_duplicates(held_out)
    tokenizer = needs.tokenizer_for(train_texts)
    encoded = [tokenizer.encode(side) for side in (train_texts, held_texts)]
    train, train_tokens = pack_documents(tokenizer, encoded[0], needs.task, length)
    validation, validation_tokens = pack_documents(tokenizer, encoded[1], needs.task, length)
    facts = language_facts(
        reference, tokenizer, train_texts, held_texts, encoded[1], (train_tokens, validation_tokens), length
    )
    facts |= {"documents": len(unique) if held_out is None else facts["documents"], "duplicates_removed": duplicates}
    lengths = [len(document) for side in encoded for document in side]
    report = DataReport(
        "documents", len(train_texts), len(held_texts), duplicates, 0, describe_lengths(lengths), 0, 0.0,
        unknown_share(tokenizer, [*encoded[0], *encoded[1]]), find_overlap(train_texts, held_texts), notes=list(notes),
    )  # fmt: skip
    return PreparedData(reference, needs.task, train, validation, tokenizer, {**facts, "report": report.to_dict()})


def prepare_large(
    documents: Callable[[], Iterator[str]], size: int, needs: Needs, reference: str, folder: Path | None = None
) -> PreparedData:
    """Tokenize text that does not fit into memory into a file of ids, document by document.

    The tokenizer is trained on the first `SAMPLE_FOR_TOKENIZER` bytes; at most `MOST_HELD_OUT` bytes are held out.
    Repetitions are not looked for. The last tokens that fill no window are left out.

    Args:
        documents: Starts reading the documents.
        size: Bytes of text, about.
        needs: What the model needs.
        reference: Where the data is from.
        folder: Where the file of ids is kept until the data is saved; by default the system's place for temporary
            files.

    Raises:
        DataError: The disk is too small, or the text is too short after all.
    """
    length, share = needs.length, min(needs.share_of_text, MOST_HELD_OUT / size)
    tokenizer = train_tokenizer(documents(), needs, share)
    kind = "<u2" if needs.vocabulary <= 1 << 16 else "<i4"
    place = tempfile.TemporaryDirectory(prefix="seedbed-tokens-", dir=folder)
    wanted = size * np.dtype(kind).itemsize
    free = shutil.disk_usage(place.name).free - SPARE
    if wanted // 2 > free:
        raise DataError(
            f"{reference} holds {format_bytes(size)} of text, whose token ids take up to {format_bytes(wanted)}.",
            f"The disk of {Path(place.name).parent} has {format_bytes(max(0, free))} to spare.",
            "Free some space, set TMPDIR to a larger disk, or read while training with ?stream=true",
        )
    path = Path(place.name) / "tokens.bin"
    held: list[str] = []
    lengths: list[int] = []
    count, train_bytes, unknown = 1, 0, 0.0
    end = tokenizer.eos_id
    assert end is not None, "every tokenizer made by choose_tokenizer has one"
    shown = size > SHOWN_FROM
    with open(path, "wb") as stream, progress_bar(size, f"Tokenizing {reference}", shown) as bar:
        stream.write(np.array([end], dtype=kind).tobytes())
        for group in _groups(documents()):
            kept: list[str] = []
            for text in group:
                (held if is_held_out(text, share, needs.seed) else kept).append(text)
            encoded = tokenizer.encode(kept)
            for ids in encoded:
                stream.write(np.append(ids, end).astype(kind).tobytes())
                count += len(ids) + 1
            lengths += [len(ids) for ids in encoded]
            unknown += unknown_share(tokenizer, encoded) * sum(map(len, encoded))
            train_bytes += sum(len(text.encode("utf-8")) + 1 for text in kept)
            bar.update(sum(len(text.encode("utf-8")) for text in group))
    held_ids = tokenizer.encode(held)
    validation, validation_tokens = pack_documents(tokenizer, held_ids, needs.task, length)
    _check_size(reference, count - 1, validation_tokens, length)
    tokens = TokenFile(path, kind, count, length, needs.task == "causal_lm", place)
    facts: dict[str, Any] = {
        "documents": len(lengths) + len(held),
        "duplicates_removed": 0,
        "train_documents": len(lengths),
        "validation_documents": len(held),
        "length": length,
        "train_tokens": count - 1,
        "validation_tokens": validation_tokens,
        "train_bytes": train_bytes,
        **_baseline(held),
        "validation_unknown": unknown_share(tokenizer, held_ids),
    }
    report = DataReport(
        "documents", len(lengths), len(held), 0, 0, describe_lengths(lengths), 0, 0.0, unknown / max(1, count),
        notes=[
            "a large corpus, read block by block: repetitions and overlap were not looked for, and the tokenizer was "
            f"trained on the first {format_bytes(min(size, SAMPLE_FOR_TOKENIZER))}"
        ],
    )  # fmt: skip
    return PreparedData(
        reference,
        needs.task,
        tokens.windows(),
        validation,
        tokenizer,
        {**facts, "report": report.to_dict()},
        None,
        tokens,
    )


def language_facts(
    reference: str,
    tokenizer: TextTokenizer,
    train: Sequence[str],
    held: Sequence[str],
    held_ids: Sequence[np.ndarray],
    tokens: tuple[int, int],
    length: int,
) -> dict[str, Any]:
    """Return counts, sizes and the baseline of some text.

    Args:
        reference: Where it is from, for the message.
        tokenizer: Its tokenizer.
        train: Training documents.
        held: Held-out documents.
        held_ids: Their token ids.
        tokens: Tokens to predict on both sides.
        length: Tokens in a window.

    Raises:
        DataError: One side fills no window.
    """
    _check_size(reference, *tokens, length)
    return {
        "documents": len(train) + len(held),
        "duplicates_removed": 0,
        "train_documents": len(train),
        "validation_documents": len(held),
        "length": length,
        "train_tokens": tokens[0],
        "validation_tokens": tokens[1],
        "train_bytes": sum(len(text.encode("utf-8")) + 1 for text in train) - 1,
        **_baseline(held),
        "validation_unknown": unknown_share(tokenizer, held_ids),
    }


def train_tokenizer(documents: Iterable[str], needs: Needs, share: float) -> TextTokenizer:
    """Choose a tokenizer by the first documents, those held out aside."""
    sample, read = [], 0
    for text in documents:
        if is_held_out(text, share, needs.seed):
            continue
        sample.append(text)
        read += len(text)
        if read >= SAMPLE_FOR_TOKENIZER:
            break
    if not sample:
        raise DataError("No document is left to train on.", "Expected more than one document.", "Use more data.")
    return needs.tokenizer_for(sample)


def _groups(documents: Iterator[str]) -> Iterator[list[str]]:
    """Collect documents into groups of bounded size."""
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size > AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def pack_documents(
    tokenizer: TextTokenizer, encoded: Sequence[np.ndarray], task: str, length: int
) -> tuple[dict[str, Tensor], int]:
    """Return the windows of some documents and the number of tokens in them that can be predicted."""
    eos = tokenizer.eos_id
    assert eos is not None, "every tokenizer made by choose_tokenizer has one"
    pack = pack_causal if task == "causal_lm" else pack_masked
    inputs, labels = pack(encoded, length, eos, tokenizer.pad_id)
    return {"input_ids": inputs, "labels": labels}, int((labels >= 0).sum())


def _baseline(held: Sequence[str]) -> dict[str, Any]:
    """Return the size of the held-out text and what zlib makes of it."""
    blob = "\n".join(held).encode("utf-8")
    return {
        "validation_bytes": len(blob),
        "zlib_bits_per_byte": 8 * len(zlib.compress(blob, 9)) / max(1, len(blob)),
    }


def _check_size(reference: str, train: int, validation: int, length: int) -> None:
    if min(train, validation) < length:
        raise DataError(
            f"{reference} is too small: it gives {train} tokens to train on and {validation} held out.",
            f"Each side needs at least one window of {length} tokens.",
            "Use a longer text, or a shorter sequence length.",
        )
