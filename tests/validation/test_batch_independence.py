"""One sample must not influence another: every way of mixing samples found with its module, no look-alike flagged."""

import pytest
import torch
from torch import nn

from tests.validation.faulty_texts import Recurrent, SelfAttention, TextModel
from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.batch_independence import check_batch_independence, mixes_samples
from utils.validation.check import Check
from utils.validation.runner import run_check

CHECK = Check("batch_independence", 1, "", check_batch_independence)


def judged(model, **spec):
    return run_check(ModelAdapter(model, None, ModelSpec(**spec)), CHECK, 10.0)


class ConvNet(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, nn.Linear(8, 4)

    def forward(self, pixel_values):
        return self.head(self.norm(self.conv(pixel_values)).relu().mean((2, 3)))


class BatchNorm(nn.BatchNorm2d):
    """Stays in training mode."""

    def train(self, mode=True):
        return super().train(True)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Rolled(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return x + 0.1 * (x.roll(1, 0) if self.how == "roll" else x.flip(0))


class MixedView(nn.Module):
    """A view where a transpose belongs: time and samples change places."""

    def forward(self, x):
        batch, length, width = x.shape
        return x.transpose(0, 1).contiguous().cumsum(0).view(batch, length, width)


class ByRow(nn.Module):
    """Adds a vector by the place in the batch."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(16, 8)

    def forward(self, x):
        return x + self.rows(torch.arange(len(x)))


class Capacity(nn.Module):
    """Two experts with room for half of the batch's tokens in all."""

    def __init__(self, width, room):
        super().__init__()
        self.router, self.experts = nn.Linear(width, 2), nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.room = room

    def forward(self, x):
        flat = x.flatten(0, 1)
        choice, result = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0][: max(1, int(len(flat) * self.room))]
            result = result.index_copy(0, rows, expert(flat[rows]))
        return result.view_as(x)


def text_with(module):
    """A sequence model whose middle is `module`."""
    return nn.Sequential(nn.Embedding(60, 24), module, nn.Linear(24, 60))


def mlp_with(module):
    return nn.Sequential(nn.Linear(10, 8), module, nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: ConvNet(nn.BatchNorm2d(8, track_running_stats=False)), "norm"),
        (lambda: ConvNet(BatchNorm(8)), "norm"),
        (lambda: mlp_with(Centred()), "1"),
        (lambda: mlp_with(nn.Softmax(0)), "1"),
        (lambda: mlp_with(Rolled("roll")), "1"),
        (lambda: mlp_with(Rolled("flip")), "1"),
        (lambda: mlp_with(ByRow()), "1"),
        (lambda: Recurrent(batch_first=False), "rnn"),
        (lambda: Recurrent(nn.GRU, batch_first=False), "rnn"),
        (lambda: text_with(MixedView()), "1"),
        (lambda: text_with(SelfAttention(24, masking="batch")), "1"),
        (lambda: text_with(nn.TransformerEncoderLayer(24, 4, 32)), "1.self_attn"),
        (lambda: text_with(Capacity(24, 0.1)), "1"),
    ],
)
def test_mixing_is_found_where_it_starts(build, where):
    """Batch statistics, means, softmaxes, swapped axes, capacity, and what goes by the place in the batch."""
    result = judged(build())
    assert [(f.code, f.severity, f.where) for f in result.findings] == [("batch_leakage", "fail", where)]
    assert "|change|" in result.findings[0].message


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvNet(nn.BatchNorm2d(8)),
        lambda: ConvNet(nn.GroupNorm(2, 8)),
        lambda: ConvNet(nn.InstanceNorm2d(8)),
        lambda: mlp_with(nn.Dropout(0.5)),
        lambda: Recurrent(),
        lambda: Recurrent(num_layers=4, bidirectional=True),
        lambda: text_with(Capacity(24, 1.0)),
        lambda: TextModel(),
        lambda: text_with(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)),
    ],
)
def test_sound_models_pass(build):
    """Running statistics, norms within a sample, experts with room for all, four layers for four samples."""
    result = judged(build())
    assert (result.status, result.findings) == ("pass", ())


def test_another_output_than_the_logits():
    """A projection centred by the batch leaks although the logits do not."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.centre = nn.Linear(10, 8), nn.Linear(8, 3), Centred()

        def forward(self, x):
            x = self.body(x)
            return {"logits": self.head(x), "projection": self.centre(x)}

    (finding,) = judged(TwoHeads()).findings
    assert finding.where == "centre" and "`projection`" in finding.message


def test_table_of_similarities_is_read_along_its_diagonal():
    """Every sample against every other: entry (i, i) is sample i's own."""

    class Contrast(nn.Module):
        def __init__(self, leak):
            super().__init__()
            self.a, self.b, self.leak = nn.Linear(10, 8), nn.Linear(10, 8), leak

        def forward(self, x):
            scores = self.a(x) @ self.b(x).T
            return scores.softmax(-1) if self.leak else scores

    assert judged(Contrast(False)).status == "pass"
    assert judged(Contrast(True)).findings[0].code == "batch_leakage"


def test_time_first_inside_is_no_leak():
    """The model itself turns its axes for a recurrence that wants time first."""

    class TimeFirst(Recurrent):
        def forward(self, input_ids):
            x = self.embed(input_ids).transpose(0, 1)
            return self.head(self.rnn(x)[0].transpose(0, 1))

    assert judged(TimeFirst(batch_first=False)).status == "pass"


def test_random_and_stateful_models_are_not_accused():
    """Noise differs between equal calls; a counter moves with every call. Both have codes of their own."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(10, 3)

        def forward(self, x):
            return self.body(x + torch.randn_like(x))

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = nn.Linear(10, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.body(x) + self.calls

    assert judged(Noisy()).findings == () and judged(Counting()).findings == ()


def test_models_for_two_samples_only():
    """Four samples do not run, one does not either; two are enough."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.centre = nn.Linear(10, 3), Centred()

        def forward(self, x):
            return self.centre(self.body(x.view(2, 10)))

    assert judged(Two()).findings[0].where == "centre"


def test_nan_is_another_checks():
    """No finite output, no verdict."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(10, 3)

        def forward(self, x):
            return self.body(x) * float("nan")

    result = judged(Broken())
    assert result.status == "skip" and "no finite output has one row per sample" in result.why


def test_reproduction_runs():
    """The lines in the finding print a number above zero."""
    model, printed = Recurrent(batch_first=False), []
    (finding,) = judged(model).findings
    exec(finding.reproduction, {"model": model, "print": printed.append})
    assert printed[0].item() > 0 and len(finding.reproduction.splitlines()) <= 4


def test_other_checks_may_ask():
    """One fault, one code: padding asks before it reports."""
    assert mixes_samples(ModelAdapter(Recurrent(batch_first=False)))
    assert not mixes_samples(ModelAdapter(Recurrent()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    """Tolerances follow the type."""
    assert judged(TextModel().to(dtype)).status == "pass"
    assert judged(text_with(SelfAttention(24, masking="batch")).to(dtype)).findings[0].where == "1"


class Packed(nn.Module):
    """A recurrence over packed texts, which must be given longest first and none empty."""

    def __init__(self, leak=False):
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(40, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)
        self.leak = leak

    def forward(self, input_ids, lengths):
        x = nn.utils.rnn.pack_padded_sequence(self.table(input_ids), lengths.cpu(), batch_first=True)
        x = nn.utils.rnn.pad_packed_sequence(self.rnn(x)[0], batch_first=True)[0]
        return self.head(x - x.mean(0) if self.leak else x)


@pytest.mark.parametrize("given", [True, False])
def test_lengths_of_texts_stay_legal(given):
    inputs = {"input_ids": torch.randint(1, 40, (4, 9)), "lengths": torch.tensor([9, 5, 3, 1])}
    spec = {"example_inputs": inputs} if given else {}
    assert judged(Packed(), **spec).status == "pass"
    assert judged(Packed(leak=True), **spec).findings[0].code == "batch_leakage"


class Ocr(nn.Module):
    """Images in, scores per column out, time first as the CTC loss takes them."""

    def __init__(self, leak=False):
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.GRU(32, 8), nn.Linear(8, 5)
        self.leak = leak

    def forward(self, images):
        x = nn.functional.adaptive_avg_pool2d(self.conv(images), (8, 7)).flatten(1, 2).permute(2, 0, 1)
        x = self.head(self.rnn(x)[0])
        return x - x.mean(1, keepdim=True) if self.leak else x


def test_time_first_answers_are_read_by_their_second_axis():
    assert ModelAdapter(Ocr()).output.reason.endswith("time first")
    assert judged(Ocr()).status == "pass"
    assert judged(Ocr(leak=True)).findings[0].code == "batch_leakage"


def test_state_of_the_call_before_is_no_other_sample():
    """A recurrence that goes on where it stopped; its samples never meet, unless they do."""

    class Stateful(Recurrent):
        def __init__(self, leak):
            super().__init__(nn.GRU)
            self.state, self.leak = None, leak

        def forward(self, input_ids):
            state = self.state if self.state is not None and self.state.shape[1] == len(input_ids) else None
            x, state = self.rnn(self.embed(input_ids), state)
            self.state = state.detach()
            return self.head(x - x.mean(0) if self.leak else x)

    assert judged(Stateful(False)).status == "pass"
    assert judged(Stateful(True)).findings[0].code == "batch_leakage"
