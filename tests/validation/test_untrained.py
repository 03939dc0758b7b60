"""Models fresh from their constructor, told from trained ones."""

import torch
from torch import nn

from utils.validation.untrained import looks_untrained


def test_model_without_vectors():
    """Draws stretch no direction more than others; what training adds stands out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    assert looks_untrained(model)
    nn.init.orthogonal_(model[2].weight)
    assert looks_untrained(model)
    with torch.no_grad():
        model[2].weight += 0.1 * torch.randn(64, 1) * torch.randn(1, 64) * 3
    assert not looks_untrained(model)


def test_too_little_to_tell():
    """One matrix, or small ones, prove nothing."""
    assert not looks_untrained(nn.Linear(30, 64, bias=False))
    assert not looks_untrained(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)))
