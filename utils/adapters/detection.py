"""Facts read off a module, its config and its forward signature, each with the reason.

Names are only ever hints here: they order what is tried, and a forward pass confirms it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from utils.adapters.capture import observe

T = TypeVar("T")

CONFIG_KEYS = {
    "vocab_size": ("vocab_size", "n_vocab", "num_tokens", "vocabulary_size", "ntoken"),
    "max_length": (
        "max_seq_len",
        "max_position_embeddings",
        "n_positions",
        "block_size",
        "max_seq_length",
        "max_sequence_length",
        "context_length",
        "max_len",
        "seq_length",
        "seq_len",
        "n_ctx",
        "ctx_len",
    ),
    "num_labels": ("num_labels", "num_classes", "n_classes"),
    "pad_token_id": ("pad_token_id", "pad_id"),
    "image_size": ("image_size", "img_size", "input_size", "resolution"),
    "channels": ("num_channels", "in_channels", "in_chans", "channels"),
    "features": ("input_dim", "in_features", "n_features", "num_features", "input_size", "in_dim"),
}

INPUT_KINDS = {
    "tokens": re.compile(r"^(input_ids|input_0_tokens|idx|ids|tokens?|token_ids|src|src_tokens|source|indices)$"),
    "image": re.compile(r"^(pixel_values|images?|imgs?|pixels)$"),
    "wave": re.compile(r"^(input_values|waveforms?|wave|audio)$"),
    "frames": re.compile(r"^(input_features|features|mel|spectrogram)$"),
}

TASK_SUFFIXES = {
    "causal_lm": re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$"),
    "masked_lm": re.compile(r"(ForMaskedLM|(?<!Electra)ForPreTraining)$"),
    "seq2seq": re.compile(r"(ForConditionalGeneration|ForSeq2SeqLM)$"),
    "text_classification": re.compile(r"(ForSequenceClassification|ForTokenClassification)$"),
    "image_classification": re.compile(r"ForImageClassification$"),
    "audio_classification": re.compile(r"ForAudioClassification$"),
}

NAME_HINTS = (
    # The first pattern that occurs decides: a masked or bidirectional language model is a language model too, and
    # "masked" alone may also mean the mask of a decoder.
    ("masked_lm", re.compile(r"bert|electra|(?<!st)mlm|bidirectional|masked_?(language|lm|token)", re.IGNORECASE)),
    ("causal_lm", re.compile(r"gpt|causal|llama|autoregress", re.IGNORECASE)),
    (None, re.compile(r"encoder_?decoder", re.IGNORECASE)),
    ("causal_lm", re.compile(r"decoder", re.IGNORECASE)),
    ("masked_lm", re.compile(r"masked|encoder", re.IGNORECASE)),
    ("causal_lm", re.compile(r"lm_?head|language_?model", re.IGNORECASE)),
)
ENCODER_NAME = re.compile(r"encoder|masked|protein|denois|diffusion", re.IGNORECASE)
MASK_TOKEN_KEYS = ("mask_token_id", "mask_token", "mask_id", "mlm_probability", "type_vocab_size")

DECODER_INPUTS = ("decoder_input_ids", "tgt", "trg", "target_ids", "decoder_inputs", "dec_ids")
LABEL_INPUTS = ("targets", "labels", "target", "y")


@dataclass(frozen=True)
class Detection(Generic[T]):
    """A fact about a model and how it is known."""

    value: T
    """The fact; None when it is not known or there is none."""
    reason: str
    """Where it comes from, as a phrase for people."""


def config_dict(source: Any) -> dict[str, Any]:
    """Return a config of any usual form (mapping, dataclass, transformers config, plain object) as a dict."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return dict(source)
    if is_dataclass(source) and not isinstance(source, type):
        return asdict(source)
    if callable(getattr(source, "to_dict", None)):
        return dict(source.to_dict())
    try:
        return {key: value for key, value in vars(source).items() if not key.startswith("_")}
    except TypeError:
        return {}


def config_number(config: Mapping[str, Any], fact: str) -> Detection[int] | None:
    """Look a whole number up in a config under the names in use for `fact`, nested text and vision parts too."""
    places: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    places += [(f"{key}.", value) for key, value in config.items() if isinstance(value, Mapping)]
    for prefix, place in places:
        for key in CONFIG_KEYS[fact]:
            value = place.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and (value > 0 or fact == "pad_token_id"):
                return Detection(value, f"`{prefix}{key}` in the config")
    return None


@dataclass(frozen=True)
class ForwardSignature:
    """What a forward accepts."""

    required: tuple[str, ...]
    """Parameters without a default."""
    optional: tuple[str, ...]
    """Parameters with a default."""
    positional: bool
    """It must be called by position: ``*args`` and no name, or names that no keyword may use."""
    keywords: bool
    """It takes ``**kwargs``."""

    @property
    def names(self) -> tuple[str, ...]:
        """All named parameters in order."""
        return self.required + self.optional


def forward_signature(module: nn.Module) -> ForwardSignature:
    """Read the signature of a module's forward."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return ForwardSignature((), (), True, True)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return ForwardSignature(
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        any(p.kind == p.POSITIONAL_ONLY for p in named)
        or (not named and any(p.kind == p.VAR_POSITIONAL for p in parameters)),
        any(p.kind == p.VAR_KEYWORD for p in parameters),
    )


def kind_by_name(name: str) -> str | None:
    """Return the kind of input that a parameter's name stands for, if it is a usual one."""
    return next((kind for kind, pattern in INPUT_KINDS.items() if pattern.match(name)), None)


@dataclass(frozen=True)
class EmbeddingUse:
    """What one embedding table was asked for during a forward pass."""

    name: str
    rows: int
    padding_idx: int | None
    reads: str | None
    """Name of the input whose token ids it was given."""
    reads_tokens: bool
    """That input is the main one."""
    offset: int | None
    """It was given consecutive positions that start here."""


def embedding_uses(
    module: nn.Module, call: Callable[[], Any], inputs: Mapping[str, Any], main: str
) -> list[EmbeddingUse]:
    """Run `call` and tell token tables from position tables by what they are asked for.

    Args:
        module: The model.
        call: Runs one forward pass with `inputs`.
        inputs: Inputs by name: token ids ``(batch, seq)`` that are not consecutive numbers.
        main: Name of the main one.
    """
    uses: dict[str, EmbeddingUse] = {}
    length = inputs[main].shape[-1]
    whole = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dtype == torch.long}

    def watch(name: str, child: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not isinstance(child, nn.Embedding) or not arguments or not isinstance(arguments[0], Tensor):
            return
        # A table shared by two sides of a model is the main input's table, whatever it is asked for later.
        if name in uses and uses[name].reads_tokens:
            return
        asked = arguments[0]
        row = asked.reshape(-1, asked.shape[-1])[0] if asked.dim() else asked
        consecutive = row.dim() == 1 and len(row) == length and bool((row.diff() == 1).all())
        reads = next((key for key, ids in whole.items() if asked.shape == ids.shape and torch.equal(asked, ids)), None)
        uses[name] = EmbeddingUse(
            name,
            child.num_embeddings,
            child.padding_idx,
            reads,
            reads == main,
            int(row[0]) if consecutive else None,
        )

    with observe(module, watch):
        call()
    return list(uses.values())


def task_by_name(module: nn.Module, config: Mapping[str, Any]) -> Detection[str] | None:
    """Read the task off the names that transformers gives its classes."""
    names = [type(module).__name__, *(config.get("architectures") or [])]
    for name in names:
        for task, pattern in TASK_SUFFIXES.items():
            if pattern.search(str(name)):
                return Detection(task, f"the class name {name}")
    return None


def language_task_hint(module: nn.Module, config: Mapping[str, Any], names: tuple[str, ...]) -> Detection[str] | None:
    """Tell a causal from a masked language model by settings and names; None when nothing speaks for either."""
    for key, task in (("is_decoder", "causal_lm"), ("causal", "causal_lm"), ("is_causal", "causal_lm")):
        if config.get(key) is True:
            return Detection(task, f"`{key}` is true in the config")
    if config.get("causal") is False or config.get("is_causal") is False:
        return Detection("masked_lm", "the config says that it is not causal")
    label = f"{type(module).__name__} {config.get('model_name', '')} {config.get('model_type', '')}"
    for named, pattern in NAME_HINTS:
        if pattern.search(label):
            if named is not None:
                return Detection(named, f"the model's name ({label.split()[0]})")
            break
    if "token_type_ids" in names:
        return Detection("masked_lm", "forward takes `token_type_ids`, as BERT-style encoders do")
    return None


def encoder_sign(module: nn.Module, config: Mapping[str, Any]) -> str | None:
    """Return what speaks for an encoder that may see every position, too weak to decide by itself; None if nothing."""
    for key in MASK_TOKEN_KEYS:
        if config.get(key) is not None and config.get(key) is not False:
            return f"`{key}` in the config"
    label = f"{type(module).__name__} {config.get('model_name', '')} {config.get('model_type', '')}"
    return f"the model's name ({label.split()[0]})" if ENCODER_NAME.search(label) else None
