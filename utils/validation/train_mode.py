"""What only train mode shows: a crash, NaN, gradients that are not finite."""

import math

import torch
from torch import Tensor

from utils.adapters.capture import named_tensors, tensor_at
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.resources import LARGE_MODEL
from utils.runtime.seeding import seed_streams
from utils.validation.check import Finding
from utils.validation.probing import all_finite, crash_site, first_line, first_nonfinite, is_out_of_memory

AGAIN = "backward through the graph a second time"
CRASH_HINT = "Run model.train() and one forward pass by hand; look at what forward does only when self.training is set."
AGAIN_HINT = (
    "Detach what one forward pass keeps for the next (self.state = state.detach()), and compute in forward() whatever "
    "is made from parameters: backward() frees the graph."
)
NAN_HINT = "Look at what forward does only when self.training is set: dropout, noise, batch statistics, random masks."


def check_train_mode(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> list[Finding]:
    """Run one forward and backward pass in train mode, after one in eval mode has worked.

    Codes: ``backward_crash``, ``nan_output``, ``exploding_gradient``.

    Args:
        adapter: The model; it comes back in eval mode, and its gradients are those of this pass.
        inputs: A small batch.
    """
    for parameter in adapter.module.parameters():
        parameter.grad = None
    adapter.module.train()
    try:
        return _train(adapter, inputs) or _train_again(adapter, inputs)
    finally:
        adapter.module.eval()


def _train(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> list[Finding]:
    stage = "a forward pass"
    seed_streams(0, "forward")
    try:
        output = adapter.forward_in_training(inputs)
        tensors = [(path, t) for path, t in named_tensors(output) if t.is_floating_point()]
        if not all_finite(t for _, t in tensors if not bool(torch.isneginf(t).any())):
            return [_not_finite(adapter, inputs, next(path for path, t in tensors if not all_finite([t])))]
        stage = "the backward pass"
        try:
            result = tensor_at(output, adapter.output.value or "")
            loss = adapter.loss(result, adapter.random_labels(result))
        except (KeyError, IndexError):
            # Inception returns more in train mode; any scalar that reaches everything serves.
            loss = torch.stack([t.float().square().mean() for _, t in tensors]).sum()
        if loss.requires_grad:
            loss.backward()
    except AdapterError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        where = adapter.name if stage == "the backward pass" else crash_site(adapter, inputs)
        message = f"{stage} in train mode raises {type(error).__name__}: {first_line(error)}; in eval mode it works"
        return [Finding("backward_crash", "fail", where, message, CRASH_HINT)]
    bad = [name for name, p in adapter.module.named_parameters() if p.grad is not None and not all_finite([p.grad])]
    if bad and math.isfinite(float(loss.detach())):
        message = (
            f"{len(bad)} gradients are not finite in train mode, all are in eval mode; the last layer with one is this"
        )
        return [Finding("exploding_gradient", "fail", bad[-1], message, NAN_HINT)]
    return []


def _train_again(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> list[Finding]:
    """Run a second step after one that has worked: it crashes where the graph of the first is used again."""
    if adapter.num_parameters > LARGE_MODEL:
        return []
    seed_streams(0, "forward")
    try:
        output = adapter.forward_in_training(inputs)
        tensors = [t for _, t in named_tensors(output) if t.is_floating_point() and t.requires_grad]
        weights = [p for p in adapter.module.parameters() if p.requires_grad]
        if tensors and weights:
            loss = torch.stack([t.float().square().mean() for t in tensors]).sum()
            torch.autograd.grad(loss, weights, allow_unused=True)
    except RuntimeError as error:
        if AGAIN not in str(error):
            return []
        message = f"the second backward pass in train mode raises {type(error).__name__}: {first_line(error)}"
        return [Finding("backward_crash", "fail", adapter.name, message, AGAIN_HINT)]
    return []


def _not_finite(adapter: ModelAdapter, inputs: dict[str, Tensor], path: str) -> Finding:
    """Describe output that is not finite in train mode only."""
    try:
        where = first_nonfinite(adapter, inputs)
    except AdapterError:
        where = adapter.name
    message = f"the output{f' `{path}`' if path else ''} is not finite in train mode; in eval mode it is"
    return Finding("nan_output", "fail", where, message, NAN_HINT)
