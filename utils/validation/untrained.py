"""Is a model fresh from its constructor? Then batch norms must see a batch: their statistics are not real yet."""

import math

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.gradient_reach import training_inputs
from utils.validation.probing import has_length

BATCH_NORM = nn.modules.batchnorm._BatchNorm
SMALLEST_MATRIX, MOST_MATRICES = 16, 4
"""Matrices whose shape tells draws from trained numbers, and how many of them are looked at."""
STRETCH = 1.2
"""How far beyond the limit for infinite size the largest singular value of small draws may lie."""
SMALL_SAMPLE = 3 * 64 * 64
"""Numbers per sample up to which a larger batch is cheap, and needed: deep layers see few positions of it."""


def looks_untrained(module: nn.Module) -> bool:
    """Tell whether all vectors of a model (biases, norm weights) still hold one constant each, as when just made.

    A layer's default random bias is recognised by its bound of 1/sqrt(fan-in). A batch norm that has never seen a
    batch settles it, however its weights were drawn. A model without vectors is as just made if its matrices are.
    """
    counts = [n.num_batches_tracked for n in module.modules() if isinstance(n, BATCH_NORM)]
    if any(count is not None and int(count) == 0 for count in counts):
        return True
    vectors = 0
    for child in module.modules():
        bias = getattr(child, "bias", None)
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.numel() > 1:
            vectors += 1
            if float(weight.detach().float().std()) > 1e-6:
                return False
        if isinstance(bias, nn.Parameter) and bias.dim() == 1 and bias.numel() > 1:
            vectors += 1
            values = bias.detach().float()
            fan_in = weight[0].numel() if isinstance(weight, Tensor) and weight.dim() > 1 else 1
            if float(values.std()) > 1e-6 and float(values.abs().max()) > 1.01 / math.sqrt(fan_in):
                return False
    return vectors > 0 or _all_drawn(module)


def _all_drawn(module: nn.Module) -> bool:
    """Tell whether the matrices are independent draws: none stretches any direction more than such draws do.

    The largest singular value of an m by n matrix of independent numbers of standard deviation s is close to
    s (sqrt(m) + sqrt(n)) (Marchenko and Pastur 1967). Training adds directions that stand out.
    """
    found = [p.detach() for p in module.parameters() if p.dim() == 2 and p.is_floating_point() and bool(p.any())]
    found = [p for p in found if min(p.shape) >= SMALLEST_MATRIX][:MOST_MATRICES]
    for matrix in found:
        values = matrix.float().cpu()
        scale = float(values.square().mean().sqrt())
        edge = scale * (math.sqrt(values.shape[0]) + math.sqrt(values.shape[1]))
        if not 0 < float(torch.linalg.matrix_norm(values, ord=2)) <= STRETCH * edge:
            return False
    return len(found) > 1


def normalise_batches(adapter: ModelAdapter) -> bool:
    """Put the batch norms of an untrained model into train mode, where alone they normalise.

    The runner puts modes and statistics back.

    Returns:
        Whether there are any.
    """
    norms = [child for child in adapter.module.modules() if isinstance(child, BATCH_NORM)]
    if not norms or not looks_untrained(adapter.module):
        return False
    for norm in norms:
        norm.train()
    return True


def enough_samples(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return a batch that batch normalisation can work with: two samples of a vector leave it nothing."""
    inputs = training_inputs(adapter)
    norms = [child for child in adapter.module.modules() if isinstance(child, BATCH_NORM)]
    if not norms or has_length(adapter):
        return inputs
    if inputs[adapter.main_input][0].numel() <= SMALL_SAMPLE:
        return adapter.example_inputs(16)
    # Over pooled features each sample is one value per channel.
    return adapter.example_inputs(8) if any(isinstance(norm, nn.BatchNorm1d) for norm in norms) else inputs
