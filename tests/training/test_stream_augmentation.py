"""Augmented images depend on the seed, the pass and the sample, and on nothing else."""

import shutil

import pytest
import torch
from torch.utils.data import DataLoader

import utils
from utils.training import TrainingConfig
from utils.training.augmentation import Augmentation
from utils.training.dataset_utilities import load_data
from utils.training.text_stream import open_stream
from utils.training.training_core import Positions

IMAGES = torch.arange(6 * 16 * 16, dtype=torch.float32).view(6, 1, 16, 16)


def test_images_are_shifted_and_flipped_and_nothing_else():
    changed = Augmentation(0)(IMAGES, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert changed.shape == IMAGES.shape
    differing = 0
    for before, after in zip(IMAGES, changed, strict=True):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())
        inside = after[0, 2:-2, 2:-2]
        steps = (inside[:, 1:] - inside[:, :-1]).unique().tolist()
        assert steps in ([1.0], [-1.0])
        assert (inside[1:] - inside[:-1] == 16).all()
        differing += not torch.equal(before, after)
    assert differing > 3


def test_draws_depend_on_sample_pass_and_seed_and_not_on_the_batch():
    passes, indices = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([5, 9, 5, 9, 5, 9])
    same = IMAGES[:1].expand(6, -1, -1, -1)
    whole = Augmentation(7)(same, passes, indices)
    single = torch.cat([Augmentation(7)(same[i : i + 1], passes[i : i + 1], indices[i : i + 1]) for i in range(6)])
    assert torch.equal(whole, single)
    assert len({tuple(image.flatten().tolist()) for image in whole}) > 3
    assert not torch.equal(whole, Augmentation(8)(same, passes, indices))


def test_signs_are_not_mirrored():
    changed = Augmentation(0, flips=False)(IMAGES, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert (changed[:, 0, 4:-4, 1:] >= changed[:, 0, 4:-4, :-1]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_workers(workers):
    data = load_data("builtin:digits", task="image_classification")
    config = TrainingConfig(augment=True, batch_size=300)
    reference = list(open_stream(data, config).batches(8))
    context = "fork" if workers else None
    loader = DataLoader(
        Positions(open_stream(data, config), 8), batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    for ours, theirs in zip(loader, reference, strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["labels"], theirs["labels"])
    plain = next(open_stream(data, TrainingConfig(batch_size=300)).batches(1))
    assert torch.equal(plain["labels"], reference[0]["labels"])
    assert not torch.equal(plain["pixel_values"], reference[0]["pixel_values"])


def test_an_augmented_run_with_workers_resumes_bit_for_bit(tmp_path):
    settings = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "d_model": 16,
        "nhead": 2,
        "num_layers": 1,
        "num_classes": 10,
    }
    weights = []
    for workers in (0, 2):
        config = TrainingConfig(
            max_steps=9, batch_size=8, augment=True, workers=workers, val_every_steps=4, checkpoint_every_steps=3,
            keep_best=0,
        )  # fmt: skip
        directory = tmp_path / str(workers)
        model = utils.load_model("example:vit", config=settings)
        whole = utils.train(model, "builtin:digits", config, run_dir=directory, progress=False)
        weights.append(whole.summary()["weights_sha256"])
        newest = sorted(path for path in (directory / "checkpoints").iterdir() if path.is_dir())[-1]
        shutil.rmtree(newest)
        resumed = utils.resume(directory, progress=False)
        weights.append(resumed.summary()["weights_sha256"])
    assert len(set(weights)) == 1
