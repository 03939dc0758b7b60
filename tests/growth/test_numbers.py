"""As few numbers change as it takes, each once, and those that count the same thing elsewhere follow by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.growth.toys import Toy, adapted
from utils.growth.edits import GrowthRefusedError, InsertBlock, Number, Plan, Widen
from utils.growth.numbers import candidates, counts, owned_sizes, renumbered, settled
from utils.growth.scratch import Scratch


class Conv1D(nn.Module):
    """A linear layer of one's own that keeps one size."""

    def __init__(self, out):
        super().__init__()
        self.nf, self.weight = out, nn.Parameter(torch.randn(4, out))


@pytest.mark.parametrize(
    ("layer", "name", "axis", "expected"),
    [
        (nn.Linear(4, 6), "weight", 0, [("out_features", 6)]),
        (nn.Linear(4, 6), "weight", 1, [("in_features", 4)]),
        (nn.Linear(4, 6), "bias", 0, []),
        (nn.Embedding(6, 4), "weight", 0, [("num_embeddings", 6)]),
        (nn.Embedding(6, 4), "weight", 1, [("embedding_dim", 4)]),
        (nn.Conv2d(4, 6, 3), "weight", 0, [("out_channels", 6)]),
        (nn.Conv2d(4, 6, 3), "weight", 1, [("in_channels", 4)]),
        (nn.ConvTranspose2d(4, 6, 3), "weight", 0, [("in_channels", 4)]),
        (nn.BatchNorm2d(6), "weight", 0, [("num_features", 6)]),
        (nn.GroupNorm(2, 6), "weight", 0, [("num_channels", 6)]),
        (nn.LayerNorm(6), "weight", 0, [("normalized_shape", (6,))]),
        (nn.LayerNorm((3, 6)), "weight", 1, [("normalized_shape", (3, 6))]),
        (nn.PReLU(6), "weight", 0, []),
        (Conv1D(6), "weight", 1, [("nf", 6)]),
        (Conv1D(4), "weight", 0, [("nf", 4)]),
    ],
)
def test_layers_say_their_own_sizes(layer, name, axis, expected):
    module = nn.ModuleDict({"layer": layer})
    size = layer.get_parameter(name).shape[axis]
    found = owned_sizes(module, f"layer.{name}", axis, size, size + 2)
    assert [(number.path[0], number.before) for number in found] == expected
    assert all(number.owner == "layer" for number in found)
    for number in found:
        after = number.after[-1] if isinstance(number.after, tuple) else number.after
        assert after == size + 2
        assert getattr(layer, number.path[0]) == number.before


def test_every_owner_of_a_tied_weight_has_a_size():
    model = Toy(tied=True)
    found = owned_sizes(model, "tokens.weight", 0, 37, 40)
    assert {(number.owner, number.path[0]) for number in found} == {
        ("tokens", "num_embeddings"),
        ("head", "out_features"),
    }


class Labels:
    """A config that computes one of its numbers."""

    def __init__(self):
        self.names, self.size, self.flag, self.ratio = {"a": 1}, 6, True, 6.0
        self.inner = SimpleNamespace(size=6, deeper=SimpleNamespace(size=6))
        self.table = {"size": 6, "other": 5}

    @property
    def count(self):
        return 6

    @count.setter
    def count(self, value):
        raise NotImplementedError

    @property
    def fixed(self):
        return 6


def test_numbers_are_found_in_modules_and_their_configs():
    model = nn.ModuleDict({"a": nn.Identity(), "own": Conv1D(6)})
    model["own"].config, model["own"]._hidden = Labels(), 6
    found = candidates(model, ["own", "own", "a"], 6, 7)
    assert {number.path for number in found} == {
        ("nf",),
        ("config", "size"),
        ("config", "inner", "size"),
        ("config", "table", "size"),
        ("config", "count"),
    }
    assert all((number.owner, number.before, number.after) == ("own", 6, 7) for number in found)


def test_a_config_that_two_modules_share_is_found_once():
    shared = SimpleNamespace(size=6)
    model = nn.ModuleDict({"a": Conv1D(3), "b": Conv1D(3)})
    model["a"].config = model["b"].config = shared
    assert candidates(model, ["a", "b"], 6, 7) == [Number("a", ("config", "size"), 6, 7)]


class Split(nn.Module):
    """A pair whose inner width is a number, beside others of the same value."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.inner, self.patience, self.hidden_units = 24, 24, 24

    def forward(self, x):
        return x + self.down(self.up(x).tanh()[..., : self.inner])


def split_toy():
    model = Toy()
    model.blocks = nn.ModuleList(Split() for _ in range(2))
    return model


def wider(model, blocks=(0, 1)):
    edits = []
    for number in blocks:
        for name, axis, fill in (("up.weight", 0, "like"), ("up.bias", 0, "zero"), ("down.weight", 1, "zero")):
            edits.append(Widen(f"blocks.{number}.{name}", axis, ((24, 2),), fill))
            edits += owned_sizes(model, f"blocks.{number}.{name}", axis, 24, 26)
    return Plan("feed_forward", tuple(f"blocks.{number}" for number in blocks), tuple(edits), 24, 26)


def changed(plan):
    return {(edit.owner, edit.path[-1]) for edit in plan.edits if isinstance(edit, Number)} - {
        (f"blocks.{number}.{layer}", f"{side}_features")
        for number in range(2)
        for layer, side in (("up", "out"), ("down", "in"))
    }


def test_only_what_has_to_change_does():
    model = split_toy()
    plan = settled(Scratch(adapted(model)), wider(model), [(24, 26)])
    assert changed(plan) == {("blocks.0", "inner"), ("blocks.1", "inner")}


def test_numbers_follow_by_name():
    model = split_toy()
    plan = settled(Scratch(adapted(model)), wider(model), [(24, 26)], ("hidden_units",))
    assert changed(plan) == {(f"blocks.{n}", name) for n in range(2) for name in ("inner", "hidden_units")}


def test_numbers_elsewhere_follow_only_when_all_may():
    model = split_toy()
    model.config.hidden_units = 24
    scratch = Scratch(adapted(model))
    for everywhere in (True, False):
        plan = settled(scratch, wider(model, (0,)), [(24, 26)], ("hidden_units",), everywhere=everywhere)
        assert (("", "hidden_units") in changed(plan)) == everywhere
    assert ("blocks.1", "hidden_units") not in changed(plan)


def test_a_follower_that_would_change_the_function_stays():
    class Scaled(Split):
        def forward(self, x):
            return super().forward(x) * self.hidden_units / 24

    model = split_toy()
    model.blocks = nn.ModuleList(Scaled() for _ in range(2))
    plan = settled(Scratch(adapted(model)), wider(model), [(24, 26)], ("hidden_units", "patience"))
    assert changed(plan) == {(f"blocks.{n}", name) for n in range(2) for name in ("inner", "patience")}


def test_a_number_that_a_plan_has_changed_is_not_changed_again():
    model = split_toy()
    plan = wider(model)
    mine = tuple(Number(f"blocks.{number}", ("hidden_units",), 24, 26) for number in range(2))
    plan = Plan(plan.operator, plan.where, (*plan.edits, *mine), 24, 26)
    settled_plan = settled(Scratch(adapted(model)), plan, [(24, 26)], ("hidden_units",))
    assert sum(edit == mine[0] for edit in settled_plan.edits) == 1


def test_what_also_has_to_hold_is_asked_of_every_choice():
    model = split_toy()
    scratch = Scratch(adapted(model))
    plan = settled(
        scratch,
        wider(model),
        [(24, 26)],
        also=lambda _: None if scratch.module.blocks[1].patience == 26 else "impatient",
    )
    assert ("blocks.1", "patience") in changed(plan)


def test_nothing_that_helps_is_refused_with_the_first_problem():
    class Written(Split):
        def forward(self, x):
            return x + self.down(self.up(x).tanh()[..., :24])

    model = split_toy()
    model.blocks = nn.ModuleList(Written() for _ in range(2))
    with pytest.raises(GrowthRefusedError, match="feed_forward from 24 to 26 in blocks.0, blocks.1 does not keep"):
        settled(Scratch(adapted(model)), wider(model), [(24, 26)])


def inserted(blocks=1, place=1):
    edits = tuple(InsertBlock("blocks", place + 1, place, ()) for _ in range(blocks))
    return Plan("depth", (), edits, 2, 2 + blocks)


def test_numbers_that_count_layers_come_first_and_every_combination_once():
    model = Toy()
    model.config.batch = 2
    tried = [plan.edits[1:] for plan in counts(model, inserted(), 2, 3)]
    assert tried[0] == (Number("", ("config", "n_layer"), 2, 3),)
    assert () in tried
    assert (Number("", ("config", "batch"), 2, 3),) in tried
    assert len(tried) == len(set(tried)) == 4


def test_lists_with_an_entry_per_block_follow_the_block_that_is_copied():
    model = Toy()
    model.config.layer_types = ["first", "second"]
    plan = next(counts(model, inserted(2, 0), 2, 4))
    assert plan.edits[-1] == Number(
        "", ("config", "layer_types"), ("first", "second"), ("first", "first", "first", "second")
    )


def test_places_count_on_behind_the_new_blocks():
    model = Toy(blocks=3)
    stack = [f"blocks.{number}" for number in range(3)]
    plans = list(renumbered(model, inserted(2, 0), stack, 0, 2))
    numbers = [edit for edit in plans[0].edits if isinstance(edit, Number)]
    assert numbers == [
        Number("blocks.1", ("index",), 0, 1),
        Number("blocks.2", ("index",), 0, 2),
        Number("blocks.3", ("index",), 1, 3),
        Number("blocks.4", ("index",), 2, 4),
    ]
    assert plans[1] == inserted(2, 0)


def test_equal_numbers_are_no_places():
    model = Toy(blocks=2)
    for block in model.blocks:
        block.index = 7
    assert list(renumbered(model, inserted(), ["blocks.0", "blocks.1"], 1, 1)) == [inserted()]


class Other(nn.Module):
    """A block of another kind, which knows its place too."""

    def __init__(self, index):
        super().__init__()
        self.place = index
        self.mix = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.mix(x).tanh()


def hybrid():
    """Blocks of two kinds in turn; the config counts them all, and knows the kind of each."""
    model = Toy(blocks=4)
    model.blocks[1], model.blocks[3] = Other(1), Other(3)
    model.config.kinds = ["attention", "other"] * 2
    model.config.period_of_blocks = 2
    return model


def test_between_the_blocks_of_a_stack_others_are_counted_and_move_on():
    model = hybrid()
    stack = ["blocks.0", "blocks.2"]
    numbers = {
        (edit.owner, *edit.path): (edit.before, edit.after)
        for plan in [next(renumbered(model, inserted(1, 0), stack, 0, 1))]
        for edit in plan.edits
        if isinstance(edit, Number)
    }
    assert numbers == {
        ("blocks.1", "index"): (0, 1),
        ("blocks.3", "index"): (2, 3),
        ("blocks.2", "place"): (1, 2),
        ("blocks.4", "place"): (3, 4),
    }
    tried = [plan.edits[1:] for plan in counts(model, inserted(1, 0), 2, 3)]
    # What counts all layers comes before what is as large as the stack by chance.
    assert tried[0] == (Number("", ("config", "n_layer"), 4, 5),)
    kinds = ("attention", "attention", "other", "attention", "other")
    assert (Number("", ("config", "kinds"), ("attention", "other") * 2, kinds),) == tried[1][1:]


def test_a_count_of_one_kind_of_block_stays_within_the_stack():
    model = hybrid()
    model.blocks[0].index, model.blocks[2].index = 0, 1
    numbers = [
        edit
        for edit in next(renumbered(model, inserted(1, 0), ["blocks.0", "blocks.2"], 0, 1)).edits
        if isinstance(edit, Number) and edit.path == ("index",)
    ]
    assert numbers == [Number("blocks.1", ("index",), 0, 1), Number("blocks.3", ("index",), 1, 2)]


def test_a_single_block_of_its_kind_moves_on_when_its_number_is_its_place():
    model = hybrid()
    model.blocks[1] = Toy(blocks=1).blocks[0]
    model.blocks[1].index = 1
    del model.blocks[3].place
    model.blocks[3].block_idx, model.blocks[3].classes = 3, 7
    plan = next(renumbered(model, inserted(1, 0), ["blocks.0", "blocks.1", "blocks.2"], 0, 1))
    assert Number("blocks.4", ("block_idx",), 3, 4) in plan.edits
    assert not [edit for edit in plan.edits if isinstance(edit, Number) and edit.path == ("classes",)]


def test_a_size_that_a_layer_no_longer_has_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 6))
    model[0].out_features = 99
    assert owned_sizes(model, "0.weight", 0, 6, 8) == []


def test_what_runs_and_changes_is_refused_with_what_changes():
    class Summed(Split):
        def forward(self, x):
            return x + self.down(self.up(x).softmax(-1))

    model = split_toy()
    model.blocks = nn.ModuleList(Summed() for _ in range(2))
    with pytest.raises(GrowthRefusedError, match=r"the output changes by .* without notice of new ones"):
        settled(Scratch(adapted(model)), wider(model), [(24, 26)])
