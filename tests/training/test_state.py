import pytest
import torch

from utils.runtime.errors import CheckpointError
from utils.training.state import Insertion, MigrationError, ModelChange, RunState, TensorChange
from utils.training.stream import SampleStream


class Counter:
    def __init__(self, refuses: bool = False) -> None:
        self.value, self.refuses = torch.zeros(2), refuses

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]

    def migrate(self, change):
        if self.refuses:
            raise MigrationError("it is a test")
        before = self.value.clone()
        self.value += 1
        return lambda: self.value.copy_(before)


def test_states_are_saved_and_loaded_by_name():
    first, second = RunState({"a": Counter()}), RunState({"a": Counter()})
    first["a"].value += 5
    second.load_state_dict(first.state_dict())
    assert second["a"].value.tolist() == [5, 5]


def test_a_missing_and_an_unknown_state_are_named():
    state = RunState({"optimizer": Counter()})
    with pytest.raises(CheckpointError, match=r"lacks the state of \['optimizer'\] and has state for \['buffer'\]"):
        state.load_state_dict({"buffer": {}})


def test_a_name_is_taken_once():
    state = RunState({"a": Counter()})
    with pytest.raises(ValueError, match="a part named 'a' already"):
        state.add("a", Counter())


def test_a_migration_reaches_every_part_or_none():
    change = ModelChange("insert_block", step=12)
    willing = RunState({"a": Counter(), "b": Counter()})
    undo = willing.migrate(change)
    assert [willing[name].value[0].item() for name in willing] == [1, 1]
    undo()
    assert [willing[name].value[0].item() for name in willing] == [0, 0]
    mixed = RunState({"a": Counter(), "b": Counter(refuses=True), "c": Counter()})
    with pytest.raises(
        MigrationError, match=r"'b' cannot follow insert_block at step 12: it is a test Nothing was changed"
    ):
        mixed.migrate(change)
    assert [mixed[name].value[0].item() for name in mixed] == [0, 0, 0]


def test_the_data_position_follows_any_change():
    stream = SampleStream({"x": torch.arange(4)}, 2, 0)
    stream.advance()
    stream.migrate(ModelChange("insert_block", step=1))
    assert stream.consumed == 2


def test_new_entries_go_where_they_were_inserted():
    insertion = Insertion(1, ((0, 1), (2, 2)))
    made = insertion.applied(torch.tensor([[1, 2, 3]]), lambda shape: torch.full(shape, 9))
    assert made.tolist() == [[9, 1, 2, 9, 9, 3]]


def test_what_belongs_to_a_tensor_is_carried_over_entry_by_entry():
    how = TensorChange("w", insertions=(Insertion(0, ((1, 1),)), Insertion(1, ((2, 1),))))
    moment = torch.tensor([[1.0, 2.0]])
    assert how.carried(moment).tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert how.carried(moment, mean=True).tolist() == [[1.0, 2.0, 1.5], [1.5, 1.5, 1.5]]
    assert how.carried(moment, factor=0.5).tolist() == [[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert TensorChange("w").carried(moment) is not moment


def test_a_tensor_that_no_change_names_is_as_it_was():
    change = ModelChange("widen", 1, changes={"b": TensorChange("a")})
    assert change.of("c") == TensorChange("c")
    assert change.of("b").source == "a"
