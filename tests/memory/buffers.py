"""Samples that say which they are, and what a buffer made of them."""

import torch

POLICIES = ("reservoir", "balanced", "priority")
CLASSES = 2
"""In the batches."""


def batch_of(rows, start=0):
    """Samples that say which they are, in every field."""
    numbers = torch.arange(start, start + rows)
    return {
        "images": (numbers % 251).to(torch.uint8)[:, None, None].expand(rows, 2, 3).contiguous(),
        "logits": numbers[:, None] + torch.arange(3.0),
        "labels": numbers % CLASSES,
        "number": numbers,
    }


def add(buffer, rows, start=0, **options):
    numbers = torch.arange(start, start + rows)
    return buffer.add(batch_of(rows, start), groups=numbers % CLASSES, priorities=(numbers * 7 % 13).float(), **options)


def whole(buffer):
    """All that a buffer holds, as lists."""
    fields = {name: values.tolist() for name, values in buffer.read(buffer.slots).items()}
    about = {name: values.tolist() for name, values in buffer.about().items()}
    return fields, about, buffer.slots.tolist(), buffer.seen, buffer.capacity, buffer.nbytes


def is_consistent(buffer):
    """Every field of every sample is of the same sample, and so are group and number."""
    fields, about = buffer.read(buffer.slots), buffer.about()
    expected = batch_of(buffer.seen)
    picked = fields["number"]
    assert about["arrivals"].tolist() == picked.tolist() and about["groups"].tolist() == (picked % CLASSES).tolist()
    return all(torch.equal(fields[name], expected[name][picked]) for name in expected)
