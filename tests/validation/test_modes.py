"""train() and eval() that do not do what they say, and models that are left in one mode on purpose."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.validation.faulty_modes import Model, found, result_of
from utils.validation.modes import check_modes

CODE = "train_eval_ignored"


class Encoder(nn.Module):
    """Token ids in, logits out, with dropout in the part `encoder`."""

    def __init__(self, drop=None):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.encoder = nn.Sequential(nn.Linear(16, 16), drop or nn.Dropout(0.3))

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)))


class NeverTrains(Model):
    def train(self, mode=True):
        return super().train(False)


class AlwaysTrains(Model):
    def train(self, mode=True):
        return super().train(True)


class Inverted(Model):
    def train(self, mode=True):
        return super().train(not mode)


class EvalInForward(Model):
    def forward(self, x):
        self.eval()
        return self.run(x)


class PartEvalInForward(Encoder):
    def forward(self, x):
        self.encoder.eval()
        return super().forward(x)


class PartKept(Encoder):
    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self


class FrozenPart(PartKept):
    def __init__(self):
        super().__init__()
        self.encoder.requires_grad_(False)


class Pinned(Encoder):
    def forward(self, x):
        return self.head(functional.dropout(self.encoder[0](self.embed(x)), 0.3, training=False))


class Discarded(Encoder):
    def forward(self, x):
        hidden = self.encoder[0](self.embed(x))
        self.encoder[1](hidden)
        return self.head(hidden)


class NeverCalled(Encoder):
    def forward(self, x):
        return self.head(self.encoder[0](self.embed(x)))


class ZeroHead(Encoder):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)


class OwnDrop(nn.Module):
    def __init__(self, p=0.1, broken=False):
        super().__init__()
        self.p, self.broken = p, broken

    def forward(self, x):
        if not self.training or self.broken:
            return x
        return x * (torch.rand(len(x), 1, 1) > self.p)


class BatchStatistics(Model):
    """Calls batch norm as the constant says, not as the mode does."""

    constant = True

    def forward(self, x):
        norm = self.norm
        hidden = self.enter(x)
        hidden = functional.batch_norm(
            hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.constant
        )
        return self.head(self.bad(hidden))


class RunningStatistics(BatchStatistics):
    constant = False


class KeptNorm(Model):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class RateLost(Encoder):
    """Sets its rate to zero in eval mode and never back."""

    def forward(self, x):
        if not self.training:
            self.encoder[1].p = 0.0
        return super().forward(x)


class ChangesInTraining(Encoder):
    def forward(self, x):
        if self.training:
            x[:, 0] = 3
        return super().forward(x)


FAULTS = [
    (lambda: NeverTrains(drop=0.2), "NeverTrains"), (lambda: AlwaysTrains(drop=0.2), "AlwaysTrains"),
    (lambda: Inverted(drop=0.2), "Inverted"), (lambda: EvalInForward(drop=0.2), "EvalInForward"),
    (PartEvalInForward, "encoder"), (PartKept, "encoder"), (Pinned, "Pinned"), (Discarded, "Discarded"),
    (lambda: Encoder(OwnDrop(broken=True)), "encoder.1"),
    (lambda: BatchStatistics(features=True, norm=True), "BatchStatistics"),
    (lambda: RunningStatistics(features=True, norm=True), "RunningStatistics"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "where"), FAULTS)
def test_faults_are_named_with_their_module(build, where):
    assert found(check_modes, build()) == [(CODE, "fail", where)]


def test_a_layer_that_never_runs_is_worth_a_look():
    assert found(check_modes, NeverCalled()) == [(CODE, "warn", "encoder.1")]


def test_train_mode_that_eval_mode_changes():
    assert found(check_modes, RateLost()) == [("state_across_calls", "fail", "encoder.1")]


def test_inputs_that_only_train_mode_changes():
    assert found(check_modes, ChangesInTraining()) == [("input_mutation", "fail", "ChangesInTraining")]


SOUND = [
    Model, Encoder, FrozenPart, ZeroHead, lambda: Encoder(OwnDrop()), lambda: Model(features=True, norm=True),
    lambda: KeptNorm(features=True, norm=True), lambda: nn.LSTM(8, 8, 2, dropout=0.2, batch_first=True),
    lambda: Model(drop=0.2),
]  # fmt: skip


@pytest.mark.parametrize("build", SOUND)
def test_sound_look_alikes(build):
    result = result_of(check_modes, build())
    assert result.status == "pass", result.why


def test_a_crash_in_train_mode_is_left_to_the_check_of_gradients():
    class Crashing(Encoder):
        def forward(self, x):
            if self.training:
                raise ValueError("no training")
            return super().forward(x)

    result = result_of(check_modes, Crashing())
    assert result.status == "skip" and "no training" in result.why and not result.could_not_run


class Hearing(nn.Module):
    """Its encoder runs only where sound is given; without that argument nothing can ever run it."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.encoder = nn.Embedding(50, 16), nn.Linear(16, 50), Encoder()

    def forward(self, input_ids, input_features=None):
        hidden = self.embed(input_ids)
        if input_features is not None:
            hidden = hidden + self.encoder.encoder(input_features)
        return self.head(hidden)


class Deaf(Hearing):
    def forward(self, input_ids):
        return super().forward(input_ids)


def test_layers_that_wait_for_an_input():
    assert found(check_modes, Hearing()) == []
    assert [(code, where) for code, _, where in found(check_modes, Deaf())] == [(CODE, "encoder.encoder.1")]


class Seeded(nn.Module):
    """Sets the seed before it drops; `forks` puts the stream back first."""

    def __init__(self, seeds=True, forks=False):
        super().__init__()
        self.net, self.drop, self.seeds, self.forks = nn.Linear(12, 8), nn.Dropout(0.3), seeds, forks
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        if self.forks:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(42)
                x = x + 0.01 * torch.randn(x.shape[-1])
        elif self.seeds:
            torch.manual_seed(42)
        return self.head(self.net(self.drop(x)).relu())


def test_a_seed_in_forward_repeats_every_mask():
    """The mask is the same in each step; a stream that is put back afterwards leaves dropout random."""
    assert found(check_modes, Seeded()) == [(CODE, "fail", "Seeded")]
    assert found(check_modes, nn.Sequential(Seeded())) == [(CODE, "fail", "0")]
    assert found(check_modes, Seeded(seeds=False)) == found(check_modes, Seeded(forks=True)) == []
