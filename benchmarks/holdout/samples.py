"""Small inputs that a user would pass along."""

from __future__ import annotations

import torch
from torch import Tensor


def ids(*shape: int, high: int = 50, low: int = 4) -> Tensor:
    """Return token ids."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7))


def noise(*shape: int) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


def mask(rows: int, columns: int) -> Tensor:
    """Return a mask with ones for real tokens; every second row ends in padding."""
    made = torch.ones(rows, columns, dtype=torch.long)
    made[1::2, columns - columns // 3 :] = 0
    return made
