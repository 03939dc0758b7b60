"""Samples to batches: picked, widened to 64-bit ids, and cut to the longest text among them."""

from collections.abc import Mapping

import torch
from torch import Tensor

LENGTHS = {"lengths": ("input_ids",), "target_lengths": ("decoder_input_ids", "labels")}
"""Entries that count the tokens of other entries."""
MULTIPLE = 8
"""Batches of texts of different lengths are this wide or a multiple of it: fewer shapes, which hardware likes."""


def collate(samples: Mapping[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
    """Make a batch of some samples.

    Args:
        samples: Tensors whose first dimension counts the samples; see `utils.training.prepared_data.PreparedData`.
        indices: Numbers of the samples, shape (batch,).

    Returns:
        The tensors of these samples, integers as int64. Where samples differ in length, sequences are cut to the
        longest one of the batch and ``attention_mask`` ``(batch, seq)``, int64, is 1 on the tokens of each text and
        0 behind.
    """
    counts = {name: samples[name][indices].long() for name in LENGTHS if name in samples}
    widths = {
        entry: -(-int(count.max()) // MULTIPLE) * MULTIPLE for name, count in counts.items() for entry in LENGTHS[name]
    }
    batch = {}
    for name, tensor in samples.items():
        if name in counts:
            continue
        rows = tensor[indices]
        if name in widths:
            rows = rows[:, : widths[name]]
        batch[name] = rows if rows.is_floating_point() else rows.long()
    if "lengths" in counts:
        places = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (places < counts["lengths"][:, None]).long()
    return batch
