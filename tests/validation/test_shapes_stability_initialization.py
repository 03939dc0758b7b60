"""Shape robustness, numerical stability and initialization: faults named, look-alikes passed."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.test_functions import (
    check_output_stability,
    check_parameter_initialization,
    check_shape_robustness,
)
from utils.tier1_critical_validation import validate
from utils.validation import shape_robustness


def codes(result):
    """Return (code, where) of each finding."""
    return [(finding.code, finding.where) for finding in result.findings]


def test_position_table_shorter_than_declared(tiny):
    """The declared maximum crashes."""
    model = tiny.GPT(longest=32)
    model.config["max_position_embeddings"] = 64
    result = check_shape_robustness(model)
    assert codes(result) == [("shape_crash", "pos")]
    assert "length 64 (the maximum)" in result.findings[0].message


def test_squeeze_breaks_batch_size_one(tiny):
    """A squeeze without a dimension."""
    result = check_shape_robustness(tiny.GPT(fault="squeeze"))
    assert result.findings[0].code == "shape_crash"
    assert "batch size 1" in result.findings[0].message and "expected (1, 17, 50)" in result.findings[0].message


@pytest.mark.parametrize("width", [49, 51, 64])
def test_head_of_another_width(tiny, width):
    """Logits wider or narrower than the vocabulary."""
    result = check_shape_robustness(tiny.GPT(head_width=width))
    assert codes(result) == [("vocab_mismatch", "head")] and result.status == "fail"
    assert f"logits are {width} wide, the vocabulary has 50" in result.why


def test_padded_head_is_sound(tiny):
    """A width padded to a multiple of 64 is a habit, and only wastes a few columns."""
    assert check_shape_robustness(tiny.GPT(vocab=62, head_width=64)).status == "pass"


def test_embedding_smaller_than_vocabulary(tiny):
    """The last legal id has no row: one fault in the report, with the numbers."""
    model = tiny.GPT(vocab=40, head_width=50)
    model.config["vocab_size"] = 50
    report = validate(model, progress=False)
    assert [(f.code, f.where, f.severity) for f in report.findings] == [("vocab_mismatch", "tok", "fail")]
    assert "the legal id 49 of a vocabulary of 50 crashes; the embedding has 40 rows" in report.findings[0].message


class Mixer(nn.Module):
    """Mixes over time with a weight of one length."""

    def __init__(self, longest=12, labels=3):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(64, 32), nn.Linear(longest, longest), nn.Linear(32, labels)

    def forward(self, input_ids):
        mixed = self.mix(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head(mixed.mean(1)) if self.head.out_features < 64 else self.head(mixed)


class TextCNN(nn.Module):
    """Kim's: convolutions over time and a maximum, so texts shorter than the kernel crash."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.convs = nn.ModuleList(nn.Conv1d(16, 8, size) for size in (3, 5))
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids):
        x = self.embed(input_ids).transpose(1, 2)
        return self.head(torch.cat([conv(x).relu().amax(2) for conv in self.convs], dim=1))


@pytest.mark.parametrize(("longest", "config"), [(12, None), (20, {"max_seq_len": 20})])
def test_fixed_length(longest, config):
    """Every check uses the one legal length, and the report says which it is."""
    report = validate(Mixer(longest), config=config, progress=False)
    assert (report.verdict, report.findings) == ("READY", ())
    assert report.results[0].value == "4 of 4" and f"legal lengths: {longest} only" in report.results[0].why


def test_fixed_length_for_generation_is_worth_a_look():
    """Logits per token from a mixer: the length limit is a warning of its own."""
    result = check_shape_robustness(Mixer(labels=64), spec=ModelSpec(task="causal_lm"))
    assert [(f.code, f.severity) for f in result.findings] == [("shape_limit", "warn")]
    assert "legal lengths are 12 only" in result.why


def test_declared_length_that_crashes_stays_a_fault():
    """A mixer of 12 whose config promises 64."""
    result = check_shape_robustness(Mixer(), config={"max_seq_len": 64})
    assert result.status == "fail" and "length 64 (the maximum)" in result.why


def test_shortest_length_only_warns():
    """Kernel 5: the number is in the warning, and no other check fails."""
    report = validate(TextCNN(), progress=False)
    assert report.verdict == "READY"
    assert [(f.code, f.severity) for f in report.findings] == [("shape_limit", "warn")]
    assert "legal lengths are from 5 on" in report.findings[0].message


def test_zero_head_and_gate_do_not_ignore_the_input(tiny):
    """A head, or a scalar gate on it, that starts at zero moves with the first step."""

    class Gated(tiny.GPT):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            return super().forward(input_ids) * self.gate

    assert check_parameter_initialization(Gated()).findings == ()


def test_model_that_never_runs(tiny):
    """The reason is the evidence, and the other checks say that they could not run."""
    result = check_shape_robustness(tiny.broken())
    assert codes(result) == [("shape_crash", "norm")] and "No forward pass of TinyGPT succeeded" in result.why


@pytest.mark.parametrize("build", ["GPT", "LSTM", "Conv", "ConvNet", "MLP", "Experts"])
def test_sound_models(tiny, build):
    """No finding in the three checks."""
    model = getattr(tiny, build)()
    for check in (check_shape_robustness, check_output_stability, check_parameter_initialization):
        result = check(model)
        assert (result.status, result.findings) == ("pass", ()), result.why


def test_nan_names_the_module(tiny):
    """The logarithm of negative numbers in the second block."""
    result = check_output_stability(tiny.GPT(fault="nan"))
    assert codes(result) == [("nan_output", "blocks.1")] and "logits are not finite" in result.why


def test_nan_only_for_long_input(tiny):
    """Short input is fine, so the code says long."""
    result = check_output_stability(tiny.GPT(fault="nan_long"))
    assert codes(result) == [("nan_long_sequence", "blocks.1")] and "length 64" in result.why


class Series(nn.Module):
    """Weights that grow with every step, summed as they are or less their largest."""

    def __init__(self, largest, first):
        super().__init__()
        self.conv, self.head, self.largest, self.first = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 3), largest, first

    def forward(self, signal):
        x = self.conv(signal.transpose(1, 2) if self.first else signal)
        steps = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) / 2
        weights = (steps - steps.max() if self.largest else steps).exp()
        return self.head((x * weights).sum(-1) / weights.sum())


@pytest.mark.parametrize("first", [False, True])
def test_a_series_of_the_stated_length(first):
    """An example of 64 steps runs; the length that is stated does not, and only where the sum overflows."""
    example = torch.randn(2, 64, 4) if first else torch.randn(2, 4, 64)
    spec = ModelSpec(max_length=512, example_inputs={"signal": example})
    result = check_output_stability(ModelAdapter(Series(False, first), spec=spec))
    assert codes(result) == [("nan_long_sequence", "Series")] and "a series of 512 steps" in result.why
    assert f"with_steps(a, x, {1 if first else 2}, 512)" in result.findings[0].reproduction
    assert check_output_stability(ModelAdapter(Series(True, first), spec=spec)).status == "pass"
    short = ModelSpec(example_inputs={"signal": example})
    assert check_output_stability(ModelAdapter(Series(False, first), spec=short)).status == "pass"


def test_columns_switched_off_with_minus_infinity(tiny):
    """Ids that may never be predicted are masked on purpose."""

    class Masked(tiny.GPT):
        def forward(self, input_ids):
            off = torch.zeros(50)
            off[-3:] = float("-inf")
            return super().forward(input_ids) + off

    assert check_output_stability(Masked()).status == "pass"


def test_exploding_init(tiny):
    """Weights of every layer far too large."""
    model = tiny.GPT(width=32)
    for child in model.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=10.0)
    result = check_parameter_initialization(model)
    assert result.findings[0].code == "exploding_init" and result.status == "fail"


def test_trained_scales_are_not_held_to_the_same(tiny):
    """A model whose norms have moved counts as trained; a signal of 150 is nothing special there."""
    model = tiny.GPT()
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight.add_(torch.randn(16) * 0.1)
            block.mlp[2].weight.mul_(300)
    assert check_parameter_initialization(model).status != "fail"
    assert not check_parameter_initialization(model).details["looks_untrained"]


def test_default_embedding_tied_to_the_head(tiny):
    """N(0, 1) embeddings under a tied head start far above chance, and still train: worth a look, no failure."""
    model = tiny.GPT(width=64, tied=True)
    nn.init.normal_(model.tok.weight, std=1.0)
    finding = check_parameter_initialization(model).findings[0]
    assert (finding.code, finding.severity) == ("exploding_init", "warn")
    nn.init.normal_(model.tok.weight, std=0.1)
    assert check_parameter_initialization(model).findings == ()


def test_untied_head_of_ordinary_scale(tiny):
    """A head as usual passes; drawn with 1 over a normalised stream, or with 5, it is a failure."""
    for std, severities in ((0.02, ([],)), (0.25, ([],)), (1.0, (["fail"],)), (5.0, (["fail"],))):
        model = tiny.GPT(width=64)
        nn.init.normal_(model.head.weight, std=std)
        result = check_parameter_initialization(model)
        assert [finding.severity for finding in result.findings] in severities
        assert all(f.code == "exploding_init" and f.where == "head.weight" for f in result.findings)


class Usual:
    """A config whose class draws with 1."""

    def __init__(self, init_std=1.0):
        self.init_std = init_std


@pytest.mark.parametrize(("config", "severity"), [(Usual(), "warn"), (None, "fail")])
def test_scale_that_the_config_class_states(tiny, config, severity):
    """Large weights that are the architecture's own default are odd; those of nobody's choice are a fault."""
    model = tiny.GPT()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.0)
    model.config = config
    finding = check_parameter_initialization(model).findings[0]
    assert (finding.code, finding.severity) == ("exploding_init", severity)


def test_faint_branch_beside_a_stream():
    """A branch of products is faint at first; the stream beside it is not."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.out, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 4)
            for layer in (self.gate, self.out):
                nn.init.normal_(layer.weight, std=1e-3)
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            return self.head(self.norm(x + self.out(self.gate(x) * self.gate(x))))

    assert check_parameter_initialization(Gated()).findings == ()


def test_vanishing_init():
    """Ten layers that each shrink the signal a hundredfold, no residual path."""
    layers = []
    for _ in range(6):
        layer = nn.Linear(16, 16)
        nn.init.normal_(layer.weight, std=1e-3)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    result = check_parameter_initialization(nn.Sequential(*layers, nn.Linear(16, 3)))
    assert result.findings[0].code == "vanishing_init" and result.status == "fail"


def test_input_lost_under_the_biases():
    """Default biases keep the scale up while tiny weights drown the input."""
    layers = [nn.Linear(16, 16) for _ in range(8)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=1e-3)
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())], nn.Linear(16, 3))
    result = check_parameter_initialization(model)
    assert result.findings[0].code == "vanishing_init" and "two samples give the same output" in result.why


def test_symmetric_init(tiny):
    """All units of a layer start equal."""
    model = tiny.GPT()
    nn.init.constant_(model.blocks[0].mlp[0].weight, 0.01)
    assert codes(check_parameter_initialization(model)) == [("symmetric_init", "blocks.0.mlp.0.weight")]


@pytest.mark.parametrize("where", ["tok.weight", "norm.weight"])
def test_zero_that_cuts_the_signal(tiny, where):
    """A zero token embedding or final norm leaves nothing of the input."""
    model = tiny.GPT()
    nn.init.zeros_(model.get_parameter(where))
    assert codes(check_parameter_initialization(model)) == [("zero_init", where)]


@pytest.mark.parametrize("where", ["blocks.0.attn.proj.weight", "blocks.1.mlp.2.weight", "head.weight", "pos.weight"])
def test_zero_that_is_legitimate(tiny, where):
    """Residual branches, heads and position tables may start at zero."""
    model = tiny.GPT()
    nn.init.zeros_(model.get_parameter(where))
    assert check_parameter_initialization(model).findings == ()


def test_true_maximum_is_tried_where_one_pass_fits(tiny, monkeypatch):
    """A shorter length stands in for the maximum in other checks; here the table's end itself is read."""
    model = tiny.GPT(longest=2000)
    model.config["max_position_embeddings"] = 2048
    monkeypatch.setattr(shape_robustness, "longest_length", lambda adapter, budget, passes: 256)
    result = check_shape_robustness(model)
    assert codes(result) == [("shape_crash", "pos")] and "length 2048 (the maximum)" in result.why
    model.config["max_position_embeddings"] = 2000
    assert check_shape_robustness(model).value == "7 of 7"


class Ocr(nn.Module):
    """Images in, scores per column out, time first as the CTC loss takes them; `batch` fixes the batch size."""

    def __init__(self, batch=-1):
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.GRU(32, 8), nn.Linear(8, 5)
        self.batch = batch

    def forward(self, images):
        x = nn.functional.adaptive_avg_pool2d(self.conv(images), (8, 7)).flatten(1, 2).permute(2, 0, 1)
        return self.head(self.rnn(x)[0]).view(7, self.batch, 5)


def test_time_first_answers():
    """Samples along the second axis are samples; a batch size in the code is still a fault."""
    assert check_shape_robustness(Ocr()).status == "pass"
    assert [code for code, _ in codes(check_shape_robustness(Ocr(2)))] == ["shape_crash"]


class Contrast(nn.Module):
    """Scores of each sample against each other; `squeezes` loses the table of a lone sample."""

    def __init__(self, squeezes=False):
        super().__init__()
        self.a, self.b, self.squeezes = nn.Linear(10, 8), nn.Linear(10, 8), squeezes

    def forward(self, x):
        scores = self.a(x) @ self.b(x).T
        return scores.squeeze() if self.squeezes else scores


def test_tables_of_similarities():
    """Both axes follow the batch by design."""
    assert check_shape_robustness(Contrast()).status == "pass"
    assert [code for code, _ in codes(check_shape_robustness(Contrast(True)))] == ["shape_crash"]


@pytest.mark.parametrize("weights_only", [False, True])
def test_zero_in_every_layer(weights_only):
    """A zero head over zero hidden weights never moves; over ordinary ones it moves with the first step."""
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    for name, parameter in model.named_parameters():
        if not weights_only or name.endswith("weight"):
            nn.init.zeros_(parameter)
    assert codes(check_parameter_initialization(model)) == [("zero_init", "0.weight")]
    model[0].reset_parameters()
    assert codes(check_parameter_initialization(model)) == []
