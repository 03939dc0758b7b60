"""Plans are tried on a copy: the model stays untouched, and every way to be wrong has its own words."""

import threading

import pytest
import torch
from torch import nn

from tests.growth.toys import Toy, adapted, assert_undone, tensors
from utils.growth.edits import GrowthRefusedError, InsertBlock, Number, Overwrite, Plan, Scale, Widen
from utils.growth.scratch import Scratch, changed_by, identity_error

ZEROED = ("attention.out.weight", "attention.out.bias", "down.weight", "down.bias")
COUNT = Number("", ("config", "n_layer"), 2, 3)


def plan(*edits, outputs=None):
    return Plan("test", (), edits, 2, 3, "exact", outputs)


def wide(fill="zero"):
    """More hidden units in block 0, with something in the columns that lead out."""
    return plan(
        Widen("blocks.0.up.weight", 0, ((24, 2),), "like"),
        Widen("blocks.0.up.bias", 0, ((24, 2),)),
        Widen("blocks.0.down.weight", 1, ((24, 2),), fill),
    )


def test_the_model_and_the_copy_stay_as_they_are():
    model = Toy(tied=True)
    model.train()
    model.blocks[0].eval()
    known = tensors(model)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    scratch = Scratch(adapted(model))
    copied = tensors(scratch.module)
    state = torch.random.get_rng_state()
    trial = scratch.attempt(plan(InsertBlock("blocks", 2, 1, ZEROED), COUNT), must_run=["blocks.2"])
    assert trial.problem is None
    assert trial.difference == 0
    assert_undone(model, known)
    assert_undone(scratch.module, copied)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.blocks[0].training
    assert not scratch.module.training
    assert (model.head.weight.grad == 1).all()
    assert all(parameter.grad is None for parameter in scratch.module.parameters())
    assert scratch.module is not model
    assert scratch.module.head.weight is scratch.module.tokens.weight


def test_double_precision_where_the_model_can():
    class Single(Toy):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids).float()

    assert Scratch(adapted(Toy())).exact
    assert Scratch(adapted(Toy())).expected.dtype == torch.float64
    single = Scratch(adapted(Single()))
    assert not single.exact
    assert single.expected.dtype == torch.float32
    assert next(single.module.parameters()).dtype == torch.float32


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        assert Scratch(adapted(Toy())).attempt(wide()).problem is None


def test_each_way_to_be_wrong_is_told_apart():
    scratch = Scratch(adapted(Toy()))
    cases = {
        "RuntimeError: ": (plan(Widen("blocks.0.up.weight", 0, ((24, 2),), "like")), {}),
        "the output changes by ": (wide("like"), {}),
        "blocks.2 is never run": (plan(InsertBlock("blocks", 2, 1, ZEROED)), {"must_run": ["blocks.2"]}),
        "what is new gets no gradient": (plan(InsertBlock("blocks", 2, 1, ZEROED)), {}),
        "The growth step test from 2 to 3 in the model does not fit": (plan(Scale("nothing", 2.0)), {}),
        "no, thanks": (wide(), {"also": lambda surgery: "no, thanks"}),
        "ZeroDivisionError": (wide(), {"also": lambda surgery: 1 // 0}),
    }
    for message, (tried, options) in cases.items():
        trial = scratch.attempt(tried, **options)
        assert trial.problem is not None
        assert trial.problem.startswith(message)
        assert trial.ran == (not message.startswith(("RuntimeError", "The growth step", "ZeroDivision")))


def test_what_needs_no_gradient_may_go_without():
    scratch = Scratch(adapted(Toy()))
    assert scratch.attempt(plan(InsertBlock("blocks", 2, 1, ZEROED)), learns=False).problem is None


def test_what_is_frozen_has_nothing_to_learn():
    model = Toy()
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    assert Scratch(adapted(model)).attempt(wide()).problem == "what is new would be frozen, as what it belongs to"
    model.blocks[0].down.weight.requires_grad_(True)
    assert Scratch(adapted(model)).attempt(wide()).problem is None


def test_both_sides_at_zero_never_learn():
    both = plan(
        Widen("blocks.0.up.weight", 0, ((24, 2),)),
        Widen("blocks.0.up.bias", 0, ((24, 2),)),
        Widen("blocks.0.down.weight", 1, ((24, 2),)),
    )
    assert Scratch(adapted(Toy())).attempt(both).problem == "what is new gets no gradient"


def test_more_outputs_than_before_are_compared_up_to_the_old_number():
    edits = Widen("head.weight", 0, ((37, 2),), "mean"), Widen("head.bias", 0, ((37, 2),), "mean")
    scratch = Scratch(adapted(Toy()))
    assert scratch.attempt(plan(*edits, outputs=37)).problem is None
    assert scratch.attempt(plan(*edits)).problem == "the output changes by inf of its size"


def test_a_model_that_cannot_be_copied_is_refused():
    model = Toy()
    adapter = adapted(model)
    model.lock = threading.Lock()
    with pytest.raises(
        GrowthRefusedError, match="Toy cannot be copied and run .TypeError: .* Move what cannot be copied"
    ):
        Scratch(adapter)


def test_the_call_of_a_block_is_what_it_was_given():
    scratch = Scratch(adapted(Toy()))
    args, kwargs = scratch.block_call("blocks.1")
    assert args[0].shape == (2, scratch.inputs["input_ids"].shape[1], 16)
    assert kwargs == {}


def test_a_block_that_is_not_called_once_is_refused():
    class Idle(Toy):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(4, 4)

    with pytest.raises(GrowthRefusedError, match="The block idle runs 0 times in one forward pass"):
        Scratch(adapted(Idle())).block_call("idle")


def test_changes_are_a_share_of_the_answers_size():
    old = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert changed_by(old, old) == 0
    assert changed_by(old, old + torch.tensor([0.0, 0.25, 0.0, 0.0])) == pytest.approx(0.25)
    assert changed_by(10 * old, 10 * old + 1) == pytest.approx(0.1)
    assert changed_by(old, old[:3]) == float("inf")
    assert changed_by(old[:3], old, outputs=3) == 0
    constant = torch.full((3,), 5.0)
    assert changed_by(constant, constant + 1) == pytest.approx(0.2)
    assert changed_by(torch.zeros(2), torch.tensor([0.0, 3.0])) == 3


def test_infinite_answers_must_stay_where_they_were():
    old = torch.tensor([1.0, float("-inf"), 2.0])
    assert changed_by(old, old.clone()) == 0
    assert changed_by(old, torch.tensor([1.0, 0.0, 2.0])) == float("inf")
    assert changed_by(old, torch.tensor([float("nan"), float("-inf"), 2.0])) == float("inf")
    nothing = torch.full((2,), float("nan"))
    assert changed_by(nothing, nothing) == 0


def test_the_identity_and_what_is_not():
    x = torch.randn(2, 8)
    assert identity_error(nn.Identity(), (x,), {}) == 0
    assert identity_error(nn.Linear(8, 8), (x,), {}) > 0.1
    assert identity_error(nn.Linear(8, 4), (x,), {}) == float("inf")
    assert identity_error(nn.Linear(3, 4), (x,), {}) == float("inf")


def test_a_seed_draws_what_is_drawn():
    scratch = Scratch(adapted(Toy()))
    changed = [
        scratch.attempt(plan(Overwrite("norm.bias", 0.0), *wide("like").edits), seed=s).difference for s in (1, 1, 2)
    ]
    assert changed[0] == changed[1] != changed[2]


class Written(Toy):
    """A number that only counts with padding, or with a cache."""

    def __init__(self, what):
        super().__init__()
        self.what, self.hidden = what, 24

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        if (attention_mask is not None and self.what == "mask") or (use_cache and self.what == "cache"):
            assert self.blocks[0].up.weight.shape[0] == self.hidden
        return super().forward(input_ids)


@pytest.mark.parametrize("what", ["mask", "cache"])
def test_padding_and_a_cache_are_tried_too(what):
    model = Written(what)
    scratch = Scratch(adapted(model))
    asked, answered = scratch.other
    assert {"attention_mask", "use_cache"} < asked.keys()
    assert not asked["attention_mask"].all()
    assert answered.shape[1] > scratch.expected.shape[1]
    assert scratch.attempt(wide()).problem.startswith("AssertionError")
    told = plan(*wide().edits, Number("", ("hidden",), 24, 26))
    assert scratch.attempt(told).problem is None


def test_what_changes_with_padding_only_is_a_problem():
    class Masked(Toy):
        def forward(self, input_ids, attention_mask=None):
            extra = 0.0 if attention_mask is None else self.blocks[0].up.weight.sum()
            return super().forward(input_ids) * (1 + extra)

    assert "with attention_mask the output changes" in Scratch(adapted(Masked())).attempt(wide()).problem
