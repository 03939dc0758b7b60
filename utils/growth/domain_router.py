"""Fitting the router between the domains of a model: a softmax regression on features that stay as they are."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.growth.multi_domain import MultiDomainModel
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.seeding import derive_seed

FLAT = 1e-2
"""Smallest deviation that a feature is stretched from, where 1 is usual: what hardly varies is mostly noise."""


@dataclass(frozen=True)
class RouterFit:
    """How well a router tells domains apart."""

    accuracy: float
    """Share of the held-out examples that it sends to their domain."""
    control: float
    """Share of them that are of the domain with the most examples to learn from: what no router reaches."""
    by_domain: dict[str, float]
    """Accuracy for the held-out examples of each domain."""
    loss: float
    """Mean cross-entropy of the held-out examples, in nats."""
    learnt_from: int
    """Examples that it was fitted to."""
    held_out: int
    """Examples that it was tested on."""
    steps: int
    """Optimizer steps."""
    seed: int
    """Of the split and the order."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)


def fit_router(
    model: MultiDomainModel,
    examples_by_domain: Mapping[str, Tensor | Mapping[str, Tensor]],
    steps: int = 200,
    seed: int = 0,
    *,
    held_out: float = 0.25,
    batch_size: int = 64,
    learning_rate: float = 0.03,
) -> RouterFit:
    """Fit the router anew, from zero, by the cross-entropy of the domains; nothing else of the model changes.

    Args:
        model: The model.
        examples_by_domain: For every domain at least two samples: the main input, or inputs by name, batch first.
            Examples that overlap, such as windows of one text, must not be spread over the split by chance: cut the
            text into pieces that have nothing in common.
        steps: Steps of Adam (Kingma and Ba, 2015).
        seed: Of the split and of the order.
        held_out: Share of each domain's examples that only the accuracy is measured with, above 0 and below 1.
        batch_size: Examples per step and per forward pass.
        learning_rate: Of Adam.

    Raises:
        DataError: A domain is unknown, missing, or has too few examples.
        ConfigError: A setting is out of range.
    """
    if steps < 1 or batch_size < 1 or not 0 < held_out < 1 or not learning_rate > 0:
        raise ConfigError(
            f"fit_router was given steps={steps}, batch_size={batch_size}, held_out={held_out} and "
            f"learning_rate={learning_rate}.",
            "Expected at least 1 step and 1 example, a share between 0 and 1 and a rate above 0.",
            "Leave out what you do not need to set.",
        )
    if set(examples_by_domain) != set(model.domains):
        raise DataError(
            f"Examples were given for {', '.join(map(str, examples_by_domain)) or 'no domain'}.",
            f"Expected them for {', '.join(model.domains)}, all and no others.",
            "Add a clone for a new domain with add_domain first.",
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(derive_seed(seed, "router"))
    learn: list[Tensor] = []
    test: list[Tensor] = []
    for domain in model.domains:
        features = _features_of(model, domain, examples_by_domain[domain], batch_size, device)
        order = torch.randperm(len(features), generator=generator)
        count = min(len(order) - 1, max(1, round(held_out * len(order))))
        test.append(features[order[:count]])
        learn.append(features[order[count:]])
    x, y = _joined(learn)
    # What all samples have in common hides what they differ in: it is taken out here, and put back into the rows below.
    middle, spread = x.mean(dim=0), x.std(dim=0).clamp_min(FLAT)
    x = (x - middle) / spread
    weight = torch.zeros(len(learn), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(learn), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            some = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
            loss = F.cross_entropy(F.linear(x[some], weight, bias), y[some])
            weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            optimizer.step()
    with torch.no_grad():
        weight = weight / spread
        bias = bias - weight @ middle
        for row, w, b in zip(model.router_rows(), weight, bias, strict=True):
            row.weight.copy_(w[None])
            row.bias.copy_(b[None])
        x, y = _joined(test)
        logits = F.linear(x, weight, bias)
        right = logits.argmax(dim=-1) == y
        most = max(range(len(learn)), key=lambda number: len(learn[number]))
        return RouterFit(
            accuracy=float(right.double().mean()),
            control=float((y == most).double().mean()),
            by_domain={name: float(right[y == number].double().mean()) for number, name in enumerate(model.domains)},
            loss=float(F.cross_entropy(logits, y)),
            learnt_from=sum(map(len, learn)),
            held_out=len(y),
            steps=steps,
            seed=seed,
        )


def _joined(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return features of all domains with the domains' numbers."""
    return torch.cat(parts), torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])


def _features_of(
    model: MultiDomainModel, domain: str, examples: Tensor | Mapping[str, Tensor], batch_size: int, device: torch.device
) -> Tensor:
    """Return the features of a domain's examples, on the CPU."""
    named = examples if isinstance(examples, Mapping) else {}
    values = list(named.values()) if named else [examples] if isinstance(examples, Tensor) else []
    sizes = sorted({len(value) if isinstance(value, Tensor) and value.dim() else 0 for value in values})
    if len(sizes) != 1 or sizes[0] < 2:
        raise DataError(
            f"The examples for {domain!r} are {' and '.join(map(str, sizes)) or 'no'} samples.",
            "Expected tensors with two samples or more, the same number in each: to learn from and to test with.",
            "Give more examples of this domain.",
        )
    count = sizes[0]
    made = []
    for start in range(0, count, batch_size):
        some = [value[start : start + batch_size].to(device) for value in values]
        made.append(model.features(**dict(zip(named, some, strict=True))) if named else model.features(*some))
    return torch.cat(made).cpu()
