"""Elastic weight consolidation: weights that mattered for earlier tasks are held where they were.

Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks (arXiv:1612.00796), equation 3: the loss gets
``sum_i lambda / 2 F_i (theta_i - theta*_i)^2``. One penalty for each task would cost more with every task; Schwarz et
al., Progress & Compress (arXiv:1805.06370), section 3.2, keep one Fisher information for all (online EWC), and Huszar
(arXiv:1712.03847) shows that several penalties are one. Here the one is exactly the sum of those of all tasks; see
`utils.continual.anchors.Anchors.add`. The Fisher information is that of the model's own answers;
`utils.continual.fisher` says how.
"""

from collections.abc import Mapping
from typing import Any

from utils.continual.anchors import Anchors
from utils.continual.fisher import fisher_of_task
from utils.continual.learner import Learner
from utils.continual.method import Method
from utils.training.state import ModelChange, Undo


class EWC(Method):
    """Pull each weight back to where earlier tasks left it, as strongly as their answers depend on it.

    Attributes:
        anchors: Where weights are held, and how strongly; as many numbers after a hundred tasks as after one.
        computed: Of each task, how its Fisher information was computed.
    """

    name = "ewc"
    holds = True
    needs_boundaries = True
    penalty = 30.0

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.anchors = Anchors()
        self.computed: list[dict[str, Any]] = []

    def end_task(self, learner: Learner) -> None:
        """Add what matters for the task to what is held."""
        fisher = fisher_of_task(learner)
        self.anchors.add(fisher.values, learner.parameters)
        self.computed.append(fisher.to_dict())

    def change_gradient(self, learner: Learner) -> None:
        """Add the penalty's gradient."""
        strength = learner.settings.penalty
        self.anchors.pull(learner, self.penalty if strength is None else strength)

    def state_dict(self) -> dict[str, Any]:
        """Return the Fisher information, the anchors, and how they came about."""
        return {"anchors": self.anchors.state_dict(), "computed": [dict(one) for one in self.computed]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.anchors.load_state_dict(state["anchors"])
        self.computed = [dict(one) for one in state["computed"]]

    def migrate(self, change: ModelChange) -> Undo:
        """Let both follow; nothing holds what is new."""
        return self.anchors.migrate(change)

    @property
    def stored_floats(self) -> int:
        """How many numbers it keeps: two for each trained weight."""
        return self.anchors.stored_floats
