"""From a data reference to samples that fit a model.

What is read depends on the reference (`references`, `text_files`, `tables`, `hub_data`), what is made of it on the
model's task (`language`, `text_samples`, `images`, `table_samples`, `text_stream`). Samples are held out by the hash of
their content, so that a sample hardly ever changes sides when the rest of the data changes. The tokenizer is trained on
the training side only.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.objectives import REAL_VALUED
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.resources import available_memory, format_bytes
from utils.tokenization import own_tokenizer, public_tokenizer
from utils.training.archives import unpacked
from utils.training.batch_inputs import boundary_facts
from utils.training.config import TrainingConfig
from utils.training.corpora import load_builtin_table, load_texts
from utils.training.data_parts import divide, parts_of, parts_reference, prepare_parts
from utils.training.hub_data import (
    hub_tables,
    is_data_module,
    is_dataset,
    object_name,
    object_tables,
    refuse_data_module,
)
from utils.training.images import prepare_column, prepare_digits, prepare_folder
from utils.training.language import prepare_language, prepare_large
from utils.training.needs import COLUMNS, DEFAULT_LENGTH, LANGUAGE_TASKS, Needs
from utils.training.prepared_data import PreparedData, load_prepared
from utils.training.references import (
    IMAGE_BUILTINS,
    TABLE_BUILTINS,
    TEXT_BUILTINS,
    DataReference,
    describe_references,
    parse_reference,
)
from utils.training.splitting import split_documents
from utils.training.table_samples import prepare_features
from utils.training.tables import Table, choose_column, joined, read_table, texts_of
from utils.training.text_files import Files, class_folders, documents, find_files, read_text
from utils.training.text_samples import prepare_labelled, prepare_pairs
from utils.training.text_stream import describe_source, prepare_stream

__all__ = ["PreparedData", "load_data", "load_prepared", "prepare_data", "split_documents"]

IN_MEMORY = 256_000_000
"""Largest text, in bytes, that is prepared in memory; larger ones go through a file of token ids."""
MEMORY_PER_BYTE = 20
"""Bytes of memory that a byte of a text, or of a table, takes while it is prepared."""
TOKENS = ("input_ids", "decoder_input_ids")
"""Entries that hold token ids."""
ROW_TASKS = ("seq2seq", "text_classification", "image_classification", "tabular_classification", "regression")


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
    features: int | None = None,
) -> PreparedData:
    """Load data and prepare it for a model that is described by a few numbers.

    Args:
        reference: ``builtin:NAME``, ``file:PATH``, ``hub:owner/name[/config]``, each with ``?column=name`` options, or
            a ``datasets.Dataset``; or a list of these, or a dict from names to them, which are joined as parts.
        task: The model's task; it must fit the data.
        vocab_size: Number of token ids the model knows; needed for text.
        max_length: Tokens in a window; 256 when the model has no limit.
        num_labels: Number of classes the model tells apart.
        image_shape: Channels, height and width the model takes.
        pad_token_id: The id the model keeps for padding.
        seed: Chooses what is held out.
        validation_share: Share held out; 0.05 of a text and 0.2 of labelled samples by default.
        features: Numbers in a row, for models of tables.

    Raises:
        DataError: The reference is not available, does not fit the task, or its data does not fit the model.
    """
    needs = Needs(
        task,
        vocab_size,
        max_length,
        num_labels,
        image_shape,
        features,
        pad_token_id,
        seed=seed,
        share=validation_share,
    )
    return load_for(reference, needs)


def load_for(reference: object, needs: Needs) -> PreparedData:
    """Load data and prepare it for what a model needs.

    Raises:
        DataError: See `load_data`.
    """
    if needs.share is not None and not 0 < needs.share < 1:
        raise DataError(
            f"The validation share is {needs.share}.",
            "Expected a number between 0 and 1, such as 0.05: without held-out data nothing could be measured.",
        )
    named = None if is_dataset(reference) else parts_of(reference)
    if named is None:
        data = _load_one(reference, needs)
    else:
        data = prepare_parts(named, needs, reference_of(reference), _load_one)
    return replace(data, facts={**data.facts, "seed": needs.seed, "sha256": data.fingerprint()})


def _load_one(reference: object, needs: Needs) -> PreparedData:
    """Load what one reference names, or one dataset."""
    if is_data_module(reference):
        raise refuse_data_module(reference)
    if is_dataset(reference):
        return _from_tables(*object_tables(reference), {}, needs, object_name(reference))
    if isinstance(reference, str):
        parsed = parse_reference(reference)
        _check_columns(parsed, needs)
        return _by_column(parsed, needs) if "task" in parsed.options else _from_reference(parsed, needs)
    raise DataError(
        f"Data given as {type(reference).__module__}.{type(reference).__qualname__} is not available.",
        describe_references(),
    )


def prepare_data(model: Any, reference: object, config: TrainingConfig | None = None) -> PreparedData:
    """Load data in the form that fits a model and its training settings.

    Args:
        model: A loaded model, an adapter or a module.
        reference: See `load_data`; or prepared data, which may have been prepared for another model: what this one does
            with it is found out anew.
        config: Says the context length, the seed and the share that is held out.

    Raises:
        ConfigError: The context is longer than the model can read, or a setting does not go with the data.
        DataError: See `load_data`; or prepared data holds ids or classes that the model does not know.

    Warns:
        UserWarning: A setting has no effect on this data, or a batch is larger than the data.
    """
    adapter = model if isinstance(model, ModelAdapter) else ModelAdapter(model)
    config = config or TrainingConfig()
    if isinstance(reference, PreparedData):
        _check_ids(adapter, reference)
        _check_settings(reference, config)
        return replace(reference, facts={**reference.facts, **boundary_facts(adapter, reference)})
    limit = adapter.max_length.value
    if config.context_length is not None and limit is not None and config.context_length > limit:
        raise ConfigError(
            f"TrainingConfig.context_length is {config.context_length}, and the model takes at most {limit} tokens "
            f"({adapter.max_length.reason}).",
            "Expected a context that the model can read.",
            f"Set context_length to {limit} or less.",
        )
    data = load_for(reference, needs_of(adapter, config))
    _check_settings(data, config)
    return replace(data, facts={**data.facts, **boundary_facts(adapter, data)})


def _check_settings(data: PreparedData, config: TrainingConfig) -> None:
    """Refuse settings that contradict some data, and tell of those that do nothing."""
    if data.stream is not None and config.max_steps is None:
        raise ConfigError(
            f"TrainingConfig.max_epochs is {config.max_epochs}, and {data.reference} is read while training.",
            "Expected a number of steps: nobody knows how long a stream is.",
            "Set max_steps, and max_epochs=None.",
        )
    if config.label_smoothing and data.task in REAL_VALUED:
        raise ConfigError(
            f"TrainingConfig.label_smoothing is {config.label_smoothing}, and the labels of {data.reference} are "
            "numbers.",
            "Expected classes or tokens: of a number no share can be spread over others.",
            "Set label_smoothing=0.0.",
        )
    if data.stream is not None and config.workers:
        warnings.warn(
            f"TrainingConfig.workers is {config.workers}, and {data.reference} is read in its order, by the training "
            "process alone: no worker is started.",
            stacklevel=3,
        )
    size = config.batch_size
    if data.stream is None and isinstance(size, int) and size > data.train_samples:
        warnings.warn(
            f"TrainingConfig.batch_size is {size}, and {data.reference} has {data.train_samples} samples "
            "to train on: each batch holds samples more than once.",
            stacklevel=3,
        )


def _check_ids(adapter: ModelAdapter, data: PreparedData) -> None:
    """Refuse data with ids or classes that a model has no place for."""
    known, classes, tokenizer = adapter.vocab_size.value, adapter.num_labels.value, data.tokenizer
    if known is not None and "input_ids" in data.train:
        sides = (data.validation,) if data.tokens is not None else (data.train, data.validation)
        largest = _largest(side[name] for side in sides for name in TOKENS if name in side)
        # What is not in memory, and what masking puts in at random, may be any entry.
        if tokenizer is not None and (data.tokens is not None or data.stream is not None or data.task == "masked_lm"):
            largest = max(largest, tokenizer.vocab_size - 1)
        if largest >= known:
            raise DataError(
                f"{data.reference} was prepared with token ids up to {largest}, and the model knows {known} "
                f"({adapter.vocab_size.reason}).",
                f"Expected ids from 0 to {known - 1}.",
                "Prepare it for this model: give its reference instead, or prepare_data(model, reference).",
            )
    if classes is not None and data.task.endswith("_classification"):
        top = _largest(side["labels"] for side in (data.train, data.validation))
        # A single score tells two classes apart.
        if top >= max(2, classes):
            raise DataError(
                f"{data.reference} was prepared with classes up to number {top}, and the model tells {max(2, classes)} "
                f"apart ({adapter.num_labels.reason}).",
                f"Expected classes from 0 to {max(2, classes) - 1}.",
                "Build the model with more outputs.",
            )


def _largest(tensors: Iterable[Tensor]) -> int:
    """Return the largest number in some tensors, -1 when there is none."""
    return max((int(tensor.max()) for tensor in tensors if tensor.numel()), default=-1)


def reference_of(data: object) -> str:
    """Return what identifies some data in a run's record: its reference, or the fingerprint of a dataset."""
    if isinstance(data, PreparedData):
        return data.reference
    named = None if is_dataset(data) else parts_of(data)
    if named is not None:
        return parts_reference(named, reference_of)
    return object_name(data) if is_dataset(data) else str(data)


def needs_of(adapter: ModelAdapter, config: TrainingConfig) -> Needs:
    """Return what a model needs from data."""
    limit, vocabulary = adapter.max_length.value, adapter.vocab_size.value
    tokens = adapter.modality == "tokens"
    start = adapter.config.get("decoder_start_token_id")
    width = adapter.example_inputs(1)[adapter.main_input].shape[1:] if adapter.modality == "features" else ()
    return Needs(
        adapter.task.value,
        vocabulary,
        config.context_length or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH),
        adapter.num_labels.value,
        adapter.image_shape.value,
        int(width[0]) if len(width) == 1 else None,
        adapter.pad_token_id.value,
        start if isinstance(start, int) else None,
        (own_tokenizer(adapter.origin), public_tokenizer(vocabulary or 0)) if tokens else (),
        config.seed,
        config.validation_share,
    )


def _from_reference(reference: DataReference, needs: Needs) -> PreparedData:
    text = reference.text
    if reference.streamed:
        return _streamed(reference, needs)
    if reference.kind == "hub":
        return _from_tables(*hub_tables(reference), reference.columns, needs, text)
    if reference.kind == "file":
        with unpacked(reference.path) as path:
            return _from_files(find_files(path, text), reference, needs)
    name = f"builtin:{reference.name}"
    if name in IMAGE_BUILTINS:
        _check_task(text, "images with class labels", needs.task, ("image_classification",), TEXT_BUILTINS[0])
        return prepare_digits(needs, text)
    if name in TABLE_BUILTINS:
        _check_task(text, "rows of numbers", needs.task, ("regression", "tabular_classification"), TEXT_BUILTINS[0])
        if needs.features is None and needs.vocab_size is not None:
            raise DataError(f"{text} holds rows of numbers, and the model reads text.", "Expected text with numbers.")
        return _from_tables(load_builtin_table(name), None, reference.columns, needs, text)
    _check_task(text, "plain text", needs.task, LANGUAGE_TASKS, IMAGE_BUILTINS[0])
    _ = needs.length, needs.vocabulary
    return prepare_language(load_texts(name)[: reference.samples], needs, text)


def _by_column(reference: DataReference, needs: Needs) -> PreparedData:
    """Cut a table by a column, and join the parts again as data that knows them."""
    text, columns = reference.text, reference.columns
    if needs.in_memory or reference.streamed:
        raise DataError(
            f"{text} is {'one of several parts' if needs.in_memory else 'read while training'}, and names the column "
            f"{reference.options['task']!r} to be divided by.",
            "Expected either: the parts are the tasks, or the values of a column are.",
            "Leave out ?task=COLUMN" + ("." if needs.in_memory else ", or ?stream=true."),
        )
    held: Table | None = None
    with ExitStack() as stack:
        if reference.kind == "hub":
            table, held = hub_tables(reference)
        elif reference.kind == "file":
            files = find_files(stack.enter_context(unpacked(reference.path)), text)
            if not files.tables:
                raise DataError(
                    f"{text} holds no table.", "Expected csv, jsonl or parquet: rows have columns.",
                    "Leave out ?task=COLUMN.",
                )  # fmt: skip
            if reference.samples is None:
                _check_memory(files.root, sum(path.stat().st_size for path in files.tables))
            table = read_table(files.tables, reference.samples)
        elif f"builtin:{reference.name}" in TABLE_BUILTINS:
            table = load_builtin_table(f"builtin:{reference.name}")
        else:
            raise DataError(f"{text} holds no table.", "Expected rows with columns.", "Leave out ?task=COLUMN.")
        rows = {name: (part, measured) for name, part, measured in divide(table, reference.options["task"], held)}

        def prepare(name: str, own: Needs) -> PreparedData:
            return _from_tables(*rows[name], columns, own, f"{text} ({name})")

        # Images lie beside their table, which may be unpacked for as long as this lasts.
        return prepare_parts([(name, name) for name in rows], needs, text, prepare, one_source=True)


def _streamed(reference: DataReference, needs: Needs) -> PreparedData:
    """Look at the start of a text that is read while training."""
    if reference.kind == "builtin" or reference.path.suffix.lower() == ".zip":
        raise DataError(
            f"{reference.text} cannot be read while training.",
            "Expected file:PATH of text, jsonl, csv or parquet, or hub:owner/name.",
            "Leave out stream=true" + ("." if reference.kind == "builtin" else ", or unpack the archive."),
        )
    if needs.task not in LANGUAGE_TASKS:
        raise DataError(
            f"{reference.text} is to be read while training, and the model's task is {needs.task}.",
            f"Expected one of {', '.join(LANGUAGE_TASKS)}.",
            "Leave out stream=true, and say ?samples=N to take a part.",
        )
    source = describe_source(reference.kind, reference.name, needs, reference.columns, reference.options.get("split"))
    return prepare_stream(source, needs, reference.text)


def _from_files(files: Files, reference: DataReference, needs: Needs) -> PreparedData:
    """Prepare files, by the model's task and by what kind of file there is."""
    text, task = reference.text, needs.task
    if task in LANGUAGE_TASKS:
        if not files.texts and not files.tables:
            _check_task(text, "images", task, ("image_classification",), "text")
        return _language(files, reference, needs)
    if task not in ROW_TASKS:
        raise DataError(
            f"The model's task is {task}.",
            f"Data is available for {', '.join((*LANGUAGE_TASKS, *ROW_TASKS))}.",
            "If the task was detected wrongly, say ModelSpec(task=...).",
        )
    sorted_images = files.images and class_folders(files.images, files.root) is not None
    if task == "image_classification" and (sorted_images or (files.images and not files.tables)):
        return prepare_folder(files, needs, text)
    if task == "text_classification" and files.texts and not files.tables:
        folders = class_folders(files.texts, files.root)
        if folders is not None:
            texts = [read_text(path) for path in files.texts]
            return _from_tables(Table({"text": texts, "label": folders}, str(files.root)), None, {}, needs, text)
    if not files.tables:
        content = "plain text" if files.texts else "images"
        possible = LANGUAGE_TASKS if files.texts else ("image_classification",)
        _check_task(text, content, task, possible, "a table (csv, jsonl, parquet)")
    if reference.samples is None:
        _check_memory(files.root, sum(path.stat().st_size for path in files.tables))
    return _from_tables(read_table(files.tables, reference.samples), None, reference.columns, needs, text)


def _language(files: Files, reference: DataReference, needs: Needs) -> PreparedData:
    """Prepare text for a language model, in memory or through a file of ids."""
    size = files.text_bytes
    _ = needs.length, needs.vocabulary
    started = partial(_limited, files, reference)
    limit = min(IN_MEMORY, available_memory() // MEMORY_PER_BYTE)
    if size > limit and reference.samples is None:
        if needs.in_memory:
            raise DataError(
                f"{reference.text} holds {format_bytes(size)} of text.",
                f"At most {format_bytes(limit)} can be one of several parts, which are joined in memory.",
                "Take a part of it with ?samples=N",
            )
        return prepare_large(started, size, needs, reference.text)
    texts = list(started())
    if not texts:
        plural = f"All {len(files.texts or files.tables)} text files in {files.root} are empty."
        raise DataError(plural if files.root.is_dir() else f"{files.root} is empty.", "Expected text to train on.")
    return prepare_language(texts, needs, reference.text)


def _limited(files: Files, reference: DataReference) -> Iterator[str]:
    """Yield the documents that the user wants."""
    for number, text in enumerate(documents(files, reference.columns)):
        if number == reference.samples:
            return
        yield text


def _from_tables(
    table: Table, held: Table | None, columns: dict[str, str], needs: Needs, reference: str
) -> PreparedData:
    """Prepare rows, by the model's task, and let the report say where they are from."""
    data = _from_rows(table, held, columns, needs, reference)
    report = dict(data.facts["report"])
    report["notes"] = [*report["notes"], *table.notes]
    return replace(data, facts={**data.facts, "report": report})


def _from_rows(table: Table, held: Table | None, columns: dict[str, str], needs: Needs, reference: str) -> PreparedData:
    """Prepare rows, by the model's task."""
    task = needs.task
    if task in LANGUAGE_TASKS:
        column, reason = choose_column(table, "text", columns)
        measured = None
        if held is not None:
            measured = [text for text in texts_of(held, column) if text.strip()]
        texts = [text for text in texts_of(table, column) if text.strip()]
        return prepare_language(texts, needs, reference, measured, [f"text is the column {column!r}: {reason}"])
    if held is not None:
        table = joined(table, held)
    if task == "regression" and needs.num_labels not in (None, 1):
        raise DataError(
            f"The model predicts {needs.num_labels} numbers for each sample.",
            "Expected one: a column of a table holds one number in each row.",
            "Build the model with one output.",
        )
    if task == "image_classification":
        return prepare_column(table, columns, needs, reference)
    if task == "seq2seq":
        return prepare_pairs(table, columns, needs, reference)
    if task == "text_classification" or (task == "regression" and needs.features is None):
        return prepare_labelled(table, columns, needs, reference)
    if task in ROW_TASKS:
        return prepare_features(table, columns, needs, reference)
    raise DataError(
        f"The model's task is {task}.",
        f"Data is available for {', '.join((*LANGUAGE_TASKS, *ROW_TASKS))}.",
        "If the task was detected wrongly, say ModelSpec(task=...).",
    )


def _check_task(reference: str, content: str, task: str, possible: tuple[str, ...], other: str) -> None:
    if task in possible:
        return
    raise DataError(
        f"{reference} holds {content}, and the model's task is {task}.",
        f"This data fits {' and '.join(possible)}.",
        f"Use {other} for this model; " + describe_references()
        + " If the task was detected wrongly, say ModelSpec(task=...).",
    )  # fmt: skip


def _check_columns(reference: DataReference, needs: Needs) -> None:
    """Refuse a named column that the model's task has no use for: most often the task is not the one meant."""
    unused = next((name for name in reference.columns if name not in needs.columns), None)
    if unused is None or not needs.columns:
        return
    others = [task for task, names in COLUMNS.items() if task != needs.task and set(reference.columns) <= set(names)]
    meant = f", or, if {' or '.join(others)} is meant, say ModelSpec(task=...)"
    raise DataError(
        f"{reference.text} names {reference.columns[unused]!r} as the {unused} column, and the model's task is "
        f"{needs.task}, which has no use for it.",
        f"{needs.task} takes {' and '.join(f'?{name}=COLUMN' for name in needs.columns)}.",
        f"Leave out {unused}={reference.columns[unused]}{meant if others else ''}.",
    )


def _check_memory(path: Path, size: int) -> None:
    """Refuse a table that does not fit into memory."""
    limit = available_memory() // MEMORY_PER_BYTE
    if size > limit:
        raise DataError(
            f"{path} holds {format_bytes(size)} of rows.",
            f"At most {format_bytes(limit)} can be prepared in this machine's memory.",
            "Take a part of it with ?samples=N",
        )
