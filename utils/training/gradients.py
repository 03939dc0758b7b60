"""The gradient of a step: of all its passes and processes together, measured, and scaled down when it is too long."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils.training.sharding import local


class StepMean:
    """One mean over all labels of a step, however they are spread over passes and processes.

    Passes hold different numbers of labels, such as answers of different lengths: the mean of their means would depend
    on how a step is cut into passes. So each pass counts as much as it has labels. How many there are in all is known
    only after the last pass; until then gradients are relative to the first one.

    Attributes:
        loss: The mean loss of the last whole step in nats, over all processes.
    """

    def __init__(
        self, passes: int, processes: int = 1, even: bool = False, summed: Callable[[Tensor], Tensor] = lambda one: one
    ) -> None:
        """Count for one process.

        Args:
            passes: How many make a step.
            processes: How many processes share a step.
            even: Whether every pass of every process has the same number of labels.
            summed: Adds a tensor up over all processes; all of them call it at the same points.
        """
        self.passes, self.processes, self.even, self.summed = passes, processes, even, summed
        self.loss: Tensor | None = None
        self.begin()

    def begin(self) -> None:
        """Forget the passes of a step that has not ended."""
        self._total: Tensor | None = None
        self._first: Tensor | None = None

    def add(self, loss: Tensor, count: Callable[[], Tensor], extra: Tensor | None = None) -> Tensor:
        """Take in the mean loss of a pass.

        Args:
            loss: The mean, with its graph.
            count: Counts its labels; asked only where it matters.
            extra: What is differentiated beside it, with its weight, and is no part of the mean.

        Returns:
            What to differentiate.
        """
        whole = loss if extra is None else loss + extra
        if self.passes == self.processes == 1:
            self._total = loss.detach()
            return whole
        if self.even:
            self._total = loss.detach().double() + (0 if self._total is None else self._total)
            return whole / self.passes
        labels = count().double()
        if self._first is None:
            self._first = self.summed(labels.clone()).clamp(min=1) / self.processes
        present = torch.stack([labels, labels * loss.detach()])
        self._total = present if self._total is None else self._total + present
        return whole * (labels / self._first / self.passes).to(loss.dtype)

    def end(self, gradients: Sequence[Tensor]) -> None:
        """Finish a step: `loss` is its mean, and the gradients, which are those of all processes, become that mean's.

        Args:
            gradients: Changed in place; of tensors in parts, the parts of this process.
        """
        total, first = self._total, self._first
        assert total is not None
        if self.passes == self.processes == 1:
            self.loss = total
        elif self.even:
            self.loss = (self.summed(total) / (self.passes * self.processes)).float()
        else:
            assert first is not None
            labels, nats = self.summed(total).unbind()
            self.loss = (nats / labels).float()
            factor = first * (self.passes * self.processes) / labels
            # On a GPU nothing is read here, which would wait for it.
            if gradients and (factor.is_cuda or float(factor) != 1):
                torch._foreach_mul_(list(gradients), factor.float() if factor.is_cuda else float(factor))
        self.begin()


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that are there; of parameters in parts, this process's parts."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients together; of parameters in parts, the norm of the whole.

    The gradients are left as they are: where the norm is not finite, they still tell where that comes from.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    if gradients[0].is_cuda:
        norms = list(torch._foreach_norm(gradients, 2.0))
    else:
        norms = [torch.linalg.vector_norm(gradient, 2.0) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    # Each process knows the norm of its parts only until somebody asks for the whole.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip(gradients: Sequence[Tensor], norm: Tensor, longest: float) -> None:
    """Scale gradients down to a norm, in place; shorter ones stay as they are (Pascanu et al., arXiv:1211.5063).

    Args:
        gradients: All of a step.
        norm: Their norm.
        longest: The largest norm that is left as it is.
    """
    if gradients:
        scale = torch.clamp(longest / (norm + 1e-6), max=1.0)
        # On a GPU nothing is read here, which would wait for it.
        if scale.is_cuda or float(scale) != 1:
            torch._foreach_mul_(list(gradients), scale)
