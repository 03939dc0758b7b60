"""Text that is read, tokenized and packed while the model trains on it; nothing but what is measured on is kept.

Unusual: the position is exact, and small. Windows are made in blocks; the state is where the block began (documents
read, tokens left over) and how many of its windows were handed out. A resumed stream makes the block again from there,
in the same order, and goes on behind the last window that was trained on. Whether a document is held out depends on its
content and the seed alone, so that no document that is measured on is ever trained on.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runtime.errors import DataError
from utils.runtime.seeding import derive_seed
from utils.training.augmentation import Augmentation
from utils.training.config import TrainingConfig
from utils.training.data_report import DataReport, describe_lengths
from utils.training.hub_data import hub_documents
from utils.training.language import language_facts, pack_documents, train_tokenizer
from utils.training.needs import Needs
from utils.training.prepared_data import PreparedData
from utils.training.splitting import is_held_out
from utils.training.stream import SampleStream
from utils.training.text_files import BLOCK, documents, find_files
from utils.training.text_samples import unknown_share

WINDOWS = 1024
"""Windows in a block; they are shuffled among themselves."""
TOGETHER = 256
"""Documents that are tokenized together at most."""
AT_ONCE = 1_000_000
"""Characters that are tokenized together, about."""
LOOKED_AT = 20_000_000
"""Characters at the start of a stream from which its tokenizer and its held-out documents come."""
MOST_HELD_OUT = 1_000_000
"""Characters that are measured on at most."""
KEPT = 256
"""Windows from the start of a stream that stand for it where samples are looked at."""


@dataclass(frozen=True)
class Cursor:
    """A place in a stream."""

    passes: int
    """How often the end was reached."""
    documents: int
    """Documents of this pass that were read before the block began, held-out ones included."""
    leftover: np.ndarray
    """Tokens that were read before the block began and are not in an earlier one."""
    block: int = 0
    """Number of the block."""
    offset: int = 0
    """Windows of the block that were handed out."""


class TextStream(SampleStream):
    """Batches of windows of a text that is read while the model trains."""

    sequential = True

    def __init__(
        self,
        source: Mapping[str, Any],
        data: PreparedData,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Start at the beginning.

        Args:
            source: How to read the text, as `describe_source` tells it.
            data: Its tokenizer, its first windows and what is held out.
            batch_size: Samples in a batch of one process.
            seed: Decides the order inside blocks.
            rank: Number of this process among those that share the stream; each takes its own part of every batch.
            world: How many share it; each reads all of it.
        """
        super().__init__(data.train, batch_size, seed, rank, world)
        assert data.tokenizer is not None
        assert data.tokenizer.eos_id is not None
        self.source, self.tokenizer, self.end = source, data.tokenizer, data.tokenizer.eos_id
        self.length, self.shifted = int(data.facts["length"]), data.task == "causal_lm"
        self.cursor = Cursor(0, 0, np.array([self.end], dtype=np.int32))
        self._made: deque[Cursor] = deque()
        self._reader: tuple[tuple[int, int], Iterator[str]] | None = None

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the next `count` batches; `advance` says when one has been trained on."""
        cursor, block = self.cursor, None
        self._made.clear()
        for _ in range(count):
            pieces: list[Tensor] = []
            missing = self.batch_size * self.world
            while missing:
                if block is None:
                    block, following = self._read_block(cursor)
                piece = block[:, cursor.offset : cursor.offset + missing]
                pieces.append(piece)
                missing -= piece.shape[1]
                cursor = replace(cursor, offset=cursor.offset + piece.shape[1])
                if cursor.offset == block.shape[1]:
                    cursor, block = following, None
            rows = torch.cat(pieces, 1)[:, self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            self._made.append(cursor)
            yield {"input_ids": rows[0], "labels": rows[1]}

    def batch_at(self, position: int) -> dict[str, Tensor]:
        """A stream has no batches by number.

        Raises:
            DataError: Always.
        """
        raise DataError("A stream is read in its order.", "Expected to read it from start to end.", "Set workers=0.")

    def advance(self) -> None:
        """Count one batch as trained on, by every process."""
        super().advance()
        self.cursor = self._made.popleft()

    @property
    def passes(self) -> float:
        """How often the end was reached."""
        return float(self.cursor.passes)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: documents read and tokens left over where the block began, windows since."""
        cursor = self.cursor
        return {
            **super().state_dict(),
            "passes": cursor.passes,
            "documents": cursor.documents,
            "leftover": torch.from_numpy(cursor.leftover.copy()),
            "block": cursor.block,
            "offset": cursor.offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        super().load_state_dict(state)
        leftover = state["leftover"].numpy().astype(np.int32)
        self.cursor = Cursor(state["passes"], state["documents"], leftover, state["block"], state["offset"])
        self._made.clear()
        self._reader = None

    def _read_block(self, cursor: Cursor) -> tuple[Tensor, Cursor]:
        """Return a block of windows, inputs and labels ``(2, windows, length)``, and where the next one begins."""
        wanted = WINDOWS * self.length + self.shifted
        parts, have = [cursor.leftover], len(cursor.leftover)
        passes, read, found = cursor.passes, cursor.documents, True
        while have < wanted:
            group = self._take(passes, read)
            if not group:
                if not found and read == 0:
                    raise _exhausted(self.source)
                passes, read, found = passes + 1, 0, False
                continue
            read += len(group)
            share, seed = float(self.source["share"]), int(self.source["seed"])
            kept = [text for text in group if text.strip() and not is_held_out(text, share, seed)]
            for ids in self.tokenizer.encode(kept):
                parts += [ids, np.array([self.end], dtype=np.int32)]
                have += len(ids) + 1
                found = True
            if not found and passes > cursor.passes + 1:
                raise _exhausted(self.source)
        tokens = np.concatenate(parts)
        size = WINDOWS * self.length
        inputs, labels = tokens[:size], tokens[self.shifted : size + self.shifted]
        block = torch.from_numpy(np.stack([inputs, labels]).astype(np.int64)).view(2, WINDOWS, self.length)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "stream", cursor.block))
        following = Cursor(passes, read, tokens[size:].copy(), cursor.block + 1)
        return block[:, torch.randperm(WINDOWS, generator=generator)], following

    def _take(self, passes: int, start: int) -> list[str]:
        """Return the next documents of a pass; empty at its end."""
        if self._reader is None or self._reader[0] != (passes, start):
            self._reader = ((passes, start), read_documents(self.source, start))
        reader, group, size = self._reader[1], [], 0
        for text in islice(reader, TOGETHER):
            group.append(text)
            size += len(text)
            if size > AT_ONCE:
                break
        self._reader = ((passes, start + len(group)), reader)
        return group


def describe_source(
    kind: str, name: str, needs: Needs, columns: Mapping[str, str], split: str | None = None
) -> dict[str, Any]:
    """Return how to read a text again, as plain values.

    Args:
        kind: ``file`` or ``hub``.
        name: The path, or owner, name and configuration.
        needs: Says what is held out.
        columns: Columns that the user named.
        split: The split of a dataset.
    """
    source: dict[str, Any] = {
        "kind": kind, "name": name, "columns": dict(columns), "seed": needs.seed, "share": needs.share_of_text
    }  # fmt: skip
    if kind == "hub":
        return {**source, "split": split}
    path = Path(name).expanduser().resolve()
    return {**source, "name": str(path), "bytes": find_files(path, f"file:{name}").text_bytes}


def read_documents(source: Mapping[str, Any], start: int = 0) -> Iterator[str]:
    """Yield the documents of a source from a number on.

    Raises:
        DataError: The source is gone or has changed.
    """
    if source["kind"] == "hub":
        return hub_documents(source["name"], source["split"], source["columns"], start)
    path = Path(source["name"])
    files = find_files(path, f"file:{path}")
    if files.text_bytes != source["bytes"]:
        raise DataError(
            f"{path} has {files.text_bytes:,} bytes now, and had {source['bytes']:,} when the run began.",
            "Expected the text as it was: a stream continues by counting documents.",
            "Restore it, or start a new run.",
        )
    return islice(documents(files, source["columns"], BLOCK), start, None)


def prepare_stream(source: Mapping[str, Any], needs: Needs, reference: str) -> PreparedData:
    """Look at the start of a text that is to be read while training: tokenizer, held-out documents, first windows.

    Raises:
        DataError: The start holds too few documents.
    """
    kept, held, read = [], [], 0
    held_size = 0
    for text in read_documents(source):
        read += len(text)
        if not text.strip():
            continue
        if is_held_out(text, float(source["share"]), needs.seed):
            if held_size < MOST_HELD_OUT:
                held.append(text)
                held_size += len(text)
        else:
            kept.append(text)
        if read > LOOKED_AT:
            break
    if len(kept) + len(held) < 2:
        raise DataError(
            f"{reference} holds {'one document' if kept or held else 'no document'}.",
            "Expected at least 2: a stream is split by whole documents.",
            "Leave out ?stream=true.",
        )
    if not kept or not held:
        raise DataError(
            f"The first {read:,} characters of {reference} hold {len(kept)} documents to train on and {len(held)} held "
            "out.",
            "Expected both: a stream is split by whole documents.",
            f"Hold out a {'larger' if kept else 'smaller'} share with TrainingConfig.validation_share, or leave out "
            "?stream=true.",
        )
    tokenizer = train_tokenizer(kept, needs, 0.0)
    encoded = tokenizer.encode(kept)
    length = needs.length
    train, train_tokens = pack_documents(tokenizer, encoded, needs.task, length)
    held_ids = tokenizer.encode(held)
    validation, validation_tokens = pack_documents(tokenizer, held_ids, needs.task, length)
    facts = language_facts(reference, tokenizer, kept, held, held_ids, (train_tokens, validation_tokens), length)
    report = DataReport(
        "documents",
        len(kept),
        len(held),
        lengths=describe_lengths([len(document) for document in encoded]),
        unknown_share=unknown_share(tokenizer, encoded),
        notes=[f"a stream: counted are its first {read:,} characters only, and repetitions were not looked for"],
    )
    return PreparedData(
        reference,
        needs.task,
        {name: tensor[:KEPT].clone() for name, tensor in train.items()},
        validation,
        tokenizer,
        {**facts, "report": report.to_dict()},
        dict(source),
    )


def _exhausted(source: Mapping[str, Any]) -> DataError:
    return DataError(f"{source['name']} holds no document to train on.", "Expected text.", "Check the file.")


def open_stream(data: PreparedData, config: TrainingConfig, rank: int = 0, world: int = 1) -> SampleStream:
    """Return the training batches of some data in their order.

    Args:
        data: The data.
        config: Says the batch size, the seed and whether images are augmented.
        rank: Number of this process among those that train together.
        world: How many there are.

    Raises:
        DataError: Augmentation was asked for, and the samples are no images.
    """
    if config.augment and "pixel_values" not in data.train:
        raise DataError(
            f"TrainingConfig.augment is true, and the samples of {data.reference} are no images.",
            "Expected images, which can be shifted and flipped.",
            "Set augment=False.",
        )
    if data.stream is not None:
        return TextStream(data.stream, data, config.batch_size, config.seed, rank, world)
    return SampleStream(data.train, config.batch_size, config.seed, rank, world, augmentation_of(data, config))


def augmentation_of(data: PreparedData, config: TrainingConfig) -> Augmentation | None:
    """Return how a run's training images are changed; None when they are not."""
    return Augmentation(config.seed, data.facts.get("flips", True)) if config.augment else None
