"""Causality: every leak found with its module, no look-alike flagged."""

import pytest
import torch
from torch import nn

from tests.validation.test_reproduction import pasted
from utils.adapters import ModelAdapter, ModelSpec
from utils.test_functions import check_causality

CAUSAL = ModelSpec(task="causal_lm")


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"mask": "none"}, "blocks.1.attn"),
        ({"mask": "none", "fault_at": 0}, "blocks.0.attn"),
        ({"mask": "off_by_one"}, "blocks.1.attn"),
        ({"mask": "until_32"}, "blocks.1.attn"),
        ({"fault": "time_mean"}, "blocks.1"),
    ],
)
def test_leak_is_found_where_it_starts(tiny, settings, where):
    """Missing, shifted and partial masks and a mean over time."""
    result = check_causality(tiny.GPT(**settings), spec=CAUSAL)
    assert result.status == "fail"
    assert [(f.code, f.where) for f in result.findings] == [("future_leakage", where)]
    assert "|change|" in result.findings[0].message and "noise" in result.findings[0].message
    told = float(result.findings[0].message.partition("|change| ")[2].partition(",")[0])
    assert result.value == pytest.approx(told, rel=0.06) and result.value > result.threshold
    assert "the number differs" in result.findings[0].reproduction


def test_leak_only_beyond_a_length_names_that_length(tiny):
    """The mask covers 32 positions; short inputs are sound."""
    result = check_causality(tiny.GPT(mask="until_32"), spec=CAUSAL)
    assert "length 64" in result.findings[0].message
    assert result.details["tried"][0]["change"] == 0


def test_convolution_padded_on_both_sides_leaks(tiny):
    """The convolution sees one token ahead."""
    result = check_causality(tiny.Conv(causal=False), spec=CAUSAL)
    assert result.findings[0].code == "future_leakage"


@pytest.mark.parametrize(
    "build",
    [
        lambda tiny: tiny.GPT(),
        lambda tiny: tiny.GPT(tied=True),
        lambda tiny: tiny.GPT(bias="alibi"),
        lambda tiny: tiny.LSTM(),
        lambda tiny: tiny.Conv(),
    ],
)
def test_sound_models_pass(tiny, build):
    """Tied weights, ALiBi, recurrence and left-padded convolution do not leak."""
    result = check_causality(build(tiny), spec=CAUSAL)
    assert (result.status, result.findings) == ("pass", ())
    assert result.value <= result.threshold


def test_encoder_may_see_the_future(tiny):
    """A masked language model is skipped with the reason, and that is no gap in the verdict."""
    result = check_causality(tiny.GPT(mask="none"), spec=ModelSpec(task="masked_lm"))
    assert result.status == "skip" and not result.could_not_run
    assert "not a causal model (masked_lm" in result.why


def test_images_are_skipped(tiny):
    """No positions, no question."""
    assert "not a causal model" in check_causality(tiny.ConvNet()).why


def test_decoder_of_seq2seq(tiny):
    """The decoder leaks or does not; the encoder is left out of it."""

    class Seq2Seq(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.source, self.decoder = nn.Embedding(50, 16), tiny.GPT(mask=mask)

        def forward(self, input_ids, decoder_input_ids):
            return self.decoder(decoder_input_ids) + self.source(input_ids).mean(dim=(1, 2))[:, None, None]

    sound, broken = Seq2Seq("causal"), Seq2Seq("none")
    assert ModelAdapter(sound).task.value == "seq2seq"
    assert check_causality(sound).status == "pass"
    assert check_causality(broken).findings[0].where == "decoder.blocks.1.attn"


def unmasked(name, tiny, **settings):
    """A model without any mask under a class name."""
    settings = {"mask": "none", **settings}
    return type(
        name, (tiny.GPT,), {"__init__": lambda self: tiny.GPT.__init__(self, layers=1, fault_at=0, **settings)}
    )()


@pytest.mark.parametrize("name", ["Model", "CustomTransformer"])
def test_a_forgotten_mask_is_a_fault(tiny, name):
    """Nothing says encoder: the commonest silent fault, and the way out is in the hint."""
    result = check_causality(unmasked(name, tiny))
    assert result.status == "fail" and result.findings[0].code == "future_leakage"
    assert "say ModelSpec(task='masked_lm')" in result.findings[0].hint


@pytest.mark.parametrize(
    ("name", "config"),
    [("TextEncoderDecoder", {}), ("ProteinModel", {}), ("Model", {"mask_token_id": 3}), ("Model", {"mask_token": "x"})],
)
def test_a_sign_of_an_encoder_makes_it_a_warning(tiny, name, config):
    """Full sight and a sign: the task was assumed, and the message says so."""
    model = unmasked(name, tiny)
    result = check_causality(model, config)
    assert [(f.code, f.severity) for f in result.findings] == [("future_leakage", "warn")]
    assert "only assumed to be causal" in result.why
    assert "ModelSpec(task='causal_lm')" in result.findings[0].hint


@pytest.mark.parametrize("settings", [{"mask": "off_by_one"}, {"mask": "until_32"}])
def test_a_partial_leak_is_no_encoders(tiny, settings):
    """One token ahead, or only beyond a length: a fault despite the sign."""
    assert check_causality(unmasked("ProteinModel", tiny, **settings)).status == "fail"


def test_stated_task_is_not_softened(tiny):
    """Whoever says causal means it."""
    assert check_causality(unmasked("ProteinModel", tiny), spec=CAUSAL).status == "fail"


class Sequential(nn.Module):
    """Embedding, a mixer of positions, head."""

    def __init__(self, mixer):
        super().__init__()
        self.embed, self.mixer, self.head = nn.Embedding(50, 16), mixer, nn.Linear(16, 50)

    def forward(self, input_ids):
        return self.head(self.mixer(self.embed(input_ids)))


class ByRule(nn.Module):
    """Mixes positions by a matrix ``(seq, seq)`` that `rule` makes."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, x):
        return torch.einsum("ts,bsd->btd", self.rule(x.shape[1]).to(x), x)


class ExpertChoice(nn.Module):
    """Each expert takes the tokens that it likes best."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(16, 2), nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        result = torch.zeros_like(x)
        for share, expert in zip(self.router(x).softmax(-1).unbind(-1), self.experts, strict=True):
            weight, rows = share.topk(max(1, x.shape[1] // 2), dim=1)
            rows = rows[..., None].expand(-1, -1, x.shape[-1])
            result = result.scatter_add(1, rows, expert(x.gather(1, rows)) * weight[..., None])
        return result


class Summary(nn.Module):
    """Adds a summary of the whole text."""

    def forward(self, x):
        return x + x.amax(1, keepdim=True)


class TimeNorm(nn.Module):
    """Normalises each channel over time, as BatchNorm without statistics does for one text."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(16)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def weak(size):
    """Averages the past; of the future it sees a millionth."""
    return lambda n: torch.ones(n, n).tril() / n + size * torch.ones(n, n).triu(1)


def windowed(n):
    """Past only, in windows of 8, but for position 3 of each window, which sees one ahead."""
    rule = torch.ones(n, n).tril() / n
    ahead = torch.arange(3, n - 1, 8)
    rule[ahead, ahead + 1] = 0.1
    return rule


@pytest.mark.parametrize(
    ("mixer", "where"),
    [
        (lambda: ByRule(weak(1e-2)), "mixer"),
        (lambda: ByRule(weak(1e-7)), "mixer"),
        (lambda: ByRule(windowed), "mixer"),
        (lambda: ByRule(lambda n: torch.ones(n, n).triu() / n), "mixer"),
        (lambda: ExpertChoice(), "mixer"),
        (lambda: Summary(), "mixer"),
        (lambda: TimeNorm(), "mixer.norm"),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), "mixer.self_attn"),
    ],
)
def test_leaks_of_every_kind(mixer, where):
    """Weak ones, some positions only, the other triangle, expert choice, summaries, norms over time."""
    result = check_causality(Sequential(mixer()), spec=CAUSAL)
    assert [(f.code, f.severity, f.where) for f in result.findings] == [("future_leakage", "fail", where)]


class Fourier(nn.Module):
    """A causal convolution done by Fourier transform, whose rounding touches every position."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 600) * torch.exp(-torch.arange(600) / 10.0))

    def forward(self, x):
        length = x.shape[1]
        spectrum = torch.fft.rfft(x.transpose(1, 2), 2 * length) * torch.fft.rfft(self.kernel[:, :length], 2 * length)
        return torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2)


class Experts(nn.Module):
    """Tokens choose, so that the rows of each expert's product change with what comes later."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(16, 3), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        flat, result = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        choice = self.router(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0]
            result = result.index_add(0, rows, expert(flat[rows]))
        return result.view_as(x)


@pytest.mark.parametrize("mixer", [Fourier, Experts, lambda: ByRule(lambda n: torch.ones(n, n).tril() / n)])
def test_rounding_is_no_leak(mixer):
    """Fourier transforms and tokens sorted by expert round differently when later tokens change."""
    assert check_causality(Sequential(mixer()), spec=CAUSAL).findings == ()


def test_reproduction_runs(tiny):
    """The lines in the finding print a number above zero."""
    model, printed = tiny.GPT(mask="none"), []
    (finding,) = check_causality(model, spec=CAUSAL).findings
    exec(finding.reproduction, {"model": model, "print": printed.append})
    assert printed[0].item() > 0 and len(finding.reproduction.splitlines()) <= 4


def test_short_budget_tries_first_blocks_at_full_length(tiny, monkeypatch):
    """Where the longest length does not fit, the first blocks still meet it, and the report says how many."""
    from utils.validation import causality
    from utils.validation.check import Budget

    monkeypatch.setattr(causality, "longest_length", lambda *_, **__: 32)
    budget = Budget(5.0)
    outcome = causality.check_causality(ModelAdapter(tiny.GPT(mask="until_32"), spec=CAUSAL), budget)
    assert outcome.findings[0].where == "blocks.1.attn" and "length 64" in outcome.findings[0].message
    assert any("at length 64 the first 2 of 2 blocks were tried" in note for note in budget.reduced)


def test_large_models_run_to_their_last_block(tiny, monkeypatch):
    """The head is left out at the longest length."""
    from utils.validation import causality

    monkeypatch.setattr(causality, "LARGE_MODEL", 0)
    result = check_causality(tiny.GPT(mask="until_32"), spec=CAUSAL)
    assert result.findings[0].where == "blocks.1.attn" and "length 64" in result.findings[0].message
    assert check_causality(tiny.GPT(), spec=CAUSAL).status == "pass"


@pytest.mark.parametrize("name", ["TransformLM", "SSMLM"])
def test_letters_inside_a_name_excuse_nothing(tiny, name):
    """Neither is an MLM."""
    assert check_causality(unmasked(name, tiny, mask="off_by_one")).status == "fail"


@pytest.mark.parametrize("name", ["TinyMLM", "BertThing", "TextEncoder", "ModelForMaskedLM"])
def test_a_name_alone_does_not_switch_the_proof_off(tiny, name):
    """One token ahead of the whole past is no encoder; full sight and none at all are what the name may stand for."""
    leaking = check_causality(unmasked(name, tiny, mask="off_by_one"))
    assert [(f.code, f.severity) for f in leaking.findings] == [("future_leakage", "warn")]
    assert name in leaking.why and "ModelSpec(task='causal_lm')" in leaking.findings[0].hint
    assert check_causality(unmasked(name, tiny)).status == "skip"
    assert check_causality(unmasked(name, tiny, mask="causal")).status == "pass"
    stated = check_causality(unmasked(name, tiny, mask="off_by_one"), spec=ModelSpec(task="masked_lm"))
    assert stated.status == "skip"


def test_an_encoder_with_a_window_keeps_its_name(tiny):
    """It sees as little of the past as of the future."""
    model = tiny.Conv(causal=False)
    type(model).__name__, kept = "BertOfConvolutions", type(model).__name__
    try:
        assert check_causality(model).status == "skip"
    finally:
        type(model).__name__ = kept


class Numbers(nn.Module):
    """A recurrence over steps of six numbers."""

    def __init__(self, both=False, stride=1):
        super().__init__()
        self.mix = nn.GRU(6, 16, batch_first=True, bidirectional=both)
        self.head, self.stride = nn.Linear(32 if both else 16, 6), stride

    def forward(self, x):
        return self.head(self.mix(x)[0])[:, :: self.stride]


def stated(task="causal_lm", **inputs):
    return ModelSpec(task=task, example_inputs=inputs or {"x": torch.randn(2, 20, 6)})


def test_steps_of_numbers_are_replaced_like_tokens():
    """A stated task is held to what it says; the lines show it."""
    broken, spec = Numbers(both=True), stated()
    result = check_causality(broken, spec=spec)
    assert [(f.code, f.severity, f.where) for f in result.findings] == [("future_leakage", "fail", "mix")]
    assert "step 1 changes the logits at position 0" in result.why
    shown = [pasted(result.findings[0].reproduction, model=model, spec=spec) for model in (broken, Numbers())]
    largest, clear = (float(text.removeprefix("tensor(").split(",")[0].rstrip(")")) for text in shown)
    assert largest > 1e-3 and clear == 0
    sound = check_causality(Numbers(), spec=spec)
    assert sound.status == "pass" and "no step of `x` changes an earlier logit, at length 20" in sound.why


def test_steps_that_the_answer_does_not_follow():
    """What was stated and cannot be asked is a gap; without a word it is none."""
    result = check_causality(Numbers(stride=2), spec=stated())
    assert result.could_not_run and "it returns (1, 10, 6)" in result.why
    assert not check_causality(Numbers(), spec=ModelSpec(example_inputs={"x": torch.randn(2, 20, 6)})).could_not_run


class Forecast(nn.Module):
    """Reads a past and writes a future of numbers."""

    def __init__(self, both):
        super().__init__()
        self.past, self.future = nn.GRU(6, 16, batch_first=True), nn.GRU(6, 16, batch_first=True, bidirectional=both)
        self.head = nn.Linear(32 if both else 16, 6)

    def forward(self, src, tgt):
        state = self.past(src)[1]
        return self.head(self.future(tgt, state.repeat(2 if self.future.bidirectional else 1, 1, 1))[0])


def test_a_decoder_of_numbers():
    """The target's steps are asked, the source's are not."""
    spec = stated("seq2seq", src=torch.randn(2, 9, 6), tgt=torch.randn(2, 7, 6))
    assert [f.where for f in check_causality(Forecast(True), spec=spec).findings] == ["future"]
    assert check_causality(Forecast(False), spec=spec).status == "pass"
