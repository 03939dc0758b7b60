"""Labels among a user's example inputs are set aside where only the loss reads them, and stay inputs elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.objectives import labels_input, own_loss
from utils.runtime.errors import AdapterError

IDS = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
CLASSES = torch.tensor([2, 0, 1, 2])


def adapter_of(model: nn.Module, **examples: Any) -> ModelAdapter:
    torch.manual_seed(0)
    return ModelAdapter(model, spec=ModelSpec(example_inputs=examples))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.head(x)
        return scores if labels is None else (functional.cross_entropy(scores, labels), scores)


class Required(Classifier):
    def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, labels.reshape(-1).long())


class OnlyLoss(Classifier):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return self.head(x) if labels is None else functional.cross_entropy(self.head(x), labels)


class ByPosition(Classifier):
    def forward(self, *batch: Tensor) -> Any:  # type: ignore[override]
        x, labels = batch
        return super().forward(x, labels)


class Batch(Classifier):
    def forward(self, batch: dict[str, Tensor]) -> Any:  # type: ignore[override]
        return super().forward(batch["x"], batch.get("labels"))


class StrictBatch(Classifier):
    def forward(self, batch: dict[str, Tensor]) -> Any:  # type: ignore[override]
        return super().forward(batch["x"], batch["labels"])


class Probable(Classifier):
    """Probabilities for reading, scores for training."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(x).softmax(-1) if labels is None else super().forward(x, labels)


@pytest.mark.parametrize("model", [Classifier, OnlyLoss, Required, Probable])
def test_labels_of_the_loss_are_no_input(model: type[nn.Module]) -> None:
    adapter = adapter_of(model(), x=ROWS, labels=CLASSES)
    assert adapter.input_names == ("x",) and labels_input(adapter) == "labels"
    assert torch.equal(adapter.loss_inputs["labels"], CLASSES)
    assert list(adapter.example_inputs(3)) == ["x"]
    assert tuple(adapter.logits(adapter.example_inputs(9)).shape) == (9, 3)
    assert adapter.unfilled_inputs == ()
    row = next(row for row in adapter.describe() if row["name"] == "labels")
    assert row["value"] == "labels" and "no score" in row["reason"]
    inputs = adapter.example_inputs(3)
    got = own_loss(adapter, inputs, torch.tensor([0, 1, 2]), adapter.logits(inputs))
    assert got is not None and bool(got.loss.isfinite())


def test_labels_stay_in_calls_that_need_them() -> None:
    """A call without would return other numbers than those that are trained on."""
    scores = adapter_of(Probable(), x=ROWS, labels=CLASSES)
    assert scores.output.value == "1" and float(scores.logits(scores.example_inputs(4)).sum(-1).std()) > 1e-3
    column = adapter_of(Required(), x=ROWS, labels=CLASSES[:, None].float())
    assert column.input_names == ("x",)
    inputs = column.example_inputs(2)
    got = own_loss(column, inputs, torch.tensor([0, 1]), column.logits(inputs))
    assert got is not None and got.gradient is not None and got.gradient.argmin(-1).tolist() == [0, 1]


@pytest.mark.parametrize(("model", "name"), [(Batch, "batch.labels"), (StrictBatch, "batch.labels")])
def test_labels_in_a_dict(model: type[nn.Module], name: str) -> None:
    adapter = adapter_of(model(), batch={"x": ROWS, "labels": CLASSES})
    assert adapter.input_names == ("batch.x",) and labels_input(adapter) == name
    inputs = adapter.example_inputs(2)
    assert tuple(adapter.logits(inputs).shape) == (2, 3)
    got = own_loss(adapter, inputs, torch.tensor([2, 1]), adapter.logits(inputs))
    assert got is not None and got.gradient is not None and got.gradient.argmin(-1).tolist() == [2, 1]
    assert ModelAdapter(model()).input_names == ("batch.x",)


def test_labels_as_the_last_argument_by_position() -> None:
    adapter = adapter_of(ByPosition(), x=ROWS, labels=CLASSES)
    inputs = adapter.example_inputs(2)
    assert list(inputs) == ["x"] and tuple(adapter.logits(inputs).shape) == (2, 3)
    got = own_loss(adapter, inputs, torch.tensor([1, 0]), adapter.logits(inputs))
    assert got is not None and got.gradient is not None and got.gradient.argmin(-1).tolist() == [1, 0]


class Writer(nn.Module):
    """With targets all positions, flat where asked; without only the last one."""

    def __init__(self, flat: bool = False, required: bool = False) -> None:
        super().__init__()
        self.table, self.head, self.flat = nn.Embedding(30, 8), nn.Linear(8, 30), flat

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        scores = self.head(self.table(idx))
        if targets is None:
            return (scores if self.flat else scores[:, [-1]]), None
        rows = scores.view(-1, 30)
        return (rows if self.flat else scores), functional.cross_entropy(rows, targets.reshape(-1))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("targets", [IDS, IDS.flatten()])
def test_targets_of_a_language_model(flat: bool, targets: Tensor) -> None:
    adapter = adapter_of(Writer(flat), idx=IDS, targets=targets)
    assert adapter.input_names == ("idx",) and labels_input(adapter) == "targets"
    assert adapter.task.value == "causal_lm"
    inputs = adapter.example_inputs(2, 11)
    scores = adapter.logits(inputs)
    assert tuple(scores.shape) == (2, 11, 30)
    got = own_loss(adapter, inputs, inputs["idx"], scores)
    assert got is not None and got.gradient is not None
    assert torch.equal(got.gradient.argmin(-1), inputs["idx"])


class FlatRequired(Writer):
    def forward(self, idx: Tensor, targets: Tensor) -> Any:  # type: ignore[override]
        return super().forward(idx, targets)


@pytest.mark.parametrize("targets", [IDS, IDS.flatten()])
def test_required_labels_are_stretched_with_the_text(targets: Tensor) -> None:
    adapter = adapter_of(FlatRequired(), idx=IDS, targets=targets)
    assert adapter.input_names == ("idx",)
    for size, length in ((1, 7), (5, 3), (2, 16)):
        assert tuple(adapter.logits(adapter.example_inputs(size, length)).shape) == (size, length, 30)


class Conditional(nn.Module):
    """The class of the picture to be made is an input, and the loss is of the picture."""

    def __init__(self, zero: bool, required: bool) -> None:
        super().__init__()
        self.classes, self.body, self.required = nn.Embedding(11, 5), nn.Linear(5, 5), required
        if zero:
            nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, y: Tensor | None = None, target: Tensor | None = None) -> Any:
        if y is None and self.required:
            raise ValueError("a class is needed")
        out = self.body(x + self.classes(torch.full((len(x),), 10) if y is None else y))
        return {"out": out} if target is None else {"out": out, "loss": functional.mse_loss(out, target)}


class Translator(nn.Module):
    """Its target is read by the decoder and judged by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.answer, self.head = nn.Embedding(30, 8), nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, source: Tensor, target: Tensor) -> Any:
        scores = self.head(self.answer(target) + self.source(source).mean(1, keepdim=True))
        return functional.cross_entropy(scores[:, :-1].flatten(0, 1), target[:, 1:].flatten()), scores


class Shifting(Translator):
    """As translators of transformers: the labels, moved by one, are what the decoder reads."""

    def forward(self, source: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        read = functional.pad(labels, (1, -1))
        scores = self.head(self.answer(read) + self.source(source).mean(1, keepdim=True))
        return functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), scores


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("required", [False, True])
def test_what_the_scores_depend_on_is_an_input(zero: bool, required: bool) -> None:
    model = Conditional(zero, required)
    adapter = adapter_of(model, x=ROWS, y=CLASSES)
    assert adapter.input_names == ("x", "y") and not adapter.loss_inputs
    both = adapter_of(model, x=ROWS, y=CLASSES, target=ROWS + 1)
    assert both.input_names == ("x", "y") and list(both.loss_inputs) == ["target"]
    assert not adapter_of(Classifier(), x=ROWS).loss_inputs


def test_the_text_of_a_decoder_is_an_input() -> None:
    for model, name in ((Translator(), "target"), (Shifting(), "labels")):
        spec = ModelSpec(task="seq2seq", example_inputs={"source": IDS, name: IDS[:, :5]})
        adapter = ModelAdapter(model, spec=spec)
        assert adapter.input_names == ("source", name) and adapter.content_input == name
        assert tuple(adapter.logits(adapter.example_inputs(2, 9)).shape) == (2, 5, 30)
        guessed = ModelAdapter(model, spec=ModelSpec(example_inputs={"source": IDS, name: IDS[:, :5]}))
        assert guessed.task.value == "seq2seq" and f"as many positions as `{name}`" in guessed.task.reason
        alike = ModelAdapter(model, spec=ModelSpec(example_inputs={"source": IDS, name: IDS}))
        assert alike.task.value == "seq2seq"
        unknown = ModelAdapter(model)
        assert unknown.input_names == ("source", name) and unknown.task.value == "seq2seq"
    assert ModelAdapter(FlatRequired()).input_names == ("idx",)


class Answers(nn.Module):
    """Two ends of an answer, which the loss needs both."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 2)

    def forward(
        self, input_ids: Tensor, start_positions: Tensor | None = None, end_positions: Tensor | None = None
    ) -> Any:
        scores = self.head(self.table(input_ids))
        if start_positions is None or end_positions is None:
            return {"scores": scores}
        losses = [functional.cross_entropy(scores[..., i], p) for i, p in enumerate((start_positions, end_positions))]
        return {"scores": scores, "loss": sum(losses)}


def test_several_labels_and_labels_in_train_mode() -> None:
    adapter = adapter_of(Answers(), input_ids=IDS, start_positions=CLASSES[:3], end_positions=CLASSES[1:] + 1)
    assert adapter.input_names == ("input_ids",)
    assert sorted(adapter.loss_inputs) == ["end_positions", "start_positions"]

    class Strict(Classifier):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            assert labels is not None or not self.training
            return super().forward(x, labels)

    strict = adapter_of(Strict(), x=ROWS, labels=CLASSES)
    strict.module.train()
    loss, scores = strict.forward_in_training(strict.example_inputs(2))
    assert loss.dim() == 0 and len(scores) == 2


def test_labels_that_cannot_be_told() -> None:
    """Where all are one value another is tried; without a loss, or with nothing but a loss, nothing can be told."""
    for label in (0, 2):
        assert list(adapter_of(Required(), x=ROWS, labels=torch.full((4,), label)).loss_inputs) == ["labels"]

    class Silent(Classifier):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return self.head(x)

    assert adapter_of(Silent(), x=ROWS, labels=CLASSES).input_names == ("x", "labels")

    class LossAlone(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            return functional.cross_entropy(self.head(x), labels)

    with pytest.raises(AdapterError, match="LossAlone returned a single number"):
        adapter_of(LossAlone(), x=ROWS, labels=CLASSES)
