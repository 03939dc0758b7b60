"""Text out of a language model and its memory, with the memories that each token came from."""

import math
import time
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from utils.adapters import ModelAdapter
from utils.memory.key_reader import check_tokenizer
from utils.memory.nearest_neighbour_head import Mixture, NearestNeighbourHead, check_head
from utils.runtime.arguments import LARGEST, flag, whole
from utils.runtime.errors import ConfigError
from utils.training.generation import NextTokens, check_drawing, draw, ids_of_prompt

BEFORE = 12
"""Tokens of a memory's text that are shown before its own."""


@dataclass(frozen=True)
class UsedMemory:
    """One memory that a token was looked up from."""

    row: int
    """Its number in the datastore."""
    window: int
    """Which window of the remembered text it is in."""
    position: int
    """Where in that window its token's context ends."""
    text: str
    """What stands before its token there; empty where the text was not kept."""
    token: str
    """Its token."""
    distance: float
    """Squared distance of its key."""
    share: float
    """How much it counts within the memory, 0 to 1."""
    supports: bool
    """Whether its token is the one that was written."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class RememberedToken:
    """A token, and what model and memory said about it."""

    id: int
    """Its id."""
    text: str
    """Its text, or its id without a tokenizer."""
    log_probability: float
    """Of the mixture, in nats."""
    model_log_probability: float
    """Of the model alone."""
    entropy: float
    """Of the mixture's answer, in nats."""
    weight: float
    """The memory's share of the whole answer."""
    memory_share: float
    """Share of this token's probability that comes from the memory, 0 to 1."""
    memories: tuple[UsedMemory, ...]
    """The memories that count most, those that support the token first."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "memories": [memory.to_dict() for memory in self.memories]}


@dataclass(frozen=True)
class GeneratedWithMemory:
    """What a language model wrote with a memory."""

    prompt: str
    """What it was given; empty when that was ids."""
    text: str
    """What it wrote after that; empty without a tokenizer."""
    ids: tuple[int, ...]
    """The new token ids."""
    prompt_ids: tuple[int, ...]
    """The ids that it was given."""
    tokens: tuple[RememberedToken, ...]
    """Each new token with its memories."""
    cached: bool
    """Whether the model's cache was used."""
    how: str
    """How each token was computed, in words."""
    seconds: float
    """Time taken."""

    def __str__(self) -> str:
        """Return prompt and continuation."""
        return self.prompt + self.text

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **vars(self), "ids": list(self.ids), "prompt_ids": list(self.prompt_ids),
            "tokens": [token.to_dict() for token in self.tokens],
        }  # fmt: skip

    def _repr_html_(self) -> str:
        """Show the text, each token the darker the more of it is the memory's; its memories when pointed at."""
        spans = []
        for token in self.tokens:
            told = [f"{token.memory_share:.0%} of p = {math.exp(token.log_probability):.2f} is the memory's"]
            told += [
                f"{memory.share:.0%} {'✓' if memory.supports else '·'} …{memory.text}[{memory.token}]"
                for memory in token.memories
            ]
            style = f"background:rgba(72,120,176,{0.75 * token.memory_share:.2f})"
            title = escape("\n".join(told), quote=True)
            spans.append(f'<span style="{style}" title="{title}">{escape(token.text)}</span>')
        share = sum(token.memory_share for token in self.tokens) / max(1, len(self.tokens))
        return (
            f'<pre style="white-space:pre-wrap">{escape(self.prompt)}{"".join(spans)}</pre><p>{share:.0%} of the '
            "probability of what was written came from memories: the darker, the more. Point at a token to see "
            "them.</p>"
        )


def generate_with_memory(
    model: Any,
    head: NearestNeighbourHead,
    prompt: Any = "",
    tokens: int = 100,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    tokenizer: Any = None,
    stop_at_end: bool = True,
    memories: int = 3,
    use_cache: bool = True,
) -> GeneratedWithMemory:
    """Let a model go on from a prompt with a memory; the model and the random streams are left as they were.

    Args:
        model: The head's own model: a run, a loaded model, an adapter or a module.
        head: Model and memory.
        prompt: Text, or token ids; empty starts from the token that separates documents.
        tokens: How many to write, at most.
        temperature: Divides the mixture's log probabilities before a token is drawn; 0 takes the likeliest token.
        top_k: Draw from so many of the likeliest tokens only; None draws from all.
        seed: Seed of the drawing.
        tokenizer: A `TextTokenizer`; None takes the head's.
        stop_at_end: Stop when the document is ended.
        memories: How many memories of each token are told.
        use_cache: Use the model's cache if it has one.

    Raises:
        ConfigError: A setting is out of range, or the head has another model.
        DataError: The prompt cannot be read: text without a tokenizer, unknown ids, or nothing.
    """
    check_drawing(tokens, temperature, top_k)
    memories = whole(memories, "memories", 0, "3 is usual.")
    seed = whole(seed, "The seed", -LARGEST, "0 is usual.")
    flag(stop_at_end, "stop_at_end", "True stops when the document is ended.")
    flag(use_cache, "use_cache", "False computes every token from the whole window.")
    check_head(head)
    check_tokenizer(tokenizer, "encode", "decode")
    adapter: ModelAdapter = head.adapter
    held = getattr(model, "adapter", model)
    module = getattr(held, "module", held)
    if module is not adapter.module:
        raise ConfigError(
            "The head was made with another model.",
            "Expected the model that is asked to write, whose vectors are the keys.",
            "Make a head for this model, or give the head's own.",
        )
    tokenizer = tokenizer if tokenizer is not None else head.tokenizer
    ids = ids_of_prompt(adapter, prompt, tokenizer)
    end = tokenizer.eos_id if tokenizer is not None and stop_at_end else None
    generator = torch.Generator().manual_seed(seed)
    known = adapter.readable_ids() if tokenizer is None else min(adapter.readable_ids(), tokenizer.vocab_size)
    steps = NextTokens(adapter, list(ids), use_cache)
    written: list[RememberedToken] = []
    started = time.perf_counter()
    with head.reader.reading() as read:
        for logits in steps.logits(tokens):
            vectors = read.held_vectors()
            # A window is filled up behind where the text is shorter; a cached step holds its own token alone.
            last = vectors[0, min(len(steps.ids), vectors.shape[1]) - 1]
            mixture = head.mixture(last[None], logits[None])
            token = draw(mixture.log_probabilities[0, :known], temperature, top_k, generator)
            written.append(remembered(head, mixture, 0, token, memories, tokenizer))
            steps.ids.append(token)
            if token == end:
                break
    new = [token.id for token in written]
    kept = new[:-1] if new and new[-1] == end else new
    return GeneratedWithMemory(
        prompt=prompt if isinstance(prompt, str) else "",
        text="" if tokenizer is None else tokenizer.decode(kept),
        ids=tuple(new),
        prompt_ids=tuple(ids),
        tokens=tuple(written),
        cached=steps.cached,
        how=steps.how,
        seconds=time.perf_counter() - started,
    )


def remembered(
    head: NearestNeighbourHead, mixture: Mixture, place: int, token: int, count: int, tokenizer: Any = None
) -> RememberedToken:
    """Return what model and memory said about a token.

    Args:
        head: Model and memory.
        mixture: Their answers.
        place: Which of the answers.
        token: The id that was written there.
        count: How many memories to tell.
        tokenizer: Shows text; None takes the head's.
    """
    tokenizer = tokenizer if tokenizer is not None else head.tokenizer
    shares, values = mixture.shares[place], mixture.values[place]
    supports = values == token
    whole, weight = float(mixture.log_probabilities[place, token]), float(mixture.weights[place])
    used = []
    # Those that support the token first, then by their share.
    for number in (supports.float() * 2 + shares).topk(min(count, len(shares))).indices.tolist():
        row = int(mixture.rows[place, number])
        text, after = head.datastore.text(row, tokenizer, BEFORE)
        store = head.datastore
        used.append(
            UsedMemory(
                row, int(store.windows[row]), int(store.positions[row]), text, after,
                float(mixture.distances[place, number]), float(shares[number]), bool(supports[number]),
            )
        )  # fmt: skip
    memory = float((shares * supports).sum())
    answers = mixture.log_probabilities[place]
    return RememberedToken(
        id=token,
        text=str(token) if tokenizer is None else tokenizer.decode([token]),
        log_probability=whole,
        model_log_probability=float(mixture.model[place, token]),
        entropy=float(torch.special.entr(answers.exp()).sum()),
        weight=weight,
        memory_share=min(1.0, weight * memory / max(math.exp(whole), 1e-30)),
        memories=tuple(used),
    )
