"""Edits do what they say to values, shapes and numbers, note it for others, and come undone."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.growth.toys import assert_undone, tensors
from utils.growth.edits import (
    Gate,
    GrowthRefusedError,
    InsertBlock,
    InsertLayer,
    LineageError,
    Number,
    Overwrite,
    Plan,
    Scale,
    Widen,
)
from utils.growth.gated_block import GatedBlock
from utils.growth.surgery import Surgery
from utils.training.state import Insertion, TensorChange


class Model(nn.Module):
    """A table tied to a head, a buffer, and a list of layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.register_buffer("seen", torch.arange(5.0))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.size, self.shape = 5, (4, 5)
        self.config = SimpleNamespace(size=5, names=["a", "b"], inner={"size": 5})


def operated(*edits, model=None, **options):
    model = Model() if model is None else model
    return model, Surgery(model, Plan("test", (), edits, 0, 1), **options)


FILLS = {
    ("zero", 0.0): lambda old: torch.zeros(4),
    ("one", 0.0): lambda old: torch.ones(4),
    ("value", -3.5): lambda old: torch.full((4,), -3.5),
    ("mean", 0.0): lambda old: old.mean(0),
    ("copy", 2.0): lambda old: old[2],
}


@pytest.mark.parametrize(("fill", "value"), FILLS)
def test_new_rows_hold_what_was_asked(fill, value):
    model = Model()
    old = model.layers[0].weight.detach().clone()
    operated(Widen("layers.0.weight", 0, ((1, 1), (4, 2)), fill, value), model=model)
    new = model.layers[0].weight.detach()
    assert new.shape == (7, 4)
    assert torch.equal(new[[0, 2, 3, 4]], old)
    for row in (1, 5, 6):
        assert torch.allclose(new[row], FILLS[fill, value](old))


def test_drawn_entries_have_the_deviation_of_the_old_ones_and_one_seed_draws_them_once():
    model, _ = operated(Widen("layers.0.weight", 1, ((4, 500),), "like"), seed=3, step=7)
    other, _ = operated(Widen("layers.0.weight", 1, ((4, 500),), "like"), seed=3, step=7)
    third, _ = operated(Widen("layers.0.weight", 1, ((4, 500),), "like"), seed=3, step=8)
    new, deviation = model.layers[0].weight.detach()[:, 4:], float(Model().layers[0].weight.detach().std())
    assert abs(float(new.std()) / deviation - 1) < 0.15
    assert torch.equal(new, other.layers[0].weight.detach()[:, 4:])
    assert not torch.equal(new, third.layers[0].weight.detach()[:, 4:])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=3, unique_by=lambda place: place[0]),
)
def test_taking_out_what_was_put_in_gives_the_old_tensor(axis, places):
    places = tuple(sorted(places))
    model = Model()
    old = model.layers[0].weight.detach().clone()
    _, surgery = operated(Widen("layers.0.weight", axis, places, "one"), model=model)
    new = model.layers[0].weight.detach()
    keep, shift = torch.ones(new.shape[axis], dtype=torch.bool), 0
    for place, count in places:
        keep[place + shift : place + shift + count] = False
        shift += count
    assert torch.equal(new.index_select(axis, keep.nonzero().flatten()), old)
    assert (new.index_select(axis, (~keep).nonzero().flatten()) == 1).all()
    how = surgery.change.changes["layers.0.weight"]
    assert torch.equal(how.carried(old), torch.where(new == 1, 0.0, new))


def test_tied_names_follow_and_stay_tied():
    model, surgery = operated(Widen("head.weight", 0, ((5, 2),)))
    assert model.head.weight is model.table.weight
    assert model.table.weight.shape == (7, 4)
    assert set(surgery.change.changes) == {"table.weight"}


def test_buffers_widen_and_stay_buffers():
    model, surgery = operated(Widen("seen", 0, ((5, 1),), "value", 9.0))
    assert torch.equal(model.seen, torch.tensor([0.0, 1, 2, 3, 4, 9]))
    assert "seen" in dict(model.named_buffers())
    assert surgery.change.changes["seen"] == TensorChange("seen", None, (Insertion(0, ((5, 1),)),))


def test_kind_precision_and_frozenness_stay():
    model = Model().to(torch.bfloat16)
    model.layers[0].weight.requires_grad_(False)
    operated(Widen("layers.0.weight", 0, ((4, 1),), "like"), Scale("layers.1.weight", 2.0), model=model)
    assert model.layers[0].weight.dtype == torch.bfloat16
    assert not model.layers[0].weight.requires_grad
    assert model.layers[1].weight.requires_grad
    assert isinstance(model.layers[0].weight, nn.Parameter)


def test_scaling_and_overwriting_are_noted():
    model = Model()
    old = model.layers[0].weight.detach().clone()
    _, surgery = operated(
        Scale("layers.0.weight", 3.0), Scale("layers.0.weight", 0.5), Overwrite("layers.1.bias", 1.0), model=model
    )
    assert torch.allclose(model.layers[0].weight, old * 1.5)
    assert (model.layers[1].bias == 1).all()
    assert surgery.change.changes["layers.0.weight"] == TensorChange("layers.0.weight", None, (), 1.5)
    assert surgery.change.changes["layers.1.bias"] == TensorChange(None, "layers.1.bias")


def test_numbers_change_wherever_they_are_kept():
    model, surgery = operated(
        Number("", ("size",), 5, 7),
        Number("", ("shape",), (4, 5), (4, 7)),
        Number("", ("config", "size"), 5, 7),
        Number("", ("config", "inner", "size"), 5, 7),
        Number("", ("config", "names"), ("a", "b"), ("a", "b", "b")),
    )
    assert (model.size, model.shape, model.config.size, model.config.inner) == (7, (4, 7), 7, {"size": 7})
    assert model.config.names == ["a", "b", "b"]
    surgery.undo()
    assert (model.size, model.shape, model.config.size, model.config.inner) == (5, (4, 5), 5, {"size": 5})
    assert model.config.names == ["a", "b"]


class Counted:
    """A config whose size is the length of a table of names, as with labels."""

    def __init__(self):
        self.names, self.other = {0: "cat", 1: "dog"}, 3

    @property
    def size(self):
        return len(self.names)

    @size.setter
    def size(self, value):
        self.names = {number: f"LABEL_{number}" for number in range(value)}

    @property
    def stubborn(self):
        return 4

    @stubborn.setter
    def stubborn(self, value):
        pass


def test_a_computed_number_keeps_the_names_it_is_computed_from():
    model = Model()
    model.config = Counted()
    names = model.config.names
    _, surgery = operated(Number("", ("config", "size"), 2, 3), model=model)
    assert model.config.names == {0: "cat", 1: "dog", 2: "LABEL_2"}
    surgery.undo()
    assert model.config.names is names


def test_a_number_that_cannot_be_set_is_an_error():
    model = Model()
    model.config = Counted()
    with pytest.raises(LineageError, match="stubborn stays 4"):
        operated(Number("", ("config", "stubborn"), 4, 5), model=model)


def test_a_block_is_inserted_behind_and_the_rest_moves_on():
    model = Model()
    old = [layer.weight for layer in model.layers]
    _, surgery = operated(InsertBlock("layers", 1, 0, ("bias",)), model=model)
    assert [layer.weight is kept for layer, kept in zip(model.layers, [old[0], None, *old[1:]], strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert torch.equal(model.layers[1].weight, old[0])
    assert not model.layers[1].bias.any()
    changes = surgery.change.changes
    assert changes["layers.1.weight"] == TensorChange(None, "layers.0.weight")
    assert changes["layers.2.weight"] == TensorChange("layers.1.weight")
    assert "layers.0.weight" not in changes
    assert surgery.change.before["layers.2.weight"] is old[2]
    assert surgery.change.parameters["layers.3.weight"] is old[2]


def test_a_drawn_block_copies_its_vectors_only():
    model, _ = operated(InsertBlock("layers", 3, 2, (), drawn=True))
    assert not torch.equal(model.layers[3].weight, model.layers[2].weight)
    assert torch.equal(model.layers[3].bias, model.layers[2].bias)


def test_a_new_block_can_be_changed_further():
    model, surgery = operated(
        InsertBlock("layers", 1, 0, ()), Overwrite("layers.1.bias", 2.0), Widen("layers.1.weight", 0, ((4, 1),))
    )
    assert (model.layers[1].bias == 2).all()
    assert model.layers[1].weight.shape == (5, 4)
    assert surgery.change.changes["layers.1.weight"].like == "layers.0.weight"
    assert model.layers[0].weight.shape == (4, 4)


def test_a_block_is_gated_and_released():
    model = Model()
    layer = model.layers[1]
    model.layers[1].eval()
    _, surgery = operated(Gate("layers", 1), model=model)
    assert isinstance(model.layers[1], GatedBlock)
    assert model.layers[1].block is layer
    assert not model.layers[1].training
    assert surgery.change.changes["layers.1.block.weight"] == TensorChange("layers.1.weight")
    assert surgery.change.changes["layers.1.gate"].source is None
    surgery.undo()
    assert model.layers[1] is layer


EVERYTHING = (
    Widen("head.weight", 0, ((5, 2),), "mean"),
    Widen("head.bias", 0, ((5, 2),), "value", -9.0),
    Widen("seen", 0, ((0, 1),)),
    Scale("layers.0.weight", 2.0),
    Overwrite("layers.0.bias", 1.0),
    InsertBlock("layers", 2, 1, ("weight",)),
    Gate("layers", 2),
    Number("", ("config", "size"), 5, 7),
)


def test_undo_gives_back_the_very_same_objects_and_bits():
    model = Model()
    known, layers, config = tensors(model), list(model.layers), dict(vars(model.config))
    _, surgery = operated(*EVERYTHING, model=model)
    assert surgery.change.before["head.bias"] is known["head.bias"][0] if "head.bias" in surgery.change.before else True
    surgery.undo()
    assert_undone(model, known)
    assert list(model.layers) == layers
    assert vars(model.config) == config
    assert model.head.weight is model.table.weight
    surgery.undo()
    assert_undone(model, known)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Widen("nowhere.weight", 0, ((0, 1),)), "nowhere"),
        (Widen("head.bias", 1, ((0, 1),)), r"head.bias has the shape \(7,\)"),
        (Widen("head.bias", 0, ((9, 1),)), r"head.bias has the shape \(7,\)"),
        (Widen("head.bias", 0, ((0, 1),), "noise"), "nothing is known of the filling 'noise'"),
        (Number("", ("size",), 6, 7), "size is 5 and not 6"),
        (Number("head", ("nothing",), 6, 7), "nothing"),
        (Number("", ("__class__",), 6, 7), "__class__ is no size"),
        (Number("", ("size",), 5, "rm"), "size is no size"),
        (InsertBlock("layers", 9, 0, ()), "layers holds 4 blocks"),
        (InsertBlock("layers", 0, 9, ()), "layers holds 4 blocks"),
        (InsertBlock("", 1, 0, ()), "the blocks of .* are not numbered"),
        (Gate("layers", 9), "9"),
    ],
)
def test_an_edit_that_does_not_fit_leaves_the_model_as_it_was(broken, message):
    model = Model()
    known, layers, size = tensors(model), list(model.layers), model.config.size
    with pytest.raises(LineageError, match=message) as caught:
        operated(*EVERYTHING, broken, model=model)
    assert "Expected the model for which it was planned" in str(caught.value)
    assert_undone(model, known)
    assert list(model.layers) == layers
    assert model.config.size == size


def test_a_parameter_that_is_computed_is_refused():
    model = Model()
    torch.nn.utils.parametrizations.weight_norm(model.layers[0])
    with pytest.raises(LineageError, match="layers.0.weight is computed, and no parameter or buffer"):
        operated(Widen("layers.0.weight", 0, ((4, 1),)), model=model)


def test_floats_are_compared_up_to_rounding():
    model = Model()
    model.scale = 1 / math.sqrt(3)
    operated(Number("", ("scale",), round(1 / math.sqrt(3), 14), 0.5), model=model)
    assert model.scale == 0.5


def test_the_random_streams_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = torch.get_rng_state()
    operated(InsertLayer("", 2, 1, 4, 0, 1), model=model)
    assert len(model) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_two_events_at_one_step_draw_other_numbers():
    drawn = [
        operated(Widen("layers.0.weight", 1, ((4, 5),), "like"), seed=3, step=7, number=number)[0].layers[0].weight
        for number in (0, 1, 1)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])


def test_attributes_of_parameters_go_with_them():
    model = Model()
    model.layers[0].weight.no_decay = True
    model.seen.unit = "m"
    widen = [Widen("layers.0.weight", 0, ((4, 1),)), Widen("seen", 0, ((5, 1),))]
    operated(InsertBlock("layers", 3, 0, ()), *widen, model=model)
    assert model.layers[0].weight.no_decay
    assert model.layers[3].weight.no_decay
    assert model.seen.unit == "m"


class Special(nn.Parameter):
    """A kind of its own."""


@pytest.mark.parametrize("kind", ["hook", "accumulate", "class"])
def test_a_parameter_that_would_lose_something_is_refused(kind):
    model = Model()
    if kind == "hook":
        model.layers[0].weight.register_hook(lambda gradient: gradient)
    elif kind == "accumulate":
        model.layers[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    else:
        model.layers[0].weight = Special(model.layers[0].weight.data)
    known = tensors(model)
    words = "is of the class Special" if kind == "class" else "has hooks on its gradient"
    with pytest.raises(GrowthRefusedError, match=f"The parameter layers.0.weight {words}.*Expected.*grow another part"):
        operated(Scale("head.weight", 2.0), Widen("layers.0.weight", 0, ((4, 1),)), model=model)
    assert_undone(model, known)
