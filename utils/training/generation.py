"""Text out of a language model: token by token, with the model's own cache where it has one.

Unusual: a cache is believed only after its first step gave what the whole sequence gives. Where it does not, or where
the model has none, every token is computed from the window of the last tokens that fit.
"""

import operator
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.capture import tensor_at
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.isolation import preserved
from utils.runtime.settings import shown
from utils.training.batch_inputs import model_inputs

CACHE_ARGUMENTS = ("past_key_values", "use_cache")
"""How the models of transformers name their cache."""
SAME = 1e-3
"""Largest difference, as a share of the largest logit, up to which a cached step counts as equal."""


@dataclass(frozen=True)
class Generated:
    """What a language model wrote."""

    prompt: str
    """What it was given; empty when that was ids."""
    text: str
    """What it wrote after that; empty without a tokenizer."""
    ids: tuple[int, ...]
    """The new token ids."""
    prompt_ids: tuple[int, ...]
    """The ids that it was given."""
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
        return {**vars(self), "ids": list(self.ids), "prompt_ids": list(self.prompt_ids)}


def generate(
    model_or_run: Any,
    prompt: str | Iterable[int] = "",
    tokens: int = 100,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    tokenizer: Any = None,
    stop_at_end: bool = True,
    use_cache: bool = True,
) -> Generated:
    """Let a causal language model go on from a prompt; the model and the random streams are left as they were.

    Args:
        model_or_run: A run, a loaded model, an adapter or a module.
        prompt: Text, or token ids; empty starts from the token that separates documents.
        tokens: How many to write, at most.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest token.
        top_k: Draw from so many of the likeliest tokens only; None draws from all.
        seed: Seed of the drawing.
        tokenizer: A `TextTokenizer`; None takes the run's.
        stop_at_end: Stop when the model ends the document.
        use_cache: Use the model's cache if it has one.

    Raises:
        ConfigError: A setting is out of range, or the model is no causal language model.
        DataError: The prompt cannot be read: text without a tokenizer, unknown ids, or nothing.
    """
    check_drawing(tokens, temperature, top_k)
    run_data = getattr(model_or_run, "data", None)
    adapter = getattr(model_or_run, "adapter", None)
    if not isinstance(adapter, ModelAdapter):
        adapter = ModelAdapter(model_or_run)
    tokenizer = tokenizer or getattr(run_data, "tokenizer", None)
    if adapter.task.value != "causal_lm":
        raise ConfigError(
            f"{adapter.name} is no causal language model but for {adapter.task.value} ({adapter.task.reason}).",
            "Expected a model that predicts the next token.",
            "Give a causal language model.",
        )
    ids = ids_of_prompt(adapter, prompt, tokenizer)
    end = tokenizer.eos_id if tokenizer is not None and stop_at_end else None
    generator = torch.Generator().manual_seed(seed)
    known = adapter.readable_ids() if tokenizer is None else min(adapter.readable_ids(), tokenizer.vocab_size)
    steps = NextTokens(adapter, list(ids), use_cache)
    new: list[int] = []
    started = time.perf_counter()
    with preserved(adapter.module, seed, "generate"), torch.no_grad():
        adapter.module.eval()
        for logits in steps.logits(tokens):
            token = draw(logits[:known], temperature, top_k, generator)
            new.append(token)
            steps.ids.append(token)
            if token == end:
                break
    written = new[:-1] if new and new[-1] == end else new
    return Generated(
        prompt=prompt if isinstance(prompt, str) else "",
        text="" if tokenizer is None else tokenizer.decode(written),
        ids=tuple(new),
        prompt_ids=tuple(ids),
        cached=steps.cached,
        how=steps.how,
        seconds=time.perf_counter() - started,
    )


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Draw one id from logits ``(vocab,)``, on the CPU in float64, so that a seed gives the same id everywhere."""
    scores = logits.detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(scores.argmax())
    scores = scores / temperature
    if top_k is not None and top_k < len(scores):
        values, places = scores.topk(top_k)
        return int(places[torch.multinomial(values.softmax(0), 1, generator=generator)])
    return int(torch.multinomial(scores.softmax(0), 1, generator=generator))


class NextTokens:
    """The logits of one next token after another, for ids that grow between the steps."""

    def __init__(self, adapter: ModelAdapter, ids: list[int], use_cache: bool) -> None:
        self.adapter, self.ids = adapter, ids
        self.limit = adapter.max_length.value
        has = all(name in adapter.argument_names for name in CACHE_ARGUMENTS)
        self.cached = use_cache and has
        self.how = "with the model's cache" if self.cached else "from the window of the last tokens"
        if use_cache and not has:
            self.how += ", because the model has no cache"
        self._cache: Any = None

    def logits(self, count: int) -> Iterator[Tensor]:
        """Yield `count` vectors ``(vocab,)``; the caller appends an id to `ids` after each."""
        for number in range(count):
            if self.cached and self.limit is not None and len(self.ids) > self.limit:
                # The cache is full: its positions cannot be moved.
                self.cached = number > 0
                self.how += f" up to {self.limit} tokens, then from the window of the last ones"
                self._cache = None
                for _ in range(number, count):
                    yield self._from_window()
                return
            yield self._from_cache(number) if self.cached else self._from_window()

    def _from_window(self) -> Tensor:
        """Compute the last position from as many of the last ids as the model takes."""
        lengths = self.adapter.lengths.value
        ids = self.ids if self.limit is None else self.ids[-self.limit :]
        wanted = lengths.legal(len(ids))
        if wanted < len(ids):
            # A window of the next legal length would do too, but it may be longer than the model allows.
            longer = -(-len(ids) // lengths.step) * lengths.step
            fits = not lengths.fixed and (self.limit is None or longer <= self.limit)
            wanted = longer if fits else wanted
        ids = ids[-wanted:]
        # What comes after a position changes nothing at it, so a short window is filled up behind.
        batch = torch.tensor([[*ids, *[0] * (wanted - len(ids))]], device=self.adapter.device)
        return self.adapter.logits(model_inputs(self.adapter, {"input_ids": batch}))[0, len(ids) - 1]

    def _from_cache(self, number: int) -> Tensor:
        """Compute the last position from what the model remembers of those before it."""
        fresh = self.ids if self._cache is None else self.ids[-1:]
        batch = torch.tensor([fresh], device=self.adapter.device)
        inputs = model_inputs(self.adapter, {"input_ids": batch})
        if self._cache is not None:
            inputs = {self.adapter.main_input: batch}
        call: dict[str, Any] = {**inputs, "use_cache": True}
        if self._cache is not None:
            call["past_key_values"] = self._cache
        try:
            output = self.adapter.forward(call)
            self._cache = output["past_key_values"] if isinstance(output, dict) else output.past_key_values
            logits = tensor_at(output, self.adapter.output.value or "")[0, -1]
            if self._cache is None:
                raise KeyError("past_key_values")
            if number == 1:
                whole = self._from_window()
                scale = float(whole.abs().max().clamp_min(1e-6))
                if not bool(((logits - whole).abs() <= SAME * scale).all()):
                    raise ValueError("its first step gave other logits than the whole sequence")
        except Exception as error:
            if number > 1:
                raise
            self.cached, self._cache = False, None
            self.how = f"from the window of the last tokens, because the model's cache failed: {_words(error)}"
            return self._from_window()
        return logits


def _words(error: Exception) -> str:
    """Return the first line of an error."""
    if isinstance(error, (KeyError, AttributeError)):
        return "the output holds no cache"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def ids_of_prompt(adapter: ModelAdapter, prompt: str | Iterable[int], tokenizer: Any) -> list[int]:
    """Return the prompt as ids, at least one.

    Raises:
        DataError: Text without a tokenizer, no text, or ids that the model does not know.
    """
    if isinstance(prompt, str):
        if tokenizer is None and prompt:
            raise DataError(
                "The prompt is text, and there is no tokenizer.",
                "Expected token ids, or the tokenizer that the model was trained with.",
                "Pass the run, or tokenizer=.",
            )
        ids = [int(number) for number in tokenizer.encode([prompt])[0]] if prompt else []
        if not ids and tokenizer is not None and tokenizer.eos_id is not None:
            ids = [tokenizer.eos_id]
    else:
        try:
            ids = [operator.index(number) for number in prompt]
        except TypeError:
            raise DataError(
                f"The prompt is a {type(prompt).__name__} that does not hold ids alone.",
                "Expected text, or whole numbers, the ids of tokens.",
                "Give a text, or a list or tensor of ids.",
            ) from None
    if not ids:
        raise DataError("The prompt is empty.", "Expected at least one token to go on from.", "Pass some text or ids.")
    known = adapter.readable_ids()
    wrong = [number for number in ids if not 0 <= number < known]
    if wrong:
        raise DataError(
            f"The prompt holds the id {wrong[0]}.",
            f"Expected ids from 0 to {known - 1}.",
            "Use the tokenizer that the model was trained with.",
        )
    return ids


def check_drawing(tokens: int, temperature: float, top_k: int | None) -> None:
    """Refuse settings that no drawing could follow.

    Raises:
        ConfigError: One is out of range.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens is {shown(tokens)}.", "Expected a whole number above 0.", "100 is usual.")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < 1e6:
        raise ConfigError(
            f"temperature is {shown(temperature)}.",
            "Expected a number from 0 on.",
            "0.8 is usual; 0 takes the likeliest token.",
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ConfigError(
            f"top_k is {shown(top_k)}.", "Expected a whole number above 0, or None.", "None draws from all tokens."
        )
