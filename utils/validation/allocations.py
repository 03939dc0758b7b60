"""Which memory a model's operators allocate, when it is freed, and which module asked for it.

Storages are counted where operators return them, so the numbers are exact, the same on every machine and free of what
the allocator keeps. Scratch memory inside a kernel is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from utils.runtime.dispatch import OperatorMode
from utils.validation.watching import Running


class Allocations(OperatorMode):
    """Follows every storage that an operator in the block returns until it is freed.

    Attributes:
        current: Bytes that are alive now.
        peak: Most bytes that were alive at once.
        count: How many allocations there were.
    """

    def __init__(self, module: nn.Module, inputs: Iterable[Any] = (), running: Running | None = None) -> None:
        """Leave out what is there already.

        Args:
            module: The model: its parameters and buffers do not count.
            inputs: Neither do these.
            running: Tells which module is at work; None for no names.
        """
        super().__init__()
        known = [*module.parameters(), *module.buffers(), *(t for t in inputs if isinstance(t, Tensor))]
        self._known = {t.untyped_storage()._cdata for t in known if t.layout == torch.strided}
        self._alive: dict[int, tuple[Any, int, int, str, int]] = {}
        self.running = running
        self.current = self.peak = 0
        self.count = 0

    def addresses(self, since: int = 0) -> set[int]:
        """Return the addresses of the storages that are alive and were allocated after the first `since`."""
        return {address for _, _, address, _, number in list(self._alive.values()) if number >= since}

    def makers(self, addresses: set[int]) -> Counter[str]:
        """Return the bytes alive at these addresses by the module in which they were made."""
        made = Counter[str]()
        for _, size, address, where, _ in list(self._alive.values()):
            if address in addresses:
                made[where] += size
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and take note of what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        size = storage.nbytes()
        where = self.running.name if self.running is not None else ""
        # The Python object of a storage lives as long as the storage does.
        self._alive[key] = (
            weakref.ref(storage, lambda _: self._free(key)),
            size,
            storage.data_ptr(),
            where,
            self.count,
        )
        self.current += size
        self.peak = max(self.peak, self.current)
        self.count += 1

    def _free(self, key: int) -> None:
        self.current -= self._alive.pop(key)[1]
