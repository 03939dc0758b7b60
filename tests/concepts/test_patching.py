"""Layers changed while a model runs, however they arrange samples, positions and features."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.activations import representations
from utils.concepts.patching import changed, pooled_answers, with_first
from utils.runtime.errors import AdapterError, ConfigError


def image_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 64, 4))
    return ModelAdapter(
        model, spec=ModelSpec(task="image_classification", example_inputs={"input": torch.rand(2, 1, 8, 8)})
    )


@pytest.mark.parametrize("flat", [False, True])
def test_rows_are_those_of_representations_and_go_back_to_their_places(flat):
    model = image_model()
    images = torch.rand(5, 1, 8, 8)
    wanted = representations(model, [images], "0", "flat" if flat else "positions").values
    seen = []

    def change(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows

    with torch.no_grad():
        before = model.module(images)
        with changed(model, "0", change, images, flat=flat):
            assert torch.equal(model.module(images), before)
        assert torch.allclose(seen[0], wanted)
        # One channel set to a number is that channel for all that follows.
        with changed(model, "0", lambda rows: rows * torch.tensor([1.0, 0.0, 1.0]), images):
            found = model.module(images)
        by_hand = model.module[0](images)
        by_hand[:, 1] = 0
        assert torch.allclose(found, model.module[1:](by_hand), atol=1e-6)
    assert torch.equal(model.module(images), before)


def test_the_input_of_a_layer():
    model = image_model()
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad(), changed(model, "3", lambda rows: rows * 0, images, side="input"):
        assert torch.allclose(model.module(images), model.module[3].bias.expand(5, 4))


class Recurrent(nn.Module):
    """Positions come before samples, and the layer returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layer = nn.GRU(6, 5)
        self.head = nn.Linear(5, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.layer(self.table(input_ids).transpose(0, 1))[0].transpose(0, 1))


def test_positions_before_samples_inside_a_tuple():
    torch.manual_seed(0)
    model = ModelAdapter(Recurrent())
    ids = torch.randint(1, 11, (3, 7))
    rows = representations(model, [ids], "layer", "positions").values
    seen = []

    def change(given: Tensor) -> Tensor:
        seen.append(given)
        return given.flip(1)

    with torch.no_grad(), changed(model, "layer", change, ids):
        found = model.module(ids)
    assert torch.allclose(seen[0], rows)
    assert torch.allclose(found, model.module.head(rows.flip(1)).view(3, 7, 11), atol=1e-6)


def test_a_wrong_shape_and_a_wrong_layer():
    model = image_model()
    images = torch.rand(2, 1, 8, 8)
    with pytest.raises(AdapterError, match="changed to"), changed(model, "0", lambda rows: rows[:1], images):
        model.module(images)
    assert not model.module[0]._forward_hooks
    with pytest.raises(ConfigError, match="no layer '9'"), changed(model, "9", lambda rows: rows, images):
        pass


def test_the_first_tensor_of_anything():
    @dataclass
    class Output:
        first: Tensor
        second: Tensor

    pair = namedtuple("pair", "first second")
    one, two = torch.ones(2), torch.zeros(2)
    for value, read in (
        (one, lambda v: v),
        ((None, one, two), lambda v: v[1]),
        ([one, two], lambda v: v[0]),
        (pair(one, two), lambda v: v.first),
        ({"a": None, "b": one, "c": two}, lambda v: v["b"]),
        (Output(one, two), lambda v: v.first),
        ({"a": (one,), "b": two}, lambda v: v["a"][0]),
    ):
        made = with_first(value, lambda tensor: tensor + 5)
        assert type(made) is type(value)
        assert read(made).tolist() == [6, 6]
        assert read(value).tolist() == [1, 1]
    assert with_first(SimpleNamespace(a=1), lambda tensor: tensor).a == 1


def test_the_answer_of_a_language_model_is_that_of_its_last_position_or_of_their_mean():
    torch.manual_seed(0)
    gpt = utils.load_model(
        "example:gpt", config={"vocab_size": 50, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 1}
    )
    model = ModelAdapter(gpt)
    ids = torch.randint(1, 50, (3, 8))
    with model.isolated():
        logits = model.module(ids)
        assert torch.allclose(pooled_answers(model, {model.main_input: ids}), logits[:, -1], atol=1e-6)
        assert torch.allclose(pooled_answers(model, {model.main_input: ids}, "mean"), logits.mean(1), atol=1e-6)
