"""Which tensor of an output is the logits."""

from typing import Any

from torch import Tensor

from utils.adapters.capture import named_tensors
from utils.adapters.detection import Detection
from utils.runtime.errors import AdapterError


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
    if len(found) == 1:
        path = found[0][0]
        return Detection(path, "the only real-valued tensor in the output" if path else "the output is one tensor")

    def rank(entry: tuple[int, tuple[str, Tensor]]) -> tuple[int, ...]:
        order, (path, tensor) = entry
        shape = tuple(tensor.shape)
        per_token = len(shape) == 3 and shape[:2] == (batch, positions)
        return (
            -(per_token and shape[-1] == vocabulary),
            -(len(shape) == 2 and shape == (batch, labels)),
            -("logits" in path.rsplit(".", 1)[-1].lower()),
            -per_token,
            -(shape[:1] == (batch,)),
            -(len(shape) > 0),
            order,
        )

    path, tensor = min(enumerate(found), key=rank)[1]
    return Detection(path, f"of {len(found)} tensors the one with shape {tuple(tensor.shape)} fits best")
