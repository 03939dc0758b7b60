"""Modules of every usual form: how they answer, what they take, and in which order the axes are."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import AdapterError

VOCABULARY, WIDTH = 50, 16


class Base(nn.Module):
    """A small recurrent language model whose forward is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn = nn.Embedding(VOCABULARY, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head, self.sorts = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, 3)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.rnn(self.tok(ids))[0]

    def scores(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


Named = namedtuple("Named", "loss logits")
ANSWERS = {
    "tensor": lambda m, ids: m.scores(ids),
    "tuple": lambda m, ids: (m.hidden(ids), m.scores(ids)),
    "list": lambda m, ids: [m.scores(ids), m.hidden(ids)],
    "dict": lambda m, ids: {"hidden": m.hidden(ids), "scores": m.scores(ids)},
    "dataclass": lambda m, ids: Output(m.scores(ids)),
    "namedtuple": lambda m, ids: Named(None, m.scores(ids)),
    "nested": lambda m, ids: (None, {"out": [m.hidden(ids), m.scores(ids)]}),
}


@pytest.mark.parametrize("answer", list(ANSWERS))
@pytest.mark.parametrize("masked", [False, True])
def test_every_form_of_answer(answer: str, masked: bool) -> None:
    class Plain(Base):
        def forward(self, input_ids: Tensor) -> Any:
            return ANSWERS[answer](self, input_ids)

    class WithMask(Base):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return ANSWERS[answer](self, input_ids * attention_mask)

    model = (WithMask if masked else Plain)()
    adapter = ModelAdapter(model)
    inputs = adapter.example_inputs(3, 7)
    assert (adapter.task.value, adapter.input_names[1:]) == ("causal_lm", ("attention_mask",) if masked else ())
    assert torch.equal(adapter.logits(inputs), model.scores(inputs["input_ids"]))


class ChannelsFirst(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(ids).transpose(1, 2)


class Flat(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(ids).reshape(-1, VOCABULARY)


@pytest.mark.parametrize(("kind", "words"), [(ChannelsFirst, "channels first"), (Flat, "flattened")])
def test_axes_in_another_order(kind: type[Base], words: str) -> None:
    model = kind()
    adapter = ModelAdapter(model)
    inputs = adapter.example_inputs(3, 7)
    assert torch.equal(adapter.logits(inputs), model.scores(inputs["ids"]))
    assert adapter.output.reason == f"the output is one tensor, {words}"
    assert adapter.task.value == "causal_lm"


def test_time_first_stays_as_it_is() -> None:
    class TimeFirst(Base):
        def forward(self, ids: Tensor) -> Tensor:
            return self.scores(ids).transpose(0, 1)

    adapter = ModelAdapter(TimeFirst())
    assert tuple(adapter.logits(adapter.example_inputs(3, 7)).shape) == (7, 3, VOCABULARY)


def test_scores_as_many_as_positions_are_not_taken_for_channels() -> None:
    class Twelve(Base):
        def forward(self, ids: Tensor) -> Tensor:
            # Width 3 by a fixed 12: the last axis does not follow the length.
            return self.sorts(self.hidden(ids).mean(1))[:, :, None].expand(-1, -1, 12)

    adapter = ModelAdapter(Twelve())
    assert adapter.output.reason.endswith("one tensor")


class Lengths(Base):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.tok(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.sorts(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].mean(1))


class State(Base):
    def forward(self, input: Tensor, hidden: Any) -> Any:
        states, hidden = self.rnn(self.tok(input), hidden)
        return self.head(states), hidden


class Flags(Base):
    def forward(self, *, input_ids: Tensor, training: Any, pooled: bool) -> Tensor:
        return self.scores(input_ids)


class Arguments(Base):
    def forward(self, *args: Tensor) -> Tensor:
        return self.scores(args[0])


class Keywords(Base):
    def forward(self, **inputs: Tensor) -> Tensor:
        return self.scores(inputs["input_ids"])


class Batch(Base):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.scores(batch["input_ids"]) * batch["attention_mask"][:, :, None]}


class Pooled(Base):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, :, None]
        return self.sorts((self.hidden(x) * mask).sum(1) / mask.sum(1))


class SquareMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True), 1)

    def forward(self, src: Tensor, src_mask: Tensor) -> Tensor:
        return self.head(self.body(self.tok(src), src_mask).mean(1))


class Choices(Base):
    def forward(self, input_ids: Tensor) -> Tensor:
        batch, choices, length = input_ids.shape
        return self.sorts(self.hidden(input_ids.view(-1, length))[:, -1])[:, 0].view(batch, choices)


class Question(Base):
    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Conv2d(3, WIDTH, 4, 4)

    def forward(self, image: Tensor, question_ids: Tensor) -> Tensor:
        return self.sorts(self.eye(image).mean((2, 3)) + self.hidden(question_ids).mean(1))


class Siamese(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        return (super().forward(x1) * super().forward(x2)).sum(-1)


class Triplet(Base):
    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Any:
        return [self.sorts(self.hidden(ids)[:, -1]) for ids in (anchor, positive, negative)]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(5, 3), nn.Embedding(7, 3)])
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(10, 2)

    def forward(self, x_cat: Tensor, x_num: Tensor) -> Tensor:
        parts = [table(x_cat[:, index]) for index, table in enumerate(self.tables)]
        return self.head(torch.cat([self.norm(x_num), *parts], dim=1))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.when, self.enter, self.leave = nn.Embedding(100, 8), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave((self.enter(x) + self.when(t)[:, :, None, None]).relu())


class Vectors(Base):
    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.normalize(self.sorts(self.hidden(input_ids).mean(1)), dim=-1)


class Means(Base):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.hidden(input_ids).mean(1)


class Wave(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(1, 8, 80, 16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, waveform: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(waveform[:, None] if waveform.dim() == 2 else waveform)


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rnn, self.head = nn.Linear(40, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.rnn(self.enter(features))[0].mean(1))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(64, 64), nn.Linear(8, 7)

    def forward(self, img: Tensor) -> Tensor:
        return self.head(self.mix(self.patch(img).flatten(2)).mean(2))


TAKES: list[tuple[type[nn.Module], str, tuple[str, ...], tuple[int, ...]]] = [
    (Lengths, "text_classification", ("x", "lengths"), (2, 3)),
    (State, "causal_lm", ("input",), (2, 12, 50)),
    (Flags, "causal_lm", ("input_ids",), (2, 12, 50)),
    (Arguments, "causal_lm", ("input",), (2, 12, 50)),
    (Keywords, "causal_lm", ("input_ids",), (2, 12, 50)),
    (Batch, "causal_lm", ("batch.input_ids", "batch.attention_mask"), (2, 12, 50)),
    (Pooled, "text_classification", ("x", "mask"), (2, 3)),
    (SquareMask, "text_classification", ("src",), (2, 3)),
    (Choices, "text_classification", ("input_ids",), (2, 4)),
    (Question, "image_classification", ("image", "question_ids"), (2, 3)),
    (Siamese, "regression", ("x1", "x2"), (2,)),
    (Triplet, "embedding", ("anchor", "positive", "negative"), (2, 3)),
    (Table, "tabular_classification", ("x_num", "x_cat"), (2, 2)),
    (Denoiser, "embedding", ("x", "t"), (2, 3, 64, 64)),
    (Vectors, "embedding", ("input_ids",), (2, 3)),
    (Means, "embedding", ("input_ids",), (2, 16)),
    (Wave, "audio_classification", ("waveform",), (2, 5)),
    (Frames, "audio_classification", ("features",), (2, 5)),
    (Mixer, "image_classification", ("img",), (2, 7)),
]


@pytest.mark.parametrize(("kind", "task", "names", "shape"), TAKES)
def test_every_form_of_call(kind: type[nn.Module], task: str, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    adapter = ModelAdapter(kind())
    assert adapter.failure is None
    logits = adapter.logits(adapter.example_inputs())
    assert (adapter.task.value, adapter.input_names, tuple(logits.shape)) == (task, names, shape)
    assert len(adapter.logits(adapter.example_inputs(3))) == 3
    assert adapter.loss(logits, adapter.random_labels(logits)).isfinite()


def test_optional_content_that_is_not_filled() -> None:
    class Sighted(Base):
        def forward(
            self, input_ids: Tensor, attention_mask: Any = None, pixel_values: Any = None, use_cache: Any = None,
            inputs_embeds: Any = None, labels: Any = None,
        ) -> Any:  # fmt: skip
            assert use_cache is False
            return self.scores(input_ids)

    adapter = ModelAdapter(Sighted())
    assert adapter.unfilled_inputs == ("pixel_values",)
    assert list(adapter.example_inputs()) == ["input_ids"]


def test_what_nobody_can_guess_is_named() -> None:
    class Graph(nn.Linear):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    with pytest.raises(AdapterError, match=r"requires edge_index beside x\..*'edge_index': \.\.\.\}\) with tensors"):
        ModelAdapter(Graph(4, 3))
    edges = torch.tensor([[0, 1], [1, 0]])
    adapter = ModelAdapter(Graph(4, 3), spec=ModelSpec(example_inputs={"x": torch.rand(5, 4), "edge_index": edges}))
    assert tuple(adapter.logits(adapter.example_inputs(5)).shape) == (5, 3)


def test_nested_example_inputs() -> None:
    class Nested(Base):
        def forward(
            self, batch: dict[str, Any], extras: list[Tensor], packed: PackedSequence, scale: float, nothing: None
        ) -> Tensor:
            assert nothing is None
            assert isinstance(packed, PackedSequence)
            sums = pad_packed_sequence(packed, batch_first=True)[0].sum((1, 2))
            return self.scores(batch["text"]["ids"]) * scale + (extras[0] + sums)[:, None, None]

    packed = pack_padded_sequence(torch.rand(2, 4, 3), torch.tensor([4, 2]), batch_first=True)
    examples = {
        "batch": {"text": {"ids": torch.ones(2, 6).long()}, "name": "b"},
        "extras": [torch.rand(2)],
        "packed": packed,
        "scale": 2.0,
        "nothing": None,
    }
    model = Nested()
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs=examples))
    assert adapter.failure is None
    inputs = adapter.example_inputs(5, 9)
    assert {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)} == {
        "batch.text.ids": (5, 9),
        "extras.0": (5,),
        "packed": (5, 4, 3),
    }
    assert (inputs["scale"], inputs["nothing"], adapter.main_input) == (2.0, None, "batch.text.ids")
    assert tuple(adapter.logits(inputs).shape) == (5, 9, VOCABULARY)
    plain = examples | {"extras": [inputs["extras.0"][:2]], "batch": {"text": {"ids": inputs["batch.text.ids"][:2]}}}
    assert torch.allclose(adapter.logits(inputs)[:2], model(**plain), atol=1e-6)
