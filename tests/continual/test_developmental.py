"""A dataset that grows in the user's hands."""

import pytest
import torch
from torch.utils.data import DataLoader

from utils.continual.curriculum import Phase
from utils.continual.developmental import DevelopmentalDataset, pool_size
from utils.runtime.errors import ConfigError, DataError


def rows(count):
    return {"x": torch.arange(float(count))[:, None], "labels": torch.arange(count)}


def test_a_dataset_shows_the_easiest_and_grows():
    scores = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 0.0, 9.0, 8.0, 7.0, 6.0])
    data = DevelopmentalDataset(rows(10), Phase("early", 0.5, "linear", steps=2), scores, begin=0.1)
    assert (len(data), data[0]["labels"].item(), data.difficulty(0)) == (1, 5, 0.0)
    with pytest.raises(IndexError, match="Place 1 of 1"):
        data[1]
    data.advance()
    assert [int(data[place]["labels"]) for place in range(len(data))] == [5, 1, 3]
    assert repr(data) == "DevelopmentalDataset('early': 3 of 10 samples, difficulty 0 to 2 of 9)"
    data.advance()
    data.advance()
    assert len(data) == 5 and int(data[-1]["labels"]) == 4
    data.advance({"name": "late", "pacing": "linear", "steps": 5})
    assert len(data) == 5
    data.advance()
    assert (len(data), data.phase.name) == (6, "late")
    data.advance(1.0)
    assert sorted(int(row["labels"]) for row in data) == list(range(10))
    assert torch.equal(data.scores, scores)


def test_a_loader_draws_from_what_the_phase_allows():
    data = DevelopmentalDataset(rows(20), 0.25, lambda batch: -batch["x"][:, 0])
    seen = torch.cat([batch["labels"] for batch in DataLoader(data, batch_size=2, shuffle=True)])
    assert sorted(seen.tolist()) == [15, 16, 17, 18, 19]


def test_a_dataset_of_texts_is_ordered_by_length():
    samples = {"input_ids": torch.ones(3, 4), "lengths": torch.tensor([4, 1, 2]), "labels": torch.arange(3)}
    assert DevelopmentalDataset(samples).order.tolist() == [1, 2, 0]


def test_what_a_dataset_refuses():
    with pytest.raises(DataError, match=r"is 'loss'.*sample_losses"):
        DevelopmentalDataset(rows(3), 1.0, "loss")
    with pytest.raises(DataError, match=r"shape \(2,\), for 3 samples.*one number"):
        DevelopmentalDataset(rows(3), 1.0, [1.0, 2.0])
    with pytest.raises(ConfigError, match="share is 2"):
        DevelopmentalDataset(rows(3), 2.0, [1.0, 2.0, 3.0])


def test_sizes_of_pools():
    assert [pool_size(share, 10) for share in (0.01, 0.3, 0.1 + 0.2, 0.31, 1.0)] == [1, 3, 3, 4, 10]
    assert pool_size(0.1, 10, 4) == 4 and pool_size(0.1, 3, 4) == 3
