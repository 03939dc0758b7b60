import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import utils
from tests.continual.methods.toy_streams import STEPS, config_of, fresh, in_sessions, same_weights, train
from tests.training.conftest import TINY_GPT
from utils.continual.accuracy_matrix import read_matrix
from utils.continual.config import ContinualConfig
from utils.continual.extension import make_extension
from utils.continual.learner import LOGITS, TASK
from utils.continual.methods.consolidation import MARGIN, OUT, REPLAYED, Consolidation
from utils.continual.methods.der import distance
from utils.memory import EpisodicBuffer
from utils.runtime.seeding import derive_seed
from utils.training import TrainingConfig
from utils.training.resume import open_run

LOWEST = torch.finfo(torch.float32).min
TINY_BERT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}


def memory_of(folder, config, model=None):
    extension = make_extension(config)
    run, state = open_run(folder, model=model)
    extension.use_data(run.data)
    extension.load_state_dict(state["continual"])
    return extension.memory, extension.methods[0]


def fisher_by_hand(model, images):
    """Go through samples and classes one by one."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for image in images:
        logs = model(image[None])[0].log_softmax(-1)
        for log in logs:
            found = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
            for one, gradient in zip(total.values(), found, strict=True):
                one += log.detach().exp() * gradient**2 / len(images)
    model.train()
    return total


def by_hand(run, module, penalty=0.0, label_weight=1.0, logit_weight=1.0, boundaries=True, lowers=True, replayed=16):
    """Train a copy of what a run began with in a loop that has all four parts written out."""
    config = run.config
    stream = make_extension(config).open_stream(run)
    memory = EpisodicBuffer(config.continual["buffer"], None, "balanced", config.seed)
    groups = [[p for p in module.parameters() if p.dim() > 1], [p for p in module.parameters() if p.dim() < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": config.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(0.9, config.beta2),
    )  # fmt: skip
    seen, anchors, fisher = set(), None, None
    module.train()
    for step in range(run.total_steps):
        batch, number = stream.batch_at(step * config.batch_size), step // STEPS
        present = set(batch["labels"].tolist())
        raw = module(batch["pixel_values"])
        logits = raw.clone()
        if lowers:
            for one in range(10):
                if one not in seen | present:
                    logits[:, one] += OUT
                elif one not in present:
                    logits[:, one] -= MARGIN
        seen |= present
        loss = cross_entropy(logits, batch["labels"])
        if len(memory):
            old = memory.sample(min(replayed, len(memory)), derive_seed(config.seed, "replay", step, 0))
            now = module(old["pixel_values"])
            scored, kept = now.clone(), old[LOGITS].clone()
            if lowers:
                for one in set(range(10)) - seen:
                    scored[:, one] += OUT
                    kept[:, one] = LOWEST
            loss = loss + label_weight * cross_entropy(scored, old["labels"])
            loss = loss + logit_weight * distance(now, kept, old["labels"])
        if anchors is not None:
            loss = loss + penalty / 2 * sum(
                (fisher[name] * (p - anchors[name]) ** 2).sum() for name, p in module.named_parameters()
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        rows = {**batch, TASK: torch.full((len(raw),), number), LOGITS: raw.detach()}
        memory.add(rows, batch["labels"], time=step)
        if boundaries and step % STEPS == STEPS - 1:
            slots = memory.slots
            rows = memory.read(slots)
            with torch.no_grad():
                now = module(rows["pixel_values"])
            for row, task in enumerate(rows[TASK].tolist()):
                for one in range(10):
                    if task == number or float(rows[LOGITS][row, one]) == LOWEST:
                        rows[LOGITS][row, one] = now[row, one] if one in seen or not lowers else LOWEST
            memory.update(slots, {LOGITS: rows[LOGITS]})
            if penalty:
                fisher = fisher_by_hand(module, rows["pixel_values"])
                anchors = {name: p.detach().clone() for name, p in module.named_parameters()}
    return module


def difference(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"penalty": 6.0}, {"penalty": 6.0}),
        ({"label_weight": 0.5, "logit_weight": 0.2}, {"label_weight": 0.5, "logit_weight": 0.2}),
        ({"boundaries": False}, {"boundaries": False}),
        ({"replayed": 5}, {"replayed": 5}),
    ],
)
def test_a_stream_is_a_plain_loop_with_all_four_parts(tmp_path, options, same):
    run = train(fresh(), config_of("consolidation", **options), tmp_path)
    assert difference(run.model, by_hand(run, fresh(), **same)) < 2e-5


def test_each_part_changes_the_run(tmp_path):
    whole = train(fresh(), config_of("consolidation", penalty=6.0), tmp_path)
    for without in ({"penalty": 0.0}, {"label_weight": 0.0}, {"logit_weight": 0.0}, {"lowers": False}):
        assert difference(whole.model, by_hand(whole, fresh(), **{"penalty": 6.0, **without})) > 1e-3


def test_old_classes_are_lowered_in_the_loss_of_new_samples_and_unseen_ones_play_no_part(tmp_path):
    run = train(fresh(), config_of("consolidation"), tmp_path)
    learner = make_extension(run.config).make_learner(run.adapter, run.data, [None])
    method = Consolidation()
    assert method.lowered(learner, torch.tensor([0, 1])).tolist() == [0.0, 0.0, *[OUT] * 8]
    assert method.lowered(learner, torch.tensor([2, 2])).tolist() == [-MARGIN, -MARGIN, 0.0, *[OUT] * 7]
    assert method.lowered(learner, torch.tensor([1, 2, 0])).tolist() == [0.0, 0.0, 0.0, *[OUT] * 7]


def test_accumulated_passes_are_held_as_one_step(tmp_path):
    config = config_of("consolidation", accumulate=2)
    whole = train(fresh(), config, tmp_path / "whole")
    assert make_extension(config).config.accumulate == 2
    same_weights(in_sessions(fresh(), fresh, config, tmp_path / "parts", 3, 18).model, whole.model)


@pytest.mark.parametrize("options", [{}, {"boundaries": False, "blur": 0.5}, {"setting": "domain"},
                                     {"setting": "task"}])  # fmt: skip
def test_a_run_that_stops_in_the_middle_of_task_three_ends_bit_for_bit_alike(tmp_path, options):
    config = config_of("consolidation", **options)
    whole = train(fresh(), config, tmp_path / "whole")
    parts = in_sessions(fresh(), fresh, config, tmp_path / "parts", 18, 27)
    same_weights(parts.model, whole.model)
    first, second = (memory_of(tmp_path / name, config, fresh())[0] for name in ("whole", "parts"))
    assert torch.equal(first.read(first.slots)[LOGITS], second.read(second.slots)[LOGITS])


def test_where_tasks_share_outputs_nothing_is_lowered(tmp_path):
    config = config_of("consolidation", setting="domain")
    run = train(fresh(), config, tmp_path)
    _, method = memory_of(tmp_path, config, fresh())
    # Both classes come up in every task: all that is left out are outputs that no task has.
    assert method.seen.tolist() == [True, True, *[False] * 8]
    assert run.finished


def test_tasks_with_outputs_of_their_own_keep_all_answers_of_their_samples(tmp_path):
    config = config_of("consolidation", setting="task")
    train(fresh(), config, tmp_path)
    memory, method = memory_of(tmp_path, config, fresh())
    rows = memory.read(memory.slots)
    assert len(method.seen) == 0
    assert sorted(set(rows[TASK].tolist())) == [0, 1, 2, 3, 4]
    # Up to its own end a sample's task alone may answer; amended are the outputs that were not asked.
    assert bool(torch.isfinite(rows[LOGITS]).all())


def test_its_memory_is_one_penalty_however_many_tasks(tmp_path):
    for penalty, copies in ((6.0, 2), (None, 0)):
        run = train(fresh(), config_of("consolidation", penalty=penalty), tmp_path / str(copies))
        stored = [cost.stored_floats for cost in read_matrix(tmp_path / str(copies)).costs]
        assert stored == [copies * run.adapter.num_parameters] * 5


def test_a_head_that_grows_in_the_stream_keeps_answers_and_anchors(tmp_path):
    growth = {"schedule": [{"at": 20, "operator": "classes", "amount": 3}]}
    config = config_of("consolidation", growth=growth, penalty=6.0)
    run = train(fresh(), config, tmp_path / "whole")
    assert run.model.head.out_features == 13
    memory, method = memory_of(tmp_path / "whole", config, fresh())
    stored = memory.read(memory.slots)[LOGITS]
    assert stored.shape[1] == len(method.seen) == 13
    # No sample is of one of the new classes: nothing is known about them.
    assert bool((stored[:, 10:] == LOWEST).all())
    assert {name: t.shape for name, t in method.anchors.importance.items()} == {
        name: p.shape for name, p in run.model.named_parameters()
    }
    same_weights(in_sessions(fresh(), fresh, config, tmp_path / "parts", 18, 21).model, run.model)


def test_the_model_is_left_as_it_was_found_at_the_end_of_a_task(tmp_path, monkeypatch):
    original, seen = Consolidation.end_task, []

    def end_task(self, learner):
        module = learner.module
        before = copy.deepcopy(module.state_dict()), torch.get_rng_state(), [m.training for m in module.modules()]
        grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        original(self, learner)
        assert all(torch.equal(a, b) for a, b in zip(before[0].values(), module.state_dict().values(), strict=True))
        assert torch.equal(before[1], torch.get_rng_state())
        assert before[2] == [m.training for m in module.modules()]
        for old, p in zip(grads, module.parameters(), strict=True):
            assert (old is None) == (p.grad is None)
            assert old is None or torch.equal(old, p.grad)
        seen.append(learner.task.number)

    monkeypatch.setattr(Consolidation, "end_task", end_task)
    train(fresh(norm=True), config_of("consolidation"), tmp_path)
    assert seen == [0, 1, 2, 3, 4]


def test_settings_of_the_method_are_its_own():
    config = ContinualConfig()
    assert (config.method, config.penalty, config.replayed) == ("consolidation", None, None)
    assert (Consolidation.policy, REPLAYED) == ("balanced", 2)


def halves_of(text_file, folder):
    text = text_file.read_text(encoding="utf-8")
    halves = [folder / "a.txt", folder / "b.txt"]
    for half, part in zip(halves, (text[:20_000], text[20_000:40_000]), strict=True):
        half.write_text(part, encoding="utf-8")
    return [f"file:{half}" for half in halves]


@pytest.mark.parametrize(("example", "settings"), [("example:gpt", TINY_GPT), ("example:bert", TINY_BERT)])
def test_language_models_replay_and_hold_weights_without_logits(tmp_path, text_file, example, settings):
    continual = {"method": "consolidation", "split": "parts", "setting": "domain", "buffer": 8, "fisher_samples": 8}
    config = TrainingConfig(max_steps=8, batch_size=4, continual=continual, checkpoint_every_steps=1000)
    model = utils.load_model(example, config=settings)
    run = utils.train(model, halves_of(text_file, tmp_path), config, tmp_path / "run", progress=False)
    assert run.finished
    memory, method = memory_of(tmp_path / "run", config)
    assert LOGITS not in memory.layouts
    assert len(method.anchors.importance) == len(list(run.model.parameters()))
    assert sorted(set(memory.read(memory.slots)[TASK].tolist())) == [0, 1]


class Words(nn.Module):
    """The mean of a text's words, with two answers."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(300, 8), nn.Linear(8, 2)

    def forward(self, input_ids):
        return self.head(self.words(input_ids).mean(1))


def test_texts_of_different_lengths_are_classified(tmp_path):
    rows = [f"{'good ' * (1 + n % 7)}film {n},{n % 2},{'xy'[n // 40]}" for n in range(80)]
    table = tmp_path / "reviews.csv"
    table.write_text("\n".join(["text,label,part", *rows]) + "\n", encoding="utf-8")
    continual = {"method": "consolidation", "split": "parts", "setting": "domain", "buffer": 12}
    config = TrainingConfig(max_steps=8, batch_size=4, continual=continual, checkpoint_every_steps=1000)
    spec = utils.ModelSpec(task="text_classification", num_labels=2, vocab_size=300)
    run = utils.train(Words(), f"file:{table}?task=part", config, tmp_path / "run", progress=False, spec=spec)
    assert run.finished
    memory, method = memory_of(tmp_path / "run", config, Words())
    rows = memory.read(memory.slots)
    assert rows[LOGITS].shape == (12, 2)
    assert len(rows["lengths"].unique()) > 1
    assert method.seen.tolist() == [True, True]
