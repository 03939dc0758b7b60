"""Facts read off configs, signatures and names."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.detection import (
    bidirectional_setting,
    config_dict,
    config_number,
    encoder_sign,
    forward_signature,
    kind_by_name,
    language_task_hint,
)
from utils.runtime.errors import AdapterError


@dataclass
class Settings:
    n_vocab: int = 7


@pytest.mark.parametrize(
    "source", [{"n_vocab": 7}, Settings(), SimpleNamespace(n_vocab=7, _hidden=1), SimpleNamespace(to_dict=Settings)]
)
def test_configs_of_any_form(source: Any) -> None:
    if callable(getattr(source, "to_dict", None)):
        source.to_dict = lambda: {"n_vocab": 7}
    assert config_dict(source) == {"n_vocab": 7}
    found = config_number(config_dict(source), "vocab_size")
    assert found is not None
    assert (found.value, found.reason) == (7, "`n_vocab` in the config")


def test_config_numbers_must_be_whole_and_may_be_nested() -> None:
    assert config_dict(None) == config_dict("text") == {}
    for value in (0, True, "50", None, 2.5):
        assert config_number({"vocab_size": value}, "vocab_size") is None
    found = config_number({"text_config": {"vocab_size": 9}}, "vocab_size")
    assert found is not None
    assert found.reason == "`text_config.vocab_size` in the config"


def test_signatures() -> None:
    class Named(nn.Module):
        def forward(self, a: Tensor, /, b: Tensor, c: Any = None, *rest: Any, **more: Any) -> Tensor:
            return a

    class Free(nn.Module):
        def forward(self, *args: Any) -> Tensor:
            return args[0]

    named, free = forward_signature(Named()), forward_signature(Free())
    assert (named.required, named.optional, named.positional, named.keywords) == (("a", "b"), ("c",), True, True)
    assert (free.names, free.positional, free.keywords) == ((), True, False)


def test_names_are_hints() -> None:
    assert [kind_by_name(n) for n in ("idx", "pixel_values", "input_values", "mel", "x")] == [
        "tokens",
        "image",
        "wave",
        "frames",
        None,
    ]
    hints = {}
    for name in ("LSTMLM", "TinyMLM", "MyGPT", "Thing"):
        hint = language_task_hint(type(name, (nn.Module,), {})(), {}, ())
        hints[name] = hint.value if hint else None
    assert hints == {"LSTMLM": None, "TinyMLM": "masked_lm", "MyGPT": "causal_lm", "Thing": None}
    stated = language_task_hint(nn.Identity(), {"is_causal": False}, ())
    assert stated is not None
    assert stated.value == "masked_lm"


class Demanding(nn.Module):
    def forward(self, input_ids: Tensor, graph: Tensor, adj: Tensor) -> Tensor:
        return input_ids


class Keywords(nn.Module):
    def forward(self, **arguments: Tensor) -> Tensor:
        return next(iter(arguments.values()))


class Nothing(nn.Module):
    def forward(self) -> None:
        return None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Demanding(),
            r"Demanding requires graph, adj beside input_ids\..*example_inputs=\{'input_ids': \.\.\., ",
        ),
        (Keywords(), r"Keywords takes \*\*kwargs and names no argument\..*ModelSpec\(example_inputs="),
        (Nothing(), r"Nothing takes no arguments\. Expected at least one tensor, batch first"),
    ],
)
def test_arguments_that_cannot_be_guessed(model: nn.Module, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        ModelAdapter(model)


def test_only_positional_arguments_and_required_labels() -> None:
    class Positional(nn.Embedding):
        def forward(self, x: Tensor, /) -> Tensor:
            return super().forward(x)

    class Args(nn.Embedding):
        def forward(self, *args: Tensor) -> Tensor:
            return super().forward(args[0])

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(40, 8), nn.Linear(8, 3)

        def forward(self, labels: Tensor, input_ids: Tensor) -> Any:
            logits = self.head(self.emb(input_ids).mean(1))
            return nn.functional.cross_entropy(logits, labels), logits

    for model in (Positional(40, 8), Args(40, 8)):
        adapter = ModelAdapter(model)
        assert tuple(adapter.logits(adapter.example_inputs(3, 5)).shape) == (3, 5, 8)
    adapter = ModelAdapter(Labelled())
    assert (adapter.main_input, adapter.task.value) == ("input_ids", "text_classification")
    assert tuple(adapter.logits(adapter.example_inputs(4, 5)).shape) == (4, 3)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("MaskedLanguageModel", "masked_lm"),
        ("BidirectionalLanguageModel", "masked_lm"),
        ("ProteinMLMHead", "masked_lm"),
        ("TinyMlm", "masked_lm"),
        ("MLMv2", "masked_lm"),
        ("mlm_model", "masked_lm"),
        ("TransformLM", None),
        ("SSMLM", None),
        ("MLModel", None),
        ("MaskedLMHead", "masked_lm"),
        ("TextEncoder", "masked_lm"),
        ("LanguageModel", "causal_lm"),
        ("CausalLanguageModel", "causal_lm"),
        ("MaskedCausalAttentionLM", "causal_lm"),
        ("TransformerDecoder", "causal_lm"),
        ("MaskedDecoder", "causal_lm"),
        ("TextEncoderDecoder", None),
        ("CustomTransformer", None),
    ],
)
def test_masked_names_come_before_language_model(name: str, task: str | None) -> None:
    hint = language_task_hint(type(name, (nn.Module,), {})(), {}, ())
    assert (hint.value if hint else None) == task


def test_signs_of_an_encoder() -> None:
    assert encoder_sign(nn.Identity(), {"mask_token_id": 4}) == "`mask_token_id` in the config"
    assert encoder_sign(nn.Identity(), {"mask_token_id": None}) is None
    signs = [encoder_sign(type(name, (nn.Module,), {})(), {}) for name in ("SSMLM", "TransformLM", "LSTMLM", "MLModel")]
    assert signs == ["the model's name (SSMLM)", None, None, None]
    assert encoder_sign(nn.Identity(), {"model_name": "ProteinNet"}) == "the model's name (Identity)"


def test_a_task_that_is_only_assumed() -> None:
    class Model(nn.Module):
        def __init__(self, sees_all: bool) -> None:
            super().__init__()
            self.emb, self.head, self.sees_all = nn.Embedding(30, 8), nn.Linear(8, 30), sees_all

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.emb(input_ids)
            return self.head(hidden + hidden.mean(1, keepdim=True) if self.sees_all else hidden)

    assumed, known = ModelAdapter(Model(True)), ModelAdapter(Model(False))
    assert (assumed.task.value, assumed.task_assumed) == ("causal_lm", True)
    assert (known.task.value, known.task_assumed) == ("causal_lm", False)
    assert not ModelAdapter(Model(True), spec=ModelSpec(task="causal_lm")).task_assumed


def test_a_config_that_refuses_to_be_read_in_one_way() -> None:
    @dataclass
    class Layered:
        n_vocab: int = 7
        per_layer: int = 3

        def __getattribute__(self, name: str) -> Any:
            if name == "per_layer":
                raise RuntimeError("differs by layer")
            return super().__getattribute__(name)

        def to_dict(self) -> dict[str, int]:
            return {"n_vocab": self.n_vocab}

    assert config_dict(Layered()) == {"n_vocab": 7}


class Table(nn.Module):
    """A table of positions of one's own; the first rows are reserved."""

    def __init__(self, rows: int, reserved: int, by_shape: bool) -> None:
        super().__init__()
        self.weight, self.padding_idx, self.by_shape = nn.Parameter(torch.randn(rows, 8)), reserved - 1, by_shape

    def forward(self, ids: Any) -> Any:
        length = ids[1] if self.by_shape else ids.shape[1]
        positions = torch.arange(length) + self.padding_idx + 1
        return self.weight[positions][None], positions


@pytest.mark.parametrize("by_shape", [False, True])
def test_reserved_rows_of_a_table_that_is_no_embedding(by_shape: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok, self.pos = nn.Embedding(30, 8), Table(40, 2, by_shape)
            self.head = nn.Linear(8, 30)

        def forward(self, input_ids: Tensor) -> Tensor:
            asked = tuple(input_ids.shape) if by_shape else torch.arange(input_ids.shape[1])[None] + 2
            return self.head(self.tok(input_ids) + self.pos(asked)[0])

    adapter = ModelAdapter(Model(), {"max_position_embeddings": 40})
    assert adapter.max_length.value == 38
    assert adapter.max_length.reason.endswith("less the 2 first rows of `pos`")


class Windowed(nn.Module):
    """Fills its input up to a multiple of 16 itself; the position of what it adds is the padding's."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(30, 8, padding_idx=1), nn.Embedding(40, 8, padding_idx=1)
        self.head = nn.Linear(8, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        padded = nn.functional.pad(input_ids, (0, -length % 16), value=1)
        real = padded.ne(1).long()
        return self.head(self.tok(padded) + self.pos(real.cumsum(1) * real + 1))[:, :length]


def test_reserved_rows_behind_padding_of_its_own() -> None:
    adapter = ModelAdapter(Windowed(), {"max_position_embeddings": 40, "pad_token_id": 1})
    assert adapter.max_length.value == 38
    assert adapter.max_length.reason.endswith("less the 2 first rows of `pos`")


class BidirectionalLMHeadModel(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.emb, self.head, self.config = nn.Embedding(30, 8), nn.Linear(8, 30), config

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.emb(input_ids)
        return self.head(hidden + hidden.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({}, "causal_lm"),
        ({"is_decoder": True}, "causal_lm"),
        ({"is_decoder": False}, "masked_lm"),
        ({"causal": False}, "masked_lm"),
        ({"prompt_length": 4}, "masked_lm"),
        ({"attn_type": "bi"}, "masked_lm"),
    ],
)
def test_a_causal_name_over_an_encoder(config: dict[str, Any], task: str) -> None:
    detected = ModelAdapter(BidirectionalLMHeadModel(config)).task
    assert detected.value == task
    if task == "masked_lm":
        assert "earlier positions see the last token, whatever the class name" in detected.reason


def test_settings_that_allow_later_tokens() -> None:
    assert bidirectional_setting({"is_decoder": False}) == "`is_decoder` is false in the config"
    assert bidirectional_setting({"is_decoder": True, "prefix_lm": False, "prompt_length": 0}) is None


def test_a_generator_with_one_sequence_is_no_seq2seq_model() -> None:
    class SightedForConditionalGeneration(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)

        def forward(self, input_ids: Tensor, pixel_values: Any = None) -> Tensor:
            return self.head(self.emb(input_ids))

    assert ModelAdapter(SightedForConditionalGeneration()).task.value == "causal_lm"


def test_a_table_that_is_read_ahead() -> None:
    class Ahead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok, self.pos, self.head = nn.Embedding(30, 8), Table(40, 2, False), nn.Linear(8, 30)

        def forward(self, input_ids: Tensor) -> Tensor:
            positions = torch.arange(input_ids.shape[1])[None] + 2
            return self.head(self.tok(input_ids) + self.pos(positions)[0] + self.pos.weight[positions + 1])

    found = ModelAdapter(Ahead(), {"max_position_embeddings": 40}).max_length
    assert (found.value, found.reason[-17:]) == (37, " and 1 read ahead")


def test_as_many_answers_as_the_longest_text_has_tokens() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.queries = nn.Embedding(30, 8), nn.Parameter(torch.randn(20, 8))
            self.head = nn.Linear(8, 30)

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.emb(input_ids)
            return self.head((self.queries @ hidden.mT).softmax(-1) @ hidden)

    adapter = ModelAdapter(Queries(), {"max_position_embeddings": 20})
    assert (str(adapter.lengths.value), adapter.legal_length(7)) == ("20 only", 20)
    assert adapter.lengths.reason == "the output has 20 positions, however long the input is"
    assert tuple(adapter.example_inputs()["input_ids"].shape) == (2, 20)


def test_a_module_without_parameters_has_nothing_to_train() -> None:
    assert "nothing to train" in ModelAdapter(nn.ReLU()).task.reason
    assert "nothing to train" not in ModelAdapter(nn.Linear(4, 4)).task.reason
