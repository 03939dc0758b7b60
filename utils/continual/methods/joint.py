"""All tasks at once: what a stream would give if nothing were ever out of reach."""

from utils.continual.method import Method


class Joint(Method):
    """The samples of all tasks in one shuffled order, for as many steps as the stream has: the upper end of methods."""

    name = "joint"
    alone = True
