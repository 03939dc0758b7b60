"""Nothing is done against forgetting: what every method is compared with."""

from utils.continual.method import Method


class Naive(Method):
    """Task after task, as training goes by itself (fine-tuning): the lower end of what methods reach."""

    name = "naive"
    alone = True
