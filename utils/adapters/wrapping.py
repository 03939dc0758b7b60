"""The module that is really meant: without the wrappers of parallel and compiled models, and fit to be called."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from utils.runtime.errors import AdapterError


def unwrapped(model: Any) -> nn.Module:
    """Return the module inside `torch.nn.DataParallel`, `DistributedDataParallel` and `torch.compile`.

    Raises:
        AdapterError: `model` is no module, has no forward, is a TorchScript module or an exported program, is
            quantised, or has parameters without values of their own.
    """
    while isinstance(model, nn.Module):
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        # A compiled module hides the calls of its submodules and would be compiled anew for every shape tried.
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"A {type(model).__name__} was given where a model was expected.",
            "Expected a torch.nn.Module or what utils.load_model returns.",
            "For a class, create an instance first; for a link or a path, call utils.load_model.",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise AdapterError(
            f"A TorchScript module ({type(model).__name__}) was given.",
            "Expected the Python module, because the calls inside a scripted one cannot be watched.",
            "Pass the model from before torch.jit.script or torch.jit.trace.",
        )
    if type(model).forward is nn.Module.forward:
        raise AdapterError(
            f"{type(model).__name__} has no forward().",
            "Expected a model that can be called.",
            "Define forward(), or pass the model that holds these parts.",
        )
    _require_own_code(model)
    _require_values(model)
    return model


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """Return the submodules on which ``compile()`` was called in place."""
    return [child for child in module.modules() if getattr(child, "_compiled_call_impl", None) is not None]


@contextmanager
def uncompiled(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Run a block with compiled submodules as they are written; compiling them for every shape tried takes minutes."""
    kept = [(part, part.__dict__.pop("_compiled_call_impl")) for part in parts]
    try:
        yield
    finally:
        for part, compiled in kept:
            part._compiled_call_impl = compiled


def _require_own_code(model: nn.Module) -> None:
    """Refuse modules whose calls cannot be followed or that cannot train.

    Raises:
        AdapterError: The model is an exported program or holds quantised layers.
    """
    try:
        modes = [(child, child.training) for child in model.modules()]
        model.eval()
        for child, training in modes:
            child.training = training
    except NotImplementedError:
        raise AdapterError(
            f"An exported program ({type(model).__name__}) was given.",
            "Expected the Python module: an exported one has no train or eval mode and no submodules that run.",
            "Pass the model from before torch.export.",
        ) from None
    for name, child in model.named_modules():
        packed = getattr(child, "_packed_params", None)
        if packed is not None or "quantized" in type(child).__module__.split("."):
            raise AdapterError(
                f"The layer {name or type(model).__name__} is quantised ({type(child).__name__}).",
                "Expected weights that can train; the scales of quantised layers also mix all positions and samples.",
                "Validate the model from before quantisation.",
            )


def _require_values(model: nn.Module) -> None:
    """Refuse parameters without values, or whose values autograd may not use.

    Raises:
        AdapterError: A parameter is on the meta device or was made in inference mode.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            continue
        if parameter.is_meta:
            raise AdapterError(
                f"The parameter {name} is on the meta device and has no values.",
                "Expected a model with weights.",
                "Build it outside torch.device('meta'), or call model.to_empty(device='cpu') and initialise it.",
            )
        if parameter.is_inference():
            raise AdapterError(
                f"The parameter {name} was made in torch.inference_mode() and can never get a gradient.",
                "Expected a model that can train.",
                "Build or load the model outside torch.inference_mode().",
            )


def lazy_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of parameters that have no shape before the first forward pass."""
    return tuple(name for name, parameter in module.named_parameters() if is_lazy(parameter))
