"""Any module becomes an adapter with true facts, or an error that says what to do; and it stays as it was."""

import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import AdapterError

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SOUND = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SOUND |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
SOUND |= {"max_source_positions": 30, "max_target_positions": 20, "pad_token_id": 0, "decoder_start_token_id": 1}
WAVE = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
WAVE |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_labels": 3}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
BERT = TINY | {"max_position_embeddings": 32}
VISION = {key: value for key, value in TINY.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4}
TRANSFORMERS = [
    ("GPT2LMHeadModel", "GPT2Config", GPT2, "causal_lm", (2, 5, 50), 32),
    ("GPT2Model", "GPT2Config", GPT2, "embedding", (2, 5, 16), 32),
    ("LlamaForCausalLM", "LlamaConfig", TINY | {"max_position_embeddings": 64}, "causal_lm", (2, 5, 50), 64),
    ("BertForMaskedLM", "BertConfig", BERT, "masked_lm", (2, 5, 50), 32),
    ("BertForPreTraining", "BertConfig", BERT, "masked_lm", (2, 5, 50), 32),
    ("BertForSequenceClassification", "BertConfig", BERT, "text_classification", (2, 2), 32),
    ("BertForTokenClassification", "BertConfig", BERT, "text_classification", (2, 5, 2), 32),
    ("BertModel", "BertConfig", BERT, "embedding", (2, 5, 16), 32),
    # Its config counts the two rows that the position table reserves.
    ("RobertaForMaskedLM", "RobertaConfig", BERT | {"max_position_embeddings": 34}, "masked_lm", (2, 5, 50), 32),
    ("T5ForConditionalGeneration", "T5Config", T5, "seq2seq", (2, 5, 50), None),
    ("MambaForCausalLM", "MambaConfig", TINY | {"state_size": 4}, "causal_lm", (2, 5, 50), None),
    ("CLIPTextModel", "CLIPTextConfig", BERT, "embedding", (2, 5, 16), 32),
    ("ViTForImageClassification", "ViTConfig", VISION | {"num_labels": 7}, "image_classification", (2, 7), None),
    ("ViTModel", "ViTConfig", VISION, "embedding", (2, 17, 16), None),
    (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4},
        "image_classification",
        (2, 4),
        None,
    ),
    ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", TINY | WAVE, "audio_classification", (2, 3), None),
    ("WhisperForConditionalGeneration", "WhisperConfig", SOUND | {"vocab_size": 60}, "seq2seq", (2, 5, 60), None),
]


@pytest.mark.parametrize(("model", "config", "options", "task", "shape", "longest"), TRANSFORMERS)
def test_transformers_models(
    model: str, config: str, options: dict[str, Any], task: str, shape: tuple[int, ...], longest: int | None
) -> None:
    transformers = pytest.importorskip("transformers")
    adapter = ModelAdapter(getattr(transformers, model)(getattr(transformers, config)(**options)))
    assert adapter.failure is None
    logits = adapter.logits(adapter.example_inputs(2, 5))
    assert (adapter.task.value, tuple(logits.shape)) == (task, shape)
    if longest is not None:
        assert adapter.max_length.value == longest
    assert adapter.loss(logits, adapter.random_labels(logits)).isfinite()


@pytest.mark.parametrize(
    ("name", "task", "main"),
    [
        ("gpt", "causal_lm", "input_ids"),
        ("bert", "masked_lm", "input_ids"),
        ("vit", "image_classification", "pixel_values"),
    ],
)
def test_examples(name: str, task: str, main: str) -> None:
    loaded = utils.load_model(f"example:{name}")
    adapter = ModelAdapter(loaded)
    assert (adapter.task.value, adapter.main_input, adapter.failure) == (task, main, None)
    assert adapter.module is loaded.module
    assert adapter.factory is not None
    if name != "vit":
        width = adapter.logits(adapter.example_inputs(3, 7)).shape
        assert tuple(width) == (3, 7, loaded.config["vocab_size"])
    assert all(row["reason"] for row in adapter.describe())


def test_nanogpt_style_needs_targets_for_all_positions(small: Any) -> None:
    adapter = ModelAdapter(small.Nano())
    assert tuple(adapter.logits(adapter.example_inputs(3, 5)).shape) == (3, 5, 30)
    assert (adapter.task.value, adapter.vocab_size.value, adapter.max_length.value) == ("causal_lm", 30, 16)
    assert adapter.max_length.reason == "rows of the position embedding `wpe`"
    assert adapter.vocab_size.reason == "rows of the embedding `wte` that reads the token ids and the output is as wide"
    assert adapter.num_parameters == 30 * 8 + 16 * 8


def test_recurrent_language_model_is_causal_by_what_it_does(small: Any) -> None:
    adapter = ModelAdapter(small.RecurrentLM())
    assert adapter.name == "LSTMLM"
    assert adapter.task.value == "causal_lm"
    assert "earlier positions do not see the last token" in adapter.task.reason


def test_two_vocabularies(small: Any) -> None:
    adapter = ModelAdapter(small.Translator())
    inputs = adapter.example_inputs(50, 9)
    assert (adapter.input_names, adapter.task.value, adapter.vocab_size.value) == (("src", "tgt"), "seq2seq", 60)
    assert int(inputs["src"].max()) >= 40 > int(inputs["tgt"].max())


@pytest.mark.parametrize(
    ("model", "task", "shape", "labels"),
    [
        (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), "tabular_classification", (2, 5), 3),
        (nn.Sequential(nn.Linear(5, 1)), "regression", (2, 5), 1),
        (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), "regression", (2, 5), 1),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)),
            "tabular_classification",
            (2, 2, 64),
            3,
        ),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 98, 3)),
            "tabular_classification",
            (2, 2, 100),
            3,
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)),
            "image_classification",
            (2, 1, 28, 28),
            10,
        ),
        (nn.LSTM(5, 8, batch_first=True), "embedding", (2, 12, 5), 8),
        (nn.Sequential(nn.Linear(5, 3)).double(), "tabular_classification", (2, 5), 3),
        (nn.Sequential(nn.Linear(5, 3)).bfloat16(), "tabular_classification", (2, 5), 3),
    ],
)
def test_plain_modules(model: nn.Module, task: str, shape: tuple[int, ...], labels: int) -> None:
    adapter = ModelAdapter(model)
    inputs = adapter.example_inputs()
    assert (adapter.task.value, tuple(inputs[adapter.main_input].shape)) == (task, shape)
    assert adapter.num_labels.value == labels
    logits = adapter.logits(inputs)
    assert adapter.loss(logits, adapter.random_labels(logits)).isfinite()


def test_a_module_without_parameters() -> None:
    adapter = ModelAdapter(nn.Identity())
    assert (adapter.failure, adapter.num_parameters, adapter.device) == (None, 0, torch.device("cpu"))


def test_low_precision_and_frozen(small: Any) -> None:
    model = small.Nano().bfloat16().requires_grad_(False)
    adapter = ModelAdapter(model)
    logits = adapter.logits(adapter.example_inputs(2, 4))
    assert logits.dtype == torch.bfloat16
    assert adapter.loss(logits, adapter.random_labels(logits)).dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Compiled(nn.Module):
    """Holds the original as what torch.compile returns does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, *args: Any) -> Any:
        raise RuntimeError("this would compile")


def test_wrappers_are_taken_off_without_compiling(small: Any) -> None:
    model = small.Nano()
    adapter = ModelAdapter(nn.DataParallel(Compiled(model)))
    assert adapter.module is model
    assert adapter.vocab_size.value == 30


def test_lora(small: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapter = ModelAdapter(peft.get_peft_model(small.Scorer(), peft.LoraConfig(target_modules=["head"])))
    assert (adapter.failure, adapter.vocab_size.value) == (None, 30)


def test_another_adapter_and_any_source(small: Any) -> None:
    first = ModelAdapter(small.Scorer(), spec=ModelSpec(task="masked_lm"))
    assert ModelAdapter(first).spec is first.spec
    source = SimpleNamespace(module=first.module, config={"vocab_size": 20}, factory=small.Scorer)
    second = ModelAdapter(source, {"max_seq_len": 9})
    assert (second.vocab_size.value, second.max_length.value, second.factory) == (20, 9, small.Scorer)


def test_a_config_that_promises_more_tokens_than_there_are(small: Any) -> None:
    for width in (64, 1000):
        adapter = ModelAdapter(small.Scorer(), {"vocab_size": width})
        assert (adapter.failure, adapter.vocab_size.value, adapter.task.value) == (None, width, "causal_lm")
        assert int(adapter.example_inputs(50)["input_ids"].max()) == 29


def test_ids_that_no_embedding_reads_and_the_config_overstates() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, 9))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.weight[input_ids]

    failure = ModelAdapter(Table(), {"vocab_size": 900}).failure
    assert failure is not None
    assert failure.startswith("Table runs, but not with token ids below 900: IndexError")
    assert "pass ModelSpec(vocab_size=...)" in failure


def test_stated_facts_win(small: Any) -> None:
    spec = ModelSpec(task="masked_lm", vocab_size=10, max_length=9, num_labels=3, pad_token_id=0)
    adapter = ModelAdapter(small.Scorer(), {"vocab_size": 30, "pad_token_id": 4}, spec)
    facts = {row["name"]: row for row in adapter.describe()}
    for name, value in {"task": "masked_lm", "vocab_size": 10, "max_length": 9, "num_labels": 3}.items():
        assert (facts[name]["value"], facts[name]["reason"]) == (value, "stated in ModelSpec")
    ids = adapter.example_inputs(50)["input_ids"]
    assert (int(ids.min()), int(ids.max())) == (1, 9)


def test_inputs_are_the_same_for_the_same_seed(small: Any) -> None:
    adapter = ModelAdapter(small.Scorer())
    first, again, other = (adapter.example_inputs(3, 8, seed)["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_comes_back_as_it_was(raises: bool) -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls, self.cache = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0, [1]
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.cache.append(2)
            self.count += 1
            self.late = torch.rand(1)
            if raises:
                raise RuntimeError("deliberate")
            return self.body(x + random.random() + np.random.rand() + torch.rand(1))

    model = Restless().train()
    model.body[1].eval()
    model(torch.rand(3, 4)).sum().backward() if not raises else None
    model.calls = 7
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [parameter.grad for parameter in model.parameters()]
    modes, names, cache = [m.training for m in model.modules()], set(vars(model)), list(model.cache)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    adapter = ModelAdapter(model)
    adapter.describe()
    assert (adapter.failure is not None) == raises
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(now.grad is before for now, before in zip(model.parameters(), grads, strict=True))
    assert ([m.training for m in model.modules()], set(vars(model)), model.cache, model.calls) == (
        modes,
        names,
        cache,
        7,
    )
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]
    assert torch.is_grad_enabled()


def test_not_a_module(small: Any) -> None:
    with pytest.raises(AdapterError, match=r"A type was given where a model was expected\..*create an instance first"):
        ModelAdapter(small.Scorer)
    with pytest.raises(AdapterError, match=r"A str was given.*for a link or a path, call utils\.load_model"):
        ModelAdapter("gpt2")
    with pytest.raises(AdapterError, match=r"A ModelSpec was given as the config\..*spec="):
        ModelAdapter(nn.Linear(2, 2), ModelSpec(task="tabular_classification"))
    with pytest.raises(AdapterError, match=r"A str was given as the config\..*json\.load"):
        ModelAdapter(small.Scorer(), "config.json")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_lazy_and_scripted() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"input": torch.ones(2, 8)}))
    assert adapter.lazy == ("0.weight", "0.bias") and adapter.module is not model
    assert adapter.module[0].weight.shape == (3, 8) and is_lazy(model[0].weight)
    with pytest.raises(AdapterError, match=r"weight has no shape yet \(a lazy module\).*one forward pass"):
        ModelAdapter(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 4), nn.LazyLinear(3)))
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(AdapterError, match=r"A TorchScript module .* was given.*before torch\.jit\.script"):
        ModelAdapter(traced)


def test_an_output_that_changes_its_structure() -> None:
    class Unstable(nn.Embedding):
        def forward(self, input: Tensor) -> Any:
            hidden = super().forward(input)
            return {"logits": hidden} if len(input) == 2 else hidden

    adapter = ModelAdapter(Unstable(9, 4))
    with pytest.raises(AdapterError, match=r"returned a tensor\. Expected its logits at `logits`.*same structure"):
        adapter.logits(adapter.example_inputs(3))
    assert adapter.max_length.reason == "not found by trying: 12 tokens do not run with a batch of one"


def test_a_failure_lists_what_was_tried() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(9, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            raise RuntimeError("deliberate\nsecond line")

    adapter = ModelAdapter(Broken())
    assert adapter.failure is not None
    assert adapter.failure.startswith("No forward pass of Broken succeeded (")
    assert "token ids (2, 12): RuntimeError: deliberate." in adapter.failure
    assert "pass ModelSpec(example_inputs={'input_ids': ...})" in adapter.failure
    assert (adapter.modality, adapter.task.value) == ("tokens", "causal_lm")
    assert adapter.task.reason == "assumed for token ids, because no forward pass succeeded"
    assert adapter.describe()[0]["reason"] == "the likeliest kind of `input_ids`, but no forward pass succeeded"
    with pytest.raises(AdapterError, match="No forward pass of Broken succeeded"):
        adapter.logits(adapter.example_inputs())


def test_tiny_models_are_quick(small: Any) -> None:
    ModelAdapter(small.Nano())
    model = small.Nano()
    started = time.perf_counter()
    ModelAdapter(model)
    assert time.perf_counter() - started < 0.5


def test_the_text_of_an_adapter_is_one_line(small: Any) -> None:
    text = repr(ModelAdapter(small.Nano()))
    assert text.startswith("ModelAdapter(Nano, causal_lm, ") and "inputs idx" in text and "\n" not in text
    examples = {"input1": torch.ones(2, 9), "input2": torch.ones(2, 9)}
    unknown = ModelAdapter(nn.Bilinear(3, 4, 5), spec=ModelSpec(example_inputs=examples))
    assert "no forward pass succeeded" in str(unknown)
