"""Less memory for more time: the activations inside repeated blocks are computed again in the backward pass."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.adapters.structure import block_stacks, lone_blocks
from utils.runtime.errors import ConfigError


@contextmanager
def recomputed_blocks(module: nn.Module) -> Iterator[list[str]]:
    """Keep, of every repeated block, only its inputs for the backward pass (Chen et al., arXiv:1604.06174).

    Random streams are kept too, so dropout draws the same in both passes and the gradients are the same numbers. Blocks
    with batch statistics are left as they are: computing them again would count each batch twice.

    Args:
        module: The model.

    Yields:
        The names of the blocks.

    Raises:
        ConfigError: The model has no repeated blocks that can be computed twice.
    """
    stacks = block_stacks(module)
    names = [name for stack in stacks.value for name in stack] or lone_blocks(module)
    chosen = [name for name in names if not any(_counts(part) for part in module.get_submodule(name).modules())]
    if not chosen:
        raise ConfigError(
            f"TrainingConfig.gradient_checkpointing is set, and {type(module).__name__} has no block to compute again: "
            f"{'all repeated blocks keep batch statistics' if names else stacks.reason}.",
            "Expected blocks in an nn.ModuleList, or two of the same shape, without batch normalisation.",
            "Set gradient_checkpointing to false, and lower batch_size for less memory.",
        )
    blocks = [module.get_submodule(name) for name in chosen]
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        # An attribute of the instance goes before the method of its class.
        vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield chosen
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = own
        for part in module.modules():
            # Blocks that were copied meanwhile, because the model grew, have their own.
            own = vars(part).get("forward")
            if isinstance(own, functools.partial) and own.func is checkpoint:
                del vars(part)["forward"]


def _counts(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._NormBase) and bool(part.track_running_stats)
