"""A task shows its samples in its own order of entries and with its own numbers for labels."""

import torch

from utils.continual.task import Task, permuted
from utils.training.prepared_data import PreparedData


def task(**changes):
    return Task(0, "one", torch.arange(4), torch.tensor([1, 2]), **changes)


def test_a_permutation_moves_every_sample_alike():
    order = permuted(12, 7)
    pixels = torch.arange(36.0).view(3, 1, 3, 4)
    shown = task(permutation=order).shown({"pixel_values": pixels, "labels": torch.arange(3)})
    assert shown["pixel_values"].shape == pixels.shape
    for before, after in zip(pixels, shown["pixel_values"], strict=True):
        assert after.flatten().tolist() == [before.flatten()[int(place)].item() for place in order]
    assert torch.equal(shown["labels"], torch.arange(3))


def test_a_permutation_is_fixed_by_its_seed_and_leaves_the_global_stream():
    before = torch.random.get_rng_state()
    assert torch.equal(permuted(50, 3), permuted(50, 3))
    assert not torch.equal(permuted(50, 3), permuted(50, 4))
    assert sorted(permuted(50, 3).tolist()) == list(range(50))
    assert torch.equal(before, torch.random.get_rng_state())


def test_labels_are_counted_as_the_outputs_are():
    shown = task(relabelled=(7, 2)).shown({"features": torch.zeros(3, 2), "labels": torch.tensor([2, 7, 2])})
    assert shown["labels"].tolist() == [1, 0, 1] and shown["labels"].dtype == torch.int64


def test_held_out_samples_of_different_lengths_stay_whole():
    rows = {
        "input_ids": torch.arange(20, dtype=torch.int32).view(4, 5),
        "lengths": torch.tensor([5, 2, 3, 1], dtype=torch.int32),
        "labels": torch.tensor([0, 1, 0, 1]),
    }
    data = PreparedData("x", "text_classification", rows, rows, None, {"validation_bytes": 9})
    held = task().held_out(data)
    assert held.validation_samples == 2 and held.train is rows
    assert held.validation["lengths"].tolist() == [2, 3]
    assert held.validation["input_ids"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    # The bytes are those of the whole text: bits per byte of a part would be wrong.
    assert held.facts["validation_unknown"] is True


def test_a_batch_is_cut_to_its_longest_text():
    rows = {
        "input_ids": torch.ones(4, 40, dtype=torch.int32),
        "lengths": torch.tensor([3, 17, 5, 40]),
        "labels": torch.tensor([0, 1, 0, 1]),
    }
    batch = task().batch(rows, torch.tensor([0, 2]))
    assert batch["input_ids"].shape == (2, 8) and batch["attention_mask"].sum(1).tolist() == [3, 5]
