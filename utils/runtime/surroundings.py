"""What code can change outside the model: torch's global settings, and those of the process around it.

Each setting is a pair of functions that read and set it. Lists and dicts that others hold are refilled, not replaced.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as module_globals

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    value for name, value in vars(module_globals).items() if name.startswith("_global_") and isinstance(value, dict)
)
"""Hooks that run around every module of the process."""


class Surroundings:
    """All settings as they are now."""

    def __init__(self) -> None:
        """Read them."""
        self._values = [(get, put, get()) for get, put in SETTINGS]

    def restore(self) -> list[str]:
        """Set back what has changed, and return what could not be, with the reason; the others are not kept by it."""
        lost = []
        for get, put, value in self._values:
            try:
                if get() != value:
                    put(value)
            except Exception as error:
                lost.append(f"{getattr(put, '__name__', 'a setting').lstrip('_')}: {type(error).__name__}: {error}")
        return lost


def _set_default_device(device: torch.device) -> None:
    # Stating the CPU would slow every later factory call down.
    torch.set_default_device(None if device.type == "cpu" else device)


def _autocast() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    return torch.is_autocast_cache_enabled(), *(
        (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds
    )


def _set_autocast(value: tuple[Any, ...]) -> None:
    torch.set_autocast_cache_enabled(value[0])
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), value[1:], strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _set_cudnn(value: tuple[bool, bool, bool]) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = value


def _attention_kernels() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


def _set_attention_kernels(value: tuple[bool, ...]) -> None:
    cuda = torch.backends.cuda
    for put, enabled in zip((cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp), value,
                            strict=True):  # fmt: skip
        put(enabled)


def _hooks() -> list[dict[int, Any]]:
    return [dict(hooks) for hooks in GLOBAL_HOOKS]


def _set_hooks(value: list[dict[int, Any]]) -> None:
    for hooks, before in zip(GLOBAL_HOOKS, value, strict=True):
        hooks.clear()
        hooks.update(before)


def _set_environment(value: dict[str, str]) -> None:
    for name in set(os.environ) - set(value):
        del os.environ[name]
    os.environ.update(value)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _set_folder(value: str | None) -> None:
    # The folder may be gone by now, which is nothing that could be put back.
    with contextlib.suppress(OSError):
        os.chdir(value or os.sep)


def _signals() -> tuple[Any, ...]:
    return tuple(signal.getsignal(number) for number in SIGNALS)


def _set_signals(value: tuple[Any, ...]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number, handler in zip(SIGNALS, value, strict=True):
        # None stands for a handler that was not set from Python, and cannot be.
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _set_warnings(value: list[Any]) -> None:
    warnings.filters[:] = value  # type: ignore[index]
    # The interpreter keeps what it has looked up until told of a change.
    getattr(warnings, "_filters_mutated_lock_held", getattr(warnings, "_filters_mutated", lambda: None))()


def _logging() -> tuple[Any, ...]:
    root = logging.getLogger()
    return root.level, list(root.handlers), root.disabled, root.manager.disable


def _set_logging(value: tuple[Any, ...]) -> None:
    root = logging.getLogger()
    root.setLevel(value[0])
    root.handlers[:] = value[1]
    root.disabled = value[2]
    logging.disable(value[3])


def _streams() -> tuple[Any, ...]:
    return sys.stdin, sys.stdout, sys.stderr, sys.displayhook, sys.excepthook


def _set_streams(value: tuple[Any, ...]) -> None:
    sys.stdin, sys.stdout, sys.stderr, sys.displayhook, sys.excepthook = value


def _set_collector(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()


def _set_path(value: list[str]) -> None:
    sys.path[:] = value


SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    (_autocast, _set_autocast),
    (
        lambda: (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        _set_cudnn,
    ),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_attention_kernels, _set_attention_kernels),
    (_hooks, _set_hooks),
    (np.geterr, lambda value: np.seterr(**value)),
    (lambda: dict(os.environ), _set_environment),
    (_folder, _set_folder),
    (_signals, _set_signals),
    (lambda: list(warnings.filters), _set_warnings),
    (_logging, _set_logging),
    (_streams, _set_streams),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (gc.isenabled, _set_collector),
    (lambda: list(sys.path), _set_path),
)
"""How each setting is read and set."""
