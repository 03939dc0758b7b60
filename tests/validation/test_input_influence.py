"""Every input must reach the output: constants and lost inputs found, faint and late-starting signals left alone."""

import pytest
import torch
from torch import nn

from tests.validation.faulty_texts import Gpt, Picture, TextModel
from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.input_influence import check_input_influence
from utils.validation.runner import run_check

CHECK = Check("input_influence", 1, "", check_input_influence)


def judged(model, **spec):
    return run_check(ModelAdapter(model, None, ModelSpec(**spec)), CHECK, 10.0)


class Deaf(nn.Module):
    """A model whose answer is made by `output(self, x)`."""

    def __init__(self, output, *parts):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.part = parts[0] if parts else nn.Identity()
        self.output = output

    def forward(self, x):
        return self.output(self, x)


class DeafGpt(Gpt):
    def embed(self, ids):
        return torch.zeros_like(self.tokens(ids)) + self.positions(torch.arange(ids.shape[1]))


class Clamped(Picture):
    def forward(self, pixel_values):
        return super().forward(pixel_values.clamp(1.0, 1.0))


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: Deaf(lambda m, x: m.head(m.body(x)) * 0), "Deaf"),
        (lambda: Deaf(lambda m, x: m.head(m.body(x)).clamp(5.0, 5.0)), "Deaf"),
        (lambda: Deaf(lambda m, x: m.head(m.body(torch.ones_like(x)))), "Deaf"),
        (lambda: Deaf(lambda m, x: m.head(m.body(x))[:, :1].softmax(-1)), "Deaf"),
        (lambda: Deaf(lambda m, x: m.part(m.head(m.body(x))[:, :1]), nn.LayerNorm(1)), "part"),
        (lambda: Deaf(lambda m, x: m.part(m.head(m.body(x))[:, :1]), nn.Softmax(-1)), "part"),
        (lambda: Deaf(lambda m, x: m.head(m.body((x // 100).abs().clamp(max=0)))), "Deaf"),
        (DeafGpt, "DeafGpt"),
        (Clamped, "Clamped"),
    ],
)
def test_constant_output_is_found(build, where):
    """Multiplied by zero, clamped, overwritten, normed or softmaxed over one number, rounded away."""
    spec = {"task": "causal_lm"} if build is DeafGpt else {}
    result = judged(build(), **spec)
    assert [(f.code, f.severity, f.where) for f in result.findings] == [("constant_output", "fail", where)]
    assert "for any input" in result.why or "whatever the input is" in result.why


class TwoInputs(nn.Module):
    def __init__(self, lost=None, second="numbers"):
        super().__init__()
        self.table, self.linear, self.head = nn.Embedding(9, 8), nn.Linear(5, 8), nn.Linear(16, 3)
        self.lost = lost

    def forward(self, categories, numbers):
        first, second = self.table(categories).mean(1), self.linear(numbers)
        if self.lost == "numbers":
            second = first
        if self.lost == "categories":
            first = torch.zeros_like(first)
        return self.head(torch.cat([first, second], -1))


def two():
    return {"categories": torch.tensor([[1, 2, 3], [4, 0, 2], [3, 3, 1]]), "numbers": torch.randn(3, 5)}


@pytest.mark.parametrize("lost", ["numbers", "categories"])
def test_one_lost_input_is_named(lost):
    """The other one still moves the output."""
    result = judged(TwoInputs(lost), example_inputs=two())
    assert [(f.code, f.severity, f.where) for f in result.findings] == [("ignored_input", "fail", "TwoInputs")]
    assert f"replacing `{lost}`" in result.why


class Translator(nn.Module):
    def __init__(self, reads_source):
        super().__init__()
        self.source, self.target = nn.Embedding(60, 32), nn.Embedding(60, 32)
        self.core = nn.Transformer(32, 4, 1, 1, 64, batch_first=True, dropout=0.0)
        self.head, self.reads = nn.Linear(32, 60), reads_source

    def forward(self, src, tgt):
        x, y = self.source(src), self.target(tgt)
        triangle = torch.ones(2 * (tgt.shape[1],), dtype=torch.bool).triu(1)
        memory = self.core.encoder(x)
        return self.head(self.core.decoder(y, memory if self.reads else y, tgt_mask=triangle))


def test_source_of_a_translator():
    """The decoder attends to itself instead of to the source."""
    pair = {"src": torch.randint(60, (2, 9)), "tgt": torch.randint(60, (2, 7))}
    result = judged(Translator(False), example_inputs=pair, task="seq2seq")
    assert [(f.code, f.where) for f in result.findings] == [("ignored_input", "Translator")] and "`src`" in result.why
    assert judged(Translator(True), example_inputs=pair, task="seq2seq").status == "pass"


class Segments(TextModel):
    def __init__(self, reads):
        super().__init__()
        self.segments, self.reads = nn.Embedding(2, 32), reads

    def forward(self, input_ids, token_type_ids):
        self.kinds = token_type_ids
        return super().forward(input_ids)

    def embed(self, ids):
        return super().embed(ids) + self.segments(self.kinds if self.reads else torch.zeros_like(ids))


def test_segments():
    """Required segments that are looked up for nobody."""
    assert judged(Segments(True)).status == "pass"
    (finding,) = judged(Segments(False)).findings
    assert finding.code == "ignored_input" and "`token_type_ids`" in finding.message


class Gated(Deaf):
    """A head or a gate that starts at zero."""

    def __init__(self, how):
        super().__init__(lambda m, x: m.head(m.body(x)) * m.gate)
        self.gate = nn.Parameter(torch.zeros(1) if how == "gate" else torch.ones(1))
        if how == "head":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Deaf(lambda m, x: m.head(m.body(x))),
        lambda: Gated("gate"),
        lambda: Gated("head"),
        lambda: TextModel(),
        lambda: Picture(),
    ],
)
def test_sound_models_pass(build):
    """What starts at zero moves with the first step."""
    assert judged(build()).findings == ()


def test_both_inputs_count():
    """The influence of each is in the details."""
    result = judged(TwoInputs(), example_inputs=two())
    assert result.status == "pass" and set(result.details["influence"]) == {"all", "categories", "numbers"}


def test_other_causes_have_other_codes():
    """A signal that dies by degrees, equal word vectors, and dead rectifiers are not called constant here."""
    faint = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])
    for layer in faint:
        nn.init.normal_(layer.weight, std=1e-3)
    same = Gpt()
    nn.init.constant_(same.tokens.weight, 0.02)
    dead = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    nn.init.constant_(dead[0].bias, -100.0)
    for model in (faint, same, dead):
        assert judged(model).findings == ()


def test_reproduction_runs():
    """The lines in the finding print zero."""
    model, printed = Deaf(lambda m, x: m.head(m.body(x)) * 0), []
    (finding,) = judged(model).findings
    exec(finding.reproduction, {"model": model, "print": printed.append})
    assert printed[0].item() == 0 and len(finding.reproduction.splitlines()) <= 3


def test_nan_is_another_checks():
    """No finite output, no verdict."""
    result = judged(Deaf(lambda m, x: m.head(m.body(x)) * float("nan")))
    assert result.status == "skip" and "not finite" in result.why


class Batch(nn.Module):
    """Reads a dict; `compared` says under which name the answers are that its loss needs."""

    def __init__(self, compared=None, read=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 5)
        self.compared, self.read = compared, read

    def forward(self, batch):
        scores = self.head(self.embed(batch["input_ids"]).mean(1))
        if not self.read:
            return {"logits": scores}
        return {"logits": scores, "loss": nn.functional.cross_entropy(scores, batch[self.compared])}


@pytest.mark.parametrize("name", ["labels", "category"])
def test_labels_in_a_batch_feed_the_loss(name):
    """Under any name: they move the loss and need not move the logits."""
    ids = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
    examples = {"batch": {"input_ids": ids, name: torch.arange(4)}}
    assert judged(Batch(name), example_inputs=examples).findings == ()
    unread = judged(Batch(name, read=False), example_inputs=examples).findings
    # What is compared with answers in train mode only is no input that was forgotten.
    assert [finding.code for finding in unread] == ([] if name == "labels" else ["ignored_input"])


def test_labels_that_forward_reads_from_a_dict_are_made_up():
    """One per text or one per token, whichever runs."""

    class Labelled(Batch):
        def forward(self, batch):
            scores = self.head(self.embed(batch["input_ids"]).mean(1))
            return {"logits": scores, "loss": nn.functional.cross_entropy(scores, batch["labels"])}

    adapter = ModelAdapter(Labelled())
    assert adapter.modality == "tokens" and adapter.task.value == "text_classification"
    assert judged(Labelled()).findings == ()


class Triplet(nn.Module):
    """One vector for each of three inputs; `lost` reads the anchor in place of another one."""

    def __init__(self, lost=False):
        super().__init__()
        self.net, self.lost = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), lost

    def forward(self, anchor, positive, negative):
        return self.net(anchor), self.net(positive), self.net(anchor if self.lost else negative)


def test_any_tensor_of_the_output_may_hear_an_input():
    """A siamese model answers for each input; one that is read nowhere is still lost."""
    sound = judged(Triplet())
    assert sound.status == "pass" and sound.details["influence"]["negative"] > 0
    (finding,) = judged(Triplet(lost=True)).findings
    assert finding.code == "ignored_input" and "`negative`" in finding.message


class Packed(nn.Module):
    """A recurrence over packed texts; `deaf` takes all texts for full ones."""

    def __init__(self, deaf=False):
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(40, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)
        self.deaf = deaf

    def forward(self, input_ids, lengths):
        x = self.table(input_ids)
        if self.deaf:
            lengths = torch.full_like(lengths, x.shape[1])
        x = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True)
        return self.head(self.rnn(x)[1][-1])


def test_lengths_stay_legal():
    """Shorter lengths are other lengths; zero is none, and the order stays."""
    ids, lengths = torch.randint(1, 40, (4, 9)), torch.tensor([9, 5, 3, 1])
    for spec in ({}, {"example_inputs": {"input_ids": ids, "lengths": lengths}}):
        assert judged(Packed(), **spec).status == "pass"
        (finding,) = judged(Packed(deaf=True), **spec).findings
        assert finding.code == "ignored_input" and "`lengths`" in finding.message


class Columns(nn.Module):
    """A plain stack of layers without biases behind a head that has one; `clamp` and `centred` break it."""

    def __init__(self, depth, width=16, norm=True, gain=1.0, clamp=False, centred=False):
        super().__init__()
        self.clamp, self.centred = clamp, centred
        layers = []
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers += [nn.ReLU()]
        self.stem, self.trunk, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.Sequential(*layers), nn.Linear(width, 10)
        with torch.no_grad():
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    layer.weight.mul_(gain)

    def forward(self, x):
        x = self.stem(x.clamp(1.0, 1.0) if self.clamp else x)
        if self.centred:
            x = (x - x.mean((1, 2, 3), keepdim=True)).mean((1, 2, 3), keepdim=True).expand_as(x)
        return self.head(self.trunk(x).mean((2, 3)))


PICTURES = {"example_inputs": {"x": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}}


def difference(model):
    x = PICTURES["example_inputs"]["x"]
    with torch.no_grad():
        y = model.eval()(x)
    return (y[0] - y[1]).abs().max()


def test_a_signal_that_untrained_batch_norms_let_fade_is_no_constant():
    """Not a bit of the logits moves, in float64 neither; with the statistics of a batch they plainly do."""
    torch.manual_seed(0)
    model = Columns(40)
    assert difference(model) == 0
    modes = [part.training for part in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = judged(model, **PICTURES)
    assert result.status == "pass", result.why
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fault", ["clamp", "centred"])
def test_a_constant_before_untrained_batch_norms_is_found(fault):
    """Batch norms enlarge rounding a thousand times and more; what falls out anew in float64 is no signal."""
    torch.manual_seed(0)
    result = judged(Columns(12, **{fault: True}), **PICTURES)
    assert [(f.code, f.severity) for f in result.findings] == [("constant_output", "fail")], result.why


def test_a_faint_signal_in_a_larger_model_is_weighed_in_float64():
    """Six million parameters: the answers differ by less than the last bit of the head's bias in float32 alone."""
    torch.manual_seed(0)
    model = Columns(3, width=480, norm=False, gain=1e-3)
    assert sum(p.numel() for p in model.parameters()) > 5_000_000 and difference(model) == 0
    result = judged(model, **PICTURES)
    assert result.status == "pass", result.why
