"""Random shifts and flips of images, drawn from (seed, pass over the data, sample) and from nothing else.

The same sample in the same pass is changed in the same way on every machine, in every worker and after every resume.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.runtime.seeding import derive_seed

FURTHEST = 8
"""Images move by at most one part in so many of their size."""


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed."""

    seed: int
    """The run's seed."""
    flips: bool = True
    """Mirror every second image, left to right; not for signs, whose mirror image is another sign or none."""

    def __call__(self, images: Tensor, passes: Tensor, indices: Tensor) -> Tensor:
        """Shift and flip a batch.

        Args:
            images: Shape (batch, channels, height, width).
            passes: In which pass over the data each image is shown, shape (batch,).
            indices: Number of each image in the training data, shape (batch,).

        Returns:
            Images of the same shape; what a shift leaves empty repeats the border.
        """
        height, width = images.shape[2:]
        furthest = (max(1, height // FURTHEST), max(1, width // FURTHEST))
        draws = [
            derive_seed(self.seed, "augment", number, index)
            for number, index in zip(passes.tolist(), indices.tolist(), strict=True)
        ]
        down = torch.tensor([draw % (2 * furthest[0] + 1) - furthest[0] for draw in draws])
        right = torch.tensor([(draw >> 20) % (2 * furthest[1] + 1) - furthest[1] for draw in draws])
        rows = (torch.arange(height) + down[:, None]).clamp(0, height - 1)
        columns = (torch.arange(width) + right[:, None]).clamp(0, width - 1)
        if self.flips:
            mirrored = torch.tensor([bool(draw >> 40 & 1) for draw in draws])
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        batch = torch.arange(len(images))[:, None, None, None]
        channels = torch.arange(images.shape[1])[None, :, None, None]
        return images[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]
