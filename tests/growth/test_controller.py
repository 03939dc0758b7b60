"""Room on the device is asked for before a model grows, and all processes refuse together."""

from types import SimpleNamespace

import pytest
import torch

import utils
from utils.adapters import ModelAdapter
from utils.growth import controller
from utils.growth.budget import BudgetError, ModelSize
from utils.growth.config import GrowthConfig
from utils.growth.planning import plan_growth
from utils.growth.request import Request

SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}


@pytest.fixture
def asked(monkeypatch):
    """Check the budget of a device with some room; return which devices were measured, and the model's parameters."""
    adapter = ModelAdapter(utils.load_model("example:gpt", config=SMALL))
    plan = plan_growth(adapter, Request("feed_forward", 64))

    def check(device, free, others=False, **limits):
        measured = []
        view = SimpleNamespace(device=torch.device(device), module=adapter.module, example_inputs=dict)

        def size(*_):
            measured.append(device)
            count = sum(p.numel() for p in adapter.module.parameters())
            return ModelSize(count, count, 16 * count)

        monkeypatch.setattr(controller, "model_size", size)
        monkeypatch.setattr(controller, "room", lambda where: free if where == view.device else None)
        monkeypatch.setattr(controller, "agreed", lambda flag: flag or others)
        session = SimpleNamespace(run=SimpleNamespace(adapter=view, config=None, data=None))
        before = [id(p) for p in adapter.module.parameters()]
        try:
            controller.Controller(GrowthConfig(**limits)).check_budget(session, plan, 0)
        finally:
            assert [id(p) for p in adapter.module.parameters()] == before
        return measured

    return check


def test_a_gpu_without_room_refuses_without_any_limit(asked):
    assert asked("cuda", 10**9) == ["cuda", "cuda"]
    with pytest.raises(
        BudgetError, match=r"more memory, a reserve of 15% included, and 10 B are free. .*beside what runs"
    ):
        asked("cuda", 10)


def test_a_cpu_is_asked_where_limits_are_set(asked):
    assert asked("cpu", 0) == []
    assert asked("cpu", 10**9, max_parameters=10**9) == ["cpu", "cpu"]
    with pytest.raises(BudgetError, match="are free"):
        asked("cpu", 10, max_parameters=10**9)


def test_one_process_without_room_stops_all(asked):
    with pytest.raises(
        BudgetError, match="Another process has no room for feed_forward from 128 to 192.*Expected room"
    ):
        asked("cuda", 10**9, others=True)
