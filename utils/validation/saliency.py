"""Which pixels matter? SmoothGrad over an image, and a test whether those pixels matter more than others.

Saliency maps look convincing whatever they show (Adebayo et al., 2018), so each comes with a deletion test: replacing
the most salient tenth of the pixels must move the answer more than replacing as many random ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Outcome, Skipped
from utils.validation.pictures import heat_grid
from utils.validation.responses import (
    affordable_samples,
    answers,
    distance,
    gradient_of,
    held_fixed,
    sample_inputs,
    told_fixed,
    with_content,
)
from utils.validation.statistics import mean_interval

SHARE = 0.1
NOISE = 0.15
DRAWS = 8
CONTROLS = 4


def smooth_gradient(
    adapter: ModelAdapter, inputs: Mapping[str, Any], draws: int = DRAWS, seed: int = 0
) -> torch.Tensor:
    """Return the mean absolute gradient of the top score over noisy copies (Smilkov et al., 2017).

    Args:
        adapter: An image model in eval mode.
        inputs: A batch whose main input is images ``(batch, channels, height, width)``; all else stays as it is.
        draws: Noisy copies per image, with noise of 15% of the image's range.
        seed: Seed of the noise.

    Returns:
        ``(batch, height, width)``, largest over channels.
    """
    images = inputs[adapter.main_input]
    target = answers(adapter, inputs).argmax(-1, keepdim=True)
    spread = NOISE * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(images)
    for _ in range(draws):
        noise = torch.randn(images.shape, generator=generator).to(images)
        point = (images + spread * noise).detach().requires_grad_()
        with torch.enable_grad():
            score = with_content(adapter, inputs, point).gather(1, target).sum()
        total += gradient_of(score, point).abs()
    return (total / draws).amax(1)


def check_saliency(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Compare deleting the most salient pixels with deleting random ones, over several images."""
    if adapter.modality != "image":
        raise Skipped(f"the input is not an image but {adapter.modality}")
    count = affordable_samples(adapter, budget, passes=3 * DRAWS + CONTROLS + 2)
    inputs = sample_inputs(adapter, count)
    images = inputs[adapter.main_input]
    if not images.is_floating_point():
        raise Skipped("the image is whole numbers, which cannot be moved by degrees")
    maps = smooth_gradient(adapter, inputs)
    base = answers(adapter, inputs)
    generator = torch.Generator().manual_seed(1)
    # Other pixels of the same image keep its statistics; black ones would be a signal of their own.
    shuffled = torch.stack(
        [image.flatten(1)[:, torch.randperm(image[0].numel(), generator=generator)].view_as(image) for image in images]
    )

    def moved(scores: torch.Tensor) -> torch.Tensor:
        kept = max(1, int(SHARE * scores[0].numel()))
        chosen = torch.zeros_like(scores.flatten(1), dtype=torch.bool)
        chosen.scatter_(1, scores.flatten(1).topk(kept).indices, True)
        replaced = torch.where(chosen.view_as(scores)[:, None], shuffled, images)
        return distance(adapter, base, answers(adapter, {**inputs, adapter.main_input: replaced}))

    salient = moved(maps)
    random = torch.stack([moved(torch.rand(maps.shape, generator=generator).to(maps)) for _ in range(CONTROLS)]).mean(0)
    gain = mean_interval((salient - random).double().cpu().numpy())
    ratio = float(salient.mean() / random.mean().clamp_min(1e-30))
    better = gain.low > 0
    why = (
        f"deleting the most salient {SHARE:.0%} of pixels moves the answer {ratio:.2g} times as much as random ones; "
        + ("the map shows what matters" if better else "no proof that the map shows what matters")
        + told_fixed(adapter, inputs)
    )
    details = {
        "images": count,
        "held_fixed": held_fixed(adapter, inputs),
        "moved_by_salient": float(salient.mean()),
        "moved_by_random": float(random.mean()),
        "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high},
    }
    drawn = {f"image {index}": maps[index].double().cpu().numpy() for index in range(min(4, count))}
    picture = heat_grid(drawn, "saliency", "Light: the top score reacts to this pixel.", size=150)
    return Outcome(float(np.round(ratio, 4)), None, why, (), details, [picture])
