"""Sharding: of every weight, its gradient and its moments each device keeps a part (FSDP2, ``strategy="fsdp"``).

What is unusual here:

- The repeated blocks are the units whose weights are put together for a moment, and what is outside them is one more.
  A block is a unit only where trials show that every pass of the model calls it exactly once, and where it shares no
  weight with other parts: what the processes exchange must not depend on what one of them draws.
- A checkpoint holds whole tensors and does not tell how many devices wrote it. Every process opens the run directory
  and cuts its own parts out of them, so nothing has to be sent around.
- When a session ends the model is the plain module that it was, with the weights whole again.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import observe
from utils.adapters.structure import BATCH, block_stacks
from utils.runtime.errors import ConfigError, RunError
from utils.runtime.isolation import preserved
from utils.training.config import TrainingConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TRIALS = 8
"""Passes in train mode that must agree on which blocks are called: blocks may be left out at random."""


def is_sharded(config: TrainingConfig) -> bool:
    """Tell whether the settings spread the weights over several devices."""
    return config.strategy == "fsdp" and config.devices > 1


def check_sharding(config: TrainingConfig, module: nn.Module) -> None:
    """Make sure that a model can be trained in parts, before anything is started.

    Raises:
        ConfigError: Another setting does not go with ``strategy="fsdp"``.
        RunError: The model, or this PyTorch, does not.
    """
    if not is_sharded(config):
        return
    if config.compile:
        raise ConfigError(
            "TrainingConfig.compile is true and strategy is 'fsdp'.",
            "Expected one of them: a compiled model whose weights come and go is not supported in this version.",
            "Set compile to false, or strategy to 'ddp'.",
        )
    if config.resolved_precision == "16-mixed":
        here = ", which is 16-mixed on this GPU" if config.precision == "auto" else ""
        raise ConfigError(
            f"TrainingConfig.precision is {config.precision!r}{here}, and strategy is 'fsdp'.",
            "Expected bf16-mixed or 32-true: the scaler of float16 gradients knows no sharded ones.",
            "Set precision to one of these, or strategy to 'ddp'.",
        )
    from torch.distributed import fsdp

    if not hasattr(fsdp, "fully_shard"):
        raise RunError(
            f"PyTorch {torch.__version__} has no torch.distributed.fsdp.fully_shard.",
            "Expected PyTorch 2.6 or newer for strategy='fsdp'.",
            "Install it, or set strategy to 'ddp'.",
        )
    for name, parameter in module.named_parameters():
        fault = "has no axis" if parameter.dim() == 0 else "" if parameter.is_contiguous() else "is not contiguous"
        if fault:
            raise RunError(
                f"The parameter {name} {fault}, and TrainingConfig.strategy is 'fsdp'.",
                "Expected contiguous tensors with at least one axis: each is cut along its first.",
                "Keep a number as a tensor of shape (1,) and a view as .contiguous(), or set strategy to 'ddp'.",
            )


def units(adapter: ModelAdapter) -> list[str]:
    """Return the names of the blocks whose weights can be put together and given up one block at a time."""
    module = adapter.module
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    trials: list[Counter[str]] = []
    inputs = adapter.example_inputs(BATCH)
    for trial in range(TRIALS):
        calls: Counter[str] = Counter()

        def note(name: str, *_: Any, calls: Counter[str] = calls) -> None:
            calls[name] += 1

        with preserved(module, "units", trial), torch.no_grad():
            module.train()
            with observe(module, note):
                adapter.logits(inputs)
        trials.append(calls)

    def fits(name: str) -> bool:
        own = Counter(id(p) for _, p in module.get_submodule(name).named_parameters(remove_duplicate=False))
        return all(calls[name] == 1 for calls in trials) and all(uses[key] == count for key, count in own.items())

    # What happens to one block of a stack at random may happen to the others in a later step.
    stacks = [stack for stack in block_stacks(module).value if len({tuple(c[n] for n in stack) for c in trials}) == 1]
    return [name for stack in stacks for name in stack if fits(name)]


class Sharding:
    """A model in parts, one on each device, from `apply` to `undo`."""

    def __init__(self, adapter: ModelAdapter, config: TrainingConfig) -> None:
        """Find out where the model can be cut; every process finds the same.

        Args:
            adapter: The model, whole.
            config: The run's settings.
        """
        self.module = adapter.module
        self.units = units(adapter)
        self._mixed = config.resolved_precision == "bf16-mixed"
        self._before: list[tuple[nn.Module, type, dict[str, set[Any]], set[str]]] = []

    def apply(self, mesh: "DeviceMesh") -> None:
        """Cut the weights along their first axis and keep this device's part.

        Args:
            mesh: The devices, in one dimension.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Weights travel in bfloat16; gradients are summed in float32, and what the optimizer changes is float32 too.
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = mixed if self._mixed else MixedPrecisionPolicy()
        whole_model = [(child, type(child), _hooks(child), set(vars(child))) for child in self.module.modules()]
        for part in (*map(self.module.get_submodule, self.units), self.module):
            kind = type(part)
            # The last unit is cut again after its pass too: a measurement is followed by no backward pass that would,
            # and nothing may see, or keep computing with, weights that a step has left behind.
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            # Reports and messages name the user's class.
            type(part).__name__ = kind.__name__
        for child, kind, hooks, names in whole_model:
            added = set(vars(child)) - names
            for name in [name for name in added if isinstance(vars(child)[name], bool)]:
                # Marks for the compiler, which would else go into checkpoints as memory of the model.
                delattr(child, name)
                added.remove(name)
            self._before.append((child, kind, hooks, added))

    def undo(self) -> None:
        """Make the module what it was, with the present weights whole and in main memory; all processes call this."""
        made: dict[int, nn.Parameter] = {}
        cut: list[nn.Parameter] = []  # kept alive to the end, or another could get the id of one that is gone
        for child, kind, hooks, added in self._before:
            for name, parameter in child._parameters.items():
                if parameter is not None and is_part(parameter):
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
                        cut.append(parameter)
                    child._parameters[name] = made[id(parameter)]
            child.__class__ = kind
            for name in added:
                del vars(child)[name]
            for name, kept in hooks.items():
                present = vars(child)[name]
                for key in [key for key in present if key not in kept]:
                    del present[key]
        self._before.clear()
        self.module.to("cpu")

    def weights(self, keep: bool = True) -> dict[str, Tensor]:
        """Return the model's state with whole tensors, tied ones being one; all processes call this.

        Args:
            keep: Whether this process needs them; the others only take part.
        """
        # Not by address: parts without a row have none, and all processes must ask for the same tensors.
        owners = {name: id(p) for name, p in self.module.named_parameters(remove_duplicate=False)}
        state = self.module.state_dict()
        first: dict[int, str] = {}
        for name, tensor in state.items():
            stored = first.setdefault(owners.get(name, id(tensor)), name)
            state[name] = whole(tensor, keep) if stored == name else state[stored]
        return state

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Give every device the buffers of the first, which is what a checkpoint keeps; DDP does so too."""
        buffers = [buffer for buffer in self.module.buffers() if buffer.numel()]
        if not buffers:
            return
        sent = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in buffers])
        torch.distributed.broadcast(sent, 0)
        if torch.distributed.get_rank():
            for buffer, part in zip(buffers, sent.split([buffer.nbytes for buffer in buffers]), strict=True):
                buffer.copy_(part.clone().view(buffer.dtype).view_as(buffer))


@contextmanager
def explained(adapter: ModelAdapter) -> Iterator[None]:
    """Say in words when a model turns out not to work in parts while the block runs.

    Raises:
        RunError: It does not.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        lines = str(error).strip().splitlines()
        if not lines or not any(word in lines[0] for word in ("DTensor", "FSDP", "fully_shard")):
            raise
        raise RunError(
            f"{adapter.name} cannot be trained in parts: {lines[0]}",
            "Expected a model that reads a block's weights only while it calls that block, all of one number type.",
            "Set strategy to 'ddp'.",
        ) from error


def is_part(value: Any) -> bool:
    """Tell whether a value is a tensor of which this device holds a part."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this device's part of a tensor, sharing its memory; one that is not cut is returned as it is."""
    return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def whole(value: Any, keep: bool = True) -> Any:
    """Put together the tensors in nested dicts and lists, in main memory; all processes call this.

    Args:
        value: What some of whose tensors may be cut; others are returned as they are.
        keep: Whether this process needs the result; the others get empty tensors.
    """
    if isinstance(value, dict):
        return {name: whole(item, keep) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item, keep) for item in value)
    if not is_part(value):
        return value
    # One tensor after the other: only one of them is ever whole on a device.
    full = value.full_tensor()
    return full.to("cpu") if keep else torch.empty(0)


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this device's part of a whole tensor, cut like another; whole where the other is whole."""
    if not is_part(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    parts = torch.chunk(tensor, mesh.size(), dim=0)
    number = mesh.get_local_rank()
    # A copy, or the part would keep the whole in memory.
    own = (parts[number] if number < len(parts) else tensor[:0]).clone().to(like.device)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def divided_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with this device's part of each tensor that belongs to a cut parameter."""
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    cut = dict(state["state"])
    for number, owner in zip(numbers, owners, strict=True):
        if number in cut:
            kept = cut[number].items()
            cut[number] = {name: divided(v, owner) if isinstance(v, Tensor) else v for name, v in kept}
    return {**state, "state": cut}


def _hooks(module: nn.Module) -> dict[str, set[Any]]:
    """Return the keys of a module's hooks, by the name of their dict."""
    return {name: set(value) for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}
