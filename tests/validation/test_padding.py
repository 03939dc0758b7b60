"""Padding must stay outside: every kind of broken mask found with its module, no look-alike flagged."""

import pytest
import torch
from torch import nn

from tests.validation.faulty_texts import Gpt, Recurrent, SelfAttention, TextModel
from tests.validation.test_reproduction import pasted
from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.padding import check_padding
from utils.validation.padding_masks import Padded, masks_of, padding_lines
from utils.validation.runner import run_check

CHECK = Check("padding", 1, "", check_padding)
ENCODER = {"task": "masked_lm"}
CLASSIFIER = {"task": "text_classification", "num_labels": 3}
DECODER = {"task": "causal_lm"}


def judged(model, config=None, **spec):
    return run_check(ModelAdapter(model, config, ModelSpec(**spec)), CHECK, 10.0)


def found(result):
    return [(f.code, f.severity, f.where) for f in result.findings]


class SecondForgets(TextModel):
    def forward(self, input_ids, attention_mask=None):
        x = self.layers[1](self.layers[0](self.embed(input_ids), attention_mask))
        return self.head(self.norm(x))


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` behind a mask of any name and sense."""

    def __init__(self, causal=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(60, 32), nn.Parameter(torch.randn(64, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.causal = nn.Linear(32, 60), causal

    def run(self, ids, hidden):
        x = self.embed(ids) + self.place[: ids.shape[1]]
        triangle = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        return self.head(self.encoder(x, mask=triangle, src_key_padding_mask=hidden))


class MaskOfReal(TorchEncoder):
    def forward(self, input_ids, attention_mask=None):
        return self.run(input_ids, None if attention_mask is None else attention_mask == 0)


class MaskTurnedRound(TorchEncoder):
    def forward(self, input_ids, attention_mask=None):
        return self.run(input_ids, None if attention_mask is None else attention_mask.bool())


class MaskOfPadding(TorchEncoder):
    def forward(self, src, src_key_padding_mask=None):
        return self.run(src, src_key_padding_mask)


class MaskForgotten(TorchEncoder):
    def forward(self, src, src_key_padding_mask=None):
        return self.run(src, None)


class Additive(TextModel):
    """Wants numbers that are added to the scores, of four axes."""

    def forward(self, input_ids, mask=None):
        if mask is not None and (mask.dim() != 4 or not mask.is_floating_point()):
            raise ValueError("expected an additive mask of four axes")
        return super().forward(input_ids, None if mask is None else (mask[:, 0, 0] == 0).long())


class DerivedMask(TextModel):
    """Reads the mask off the padding id."""

    def forward(self, input_ids):
        return super().forward(input_ids, (input_ids != self.pad).long())


class DerivedWrong(TextModel):
    """Counts text lengths by the padding id, and attends to it all the same."""

    def forward(self, input_ids):
        result = super().forward(input_ids)
        return result * (1 + (input_ids != self.pad).sum(1))[:, None, None].to(result.dtype)


class LastState(nn.Module):
    """Reads a text's last state: of the padding, or of the last real token."""

    def __init__(self, real):
        super().__init__()
        self.embed, self.rnn, self.head, self.real = (
            nn.Embedding(60, 24),
            nn.GRU(24, 24, batch_first=True),
            nn.Linear(24, 3),
            real,
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.rnn(x * attention_mask[..., None].to(x.dtype))[0]
        last = (attention_mask * torch.arange(input_ids.shape[1])).argmax(1) if self.real else input_ids.shape[1] - 1
        return self.head(states[torch.arange(len(x)), last])


class Convolved(TextModel):
    """A convolution reaches over the border between text and padding."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)

    def embed(self, ids):
        x = super().embed(ids)
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class MaskedRecurrence(Recurrent):
    """Takes a mask and, being causal, needs none."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids)


class MaskedGpt(TextModel):
    def __init__(self, **settings):
        super().__init__(causal=True, **settings)


class Seq2Seq(nn.Module):
    def __init__(self, honours):
        super().__init__()
        self.source, self.target = nn.Embedding(60, 32), nn.Embedding(60, 32)
        self.core = nn.Transformer(32, 4, 1, 1, 64, batch_first=True, dropout=0.0)
        self.head, self.honours = nn.Linear(32, 60), honours

    def forward(self, input_ids, decoder_input_ids, attention_mask=None):
        hidden = (attention_mask == 0) if attention_mask is not None and self.honours else None
        triangle = torch.ones(2 * (decoder_input_ids.shape[1],), dtype=torch.bool).triu(1)
        out = self.core(
            self.source(input_ids), self.target(decoder_input_ids), tgt_mask=triangle,
            src_key_padding_mask=hidden, memory_key_padding_mask=hidden,
        )  # fmt: skip
        return self.head(out)


@pytest.mark.parametrize(
    ("build", "spec", "where"),
    [
        (lambda: TextModel(masking="ignored"), ENCODER, "layers.0.attention"),
        (lambda: TextModel(masking="inverted"), ENCODER, "layers.0.attention"),
        (lambda: TextModel(masking="weak"), ENCODER, "layers.0.attention"),
        (SecondForgets, ENCODER, "layers.1.attention"),
        (MaskTurnedRound, ENCODER, "encoder.layers.0.self_attn"),
        (MaskForgotten, ENCODER, "encoder.layers.0.self_attn"),
        (lambda: TextModel(labels=3, pooling="all"), CLASSIFIER, "TextModel"),
        (lambda: LastState(real=False), CLASSIFIER, "LastState"),
        (lambda: DerivedWrong(pad=0), ENCODER, "layers.0.attention"),
        (lambda: MaskedGpt(masking="ignored"), DECODER, "layers.0.attention"),
        (lambda: MaskedGpt(masking="inverted"), DECODER, "layers.0.attention"),
        (lambda: Seq2Seq(False), {}, "core.encoder.layers.0.self_attn"),
    ],
)
def test_leak_is_found_where_it_starts(build, spec, where):
    """Ignored, inverted, weak and partly passed masks, pooling over padding, masks made from the padding id.

    The lines beside the finding show how far real positions move.
    """
    model = build()
    result = judged(model, **spec)
    assert found(result) == [("padding_leakage", "fail", where)]
    shown = pasted(result.findings[0].reproduction, model=model, spec=ModelSpec(**spec))
    assert float(shown.removeprefix("tensor(").split(",")[0].rstrip(")")) > 1e-3, shown


def test_inversion_is_called_by_its_name():
    """A mask that hides the text is told from one that hides nothing."""
    turned, ignored = judged(TextModel(masking="inverted"), **ENCODER), judged(TextModel(masking="ignored"), **ENCODER)
    assert "`attention_mask` is inverted" in turned.why and "is inverted" not in ignored.why
    assert "of the largest logit" in ignored.why


def test_amount_of_padding_is_named():
    """What the padding holds does not matter here; that it is there does."""
    assert "4 padding tokens on the right" in judged(LastState(real=False), **CLASSIFIER).why


@pytest.mark.parametrize(
    ("build", "spec"),
    [
        (TextModel, ENCODER),
        (lambda: TextModel(positions="rotary"), ENCODER),
        (lambda: TextModel(labels=3), CLASSIFIER),
        (lambda: TextModel(labels=3, pooling="first"), CLASSIFIER),
        (MaskOfReal, ENCODER),
        (lambda: MaskOfReal(causal=True), DECODER),
        (MaskOfPadding, ENCODER),
        (lambda: LastState(real=True), CLASSIFIER),
        (lambda: DerivedMask(pad=0), ENCODER),
        (Convolved, ENCODER),
        (MaskedRecurrence, DECODER),
        (MaskedGpt, DECODER),
        (lambda: Seq2Seq(True), {}),
    ],
)
def test_sound_models_pass(build, spec):
    """Both senses of a mask, first-token pooling, convolution across the border, a recurrence that needs no mask."""
    result = judged(build(), **spec)
    assert (result.status, result.findings) == ("pass", ())


class LastStateBesideMask(nn.Module):
    """Gates words by the mask, and reads the state of an LSTM after the padding beside them."""

    def __init__(self):
        super().__init__()
        self.words, self.lstm = nn.Embedding(50, 8), nn.LSTM(8, 8, batch_first=True)
        self.gate, self.head = nn.Linear(8, 1), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids)
        gated = (torch.sigmoid(self.gate(x)) * attention_mask[..., None] * x).sum(1)
        return self.head(torch.cat([gated, self.lstm(x)[0][:, -1]], -1))


def test_state_after_the_padding():
    (finding,) = judged(LastStateBesideMask()).findings
    assert (finding.code, finding.severity) == ("padding_leakage", "fail")
    assert finding.where == "LastStateBesideMask"


class Cut(TextModel):
    """Gives as many positions as its ids make it: of the hidden ones, or up to the padding id."""

    def __init__(self, hidden, **settings):
        super().__init__(**settings)
        self.hidden = hidden

    def forward(self, input_ids, attention_mask=None):
        result = super().forward(input_ids, attention_mask)
        if attention_mask is None:
            return result
        if self.hidden:
            return result[:, : 5 + int((input_ids * (1 - attention_mask.long())).sum()) % 3]
        return result[:, : int((input_ids != 1).sum(1).max())]


def test_a_shape_that_follows_hidden_tokens_is_a_leak():
    (finding,) = judged(Cut(True), **ENCODER).findings
    assert (finding.code, finding.severity, finding.where) == ("padding_leakage", "fail", "Cut")
    assert "logits' shape" in finding.message


def test_a_shape_that_follows_the_padding_id_is_stated():
    result = judged(Cut(False, pad=1), {"pad_token_id": 1}, **ENCODER)
    assert (result.status, result.findings) == ("pass", ())
    assert "change the output's shape" in result.why


class Halved(TextModel):
    """One answer for two tokens: padded and bare texts cannot be compared position by position."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask)[:, ::2]


def test_shapes_that_cannot_be_compared_are_stated():
    result = judged(Halved(), **ENCODER)
    assert result.status == "pass" and "were not compared" in result.why


def test_two_way_recurrence_only_warns():
    """Without packing it reads the padding backwards; a mask alone cannot stop it."""

    class TwoWay(Recurrent):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    assert found(judged(TwoWay(bidirectional=True), **ENCODER)) == [("padding_leakage", "warn", "rnn")]


@pytest.mark.parametrize(
    ("build", "spec", "where", "words"),
    [
        (lambda: TextModel(masking="infinite"), ENCODER, "layers.0.attention", "fully padded row"),
        (lambda: MaskedGpt(masking="infinite"), DECODER, "layers.0.attention", "at real positions"),
        (lambda: TextModel(labels=3, pooling="empty"), CLASSIFIER, "TextModel", "fully padded row"),
    ],
)
def test_nan_from_padding(build, spec, where, words):
    """Softmax over minus infinities, alone and together with the triangle, and a mean of no tokens."""
    model = build()
    result = judged(model, **spec)
    assert found(result) == [("nan_padding", "fail", where)] and words in result.why
    shown = pasted(result.findings[0].reproduction, model=model, spec=ModelSpec(**spec))
    assert shown == "finite: tensor(False)" or shown.startswith("NaN in ['"), shown


@pytest.mark.parametrize(
    ("build", "spec"),
    [
        (TextModel, ENCODER),
        (lambda: TextModel(labels=3), CLASSIFIER),
        (MaskOfPadding, ENCODER),
        (lambda: Additive(masking="sound"), ENCODER),
        (lambda: LastState(real=True), CLASSIFIER),
        (lambda: DerivedMask(pad=0), ENCODER),
        (lambda: Seq2Seq(True), {}),
    ],
)
def test_the_same_lines_clear_a_sound_model(build, spec):
    """Whatever the mask is called, its sense, its shape, and whether there is one."""
    torch.manual_seed(0)
    model, spec = build(), ModelSpec(**spec)
    adapter = ModelAdapter(model, None, spec)
    real = torch.ones(2, 13, dtype=torch.bool)
    real[0, 9:] = real[1, :4] = False
    masks = list(masks_of(adapter))
    mask = masks[-1] if isinstance(model, Additive) else masks[0]
    shape = tuple(adapter.logits(adapter.example_inputs(2, 13)).shape)
    for what in ("ids", "amount", "output", "gradient"):
        shown = pasted(padding_lines(adapter, Padded({}, real, mask), 0, what, shape), model=model, spec=spec)
        if what in ("ids", "amount"):
            assert float(shown.removeprefix("tensor(").split(",")[0].rstrip(")")) < 1e-5, (what, shown)
        else:
            assert shown in ("finite: tensor(True)", "NaN in []"), shown


def test_nan_at_real_positions():
    """NaN that spreads through the batch."""

    class Spreads(TextModel):
        def forward(self, input_ids, attention_mask=None):
            result = super().forward(input_ids, attention_mask)
            share = 1.0 if attention_mask is None else (attention_mask[0, -1] / attention_mask[0, -1]).to(result.dtype)
            return result * share

    assert "at real positions" in judged(Spreads(), **ENCODER).why


@pytest.mark.parametrize(
    ("model", "spec", "reason"),
    [
        (Gpt(), DECODER, "takes no mask of tokens"),
        (TextModel(), {**ENCODER, "max_length": 2}, "leave no room for padding"),
        (nn.Sequential(nn.Linear(4, 2)), {}, "no sequence of tokens"),
        (nn.Sequential(nn.Embedding(60, 8, padding_idx=0), nn.Linear(8, 60)), DECODER, "a token like any other"),
        (nn.Sequential(nn.Embedding(60, 32, padding_idx=0), SelfAttention(32)), ENCODER, "a token like any other"),
    ],
)
def test_skips_with_the_reason(model, spec, reason):
    """No mask, no room, no tokens, a padding id that means nothing."""
    result = judged(model, **spec)
    assert result.status == "skip" and reason in result.why


def test_mask_that_fits_no_shape_is_skipped():
    """A mask of another kind, here one for the loss of shape (batch,)."""

    class PerSample(Gpt):
        def forward(self, input_ids, mask=None):
            result = super().forward(input_ids)
            return result if mask is None else result * mask.view(len(result), 1, 1)

    result = judged(PerSample(), **DECODER)
    assert result.status == "skip" and "no way of passing the mask runs" in result.why


def test_nan_without_padding_is_another_checks():
    """NaN for every input has a code of its own."""

    class Broken(TextModel):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask) * float("nan")

    result = judged(Broken(), **ENCODER)
    assert result.status == "skip" and "not finite without padding either" in result.why


def test_mixed_samples_are_not_reported_twice():
    """Softmax over the batch lets padding of one text into another; batch_independence says so."""
    result = judged(TextModel(masking="batch"), **ENCODER)
    assert result.status == "skip" and "see batch_independence" in result.why


def test_positions_counted_from_the_padding_id():
    """RoBERTa's way: other ids under the mask move the positions, another vector does not."""

    class Counted(TextModel):
        def embed(self, ids):
            real = (ids != self.pad).long()
            return self.tokens(ids) + self.positions(real.cumsum(1) * real)

    assert judged(Counted(pad=1), {"pad_token_id": 1}, **ENCODER).status == "pass"
