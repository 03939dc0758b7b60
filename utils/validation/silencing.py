"""Parts of a model silenced, that is, with zeros for matrices: do the logits still tell two samples apart?"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import Observer, first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.validation.probing import content_input, logits
from utils.validation.substitution import parameters_as, zero


class Probe:
    """Asks whether the logits still tell samples apart when parts of a model are silenced, that is, hold zeros.

    Attributes:
        adapter: The model, in eval mode.
        plain: Logits per variant of the input with nothing silenced.
        varying: Names of the modules whose first input differs between the samples, per variant.
    """

    def __init__(self, adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> None:
        """Run the model once per variant; where there are two streams, each varies alone once."""
        self.adapter = adapter
        names = list(dict.fromkeys([adapter.main_input, content_input(adapter)]))
        streams = [[name] for name in names] if len(names) > 1 else [names]
        self.variants: list[dict[str, Tensor]] = []
        self.plain: list[Tensor] = []
        self.varying: list[set[str]] = []
        for varying in streams:
            variant = {
                key: value if key in varying else value[:1].expand_as(value).clone() for key, value in inputs.items()
            }
            moving: set[str] = set()
            with observe(adapter.module, _note_varying(moving)):
                result = logits(adapter, variant)
            if gap(result) > 1e-6 * float(result.abs().max()):
                self.variants.append(variant)
                self.plain.append(result)
                self.varying.append(moving)

    def silence(self, parts: list[str]) -> list[Tensor]:
        """Return the logits per variant while the matrices of these modules are zero."""
        names = [name for part in parts for name in matrices(self.adapter.module, part)]
        with parameters_as(self.adapter, names, zero):
            return [logits(self.adapter, variant) for variant in self.variants]

    def cuts(self, part: str) -> bool:
        """Tell whether nothing leads around a module: silenced, it hides what it hid nothing of before."""
        return any(self.hidden([part]))

    def hidden(self, parts: list[str]) -> list[bool]:
        """Tell per variant whether modules, silenced together, hide what came into one of them."""
        result = []
        for before, after, moving in zip(self.plain, self.silence(parts), self.varying, strict=True):
            # What reads another stream into its own, which is alike for all samples, has no input to pass on.
            informed = any(name == part or name.startswith(f"{part}.") for part in parts for name in moving)
            lost = gap(after) <= min(1e-6 * float(after.abs().max()), 1e-3 * gap(before))
            result.append(informed and lost and bool(torch.isfinite(after).all()))
        return result

    def matters(self, part: str) -> bool:
        """Tell whether the logits change at all when a module is silenced."""
        return any(not torch.equal(a, b) for a, b in zip(self.plain, self.silence([part]), strict=True))


def _note_varying(names: set[str]) -> Observer:
    """Return an observer that collects the modules whose first input differs between the samples."""

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        before = first_tensor(given)
        if before is not None and before.is_floating_point() and before.dim() > 1 and differ(before):
            names.add(name)

    return note


def matrices(module: nn.Module, part: str) -> list[str]:
    """Return the names of the parameters with two axes or more in a part of a module."""
    inside = module.get_submodule(part).named_parameters()
    return [f"{part}.{key}" for key, p in inside if p.dim() > 1 and p.is_floating_point()]


def differ(tensor: Tensor) -> bool:
    """Tell whether the two samples differ in a tensor with the batch first, or with it second."""
    if not bool(torch.isfinite(tensor).all()):
        return False
    if tensor.shape[0] != 2 and tensor.shape[1] == 2:
        tensor = tensor.transpose(0, 1)
    # Patches and windows are folded into the batch, sample by sample; what cannot be told apart counts as equal.
    halves = tensor.chunk(2) if len(tensor) % 2 == 0 else (tensor, tensor)
    return not torch.equal(halves[0], halves[-1])


def gap(result: Tensor) -> float:
    """Return the largest difference between two samples' logits."""
    return float((result[0].float() - result[1].float()).abs().max())
