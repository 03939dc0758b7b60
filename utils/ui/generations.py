"""What a language model writes while it learns: a short text at each measurement, the same way every time."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.runtime.isolation import preserved
from utils.training.batch_inputs import model_inputs
from utils.training.prepared_data import PreparedData

PROMPT, LENGTH = 12, 48
SECONDS = 2.0
"""A text ends early when it has taken this long."""


@dataclass(frozen=True)
class Generation:
    """A text, begun with words of the held-out data and continued by the model."""

    prompt: str
    text: str
    complete: bool = True
    """False when the time was up."""


@torch.no_grad()
def generate(
    adapter: ModelAdapter,
    data: PreparedData,
    seed: int = 0,
    *,
    prompt_tokens: int = PROMPT,
    new_tokens: int = LENGTH,
    temperature: float = 0.8,
    seconds: float = SECONDS,
) -> Generation | None:
    """Let a language model continue the start of the held-out text; model and random streams stay as they were.

    Each token is drawn from a generator of its own, so that equal weights and an equal seed give an equal text.

    Args:
        adapter: The model.
        data: Its tokenizer and its held-out text.
        seed: Decides what is drawn.
        prompt_tokens: Tokens of the held-out text to begin with.
        new_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token each time.
        seconds: The text ends when it has taken so long.

    Returns:
        The text; None when the model writes none (it is no causal language model, or its data has no tokenizer).
    """
    tokenizer = data.tokenizer
    if data.task != "causal_lm" or tokenizer is None:
        return None
    window = data.validation["input_ids"][0]
    prompt_tokens = min(prompt_tokens, len(window) // 2)
    ids: list[int] = window[:prompt_tokens].tolist()
    random = torch.Generator().manual_seed(seed)
    forbidden = [number for number in tokenizer.special_ids if number != tokenizer.eos_id]
    until, complete = time.monotonic() + seconds, True
    with preserved(adapter.module, seed, "generation"):
        adapter.module.eval()
        for _ in range(new_tokens):
            chosen = _next(adapter, data, ids[-len(window) :], forbidden, temperature, random, tokenizer.fill_id)
            if chosen == tokenizer.eos_id:
                break
            ids.append(chosen)
            if time.monotonic() > until:
                complete = False
                break
    prompt = tokenizer.decode(ids[:prompt_tokens], skip_special=True)
    return Generation(prompt, tokenizer.decode(ids, skip_special=True)[len(prompt) :], complete)


def _next(
    adapter: ModelAdapter,
    data: PreparedData,
    ids: list[int],
    forbidden: list[int],
    temperature: float,
    random: torch.Generator,
    fill: int,
) -> int:
    """Return the token that comes next."""
    width = adapter.legal_length(len(ids))
    if width < len(ids):
        # A model that takes some lengths only: a longer one, filled behind the text, where a causal model cannot see.
        longer = adapter.legal_length(len(data.validation["input_ids"][0]))
        width = longer if longer >= len(ids) else width
    shown = ids[-width:]
    filled = shown + [fill] * (width - len(shown))
    batch: dict[str, Tensor] = {"input_ids": torch.tensor([filled], device=adapter.device)}
    scores = adapter.logits(model_inputs(adapter, batch, data))[0, len(shown) - 1].float().cpu()
    scores[[number for number in forbidden if number < len(scores)]] = -torch.inf
    if temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(torch.softmax(scores / temperature, -1), 1, generator=random))
