"""Tiny streams of the built-in digits, and plain loops over them, for the tests of methods."""

import pytest
import torch
from torch import nn

import utils
from utils.continual.extension import ContinualExtension, make_extension
from utils.continual.method import all_as_of
from utils.memory import EpisodicBuffer
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.training import TrainingConfig

SPEC = utils.ModelSpec(task="image_classification", num_labels=10)
STEPS, TASKS = 8, 5
"""Steps of each task, and tasks."""


class Blocks(nn.Module):
    """A classifier of digits with residual blocks, and with BatchNorm if asked for."""

    def __init__(self, norm=False, outputs=10, blocks=1):
        super().__init__()
        self.enter = nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, outputs)

    def forward(self, pixel_values):
        hidden = self.norm(self.enter(pixel_values.flatten(1))).relu()
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Block(nn.Module):
    """x + B relu(A x)."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())


def fresh(seed=0, **settings):
    torch.manual_seed(seed)
    return Blocks(**settings)


def settings_of(method, **changes):
    """Return the settings of a stream of five tasks of eight steps each."""
    return {"method": method, "tasks": TASKS, "samples_per_task": 32, "buffer": 40, "setting": "class", **changes}


def config_of(method, accumulate=1, growth=None, **changes):
    return TrainingConfig(
        max_steps=STEPS * TASKS, batch_size=8 // accumulate, accumulate=accumulate, learning_rate=5e-3,
        schedule="constant", warmup_share=0.0, weight_decay=0.1, clip_norm=1.0, val_every_steps=1000,
        log_every_steps=3, checkpoint_every_steps=1000, continual=settings_of(method, **changes), growth=growth,
    )  # fmt: skip


def train(module, config, directory, **more):
    return utils.train(module, "builtin:digits", config, directory, progress=False, spec=SPEC, **more)


class StopAt:
    """Stops sessions at the given steps."""

    def __init__(self, *steps):
        self.steps = steps

    def start(self, run):
        self.run = run

    def update(self, rows):
        if rows[-1]["step"] in self.steps and rows[-1]["split"] == "train":
            self.run.stop_requested = "stopped by the test"

    def close(self, rows):
        pass


def in_sessions(module, again, config, directory, *steps):
    """Train with a stop at each of some steps, multiples of three; each session goes on with a new model."""
    from utils.training.resume import resume
    from utils.training.resume import train as begin

    run = begin(module, "builtin:digits", config, directory, progress=False, spec=SPEC, observers=[StopAt(*steps)])
    for _ in steps:
        assert not run.finished
        run = resume(directory, progress=False, model=again(), observers=[StopAt(*(s for s in steps if s > run.step))])
    assert run.finished
    return run


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def answers_after(monkeypatch):
    """For each measurement of all tasks the logits of each task that has ended, as the method answers for it."""
    seen = []
    original = ContinualExtension._scores

    def scores(self, session, tasks):
        result = original(self, session, tasks)
        learner, found = self.learner, []
        for task in tasks[: len(self.matrix.rows) + 1] if session.progress.step else []:
            with preserved(learner.module), all_as_of(self.methods, learner, task.number), torch.no_grad():
                learner.module.eval()
                batch = task.batch(learner.data.validation, task.validation)
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                found.append(learner.adapter.logits(inputs).clone())
        seen.append(found)
        return result

    monkeypatch.setattr(ContinualExtension, "_scores", scores)
    return seen


def check_bits(seen, tasks=TASKS):
    """Each task that has ended answers, after each later task, as it did when it ended."""
    rows = [row for row in seen if row]
    assert [len(row) for row in rows] == list(range(1, tasks + 1))
    for row in rows:
        for task, logits in enumerate(row):
            assert torch.equal(logits, rows[task][task])
    # Not because nothing was learned.
    assert not torch.equal(rows[0][0], rows[-1][-1][: len(rows[0][0])])


def plain_loop(run, module, replay=None, project=None, width=None):
    """Train a copy of what a run began with in a loop that knows nothing of methods.

    Args:
        run: Of `config_of` without accumulation.
        module: What the run began with.
        replay: Gets the module, a function that draws from the memory for a purpose, and returns what is added to the
            loss; None while the memory is empty.
        project: Gets the module, the memory and the step after the backward pass.
    """
    config = run.config
    stream = make_extension(config).open_stream(run)
    memory = EpisodicBuffer(config.continual["buffer"], None, "reservoir", config.seed)
    matrices = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(0.9, config.beta2),
    )  # fmt: skip
    module.train()
    for step in range(run.total_steps):
        batch = stream.batch_at(step * config.batch_size)

        def draw(purpose, step=step):
            number = derive_seed(config.seed, purpose, step, 0)
            return memory.sample(min(config.batch_size, len(memory)), number)

        logits = module(batch["pixel_values"])
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        if replay is not None and len(memory):
            loss = loss + replay(module, draw)
        optimizer.zero_grad()
        loss.backward()
        if project is not None and len(memory):
            project(module, memory, step)
        nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        if replay is not None or project is not None:
            memory.add({**batch, "logits": logits.detach()}, batch["labels"], time=step)
    return module


def check_equal(one, other, bound=1e-6):
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert float((mine - theirs).abs().max()) <= bound
