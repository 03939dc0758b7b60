"""Memory: samples that a model has met, kept within bounds so that it can meet them again.

Knows nothing of training; needs torch and NumPy only.
"""

from utils.memory.episodic_buffer import EpisodicBuffer

__all__ = ["EpisodicBuffer"]
