"""Training that can be killed at any moment: settings, data, checkpoints, resume, export.

Knows nothing of growth or continual learning; those fill the slots of `utils.training.state` from above. Lightning is
imported by `utils.training.training_core` only, so settings can be read without them.
"""

from utils.training.config import TrainingConfig

__all__ = ["TrainingConfig"]
