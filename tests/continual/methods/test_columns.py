import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import utils
from tests.continual.methods.toy_streams import (
    SPEC,
    STEPS,
    TASKS,
    answers_after,
    check_bits,
    config_of,
    fresh,
    in_sessions,
    same_weights,
    train,
)
from tests.training.conftest import TINY_GPT
from utils.adapters import ModelAdapter
from utils.continual.answering import answering
from utils.continual.config import ContinualConfig
from utils.continual.extension import ContinualExtension, make_extension
from utils.continual.methods.columns import Column, Columns, adding, made
from utils.runtime.errors import ConfigError
from utils.training import TrainingConfig
from utils.training.resume import open_run
from utils.training.state import MigrationError, ModelChange

__all__ = ["answers_after"]


def with_columns(**changes):
    return config_of("columns", setting="task", **{"column_width": 4, **changes})


def norm(seed=0):
    return fresh(seed, norm=True)


def columns_after(directory, module):
    return open_run(directory, model=module)[1]["continual"]["methods"]["columns"]["columns"]


@pytest.fixture
def weights_after(monkeypatch):
    """The model's parameters at each measurement of all tasks."""
    seen = []
    original = ContinualExtension._scores

    def scores(self, session, tasks):
        seen.append({name: p.detach().clone() for name, p in session.run.model.named_parameters()})
        assert all(p.requires_grad for p in session.run.model.parameters())
        return original(self, session, tasks)

    monkeypatch.setattr(ContinualExtension, "_scores", scores)
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_old_tasks_keep_every_bit_of_their_answers(tmp_path, weights_after, answers_after, accumulate):
    run = train(norm(), with_columns(accumulate=accumulate), tmp_path)
    check_bits(answers_after)
    for later in weights_after[2:]:
        assert all(torch.equal(value, weights_after[1][name]) for name, value in later.items())
    assert not any(child._forward_hooks for child in run.model.modules())
    assert all(p.requires_grad and p.grad is None for p in run.model.parameters())


def test_a_run_that_stops_in_the_middle_of_tasks_ends_like_one_that_does_not(tmp_path, answers_after):
    whole = train(norm(), with_columns(), tmp_path / "whole")
    last = answers_after[-1]
    answers_after.clear()
    # In the first task, in the third, and just after its end.
    parts = in_sessions(norm(), norm, with_columns(), tmp_path / "parts", 3, 21, 24)
    same_weights(parts.model, whole.model)
    check_bits(answers_after)
    assert all(torch.equal(one, other) for one, other in zip(last, answers_after[-1], strict=True))
    for task, column in columns_after(tmp_path / "whole", norm()).items():
        for layer, own in columns_after(tmp_path / "parts", norm())[task].items():
            assert all(torch.equal(value, column[layer][name]) for name, value in own.items())


def test_a_stopped_session_leaves_the_model_as_it_was_found(tmp_path):
    from tests.continual.methods.toy_streams import StopAt
    from utils.training.resume import train as begin

    run = begin(norm(), "builtin:digits", with_columns(), tmp_path, progress=False, spec=SPEC, observers=[StopAt(21)])
    assert run.step == 21
    assert not any(child._forward_hooks for child in run.model.modules())
    assert all(p.requires_grad for p in run.model.parameters())


def test_so_does_one_that_an_error_ended(tmp_path, monkeypatch):
    module, passes = norm(), []
    original = Columns.new_pass

    def new_pass(self, learner):
        original(self, learner)
        passes.append(1)
        if len(passes) == 20:
            raise RuntimeError("out of order")

    monkeypatch.setattr(Columns, "new_pass", new_pass)
    with pytest.raises(RuntimeError, match="out of order"):
        train(module, with_columns(), tmp_path)
    assert not any(child._forward_hooks for child in module.modules())
    assert all(p.requires_grad for p in module.parameters())


class Added(nn.Module):
    """A linear layer beside a frozen one, written out."""

    def __init__(self, layer, own):
        super().__init__()
        self.layer = layer
        self.down, self.up, self.shift = (nn.Parameter(own[name].clone()) for name in ("down", "up", "shift"))

    def forward(self, value):
        return self.layer(value) + (value @ self.down.T) @ self.up.T + self.shift


def test_a_stream_is_a_plain_loop_with_low_rank_layers(tmp_path):
    run = train(fresh(), with_columns(tasks=2), tmp_path)
    module, config, steps = fresh(), run.config, STEPS * TASKS // 2
    stream = make_extension(config).open_stream(run)
    learner = looking(module)
    learner.task, learner.seed = SimpleNamespace(number=1), config.seed
    learner.adapter, learner.data, learner.tasks = run.adapter, run.data, stream.tasks
    learner.module = run.adapter.module
    column = made(learner)

    def optimizer_of(parameters):
        groups = [[p for p in parameters if (p.dim() > 1) == matrix] for matrix in (True, False)]
        return torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
            lr=5e-3, betas=(0.9, config.beta2),
        )  # fmt: skip

    trained = list(module.parameters())
    optimizer = optimizer_of(trained)
    for step in range(2 * steps):
        task = step // steps
        if step == steps:
            for p in module.parameters():
                p.requires_grad_(False)
            module.enter = Added(module.enter, column.weights["enter"])
            module.head = Added(module.head, column.weights["head"])
            block = module.blocks[0]
            block.up = Added(block.up, column.weights["blocks.0.up"])
            block.down = Added(block.down, column.weights["blocks.0.down"])
            trained = [p for p in module.parameters() if p.requires_grad]
            optimizer = optimizer_of(trained)
        batch = stream.batch_at(step * config.batch_size)
        logits = module(batch["pixel_values"])[:, 5 * task : 5 * task + 5]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, batch["labels"] - 5 * task).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    found = columns_after(tmp_path, fresh())["1"]
    for layer, mine in (("enter", module.enter), ("head", module.head), ("blocks.0.down", module.blocks[0].down)):
        for name in ("down", "up", "shift"):
            assert float((found[layer][name] - getattr(mine, name).detach()).abs().max()) < 1e-6
    assert float(found["head"]["up"].abs().max()) > 0


def test_growth_follows_in_the_first_task_and_is_refused_later(tmp_path, answers_after):
    growth = {"schedule": [{"at": 3, "operator": "feed_forward", "amount": 8},
                           {"at": 20, "operator": "depth", "amount": 1}]}  # fmt: skip
    with pytest.warns(UserWarning, match="would grow a model that is frozen.*column_width"):
        run = train(norm(), with_columns(growth=growth), tmp_path)
    assert run.model.blocks[0].up.out_features == 32
    assert len(run.model.blocks) == 1
    check_bits(answers_after)
    assert columns_after(tmp_path, norm())["1"]["blocks.0.up"]["up"].shape == (32, 4)


@pytest.mark.parametrize("path", [str, lambda path: path])
def test_a_model_of_a_finished_run_answers_for_each_task(tmp_path, answers_after, path):
    run = train(norm(), with_columns(), tmp_path)
    names = ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    for task, expected in enumerate(answers_after[-1]):
        module = norm()
        with answering(path(tmp_path), task if task % 2 else names[task], model=module) as adapter:
            rows = torch.isin(run.data.validation["labels"], torch.tensor([2 * task, 2 * task + 1]))
            logits = adapter.logits({"pixel_values": run.data.validation["pixel_values"][rows]})
        mine = [2 * task, 2 * task + 1]
        assert torch.equal(logits[:, mine], expected[:, mine])
        assert bool((logits.argmax(1) // 2 == task).all())
        assert not any(child._forward_hooks for child in module.modules())


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding="same", groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, pixel_values):
        hidden = self.norm(self.second(self.first(pixel_values).relu())).relu()
        return self.head(hidden.flatten(1))


def test_convolutions_get_columns_too(tmp_path, answers_after):
    torch.manual_seed(0)
    run = train(Convolutions(), with_columns(), tmp_path)
    check_bits(answers_after)
    found = columns_after(tmp_path, Convolutions())["4"]
    assert found["second"]["down"].shape == (4, 6, 3, 3)
    assert found["second"]["up"].shape == (6, 4, 1, 1)
    value = torch.randn(2, 6, 4, 4)
    own = {name: torch.randn_like(one) for name, one in found["second"].items()}
    layer, down, up = run.model.second, nn.Conv2d(6, 4, 3, padding="same", bias=False), nn.Conv2d(4, 6, 1)
    with torch.no_grad():
        down.weight.copy_(own["down"])
        up.weight.copy_(own["up"])
        up.bias.copy_(own["shift"])
        assert torch.allclose(adding(own)(layer, (value,), layer(value)), layer(value) + up(down(value)), atol=1e-5)


def test_language_models_and_encoders_of_torch_keep_their_bits(tmp_path, text_file, answers_after):
    text = text_file.read_text(encoding="utf-8")
    halves = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for half, part in zip(halves, (text[:20_000], text[20_000:40_000]), strict=True):
        half.write_text(part, encoding="utf-8")
    continual = {"method": "columns", "split": "parts", "setting": "task"}
    config = TrainingConfig(max_steps=12, batch_size=4, continual=continual)
    model = utils.load_model("example:gpt", config=TINY_GPT)
    utils.train(model, [f"file:{half}" for half in halves], config, tmp_path / "run", progress=False)
    (first,), (again, _) = (row for row in answers_after if row)
    assert torch.equal(first, again)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(64, 10)

    def forward(self, pixel_values):
        return self.head(self.layer(pixel_values.flatten(1).view(-1, 8, 8)).flatten(1))


def test_an_encoder_that_has_a_fast_path_in_eval_mode(tmp_path, answers_after):
    torch.manual_seed(0)
    train(Encoder(), with_columns(tasks=3), tmp_path)
    check_bits(answers_after, 3)
    # What attention computes in one call has no layer to add to.
    assert set(columns_after(tmp_path, Encoder())["2"]) == {"layer.linear1", "layer.linear2", "head"}


def looking(module, tasks=2, compiled=False, ema=None):
    adapter = ModelAdapter(module, spec=SPEC)
    shown = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.zeros(4, dtype=torch.long)}
    from utils.continual.task import Task

    return SimpleNamespace(
        settings=ContinualConfig(setting="task", column_width=4), adapter=adapter, module=adapter.module, seed=0,
        training=TrainingConfig(ema_decay=ema, compile=compiled),
        data=SimpleNamespace(train=shown, task="image_classification", facts={}, tokenizer=None),
        tasks=[Task(i, str(i), torch.arange(4), torch.arange(4)) for i in range(tasks)],
        task=SimpleNamespace(number=0),
    )  # fmt: skip


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10))

    def forward(self, pixel_values):
        return pixel_values.flatten(1) @ self.weight


def test_what_cannot_have_columns_is_refused():
    module = norm()
    Columns().check(looking(module))
    assert not any(child._forward_hooks for child in module.modules())
    with pytest.raises(ConfigError, match="Scales calls no linear layer.*packnet or replay"):
        Columns().check(looking(Scales()))
    with pytest.raises(ConfigError, match="compile is True.*does not notice"):
        Columns().check(looking(norm(), compiled=True))
    with pytest.raises(ConfigError, match="ema_decay is 0.9"):
        Columns().check(looking(norm(), ema=0.9))
    with pytest.raises(ConfigError, match="setting is 'domain'.*Set setting='task'"):
        make_extension(config_of("progressive", setting="domain"))
    method = Columns()
    with pytest.raises(ConfigError, match="precision is 16-mixed.*bf16-mixed"):
        method._get_ready(SimpleNamespace(loop=SimpleNamespace(scaler=object())))
    method.done = 0
    with pytest.raises(MigrationError, match="depth would grow a model that is frozen"):
        method.migrate(ModelChange("depth", 3))


def test_a_column_changes_nothing_when_it_is_made_and_comes_off():
    module = norm().eval()
    learner = looking(module)
    learner.task = SimpleNamespace(number=1)
    value = torch.randn(4, 1, 8, 8)
    before = module(value)
    column = made(learner)
    with torch.no_grad():
        column.attach(module)
        column.attach(module)
        assert torch.equal(module(value), before)
        column.weights["head"]["shift"].add_(1.0)
        assert torch.allclose(module(value), before + 1)
        column.detach()
        assert torch.equal(module(value), before)
    again = Column(copy.deepcopy(made(learner).weights))
    for layer, own in again.weights.items():
        assert torch.equal(own["down"], column.weights[layer]["down"])
    assert [p.shape for p in again.parameters] == [p.shape for p in column.parameters]
