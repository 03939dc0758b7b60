"""Inside the block anything may happen to the model; afterwards it is as it was."""

import gc
import io
import logging
import os
import random
import signal
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from utils.runtime import isolation, surroundings
from utils.runtime.isolation import ModelChangedError, preserved


class Counting(nn.Module):
    """Has everything that a forward pass can disturb."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.calls = 0
        self.cache = {}
        self.history = []

    def forward(self, x):
        self.calls += 1
        self.cache["last"] = x
        self.history.append(x.sum())
        self.surprise = x
        return self.drop(self.norm(self.linear(x))) + self.frozen


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Counting()


def test_everything_is_put_back(model):
    model.linear.weight.grad = torch.ones(4, 4)
    grad = model.linear.weight.grad
    model.norm.eval()
    before, modes = snapshot(model), [child.training for child in model.modules()]
    with preserved(model, 0):
        assert model.linear.weight.grad is None
        model.train()
        model(torch.randn(3, 4)).sum().backward()
        model.frozen.requires_grad_(True)
        model.extra = nn.Linear(1, 1)
        model.register_buffer("late", torch.zeros(1))
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert [child.training for child in model.modules()] == modes
    assert model.linear.weight.grad is grad
    assert torch.equal(grad, torch.ones(4, 4))
    assert model.linear.bias.grad is None
    assert not model.frozen.requires_grad
    assert (model.calls, model.cache, model.history) == (0, {}, [])
    assert not hasattr(model, "surprise")
    assert not hasattr(model, "extra")
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_random_streams_are_the_blocks_own(model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with preserved(model, 7):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with preserved(model, 7):
        assert torch.equal(torch.rand(2), first)


def test_a_replaced_buffer_and_parameter_come_back(model):
    mean, weight = model.norm.running_mean, model.linear.weight
    with preserved(model):
        model.norm.running_mean = torch.ones(4)
        model.linear.weight = nn.Parameter(torch.zeros(4, 4))
    assert model.norm.running_mean is mean
    assert model.linear.weight is weight


def test_everything_is_put_back_after_an_error(model):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), preserved(model):
        model(torch.randn(3, 4))
        1 / 0  # noqa: B018
    assert model.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_training_inside_the_block_is_an_error_that_names_the_parameter(model):
    with pytest.raises(ModelChangedError) as caught, preserved(model), torch.no_grad():
        model.linear.weight.add_(1)
        model.linear.bias.add_(1)
    text = str(caught.value)
    assert "changed the values of linear.weight and 1 more parameter." in text
    assert "never its parameters" in text
    assert "in-place operations" in text


def test_one_changed_parameter_reads_as_one(model):
    with pytest.raises(ModelChangedError, match=r"the values of linear\.bias\. A model may"), preserved(model):
        model.linear.bias.data.add_(0)
        model.linear.bias.detach().add_(1)


class Own:
    """A simple object of the model's own code."""

    def __init__(self):
        self.count = 0


class Everything(nn.Module):
    """State of every kind that `preserved` promises to put back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.nested = {"list": [], "inner": {"set": {1}}, "tuple": ([],)}
        self.queue, self.names, self.own = deque([1], maxlen=3), SimpleNamespace(k=[0]), Own()
        self.ordered, self.default = OrderedDict(a=1, b=2), defaultdict(list)
        self.stream, self.dice = torch.Generator().manual_seed(1), random.Random(1)

    def forward(self, x):
        self.tensor += 1
        self.array += 1
        self.nested["list"].append(1)
        self.nested["inner"]["set"].add(2)
        self.nested["tuple"][0].append(1)
        self.queue.append(2)
        self.names.k.append(1)
        self.names.late = 1
        self.own.count += 1
        self.ordered.move_to_end("a")
        self.default["x"].append(1)
        torch.rand(1, generator=self.stream)
        self.dice.random()
        self.linear.register_forward_hook(lambda *_: None)
        self.linear.register_forward_pre_hook(lambda *_: None)
        self.linear.register_full_backward_hook(lambda *_: None)
        return self.linear(x)


def test_state_of_every_kind_comes_back():
    model = Everything()
    kept = {name: id(value) for name, value in vars(model).items()}
    stream, dice = model.stream.get_state(), model.dice.getstate()
    with preserved(model, 0):
        model(torch.randn(2, 4))
        assert model.own.count == 1
    assert {name: id(value) for name, value in vars(model).items()} == kept, "the very same objects"
    assert (model.tensor.tolist(), model.array.tolist()) == ([0, 0], [0, 0])
    assert model.nested == {"list": [], "inner": {"set": {1}}, "tuple": ([],)}
    assert (list(model.queue), vars(model.names), model.own.count) == ([1], {"k": [0]}, 0)
    assert (list(model.ordered), dict(model.default)) == (["a", "b"], {})
    assert torch.equal(model.stream.get_state(), stream)
    assert model.dice.getstate() == dice
    assert not model.linear._forward_hooks
    assert not model.linear._forward_pre_hooks
    assert not model.linear._backward_hooks


def test_hooks_that_were_there_stay(model):
    seen = []
    handle = model.linear.register_forward_hook(lambda *_: seen.append(1))
    with preserved(model):
        handle.remove()
        model(torch.randn(3, 4))
    assert seen == []
    model.linear(torch.randn(3, 4))
    assert seen == [1]


def test_global_settings_come_back(model):
    def settings():
        return (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_device(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.backends.cudnn.benchmark,
            torch.is_anomaly_enabled(),
        )

    before = settings()
    with preserved(model):
        torch.set_num_threads(before[0] + 1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_default_device("meta")
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.backends.cudnn.benchmark = not before[5]
        torch.autograd.set_detect_anomaly(True)
    assert settings() == before
    assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.mul_(0.5),
        lambda p: p.data.neg_(),
        lambda p: p.detach().add_(1),
        lambda p: setattr(p, "data", p.data * 2),
        lambda p: setattr(p, "data", p.data.double()),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_changed_parameters_get_their_values_back(model, change, nested):
    before = snapshot(model)
    with pytest.raises(ModelChangedError, match=r"the values of linear\.weight") as caught:  # noqa: SIM117
        with preserved(model):
            if nested:
                with pytest.raises(ModelChangedError), preserved(model):
                    change(model.linear.weight)
                assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
            change(model.linear.weight)
    assert (caught.value.names, caught.value.restored) == (("linear.weight",), True)
    assert model.linear.weight.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_nan_and_unchanged_writes_are_no_change(model):
    with torch.no_grad():
        model.linear.weight[0, 0] = float("nan")
    with preserved(model), torch.no_grad():
        model.linear.weight.mul_(1)


@pytest.mark.parametrize("change", [lambda p: p.data.mul_(0.5), lambda p: p.data.neg_(), lambda p: p.detach().add_(1)])
def test_a_large_model_is_watched_and_the_error_says_that_values_are_lost(model, change, monkeypatch):
    monkeypatch.setattr(isolation, "COPY_BYTES", 10)
    with preserved(model):
        model(torch.randn(3, 4))
    with (
        pytest.raises(ModelChangedError, match="could not be put back: load the model again") as caught,
        preserved(model),
    ):
        change(model.linear.weight)
    assert (caught.value.names, caught.value.restored) == (("linear.weight",), False)
    assert not isolation._COPIES
    assert not isolation._SUMMED


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
def test_scripted_and_inference_models():
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.randn(3, 2))
    scripted.train()
    before = snapshot(scripted)
    with preserved(scripted):
        scripted.eval()
        scripted(torch.randn(3, 2)).sum().backward()
    assert scripted.training
    assert all(torch.equal(value, before[name]) for name, value in snapshot(scripted).items())
    assert all(parameter.grad is None for parameter in scripted.parameters())
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    with preserved(frozen), torch.inference_mode():
        frozen(torch.randn(1, 2))


def test_settings_of_the_process_come_back(model, monkeypatch, tmp_path):
    monkeypatch.setenv("SEEDBED_TEST", "before")

    def settings():
        return (
            dict(os.environ), os.getcwd(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
            list(warnings.filters), logging.getLogger().level, list(logging.getLogger().handlers), sys.stdout,
            sys.excepthook, sys.getrecursionlimit(), list(sys.path), gc.isenabled(), np.geterr(),
            torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled(),
            len(nn.modules.module._global_forward_hooks), logging.root.manager.disable,
        )  # fmt: skip

    before = settings()
    with preserved(model):
        os.environ["SEEDBED_TEST"] = "after"
        os.environ["SEEDBED_NEW"] = "1"
        os.chdir(tmp_path)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(1)
        logging.getLogger().addHandler(logging.NullHandler())
        logging.disable(logging.CRITICAL)
        sys.stdout = io.StringIO()
        sys.excepthook = print
        sys.setrecursionlimit(5000)
        sys.path.insert(0, "nowhere")
        gc.disable()
        np.seterr(all="ignore")
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_flash_sdp(False)
        nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert settings() == before


def test_a_folder_that_is_gone_cannot_come_back(model, monkeypatch, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with preserved(model):
        os.chdir(tmp_path)
        inside.rmdir()
    assert os.getcwd() == str(tmp_path)


def test_a_setting_that_cannot_be_restored_keeps_no_other(model, monkeypatch):
    value = {"first": 1, "last": 1}

    def stuck(now):
        raise OSError("it is stuck")

    def put_last(now):
        value["last"] = now

    monkeypatch.setattr(surroundings, "SETTINGS", (
        (lambda: value["first"], stuck), (lambda: value["last"], put_last)
    ))  # fmt: skip
    weight = model.linear.weight

    def change():
        with preserved(model):
            value.update(first=2, last=2)
            weight.requires_grad_(False)
            model.eval()

    with pytest.warns(RuntimeWarning, match="could not be put back: stuck: OSError: it is stuck"):
        change()
    assert value == {"first": 2, "last": 1}
    assert weight.requires_grad
    assert model.training
