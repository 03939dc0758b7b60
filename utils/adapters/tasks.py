"""What a model is for: by what is stated, by its inputs and output, by names, and last by what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from utils.adapters.detection import (
    DECODER_INPUTS,
    Detection,
    EmbeddingUse,
    bidirectional_setting,
    config_number,
    kind_by_name,
    language_task_hint,
    task_by_name,
)
from utils.adapters.roles import are_twins, is_text
from utils.runtime.errors import ConfigError

if TYPE_CHECKING:
    from utils.adapters.model_adapter import ModelAdapter

LANGUAGE_MODELS = ("causal_lm", "masked_lm", "seq2seq")
UNIT_TOLERANCE = 1e-3
REAL_VALUES = "real values of shape"
"""What the reason says of an embedding that is no vector per sample or token, such as a picture made of a picture."""
ASSUMED = "assumed for scores over the vocabulary"
"""How the reason starts when a model that sees later tokens counts as causal for want of any word about it."""


def find_task(adapter: ModelAdapter, shape: tuple[int, ...], uses: Sequence[EmbeddingUse]) -> Detection[str]:
    """Decide what a model is for.

    Args:
        adapter: The model.
        shape: Shape of its main output for a batch of two; empty when no forward pass succeeded.
        uses: The embedding tables seen at work.

    Returns:
        One of `utils.adapters.TASKS` with its reason.
    """
    if adapter.spec.task is not None:
        return Detection(adapter.spec.task, "stated in ModelSpec")
    modality = adapter.modality
    second = adapter.input_names[1] if adapter.input_names[1:] else ""
    if second in DECODER_INPUTS and (modality == "tokens" or second.endswith("_ids")):
        return Detection("seq2seq", f"forward takes `{second}` beside the source")
    if modality == "features" and kind_by_name(adapter.main_input) in ("wave", "frames"):
        return Detection("audio_classification", f"forward takes sound as `{adapter.main_input}`")
    if (named := task_by_name(adapter.module, adapter.config)) is not None:
        if named.value == "causal_lm":
            return _bidirectional(adapter, named)
        # Decoders that read images or sound beside the text are called generators, but have one sequence only.
        if named.value != "seq2seq" or any(name in DECODER_INPUTS for name in adapter.argument_names):
            return named
    if not adapter.num_parameters and not adapter.lazy and modality != "tokens":
        return Detection("embedding", "no parameters: what goes in is transformed, and there is nothing to train")
    if adapter.failure is not None:
        assumed = {"image": "image_classification", "features": "tabular_classification", "tokens": "causal_lm"}
        kind = {"tokens": "token ids"}.get(modality, modality)
        return Detection(assumed[modality], f"assumed for {kind}, because no forward pass succeeded")
    if len(shape) == 2 and (sign := _embedding_sign(adapter, shape[-1], uses)) is not None:
        return Detection("embedding", sign)
    if modality != "tokens" and len(shape) > 2:
        return Detection("embedding", f"{modality} in, {REAL_VALUES} {shape[1:]} per sample out")
    if modality == "image":
        return Detection("image_classification", "images in, one row of scores per image out")
    if modality == "features":
        if len(shape) < 2 or shape[-1] == 1:
            return Detection("regression", "features in, one number per sample out")
        return Detection("tabular_classification", f"features in, {shape[-1]} scores per sample out")
    if len(shape) == 2:
        return Detection("text_classification", f"token ids in, one row of {shape[-1]} scores per text out")
    if len(shape) < 2:
        return Detection("regression", "token ids in, one number per text out")
    return _answered_text(adapter, shape) or _language_task(adapter, shape[-1], uses)


def check_task(adapter: ModelAdapter, shape: tuple[int, ...]) -> None:
    """Compare a stated task with what the model takes and returns.

    Args:
        adapter: The model.
        shape: As in `find_task`.

    Raises:
        ConfigError: The model cannot be for that.
    """
    task = adapter.spec.task
    if task is None or adapter.failure is not None or not shape:
        return
    takes = {"tokens": "token ids", "image": "images", "features": "real-valued features"}[adapter.modality]
    texts = adapter.modality == "tokens"
    if not texts:
        texts = any(is_text(name, value) for name, value in adapter.example_inputs().items())
    found, expected = f"takes {takes} and returns {tuple(shape)} for two samples", ""
    if task in LANGUAGE_MODELS:
        vocabulary = adapter.vocab_size.value
        narrow = texts and len(shape) == 2 and vocabulary is not None and shape[-1] < vocabulary / 2
        if (not texts and len(shape) < 3) or narrow or len(shape) < 2:
            expected = "scores over the vocabulary for each token: (batch, seq, vocab)"
    elif task == "image_classification" and adapter.modality == "tokens":
        expected = "images (batch, channels, height, width), or their pixels as real numbers"
    elif task == "audio_classification" and adapter.modality == "tokens":
        expected = "waves or spectrograms, which are real numbers"
    elif task == "tabular_classification" and (adapter.modality == "image" or (texts and len(shape) > 2)):
        expected = "one row of features per sample, and one row of scores"
    if expected:
        raise ConfigError(
            f"ModelSpec.task is {task!r}, but {adapter.name} {found}.",
            f"Expected {expected}.",
            "Leave the task out to have it detected; if the inputs were guessed wrongly, pass "
            "ModelSpec(example_inputs={...}).",
        )


def _answered_text(adapter: ModelAdapter, shape: tuple[int, ...]) -> Detection[str] | None:
    """Tell a translation by its answer: as long as another text than the main one, and over a vocabulary."""
    given = adapter.example_inputs()
    main = given[adapter.main_input]
    vocabulary = adapter.vocab_size.value or shape[-1]
    if main.dim() != 2 or not 0.5 <= shape[-1] / vocabulary <= 2:
        return None
    fitting = [name for name, value in given.items() if is_text(name, value) and value.shape[1] == shape[1]]
    others = [name for name in fitting if name != adapter.main_input]
    if not others or (shape[1] == main.shape[1] and not _follows(adapter, given, others[-1])):
        return None
    reason = f"the answer has as many positions as `{others[-1]}`, and `{adapter.main_input}` another number of them"
    return Detection("seq2seq", reason)


def _follows(adapter: ModelAdapter, inputs: dict[str, torch.Tensor], name: str) -> bool:
    """Tell whether the answer is as long as one text, and no longer than it beside a longer main one."""
    shorter = inputs[name][:, :-1]
    try:
        with adapter.isolated():
            return adapter.logits({**inputs, name: shorter}).shape[1:2] == shorter.shape[1:2]
    except Exception:
        # The two belong together, token by token.
        return False


def find_content_input(adapter: ModelAdapter, shape: tuple[int, ...]) -> str:
    """Return which input's positions the answer of an encoder-decoder follows.

    Args:
        adapter: The model.
        shape: As in `find_task`.
    """
    if usual := next((name for name in adapter.input_names if name in DECODER_INPUTS), None):
        return usual
    # Under other names it is the text that is as long as the answer; of equally long ones, the second.
    texts = {name: value.shape for name, value in adapter.example_inputs().items() if is_text(name, value)}
    fitting = [name for name, size in texts.items() if size[1:2] == shape[1:2]]
    return fitting[-1] if fitting else adapter.main_input


def _embedding_sign(adapter: ModelAdapter, width: int, uses: Sequence[EmbeddingUse]) -> str | None:
    """Return what tells one vector per sample from scores; None if nothing does."""
    if width == 1 or config_number(adapter.config, "num_labels") or adapter.spec.num_labels:
        return None
    if are_twins(adapter.main_input, second := (*adapter.input_names, "")[1]):
        return f"one vector of {width} numbers per sample, for `{adapter.main_input}` and `{second}` alike"
    norms = torch.ones(0)
    with adapter.isolated():
        norms = adapter.logits(adapter.example_inputs()).float().norm(dim=-1)
    if len(norms) and bool(((norms - 1).abs() < UNIT_TOLERANCE).all()):
        return f"one vector of {width} numbers and of length 1 per sample"
    table = next((use for use in uses if use.reads_tokens), None)
    if table is not None and width == table.width:
        return f"one vector per text, as wide as the token embedding ({width})"
    return None


def _language_task(adapter: ModelAdapter, width: int, uses: Sequence[EmbeddingUse]) -> Detection[str]:
    """Decide what a model is for that turns token ids into one vector per position."""
    table = next((use for use in uses if use.reads_tokens), None)
    vocabulary = adapter.vocab_size.value or width
    # Where a config promises another vocabulary than the table has, scores over either are a language model's.
    near = any(0.5 <= width / size <= 2 for size in (vocabulary, table.rows if table else vocabulary))
    hint = language_task_hint(adapter.module, adapter.config, adapter.argument_names)
    if width != vocabulary and table is not None:
        embedding_width = table.width
        if width == embedding_width and not near:
            return Detection("embedding", f"one vector per token, as wide as the token embedding ({width})")
    if not near and hint is None:
        return Detection("text_classification", f"token ids in, {width} scores per token out")
    if hint is not None:
        return hint
    if not _sees_later(adapter):
        return Detection("causal_lm", "scores over the vocabulary, and earlier positions do not see the last token")
    return Detection("causal_lm", f"{ASSUMED}; if it may see later tokens, say ModelSpec(task='masked_lm')")


def _bidirectional(adapter: ModelAdapter, named: Detection[str]) -> Detection[str]:
    """Correct a causal name where the config says that later tokens may be seen, and they are.

    Encoders with a head for language models are causal only when they are set up as decoders.
    """
    said = bidirectional_setting(adapter.config)
    if said is None or adapter.failure is not None or not _sees_later(adapter):
        return named
    return Detection("masked_lm", f"{said}, and earlier positions see the last token, whatever {named.reason} says")


def _sees_later(adapter: ModelAdapter) -> bool:
    """Tell whether the last token changes the logits before it."""
    with adapter.isolated():
        inputs = adapter.example_inputs()
        before = adapter.logits(inputs)
        ids = inputs[adapter.main_input].clone()
        ids[..., -1] = (ids[..., -1] + 1) % adapter.readable_ids()
        after = adapter.logits({**inputs, adapter.main_input: ids})
    return not torch.equal(before[:, :-1], after[:, :-1])
