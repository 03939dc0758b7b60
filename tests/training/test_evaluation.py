"""What is measured and what is minimised, against sums done by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.objectives import IGNORED
from utils.training.dataset_utilities import load_data
from utils.training.evaluation import evaluate, objective
from utils.training.prepared_data import PreparedData


class Table(nn.Module):
    """Answers each token with the scores of its row."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Embedding.from_pretrained(scores)

    def forward(self, input_ids):
        return self.scores(input_ids)


class Pooled(Table):
    def forward(self, input_ids):
        return self.scores(input_ids).mean(1)


def language(rows, task="causal_lm", tokenizer=None):
    windows = {"input_ids": rows, "labels": rows}
    return PreparedData("made", task, windows, windows, tokenizer, {"validation_bytes": rows.numel()})


def test_the_held_out_loss_is_summed_in_64_bits():
    generator = torch.Generator().manual_seed(0)
    model = ModelAdapter(
        Table(torch.randn(50, 50, generator=generator)), spec=ModelSpec(task="causal_lm", vocab_size=50, max_length=64)
    )
    rows = torch.randint(50, (400, 64), generator=generator)
    exact = math.fsum(
        float(functional.cross_entropy(model.module.scores(row), row).double()) * row.numel() for row in rows
    )
    loss = evaluate(model, language(rows), batch_size=1)["loss"]
    assert abs(loss - exact / rows.numel()) < 1e-12


def test_a_batch_whose_loss_is_not_a_number_is_not_left_out():
    scores = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    scores[49] = math.nan
    model = ModelAdapter(Table(scores), spec=ModelSpec(task="causal_lm", vocab_size=50, max_length=8))
    rows = torch.arange(48).view(6, 8)
    rows[3, 3] = 49
    assert math.isnan(evaluate(model, language(rows), batch_size=2)["loss"])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_label_smoothing_of_one_score_is_that_of_two_classes(share):
    scores = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec(task="text_classification", vocab_size=50, max_length=8, num_labels=1)
    model = ModelAdapter(Pooled(scores), spec=spec)
    batch = {"input_ids": torch.arange(24).view(3, 8), "labels": torch.tensor([1, 0, IGNORED])}
    side = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    data = PreparedData("made", "text_classification", side, side)
    loss, logits, labels = objective(model, data, batch, 0, share)
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    torch.testing.assert_close(loss, functional.cross_entropy(two, labels, label_smoothing=share))


def test_only_what_texts_are_made_of_is_put_in_the_place_of_a_hidden_token(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join("hello world foo bar baz" for _ in range(400)))
    data = load_data(f"file:{tmp_path}/a.txt", task="masked_lm", vocab_size=2000, max_length=64)
    tokenizer = data.tokenizer
    assert len(tokenizer.special_ids) > 1000, "reserved, because the text offers no more merges"
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Embedding(2000, 2000)

        def forward(self, input_ids):
            seen.append(input_ids)
            return self.scores(input_ids)

    model = ModelAdapter(Model(), spec=ModelSpec(task="masked_lm", vocab_size=2000, max_length=64))
    batch = {name: tensor[:8] for name, tensor in data.train.items()}
    seen.clear()
    for seed in range(8):
        _, _, labels = objective(model, data, batch, seed)
        shown = seen[-1]
        replaced = shown[(shown != batch["input_ids"]) & (shown != tokenizer.mask_id)]
        assert replaced.numel()
        assert not set(replaced.tolist()) & set(tokenizer.special_ids)
        assert not set(labels.unique().tolist()) & set(tokenizer.special_ids)
