"""Learning one batch by heart: what cannot, and what can though it looks as if it could not."""

import time

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Budget, Check, Skipped
from utils.validation.learnability import EPSILON, _adam, check_learnability
from utils.validation.runner import run_check

CHECK = Check("learnability", 1, "can it learn one batch?", check_learnability)


def run(model, config=None, spec=None, seconds=10.0):
    """Return the result of the check as the report would hold it."""
    return run_check(ModelAdapter(model, config, spec), CHECK, seconds)


class Reversed(nn.Module):
    """Every gradient is turned round by a hook, so that training climbs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        out = self.net(x)
        if out.requires_grad:
            out.register_hook(lambda gradient: -gradient)
        return out


class Faint(nn.Module):
    """The gradient is scaled down so far that Adam's epsilon swallows it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 4)

    def forward(self, x):
        out = self.net(x)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * 1e-12)
        return out


@pytest.mark.parametrize("build", [Reversed, Faint])
def test_what_no_step_moves(build):
    """The loss stays where it is, or rises."""
    result = run(build())
    assert [(f.code, f.severity, f.where) for f in result.findings] == [("cannot_learn", "fail", build.__name__)]
    assert "step sizes 0.01, 0.001, 0.1" in result.why and result.findings[0].reproduction
    namespace = {"model": build()}
    exec(result.findings[0].reproduction, namespace)


@pytest.mark.parametrize("build", ["GPT", "LSTM", "Conv", "ConvNet", "MLP", "Experts"])
def test_sound_models_learn(tiny, build):
    """A handful of steps is enough."""
    result = run(getattr(tiny, build)())
    assert (result.status, result.findings) == ("pass", ()), result.why
    assert result.value < 0.7


def test_model_is_untouched(tiny):
    """Training happens on a copy."""
    model = tiny.MLP()
    before = [p.clone() for p in model.parameters()]
    assert run(model).status == "pass"
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_half_of_the_weights_frozen_still_learns(tiny):
    """A head alone learns two samples."""
    model = tiny.MLP()
    model[0].requires_grad_(False)
    assert run(model).status == "pass"


class Prompted(nn.Module):
    """A trained vector that can move the loss by two percent, on a head that stays: as a layer, or as a constant."""

    def __init__(self, layer):
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(4))
        if layer:
            self.head = nn.Linear(12, 4, bias=False).requires_grad_(False)
        self.register_buffer("fixed", torch.linspace(-1e-3, 1e-3, 48).view(12, 4))
        self.layer = layer

    def forward(self, x):
        rest = 1e-3 * self.head(x) if self.layer else x @ self.fixed
        return rest + 0.03 * self.prompt.tanh()


@pytest.mark.parametrize(("layer", "status"), [(True, "pass"), (False, "warn")])
def test_what_a_prompt_reaches_through_a_frozen_model_is_little(layer, status):
    """Where nothing is frozen, so little is worth a look."""
    inputs = {"x": torch.linspace(-9, 8, 24).sin().view(2, 12)}
    result = run(Prompted(layer), spec=ModelSpec(task="tabular_classification", example_inputs=inputs))
    assert result.status == status, result.why
    assert 0.95 < result.value < 0.99


class Slow(nn.Module):
    """Probabilities: cross-entropy falls, but cannot fall far."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 40)

    def forward(self, x):
        return self.net(x).softmax(-1)


def test_little_learning_is_no_fault_here():
    """What limits it has a check of its own."""
    assert run(Slow()).status == "pass"


def test_does_not_apply(tiny):
    """Nothing to train, no labels, too large, nothing finite, no gradient at all, not to be copied."""
    frozen = tiny.MLP().requires_grad_(False)
    assert "no parameter is trainable" in run(frozen).why
    assert "no labels" in run(tiny.MLP(), spec=ModelSpec(task="embedding")).why
    assert "are trained on a copy" in run(nn.Linear(2000, 3000)).why
    assert "not finite" in run(tiny.GPT(fault="nan")).why

    class Laborious(nn.Linear):
        def forward(self, x):
            for _ in range(9000):
                x = x + 0
            return super().forward(x)

    assert "operators; training a copy would take too long" in run(Laborious(8, 4)).why

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 4)

        def forward(self, x):
            return self.net(x).round()

    assert "no gradient" in run(Rounded()).why

    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    assert "cannot be copied" in run(Uncopied(8, 4)).why


class Cached(nn.Module):
    """Writes into a tensor that the backward pass needs, in eval mode or in both."""

    def __init__(self, always):
        super().__init__()
        self.net, self.always = nn.Linear(8, 4), always

    def forward(self, x):
        gate = self.net(x).exp()
        out = gate * gate
        if self.always or not self.training:
            gate.zero_()
        return out


def test_backward_pass_that_crashes():
    """In eval mode only, training still tells; in both modes another check reports it."""
    assert run(Cached(False)).status == "pass"
    assert "the backward pass crashes" in run(Cached(True)).why


def test_forward_bound_to_the_original():
    """A copy whose forward is a closure over the original would train nothing."""
    model = nn.Linear(8, 4)
    original = model.forward
    model.forward = lambda input: original(input)
    result = run(model)
    assert result.status == "skip" and "calls the original" in result.why


class Plain(nn.Module):
    """A sound layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 4)

    def forward(self, x):
        return self.net(x)


class Slowly(nn.Module):
    """The same model on a machine that takes long for it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        time.sleep(0.02)
        return self.inner(x)


@pytest.mark.parametrize(("build", "codes"), [(Reversed, ["cannot_learn"]), (Plain, [])])
def test_the_verdict_does_not_depend_on_the_speed(build, codes):
    """Slow or not, the same steps are done; only the end of the budget makes them fewer, and no fault of it."""
    model, spec = build(), ModelSpec(example_inputs={"x": torch.randn(2, 8)}, task="regression")
    fast, slow = run(model, spec=spec, seconds=60.0), run(Slowly(model), spec=spec, seconds=60.0)
    assert [f.code for f in fast.findings] == [f.code for f in slow.findings] == codes
    assert [len(c) for c in fast.details["losses"].values()] == [len(c) for c in slow.details["losses"].values()]
    short = run(Slowly(model), spec=spec, seconds=0.1)
    assert not short.findings
    reduced = short.details.get("reduced", ())
    assert not codes or short.status == "skip" or any("steps of training" in note for note in reduced)


def test_no_verdict_after_a_few_steps():
    """Without time for any step nothing is claimed, not even a pass, and the report says what was left out."""
    budget = Budget(0.0)
    with pytest.raises(Skipped, match="time for this check was over"):
        check_learnability(ModelAdapter(Reversed()), budget)
    assert "1 of 40 steps of training with step size 0.01" in budget.reduced


def test_its_adam_is_torchs():
    """Step by step, also for gradients of an embedding that are sparse."""
    tables = [nn.Embedding(7, 3, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    reference = torch.optim.Adam(tables[1].parameters(), lr=0.01, eps=EPSILON)
    moments = [(torch.zeros(7, 3), torch.zeros(7, 3))]
    for step in range(1, 20):
        for table in tables:
            table.zero_grad()
            (table(torch.tensor([1, 2, step % 7])) - 3).square().sum().backward()
        _adam(list(tables[0].parameters()), moments, 0.01, step)
        reference.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)
