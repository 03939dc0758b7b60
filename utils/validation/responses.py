"""What Tier 2 asks a model, alike for any input: one answer per sample, and content that can be moved.

The answer of a model that scores every position is its prediction at one of them: the last one of a causal model, where
all of the text is visible, and the middle one of a masked model, a tagger or a segmentation. The content of whole
numbers such as token ids is their embedding, reached by a hook on whatever table reads them, so that it can be scaled,
removed, shifted by noise and differentiated without touching the model. Only the main input is moved; the names of
those that stay as they are go with every result.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.objectives import REAL_VALUED
from utils.adapters.roles import role_of
from utils.runtime.seeding import seed_streams
from utils.validation.check import Budget, Skipped
from utils.validation.probing import forward_seconds, has_length, live, logits

AT_THE_END = ("causal_lm", "seq2seq")
"""Tasks whose answer is at the last position."""
NO_CONTENT = ("labels", "padding", "mask", "lengths", "positions", "flag")
"""Roles of inputs that hold no content which could be moved."""
TEXT_LENGTH = 32
SAMPLES = 16

Transform = Callable[[Tensor], Tensor]


def text_length(adapter: ModelAdapter, wanted: int = TEXT_LENGTH) -> int | None:
    """Return a length that Tier 2 uses, or None for a model whose input has no length."""
    if not has_length(adapter):
        return None
    return adapter.legal_length(min(wanted, adapter.max_length.value or wanted))


def sample_inputs(adapter: ModelAdapter, count: int, length: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Return `count` random samples of one length."""
    return adapter.example_inputs(count, length or text_length(adapter), seed)


def affordable_samples(adapter: ModelAdapter, budget: Budget, passes: float, wanted: int = SAMPLES) -> int:
    """Return how many samples fit the budget when each is run `passes` times; what was cut is recorded.

    An example without an axis of samples, such as a graph, is one sample however much time there is.
    """
    if not adapter.batched:
        return 1
    seconds = max(forward_seconds(adapter, text_length(adapter), 1), 1e-5)
    fitting = int(budget.remaining() / (1.5 * passes * seconds))
    count = max(2, min(wanted, fitting))
    if count < wanted:
        budget.reduced.append(f"{count} samples instead of {wanted}")
    return count


def answer(adapter: ModelAdapter, result: Tensor) -> Tensor:
    """Reduce logits to one row per sample, ``(batch, classes)`` or ``(batch, features)``."""
    task = adapter.task.value
    if result.dim() < 2:
        return result.reshape(-1, 1).float()
    if task in REAL_VALUED:
        return result.flatten(1).float()
    if adapter.modality == "image" and result.dim() == 4:
        # Scores of pixels come as cross_entropy takes them, with the classes before the places.
        result = result.movedim(1, -1)
    if result.dim() > 2 and task in AT_THE_END:
        result = result[:, -1]
    while result.dim() > 2:
        # A softmax over several positions at once would be no distribution of anything.
        result = result[:, result.shape[1] // 2]
    return result.float()


def answer_place(adapter: ModelAdapter, length: int) -> int | None:
    """Return the position of the text that the answer belongs to; None for an answer about the whole text.

    Args:
        adapter: A model of token sequences.
        length: Tokens of the text.
    """
    if adapter.task.value == "causal_lm":
        return length - 1
    if adapter.task.value == "seq2seq" or adapter.task.value in REAL_VALUED:
        return None
    shape = logits(adapter, sample_inputs(adapter, 1, length)).shape
    return length // 2 if len(shape) > 2 and shape[1] == length else None


def answers(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
    """Run the model without gradients and return one row per sample."""
    return answer(adapter, logits(adapter, inputs))


def classifies(adapter: ModelAdapter, rows: Tensor) -> bool:
    """Tell whether answers are scores of classes, so that probabilities can be compared."""
    return adapter.task.value not in REAL_VALUED and rows.shape[-1] > 1


def distance(adapter: ModelAdapter, first: Tensor, second: Tensor) -> Tensor:
    """Return how far two answers are apart, between 0 and 1, per sample.

    Total variation between probabilities for models that classify; for others the difference relative to the norms.
    """
    if classifies(adapter, first):
        return (first.softmax(-1) - second.softmax(-1)).abs().sum(-1) / 2
    scale = first.norm(dim=-1) + second.norm(dim=-1)
    return (first - second).norm(dim=-1) / scale.clamp_min(1e-30)


def repeated(adapter: ModelAdapter, inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Repeat a batch `count` times along its first dimension; what has no row per sample stays as it is."""
    rows = len(inputs[adapter.main_input])
    return {
        name: value.repeat(count, *[1] * (value.dim() - 1))
        if isinstance(value, Tensor) and value.dim() and len(value) == rows
        else value
        for name, value in inputs.items()
    }


def held_fixed(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> list[str]:
    """Return the inputs with content of their own that stay as they are while the main input is moved."""
    return [name for name in inputs if name != adapter.main_input and role_of(name) not in NO_CONTENT]


def told_fixed(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> str:
    """Return the end of a sentence that names what `held_fixed` returns, empty where there is nothing."""
    held = [f"`{name}`" for name in held_fixed(adapter, inputs)]
    if not held:
        return ""
    stay = "stays as it is" if len(held) == 1 else "stay as they are"
    return f"; only `{adapter.main_input}` is moved, {' and '.join(held)} {stay}"


@contextmanager
def embedding_transform(adapter: ModelAdapter, ids: Tensor, transform: Transform) -> Iterator[list[Tensor]]:
    """Replace the embeddings of these ids by ``transform(embeddings)`` wherever a table reads exactly them.

    Args:
        adapter: The model.
        ids: Token ids that the next forward pass gets, in any shape.
        transform: Gets ``(*ids.shape, width)``.

    Yields:
        A list that receives the original embeddings, once per read.
    """
    seen: list[Tensor] = []

    def hook(child: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        given = args[0] if args else None
        same = isinstance(given, Tensor) and given.shape == ids.shape and bool((given == ids).all())
        # A second table over the same ids (value or hash embeddings) keeps what it gives.
        if seen or not same or not isinstance(output, Tensor):
            return None
        seen.append(output.detach())
        return transform(output)

    handles = [
        child.register_forward_hook(hook) for child in adapter.module.modules() if isinstance(child, nn.Embedding)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def token_embeddings(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
    """Return the embeddings of the main input's ids, ``(*ids.shape, width)``.

    Raises:
        Skipped: No embedding table reads the ids as they are.
    """
    with embedding_transform(adapter, inputs[adapter.main_input], lambda output: output) as seen:
        logits(adapter, inputs)
    if not seen:
        ids = "token ids" if adapter.modality == "tokens" else f"whole numbers of `{adapter.main_input}` as they are"
        raise Skipped(f"no nn.Embedding reads the {ids}, so there is no content to move")
    return seen[0]


def with_content(adapter: ModelAdapter, inputs: Mapping[str, Any], content: Tensor) -> Tensor:
    """Run the model on moved content and return its answers with the graph back to `content`.

    Args:
        adapter: The model.
        inputs: A batch.
        content: What stands in for the embeddings ``(*ids.shape, width)``, or for the main input itself.
    """
    main = inputs[adapter.main_input]
    seed_streams(0, "forward")
    if main.is_floating_point():
        return answer(adapter, live(adapter, adapter.logits({**inputs, adapter.main_input: content})))
    with embedding_transform(adapter, main, lambda output: content.to(output.dtype)):
        return answer(adapter, live(adapter, adapter.logits(inputs)))


def gradient_of(score: Tensor, content: Tensor) -> Tensor:
    """Return the gradient of a number by the content, zero where no gradient reaches it."""
    if not score.requires_grad:
        return torch.zeros_like(content)
    (gradient,) = torch.autograd.grad(score, content, allow_unused=True, materialize_grads=True)
    return gradient


def content_of(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
    """Return what of a batch can be moved: the embeddings of whole numbers, else the main input itself.

    Raises:
        Skipped: Whole numbers that no embedding table reads.
    """
    main: Tensor = inputs[adapter.main_input]
    return main.detach() if main.is_floating_point() else token_embeddings(adapter, inputs)
