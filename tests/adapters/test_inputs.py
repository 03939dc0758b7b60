"""Examples that the user gives are stretched, and lengths are found by trying."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters import inputs as inputs_module
from utils.adapters.inputs import (
    candidate_kinds,
    image_shapes,
    length_inputs,
    longest_length,
    main_example,
    sound_shapes,
    stretched,
    table_sizes,
)
from utils.runtime.errors import AdapterError, ConfigError


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, scale: Tensor, graph: Tensor, input_ids: Tensor, adj: Any) -> Tensor:
        return self.head(self.emb(input_ids) * scale) + graph.sum()


def test_examples_are_stretched_to_batch_and_length() -> None:
    examples = {
        "scale": torch.tensor(2.0),
        "graph": torch.rand(2, 3),
        "input_ids": torch.ones(2, 7).long(),
        "adj": None,
    }
    adapter = ModelAdapter(Graph(), {"vocab_size": 50}, ModelSpec(example_inputs=examples))
    inputs = adapter.example_inputs(5, 9)
    assert adapter.main_input == "input_ids"
    assert (tuple(inputs["input_ids"].shape), tuple(inputs["graph"].shape)) == ((5, 9), (5, 3))
    assert inputs["adj"] is None
    assert float(inputs["scale"]) == 2.0
    assert tuple(adapter.logits(inputs).shape) == (5, 9, 20)
    assert int(adapter.example_inputs(50)["input_ids"].max()) == 19


def test_examples_that_do_not_serve() -> None:
    for examples in ({"input": [1, 2]}, {"input": torch.zeros(0, 3)}, {"input": torch.tensor(1.0)}):
        with pytest.raises(
            AdapterError, match=r"example_inputs holds no tensor with at least one sample\..*batch first"
        ):
            ModelAdapter(nn.Linear(3, 2), spec=ModelSpec(example_inputs=examples))
    with pytest.raises(ConfigError, match=r"gives 'wrong', which forward\(\) does not take and lacks 'input'"):
        ModelAdapter(nn.Linear(3, 2), spec=ModelSpec(example_inputs={"wrong": torch.rand(2, 3)}))
    failure = ModelAdapter(nn.Linear(3, 2), spec=ModelSpec(example_inputs={"input": torch.rand(2, 4)})).failure
    assert failure is not None
    assert failure.endswith("Correct ModelSpec.example_inputs so that model(**example_inputs) is a valid call.")
    assert main_example({"a": 1}) is None


def test_images_by_example() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 18 * 18, 2))
    assert ModelAdapter(model).image_shape.value == (1, 20, 20)
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"input": torch.rand(4, 1, 20, 20)}))
    assert (adapter.modality, adapter.image_shape.value) == ("image", (1, 20, 20))
    assert ModelAdapter(model, {"image_size": 20}).image_shape.value == (1, 20, 20)
    assert next(image_shapes(model, {"image_size": [20, 24]}))[0] == (1, 20, 24)


def test_kinds_in_order() -> None:
    assert candidate_kinds(nn.Embedding(3, 2), {}, "x")[0] == "tokens"
    assert candidate_kinds(nn.Conv2d(3, 2, 1), {}, "x")[0] == "image"
    assert candidate_kinds(nn.Linear(3, 2), {}, "pixel_values")[0] == "image"
    assert candidate_kinds(nn.Linear(3, 2), {}, "x")[0] == "features"


def test_longest_length() -> None:
    def limited(length: int) -> None:
        if length > 37:
            raise IndexError

    found = longest_length(limited, 12)
    assert (found.value, found.reason) == (37, "found by trying: 37 tokens run, 38 do not")
    assert longest_length(lambda length: None, 1024).reason == "no limit found up to 2048 tokens"


def test_likely_limits_are_tried_first() -> None:
    tried: list[int] = []

    def limited(length: int) -> None:
        tried.append(length)
        if length > 1000:
            raise IndexError

    assert longest_length(limited, 12, [16, 800, 1000]).value == 1000
    assert len(tried) <= 13
    assert table_sizes(nn.Embedding(9, 4)) == [4, 9]


def test_spectrograms_may_be_called_values() -> None:
    shapes = [shape for shape, _ in sound_shapes({"num_mel_bins": 8, "max_length": 20}, "wave")]
    assert shapes == [(20, 8), (16000,)]


def test_lengths_follow_the_text() -> None:
    """Cut with it, grown with it, always with one full text, and longest first where they were."""
    examples = {"input_ids": torch.zeros(4, 9, dtype=torch.long), "n": torch.tensor([9, 5, 3, 1])}
    assert length_inputs(examples, "input_ids") == {"n"}
    assert length_inputs({**examples, "n": torch.tensor([9, 0, 3, 1])}, "input_ids") == set()
    assert length_inputs({**examples, "n": torch.tensor([7, 5, 3, 1])}, "input_ids") == set()
    generator = torch.Generator().manual_seed(0)
    for batch, length, expected in ((4, 4, [4, 4, 3, 1]), (2, 12, [12, 5]), (6, None, [9, 9, 5, 5, 3, 1])):
        made = stretched(examples, "input_ids", "tokens", batch, length, 5, generator, torch.device("cpu"))
        assert made["n"].tolist() == expected
    examples["n"] = torch.tensor([1, 3, 5, 9])
    made = stretched(examples, "input_ids", "tokens", 2, None, 5, generator, torch.device("cpu"))
    assert made["n"].tolist() == [1, 9]


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyConv1d(4, 1), nn.LazyConv2d(4, 1)])
def test_lazy_layers_get_an_input_with_content(layer: nn.Module) -> None:
    """They state a size of 0 until the first call, and from that they would take weights without numbers."""
    assert all(p.numel() for p in ModelAdapter(layer).module.parameters())


class Columns(nn.Module):
    """Gives every column of a table a vector of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(10, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head((x.unsqueeze(-1) * self.scale + self.shift).relu().mean(1))


class Cell(nn.Module):
    """Feeds one row to a cell three times."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(7, 12), nn.Linear(12, 2)

    def forward(self, x):
        state = x.new_zeros(len(x), 12)
        for _ in range(3):
            state = self.cell(x, state)
        return self.head(state)


@pytest.mark.parametrize(("model", "shape"), [(Columns, (10,)), (Cell, (7,))])
def test_widths_that_no_linear_layer_tells(model, shape):
    adapter = ModelAdapter(model())
    assert adapter.failure is None
    assert tuple(adapter.example_inputs(2)["x"].shape[1:]) == shape


def test_the_search_for_a_limit_stops_before_a_pass_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each doubling takes four times as long, and so will the next; a wrong length takes no time."""
    clock = [0.0]
    monkeypatch.setattr(inputs_module.time, "perf_counter", lambda: clock[0])
    tried: list[int] = []

    def pairs(length: int) -> None:
        tried.append(length)
        clock[0] += 0.2 * (length / 64) ** 2

    assert longest_length(pairs, 16).reason == "no limit found up to 64 tokens"
    assert tried == [16, 32, 64] and clock[0] < inputs_module.PROBE_SECONDS
