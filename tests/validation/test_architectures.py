"""Architectures chosen to differ go through Tier 1 without a crash or a `fail`, and are taken for what they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.tier1_critical_validation import validate

TRANSFORMERS = [
    ("causal_lm", "gpt2", "GPT2LMHeadModel"),
    ("causal_lm", "bloom", "BloomForCausalLM"),
    ("causal_lm", "mamba", "MambaForCausalLM"),
    ("causal_lm", "mixtral", "MixtralForCausalLM"),
    ("causal_lm", "gpt_neo", "GPTNeoForCausalLM"),
    ("masked_lm", "bert", "BertForMaskedLM"),
    ("masked_lm", "roberta", "RobertaForMaskedLM"),
    ("masked_lm", "fnet", "FNetForMaskedLM"),
    ("seq2seq", "t5", "T5ForConditionalGeneration"),
    ("seq2seq", "whisper", "WhisperForConditionalGeneration"),
    ("image_classification", "vit", "ViTForImageClassification"),
    ("image_classification", "resnet", "ResNetForImageClassification"),
    ("image_classification", "swin", "SwinForImageClassification"),
    ("audio_classification", "wav2vec2", "Wav2Vec2ForSequenceClassification"),
]


QUICK = ("gpt2", "mamba", "fnet", "t5", "resnet", "wav2vec2")
"""One of each family; the others are slow together."""
MARKED = [pytest.param(*kind, marks=[] if kind[1] in QUICK else [pytest.mark.slow]) for kind in TRANSFORMERS]


@pytest.mark.parametrize(("family", "kind", "name"), MARKED)
def test_transformers(family: str, kind: str, name: str) -> None:
    pytest.importorskip("transformers")
    from benchmarks.architectures import build

    try:
        model = build((family, kind, name))
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this version of transformers cannot build it: {error}")
    expect_sound(model, family)


def expect_sound(model: nn.Module, task: str) -> None:
    """Hold a model to the promises for every sound one."""
    adapter = ModelAdapter(model)
    assert adapter.failure is None
    report = validate(adapter, progress=False)
    assert [(f.code, f.where) for r in report.results for f in r.findings if f.severity == "fail"] == []
    assert [result.why for result in report.results if result.could_not_run] == []
    assert report.task == task


class Recurrent(nn.Module):
    """Tokens through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn, self.head = nn.Embedding(50, 16), nn.LSTM(16, 16, 2, batch_first=True), nn.Linear(16, 50)

    def forward(self, input: Tensor, hidden: Any = None) -> Any:
        states, hidden = self.rnn(self.tok(input), hidden)
        return self.head(states), hidden


class StateSpace(nn.Module):
    """A diagonal linear recurrence, computed as a convolution by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.decay = nn.Embedding(50, 16), nn.Parameter(torch.linspace(-1, 2, 16))
        self.enter, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 50)

    def forward(self, x: Tensor) -> Tensor:
        hidden, length = self.tok(x), x.shape[1]
        kernel = torch.sigmoid(self.decay) ** torch.arange(length, device=x.device)[:, None]
        signal = torch.fft.rfft(self.enter(hidden), 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
        mixed = torch.fft.irfft(signal, 2 * length, dim=1)[:, :length]
        return self.head(self.norm(mixed + hidden))


class Convolution(nn.Module):
    """Tokens through a causal convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.conv, self.head = nn.Embedding(50, 16), nn.Conv1d(16, 16, 3), nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.tok(ids)
        mixed = self.conv(nn.functional.pad(hidden.transpose(1, 2), (2, 0))).transpose(1, 2)
        return {"logits": self.head(hidden + mixed.relu())}


class Mixer(nn.Module):
    """Images as patches that are mixed along both axes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16)
        self.positions, self.channels, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 7)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch(img).flatten(2).transpose(1, 2)
        x = x + self.positions(self.norm(x).transpose(1, 2)).transpose(1, 2).relu()
        return self.head((x + self.channels(self.norm(x)).relu()).mean(1))


class Frames(nn.Module):
    """Spectrogram frames through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rnn, self.head = nn.Linear(40, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return (self.head(self.rnn(self.enter(features).relu())[0].mean(1)),)


class Categories(nn.Module):
    """A table of numbers and categories."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(5, 3), nn.Embedding(7, 3)])
        self.body = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        return self.body(torch.cat([x_num, *(table(x_cat[:, i]) for i, table in enumerate(self.tables))], dim=1))


PLAIN: list[tuple[Any, str]] = [
    (Recurrent, "causal_lm"),
    (StateSpace, "causal_lm"),
    (Convolution, "causal_lm"),
    (Mixer, "image_classification"),
    (Frames, "audio_classification"),
    (Categories, "tabular_classification"),
    (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), "tabular_classification"),
    (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)), "regression"),
]


@pytest.mark.parametrize(("make", "task"), PLAIN)
def test_plain_modules(make: Any, task: str) -> None:
    torch.manual_seed(0)
    expect_sound(make(), task)
