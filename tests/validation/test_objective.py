"""The loss a user will train on: every way of writing it wrongly that we know of, and the ways that are right."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Budget, Check
from utils.validation.objective import check_objective
from utils.validation.runner import run_check

CHECK = Check("objective", 1, "is the loss right?", check_objective)


def run(model, config=None, spec=None):
    """Return the result of the check as the report would hold it."""
    return run_check(ModelAdapter(model, config, spec), CHECK, 10.0)


def found(result):
    """Return (code, severity, where) of each finding."""
    return [(finding.code, finding.severity, finding.where) for finding in result.findings]


class Body(nn.Module):
    """A causal average of embeddings: the smallest model whose positions see the past only."""

    def __init__(self, vocab=50, width=16):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Embedding(64, width)
        self.mix = nn.Linear(width, width)

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.mix(x.cumsum(1) / count).tanh()


class LM(nn.Module):
    """A causal language model with the loss that a test gives it, for `labels`."""

    def __init__(self, loss, vocab=50):
        super().__init__()
        self.body, self.head, self.loss = Body(vocab), nn.Linear(16, vocab), loss
        self.config = {"vocab_size": vocab, "is_decoder": True}

    def forward(self, input_ids, labels=None):
        logits = self.head(self.body(input_ids))
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss(logits, labels), "logits": logits}


class Nano(LM):
    """The same for `targets`, which the caller has moved; returns a tuple."""

    def forward(self, idx, targets=None):
        logits = self.head(self.body(idx))
        return logits, None if targets is None else self.loss(logits, targets)


class Masked(LM):
    """A masked language model."""

    def __init__(self, loss, vocab=50):
        super().__init__(loss, vocab)
        self.config = {"vocab_size": vocab, "is_causal": False}


def shifted(logits, labels, by=1, **options):
    """Pair the logits at t with the label at t + by."""
    flat = logits[:, :-by].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels[:, by:].reshape(-1), **options)


def plain(logits, labels, **options):
    """Pair position with position."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **options)


def chosen(values, labels):
    """Return the value at each label."""
    return values[:, :-1].gather(-1, labels[:, 1:, None]).squeeze(-1)


def hot(logits, labels):
    """Return one-hot labels."""
    return F.one_hot(labels, logits.shape[-1]).float()


WRONG_LOSS = {
    "sum": lambda z, y: shifted(z, y, reduction="sum"),
    "sum over the sample": lambda z, y: shifted(z, y, reduction="sum") / len(y),
    "nll of scores": lambda z, y: F.nll_loss(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "nll of probabilities": lambda z, y: -chosen(z.softmax(-1), y).mean(),
    "no minus": lambda z, y: chosen(z.log_softmax(-1), y).mean(),
    "squared error": lambda z, y: F.mse_loss(z[:, :-1], hot(z, y)[:, 1:]),
    "squared error of probabilities": lambda z, y: F.mse_loss(z.softmax(-1)[:, :-1], hot(z, y)[:, 1:]),
    "squared error of ids": lambda z, y: F.mse_loss(z.mean(-1), y.float()),
    "deaf": lambda z, y: z.square().mean(),
    "labels from the logits": lambda z, y: plain(z, z.argmax(-1)),
    "detached": lambda z, y: shifted(z, y).detach(),
    "fresh tensor": lambda z, y: torch.tensor(float(shifted(z, y))),
    "unignored": lambda z, y: -chosen(z.log_softmax(-1), y.clamp(min=0)).mean(),
    "raises at -100": lambda z, y: -chosen(z.log_softmax(-1), y).mean(),
    "mean over padding": lambda z, y: shifted(z, y, reduction="none").mean(),
    "last position only": lambda z, y: F.cross_entropy(z[:, -2], y[:, -1]),
    "first sample only": lambda z, y: shifted(z[:1], y[:1]),
    "mixed order": lambda z, y: F.cross_entropy(
        z[:, :-1].transpose(0, 1).reshape(-1, z.shape[-1]), y[:, 1:].reshape(-1)
    ),
    "not flattened": lambda z, y: F.cross_entropy(z[:, :-1], y[:, 1:]),
}


@pytest.mark.parametrize("kind", WRONG_LOSS)
def test_wrong_builtin_loss(kind):
    """One finding, on the model whose forward computes it."""
    result = run(LM(WRONG_LOSS[kind]))
    assert found(result) == [("wrong_builtin_loss", "fail", "LM")], result.findings
    assert result.findings[0].message and result.findings[0].hint


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "log of a softmax twice"])
def test_double_softmax_inside_the_loss(kind):
    """The logits are fine, the loss takes them through one softmax too many."""
    before = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "log of a softmax twice": F.log_softmax}
    if kind == "log of a softmax twice":
        assert found(run(LM(lambda z, y: shifted(z.log_softmax(-1), y)))) == []
        return
    for scale in (0.01, 1.0, 5.0):
        result = run(LM(lambda z, y, scale=scale: shifted(before[kind](z), y)))
        assert found(result) == [("double_softmax", "fail", "LM")]


@pytest.mark.parametrize(
    ("build", "loss"),
    [
        (LM, plain),
        (LM, lambda z, y: shifted(z, y, by=2)),
        (LM, lambda z, y: plain(z[:, 1:], y[:, :-1])),
        (LM, lambda z, y: plain(z[:, :-1], y[:, :-1])),
        (LM, lambda z, y: plain(z, y.roll(1, 1))),
        (Nano, lambda z, y: shifted(z, y, by=2)),
        (Nano, lambda z, y: plain(z[:, 1:], y[:, :-1])),
        (Masked, shifted),
        (Masked, lambda z, y: plain(z[:, 1:], y[:, :-1])),
    ],
)
def test_label_shift(build, loss):
    """Unshifted, twice shifted, shifted the wrong way."""
    result = run(build(loss))
    assert found(result) == [("label_shift", "fail", build.__name__)], result.findings


def test_targets_moved_inside_are_worth_a_look():
    """Whether the caller moves them too, only the caller knows."""
    assert found(run(Nano(shifted))) == [("label_shift", "warn", "Nano")]


SOUND_LOSS = {
    "shifted": shifted,
    "smoothed": lambda z, y: shifted(z, y, label_smoothing=0.1),
    "z-loss": lambda z, y: shifted(z, y) + 1e-3 * z.logsumexp(-1).square().mean(),
    "weighted": lambda z, y: 0.5 * shifted(z, y),
    "rolled": lambda z, y: plain(z, torch.cat([y[:, 1:], torch.full_like(y[:, :1], -100)], dim=1)),
    "by hand": lambda z, y: (
        -(chosen(z.log_softmax(-1), y.clamp(min=0)) * (y[:, 1:] >= 0)).sum() / (y[:, 1:] >= 0).sum()
    ),
    "balanced": lambda z, y: shifted(z, y) + 0.01 * torch.ones(3, requires_grad=True).sum(),
    "own padding": lambda z, y: shifted(z, y, ignore_index=0),
    "focal": lambda z, y: (
        lambda nll: ((1 - (-nll).exp()) ** 2 * nll).sum() / (y[:, 1:] >= 0).sum()
    )(shifted(z, y, reduction="none")),
    "nothing": lambda z, y: None,
}  # fmt: skip


@pytest.mark.parametrize("kind", SOUND_LOSS)
def test_sound_losses(kind):
    """Nothing to report, however it is written."""
    assert found(run(LM(SOUND_LOSS[kind]))) == []


def test_conventions_that_are_right():
    """nanoGPT's targets with its own ignore_index, a masked model, and the logits returned flat."""
    assert found(run(Nano(lambda z, y: plain(z, y, ignore_index=-1)))) == []
    assert found(run(Masked(plain))) == []

    class Flat(Nano):
        def forward(self, idx, targets=None):
            logits, _ = super().forward(idx)
            if targets is None:
                return logits, None
            logits = logits.view(-1, logits.shape[-1])
            return logits, F.cross_entropy(logits, targets.view(-1))

    assert found(run(Flat(None))) == []


def test_decoder_half_of_a_translation_model():
    """Its input is moved instead of its labels, which its config says."""
    model = LM(plain)
    model.config["decoder_start_token_id"] = 2
    assert found(run(model)) == []


class LossOnly(LM):
    """With labels it returns the loss and nothing else."""

    def forward(self, input_ids, labels=None):
        logits = self.head(self.body(input_ids))
        return logits if labels is None else self.loss(logits, labels)


def test_models_that_return_only_the_loss():
    """Values for several labels tell what a gradient would."""
    assert found(run(LossOnly(shifted))) == []
    assert found(run(LossOnly(lambda z, y: z.square().mean()))) == [("wrong_builtin_loss", "fail", "LossOnly")]
    wide = LossOnly(lambda z, y: shifted(z.softmax(-1), y))
    nn.init.normal_(wide.head.weight)
    assert found(run(wide)) == [("double_softmax", "fail", "LossOnly")]
    assert found(run(LossOnly(plain))) == [("label_shift", "fail", "LossOnly")]


def test_loss_of_another_tensor():
    """A second head is trained, and the first one is returned."""

    class TwoHeads(LM):
        def __init__(self):
            super().__init__(shifted)
            self.other = nn.Linear(16, 50)

        def forward(self, input_ids, labels=None):
            hidden = self.body(input_ids)
            loss = None if labels is None else self.loss(self.other(hidden), labels)
            return {"loss": loss, "logits": self.head(hidden)}

    result = run(TwoHeads())
    assert found(result) == [("wrong_builtin_loss", "fail", "TwoHeads")]
    assert "computed from another tensor" in result.why


def test_the_module_that_computes_the_loss_is_named():
    """A criterion of the user's own, and a wrapper around the whole model."""

    class Criterion(nn.Module):
        def forward(self, logits, labels):
            return shifted(logits, labels, by=2)

    assert found(run(LM(Criterion()))) == [("label_shift", "fail", "loss")]

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.config = LM(plain), {"vocab_size": 50, "is_decoder": True}

        def forward(self, input_ids, labels=None):
            return self.model(input_ids, labels)

    assert found(run(Wrapper())) == [("label_shift", "fail", "model")]

    class TorchCriterion(LM):
        def forward(self, input_ids, labels=None):
            logits = self.head(self.body(input_ids))
            loss = None if labels is None else self.loss(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": logits}

    assert found(run(TorchCriterion(nn.CrossEntropyLoss()))) == [("label_shift", "fail", "TorchCriterion")]


def classifier(last=None, inputs=8, classes=5):
    """Return a small perceptron with something behind its scores."""
    layers = [nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes)]
    return nn.Sequential(*layers, *([last] if last else []))


class Applied(nn.Module):
    """Images in, and a function of the scores out."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.head, self.function = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), function

    def forward(self, pixel_values):
        return self.function(self.head(self.conv(pixel_values).relu().mean((2, 3))))


class SoftHead(nn.Module):
    """A head that returns probabilities by itself."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 50)

    def forward(self, x):
        return self.out(x).softmax(-1)


def test_probabilities_at_the_output_name_the_module():
    """A layer at the end, a head's own code, the model's own code, arithmetic by hand."""
    assert found(run(classifier(nn.Softmax(dim=-1)))) == [("double_softmax", "fail", "3")]
    # Several labels may hold at once, unless the task says that one class does.
    assert found(run(classifier(nn.Sigmoid()))) == [("double_softmax", "warn", "3")]
    stated = ModelSpec(task="tabular_classification")
    assert found(run(classifier(nn.Sigmoid()), spec=stated)) == [("double_softmax", "fail", "3")]
    model = LM(None)
    model.head = SoftHead()
    assert found(run(model)) == [("double_softmax", "fail", "head")]
    for function in (
        lambda z: z.softmax(-1),
        lambda z: F.softmax(z, dim=1),
        torch.sigmoid,
        lambda z: (z - z.amax(-1, keepdim=True)).exp() / (z - z.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True),
    ):
        result = run(Applied(function), spec=ModelSpec(task="image_classification"))
        assert found(result) == [("double_softmax", "fail", "Applied")]
        assert "cross-entropy" in result.why and result.findings[0].reproduction


def test_softmax_over_another_axis_at_the_output():
    """Over the batch, or over time."""
    for function in (lambda z: z.softmax(0), lambda z: z.log_softmax(0)):
        result = run(Applied(function))
        assert found(result) == [("wrong_softmax_dim", "fail", "Applied")]
        assert "over the batch (axis 0" in result.why

    class OverTime(LM):
        def forward(self, input_ids):
            return self.head(self.body(input_ids)).softmax(1)

    result = run(OverTime(None))
    assert found(result) == [("wrong_softmax_dim", "fail", "OverTime")] and "over the positions" in result.why
    assert found(run(classifier(nn.Softmax(dim=0)))) == [("wrong_softmax_dim", "fail", "3")]


def test_outputs_that_only_look_like_probabilities():
    """Log-probabilities, softmax in eval mode only, positive scores, a gate, real-valued tasks."""
    assert found(run(Applied(lambda z: z.log_softmax(-1)))) == []
    assert found(run(Applied(F.relu))) == []
    assert found(run(Applied(lambda z: z * 0.01 + 0.5))) == []

    class EvalOnly(Applied):
        def forward(self, pixel_values):
            z = super().forward(pixel_values)
            return z if self.training else z.softmax(-1)

    assert found(run(EvalOnly(lambda z: z))) == []
    assert run(classifier(nn.Sigmoid(), classes=1)).status == "skip"
    assert run(classifier(nn.Softmax(dim=-1)), spec=ModelSpec(task="regression")).status == "skip"
    assert run(classifier(nn.Sigmoid()), config={"problem_type": "multi_label_classification"}).findings == ()


class Labelled(nn.Module):
    """A perceptron that takes labels; `pair` makes output and loss from scores and labels."""

    def __init__(self, pair, classes=5):
        super().__init__()
        self.net, self.pair = classifier(classes=classes), pair

    def forward(self, x, labels=None):
        return self.pair(self.net(x), labels)


def test_probabilities_beside_a_loss_that_fits_them():
    """The model takes the logarithm of its own probabilities; nothing is squashed twice."""

    def pair(z, y):
        p = z.softmax(-1)
        return (p, None) if y is None else (p, F.nll_loss(p.log(), y))

    assert found(run(Labelled(pair))) == []

    def doubled(z, y):
        p = z.softmax(-1)
        return (p, None) if y is None else (p, F.cross_entropy(p, y))

    assert found(run(Labelled(doubled))) == [("double_softmax", "fail", "Labelled")]


def test_classifiers_with_their_own_loss():
    """One label per sample; regression hears its labels; several labels are not judged."""

    def pair(loss):
        return lambda z, y: {"logits": z} if y is None else {"logits": z, "loss": loss(z, y)}

    for sound in (F.cross_entropy, F.multi_margin_loss, lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
                  lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 5).float())):  # fmt: skip
        assert found(run(Labelled(pair(sound)))) == []
    for code, wrong in (
        ("double_softmax", lambda z, y: F.cross_entropy(z.softmax(-1), y)),
        ("wrong_builtin_loss", F.nll_loss),
        ("wrong_builtin_loss", lambda z, y: F.mse_loss(z, F.one_hot(y, 5).float())),
        ("wrong_builtin_loss", lambda z, y: F.cross_entropy(z, y, reduction="sum")),
        ("wrong_builtin_loss", lambda z, y: -F.cross_entropy(z, y)),
        ("wrong_builtin_loss", lambda z, y: F.cross_entropy(z, y).detach()),
        ("wrong_builtin_loss", lambda z, y: F.cross_entropy(z, torch.zeros_like(y))),
        ("wrong_builtin_loss", lambda z, y: F.cross_entropy(z, y.roll(1, 0))),
    ):
        assert found(run(Labelled(pair(wrong)))) == [(code, "fail", "Labelled")]

    class Aside(Labelled):
        """Trains on half of the features and returns the scores of all."""

        def forward(self, x, labels=None):
            loss = None if labels is None else F.cross_entropy(self.net(x * 0.5), labels)
            return {"logits": self.net(x), "loss": loss}

    assert found(run(Aside(None))) == [("wrong_builtin_loss", "fail", "Aside")]
    number = pair(lambda z, y: F.mse_loss(z.squeeze(-1), y.float().squeeze(-1)))
    assert found(run(Labelled(number, classes=1))) == []
    deaf = pair(lambda z, y: z.square().mean())
    assert found(run(Labelled(deaf, classes=1))) == [("wrong_builtin_loss", "fail", "Labelled")]


def test_settings_that_a_call_with_labels_writes_are_put_back():
    """The type of problem that transformers' classifiers note on their first call with labels."""
    model = LM(shifted)
    model.config = SimpleNamespace(vocab_size=50, is_decoder=True, problem_type=None)

    def note(z, y):
        model.config.problem_type = "noted"
        return shifted(z, y)

    model.loss = note
    run(model)
    assert model.config.problem_type is None


def test_features_without_labels_do_not_apply():
    """A regression model that returns numbers."""
    result = run(nn.Linear(8, 1))
    assert result.status == "skip" and "any loss may be right" in result.why


def test_budget_is_taken():
    """The check runs by itself with whatever time it is given."""
    assert check_objective(ModelAdapter(classifier()), Budget(0.0)).findings == []


class Squashed(nn.Module):
    """A sigmoid at the end, over as many numbers as came in or over another number of classes."""

    def __init__(self, width, out):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, out), nn.Sigmoid())

    def forward(self, x):
        return self.net(x)


def test_a_reconstruction_is_no_set_of_classes():
    """One number out for each one in is an autoencoder, unless somebody says that there are classes."""
    for model, spec, expected in (
        (Squashed(20, 20), {}, []),
        (Squashed(20, 7), {}, ["double_softmax"]),
        (Squashed(20, 20), {"task": "tabular_classification"}, ["double_softmax"]),
    ):
        outcome = check_objective(ModelAdapter(model, None, ModelSpec(**spec)), Budget(10.0))
        assert [finding.code for finding in outcome.findings] == expected


class OwnTargets(nn.Module):
    """Takes its targets from its own tokens."""

    def __init__(self, shift):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(70, 24), nn.GRU(24, 24, batch_first=True), nn.Linear(24, 70)
        self.shift = shift

    def forward(self, input_ids):
        logits = self.head(self.rnn(self.embed(input_ids))[0])
        scores = logits[:, : input_ids.shape[1] - self.shift]
        return F.cross_entropy(scores.transpose(1, 2), input_ids[:, self.shift :]), logits


@pytest.mark.parametrize(("shift", "expected"), [(1, []), (0, [("label_shift", "fail")])])
def test_targets_from_its_own_tokens(shift, expected):
    result = run_check(ModelAdapter(OwnTargets(shift), spec=ModelSpec(task="causal_lm")), CHECK, 10.0)
    assert [(finding.code, finding.severity) for finding in result.findings] == expected
