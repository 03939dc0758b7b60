"""The module that is really meant: without the wrappers of parallel and compiled models, and fit to be called."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from utils.runtime.errors import AdapterError


def unwrapped(model: Any) -> nn.Module:
    """Return the module inside `torch.nn.DataParallel`, `DistributedDataParallel` and `torch.compile`.

    Raises:
        AdapterError: `model` is no module, is a TorchScript module, or has uninitialised parameters.
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
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise AdapterError(
            f"The parameter {lazy[0]} has no shape yet (a lazy module).",
            "Expected a model whose parameters all exist.",
            "Run one forward pass on real input before you validate or train it.",
        )
    return model
