"""Seeing every operator that runs, without importing the compiler."""

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """Base of modes that see every operator in a block, in ``__torch_dispatch__``.

    By default torch guards such a mode against compilation, and imports its compiler for that, which takes seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
