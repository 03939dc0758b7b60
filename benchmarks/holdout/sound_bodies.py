"""The sound bodies themselves, with no more said of them than a user would say."""

from __future__ import annotations

from torch import nn

from benchmarks.holdout.bodies_pictures import (
    Capsules,
    Denoiser,
    Generator,
    Mixer,
    Mobile,
    ResNet,
    Spectrogram,
    Unet,
    Vit,
)
from benchmarks.holdout.bodies_readers import Fnet, GruReader, HandReader, MaskedReader, MhaReader, Perceiver
from benchmarks.holdout.bodies_tables import (
    DeepFm,
    Experts,
    FeatureTokens,
    Forecaster,
    GraphNet,
    StateSpace,
    Tabular,
    TwoTower,
)
from benchmarks.holdout.bodies_text import EinsumGpt, FusedGpt, LabelLm, RetNet, Translator, WaveLm
from benchmarks.holdout.samples import ids, mask, noise
from benchmarks.zoo.entry import sound

MASKED = {"input_ids": ids(4, 12), "attention_mask": mask(4, 12)}
NODES = {"nodes": noise(3, 6, 7), "adjacency": noise(3, 6, 6).abs()}
CLICKS = {"user_id": ids(6), "ad_id": ids(6, low=5), "numbers": noise(6, 6)}

ENTRIES = [
    sound("einsum gpt", EinsumGpt, vocab_size=97),
    sound("fused gpt, tied", FusedGpt),
    sound("gru with labels", LabelLm, task="causal_lm"),
    sound("dilated convolutions", WaveLm, task="causal_lm"),
    sound("retention", RetNet, task="causal_lm"),
    sound("translator", Translator, example_inputs={"src": ids(3, 11), "tgt": ids(3, 9)}, task="seq2seq"),
    sound("reader with mask", MhaReader, example_inputs=MASKED),
    sound("masked model", MaskedReader, task="masked_lm"),
    sound("hand-written attention on features", HandReader, example_inputs={"features": noise(4, 16, 12)}),
    sound("perceiver of bytes", Perceiver, example_inputs={"byte_ids": ids(3, 20, high=250)}),
    sound("bidirectional tagger", GruReader),
    sound("fourier mixing", Fnet, task="text_classification"),
    sound("residual net", ResNet),
    sound("residual net with group norm", lambda: ResNet(norm=lambda c: nn.GroupNorm(4, c))),
    sound("mobile net", Mobile),
    sound("vision transformer", Vit),
    sound("mixer of matrices", Mixer),
    sound("u-net", Unet, example_inputs={"image": noise(2, 3, 32, 32)}),
    sound("denoiser with time", Denoiser, example_inputs={"noisy": noise(3, 1, 16, 16), "t": ids(3, high=900)}),
    sound("generator", Generator, example_inputs={"z": noise(4, 20)}),
    sound("spectrogram", Spectrogram, example_inputs={"waveform": noise(3, 1024)}),
    sound("capsules", Capsules, example_inputs={"image": noise(2, 1, 28, 28)}),
    sound("deep factorization machine", DeepFm, example_inputs=CLICKS),
    sound("two towers", TwoTower, example_inputs={"query": noise(5, 10), "document": noise(5, 14)}),
    sound("table", Tabular),
    sound("tokens of columns", FeatureTokens, example_inputs={"table": noise(5, 9)}),
    sound("forecast with a cell", Forecaster, example_inputs={"series": noise(4, 10, 5)}),
    sound("state space by fft", StateSpace, example_inputs={"signal": noise(3, 24, 8)}, linear_memory=True),
    sound("graph", GraphNet, example_inputs=NODES),
    sound("experts for rows", Experts, example_inputs={"rows": noise(6, 16)}),
]
