"""Memory: samples that a model has met, vectors found again by nearness, and language models that look up.

Needs torch and NumPy only; FAISS is used where it is installed.
"""

from utils.memory.episodic_buffer import EpisodicBuffer
from utils.memory.long_term_memory import LongTermMemory

__all__ = ["EpisodicBuffer", "LongTermMemory"]
