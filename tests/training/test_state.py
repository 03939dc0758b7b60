import pytest
import torch

from utils.runtime.errors import CheckpointError
from utils.training.state import MigrationError, ModelChange, RunState
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
        self.value += 1


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
    willing.migrate(change)
    assert [willing[name].value[0].item() for name in willing] == [1, 1]
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
