"""Random streams: derived from coordinates, never from history.

A stream that is seeded anew from (seed, purpose, step) needs nothing saved and cannot be moved by what ran before it:
this is what makes a resumed run draw the same numbers as an uninterrupted one.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(*coordinates: int | str) -> int:
    """Map coordinates such as ``(seed, "batch", step)`` to a 63-bit seed, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in coordinates)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_streams(*coordinates: int | str) -> None:
    """Seed the Python, NumPy and torch streams (every initialised CUDA device included) from coordinates."""
    seed = derive_seed(*coordinates)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would format a stack trace per call on machines whose CUDA is not initialised.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def stream_states() -> dict[str, Any]:
    """Return the states of all random streams, for `restore_streams`."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.default_generator.get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_streams(states: dict[str, Any]) -> None:
    """Put all random streams back to what `stream_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.default_generator.set_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def isolated_streams(*coordinates: int | str) -> Iterator[None]:
    """Run a block on its own random streams and restore the caller's afterwards.

    Args:
        *coordinates: Seed of the block; without any the block starts from the present streams.
    """
    states = stream_states()
    try:
        if coordinates:
            seed_streams(*coordinates)
        yield
    finally:
        restore_streams(states)
