"""Experience replay: old samples are trained on with the new ones.

Chaudhry et al., On Tiny Episodic Memories in Continual Learning (arXiv:1902.10486), Algorithm 1: each batch B is joined
by a batch B_M from the memory, and the loss is L(B) + w L(B_M), here with w = 1 by default.
"""

from torch import Tensor

from utils.continual.learner import Learner
from utils.continual.method import Method


class Replay(Method):
    """Train on remembered samples beside the new ones."""

    name = "replay"
    remembers = True
    policy = "reservoir"
    label_weight = 1.0

    def extra_loss(self, learner: Learner, batch: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return the weighted loss of remembered samples; None while there are none."""
        if not len(learner.memory):
            return None
        settings = learner.settings
        old = learner.remembered(settings.replayed or len(labels))
        weight = self.label_weight if settings.label_weight is None else settings.label_weight
        return weight * learner.loss(old)[0]
