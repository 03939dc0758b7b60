"""A model comes back exactly as it was: modes, parameters, gradients, buffers, attributes, hooks, random streams.

So do the global settings of torch and of the process; see `utils.runtime.surroundings`.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from utils.runtime.errors import SeedbedError
from utils.runtime.resources import format_bytes
from utils.runtime.seeding import isolated_streams
from utils.runtime.snapshot import ObjectState, bits, restore_tensor
from utils.runtime.surroundings import Surroundings

COPY_BYTES = 200e6
"""Parameters up to this size in all are copied and put back; of larger ones a change is only noticed."""
SAMPLED = 1024
"""Values per parameter that are kept of a model too large to copy, beside the sum of all."""


class ModelChangedError(SeedbedError):
    """A forward or backward pass changed the parameters themselves.

    Attributes:
        names: The parameters.
        restored: Whether they have their values back.
    """

    def __init__(self, names: tuple[str, ...], restored: bool) -> None:
        """Name them."""
        self.names, self.restored = names, restored
        more = len(names) - 1
        loss = (
            f" Models of more than {format_bytes(COPY_BYTES)} are not copied, so the values could not be put back:"
            " load the model again."
        )
        super().__init__(
            f"A forward or backward pass changed the values of {names[0]}"
            + (f" and {more} more parameter{'s' if more > 1 else ''}." if more else ".")
            + ("" if restored else loss),
            "A model may change its buffers, never its parameters, outside an optimizer step.",
            "Look for in-place operations on weights in forward().",
        )


@contextmanager
def preserved(module: nn.Module, *seed: int | str) -> Iterator[nn.Module]:
    """Let a block run the model freely and put everything back afterwards.

    Restored are: the train or eval mode of every submodule, parameters (values, storage, ``requires_grad``), gradients
    (the very same tensors), buffers, hooks, attributes (caches, counters, plain tensors, nested containers and the
    model's own simple objects; see `utils.runtime.snapshot`), the random streams, and the global settings of torch and
    of the process (`utils.runtime.surroundings`).

    Not restored are: parameter values of models above `COPY_BYTES` (a change is noticed and raised), plain tensors
    beyond `utils.runtime.snapshot.PLAIN_BYTES`, objects of other libraries that the model holds, iterators and files,
    globals and class attributes of the model's code, what the model sends elsewhere. Changes through ``.data`` in a
    large model are noticed at the end of the outermost block around it.

    Args:
        module: The model.
        *seed: Coordinates that seed the block's random streams.

    Raises:
        ModelChangedError: The block changed values of parameters.

    Warns:
        RuntimeWarning: A setting of the process could not be put back.
    """
    modes = [(child, child.training) for child in module.modules()]
    # Inference tensors have no version counter to watch, and meta tensors no values.
    buffers = [(b, b.data, b.detach().clone()) for b in module.buffers() if b.device.type != "meta"]
    parameters = list(module.named_parameters())
    state = ObjectState(module, [*(p for _, p in parameters), *module.buffers()])
    surroundings = Surroundings()
    changed: list[str] = []
    restored = True
    with ExitStack() as stack:
        watch = stack.enter_context(_watching(parameters))
        for _, parameter in parameters:
            parameter.grad = None
        stack.enter_context(isolated_streams(*seed))
        try:
            yield module
        finally:
            lost = surroundings.restore()
            state.restore()
            for child, training in modes:
                # A scripted module keeps its mode out of reach of its attributes.
                if child.training != training:
                    child.training = training
            for buffer, data, value in buffers:
                restore_tensor(buffer, data, value)
            changed, restored = watch.restore()
            if lost:
                # Last of all, because a warning may be an error.
                warnings.warn(f"Settings of the process could not be put back: {'; '.join(lost)}.", RuntimeWarning, 3)
    if changed:
        raise ModelChangedError(tuple(changed), restored)


_COPIES: dict[int, Tensor] = {}
"""Values of the parameters that blocks in progress have copied, by the parameter's id."""
_SUMMED: set[int] = set()
"""Parameters of which a block in progress has a checksum."""


class _Watch:
    """Parameters as they were."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        self.parameters = [(name, p, _version(p), p.requires_grad, p.grad) for name, p in parameters]
        self.data = {id(p): p.data for _, p in parameters if _is_plain(p)}
        new = [p for _, p in parameters if _is_plain(p) and id(p) not in _COPIES and id(p) not in _SUMMED]
        self.copied: list[int] = []
        self.sums: dict[int, tuple[int, Tensor]] = {}
        if sum(p.nbytes for p in new) <= COPY_BYTES:
            self.copied = [id(p) for p in new]
            _COPIES.update((id(p), p.detach().to("cpu", copy=True)) for p in new)
        else:
            self.sums = {id(p): _checksum(p) for p in new}
            _SUMMED.update(self.sums)

    def restore(self) -> tuple[list[str], bool]:
        """Put everything back that can be; return the names whose values had changed, and whether all are back."""
        changed: list[str] = []
        restored = True
        for name, parameter, version, requires_grad, grad in self.parameters:
            key = id(parameter)
            if key in _COPIES:
                if restore_tensor(parameter, self.data[key], _COPIES[key]):
                    changed.append(name)
            else:
                if key in self.data and parameter.data_ptr() != self.data[key].data_ptr():
                    parameter.data = self.data[key]
                lost = _version(parameter) != version
                if key in self.sums and not lost:
                    now, sample = _checksum(parameter)
                    lost = now != self.sums[key][0] or not torch.equal(sample, self.sums[key][1])
                if lost:
                    changed.append(name)
                    restored = False
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        return changed, restored


@contextmanager
def _watching(parameters: list[tuple[str, nn.Parameter]]) -> Iterator[_Watch]:
    watch = _Watch(parameters)
    try:
        yield watch
    finally:
        for key in watch.copied:
            del _COPIES[key]
        _SUMMED.difference_update(watch.sums)


def _is_plain(parameter: Tensor) -> bool:
    """Tell whether a parameter has values of its own to read: no meta, sparse, sharded or quantised one."""
    return (
        type(parameter).__torch_dispatch__ is Tensor.__torch_dispatch__
        and parameter.layout == torch.strided
        and parameter.device.type != "meta"
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _checksum(tensor: Tensor) -> tuple[int, Tensor]:
    """Return the sum over a tensor's bits, which any one change moves, and a sample for changes that cancel in it."""
    flat = bits(tensor)
    if flat.nbytes % 8 == 0:
        # Sums of 64-bit numbers need no widening and are many times faster.
        flat = flat.view(torch.int64)
    return int(flat.sum()), flat[:: max(1, flat.numel() // SAMPLED)].clone()
