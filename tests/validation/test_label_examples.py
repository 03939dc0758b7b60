"""Labels among a user's example inputs: the model's own loss is judged, and what the example tells is believed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.validation.test_objective import found, run
from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.gradient_flow import check_gradient_flow
from utils.validation.runner import run_check

IDS = torch.randint(1, 30, (2, 12), generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
HOT = (torch.randn(6, 4, generator=torch.Generator().manual_seed(3)) > 0).float()


class Writer(nn.Module):
    """A recurrent language model, or a tagger of fewer classes, with a loss of one's own."""

    def __init__(self, loss, classes=30):
        super().__init__()
        self.table, self.body, self.head = (
            nn.Embedding(30, 16),
            nn.GRU(16, 16, batch_first=True),
            nn.Linear(16, classes),
        )
        self.loss, self.classes = loss, classes
        self.moves = nn.Parameter(torch.randn(classes, classes) * 0.1)

    def forward(self, input_ids, labels=None):
        z = self.head(self.body(self.table(input_ids))[0])
        return {"logits": z} if labels is None else {"logits": z, "loss": self.loss(self, z, labels)}


class Rows(nn.Module):
    def __init__(self, loss, zero=False, out=4):
        super().__init__()
        self.body, self.head = nn.Linear(5, 16), nn.Linear(16, out)
        self.loss = loss
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x, labels=None):
        z = self.head(self.body(x).relu())
        return z if labels is None else (self.loss(z, labels), z)


def pairs(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def rows_of(z, y):
    return F.cross_entropy(z.reshape(-1, 30), y.flatten())


def field(model, z, y):
    """The negative log-likelihood of a conditional random field (Lafferty et al. 2001)."""
    score = z.gather(-1, y[..., None]).sum((1, 2)) + model.moves[y[:, :-1], y[:, 1:]].sum(1)
    total = z[:, 0]
    for t in range(1, z.shape[1]):
        total = (total[:, :, None] + model.moves).logsumexp(1) + z[:, t]
    return (total.logsumexp(1) - score).mean()


def judged(model, task=None, **examples):
    torch.manual_seed(0)
    return run(model, spec=ModelSpec(task=task, example_inputs=examples))


@pytest.mark.parametrize(
    ("loss", "code"),
    [
        (lambda m, z, y: pairs(z, y), "label_shift"),
        (lambda m, z, y: pairs(z[:, 1:], y[:, :-1]), "label_shift"),
        (lambda m, z, y: pairs(z[:, :-2], y[:, 2:]), "label_shift"),
        (lambda m, z, y: rows_of(z[:, :-1].transpose(1, 2), y[:, 1:]), "wrong_builtin_loss"),
        (lambda m, z, y: pairs(z[:, :-1], y[:, 1:]), None),
        (lambda m, z, y: F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:]), None),
    ],
)  # fmt: skip
def test_the_loss_of_a_language_model(loss, code):
    result = judged(Writer(loss), "causal_lm", input_ids=IDS, labels=IDS)
    assert [entry[0] for entry in found(result)] == ([code] if code else [])


def test_labels_that_the_example_shows_moved_already():
    moved = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)
    result = judged(Writer(lambda m, z, y: pairs(z, y)), "causal_lm", input_ids=IDS, labels=moved)
    assert found(result) == [] and result.details["loss"] == "cross-entropy"


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_torn_rows(order):
    model = Writer(lambda m, z, y: F.cross_entropy(z.permute(order).reshape(-1, 7), y.flatten()), 7)
    result = judged(model, input_ids=IDS, labels=IDS % 7)
    assert found(result) == [("wrong_builtin_loss", "fail", "Writer")]
    assert f"rows torn out of the logits (2, 9, 7): their axes are put in the order {order}" in result.why


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, z, y: pairs(z, y),
        lambda m, z, y: F.cross_entropy(z.transpose(1, 2), y),
        lambda m, z, y: F.cross_entropy(z.transpose(0, 1).flatten(0, 1), y.T.flatten()),
        field,
    ],
)
def test_sound_losses_of_a_tagger(loss):
    """A field's loss has a gradient at every position, whatever the labels there are."""
    assert found(judged(Writer(loss, 7), input_ids=IDS, labels=IDS % 7)) == []


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (F.binary_cross_entropy_with_logits, HOT),
        (lambda z, y: F.binary_cross_entropy_with_logits(z, y.float()), HOT.long()),
        (F.mse_loss, ROWS[:, :4]),
        (lambda z, y: F.poisson_nll_loss(z, y), HOT * 3),
        (lambda z, y: F.cross_entropy(z, y), HOT / HOT.sum(-1, keepdim=True).clamp(min=1)),
        (lambda z, y: F.cross_entropy(z, y), torch.tensor([0, 3, 1, 2, 2, 1])),
        (lambda z, y: F.cross_entropy(z, y.squeeze(1)), torch.tensor([[0], [3], [1], [2], [2], [1]])),
        (lambda z, y: F.cross_entropy(z, y.long()), torch.tensor([0.0, 3, 1, 2, 2, 1])),
    ],
)
def test_sound_losses_of_rows(loss, labels, zero):
    """Shares, several answers at once, numbers and classes; scores that are all equal at first."""
    assert found(judged(Rows(loss, zero), x=ROWS, labels=labels)) == []


@pytest.mark.parametrize("zero", [False, True])
def test_sound_losses_of_one_number(zero):
    for loss, labels in (
        (lambda z, y: F.mse_loss(z.squeeze(-1), y), ROWS[:, 0]),
        (lambda z, y: F.mse_loss(z, y), ROWS[:, :1]),
        (lambda z, y: F.binary_cross_entropy_with_logits(z.squeeze(-1), y), HOT[:, 0]),
    ):
        assert found(judged(Rows(loss, zero, out=1), x=ROWS, labels=labels)) == []


@pytest.mark.parametrize(
    ("loss", "labels", "code"),
    [
        (F.nll_loss, torch.tensor([0, 3, 1, 2, 2, 1]), "wrong_builtin_loss"),
        (lambda z, y: F.cross_entropy(z.softmax(-1), y), torch.tensor([0, 3, 1, 2, 2, 1]), "double_softmax"),
        (lambda z, y: F.binary_cross_entropy_with_logits(z, y).detach(), HOT, "wrong_builtin_loss"),
        (lambda z, y: F.mse_loss(z, z.detach() * 0.5) + 0 * y.sum(), ROWS[:, :4], "wrong_builtin_loss"),
    ],
)
def test_wrong_losses_of_rows(loss, labels, code):
    assert [entry[:2] for entry in found(judged(Rows(loss), x=ROWS, labels=labels))] == [(code, "fail")]


def test_labels_of_another_shape_are_not_judged():
    """Labels for the first positions alone: how they are paired cannot be told by labels for all."""
    model = Writer(lambda m, z, y: pairs(z[:, : y.shape[1]], y), 7)
    result = judged(model, input_ids=IDS, labels=IDS[:, :5] % 7)
    assert found(result) == [] and "shaped otherwise" in result.details["loss"]


def test_parts_that_serve_the_loss_alone():
    """The transitions of a field get their gradient from the loss; in a tagger without a field they get none."""
    check = Check("gradient_flow", 1, "?", check_gradient_flow)
    torch.manual_seed(0)
    for loss, faults in ((field, []), (lambda m, z, y: pairs(z, y), ["unused_parameter"])):
        spec = ModelSpec(example_inputs={"input_ids": IDS, "labels": IDS % 7})
        result = run_check(ModelAdapter(Writer(loss, 7), spec=spec), check, 20.0)
        assert [entry[0] for entry in found(result)] == faults
