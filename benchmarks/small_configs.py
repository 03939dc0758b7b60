"""Any architecture of transformers, small: its default config with every size brought down, by rules on the keys.

The rules know kinds of settings (widths, heads, layers, tables), not models. Several strategies are tried from the
smallest on; the first whose model is below `LARGEST` parameters and can be built is taken.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 6_000_000
WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 4, 2, 99, 128, 32, 8
Rule = tuple[re.Pattern[str], Callable[[Any], Any]]


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _rule(pattern: str, change: Callable[[Any], Any] | int) -> Rule:
    return re.compile(pattern), change if callable(change) else _at_most(change)


RULES: tuple[Rule, ...] = (
    _rule(r"^(vocab_size|vocabulary_size|n_vocab|text_vocab_size|vocab_size_per_layer_input)$", VOCABULARY),
    _rule(
        r"(?<!no_)(pad|bos|eos|sep|cls|unk|mask|boa|eoa|boi|eoi|start|end|image|video|audio|decoder_start|forced_\w+|"
        r"vision_\w+|index|\w+)_token_(id|index)$",
        lambda value: value if value < VOCABULARY else VOCABULARY - 2,
    ),
    _rule(r"(num_key_value_heads|num_kv_heads|n_head_kv|num_key_value_groups|multi_query_group_num)$", 2),
    _rule(r"(num_attention_heads|attention_heads|num_heads|n_heads?|n_kv_head|nhead|_heads)$", HEADS),
    _rule(r"^qk_head_dim$", 16),
    _rule(
        r"(head_dim|d_kv|head_size|attention_head_size|attention_key_size|key_length)$",
        8,
    ),
    _rule(r"(rotary_dim)$", 4),
    _rule(r"(lora_rank)$", 8),
    _rule(r"^window_size$", 4),
    _rule(r"^attention_window$", 16),
    _rule(r"(hidden_layers|_layers|^n_layers?|^num_layers|_num_layers|^depth|num_blocks|num_hidden_groups)$", LAYERS),
    _rule(r"(num_experts_per_tok(en)?|experts_per_token|top_k|moe_topk|num_selected_experts|moe_k|topk_group)$", 2),
    _rule(r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_expert)$", 4),
    _rule(r"(n_group|num_expert_group)$", 2),
    _rule(r"(intermediate|ffn_dim|ffn_hidden_size|d_ff|n_inner|ffn_size|feedforward|mlp_dim|d_inner|inner_size)", 64),
    _rule(
        r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_target_positions|max_len|model_max_length)$",
        POSITIONS,
    ),
    _rule(r"^(image_size|img_size|input_size|crop_size)$", IMAGE),
    _rule(r"^(patch_size)$", PATCH),
    _rule(
        r"(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim|^dim|emb_dim|lru_width|_dim|"
        r"_width|attention_size|projection_size|output_size|_hidden)$",
        WIDTH,
    ),
    _rule(r"^(state_size|ssm_state_size|mamba_d_state)$", 8),
)
"""Which settings become how large; the first pattern that occurs in a key decides."""


PARTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"max_position_embeddings": POSITIONS},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": {"image_size": 64, "window_size": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4": {"text_config": {"per_layer_config": None}},
    "gemma4_assistant": {"text_config": {"per_layer_config": None, "hidden_size_per_layer_input": 0}},
    "gemma4_unified": {"text_config": {"per_layer_config": None}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "hgnet_v2": {
        "stem_channels": [3, 16, 24],
        "stage_in_channels": [24, 32, 64, 96],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [32, 64, 96, 128],
        "hidden_sizes": [32, 64, 96, 128],
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "kimi_linear": {"max_position_embeddings": POSITIONS},
    "levit": {"image_size": 64, "patch_size": 16},
    "longcat_flash": {"zero_expert_num": 2},
    "luke": {"entity_vocab_size": 50},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mobilevitv2": {"image_size": 64},
    "musicgen_decoder": {"pad_token_id": 97},
    "neomme": {"head_dim": 16, "hidden_size": 64, "per_layer_config": None},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 1,
        "max_position_embeddings": 64,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
        "image_size": 32,
        "train_size": [16, 16],
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "textnet": {"stem_num_channels": 3, "stem_out_channels": 16, "image_size": [64, 64]},
    "swin": {"image_size": 64, "window_size": 2},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
"""Settings that hang together in a way the rules cannot know, by model type; for building only."""


def _list(key: str, values: list[Any], depth: int) -> list[Any]:
    """Shrink the settings of several stages."""
    if key == "attention_window":
        return [min(value, 16) for value in values]
    if key == "depths" or key.endswith("_depths"):
        return [min(value, 1) for value in values]
    if re.search(r"heads$|^num_heads", key):
        return [min(value, 2) for value in values]
    if re.search(r"(hidden_sizes|dims?|channels|widths|embed_dims)$", key) and all(isinstance(v, int) for v in values):
        factor = max(1, min(values) // 16)
        return [max(16, value // factor // 8 * 8) for value in values]
    return values


def shrunk(settings: Mapping[str, Any], lists: bool = True, widths: bool = True) -> dict[str, Any]:
    """Bring every size in a config's settings down.

    Args:
        settings: Nested settings.
        lists: Also the settings of several stages.
        widths: Also the widths; without them only tables and layers shrink.
    """
    kinds = settings.get("layer_types") or settings.get("layers_block_type") or ()
    depth = max(LAYERS, len(dict.fromkeys(kinds)))
    full = settings.get("num_hidden_layers")
    heads = settings.get("num_attention_heads")
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            small[key] = _rope(value) if "rope" in key else shrunk(value, lists, widths)
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            small[key] = _layer_kinds(value, depth)
        elif isinstance(value, (list, tuple)) and len(value) == full:
            small[key] = [_size(key, v, depth, widths) if type(v) is int and v > 0 else v for v in value[:depth]]
        elif key == "num_key_value_heads" and value == heads:
            small[key] = small["num_attention_heads"] = _size("num_attention_heads", value, depth, widths)
        elif isinstance(value, (list, tuple)) and lists and value:
            small[key] = _list(key, list(value), depth)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small[key] = _size(key, value, depth, widths)
        elif value is None and key == "head_dim":
            small[key] = 8
        else:
            small[key] = value
    return small


def _layer_kinds(kinds: list[Any], depth: int) -> list[Any]:
    """Keep one layer of each kind."""
    return (list(dict.fromkeys(kinds)) + kinds[-1:] * depth)[:depth]


def _size(key: str, value: int, depth: int, widths: bool) -> int:
    for pattern, change in RULES:
        if pattern.search(key):
            if not widths and change(value) in (WIDTH, HEADS, 8, 64):
                return value
            return min(value, depth) if "hidden_layers" in key else change(value)
    return value


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fit the sections of multimodal rotary positions to heads of width 8."""
    small = {key: _rope(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    if isinstance(small.get("mrope_section"), (list, tuple)):
        small["mrope_section"] = [2, 1, 1] if len(small["mrope_section"]) == 3 else [2, 2]
    return small


def strategies(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield settings to try, the smallest first."""
    yield shrunk(settings)
    yield shrunk(settings, lists=False)
    yield shrunk(settings, widths=False)
    yield shrunk(settings, lists=False, widths=False)
    yield settings


def _with_parts(settings: dict[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Put a family's own settings over the shrunk ones; None leaves one to its default."""
    merged = {key: value for key, value in settings.items() if not (key in parts and parts[key] is None)}
    for key, value in parts.items():
        if value is not None:
            nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = _with_parts(merged[key], value) if nested else value
    return merged


def small_model(model_type: str, name: str, decoder: bool = False) -> nn.Module:
    """Build a class of transformers small.

    Args:
        model_type: Its key in the mappings of transformers.
        name: The class.
        decoder: It is meant as a decoder; encoders with a head for language models have to be told.

    Raises:
        RuntimeError: No strategy gave a model that can be built.
    """
    import transformers

    model_class: Any = getattr(transformers, name)
    config_class = model_class.config_class or transformers.AutoConfig.for_model(model_type).__class__
    default = config_class()
    known = set(inspect.signature(config_class.__init__).parameters)
    derived = {"transformers_version", "model_type", "_name_or_path", "architectures", "dtype", "label2id", "id2label"}
    settings = {key: value for key, value in default.to_dict().items() if key in known - derived}
    if decoder and "is_decoder" in settings:
        settings["is_decoder"] = True
    problems = []
    for candidate in strategies(settings):
        candidate = _with_parts(candidate, PARTS.get(default.model_type, {}))
        try:
            config = config_class(**copy.deepcopy(candidate))
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if size > LARGEST:
                problems.append(f"{size} parameters")
                continue
            torch.manual_seed(0)
            model = model_class(config)
            model.eval()
        except Exception as error:
            problems.append(f"{type(error).__name__}: {str(error)[:120]}")
            continue
        return model
    raise RuntimeError(" | ".join(dict.fromkeys(problems)))


def _channels(config: Any) -> int:
    """Return the colours of an image; some configs count the first layer's channels under that name."""
    count = getattr(config, "num_channels", 3)
    return count if isinstance(count, int) and count <= 4 else 3


def natural_inputs(model: nn.Module, family: str) -> dict[str, Tensor]:
    """Return inputs as a user of the library would make them.

    Args:
        model: A model of transformers.
        family: Its family, as in `benchmarks.architectures.FAMILIES`.
    """
    any_model: Any = model
    config, main = any_model.config, any_model.main_input_name
    names = inspect.signature(model.forward).parameters
    text = config.get_text_config()
    table = getattr(text, "vocab_size", VOCABULARY)
    if family == "image_classification" and "pixel_values" in names:
        main = "pixel_values"
        size = next(
            (
                found
                for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None))
                if (found := getattr(part, "image_size", None))
            ),
            64,
        )
        sides = tuple(size[-2:]) if isinstance(size, (list, tuple)) else (size, size)
        return {main: torch.randn(2, _channels(config), *sides)}
    if main in ("input_values", "input_features"):
        if main == "input_values" and not hasattr(config, "num_mel_bins"):
            inputs = {main: torch.randn(2, 16000)}
        else:
            frames = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else 128
            frames = getattr(config, "max_length", frames) if main == "input_values" else frames
            bins = getattr(config, "num_mel_bins", None)
            if bins is None:
                return {main: torch.randn(2, frames, config.feature_projection_input_dim)}
            inputs = {main: torch.randn(2, frames, bins) if main == "input_values" else torch.randn(2, bins, frames)}
    else:
        shape = (2, 4, 16) if family == "multiple_choice" else (2, 16)
        inputs = {"input_ids": torch.randint(3, min(table, VOCABULARY), shape)}
    if family == "seq2seq" and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(3, min(table, VOCABULARY), (2, 12))
    return inputs
