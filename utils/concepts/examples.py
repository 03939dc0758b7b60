"""Examples of a concept, as texts or as model inputs, and what a layer makes of those on either side."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.activations import Representation, representations
from utils.concepts.checks import SIDES, check_choice, check_count, with_tensors
from utils.concepts.content import refuse_tensor_lists
from utils.memory.key_reader import adapter_of, check_tokenizer, tokenizer_of
from utils.runtime.errors import ConfigError, DataError
from utils.training.batch_inputs import model_inputs

BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples as batches that a model takes."""

    batches: tuple[dict[str, Tensor], ...]
    """Inputs by the names of forward's arguments, batch first."""
    order: Tensor
    """int64 ``(n,)``: for each row of the batches, in turn, which of the given examples it is."""

    def __len__(self) -> int:
        return len(self.order)

    def restored(self, rows: Tensor) -> Tensor:
        """Return rows, one for each row of the batches, in the order in which the examples were given."""
        return rows[self.order.argsort()]

    def chosen(self, numbers: Tensor) -> "Examples":
        """Return some of the examples, by their numbers; numbered anew from 0 in ascending order."""
        batches, kept, start = [], [], 0
        for batch in self.batches:
            size = len(next(iter(batch.values())))
            own = self.order[start : start + size]
            here = torch.isin(own, numbers)
            start += size
            if here.any():
                batches.append({name: value[here] for name, value in batch.items()})
                kept.append(own[here])
        return Examples(tuple(batches), torch.cat(kept).argsort().argsort())

    def keys(self, main: str) -> list[bytes]:
        """Return the content of each example in the main input, in the order given."""
        rows = [row.detach().cpu().contiguous() for batch in self.batches for row in batch[main]]
        made = [str(tuple(row.shape)).encode() + row.flatten().view(torch.uint8).numpy().tobytes() for row in rows]
        return [made[place] for place in self.order.argsort().tolist()]

    def distinct(self, main: str) -> Tensor:
        """Return the numbers of the examples without repetitions, ascending: the first of each content."""
        first: dict[bytes, int] = {}
        for number, key in enumerate(self.keys(main)):
            first.setdefault(key, number)
        return torch.tensor(list(first.values()))


@dataclass(frozen=True, eq=False)
class Sides:
    """What a layer makes of examples with a concept and without it."""

    adapter: ModelAdapter
    """The model."""
    positive: Examples
    """Examples with the concept."""
    negative: Examples
    """Examples without it."""
    first: Representation
    """What the layer makes of the positive ones, in the order given."""
    second: Representation
    """The same of the negative ones."""

    @property
    def paired(self) -> tuple[tuple[Representation, Examples], tuple[Representation, Examples]]:
        """Each side's vectors with its examples, positive ones first."""
        return (self.first, self.positive), (self.second, self.negative)


def example_batches(model: Any, examples: Any, tokenizer: Any = None, batch_size: int = BATCH_SIZE) -> Examples:
    """Return examples as batches that a model takes.

    Texts of one length share a batch, so that none is filled up; those that are too long are cut.

    Args:
        model: A run, a loaded model, an adapter or a module.
        examples: Texts; or a tensor of main inputs, or a mapping of all inputs, samples first; or several mappings of
            the same inputs. NumPy arrays are taken like tensors, those of float64 as float32.
        tokenizer: A `TextTokenizer` for texts; None takes the run's.
        batch_size: Samples that go through the model at a time, at most.

    Raises:
        DataError: There is no example, tensors are not joined, texts have no tokenizer, or a text is shorter than the
            model takes.
        ConfigError: They are nothing of this, or the batch size is below 1.
    """
    adapter = adapter_of(model)
    check_count("batch_size", batch_size, 1)
    check_tokenizer(tokenizer, "encode")
    examples = with_tensors(examples)
    if isinstance(examples, str):
        examples = [examples]
    if not isinstance(examples, Iterable):
        raise ConfigError(
            f"The examples are of the type {type(examples).__name__}.",
            "Expected texts, or tensors of model inputs.",
            "Give a list of texts, or a tensor whose first axis counts samples.",
        )
    given: list[Any] = [examples] if isinstance(examples, (Tensor, Mapping)) else list(examples)
    if given and all(isinstance(part, str) for part in given):
        return _text_batches(adapter, given, tokenizer_of(model, tokenizer), model, batch_size)
    refuse_tensor_lists(given)
    batches: list[dict[str, Tensor]] = []
    for part in given:
        inputs = {adapter.main_input: part} if isinstance(part, Tensor) else part
        if not isinstance(inputs, Mapping) or not all(isinstance(value, Tensor) for value in inputs.values()):
            raise ConfigError(
                f"An example is of the type {type(part).__name__}.",
                "Expected texts, tensors of inputs, or mappings from names of inputs to tensors; one kind only.",
                "Give tensors whose first axis counts samples.",
            )
        if adapter.main_input not in inputs:
            raise ConfigError(
                f"An example has the inputs {', '.join(inputs) or 'none'}.",
                f"Expected `{adapter.main_input}`, the main input of {adapter.name}, among them.",
                "Use the names of forward's arguments.",
            )
        if batches and set(batches[0]) != set(inputs):
            raise ConfigError(
                f"Some examples have the inputs {', '.join(batches[0])} and others {', '.join(inputs)}.",
                "Expected the same inputs with all of them: what a mask hides here would count there.",
                "Give each input with all examples, or with none.",
            )
        if not all(value.ndim for value in inputs.values()) or len({len(value) for value in inputs.values()}) > 1:
            raise ConfigError(
                f"The inputs of a batch have the shapes {', '.join(str(tuple(v.shape)) for v in inputs.values())}.",
                "Expected samples as the first axis of each, as many in all.",
                "Add the axis of samples.",
            )
        for pieces in zip(*(value.split(batch_size) for value in inputs.values()), strict=True):
            if len(pieces[0]):
                batches.append(dict(zip(inputs, pieces, strict=True)))
    if not batches:
        raise DataError("There are no examples.", "Expected one at least.", "Give texts or model inputs.")
    return Examples(tuple(batches), torch.arange(sum(len(batch[adapter.main_input]) for batch in batches)))


def read_sides(
    model: Any, positive: Any, negative: Any, layer: str | None = None, pool: str = "auto", *,
    side: str = "output", channels: int | None = None, tokenizer: Any = None, batch_size: int = BATCH_SIZE,
) -> Sides:  # fmt: skip
    """Run a model on examples with a concept and without it, and keep what one layer makes of them.

    Args:
        model: A run, a loaded model, an adapter or a module.
        positive: Examples with the concept; see `example_batches`.
        negative: Examples without it.
        layer: Qualified name; None takes what the layer that makes the logits reads.
        pool: ``"mean"``, ``"last"`` or ``"flat"``; see `utils.adapters.activations.representations`.
        side: The layer's ``"output"`` or ``"input"``; for its default the input.
        channels: The axis of features, where the shape leaves it open.
        tokenizer: For texts; None takes the run's.
        batch_size: Samples that go through the model at a time.

    Raises:
        ConfigError: No such layer, pool or side, or examples of no known kind.
        DataError: There is no example, some are on both sides, or one side has inputs that the other has not.
        AdapterError: The model cannot be called, or the layer makes nothing of each sample.
    """
    if isinstance(pool, str) and pool == "positions":
        raise ConfigError(
            "The pool is 'positions'.",
            "Expected one row for each example: several rows of one are no independent examples.",
            'Choose pool="mean" or pool="last", or give the rows of your own choice to `concept_direction`.',
        )
    check_choice("pool", pool, ("auto", "mean", "last", "flat"))
    check_choice("side", side, SIDES)
    adapter = adapter_of(model)
    made = [example_batches(model, examples, tokenizer, batch_size) for examples in (positive, negative)]
    names = [list(side_made.batches[0]) for side_made in made]
    if set(names[0]) != set(names[1]):
        raise DataError(
            f"The positive examples have the inputs {', '.join(names[0])} and the negative ones {', '.join(names[1])}.",
            "Expected the same on both sides: what a mask hides on one side would count on the other.",
            "Give each input, such as attention_mask, on both sides or on neither.",
        )
    keys = [set(side_made.keys(adapter.main_input)) for side_made in made]
    if shared := len(keys[0] & keys[1]):
        raise DataError(
            f"{shared} of {len(keys[0])} positive examples {'is' if shared == 1 else 'are'} negative ones too.",
            "Expected each example on one side.",
            "Take them off one of the sides.",
        )
    values = []
    for examples in made:
        read = representations(adapter, examples.batches, layer, pool, side=side, channels=channels)
        restored = examples.restored(read.values)
        number = torch.arange(len(restored))
        values.append(
            Representation(restored, read.layer, read.side, read.pool, number, -torch.ones_like(number), read.reason)
        )
    return Sides(adapter, made[0], made[1], values[0], values[1])


def _text_batches(adapter: ModelAdapter, texts: list[str], tokenizer: Any, model: Any, batch_size: int) -> Examples:
    if tokenizer is None:
        raise DataError(
            "The examples are texts, and there is no tokenizer.",
            "Expected a run, whose tokenizer is known, or a tokenizer.",
            "Pass tokenizer=..., or give token ids as a tensor.",
        )
    try:
        rows = [torch.as_tensor(encoded, dtype=torch.int64) for encoded in tokenizer.encode(texts)]
    except (TypeError, ValueError, RuntimeError):
        rows = []
    if len(rows) != len(texts) or any(row.ndim != 1 for row in rows):
        raise DataError(
            f"The tokenizer does not encode {len(texts)} texts at once.",
            "Expected one whose `encode` takes a list of texts and returns a list of ids for each.",
            "Wrap it in an object with such a method: [own(text) for text in texts].",
        )
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for number, ids in enumerate(rows):
        length = adapter.legal_length(min(len(ids), adapter.max_length.value or len(ids)))
        if len(ids) < max(1, length):
            raise DataError(
                f"The text {texts[number][:40]!r} has {len(ids)} tokens.",
                f"Expected {max(1, length)} at least, the shortest that {adapter.name} takes.",
                "Give longer texts.",
            )
        by_length.setdefault(length, []).append((number, ids[:length]))
    data = getattr(model, "data", None)
    batches, order = [], []
    for group in _cut(by_length, batch_size):
        ids = torch.stack([own for _, own in group])
        batches.append(model_inputs(adapter, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, data))
        order += [number for number, _ in group]
    return Examples(tuple(batches), torch.tensor(order))


def _cut(by_length: Mapping[int, list[tuple[int, Tensor]]], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    for group in by_length.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
