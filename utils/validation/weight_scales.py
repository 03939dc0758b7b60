"""How strongly each weight of an untrained model amplifies, against theory and against its sisters.

The gain of a matrix is its root mean square times the square root of its fan-in: by how much it scales independent
inputs. Every usual scheme (LeCun 1998; Glorot and Bengio 2010; He et al. 2015; normal with 0.02) stays between 0.1 and
2. Zeros are on purpose and never counted. One odd matrix is told by its sisters, the matrices of the same role in
other blocks.
"""

import math
import re
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Finding
from utils.validation.gradient_reach import training_inputs
from utils.validation.probing import logits
from utils.validation.substitution import parameters_as

LARGEST_SOUND_GAIN = 2.2
LARGE, TINY = 3.0, 1e-3
"""Gains that no scheme gives to half of the matrices."""
STRAY = 30.0
"""How many times its sisters' gain makes one matrix stand out."""
LARGEST_HEAD = 3.0
"""Standard deviation of a matrix; some families draw heads with 1."""
LARGEST_TABLE = 20.0
"""Standard deviation of an embedding; the largest in use is 1, or the square root of the width of small models."""
SAMPLED = 65_536
INIT_KEY = re.compile(r"init\w*_(range|std|scale|factor)$|^init_std$")
EXPLODING_HINT = (
    "Initialise with a standard deviation near 1/sqrt(fan-in) (0.02 is usual), residual outputs smaller still."
)
VANISHING_HINT = (
    "Initialise with a standard deviation near 1/sqrt(fan-in); only exact zeros on a bypassed branch are fine."
)


@dataclass(frozen=True)
class Weight:
    """A matrix of a layer."""

    name: str
    gain: float
    spread: float
    fan_in: int
    table: bool
    """Whether it is an embedding, which is read and not multiplied with."""


def weights(adapter: ModelAdapter) -> list[Weight]:
    """Return every matrix that is not all zero, in registration order, but no depthwise kernels and no small ones."""
    found = []
    for name, parameter in adapter.module.named_parameters():
        if parameter.dim() < 2 or not parameter.is_floating_point() or parameter.numel() < 16:
            continue
        owner = adapter.module.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Embedding) and min(parameter.shape[:2]) < 2:
            continue
        if not (spread := _spread(parameter)):
            continue
        fan_in = _fan_in(owner, parameter)
        found.append(Weight(name, spread * math.sqrt(fan_in), spread, fan_in, isinstance(owner, nn.Embedding)))
    return found


def largest_gain(adapter: ModelAdapter) -> float:
    """Return the largest gain among the matrices that are multiplied with; 0 when there are none."""
    return max((weight.gain for weight in weights(adapter) if not weight.table), default=0.0)


def largest_weight(adapter: ModelAdapter) -> str | None:
    """Return the name of the matrix with the largest gain if it is beyond what schemes give."""
    largest = max(weights(adapter), key=lambda weight: weight.gain, default=None)
    return largest.name if largest is not None and largest.gain > LARGEST_SOUND_GAIN else None


def as_configured(adapter: ModelAdapter) -> bool:
    """Tell whether the matrices are drawn as the config's class states by default: no accident, however odd."""
    stated = _stated_spreads(adapter)
    spreads = [weight.spread for weight in weights(adapter) if not weight.table]
    return bool(spreads) and any(0.7 * value < median(spreads) < 1.4 * value for value in stated)


def _stated_spreads(adapter: ModelAdapter) -> set[float]:
    """Return the standard deviations that the config states and its class has by default."""
    config = getattr(adapter.module, "config", None)
    if config is None or isinstance(config, dict):
        return set()
    try:
        usual = vars(type(config)())
    except Exception:
        # Configs without defaults state nothing.
        return set()
    return {
        float(value)
        for key, value in vars(config).items()
        if INIT_KEY.search(key) and isinstance(value, (int, float)) and usual.get(key) == value
    }


def weight_faults(adapter: ModelAdapter) -> list[Finding]:
    """Find matrices of an untrained model that are far too large or all but zero.

    Codes: ``exploding_init``, ``vanishing_init``.
    """
    every = weights(adapter)
    hidden = [weight for weight in every if not weight.table]
    if not hidden:
        return []
    large = [weight for weight in hidden if weight.gain > LARGE]
    tiny = [weight for weight in hidden if weight.gain < TINY]
    if len(large) * 2 > len(hidden) and len(large) > 1 and not _scaled_at_runtime(adapter, large):
        worst = large[0]
        message = f"{len(large)} of {len(hidden)} matrices amplify more than {LARGE:g} times, {_stated(worst)} first"
        return [_finding("exploding_init", worst, message)]
    if len(tiny) * 2 > len(hidden) and (len(tiny) > 1 or len(hidden) == 1):
        message = (
            f"{len(tiny)} of {len(hidden)} matrices keep less than {TINY:g} of the signal, {_stated(tiny[0])} first"
        )
        return [_finding("vanishing_init", tiny[0], message)]
    findings = []
    for weight in every:
        if weight.table:
            if weight.spread > LARGEST_TABLE:
                message = f"the embedding's standard deviation is {weight.spread:.3g}; usual is 0.02 to 1"
                findings.append(_finding("exploding_init", weight, message))
            continue
        sisters = [other.gain for other in hidden if other is not weight and role(other.name) == role(weight.name)]
        if len(sisters) < 2:
            continue
        usual = median(sisters)
        message = f"{_stated(weight)} beside {usual:.2g} for the same matrix of its {len(sisters)} sisters"
        if weight.gain > max(LARGE, STRAY * usual):
            findings.append(_finding("exploding_init", weight, message))
        elif weight.gain < min(TINY, usual / STRAY):
            findings.append(_finding("vanishing_init", weight, message))
    return findings[:3]


def _scaled_at_runtime(adapter: ModelAdapter, large: list[Weight]) -> bool:
    """Tell whether forward() divides most large matrices by their gain itself, as equalised learning rates do.

    Then the modules that hold them do not amplify, and with the matrices divided once more they either put out that
    much less, or, where they normalise what they multiply with, the same. What only saturates does neither.
    """
    owners: dict[str, list[float]] = {}
    for weight in large:
        owners.setdefault(weight.name.rpartition(".")[0], []).append(weight.gain)
    gains = {id(adapter.module.get_parameter(weight.name)): weight.gain for weight in large}
    inputs = training_inputs(adapter)
    usual = _amplifications(adapter, inputs, set(owners))
    parts = iter([gains[id(p)] for p in adapter.module.parameters() if id(p) in gains])
    with parameters_as(adapter, [weight.name for weight in large], lambda p: p / next(parts)):
        tamed = _amplifications(adapter, inputs, set(owners))
    scaled = [
        weight
        for weight in large
        if (owner := weight.name.rpartition(".")[0]) in usual.keys() & tamed.keys()
        and usual[owner] <= LARGE
        and (tamed[owner] < 1.5 * usual[owner] / median(owners[owner]) or tamed[owner] > 0.99 * usual[owner])
    ]
    return len(scaled) * 2 > len(large)


def _amplifications(adapter: ModelAdapter, inputs: dict[str, Tensor], owners: set[str]) -> dict[str, float]:
    """Return by how much each of some modules scales what it reads, at most; ids count as one."""
    found: dict[str, float] = {}

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        entering, leaving = first_tensor(given), first_tensor(output)
        if name not in owners or entering is None or leaving is None or not leaving.is_floating_point():
            return
        scale = float(entering.detach().float().square().mean().sqrt()) if entering.is_floating_point() else 1.0
        if scale > 0:
            found[name] = max(found.get(name, 0.0), float(leaving.detach().float().square().mean().sqrt()) / scale)

    with observe(adapter.module, note):
        logits(adapter, inputs)
    return found


def exploding_head(adapter: ModelAdapter) -> str | None:
    """Return the name of the largest matrix that no scheme draws, nor a config: beyond `LARGEST_HEAD`."""
    large = [w for w in weights(adapter) if not w.table and w.spread > LARGEST_HEAD and w.gain > LARGE]
    return max(large, key=lambda weight: weight.gain).name if large else None


def loud_head(adapter: ModelAdapter, head: str | None, inputs: dict[str, Tensor]) -> tuple[str, float] | None:
    """Return the name of an untied head's matrix of a large gain, and the first loss without that gain.

    A tied table is drawn for reading too, and a config may state the scale; neither is an accident.
    """
    weight = next((w for w in weights(adapter) if head is not None and w.name == f"{head}.weight"), None)
    if weight is None or weight.table or weight.gain <= LARGE:
        return None
    if any(0.7 * value < weight.spread < 1.4 * value for value in _stated_spreads(adapter)):
        return None
    with parameters_as(adapter, [weight.name], lambda p: p / weight.gain):
        result = logits(adapter, inputs)
        loss = float(adapter.loss(result, adapter.random_labels(result)))
    return weight.name, loss


def _spread(parameter: Tensor) -> float:
    """Return the root mean square of a parameter, from a sample of a large one."""
    flat = parameter.detach().flatten()
    return float(flat[:: max(1, flat.numel() // SAMPLED)].float().square().mean().sqrt())


def _fan_in(owner: nn.Module, parameter: Tensor) -> int:
    """Return how many numbers one output is summed from; for layers of unknown layout the smaller side."""
    if isinstance(owner, nn.Embedding):
        return 1
    known = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    if isinstance(owner, known):
        return parameter[0].numel()
    return min(parameter.shape[-2:])


def role(name: str) -> str:
    """Return a parameter's name without its numbers, the same for the same part of every block."""
    return re.sub(r"\d+", "#", name)


def _stated(weight: Weight) -> str:
    return f"{weight.name} (standard deviation {weight.spread:.2g}, fan-in {weight.fan_in}: gain {weight.gain:.2g})"


def _finding(code: str, weight: Weight, message: str) -> Finding:
    hint = EXPLODING_HINT if code == "exploding_init" else VANISHING_HINT
    reproduction = f"w = model.get_parameter({weight.name!r})\nprint(w.std(), w.std() * {weight.fan_in} ** 0.5)"
    return Finding(code, "fail", weight.name, message, hint, reproduction)
