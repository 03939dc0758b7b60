import copy
import json
import random

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.training import TrainingConfig
from utils.training.dataset_utilities import load_data
from utils.training.evaluation import evaluate
from utils.training.gradients import StepMean, clip, gradient_norm, gradients_of
from utils.training.resume import resume, train


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 16), nn.Linear(16, 300)

    def forward(self, input_ids, decoder_input_ids):
        return self.head(self.embed(decoder_input_ids) + self.embed(input_ids).mean(1, keepdim=True))


SPEC = ModelSpec(task="seq2seq", vocab_size=300, max_length=40)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Answers of two words and of thirty."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {
            "source": f"{draw.choice('abcd')} {n}",
            "target": " ".join(draw.choices("uvwx", k=2 if n % 2 else 30)),
        }
        for n in range(64)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"file:{path}"


def model():
    torch.manual_seed(0)
    return Translator()


def test_a_step_is_the_same_however_it_is_cut(tmp_path, pairs):
    rows = []
    for batch, passes in ((8, 1), (4, 2), (1, 8)):
        config = TrainingConfig(
            max_steps=3, batch_size=batch, accumulate=passes, log_every_steps=1, val_every_steps=3, context_length=40,
            learning_rate=1e-2,
        )  # fmt: skip
        run = train(model(), pairs, config, tmp_path / str(batch), spec=SPEC, progress=False)
        rows.append([(row["loss"], row["gradient_norm"]) for row in run.metrics if row["split"] == "train"])
    for other in rows[1:]:
        for one, two in zip(rows[0], other, strict=True):
            assert two == pytest.approx(one, rel=1e-5)


def test_a_row_weighs_its_steps_alike_when_a_resume_cuts_them_otherwise(tmp_path, pairs):
    config = TrainingConfig(
        max_steps=4, batch_size=8, log_every_steps=4, val_every_steps=4, context_length=40, learning_rate=1e-2,
        time_budget_minutes=1e-9,
    )  # fmt: skip
    whole = train(
        model(), pairs, config.with_changes(time_budget_minutes=None), tmp_path / "a", spec=SPEC, progress=False
    )
    train(model(), pairs, config, tmp_path / "b", spec=SPEC, progress=False)
    rest = resume(tmp_path / "b", model=model(), batch_size=2, time_budget_minutes=60, progress=False)
    assert rest.last("train")["loss"] == pytest.approx(whole.last("train")["loss"], rel=1e-5)


@pytest.mark.parametrize("even", [False, True])
def test_processes_together_are_one(even):
    """Two processes, whose gradients are averaged, against the mean over all labels."""
    torch.manual_seed(0)
    start = nn.Linear(3, 1)
    counts = [[4, 4], [4, 4]] if even else [[1, 7], [5, 2]]
    data = [[(torch.randn(n, 3), torch.randn(n, 1)) for n in row] for row in counts]
    sums: list[list[torch.Tensor]] = [[], []]
    results = []
    # Once to learn what each process gives, once with the sums of both.
    for turn in (0, 1):
        results.clear()
        for rank in (0, 1):
            asked = iter(range(10))

            def summed(value, rank=rank, asked=asked, turn=turn):
                number = next(asked)
                if turn == 0:
                    sums[rank].append(value.clone())
                    return value.clone()
                return sums[0][number] + sums[1][number]

            module, mean = copy.deepcopy(start), StepMean(2, 2, even, summed)
            for inputs, wanted in data[rank]:
                loss = (module(inputs) - wanted).square().mean()
                mean.add(loss, lambda inputs=inputs: torch.tensor(len(inputs))).backward()
            results.append((mean, module))
            if turn == 0:
                mean.end([])
    for process in zip(*(module.parameters() for _, module in results), strict=True):
        average = (process[0].grad + process[1].grad) / 2
        for parameter in process:
            parameter.grad = average.clone()
    inputs, wanted = (torch.cat(parts) for parts in zip(*(pair for row in data for pair in row), strict=True))
    expected = (start(inputs) - wanted).square().mean()
    expected.backward()
    for mean, module in results:
        mean.end(gradients_of(list(module.parameters())))
        assert float(mean.loss) == pytest.approx(float(expected.detach()))
        for parameter, wanted_one in zip(module.parameters(), start.parameters(), strict=True):
            assert torch.allclose(parameter.grad, wanted_one.grad, atol=1e-6)


def test_norm_and_clipping_are_those_of_torch():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
    for parameter in first.parameters():
        parameter.grad = torch.randn_like(parameter)
    second = copy.deepcopy(first)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        theirs.grad = mine.grad.clone()
    norm = gradient_norm(list(first.parameters()))
    clip(gradients_of(list(first.parameters())), norm, 0.5)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(second.parameters(), 0.5))
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert float(gradient_norm([])) == 0


def test_held_out_masks_do_not_depend_on_the_batch_size(text_file):
    loaded = utils.load_model(
        "example:bert", config={"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
    )
    adapter = ModelAdapter(loaded)
    data = load_data(f"file:{text_file}", task="masked_lm", vocab_size=300, max_length=32)
    losses = [evaluate(adapter, data, size)["loss"] for size in (3, 8, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert evaluate(adapter, data, 8, seed=1)["loss"] != pytest.approx(losses[0], rel=1e-4)


def test_what_is_added_to_a_pass_weighs_as_the_pass_and_is_no_part_of_the_mean():
    weight = torch.zeros(2, requires_grad=True)
    mean = StepMean(2)
    for labels, place in ((100, 0), (10, 1)):
        part = mean.add(0 * weight.sum() + 1.0, lambda labels=labels: torch.tensor(labels), weight[place])
        part.backward()
    mean.end([weight.grad])
    assert weight.grad.tolist() == pytest.approx([100 / 110, 10 / 110])
    assert float(mean.loss) == 1.0
