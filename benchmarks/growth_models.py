"""The architectures of `benchmarks/growth_coverage.py`, built small, and inputs for them that growth has not seen.

Families of transformers come shrunk by `benchmarks/small_configs.py`, as they are by default and, where that makes a
difference, with their embeddings tied the other way; torch's own layers come with the least code around them that makes
a model.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.small_configs import natural_inputs, small_model

TOKENS, WIDTH, LENGTH = 53, 32, 160
CAUSAL = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gptj",
    "gpt_neo", "opt", "bloom", "falcon", "mpt", "stablelm", "starcoder2", "olmo", "olmo2", "cohere", "granite", "glm",
    "nemotron", "codegen", "biogpt", "xglm", "persimmon", "gpt_bigcode", "smollm3", "ctrl", "openai-gpt", "reformer",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "gpt_oss", "jamba", "mamba", "mamba2",
    "rwkv", "recurrent_gemma", "lfm2", "bert",
)  # fmt: skip
"""Model types of language models: dense, mixtures of experts, state spaces and hybrids."""
BOTH_TIES = (
    "gpt2", "llama", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "opt", "bloom", "falcon", "stablelm", "olmo2",
    "granite", "biogpt", "mixtral", "qwen3_moe", "mamba",
)  # fmt: skip
"""Those that come tied and untied."""
DEEPER: dict[str, dict[str, Any]] = {
    "jamba": {"num_hidden_layers": 4},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {"num_hidden_layers": 6},
}
"""Hybrids with more layers, for each kind of block to come twice."""
OTHERS = (
    ("masked_lm", "bert"), ("masked_lm", "roberta"), ("masked_lm", "distilbert"), ("masked_lm", "electra"),
    ("masked_lm", "albert"), ("masked_lm", "deberta-v2"), ("masked_lm", "modernbert"), ("masked_lm", "fnet"),
    ("text_classification", "bert"), ("text_classification", "xlnet"), ("text_classification", "gpt2"),
    ("seq2seq", "t5"), ("seq2seq", "bart"), ("seq2seq", "marian"), ("seq2seq", "pegasus"), ("seq2seq", "mt5"),
    ("image_classification", "vit"), ("image_classification", "deit"), ("image_classification", "swin"),
    ("image_classification", "beit"), ("image_classification", "dinov2"), ("image_classification", "convnext"),
    ("image_classification", "resnet"), ("image_classification", "mobilenet_v2"),
    ("image_classification", "poolformer"), ("audio_classification", "wav2vec2"),
    ("audio_classification", "audio-spectrogram-transformer"), ("audio_classification", "whisper"),
)  # fmt: skip
"""Family and model type of what is no causal language model."""
MAPPINGS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio_classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "text_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Architecture:
    """One that is to grow."""

    label: str
    """How it is called in the table."""
    family: str
    """causal_lm, masked_lm, seq2seq, text_classification, image_classification, audio_classification or table."""
    build: Callable[[], nn.Module] = field(repr=False)
    """Makes it, the same each time."""
    example: dict[str, Tensor] | None = field(default=None, repr=False)
    """An input to name to growth, where nobody could guess one."""


def architectures() -> list[Architecture]:
    """Return all of them."""
    made = [Architecture(f"{kind}", "causal_lm", _of_transformers("causal_lm", kind)) for kind in CAUSAL]
    made += [
        Architecture(f"{kind}, other tie", "causal_lm", _of_transformers("causal_lm", kind, True)) for kind in BOTH_TIES
    ]
    made += [Architecture(f"{kind} {family}", family, _of_transformers(family, kind)) for family, kind in OTHERS]
    for post in (False, True):
        for tied in (False, True):
            name = f"torch {'post' if post else 'pre'}-norm encoder{', tied' if tied else ''}"
            made.append(Architecture(name, "causal_lm", _seeded(lambda p=post, t=tied: TorchLanguageModel(p, t))))
        name = f"torch {'post' if post else 'pre'}-norm"
        made.append(Architecture(f"{name} transformer", "seq2seq", _seeded(lambda p=post: TorchTranslator(p))))
        made.append(Architecture(
            f"{name} encoder, bare", "table", _seeded(lambda p=post: _bare_encoder(p)),
            {"src": torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(5))},
        ))  # fmt: skip
    made.append(Architecture("mlp-mixer", "image_classification", _seeded(Mixer)))
    made.append(Architecture("mlp", "table", _seeded(_mlp)))
    return made


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return build


def _of_transformers(family: str, kind: str, other_tie: bool = False) -> Callable[[], nn.Module]:
    """Return what builds a family of transformers small.

    Args:
        family: Of the mappings of transformers.
        kind: Model type.
        other_tie: Tie the embeddings to the output where they are not by default, and the other way round.
    """

    def build() -> nn.Module:
        from transformers.models.auto import modeling_auto

        names = getattr(modeling_auto, MAPPINGS[family])[kind]
        model: Any = small_model(kind, names if isinstance(names, str) else names[0], decoder=family == "causal_lm")
        if kind in DEEPER:
            model.config.update(DEEPER[kind])
            model = type(model)(model.config)
        if family == "text_classification" and model.config.pad_token_id is None:
            model.config.pad_token_id = 0
        if not other_tie:
            return model
        config = copy.deepcopy(model.config)
        before = is_tied(model)
        config.tie_word_embeddings = not before
        torch.manual_seed(0)
        other = type(model)(config).eval()
        if is_tied(other) is before:
            raise RuntimeError(f"the embeddings of {kind} are always {'tied' if before else 'untied'}")
        return other

    return build


def is_tied(model: nn.Module) -> bool:
    """Tell whether a parameter has several names."""
    return any(len(names) > 1 for names in ties(model))


def ties(model: nn.Module) -> set[tuple[str, ...]]:
    """Return the groups of names for one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(sorted(group)) for group in names.values()}


def checks(model: Any, family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield inputs of many shapes, each with a name: lengths, batch sizes, masks.

    Args:
        model: A model in eval mode; what it cannot read itself is no fair question.
        family: As in `Architecture`.
    """
    draw = torch.Generator().manual_seed(99)
    names = inspect.signature(model.forward).parameters
    if family in ("causal_lm", "masked_lm", "text_classification", "seq2seq"):
        size = vocabulary(model)
        for rows, length in ((1, 1), (3, 7), (5, 12), (2, 33), (1, 64), (2, 128)):
            yield f"{rows} x {length}", _texts(model, family, rows, length, size, draw)
        for side in ("right", "left"):
            if "attention_mask" in names:
                mask = torch.ones(3, 9, dtype=torch.long)
                mask[1, slice(5, None) if side == "right" else slice(0, 4)] = 0
                given = _texts(model, family, 3, 9, size, draw)
                yield f"3 x 9, padded on the {side}", {**given, "attention_mask": mask}
        return
    for rows in (1, 3, 5):
        torch.manual_seed(100 + rows)
        for name, inputs in _others(model, family, rows):
            yield f"{rows} x {name}", inputs


def _others(model: Any, family: str, rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if family == "table":
        main = next(iter(inspect.signature(model.forward).parameters))
        if main == "src":
            for length in (1, 4, 40):
                yield f"{length}", {main: torch.randn(rows, length, WIDTH)}
            hidden = torch.zeros(rows, 5, dtype=torch.bool)
            hidden[-1, 3:] = True
            yield "5, padded", {main: torch.randn(rows, 5, WIDTH), "src_key_padding_mask": hidden}
        else:
            yield "row", {main: torch.randn(rows, 20)}
        return
    if not hasattr(model, "config"):
        yield "image", {"x": torch.randn(rows, 3, 32, 32)}
        return
    for name, value in natural_inputs(model, family).items():
        yield "example", {name: torch.randn(rows, *value.shape[1:])}
        for factor in (1.5, 2):
            sides = [round(side * factor) for side in value.shape[2:]]
            yield f"example x {factor}", {name: torch.randn(rows, *value.shape[1:2], *sides)}
        if value.dim() == 2:
            for length in (4000, 9001):
                yield f"{length}", {name: torch.randn(rows, length)}


def vocabulary(model: Any) -> int:
    """Return how many ids a model reads."""
    tables = [child.num_embeddings for child in model.modules() if isinstance(child, nn.Embedding)]
    config = getattr(model, "config", None)
    size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    return int(size or tables[0])


def _texts(model: Any, family: str, rows: int, length: int, size: int, draw: torch.Generator) -> dict[str, Any]:
    made = {_main(model): torch.randint(3, size, (rows, length), generator=draw)}
    if family == "seq2seq":
        second = "tgt" if "tgt" in inspect.signature(model.forward).parameters else "decoder_input_ids"
        made[second] = torch.randint(3, size, (rows, max(1, length - 2)), generator=draw)
    return made


def _main(model: Any) -> str:
    return str(getattr(model, "main_input_name", None) or next(iter(inspect.signature(model.forward).parameters)))


def training_batch(model: Any, family: str, grown: int = 0) -> dict[str, Any]:
    """Return a batch to train on; a vocabulary that has grown shows its new ids in it.

    Args:
        model: The model.
        family: As in `Architecture`.
        grown: Ids that are new, at the end of the vocabulary.
    """
    draw = torch.Generator().manual_seed(7)
    if family in ("causal_lm", "masked_lm", "text_classification", "seq2seq"):
        size = vocabulary(model)
        # Some only train at their full length.
        shape = getattr(getattr(model, "config", None), "axial_pos_shape", (16,))
        made = _texts(model, family, 4, math.prod(shape), size, draw)
        for ids in made.values():
            for row in range(min(grown, 4)):
                ids[row, 3] = size - 1 - row
        return made
    torch.manual_seed(8)
    return next(inputs for _, inputs in _others(model, family, 4))


def answer(model: Any, inputs: dict[str, Any], seed: int = 3) -> Tensor:
    """Return the main output of a model of any kind."""
    torch.manual_seed(seed)
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits  # type: ignore[no-any-return]
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


class TorchLanguageModel(nn.Module):
    """nn.TransformerEncoder with a causal mask between an embedding and a head."""

    def __init__(self, post: bool, tied: bool) -> None:
        """Make one with two layers."""
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, batch_first=True, norm_first=not post)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the next tokens."""
        length = input_ids.shape[1]
        hidden = self.tokens(input_ids) + self.places(torch.arange(length, device=input_ids.device))
        future = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        return self.head(self.body(hidden, mask=future))  # type: ignore[no-any-return]


class TorchTranslator(nn.Module):
    """nn.Transformer, encoder and decoder, over one table."""

    def __init__(self, post: bool) -> None:
        """Make one with two layers on each side."""
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.body = nn.Transformer(WIDTH, 4, 2, 2, 64, 0.0, batch_first=True, norm_first=not post)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Return the logits of the decoder's next tokens."""
        length = decoder_input_ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        given, made = (
            self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
            for ids in (input_ids, decoder_input_ids)
        )
        return self.head(self.body(given, made, tgt_mask=future))  # type: ignore[no-any-return]


def _bare_encoder(post: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, batch_first=True, norm_first=not post)
    return nn.TransformerEncoder(layer, 2, None if post else nn.LayerNorm(WIDTH), enable_nested_tensor=False)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5))


class MixerBlock(nn.Module):
    """Mixes across patches, then across features."""

    def __init__(self, patches: int) -> None:
        """Make one."""
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.across = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Linear(24, patches))
        self.within = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.across(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.second(x))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """An MLP-mixer (Tolstikhin et al., arXiv:2105.01601, appendix E)."""

    def __init__(self) -> None:
        """Make one for images of 32 by 32."""
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(MixerBlock(16) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes."""
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]
