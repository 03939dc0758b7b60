"""What a model computed on the way to an answer, recorded.

For each token: what every block would have said, where attention brought things from, which memories were looked up;
and the steps of what was written.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.activations import run_given
from utils.concepts.attention_flow import attention_flow
from utils.concepts.checks import check_count, with_tensors
from utils.concepts.logit_lens import LensReading, logit_lens
from utils.concepts.reasoning_steps import split_steps
from utils.concepts.trace_parts import (
    AttentionFlow,
    Guess,
    Lens,
    ReasoningStep,
    ReasoningTrace,
    StepMemory,
    TracedToken,
)
from utils.memory.key_reader import adapter_of, check_tokenizer, tokenizer_of
from utils.memory.memory_generation import generate_with_memory
from utils.memory.nearest_neighbour_head import NearestNeighbourHead
from utils.runtime.errors import AdapterError, ConfigError, DataError
from utils.runtime.isolation import preserved
from utils.runtime.settings import shown
from utils.training.batch_inputs import model_inputs
from utils.training.generation import generate, ids_of_prompt

GUESSES = 3
"""Likeliest answers of each layer that are kept."""
STEP_MEMORIES = 3
HOTTEST = 1_000_000
"""Temperature from which on nothing but chance would draw, as in `utils.training.generation`."""
TEXT = ("causal_lm", "masked_lm", "seq2seq")
CLASSES = ("text_classification", "image_classification", "audio_classification", "tabular_classification")
"""Tasks whose answers are chosen from a list, so that a layer's logits mean something."""


def record_trace(
    model_or_run: Any,
    prompt_or_inputs: Any,
    tokens: int = 32,
    *,
    memory: NearestNeighbourHead | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
) -> ReasoningTrace:
    """Let a model answer and record what it computed; the model and the random streams are left as they were.

    Args:
        model_or_run: A run, a loaded model, an adapter or a module.
        prompt_or_inputs: For a causal language model text or token ids, which it goes on from. For any model the inputs
            of one sample, by the names of forward's arguments or the main input alone, batch first.
        tokens: How many tokens a causal language model writes, at most; 0 looks at the prompt alone.
        memory: A nearest-neighbour head of this model; what is written is then written with it.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest.
        top_k: Draw from so many of the likeliest tokens only; None draws from all.
        seed: Seed of the drawing.
        tokenizer: A `TextTokenizer`; None takes the run's.

    Raises:
        ConfigError: A setting is out of range, the text would be longer than the model reads at once, or a memory or a
            prompt was given to a model that writes nothing.
        DataError: The prompt or the inputs cannot be read.
        AdapterError: The model cannot be called, or its answers are no choice between tokens or classes.
    """
    adapter = adapter_of(model_or_run)
    if adapter.failure is not None:
        raise AdapterError(adapter.failure)
    if memory is not None and not isinstance(memory, NearestNeighbourHead):
        raise ConfigError(
            f"The memory is a {type(memory).__name__}.",
            "Expected a NearestNeighbourHead of this model.",
            "Make one with utils.memory.datastore.build_datastore, or leave it out.",
        )
    check_tokenizer(tokenizer, "encode", "decode")
    check_count("tokens", tokens, 0)
    check_count("top_k", top_k, 1, optional=True)
    check_count("seed", seed, 0)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < HOTTEST:
        raise ConfigError(
            f"temperature is {shown(temperature)}.",
            f"Expected a number from 0 to below {HOTTEST:,}.",
            "0 takes the likeliest token; usual values are 0.5 to 1.",
        )
    if adapter.task.value not in (*TEXT, *CLASSES):
        raise AdapterError(
            f"{adapter.name} is for {adapter.task.value} ({adapter.task.reason}).",
            "Expected a model whose answer is a token or a class: other answers have no likeliest one to read off.",
            "Look at its layers with `utils.adapters.activations.representations` instead.",
        )
    prompt_or_inputs = with_tensors(prompt_or_inputs)
    is_sample = isinstance(prompt_or_inputs, Mapping) or (
        isinstance(prompt_or_inputs, Tensor) and prompt_or_inputs.dim() > 1
    )
    if is_sample:
        if memory is not None:
            raise ConfigError(
                "A memory was given beside the inputs of one sample.",
                "Expected a memory only beside a prompt that a causal language model goes on from.",
                "Leave the memory out, or give text or token ids.",
            )
        return _sample_trace(adapter, prompt_or_inputs)
    if adapter.task.value != "causal_lm":
        raise ConfigError(
            f"{adapter.name} is for {adapter.task.value} and was given {type(prompt_or_inputs).__name__}.",
            "Expected the inputs of one sample, batch first: only a causal language model goes on from a prompt.",
            "Give a tensor, or a dict by the names of forward's arguments.",
        )
    tokenizer = tokenizer_of(model_or_run, tokenizer)
    if tokenizer is None and memory is not None:
        tokenizer = memory.tokenizer
    is_text = isinstance(prompt_or_inputs, str)
    given = prompt_or_inputs if is_text else ids_of_prompt(adapter, prompt_or_inputs, tokenizer)
    return _text_trace(adapter, given, tokens, memory, temperature, top_k, seed, tokenizer)


def _text_trace(
    adapter: ModelAdapter,
    prompt: str | list[int],
    count: int,
    memory: NearestNeighbourHead | None,
    temperature: float,
    top_k: int | None,
    seed: int,
    tokenizer: Any,
) -> ReasoningTrace:
    """Write, then read everything that was written in one pass."""
    limit, long = adapter.max_length.value, len(ids_of_prompt(adapter, prompt, tokenizer)) + count
    if limit is not None and long > limit:
        raise ConfigError(
            f"Prompt and answer may be {long} tokens long.",
            f"Expected at most {limit}, which {adapter.name} reads at once: a trace covers all of them.",
            "Shorten the prompt, or write fewer tokens.",
        )
    notes: list[str] = []
    # With no token to write, one is written and left out: the prompt is checked and read as ever.
    options = {"temperature": temperature, "top_k": top_k, "seed": seed, "tokenizer": tokenizer}
    wanted = max(count, 1)
    if memory is not None:
        with_memory = generate_with_memory(adapter, memory, prompt, wanted, memories=STEP_MEMORIES, **options)
        prompt_ids, new, written = list(with_memory.prompt_ids), list(with_memory.ids), with_memory.tokens[:count]
    else:
        plain = generate(adapter, prompt, wanted, **options)
        prompt_ids, new, written = list(plain.prompt_ids), list(plain.ids), ()
        notes.append("no memory was given: nothing was looked up")
    new = new[:count]
    ids = prompt_ids + new
    # What comes after a position changes nothing at it, so a text of no legal length is filled up behind.
    length = len(ids)
    lengths = adapter.lengths.value
    legal = next((size for size in range(length, length + lengths.step + 1) if lengths.legal(size) == size), None)
    legal = legal or max(lengths.legal(length), length)
    row = torch.tensor([[*ids, *[0] * (legal - length)]], device=adapter.device)
    inputs = model_inputs(adapter, {"input_ids": row})
    lens, own = _lens(adapter, inputs, notes)
    logits = own[0, :length]
    labels = [_piece(tokenizer, [number]) for number in ids]
    told = None if lens is None else _text_lens(lens, length, ids, tokenizer)
    flow = _flow(adapter, inputs, length, notes)
    chances = logits.log_softmax(-1)
    traced = []
    for place, (number, label) in enumerate(zip(ids, labels, strict=True)):
        made = place - len(prompt_ids)
        known = written[made] if made >= 0 and written else None
        before = chances[place - 1] if place else None
        traced.append(
            TracedToken(
                id=number, text=label, written=made >= 0,
                log_probability=known.log_probability if known else _value(before, number),
                entropy=known.entropy if known else _entropy(before),
                memory_share=known.memory_share if known else None,
                memories=tuple(known.memories) if known else (),
            )
        )  # fmt: skip
    answer = [token for token in traced if token.written]
    if tokenizer is None:
        notes.append("there is no tokenizer: tokens are shown as ids, and the answer is one step")
    steps = _steps(answer, tokenizer)
    text = "" if tokenizer is None else tokenizer.decode(new)
    shown = prompt if isinstance(prompt, str) else _piece(tokenizer, prompt_ids)
    return ReasoningTrace(adapter.name, adapter.task.value, shown, text, tuple(traced), told, flow, steps, tuple(notes))


def _sample_trace(adapter: ModelAdapter, given: Any) -> ReasoningTrace:
    """Look at one sample of any model."""
    inputs = dict(given) if isinstance(given, Mapping) else {adapter.main_input: given}
    if adapter.main_input not in inputs or not isinstance(inputs[adapter.main_input], Tensor):
        raise DataError(
            f"The inputs are {', '.join(map(repr, inputs)) or 'empty'}.",
            f"Expected a tensor under {adapter.main_input!r}, the main input of {adapter.name}.",
            "Give the inputs by the names of forward's arguments.",
        )
    if len(inputs[adapter.main_input]) != 1:
        raise DataError(
            f"There are {len(inputs[adapter.main_input])} samples.",
            "Expected one, batch first: a trace is of one answer.",
            "Give inputs[:1].",
        )
    inputs = {name: v.to(adapter.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    if adapter.modality == "tokens":
        # Names and masks that only text needs are filled in as in training.
        inputs = {**model_inputs(adapter, {"input_ids": inputs[adapter.main_input]}), **inputs}
    with preserved(adapter.module, 0, "trace"), torch.no_grad():
        adapter.module.eval()
        run_given(adapter, inputs)
    notes = ["the inputs of one sample were given: nothing was written, and no memory was asked"]
    lens, own = _lens(adapter, inputs, notes)
    flow = _flow(adapter, inputs, None, notes)
    rows = own[0].reshape(-1, own.shape[-1])
    told = None
    if lens is not None:
        told = _lens_parts(lens, lens.logits[:, 0].reshape(len(lens.layers), len(rows), -1), None, lambda i: str(i))
    if told is None and flow is None:
        raise AdapterError(
            f"Nothing of what {adapter.name} computes can be shown: {'; '.join(notes[1:])}.",
            "Expected blocks whose outputs are of one shape, or attention.",
            "Look at its layers with `utils.adapters.activations.representations` instead.",
        )
    answers = tuple(
        TracedToken(
            int(row.argmax()),
            str(int(row.argmax())),
            True,
            float(row.log_softmax(-1).amax()),
            _entropy(row.log_softmax(-1)),
        )
        for row in rows
    )
    return ReasoningTrace(adapter.name, adapter.task.value, "", "", answers, told, flow, (), tuple(notes))


def _lens(adapter: ModelAdapter, inputs: Mapping[str, Any], notes: list[str]) -> tuple[LensReading | None, Tensor]:
    """Return the lens, or None with a note, and the model's own logits ``(1, ..., answers)``."""
    try:
        read = logit_lens(adapter, inputs)
    except AdapterError as error:
        notes.append(f"no logit lens: {error.found}")
        with preserved(adapter.module, 0, "trace"), torch.no_grad():
            adapter.module.eval()
            return None, adapter.logits(inputs).float().cpu()
    if not read.faithful:
        notes.append(f"the logit lens is not faithful: {read.reason}")
    if read.skipped:
        notes.append(f"the lens leaves out {', '.join(read.skipped)}: what they hand on is of another shape")
    return read, read.logits[-1]


def _text_lens(read: LensReading, length: int, ids: list[int], tokenizer: Any) -> Lens:
    follows = [*ids[1:], None]
    return _lens_parts(read, read.logits[:, 0, :length], follows, lambda number: _piece(tokenizer, [number]))


def _lens_parts(read: LensReading, logits: Tensor, follows: list[int | None] | None, label: Any) -> Lens:
    """Return plain values of logits ``(layers, places, answers)``."""
    chances = logits.softmax(-1)
    values, numbers = chances.topk(min(GUESSES, chances.shape[-1]), -1)
    guesses = tuple(
        tuple(
            tuple(Guess(i, label(i), p) for i, p in zip(places_i, places_p, strict=True))
            for places_i, places_p in zip(layer_i, layer_p, strict=True)
        )
        for layer_i, layer_p in zip(numbers.tolist(), values.tolist(), strict=True)
    )
    # What came next, or where nothing did, what the model itself answers.
    wanted = chances[-1].argmax(-1).tolist()
    wanted = [
        own if next_ is None else next_ for own, next_ in zip(wanted, follows or [None] * len(wanted), strict=True)
    ]
    final = tuple(tuple(float(layer[place, number]) for place, number in enumerate(wanted)) for layer in chances)
    return Lens(read.layers, read.faithful, read.difference, read.reason, guesses, final)


def _flow(
    adapter: ModelAdapter, inputs: Mapping[str, Any], length: int | None, notes: list[str]
) -> AttentionFlow | None:
    with preserved(adapter.module, 0, "trace"), torch.no_grad():
        adapter.module.eval()
        read = attention_flow(adapter, lambda: adapter.logits(inputs))
    if read.rollout is None:
        notes.append(f"no attention flow: {read.reason}")
        return None
    if read.unseen:
        notes.append(f"the attention flow is a part of what moves between places: {read.reason}")
    rollout = read.rollout if length is None else read.rollout[:length, :length]
    table = tuple(tuple(round(value, 5) for value in row) for row in rollout.tolist())
    return AttentionFlow(read.modules, read.unseen, table, read.reason)


def _steps(answer: list[TracedToken], tokenizer: Any) -> tuple[ReasoningStep, ...]:
    """Return the steps of what was written."""
    pieces = _pieces(tokenizer, [token.id for token in answer])
    steps = []
    for begin, end in split_steps(pieces) if tokenizer is not None else [(0, len(answer))] * bool(answer):
        part = answer[begin:end]
        counts: dict[int, tuple[float, str, str]] = {}
        for token in part:
            for memory in token.memories:
                if memory.supports:
                    weight = (token.memory_share or 0.0) * memory.share
                    counts[memory.row] = (counts.get(memory.row, (0.0,))[0] + weight, memory.text, memory.token)
        best = sorted(counts.items(), key=lambda item: -item[1][0])[:STEP_MEMORIES]
        shares = [token.memory_share for token in part if token.memory_share is not None]
        steps.append(
            ReasoningStep(
                text="".join(pieces[begin:end]), begin=begin, end=end,
                mean_log_probability=_mean([token.log_probability for token in part]),
                mean_entropy=_mean([token.entropy for token in part]),
                memory_share=_mean(shares) if shares else None,
                memories=tuple(StepMemory(row, text + after, weight) for row, (weight, text, after) in best),
            )
        )  # fmt: skip
    return tuple(steps)


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text of each token such that joined they are the text: parts of one character stay together."""
    if tokenizer is None:
        return [str(number) for number in ids]
    pieces, before = [], ""
    for count in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:count])
        # A character whose bytes are not complete is written as a replacement; wait for the rest of it.
        if count < len(ids) and (whole.endswith("\ufffd") or not whole.startswith(before)):
            pieces.append("")
            continue
        pieces.append(whole[len(before) :] if whole.startswith(before) else "")
        before = whole
    return pieces


def _piece(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))


def _value(chances: Tensor | None, number: int) -> float | None:
    return None if chances is None else float(chances[number])


def _entropy(chances: Tensor | None) -> float | None:
    return None if chances is None else float(torch.special.entr(chances.exp()).sum())


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
