"""The memory of a training step: what can be counted before one is taken, and what is there for it."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.runtime.isolation import preserved
from utils.runtime.resources import available_memory, is_out_of_memory
from utils.training.batching import LENGTHS, collate
from utils.training.config import TrainingConfig
from utils.training.prepared_data import PreparedData
from utils.training.recomputation import recomputed_blocks

SPARE = 1.15
"""What a run needs is taken this much larger than measured before it is called possible."""


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def trained_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters that train."""
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def activation_bytes(adapter: ModelAdapter, data: PreparedData, config: TrainingConfig) -> int:
    """Return the bytes that one sample keeps for its backward pass, counted on the longest one where the model is.

    Zero where it cannot be counted: for models that cannot train on one sample alone, such as those with batch
    normalization, and when memory runs out.
    """
    from utils.training.evaluation import objective

    own = {p.untyped_storage().data_ptr() for p in adapter.module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = {name: tensor.to(adapter.device) for name, tensor in largest_batch(data, 1).items()}
    with ExitStack() as stack:
        stack.enter_context(preserved(adapter.module, config.seed, "estimate"))
        if config.gradient_checkpointing:
            stack.enter_context(recomputed_blocks(adapter.module))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        adapter.module.train()
        try:
            held = objective(adapter, data, batch, 0)[0]
        except Exception as error:
            # Batch normalization over one value cannot train; the whole batch is measured without this look ahead.
            if "more than 1 value per channel" not in str(error) and not is_out_of_memory(error):
                raise
            return 0
        del held
    return sum(kept.values())


def largest_batch(data: PreparedData, size: int) -> dict[str, Tensor]:
    """Return the training batch that takes the most memory: of the longest samples, where they differ in length."""
    samples = torch.arange(data.train_samples)
    lengths = [data.train[name] for name in LENGTHS if name in data.train]
    if lengths:
        samples = torch.stack([length.long() for length in lengths]).sum(0).argsort(descending=True)
    return collate(data.train, samples[torch.arange(size) % len(samples)])


def run_bytes(adapter: ModelAdapter, config: TrainingConfig, device: torch.device) -> int:
    """Return the bytes that a run holds beside the activations, and beside the model itself on a CPU.

    Gradients, AdamW's two averages, the moving average of the weights; on a GPU the weights, and on a CPU the copy that
    a checkpoint takes in memory before it is written.
    """
    weights = tensor_bytes(adapter.module)
    trained = trained_bytes(adapter.module)
    average = weights if config.ema_decay is not None else 0
    if device.type == "cuda":
        return weights + 3 * trained + average
    return 3 * trained + average + checkpoint_bytes(adapter, config)


def checkpoint_bytes(adapter: ModelAdapter, config: TrainingConfig) -> int:
    """Return the bytes of a checkpoint: weights, AdamW's two averages, and the moving average where there is one."""
    weights = tensor_bytes(adapter.module)
    trained = trained_bytes(adapter.module)
    return weights + 2 * trained + (weights if config.ema_decay is not None else 0)


def room(device: torch.device) -> int:
    """Return the bytes of memory that are free for a run; a model that is on the GPU already makes room for itself."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_memory()
