"""What went wrong inside a model, in words: an exception's first line, a missing GPU, an answer without a tensor."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from utils.runtime.resources import format_bytes

GPU_ERRORS = re.compile(
    r"triton|active drivers|not compiled with cuda|no nvidia driver|no cuda gpus|cuda driver|from the 'CPU' backend"
    r"|flash.?attn|flashattention|is_cuda|cuda(_| )extension|mamba_ssm|causal_conv1d"
    r"|requires? (a |an )?(cuda|gpu|nvidia)|only (supports?|works?|runs?|available) (on )?(cuda|gpu)"
    r"|(must|should|expected?)( all tensors)? to? ?be (on )?(a )?cuda",
    re.IGNORECASE,
)
"""Messages of kernels, and of torch, where a model can run on a GPU only."""
UNREADABLE = "but not with token ids below"
"""How an adapter says that a model reads a few ids and crashes on others that its vocabulary has."""
UNSIZED = "It takes inputs of one size only, and none that was tried is that"
"""How an adapter says that a model is refused or refuses by the size of its input alone."""
STARVED = "because memory ran out"
"""How an adapter says that a forward pass asks for more memory than there is."""
ASKED = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]i?B))", re.IGNORECASE)
"""How torch says how much it was asked for at once."""
MOVES = re.compile(r"not compiled with cuda|no nvidia driver|no cuda gpus", re.IGNORECASE)
"""What torch says where code moves a tensor to a GPU, or makes it there, on a machine without one."""


def first_line(error: BaseException) -> str:
    """Return the kind of an exception and the first line of its message, shortened."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


def needs_gpu(error: BaseException) -> bool:
    """Tell whether a model raised because it can run on a GPU only, and there is none."""
    return bool(GPU_ERRORS.search(str(error)))


def moves_to_gpu(message: str) -> bool:
    """Tell whether a failure is the code's own ``.cuda()`` or ``device="cuda"``, rather than a kernel's demand."""
    return bool(MOVES.search(message))


def gpu_missing(model: str, device: torch.device, error: BaseException) -> str:
    """Say that a model needs a GPU."""
    return (
        f"{model} needs a GPU and ran on {device.type}: {first_line(error).rstrip('.')}. Run it on a machine with one, "
        "or give the model a path in plain PyTorch for tensors on the CPU."
    )


def tensor_missing(model: str, output: Any, tried: str) -> str:
    """Say that a forward pass succeeded and returned nothing to work with."""
    nested = isinstance(output, torch.Tensor) and output.is_nested
    kind = "None" if output is None else "a nested tensor" if nested else f"a {type(output).__name__}"
    return (
        f"forward() of {model} returned {kind} and no{' plain' if nested else ''} tensor for {tried}. Expected logits, "
        "scores or features. Return them from forward()."
    )


def ids_unreadable(model: str, ids: int, error: BaseException) -> str:
    """Say that a model reads a few ids and not all of those that its vocabulary has."""
    return (
        f"{model} runs, {UNREADABLE} {ids}: {first_line(error)}. Correct vocab_size in the config, or pass "
        "ModelSpec(vocab_size=...)."
    )


def memory_ran_out(model: str, tried: str, error: BaseException) -> str:
    """Say that a forward pass asks for more memory than there is."""
    asked = ASKED.search(str(error))
    size = asked[1] if asked else ""
    if size.endswith("bytes"):
        size = format_bytes(int(size.split()[0]))
    how = f" when it asked for {size} at once" if size else ""
    return (
        f"No forward pass of {model} succeeded, {STARVED} on {tried}{how}. Expected these to fit. Make "
        "tensors no larger than the input needs, or use a device with more memory."
    )


def none_succeeded(model: str, attempts: Sequence[str], names: Sequence[str] | None, sized: bool = False) -> str:
    """Say what was tried in vain.

    Args:
        model: The model's name.
        attempts: Each way of calling it with what it raised.
        names: The inputs that were made up; None where they were the user's own.
        sized: Whether what it raised depends on the size of the input.
    """
    if attempts and all(": RecursionError: " in attempt for attempt in attempts):
        return (
            f"forward() of {model} calls itself without end, whatever it is given ({len(attempts)} inputs tried): "
            f"{attempts[0].partition(': ')[2]}. Give the recursion an end, or call the layer that is meant."
        )
    advice = "Correct ModelSpec.example_inputs so that model(**example_inputs) is a valid call."
    if names is not None:
        given = ", ".join(f"{name!r}: ..." for name in dict.fromkeys(name.split(".")[0] for name in names))
        which = f"{UNSIZED}. " if sized else ""
        advice = (
            f"{which}If the model is sound, pass ModelSpec(example_inputs={{{given}}}) with arguments that it accepts."
        )
    # The likeliest inputs come first; of those that follow, every kind of refusal counts once.
    kinds: dict[str, str] = {}
    for attempt in attempts:
        kinds.setdefault(attempt.partition(": ")[2], attempt)
    shown = sorted(kinds.values(), key=lambda attempt: ": RecursionError: " not in attempt)[:4]
    return f"No forward pass of {model} succeeded ({len(attempts)} tried). {'; '.join(shown)}. {advice}"
