"""Whether a model still has the weights that vectors of it were made with."""

from torch import nn

from utils.training.weights import weights_sha256


class WeightWatch:
    """The hash of a model's weights, taken anew only after something wrote to them.

    torch counts what is written to a tensor. It does not count what is written through ``tensor.data``, which therefore
    goes unseen here too.

    Attributes:
        sha256: Of the weights when the watch began.
    """

    def __init__(self, module: nn.Module, sha256: str = "") -> None:
        """Begin to watch a model; `sha256` is its hash where that is known."""
        self.module = module
        self.sha256 = sha256 or weights_sha256(module)
        self._stamp = _stamp(module)

    def unchanged(self) -> bool:
        """Tell whether the weights are those of the beginning."""
        stamp = _stamp(self.module)
        if stamp != self._stamp:
            # Written to, which need not mean changed: moved to another device, or put back.
            if weights_sha256(self.module) != self.sha256:
                return False
            self._stamp = stamp
        return True


def _stamp(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return what changes whenever a parameter or buffer is written to or replaced."""
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensors in (module.parameters(), module.buffers())
        for tensor in tensors
    )
