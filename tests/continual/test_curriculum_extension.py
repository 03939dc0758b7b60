"""A curriculum in a run: gates, phases, and a resume that is bitwise exact before, at and after a gate."""

import math
import shutil

import pytest
import torch
from torch import nn

import utils
from tests.continual.toys import QUICK, SPEC, net
from utils.continual.curriculum_stream import CurriculumStream
from utils.continual.difficulty import register_difficulty, sample_losses
from utils.runtime.errors import ConfigError, DataError
from utils.training.config import TrainingConfig
from utils.training.resume import resume, train

ENOUGH = 0.16
GATED = {
    "phases": [
        {"name": "easy", "share": 0.3, "pacing": "linear", "steps": 30, "metric": "accuracy", "threshold": ENOUGH,
         "patience": 2},
        {"name": "more", "share": 0.6, "pacing": "root", "steps": 12, "metric": "loss", "threshold": 0.1},
        {"name": "all", "pacing": "exponential", "steps": 10},
    ]
}  # fmt: skip
CONFIG = QUICK.with_changes(max_steps=60, val_every_steps=4, checkpoint_every_steps=2, keep_best=0)


def trained(folder, digits, curriculum=GATED, **changes):
    return train(
        net(), digits, CONFIG.with_changes(curriculum=curriculum, **changes), folder, spec=SPEC, progress=False
    )


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def began(run):
    return [one["step"] for one in run.checkpoints.latest().states()["stream"]["began"]]


def test_a_gate_opens_when_its_metric_held_and_a_phase_ends_after_its_steps(tmp_path, digits):
    run = trained(tmp_path / "run", digits)
    right = {row["step"]: row["accuracy"] for row in run.metrics if row["split"] == "validation"}
    held = [step for step in right if step > 4 and right[step] >= ENOUGH and right[step - 4] >= ENOUGH]
    first, second = began(run)[1:]
    assert first == held[0] < 30 and second == first + 12
    assert len(run.notes) == 2
    assert "'easy' ended after step" in run.notes[0] and "(accuracy is " in run.notes[0]
    assert "loss has not reached 0.1" in run.notes[1] and "'all' begins with" in run.notes[1]


def test_a_run_goes_on_bit_for_bit_before_at_and_after_a_gate(tmp_path, digits):
    whole = trained(tmp_path / "whole", digits)
    gate, end = began(whole)[1:]
    for step in (0, gate - 2, gate, gate + 2, end, end + 4):
        part = tmp_path / f"part-{step}"
        shutil.copytree(tmp_path / "whole", part)
        for folder in (part / "checkpoints").iterdir():
            if folder.name.startswith("step") and int(folder.name.split("-")[-1]) > step:
                shutil.rmtree(folder)
        again = resume(part, model=net(seed=1), progress=False)
        assert (again.sessions, began(again)) == (1 + (step > 0), [0, gate, end])
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(again)[name]), (step, name)
        assert again.notes == whole.notes


def test_the_samples_of_a_run_are_the_easiest_of_the_model_when_a_phase_begins(tmp_path, digits, monkeypatch):
    expected = sample_losses(utils.adapters.ModelAdapter(net(), spec=SPEC), digits, 16)
    orders, seen = [], []
    put, made = CurriculumStream.put_in_order, CurriculumStream.batch_at

    def noted(self, scores):
        orders.append(scores.clone())
        put(self, scores)

    def spied(self, position):
        batch = made(self, position)
        seen.append((self.phase, position // self.step_samples, batch))
        return batch

    monkeypatch.setattr(CurriculumStream, "put_in_order", noted)
    monkeypatch.setattr(CurriculumStream, "batch_at", spied)
    run = trained(tmp_path / "run", digits)
    assert torch.allclose(orders[0], expected, atol=1e-6) and len(orders) == 3
    gate = began(run)[1]
    # Nothing was fetched ahead of the gate: the step behind it is of the next phase, in its order.
    assert [phase for phase, step, _ in seen if step in (gate - 1, gate)] == [0, 1]
    hardest = orders[0].sort().values[math.ceil(0.3 * digits.train_samples)]
    numbers = {image.numpy().tobytes(): number for number, image in enumerate(digits.train["pixel_values"])}
    for phase, _, batch in seen:
        if phase == 0:
            assert all(orders[0][numbers[image.numpy().tobytes()]] <= hardest for image in batch["pixel_values"])


def test_a_step_is_the_same_in_smaller_batches(tmp_path, digits):
    length = {"difficulty": "loss", "phases": [{"pacing": "root", "steps": 0.5}]}
    one = trained(tmp_path / "one", digits, length, max_steps=12)
    two = trained(tmp_path / "two", digits, length, max_steps=12, batch_size=8, accumulate=2)
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], atol=1e-4), name


def test_a_function_of_the_users_and_the_default(tmp_path, digits):
    register_difficulty("test brightness", lambda batch: batch["pixel_values"].mean((1, 2, 3)))
    run = trained(tmp_path / "a", digits, {"difficulty": "test brightness"}, max_steps=8)
    state = run.checkpoints.latest().states()["stream"]
    assert torch.allclose(state["difficulty"], digits.train["pixel_values"].mean((1, 2, 3)))
    with pytest.warns(UserWarning, match="workers is 1.*no worker is started"):
        assert trained(tmp_path / "b", digits, {}, max_steps=8, workers=1).finished


class Words(nn.Module):
    """The mean of a text's words, with two answers."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(300, 8), nn.Linear(8, 2)

    def forward(self, input_ids):
        return self.head(self.words(input_ids).mean(1))


def test_texts_from_the_shortest(tmp_path, monkeypatch):
    lines = [f"{'word ' * (1 + n % 9)}{n},{n % 2}" for n in range(80)]
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(lines))
    widths = []
    made = CurriculumStream.batch_at

    def spied(self, position):
        batch = made(self, position)
        widths.append(batch["input_ids"].ne(batch["input_ids"][:, -1:]).sum(1).max().item())
        return batch

    monkeypatch.setattr(CurriculumStream, "batch_at", spied)
    spec = utils.ModelSpec(task="text_classification", num_labels=2, vocab_size=300)
    phases = {"difficulty": "length", "phases": [{"share": 0.3, "steps": 4, "name": "short"}, {}]}
    run = train(Words(), f"file:{tmp_path}/t.csv", CONFIG.with_changes(max_steps=20, batch_size=4, curriculum=phases),
                tmp_path / "run", spec=spec, progress=False)  # fmt: skip
    lengths = run.data.train["lengths"].float().sort().values
    assert max(widths[:4]) <= lengths[math.ceil(0.3 * len(lengths)) - 1] < max(widths[4:])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"curriculum": {"difficulty": "length"}}, DataError, "have no length.*'loss'"),
        ({"curriculum": {"difficulty": "colour"}}, ConfigError, "'colour'.*register_difficulty"),
        ({"curriculum": {"phases": [{"metric": "bits_per_byte", "threshold": 1, "share": 0.5}, {"name": "b"}]}},
         ConfigError, "waits for bits_per_byte.*loss, accuracy"),
        ({"curriculum": {"phases": [{"metric": "loss", "threshold": 1, "steps": 3}, {"name": "b"}]}}, ConfigError,
         "takes 3 steps at most, and measurements come every 4"),
        ({"curriculum": {"phases": [{"steps": 60}, {"name": "b"}]}}, ConfigError, "take 60 steps, and the run has 60"),
        ({"curriculum": {}, "continual": {"method": "naive"}}, ConfigError, "curriculum and continual are both set"),
        ({"curriculum": {}, "devices": 2}, ConfigError, "curriculum is set and devices is 2"),
        ({"curriculum": {"phases": 3}}, ConfigError, "phases is 3"),
        ({"curriculum": "easy"}, ConfigError, "curriculum is 'easy'.*names and values"),
    ],
)  # fmt: skip
def test_what_a_run_refuses_before_anything_is_written(tmp_path, digits, changes, kind, message):
    with pytest.raises(kind, match=message):
        train(net(), digits, CONFIG.with_changes(**changes), tmp_path / "run", spec=SPEC, progress=False)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_text_that_is_read_while_training_has_no_order(tmp_path, text_file):
    path = tmp_path / "many.jsonl"
    import json

    path.write_text("".join(json.dumps({"text": f"story {n} " * 30}) + "\n" for n in range(80)))
    model = utils.load_model("example:gpt", config={"vocab_size": 300, "max_seq_len": 16, "d_model": 16, "nhead": 2,
                                                    "num_layers": 1})  # fmt: skip
    config = TrainingConfig(max_steps=4, batch_size=2, curriculum={})
    with pytest.raises(DataError, match=r"read while training.*order before the first step"):
        train(model, f"file:{path}?stream=true", config, tmp_path / "run", progress=False)
    packed = config.with_changes(curriculum={"difficulty": "length"})
    with pytest.raises(DataError, match="all of the same length"):
        train(model, f"file:{text_file}", packed, tmp_path / "run", progress=False)
    assert train(model, f"file:{text_file}", config, tmp_path / "run", progress=False).finished
