"""Which tensor of an output is the logits."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from utils.adapters.capture import named_tensors
from utils.adapters.detection import Detection
from utils.runtime.errors import AdapterError

USUAL, CHANNELS_FIRST, FLAT, TIME_FIRST = "batch first", "channels first", "flattened", "time first"
"""Orders of axes: ``(batch, seq, width)``, ``(batch, width, seq)``, ``(batch * seq, width)``, ``(seq, batch, width)``.

Time first is one of them only where the input is no tokens, as the CTC loss wants it; elsewhere logits that no longer
match labels of shape ``(batch, seq)`` are a fault, not a convention.
"""


def arrangement(shape: tuple[int, ...], batch: int, positions: int | None, vocabulary: int | None) -> str:
    """Tell how an output's axes seem to be ordered; only what a second shape confirms is true.

    Args:
        shape: The output's shape.
        batch: Samples in the input.
        positions: Tokens per sample, None when the input is not tokens.
        vocabulary: Number of token ids, if known.
    """
    if positions is None:
        return TIME_FIRST if len(shape) > 2 and shape[0] != batch == shape[1] else USUAL
    if positions == batch:
        return USUAL
    if len(shape) == 3 and shape[0] == batch and shape[2] == positions and shape[1] not in (positions, 1):
        return USUAL if vocabulary == positions else CHANNELS_FIRST
    if len(shape) == 2 and shape[0] == batch * positions and batch > 1:
        return FLAT
    return USUAL


def confirmed_arrangement(
    shape: tuple[int, ...],
    batch: int,
    positions: int | None,
    vocabulary: int | None,
    shape_at: Callable[[int, int | None], tuple[int, ...]],
) -> str:
    """Tell how an output's axes are ordered: as they seem, if a larger input agrees.

    Args:
        shape: As in `arrangement`, and so the next three.
        batch: See there.
        positions: See there.
        vocabulary: See there.
        shape_at: Runs the model on so many samples and positions and returns the output's shape.
    """
    how = arrangement(shape, batch, positions, vocabulary)
    for length in (positions + 1 if positions else None, positions) if how != USUAL else ():
        try:
            larger = shape_at(batch + 1, length)
        except Exception:
            # A model for one fixed length takes no longer input.
            continue
        if how == TIME_FIRST and larger != (shape[0], batch + 1, *shape[2:]):
            return USUAL
        return how if arrangement(larger, batch + 1, length, vocabulary) == how else USUAL
    return how


def arranged(tensor: Tensor, how: str, batch: int) -> Tensor:
    """Put an output's axes into the usual order ``(batch, seq, width)``.

    `batch` is a ``shape[0]`` and no ``len()``, which would fix it for good when the model is exported.
    """
    if how == TIME_FIRST and tensor.dim() > 2:
        return tensor.transpose(0, 1)
    if how == CHANNELS_FIRST and tensor.dim() == 3:
        return tensor.transpose(1, 2)
    if how == FLAT and tensor.dim() == 2 and tensor.shape[0] % batch == 0:
        return tensor.reshape(batch, -1, tensor.shape[-1])
    return tensor


def choose_logits(
    output: Any, *, batch: int, positions: int | None, vocabulary: int | None, labels: int | None, model: str
) -> Detection[str | None]:
    """Choose the logits among an output's tensors: by width and shape first, by name second.

    Args:
        output: What forward returned.
        batch: Samples in the input.
        positions: Tokens per sample, None when the input is not tokens.
        vocabulary: Number of token ids, if known.
        labels: Number of classes, if known.
        model: The model's name, for messages.

    Returns:
        The path of the tensor, as `utils.adapters.capture.named_tensors` gives it.

    Raises:
        AdapterError: There is no real-valued tensor in the output, or none with a batch.
    """
    found = [(path, tensor) for path, tensor in named_tensors(output) if tensor.is_floating_point()]
    kinds = dict.fromkeys(str(tensor.dtype) for _, tensor in named_tensors(output))
    if not found:
        raise AdapterError(
            f"{model} returned no real-valued tensor ({', '.join(kinds) or type(output).__name__}).",
            "Expected logits, scores or features.",
            "Return them from forward().",
        )
    if all(tensor.dim() == 0 for _, tensor in found):
        raise AdapterError(
            f"{model} returned a single number and nothing per sample.",
            "Expected logits, scores or features, batch first.",
            "Return them from forward(), beside the loss if there is one.",
        )
    if (
        1 < len(found) == batch
        and len({tensor.shape for _, tensor in found}) == 1
        and isinstance(output, (list, tuple))
    ):
        rest = found[0][1].shape[0]
        if rest != batch and (positions is None or rest == positions):
            raise AdapterError(
                f"{model} returned {len(found)} tensors of shape {tuple(found[0][1].shape)} for {batch} samples.",
                "Expected one tensor with the samples along its first axis.",
                "Return torch.stack(outputs).",
            )
    if len(found) == 1:
        path = found[0][0]
        return Detection(path, "the only real-valued tensor in the output" if path else "the output is one tensor")

    def rank(entry: tuple[int, tuple[str, Tensor]]) -> tuple[int, ...]:
        order, (path, tensor) = entry
        shape = tuple(tensor.shape)
        how = arrangement(shape, batch, positions, vocabulary)
        per_token = (len(shape) == 3 and shape[:2] == (batch, positions)) or how in (CHANNELS_FIRST, FLAT)
        width = {CHANNELS_FIRST: 1}.get(how, -1)
        return (
            -(per_token and shape[width] == vocabulary),
            -(len(shape) == 2 and shape == (batch, labels)),
            -("logits" in path.rsplit(".", 1)[-1].lower()),
            -per_token,
            -(shape[:1] == (batch,)),
            -(len(shape) > 0),
            order,
        )

    path, tensor = min(enumerate(found), key=rank)[1]
    return Detection(path, f"of {len(found)} tensors the one with shape {tuple(tensor.shape)} fits best")
