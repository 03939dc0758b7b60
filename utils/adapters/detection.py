"""Facts read off a module, its config and its forward signature, each with the reason.

Names are only ever hints here: they order what is tried, and a forward pass confirms it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.spec import ModelSpec
from utils.runtime.errors import AdapterError

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
    "numbers": re.compile(
        r"^(x_?(num|cont|numerical|continuous|numeric|dense)\w*|(numerical|continuous|numeric|dense)\w*)$"
    ),
    "categories": re.compile(r"^(x_?(cat|categ|categorical|sparse)\w*|(cat|cats|categorical|categories|sparse)\w*)$"),
}

TASK_SUFFIXES = {
    "causal_lm": re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$"),
    "masked_lm": re.compile(r"(ForMaskedLM|(?<!Electra)ForPreTraining)$"),
    "seq2seq": re.compile(r"(ForConditionalGeneration|ForSeq2SeqLM)$"),
    "text_classification": re.compile(r"(ForSequenceClassification|ForTokenClassification)$"),
    "image_classification": re.compile(r"ForImageClassification$"),
    "audio_classification": re.compile(r"ForAudioClassification$"),
}

MASKED_WORD = r"(?<![A-Z])MLM(?![a-z](?!\d))|(?<![A-Za-z])[Mm]lm(?![a-z])|(?<=[a-z])Mlm(?![a-z])"
"""MLM as a word of its own; within others it may be an accident, as in TransformLM, SSMLM and MLModel."""
NAME_HINTS = (
    # The first pattern that occurs decides: a masked or bidirectional language model is a language model too, and
    # "masked" alone may also mean the mask of a decoder.
    ("masked_lm", re.compile(rf"(?i:bert|electra|bidirectional|masked_?(?:language|lm|token))|{MASKED_WORD}")),
    ("causal_lm", re.compile(r"gpt|causal|llama|autoregress", re.IGNORECASE)),
    (None, re.compile(r"encoder_?decoder", re.IGNORECASE)),
    ("causal_lm", re.compile(r"decoder", re.IGNORECASE)),
    ("masked_lm", re.compile(r"masked|encoder", re.IGNORECASE)),
    ("causal_lm", re.compile(r"lm_?head|language_?model", re.IGNORECASE)),
)
ENCODER_NAME = re.compile(
    r"(?i:encoder|masked|protein|denois|diffusion)|(?<!LST)MLM(?![a-z](?!\d))|(?<!st)mlm(?!od)|Mlm(?!od)"
)
NAMED, CLASS_NAMED = "the model's name", "the class name"
"""How a reason starts that is nothing but a name."""
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
    ways: tuple[Callable[[], Any], ...] = (
        lambda: asdict(source) if is_dataclass(source) and not isinstance(source, type) else source.to_dict(),
        lambda: source.to_dict(),
        lambda: {key: value for key, value in vars(source).items() if not key.startswith("_")},
    )
    for way in ways:
        # A config may refuse to be read in one way, for example where its layers differ.
        with suppress(Exception):
            return dict(way())
    return {}


def given_config(config: Any) -> dict[str, Any]:
    """Return the config that a user gave as a dict.

    Raises:
        AdapterError: It is no config of any usual form.
    """
    if isinstance(config, (str, bytes, int, float, list, tuple)):
        raise AdapterError(
            f"A {type(config).__name__} was given as the config.",
            "Expected a dict, a dataclass or a transformers config.",
            "For a JSON file, pass what json.load returns.",
        )
    if isinstance(config, ModelSpec):
        raise AdapterError(
            "A ModelSpec was given as the config.", "Expected the model's own settings, or nothing.",
            "Give it by name: ModelAdapter(model, spec=...).",
        )  # fmt: skip
    return config_dict(config)


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
    keywords_name: str | None = None
    """What it calls them."""

    @property
    def names(self) -> tuple[str, ...]:
        """All named parameters in order."""
        return self.required + self.optional

    @property
    def demands(self) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """The required names, and all that may be given by keyword; none and None where names say nothing."""
        if self.positional:
            return (), None
        return self.required, None if self.keywords else self.names


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
        next((p.name for p in parameters if p.kind == p.VAR_KEYWORD), None),
    )


def kind_by_name(name: str) -> str | None:
    """Return the kind of input that a parameter's name stands for, if it is a usual one."""
    last = name.rsplit(".", 1)[-1]
    return next((kind for kind, pattern in INPUT_KINDS.items() if pattern.match(last)), None)


@dataclass(frozen=True)
class EmbeddingUse:
    """What one embedding table was asked for during a forward pass."""

    name: str
    rows: int
    width: int
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
        table = getattr(child, "weight", None)
        # Quantised and other tables of one's own are not nn.Embedding, but have its attributes.
        if not hasattr(child, "padding_idx") or not isinstance(table, Tensor) or table.dim() != 2:
            return
        # A table shared by two sides of a model is the main input's table, whatever it is asked for later.
        if name in uses and uses[name].reads_tokens:
            return
        asked = next((t for t in arguments if isinstance(t, Tensor) and t.dtype in (torch.long, torch.int)), None)
        if asked is None:
            asked = _rows_read(table, first_tensor(output))
        if asked is None:
            return
        row = asked.reshape(-1, asked.shape[-1])[0] if asked.dim() else asked
        consecutive = row.dim() == 1 and _counts_up(row, length)
        reads = next(
            (
                key
                for key, ids in whole.items()
                if asked.numel() == ids.numel() and torch.equal(asked.reshape(-1), ids.reshape(-1))
            ),
            None,
        )
        uses[name] = EmbeddingUse(
            name,
            table.shape[0],
            table.shape[1],
            child.padding_idx if isinstance(child.padding_idx, int) else None,
            reads,
            reads == main,
            int(row[0]) if consecutive else None,
        )

    with observe(module, watch):
        call()
    return list(uses.values())


def _counts_up(row: Tensor, length: int) -> bool:
    """Tell whether rows are asked for one after another, apart from what the model itself appends as padding."""
    rest = row[length:]
    return (
        len(row) >= length
        and bool((row[:length].diff() == 1).all())
        and (not len(rest) or bool((rest == rest[0]).all()))
    )


def _rows_read(table: Tensor, output: Tensor | None) -> Tensor | None:
    """Return which rows of a table make an output's first sample; for tables that are asked by a shape, not by ids."""
    if output is None or output.dim() < 2 or output.shape[-1] != table.shape[1]:
        return None
    first = output.reshape(-1, output.shape[-2], output.shape[-1])[0]
    matches = [(table == row).all(dim=1).nonzero().flatten() for row in first]
    return torch.stack([match[0] for match in matches]) if all(len(match) for match in matches) else None


def task_by_name(module: nn.Module, config: Mapping[str, Any]) -> Detection[str] | None:
    """Read the task off the names that transformers gives its classes."""
    names = [type(module).__name__, *(config.get("architectures") or [])]
    for name in names:
        for task, pattern in TASK_SUFFIXES.items():
            if pattern.search(str(name)):
                return Detection(task, f"{CLASS_NAMED} {name}")
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
                return Detection(named, f"{NAMED} ({label.split()[0]})")
            break
    if "token_type_ids" in names:
        return Detection("masked_lm", "forward takes `token_type_ids`, as BERT-style encoders do")
    return None


def bidirectional_setting(config: Mapping[str, Any]) -> str | None:
    """Return the setting that allows a language model to see later tokens, as a phrase; None if there is none."""
    for key in ("is_decoder", "causal", "is_causal"):
        if config.get(key) is False:
            return f"`{key}` is false in the config"
    for key in ("attn_type", "attention_type"):
        if config.get(key) in ("bi", "bidirectional"):
            return f"`{key}` is bidirectional in the config"
    for key in ("prefix_lm", "prompt_length"):
        if config.get(key):
            return f"`{key}` in the config lets a prompt be read in both directions"
    return None


def encoder_sign(module: nn.Module, config: Mapping[str, Any]) -> str | None:
    """Return what speaks for an encoder that may see every position, too weak to decide by itself; None if nothing."""
    for key in MASK_TOKEN_KEYS:
        if config.get(key) is not None and config.get(key) is not False:
            return f"`{key}` in the config"
    label = f"{type(module).__name__} {config.get('model_name', '')} {config.get('model_type', '')}"
    return f"{NAMED} ({label.split()[0]})" if ENCODER_NAME.search(label) else None
