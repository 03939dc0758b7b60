import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.edits import InsertLayer, LineageError, Number, Overwrite, Plan, Scale, Widen
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.transaction import GrowthUndoneError, grow_by
from utils.training.optimizer_migration import migrate_optimizer
from utils.training.state import MigrationError

GPT = {"vocab_size": 60, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 2, "dropout": 0.1}


@pytest.fixture
def trained():
    """A model with an optimizer that has taken some steps."""
    torch.manual_seed(0)
    adapter = ModelAdapter(utils.load_model("example:gpt", config=GPT))
    optimizer = torch.optim.AdamW(adapter.module.parameters(), 1e-2)
    for seed in range(4):
        step(adapter, optimizer, seed)
    return adapter, optimizer


def step(adapter, optimizer, seed):
    inputs = adapter.example_inputs(4, 12, seed=seed)
    torch.manual_seed(seed)
    adapter.module.train()
    optimizer.zero_grad()
    loss = adapter.loss(adapter.logits(inputs), inputs[adapter.main_input])
    loss.backward()
    optimizer.step()
    adapter.module.eval()
    return float(loss.detach())


def everything(adapter, optimizer):
    """All that a step depends on, by identity and by value."""
    return (
        {name: (id(p), p.detach().clone()) for name, p in adapter.module.named_parameters()},
        copy.deepcopy(optimizer.state_dict()),
        [id(p) for group in optimizer.param_groups for p in group["params"]],
        torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), adapter.num_parameters,
        {name: child.training for name, child in adapter.module.named_modules()},
    )  # fmt: skip


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert str(a) == str(b)
    for name, (identity, value) in one[0].items():
        assert two[0][name][0] == identity
        assert torch.equal(two[0][name][1], value)


@pytest.mark.parametrize("wish", [Request("depth", 1), Request("feed_forward", 8), Request("vocabulary", 3)],
                         ids=lambda wish: wish.operator)  # fmt: skip
def test_an_event_keeps_the_loss_and_its_undo_leaves_no_trace(trained, wish):
    adapter, optimizer = trained
    inputs = adapter.example_inputs(4, 12)
    before = everything(adapter, optimizer)

    def loss():
        return adapter.loss(adapter.logits(inputs), inputs[adapter.main_input])

    grown = grow_by(adapter, plan_growth(adapter, wish), inputs, loss, lambda c: migrate_optimizer(optimizer, c))
    certificate = grown.event.certificate
    assert certificate.passed
    assert certificate.double_difference < 1e-12
    assert abs(certificate.jump) < (1e-5 if wish.operator != "vocabulary" else 0.2)
    assert grown.event.parameters_after == adapter.num_parameters > grown.event.parameters_before
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(adapter.module.parameters())
    grown.undo()
    assert_same(before, everything(adapter, optimizer))


def test_it_trains_on_like_the_twin_that_did_not_grow(trained):
    """New units begin at zero: with a tiny learning rate the losses of both stay together, and all of them learn."""
    adapter, optimizer = trained
    twin, twin_optimizer = copy.copy(adapter), None
    twin.module = copy.deepcopy(adapter.module)
    twin_optimizer = torch.optim.AdamW(twin.module.parameters(), 1e-5)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, twin_optimizer):
        each.param_groups[0]["lr"] = 1e-5
    for wish in (Request("depth", 1), Request("feed_forward", 8)):
        plan = plan_growth(adapter, wish)
        grow_by(adapter, plan, adapter.example_inputs(), None, lambda c: migrate_optimizer(optimizer, c))
    for module in (adapter.module, twin.module):
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
    start = {name: p.detach().clone() for name, p in adapter.module.named_parameters()}
    for seed in range(5):
        assert step(adapter, optimizer, seed) == pytest.approx(step(twin, twin_optimizer, seed), abs=2e-3)
    still = [name for name, p in adapter.module.named_parameters() if torch.equal(p, start[name])]
    assert still == []


def test_a_function_that_is_not_kept_is_taken_back(trained):
    adapter, optimizer = trained
    before = everything(adapter, optimizer)
    wrong = Plan("depth", ("head",), (Overwrite("blocks.0.mlp.2.weight", 0.5),), 2, 3)
    with pytest.raises(GrowthUndoneError, match="depth from 2 to 3 in head was taken back: NOT KEPT") as caught:
        grow_by(adapter, wrong, adapter.example_inputs(), None, lambda c: migrate_optimizer(optimizer, c))
    assert caught.value.certificate.difference > 1e-3
    assert "1e-05 of the answers' size" in str(caught.value)
    assert_same(before, everything(adapter, optimizer))


def test_a_part_that_cannot_follow_leaves_all_as_it_was(trained):
    adapter, optimizer = trained
    before = everything(adapter, optimizer)

    def refuse(change):
        raise MigrationError("the optimizer keeps its past in one piece")

    with pytest.raises(GrowthUndoneError, match="keeps its past in one piece") as caught:
        grow_by(adapter, plan_growth(adapter, Request("depth", 1)), adapter.example_inputs(), None, refuse)
    assert caught.value.certificate is None
    assert_same(before, everything(adapter, optimizer))


def test_a_crash_in_the_middle_leaves_all_as_it_was(trained):
    adapter, optimizer = trained
    before = everything(adapter, optimizer)
    asked = []

    def loss():
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        grow_by(adapter, plan_growth(adapter, Request("depth", 1)), adapter.example_inputs(), loss,
                lambda c: migrate_optimizer(optimizer, c))  # fmt: skip
    assert_same(before, everything(adapter, optimizer))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Widen("blocks.9.x", 0, ((0, 1),)), "does not fit GPT"),
        (Widen("head.weight", 5, ((0, 1),)), "has the shape"),
        (Number("", ("__class__",), 1, 2), "is no size"),
        (Number("blocks.0.attn", ("nhead",), 77, 78), "is 2 and not 77"),
    ],
)
def test_a_plan_of_another_model_is_refused(trained, edit, words):
    adapter, optimizer = trained
    before = everything(adapter, optimizer)
    with pytest.raises(LineageError, match=words):
        grow_by(adapter, Plan("depth", (), (edit,), 1, 2), adapter.example_inputs())
    assert_same(before, everything(adapter, optimizer))


def test_another_process_may_say_no(trained):
    adapter, optimizer = trained
    before = everything(adapter, optimizer)
    plan = plan_growth(adapter, Request("depth", 1))
    with pytest.raises(GrowthUndoneError, match="taken back: kept"):
        grow_by(adapter, plan, adapter.example_inputs(), agree=lambda failed: True)
    assert_same(before, everything(adapter, optimizer))


def test_an_exact_plan_that_changes_the_last_place_is_called_bounded(trained):
    adapter, _ = trained
    exact = grow_by(adapter, plan_growth(adapter, Request("depth", 1)), adapter.example_inputs()).event
    assert exact.plan.promise == "exact"
    assert exact.certificate.double_difference == 0
    wide = replace(plan_growth(adapter, Request("feed_forward", 8)), promise="exact")
    wide = replace(wide, edits=(*wide.edits, Scale("head.weight", 1 + 2**-22)))
    wide = replace(wide, double_bound=1e-5)
    event = grow_by(adapter, wide, adapter.example_inputs()).event
    assert event.plan.promise == "bounded"
    assert "(bounded; " in event.describe()


def test_what_is_wrong_in_float64_alone_is_taken_back(trained):
    adapter, optimizer = trained
    before = everything(adapter, optimizer)
    wrong = Plan("depth", ("head",), (Scale("head.weight", 1 + 1e-6),), 2, 3)
    with pytest.raises(GrowthUndoneError, match="in float64 where 1e-09 is the bound"):
        grow_by(
            adapter, wrong, adapter.example_inputs(), None, lambda c: migrate_optimizer(optimizer, c), tolerance=0.1
        )
    assert_same(before, everything(adapter, optimizer))
    # A norm's epsilon is allowed, and more of it where the user allows more.
    epsilon = replace(wrong, double_bound=1e-5)
    assert grow_by(adapter, epsilon, adapter.example_inputs()).event.certificate.double_bound == 1e-5
    more = replace(epsilon, edits=(Scale("head.weight", 1 + 1e-4),))
    with pytest.raises(GrowthUndoneError):
        grow_by(adapter, more, adapter.example_inputs())
    assert grow_by(adapter, more, adapter.example_inputs(), tolerance=1e-3).event.certificate.double_bound == 1e-3


def test_a_half_precision_model_with_answers_in_float32_has_its_own_bound():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4, dtype=torch.bfloat16)

        def forward(self, x):
            return self.layer(x.to(self.layer.weight.dtype)).float()

    adapter = ModelAdapter(Half(), spec=ModelSpec(example_inputs={"x": torch.randn(4, 8)}))
    nothing = Plan("depth", ("layer",), (Scale("layer.weight", 1.0),), 1, 2)
    assert grow_by(adapter, nothing, adapter.example_inputs(4)).event.certificate.bound == 2e-2


@pytest.mark.parametrize("fails", [False, True])
def test_an_event_leaves_the_random_streams_alone(fails):
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    adapter = ModelAdapter(module, spec=ModelSpec(example_inputs={"input": torch.randn(4, 4)}))
    plan, inputs = plan_growth(adapter, Request("depth", 1)), adapter.example_inputs(4)
    assert any(isinstance(edit, InsertLayer) for edit in plan.edits)
    before = torch.get_rng_state()

    def migrate(change):
        torch.rand(3)
        if fails:
            raise MigrationError("it cannot")
        return lambda: None

    if fails:
        with pytest.raises(GrowthUndoneError):
            grow_by(adapter, plan, inputs, None, migrate)
    else:
        grow_by(adapter, plan, inputs, None, migrate)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_number_of_an_event_decides_what_is_drawn(trained):
    adapter, _ = trained
    plan, inputs = plan_growth(adapter, Request("feed_forward", 8)), adapter.example_inputs()
    drawn = []
    for number in (0, 1, 1):
        grown = grow_by(adapter, plan, inputs, number=number)
        drawn.append(adapter.module.get_parameter("blocks.0.mlp.0.weight").detach().clone())
        grown.undo()
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])
