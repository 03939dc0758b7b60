"""Tensors that saving or moving leaves behind, and constants that nobody misses."""

import pytest
import torch
from torch import nn

from tests.validation.faulty_modes import Model, attributes, found, result_of
from utils.validation.persistence import check_persistence, looks_random
from utils.validation.registration import check_registration

CODE = "buffer_not_registered"


def noise():
    return torch.randn(16)


def sinusoids():
    return torch.sin(torch.arange(64)[:, None] * torch.exp(-torch.arange(16) / 4))


def causal():
    return torch.ones(64, 64, dtype=torch.bool).tril()


def attend(mask, h):
    scores = (h @ h.transpose(1, 2)).masked_fill(~mask[: h.shape[1], : h.shape[1]], float("-inf"))
    return h + scores.softmax(-1) @ h


def statistics(part, h):
    if part.training:
        part.mean = 0.9 * part.mean + 0.1 * h.mean((0, 1)).detach()
    return h - part.mean.to(h)


def rebuilt(part, h):
    if part.table is None or len(part.table) < h.shape[1]:
        part.table = torch.arange(h.shape[1], device=h.device, dtype=h.dtype)[:, None] / 100
    return h + part.table[: h.shape[1]]


def temporary(part):
    part.register_buffer("noise", noise(), persistent=False)


def temporary_table(part):
    part.register_buffer("noise", sinusoids()[0], persistent=False)


FAULTS = {
    "mask": (lambda part, h: attend(part.t, h), attributes(t=causal), "bad.t"),
    "random": (lambda part, h: h + part.t, attributes(t=noise), "bad.t"),
    "random but moved": (lambda part, h: h + part.t.to(h), attributes(t=noise), "bad.t"),
    "table": (lambda part, h: h + part.t[: h.shape[1]], attributes(t=sinusoids), "bad.t"),
    "table moved but not cast": (
        lambda part, h: part.linear(h + part.t[: h.shape[1]].to(h.device)), attributes(t=sinusoids), "bad.t"
    ),
    "list": (lambda part, h: h + part.t[0], attributes(t=lambda: [noise()]), "bad.t"),
    "dict": (lambda part, h: h + part.t["a"], attributes(t=lambda: {"a": noise()}), "bad.t"),
    "running statistics": (statistics, attributes(mean=lambda: torch.zeros(16)), "bad.mean"),
    "random and temporary": (lambda part, h: h + part.noise, temporary, "bad.noise"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_by_their_tensor(name):
    act, setup, where = FAULTS[name]
    # Values that only look random are proved by a second instance, and this class cannot be built without help.
    severity = "warn" if name == "random and temporary" else "fail"
    assert found(check_persistence, Model(act, setup)) == [(CODE, severity, where)]


SOUND = {
    "plain": (None, None),
    "moved mask": (lambda part, h: attend(part.t.to(h.device), h), attributes(t=causal)),
    "moved table": (lambda part, h: h + part.t[: h.shape[1]].to(h), attributes(t=sinusoids)),
    "cache": (rebuilt, attributes(table=lambda: None)),
    "single number": (lambda part, h: h * part.t, attributes(t=lambda: torch.tensor(2.0))),
    "not used": (None, attributes(t=noise)),
    "temporary table": (lambda part, h: h + part.noise, temporary_table),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_look_alikes(name):
    result = result_of(check_persistence, Model(*SOUND[name]))
    assert result.status == "pass", result.why


def test_a_factory_shows_what_another_instance_holds():
    act, setup, where = FAULTS["random but moved"]
    finding = result_of(check_persistence, Model(act, setup), factory=lambda: Model(act, setup)).findings[0]
    assert (finding.code, finding.where) == (CODE, where) and "in a second instance" in finding.message
    fixed = torch.randn(16, generator=torch.Generator().manual_seed(0))
    setup = attributes(t=fixed.clone)
    assert not found(check_persistence, Model(act, setup), factory=lambda: Model(act, setup))


def test_a_state_dict_that_lacks_parameters():
    class Forgetful(Model):
        def state_dict(self, *args, **kwargs):
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "bad" not in k}

    assert found(check_persistence, Forgetful()) == [(CODE, "fail", "bad.linear.weight")]


def test_hidden_layers_are_left_to_the_check_of_registration():
    model = Model(lambda part, h: part.held[0](h), attributes(held=lambda: [nn.Linear(16, 16)]))
    assert found(check_persistence, model) == []
    assert [code for code, _, _ in found(check_registration, model)] == ["unregistered_layer"]


def test_random_values_are_told_from_formulas():
    slopes = 2.0 ** -torch.arange(1, 9)
    formulas = [
        torch.arange(64), torch.arange(64).expand(2, 64), sinusoids(), causal(), torch.zeros(8, 8), slopes,
        torch.linspace(-1, 1, 32), torch.hann_window(64), 1e4 ** -(torch.arange(0, 32, 2) / 32), torch.randn(3),
    ]  # fmt: skip
    assert not any(looks_random(table) for table in formulas)
    torch.manual_seed(1)
    drawn = [torch.randn(16), torch.randn(64, 16), torch.rand(4, 8, 8), torch.randn(128), torch.randperm(64)]
    assert all(looks_random(table) for table in drawn)
