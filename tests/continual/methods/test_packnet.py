from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from utils.continual.config import ContinualConfig
from utils.continual.extension import make_extension
from utils.continual.methods.packnet import FREE, PackNet, largest, matrices_of
from utils.runtime.errors import ConfigError
from utils.training import TrainingConfig
from utils.training.resume import open_run
from utils.training.state import MigrationError, ModelChange, TensorChange

__all__ = ["answers_after"]


def packed(**changes):
    return config_of("packnet", setting="task", **changes)


def norm(seed=0):
    return fresh(seed, norm=True)


def state_after(directory, module):
    return open_run(directory, model=module)[1]["continual"]["methods"]["packnet"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_old_tasks_keep_every_bit_of_their_answers(tmp_path, answers_after, accumulate):
    train(norm(), packed(accumulate=accumulate), tmp_path)
    check_bits(answers_after)


def test_a_run_that_stops_in_the_middle_of_tasks_ends_like_one_that_does_not(tmp_path, answers_after):
    whole = train(norm(), packed(), tmp_path / "whole")
    last = answers_after[-1]
    answers_after.clear()
    # Before and after the pruning of the third task, and just after the second task's end.
    parts = in_sessions(norm(), norm, packed(), tmp_path / "parts", 18, 21, 24)
    same_weights(parts.model, whole.model)
    check_bits(answers_after)
    assert all(torch.equal(one, other) for one, other in zip(last, answers_after[-1], strict=True))


def test_each_task_keeps_the_largest_of_the_free_weights(tmp_path, monkeypatch):
    seen = []
    original = PackNet._prune

    def prune(self, learner):
        before = {name: p.detach().clone() for name, p in learner.parameters.items()}
        owners = {name: one.clone() for name, one in self.owners.items()}
        original(self, learner)
        seen.append((learner.step + 1, before, owners, {n: o.clone() for n, o in self.owners.items()}))

    monkeypatch.setattr(PackNet, "_prune", prune)
    run = train(fresh(), packed(), tmp_path)
    # The last third of a task's steps comes after it.
    assert [step for step, *_ in seen] == [STEPS * task + STEPS - STEPS // 3 for task in range(TASKS)]
    for task, (_, weights, before, after) in enumerate(seen):
        for name in ("enter.weight", "blocks.0.up.weight", "blocks.0.down.weight"):
            free = before[name] == FREE
            mine = after[name] == task
            assert not bool((mine & ~free).any())
            assert int(mine.sum()) == max(1, round(int(free.sum()) / (TASKS - task)))
            sizes = weights[name].abs()
            if task < TASKS - 1:
                assert float(sizes[mine].min()) >= float(sizes[free & ~mine].max())
        for name in ("enter.bias", "blocks.0.up.bias", "blocks.0.down.bias"):
            assert bool((after[name] == 0).all())
        for name in ("head.weight", "head.bias"):
            rows = after[name].view(10, -1)
            assert bool((rows[2 * task : 2 * task + 2] == task).all())
            assert bool((rows[2 * task + 2 :] == FREE).all())
    assert not any(bool((one == FREE).any()) for one in state_after(tmp_path, run.model)["owners"].values())


def test_a_share_that_is_asked_for_is_kept(tmp_path):
    run = train(fresh(), packed(kept_share=0.25), tmp_path)
    owner = state_after(tmp_path, run.model)["owners"]["enter.weight"]
    left = owner.numel()
    for task in range(TASKS):
        kept = int((owner == task).sum())
        assert kept == round(0.25 * left)
        left -= kept
    # What nobody kept is zero.
    assert float(run.model.enter.weight.detach()[owner == FREE].abs().sum()) == 0


def test_a_stream_is_a_plain_loop_with_masks(tmp_path):
    run = train(fresh(), packed(tasks=2), tmp_path)
    module, config = fresh(), run.config
    stream = make_extension(config).open_stream(run)
    groups = [[p for p in module.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=5e-3, betas=(0.9, config.beta2),
    )  # fmt: skip
    owners = {name: torch.full(p.shape, -1) for name, p in module.named_parameters()}
    steps = STEPS * TASKS // 2
    for step in range(2 * steps):
        task, at = divmod(step, steps)
        pruned = at >= steps - steps // 3
        moves = {name: owner == (task if pruned else -1) for name, owner in owners.items()}
        kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        batch = stream.batch_at(step * config.batch_size)
        answers = range(5 * task, 5 * task + 5)
        logits = module(batch["pixel_values"])[:, answers]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, batch["labels"] - 5 * task).backward()
        for name, p in module.named_parameters():
            p.grad[~moves[name]] = 0
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in module.named_parameters():
                p[~moves[name]] = kept[name][~moves[name]]
                if at != steps - steps // 3 - 1:
                    continue
                free = owners[name] == -1
                if name.startswith("head"):
                    owners[name][5 * task : 5 * task + 5] = task
                elif p.dim() == 1:
                    owners[name][:] = 0
                else:
                    count = round(int(free.sum()) / (2 - task))
                    bound = p[free].abs().sort(descending=True).values[count - 1]
                    owners[name][free & (p.abs() >= bound)] = task
                    p[owners[name] == -1] = 0
    for name, p in module.named_parameters():
        assert float((p.detach() - dict(run.model.named_parameters())[name].detach()).abs().max()) < 1e-6


def test_growth_in_depth_follows_and_changes_no_bit(tmp_path, answers_after):
    # In the second task before it is pruned, and in the third after it was.
    growth = {"schedule": [{"at": 11, "operator": "depth", "amount": 1}, {"at": 23, "operator": "depth", "amount": 1}]}
    run = train(norm(), packed(growth=growth), tmp_path / "whole")
    assert len(run.model.blocks) == 3
    check_bits(answers_after)
    owners = state_after(tmp_path / "whole", norm())["owners"]
    blocks = [{int(one) for name, o in owners.items() if name.startswith(f"blocks.{i}.") for one in o.unique()}
              for i in range(3)]  # fmt: skip
    assert sorted(map(min, blocks)) == [0, 1, 2]
    same_weights(in_sessions(norm(), norm, packed(growth=growth), tmp_path / "parts", 12, 24).model, run.model)


def test_growth_of_width_is_for_the_first_task(tmp_path, answers_after):
    growth = {"schedule": [{"at": at, "operator": "feed_forward", "amount": 8} for at in (3, 7, 20)]}
    with pytest.warns(UserWarning, match="would change blocks.0.*old answers.*Grow in depth"):
        run = train(norm(), packed(growth=growth), tmp_path)
    # Refused in the third task only.
    assert run.model.blocks[0].up.out_features == 40
    check_bits(answers_after)


def test_a_model_of_a_finished_run_answers_for_each_task(tmp_path, answers_after):
    from utils.continual.answering import answering

    train(norm(), packed(), tmp_path)
    for task, expected in enumerate(answers_after[-1]):
        with answering(tmp_path, task, model=norm()) as adapter:
            run = open_run(tmp_path, model=norm())[0]
            rows = torch.isin(run.data.validation["labels"], torch.tensor([2 * task, 2 * task + 1]))
            logits = adapter.logits({"pixel_values": run.data.validation["pixel_values"][rows]})
        mine = [2 * task, 2 * task + 1]
        assert torch.equal(logits[:, mine], expected[:, mine])


def test_tasks_that_share_all_outputs_share_the_head(tmp_path, answers_after):
    run = train(fresh(), packed(split="permutation", tasks=3), tmp_path)
    check_bits(answers_after, 3)
    assert {int(one) for one in state_after(tmp_path, run.model)["owners"]["head.weight"].unique()} == {0, 1, 2}


def test_language_models_keep_their_bits_too(tmp_path, text_file, answers_after):
    text = text_file.read_text(encoding="utf-8")
    halves = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for half, part in zip(halves, (text[:20_000], text[20_000:40_000]), strict=True):
        half.write_text(part, encoding="utf-8")
    continual = {"method": "packnet", "split": "parts", "setting": "task"}
    config = TrainingConfig(max_steps=12, batch_size=4, continual=continual)
    model = utils.load_model("example:gpt", config=TINY_GPT)
    utils.train(model, [f"file:{half}" for half in halves], config, tmp_path / "run", progress=False)
    (first,), (again, second) = (row for row in answers_after if row)
    assert torch.equal(first, again)
    assert second.shape[1:] == first.shape[1:]


def learner(module=None, tasks=3, ema=None, **settings):
    adapter = ModelAdapter(module or fresh(), spec=SPEC)
    return SimpleNamespace(
        settings=ContinualConfig(setting="task", **settings), tasks=[None] * tasks, adapter=adapter,
        module=adapter.module, parameters=dict(adapter.module.named_parameters()),
        training=TrainingConfig(ema_decay=ema),
    )  # fmt: skip


def test_streams_that_cannot_be_packed_are_refused():
    PackNet().check(learner())
    with pytest.raises(ConfigError, match=r"kept_share is 1 and there are 3 tasks.*no weight to the second"):
        PackNet().check(learner(kept_share=1.0))
    PackNet().check(learner(kept_share=1.0, tasks=1))
    with pytest.raises(ConfigError, match="there are 200 tasks.*at most 127"):
        PackNet().check(learner(tasks=200))
    with pytest.raises(ConfigError, match="ema_decay is 0.9.*goes on moving"):
        PackNet().check(learner(ema=0.9))
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Linear(1, 2))
    with pytest.raises(ConfigError, match="has 2 weights, for 3 tasks"):
        PackNet().check(learner(tiny))
    with pytest.raises(ConfigError, match="setting is 'class'.*Set setting='task'"):
        make_extension(config_of("packnet"))
    with pytest.raises(ConfigError, match="packnet does not go with another method"):
        make_extension(config_of("packnet+replay", setting="task"))


def test_a_change_that_is_undone_leaves_nothing():
    method = PackNet()
    method.owners = {"weight": torch.tensor([[0, -1]], dtype=torch.int8)}
    method.done = method.pruned = 0
    kept = method.owners
    old, new = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(3))
    change = ModelChange("depth", 5, {"weight": old, "other": new}, {}, {"other": TensorChange()}, {"weight": old})
    undo = method.migrate(change)
    assert method.owners["other"].tolist() == [FREE] * 3
    assert method.born["other"][0] == 0
    undo()
    assert method.owners is kept
    assert not method.born
    with pytest.raises(MigrationError, match="width would change weight, with which 1 finished"):
        method.migrate(ModelChange("width", 5, {"weight": old}, {}, {"weight": TensorChange()}, {"weight": old}))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_of_equal_weights_the_first_are_kept(values, data):
    count = data.draw(st.integers(1, len(values)))
    kept = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert largest(torch.tensor(values, dtype=torch.float32), count).nonzero().flatten().tolist() == sorted(kept)


def test_what_is_pruned_is_what_decays():
    assert matrices_of(norm()) == {"enter.weight", "blocks.0.up.weight", "blocks.0.down.weight", "head.weight"}
