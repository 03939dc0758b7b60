"""What Tier 2 asks a model, alike for any input: one answer per sample, and content that can be moved.

The answer of a language model is its prediction at one position: the last one of a causal model, where all of the
text is visible, and the middle one of a masked model. The content of token ids is their embedding, reached by a hook
on whatever table reads them, so that it can be scaled, removed, shifted by noise and differentiated without touching
the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Skipped
from utils.validation.probing import forward_seconds, has_length, logits

CLASSES = ("causal_lm", "masked_lm", "seq2seq")
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
    """Return how many samples fit the budget when each is run `passes` times; what was cut is recorded."""
    seconds = max(forward_seconds(adapter, text_length(adapter), 1), 1e-5)
    fitting = int(budget.remaining() / (1.5 * passes * seconds))
    count = max(2, min(wanted, fitting))
    if count < wanted:
        budget.reduced.append(f"{count} samples instead of {wanted}")
    return count


def answer(adapter: ModelAdapter, result: Tensor) -> Tensor:
    """Reduce logits to one row per sample, ``(batch, classes)`` or ``(batch, features)``."""
    if adapter.task.value in CLASSES and result.dim() == 3:
        position = result.shape[1] // 2 if adapter.task.value == "masked_lm" else -1
        return result[:, position].float()
    return result.flatten(1).float()


def answers(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
    """Run the model without gradients and return one row per sample."""
    return answer(adapter, logits(adapter, inputs))


def classifies(adapter: ModelAdapter, rows: Tensor) -> bool:
    """Tell whether answers are scores of classes, so that probabilities can be compared."""
    return adapter.task.value not in ("regression", "embedding") and rows.shape[-1] > 1


def distance(adapter: ModelAdapter, first: Tensor, second: Tensor) -> Tensor:
    """Return how far two answers are apart, between 0 and 1, per sample.

    Total variation between probabilities for models that classify; for others the difference relative to the norms.
    """
    if classifies(adapter, first):
        return (first.softmax(-1) - second.softmax(-1)).abs().sum(-1) / 2
    scale = first.norm(dim=-1) + second.norm(dim=-1)
    return (first - second).norm(dim=-1) / scale.clamp_min(1e-30)


def repeated(inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Repeat a batch `count` times along its first dimension."""
    return {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in inputs.items()}


@contextmanager
def embedding_transform(adapter: ModelAdapter, ids: Tensor, transform: Transform) -> Iterator[list[Tensor]]:
    """Replace the embeddings of these ids by ``transform(embeddings)`` wherever a table reads exactly them.

    Args:
        adapter: The model.
        ids: Token ids ``(batch, seq)`` that the next forward pass gets.
        transform: Gets ``(batch, seq, width)``.

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


def token_embeddings(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings of the main input's ids, ``(batch, seq, width)``.

    Raises:
        Skipped: No embedding table reads the ids as they are.
    """
    with embedding_transform(adapter, inputs[adapter.main_input], lambda output: output) as seen:
        logits(adapter, inputs)
    if not seen:
        raise Skipped("no nn.Embedding reads the token ids, so there is no content to move")
    return seen[0]


def with_content(adapter: ModelAdapter, inputs: Mapping[str, Tensor], content: Tensor) -> Tensor:
    """Run the model on moved content and return its answers with the graph back to `content`.

    Args:
        adapter: The model.
        inputs: A batch.
        content: What stands in for the embeddings ``(batch, seq, width)``, or for the main input itself.
    """
    if adapter.modality != "tokens":
        return answer(adapter, adapter.logits({**inputs, adapter.main_input: content}))
    with embedding_transform(adapter, inputs[adapter.main_input], lambda output: content.to(output.dtype)):
        return answer(adapter, adapter.logits(inputs))


def content_of(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what of a batch can be moved: the embeddings of token ids, else the main input itself.

    Raises:
        Skipped: Token ids that no embedding table reads.
    """
    if adapter.modality == "tokens":
        return token_embeddings(adapter, inputs)
    return inputs[adapter.main_input].detach()
