"""Order must matter: models without positions found, and every other way of knowing the order left alone."""

import pytest
import torch
from torch import nn

from tests.validation.faulty_texts import Gpt, MeanOfWords, Picture, Recurrent, TextModel
from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.positions import check_positions
from utils.validation.runner import run_check

CHECK = Check("positions", 1, "", check_positions)
MLM, LM, CLASSES = {"task": "masked_lm"}, {"task": "causal_lm"}, {"task": "text_classification"}


def judged(model, config=None, **spec):
    return run_check(ModelAdapter(model, config, ModelSpec(**spec)), CHECK, 10.0)


class RunningMean(nn.Module):
    """Mean of the words so far: causal, and blind to order."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 24), nn.Linear(24, 60)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(torch.tanh(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]))


class Alibi(TextModel):
    """Positions only as a distance in the scores, added by hand."""

    def embed(self, ids):
        x = self.tokens(ids)
        steps = torch.arange(ids.shape[1], dtype=x.dtype)
        near = -(steps[:, None] - steps).abs()
        return x + near.softmax(-1) @ x


@pytest.mark.parametrize(
    ("build", "spec"),
    [
        (lambda: TextModel(positions="none"), MLM),
        (lambda: TextModel(positions="same"), MLM),
        (lambda: TextModel(positions="lost"), MLM),
        (lambda: TextModel(positions="none", labels=3), CLASSES),
        (lambda: TextModel(positions="lost", labels=3, pooling="first"), CLASSES),
        (lambda: Gpt(positions="none", depth=1), LM),
        (lambda: Gpt(positions="lost", depth=1), LM),
        (lambda: Gpt(positions="lost", depth=3), LM),
        (lambda: Gpt(positions="same", depth=3), LM),
        (RunningMean, LM),
        (lambda: Picture("none"), {}),
        (lambda: Picture("lost"), {}),
        (lambda: Picture("none", pooling="mean"), {}),
    ],
)
def test_missing_order_is_found(build, spec):
    """No table, a table that is never added, one row for all, rotation where it cannot show; text and pictures."""
    model = build()
    result = judged(model, **spec)
    assert [(f.code, f.severity, f.where) for f in result.findings] == [
        ("position_absent", "fail", type(model).__name__)
    ]


def test_stack_with_a_useless_table_names_it():
    """Three causal blocks tell positions apart by the mask alone."""
    assert "`positions.weight` has no effect" in judged(Gpt(positions="lost", depth=3), **LM).why


@pytest.mark.parametrize(
    ("build", "spec"),
    [
        (TextModel, MLM),
        (lambda: TextModel(positions="rotary"), MLM),
        (lambda: TextModel(positions="zero"), MLM),
        (lambda: TextModel(labels=3), CLASSES),
        (Alibi, MLM),
        (Gpt, LM),
        (lambda: Gpt(positions="rotary", depth=1), LM),
        (lambda: Gpt(positions="none", depth=3), LM),
        (Recurrent, LM),
        (lambda: Recurrent(nn.GRU, bidirectional=True), MLM),
        (Picture, {}),
        (lambda: Picture("zero"), {}),
    ],
)
def test_sound_models_pass(build, spec):
    """Learned, rotary, distance, recurrent; tables that start at zero; deep causal stacks meant to go without."""
    result = judged(build(), **spec)
    assert (result.status, result.findings) == ("pass", ())


class PlainMean(nn.Module):
    """What an `EmbeddingBag` does, written out: it may be a first step that forgot the order."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def forward(self, input_ids):
        return self.words(input_ids).mean(1)


def test_bag_of_words_only_warns():
    """Nothing mixes before pooling: built that way, and worth knowing."""
    model = MeanOfWords()
    model.words = PlainMean(nn.Embedding(60, 16))
    (finding,) = judged(model, **CLASSES).findings
    assert (finding.code, finding.severity) == ("position_absent", "warn") and "a bag of words" in finding.message


@pytest.mark.parametrize("flat", [False, True])
def test_layers_that_are_bags_by_name_are_asked_for_no_order(flat):
    """Rows of ids, or all ids in one list with the places where texts start."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.EmbeddingBag(60, 8, mode="sum"), nn.Linear(8, 3)

        def forward(self, input_ids):
            if not flat:
                return self.head(self.words(input_ids))
            starts = torch.arange(len(input_ids), device=input_ids.device) * input_ids.shape[1]
            return self.head(self.words(input_ids.flatten(), starts))

    assert judged(Bag(), **CLASSES).findings == ()


@pytest.mark.parametrize(
    ("model", "spec", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 2)), {}, "neither a sequence of tokens nor an image"),
        (Gpt(), {**LM, "max_length": 3}, "leave nothing to reorder"),
        (nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 60)), LM, "does not depend on the tokens that were reordered"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), {}, "no attention over an image's"),
        (Picture("none", mixing=False, pooling="mean"), {}, "no attention over an image's parts"),
    ],
)
def test_skips_with_the_reason(model, spec, reason):
    """Features, short texts, bigrams, and images without attention."""
    result = judged(model, **spec)
    assert result.status == "skip" and reason in result.why


def test_reproduction_runs():
    """The lines in the finding print zero, or nearly."""
    printed = []
    finding = judged(RunningMean(), **LM).findings[0]
    exec(finding.reproduction, {"model": RunningMean(), "spec": ModelSpec(**LM), "print": printed.append})
    assert printed[0].item() < 1e-5 and len(finding.reproduction.splitlines()) <= 4


def test_config_may_switch_positions_off():
    """BEiT's default: no kind of position, and it says so."""
    (finding,) = judged(Picture("none"), {"use_absolute_position_embeddings": False}).findings
    assert finding.severity == "warn" and "`use_absolute_position_embeddings`" in finding.message


class OneRow(nn.Module):
    """Classifies the mean of words plus the row of a table of positions, or of languages, that is always the same."""

    def __init__(self, rows):
        super().__init__()
        self.words, self.where, self.head = nn.Embedding(50, 8), nn.Embedding(rows, 8), nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.head((self.words(input_ids) + self.where(torch.zeros_like(input_ids))).relu().mean(1))


@pytest.mark.parametrize(("rows", "severity"), [(64, "fail"), (3, "warn")])
def test_positions_that_are_all_the_same(rows, severity):
    (finding,) = judged(OneRow(rows), task="text_classification").findings
    assert (finding.code, finding.severity, finding.where) == ("position_absent", severity, "OneRow")


class Windows(nn.Module):
    """Attention inside windows of patches, the second time shifted by half a window: no table, and order matters."""

    def __init__(self, shift=2):
        super().__init__()
        self.patches, self.shift = nn.Conv2d(3, 16, 4, 4), shift
        self.attend = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, img):
        x = self.patches(img).permute(0, 2, 3, 1)
        for number, attend in enumerate(self.attend):
            moved = x.roll((-self.shift, -self.shift), (1, 2)) if number else x
            b, h, w, c = moved.shape
            parts = moved.view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
            seen = attend(parts, parts, parts, need_weights=False)[0]
            seen = seen.view(b, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(b, h, w, c)
            x = x + (seen.roll((self.shift, self.shift), (1, 2)) if number else seen)
        return self.head(self.norm(x).mean((1, 2)))


def test_shifted_windows_know_the_order():
    """An image seen from behind looks the same to them; two exchanged tiles do not. Without the shift nothing does."""
    assert judged(Windows()).status == "pass"
    result = judged(Windows(shift=0))
    assert [(finding.code, finding.severity) for finding in result.findings] == [("position_absent", "fail")]
