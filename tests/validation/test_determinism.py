"""Random answers, state across calls and changed inputs, told apart; and models that only look like it."""

import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.validation.faulty_modes import Model, attributes, found, result_of
from utils.validation.determinism import check_determinism

DROPOUT, RANDOM, STATE = "dropout_in_eval", "nondeterministic_forward", "state_across_calls"


def drop_path(part, hidden):
    keep = (0.9 + torch.rand(len(hidden), 1, 1)).floor_()
    return hidden * keep


def swap_in_python(part, hidden):
    return hidden if random.random() < 0.5 else part.linear(hidden)


def multinomial(part, hidden):
    return hidden + torch.multinomial(hidden[:, 0].softmax(-1), 1)[:, None]


def own_generator(part, hidden):
    return hidden + torch.from_numpy(np.random.default_rng().normal(size=hidden.shape)).float()


def count(part, hidden):
    part.calls = getattr(part, "calls", 0) + 1
    return hidden * part.calls


def class_count(part, hidden):
    type(part).calls = getattr(type(part), "calls", 0) + 1
    return hidden * type(part).calls


def keep_all(part, hidden):
    part.kept = hidden if getattr(part, "kept", None) is None else torch.cat([part.kept, hidden], 1)
    return hidden + part.kept.mean(1, keepdim=True)


def keep_first(part, hidden):
    if getattr(part, "kept", None) is None:
        part.kept = hidden.mean(1, keepdim=True)
    return hidden + part.kept


def collide(part, hidden):
    part.kept = getattr(part, "kept", hidden)
    return torch.stack([hidden, part.kept]).sum(0) if part.kept is hidden else hidden @ part.kept


def average(part, hidden):
    part.mean.mul_(0.9).add_(0.1 * hidden.mean((0, 1)))
    return hidden - part.mean


def shrink(part, hidden):
    part.linear.weight.data.mul_(0.9)
    return hidden


def growing_table(part, hidden):
    length = hidden.shape[1]
    if getattr(part, "table", None) is None or len(part.table) < length:
        part.table = torch.arange(length)[:, None] * 0.1
    return hidden + part.table[:length]


FAULTS = {
    "dropout function": (lambda part, h: functional.dropout(h, 0.1), None, DROPOUT),
    "bernoulli": (lambda part, h: h * torch.bernoulli(torch.full_like(h, 0.9)), None, DROPOUT),
    "bernoulli in place": (lambda part, h: h * torch.empty_like(h).bernoulli_(0.9), None, DROPOUT),
    "dropout by hand": (lambda part, h: h * (torch.rand_like(h) > 0.1), None, DROPOUT),
    "drop path": (drop_path, None, DROPOUT),
    "layer drop": (lambda part, h: h if torch.rand(1).item() < 0.5 else h * 2, None, DROPOUT),
    "layer drop in python": (swap_in_python, None, DROPOUT),
    "out of reach of eval": (lambda part, h: part.held[0](h), attributes(held=lambda: [nn.Dropout(0.1)]), DROPOUT),
    "attention": (lambda part, h: functional.scaled_dot_product_attention(h, h, h, dropout_p=0.2), None, DROPOUT),
    "noise": (lambda part, h: h + 0.1 * torch.randn_like(h), None, RANDOM),
    "uniform noise": (lambda part, h: h + 0.1 * torch.rand_like(h), None, RANDOM),
    "order": (lambda part, h: h[..., torch.randperm(16)], None, RANDOM),
    "gumbel": (lambda part, h: h * functional.gumbel_softmax(h, dim=-1), None, RANDOM),
    "sample": (multinomial, None, RANDOM),
    "noise in place": (lambda part, h: h + torch.empty_like(h).normal_(), None, RANDOM),
    "numpy": (lambda part, h: h * np.random.rand(), None, RANDOM),
    "python": (lambda part, h: h * random.random(), None, RANDOM),
    "own generator": (own_generator, None, RANDOM),
    "clock": (lambda part, h: h * (time.perf_counter() % 1), None, RANDOM),
    "counter": (count, None, STATE),
    "counter of the class": (class_count, None, STATE),
    "cache": (keep_all, None, STATE),
    "first batch": (keep_first, None, STATE),
    "crash of the second call": (collide, None, STATE),
    "running mean": (average, lambda part: part.register_buffer("mean", torch.zeros(16)), STATE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_with_their_module(name):
    act, setup, code = FAULTS[name]
    assert found(check_determinism, Model(act, setup)) == [(code, "fail", "bad")]


def test_a_dropout_layer_that_is_switched_back():
    model = Model(lambda part, h: part.drop.train()(h), attributes(drop=lambda: nn.Dropout(0.1)))
    assert found(check_determinism, model) == [(DROPOUT, "fail", "bad.drop")]


def test_changed_parameters_are_state():
    assert found(check_determinism, Model(shrink)) == [(STATE, "fail", "bad.linear.weight")]


def test_the_hidden_state_of_a_recurrent_layer():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(50, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 50)
            self.state = None

        def forward(self, x):
            hidden, self.state = self.rnn(self.embed(x), self.state)
            return self.head(hidden)

    assert found(check_determinism, Stateful()) == [(STATE, "fail", "Stateful")]


SOUND = {
    "plain": (None, None),
    "dropout": (lambda part, h: part.drop(h), attributes(drop=lambda: nn.Dropout(0.5))),
    "a draw that is thrown away": (lambda part, h: (torch.rand(3), h)[1], None),
    "growing table": (growing_table, None),
    "calls are counted and not used": (lambda part, h: (setattr(part, "n", getattr(part, "n", 0) + 1), h)[1], None),
    "list that is not read": (lambda part, h: (part.seen.append(h.mean()), h)[1], attributes(seen=list)),
    "in place on its own result": (lambda part, h: h.mul_(2), None),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_look_alikes(name):
    result = result_of(check_determinism, Model(*SOUND[name]))
    assert result.status == "pass", result.why


def test_batch_normalisation_and_dropout_are_sound():
    assert found(check_determinism, Model(features=True, drop=0.5, norm=True)) == []


class Inner(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Outer(Model):
    def __init__(self):
        super().__init__(features=True)
        self.first = nn.Sequential(nn.Identity(), Inner())

    def forward(self, x):
        return self.run(self.first(x))


class Ids(Model):
    def forward(self, x):
        x[:, 0] = 1
        return self.run(x)


class Clamped(Model):
    def forward(self, x):
        return self.run(x.clamp_(min=0))


class Behind(Model):
    """Writes past the version counter."""

    def forward(self, x):
        x.data.zero_()
        return self.run(x)


class Reshaped(Model):
    def forward(self, x):
        return self.run(x.unsqueeze_(0).reshape(-1, x.shape[-1]))


class Harmless(Model):
    """Asks for a gradient, and writes to copies."""

    def forward(self, x):
        if not x.requires_grad:
            x.requires_grad_()
        y = x.detach().clone()
        y.clamp_(min=0)
        return self.run(x + 0 * nn.functional.relu(y.contiguous(), inplace=True))


class Mask(Model):
    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None:
            attention_mask.sub_(1)
        return self.run(input_ids)


@pytest.mark.parametrize(
    ("build", "severity", "where"),
    [
        (Outer, "fail", "first.1"),
        (Ids, "fail", "Ids"),
        (Clamped, "fail", "Clamped"),
        (Behind, "fail", "Behind"),
        (Reshaped, "fail", "Reshaped"),
        (Mask, "fail", "Mask"),
    ],
)
def test_changed_inputs(build, severity, where):
    assert found(check_determinism, build()) == [("input_mutation", severity, where)]


def test_a_write_of_equal_values_is_a_write():
    assert "equal values" in result_of(check_determinism, Clamped()).findings[0].message
    assert "shape" in result_of(check_determinism, Reshaped()).findings[0].message


def test_asking_for_a_gradient_is_no_write():
    assert found(check_determinism, Harmless()) == []


def test_messages_carry_numbers_and_lines_to_run():
    finding = result_of(check_determinism, Model(lambda part, h: h + torch.randn_like(h))).findings[0]
    assert "|difference|" in finding.message and "randn_like() draws random numbers here" in finding.message
    assert "register_buffer" in finding.hint and len(finding.reproduction.splitlines()) == 3
    finding = result_of(check_determinism, Ids()).findings[0]
    assert "values of its argument `x` in place" in finding.message
    exec(finding.reproduction, {"model": Ids()})


def test_a_model_that_no_call_runs_is_not_judged():
    result = result_of(check_determinism, nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 4)))
    assert result.could_not_run


class Variational(nn.Module):
    """Draws its latent vector in eval mode too, in one way or another."""

    def __init__(self, draw):
        super().__init__()
        self.encode, self.mean, self.spread = nn.Linear(20, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.decode, self.draw = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 20)), draw

    def forward(self, x):
        hidden = self.encode(x).relu()
        mean, spread = self.mean(hidden), self.spread(hidden)
        return self.decode(self.draw(mean, (0.5 * spread).exp())), mean, spread


def noisy_twice(mean, deviation):
    return mean + torch.randn_like(mean) * deviation + 0.1 * torch.randn_like(mean)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda mean, deviation: mean + deviation * torch.randn_like(deviation), ["warn"]),
        (lambda mean, deviation: torch.randn_like(mean).mul(deviation).add_(mean), ["warn"]),
        (lambda mean, deviation: deviation.new(deviation.shape).normal_().mul(deviation).add(mean), ["warn"]),
        (lambda mean, deviation: torch.distributions.Normal(mean, deviation).rsample(), ["warn"]),
        (lambda mean, deviation: torch.normal(mean, deviation), ["warn"]),
        (noisy_twice, ["fail"]),
        (lambda mean, deviation: torch.rand_like(mean), ["fail"]),
    ],
)
def test_latent_vectors_may_be_drawn(draw, expected):
    """Noise on a returned mean, and nowhere else, may be wanted: worth a look, no fault."""
    result = result_of(check_determinism, Variational(draw))
    assert [finding.severity for finding in result.findings] == expected


def test_noise_without_mean_and_variance_is_a_fault():
    """An answer and one other output prove no latent vector; and dropout is none."""

    class Single(Variational):
        def forward(self, x):
            return super().forward(x)[0]

    class Dropping(Variational):
        def forward(self, x):
            answer, mean, spread = super().forward(x)
            return functional.dropout(answer, 0.5), mean, spread

    draw = lambda mean, deviation: mean + deviation * torch.randn_like(deviation)  # noqa: E731
    assert found(check_determinism, Single(draw)) == [(RANDOM, "fail", "Single")]
    fails = [finding for finding in found(check_determinism, Dropping(draw)) if finding[1] == "fail"]
    assert (DROPOUT, "fail", "Dropping") in fails
