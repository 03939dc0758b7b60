import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.objectives import IGNORED
from utils.training import TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.diagnosis import culprit, held_out_culprit, not_finite
from utils.training.evaluation import masking_seed, objective
from utils.training.resume import train
from utils.training.training_module import TrainingModule


class Poison(nn.Module):
    """Gives numbers that are not finite for one masking and no other."""

    def __init__(self):
        super().__init__()
        self.wanted = self.seen = None

    def forward(self, x, ids):
        self.seen = ids.clone()
        return x * float("nan") if self.wanted is not None and torch.equal(ids, self.wanted) else x


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.poison, self.head = nn.Embedding(300, 16), Poison(), nn.Linear(16, 300)

    def forward(self, input_ids):
        return self.head(self.poison(self.embedding(input_ids), input_ids))


def test_the_second_look_masks_the_tokens_that_failed(text_file):
    adapter = ModelAdapter(Masked(), spec=ModelSpec(task="masked_lm", vocab_size=300, max_length=32))
    config = TrainingConfig(max_steps=5, batch_size=2, seed=7)
    data = prepare_data(adapter, f"file:{text_file}", config)
    module = TrainingModule(adapter, data, config, 5)
    module.batch_number = 3
    batch = {name: tensor[:2].long() for name, tensor in data.train.items()}
    poison = module.model.poison
    objective(adapter, data, batch, masking_seed(7, 3, 0))
    poison.wanted = poison.seen
    assert culprit(module, batch) == " (first in what poison puts out)"
    module.batch_number = 4
    assert culprit(module, batch) == "", "another batch is masked in another way"


class Barrier(nn.Module):
    """A causal mask of its own module: infinite in training too, and no fault."""

    def forward(self, length):
        return torch.full((length, length), float("-inf")).triu(1)


class OnlyInEval(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x if self.training else x * self.factor


class Reader(nn.Module):
    def __init__(self, factor=float("nan")):
        super().__init__()
        self.embedding, self.barrier, self.gate = nn.Embedding(300, 16), Barrier(), OnlyInEval(factor)
        self.head = nn.Linear(16, 300)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        x = (x @ x.transpose(1, 2) + self.barrier(x.shape[1])).softmax(-1) @ x
        return self.head(self.gate(x))


SPEC = ModelSpec(task="causal_lm", vocab_size=300, max_length=32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_not_finite_is_told_once_with_the_module(tmp_path, text_file, bad):
    config = TrainingConfig(max_steps=4, batch_size=2, val_every_steps=2, log_every_steps=2, keep_best=1, ema_decay=0.5)
    with pytest.warns(UserWarning, match="held-out loss is .*at step 2, and training goes on: .*gate is the") as caught:
        run = train(Reader(bad), f"file:{text_file}", config, tmp_path / "run", spec=SPEC, progress=False)
    assert len([one for one in caught if "held-out loss" in str(one.message)]) == 1
    assert run.finished
    assert run.checkpoints.best() is None

    def refuse(name):
        raise AssertionError(f"a bare {name}")

    written = {path.name: json.loads(path.read_text(), parse_constant=refuse) for path in run.directory.rglob("*.json")}
    assert written["summary.json"]["validation_loss"] is None
    assert written["summary.json"]["train_loss"] > 0
    assert "gate is the first module" in written["summary.json"]["notes"][0]
    assert run.to_dict()["bits_per_byte"] is None


def test_a_mask_with_infinities_and_samples_without_an_answer_are_no_fault_of_a_module(text_file):
    adapter = ModelAdapter(Reader(factor=1.0), spec=SPEC)
    data = prepare_data(adapter, f"file:{text_file}", TrainingConfig(max_steps=1, batch_size=2))
    assert held_out_culprit(adapter, data, 64, 0) == (
        "the output of every module is finite in eval mode where it is in training"
    )
    data.validation["labels"] = torch.full_like(data.validation["labels"], IGNORED)
    assert held_out_culprit(adapter, data, 64, 0) == "no held-out sample has anything to predict"
    assert adapter.module.training is True


class Masking(nn.Module):
    def forward(self, x):
        return torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mask, self.head = nn.Embedding(300, 8), Masking(), nn.Linear(8, 300)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        return self.head((x @ x.mT + self.mask(x)).softmax(-1) @ x * self.scale)


def test_a_mask_of_minus_infinity_is_not_to_blame(text_file):
    adapter = ModelAdapter(Attending(), spec=ModelSpec(task="causal_lm", vocab_size=300, max_length=32))
    config = TrainingConfig(max_steps=5, batch_size=2)
    data = prepare_data(adapter, f"file:{text_file}", config)
    module = TrainingModule(adapter, data, config, 5)
    batch = {name: tensor[:2].long() for name, tensor in data.train.items()}
    with torch.no_grad():
        module.model.scale.fill_(float("nan"))
    assert culprit(module, batch) == " (first in what head puts out)"


def test_the_message_tells_batches_and_step():
    module = SimpleNamespace(config=TrainingConfig(accumulate=4))
    said = str(not_finite(module, "gradient's norm", None, range(8, 12), " (here)"))
    assert said.startswith("The gradient's norm is not finite in batches 8 to 11 of step 3 (here). Expected a finite")
