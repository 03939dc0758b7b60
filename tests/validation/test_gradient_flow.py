"""Gradient flow: parts that never train, told apart; look-alikes left alone."""

import functools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from utils.adapters import ModelSpec
from utils.test_functions import check_gradient_flow


def codes(result):
    """Return (code, where) of each finding."""
    return [(finding.code, finding.where) for finding in result.findings]


def test_detached_submodule(tiny):
    """The attention's output is detached: it works and never trains."""
    result = check_gradient_flow(tiny.GPT(fault="detached"))
    assert ("detached_submodule", "blocks.1.attn") in codes(result)
    assert "get no gradient" in result.findings[0].message and result.status == "fail"


def test_unused_module(tiny):
    """A layer that forward() never calls."""
    result = check_gradient_flow(tiny.GPT(fault="unused"))
    assert codes(result) == [("unused_parameter", "extra")]
    assert result.findings[0].severity == "fail" and "never runs" in result.findings[0].message


def test_block_left_out_of_the_loop(tiny):
    """A block that is never run is no expert that was not chosen."""
    model = tiny.GPT(layers=3)
    model.forward = lambda input_ids: model.head(model.norm(model.blocks[1](model.blocks[0](model.tok(input_ids)))))
    assert ("unused_parameter", "blocks.2") in codes(check_gradient_flow(model, spec=ModelSpec(task="causal_lm")))


def test_backward_crash(tiny):
    """An in-place change of a tensor that the backward pass needs."""
    result = check_gradient_flow(tiny.GPT(fault="in_place"))
    assert codes(result) == [("backward_crash", "TinyGPT")]
    assert "modified by an inplace operation" in result.findings[0].message


def test_no_gradient_at_all(tiny):
    """The whole forward runs under no_grad."""
    model = tiny.GPT()
    inner = model.forward
    model.forward = lambda input_ids: torch.no_grad()(inner)(input_ids)
    result = check_gradient_flow(model)
    assert codes(result) == [("detached_submodule", "TinyGPT")]


def test_exploding_gradient(tiny):
    """Weights far too large."""
    model = tiny.GPT()
    with torch.no_grad():
        model.head.weight.mul_(1e8)
    result = check_gradient_flow(model)
    assert [finding.code for finding in result.findings] == ["exploding_gradient"] and result.status == "fail"


def test_gradient_that_is_not_finite(tiny):
    """the norm of zero has no slope: the loss is fine, the gradient is not."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = self.enter(x)
            return self.leave(x) + (x - x.detach()).square().sum(-1, keepdim=True).sqrt()

    result = check_gradient_flow(Root())
    assert codes(result) == [("nan_output", "enter.bias")]
    assert "not finite" in result.findings[0].message


def test_stray_frozen_parameter(tiny):
    """One matrix in the middle is frozen while its sisters train."""
    model = tiny.GPT()
    model.blocks[1].mlp[0].weight.requires_grad_(False)
    result = check_gradient_flow(model)
    assert result.status == "fail" and codes(result) == [("frozen_parameter", "blocks.1.mlp.0.weight")]
    assert check_gradient_flow(model, spec=ModelSpec(frozen=("blocks.1.mlp",))).status == "pass"


class Gain(nn.Module):
    """A gain of another class than its sisters, with another name for the numbers; `more` parameters beside it."""

    def __init__(self, size=16, more=False):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(size)) if more else None

    def forward(self, x):
        return x * self.gain + (0 if self.shift is None else self.shift)


class GainedBlock(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(16, 16)

    def forward(self, x):
        return x + self.linear(self.scale(x)).tanh()


@pytest.mark.parametrize(
    ("odd", "found"),
    [
        (lambda: Gain(), ["blocks.1.scale.gain"]),
        # A fixed number of another shape, or beside trained ones, is a constant of its own.
        (lambda: Gain(1), []),
        (lambda: Gain(more=True), []),
        (lambda: nn.RMSNorm(16), []),
    ],
)
def test_frozen_where_the_same_place_of_other_blocks_trains(odd, found):
    blocks = nn.Sequential(*[GainedBlock(odd() if i == 1 else nn.RMSNorm(16)) for i in range(3)])
    result = check_gradient_flow(
        nn.Sequential(OrderedDict(enter=nn.Linear(16, 16), blocks=blocks, leave=nn.Linear(16, 4)))
    )
    assert codes(result) == [("frozen_parameter", name) for name in found]


@pytest.mark.parametrize("purpose", ["embedding", "first_blocks", "all_but_head"])
def test_frozen_on_purpose(tiny, purpose):
    """Whole parts frozen together are a plan, not an accident."""
    model = tiny.GPT()
    parts = {"embedding": model.tok, "first_blocks": model.blocks[0], "all_but_head": model.blocks}
    parts[purpose].requires_grad_(False)
    if purpose == "all_but_head":
        model.tok.requires_grad_(False)
        model.pos.requires_grad_(False)
    assert check_gradient_flow(model).findings == ()


class Routed(nn.Module):
    """Routes each batch to one of its experts, by a layer or by a rule without weights."""

    def __init__(self, layer):
        super().__init__()
        self.router = nn.Linear(8, 3) if layer else None
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.leave = nn.Linear(8, 4)

    def forward(self, x):
        scores = self.router(x).softmax(-1) if self.router else nn.functional.one_hot(x[:, 0].gt(0).long(), 3).float()
        mixed = sum(scores[:, k : k + 1] * self.experts[k](x) for k in scores.argmax(-1).unique().tolist())
        return self.leave(mixed.relu())


@pytest.mark.parametrize("layer", [True, False])
def test_expert_not_routed(layer):
    """Experts that this batch did not choose are no fault, unless no batch can choose them."""
    never = [] if layer else [("unused_parameter", "experts.2")]
    assert codes(check_gradient_flow(Routed(layer))) == never


def test_layer_of_a_list_never_called(tiny):
    """Nothing routes: the others of the list are not used either way."""
    result = check_gradient_flow(tiny.Experts())
    assert [(*code, f.severity) for code, f in zip(codes(result), result.findings, strict=True)] == [
        ("unused_parameter", "experts.1", "fail"),
        ("unused_parameter", "experts.2", "fail"),
    ]


def decorated(function):
    """Hide a forward behind a decorator, as libraries do."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Seeing(nn.Module):
    """A classifier of features that also takes pictures, and holds a vector for masked training."""

    def __init__(self):
        super().__init__()
        self.tower, self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.mask_token = nn.Parameter(torch.zeros(1, 8))

    @decorated
    def forward(self, x, pixel_values=None, use_mask=False):
        if use_mask:
            x = x + self.mask_token
        if pixel_values is not None:
            x = x + self.tower(pixel_values.flatten(1))
        return self.head(self.body(x).relu())


def test_part_that_waits_for_an_optional_input():
    """A tower without pixels is no fault, and neither is a vector of another objective."""
    result = check_gradient_flow(Seeing())
    assert result.findings == ()
    assert result.details["waiting_for_input"] == {"parts": ["tower", "mask_token"], "inputs": ["pixel_values"]}


def test_unused_part_beside_one_that_waits():
    """What no method reads waits for nothing."""
    model = Seeing()
    model.forgotten = nn.Linear(8, 8)
    result = check_gradient_flow(model)
    assert codes(result) == [("unused_parameter", "forgotten")] and result.findings[0].severity == "fail"


def test_embedding_ids_given_as_vectors_are_no_content():
    """Another form of the same input keeps nothing waiting."""

    class Either(Seeing):
        def forward(self, x, inputs_embeds=None, labels=None):
            return self.tower(inputs_embeds) if inputs_embeds is not None else self.head(self.body(x).relu())

    assert ("unused_parameter", "tower") in codes(check_gradient_flow(Either()))


def test_method_that_a_subclass_replaces_reads_nothing():
    """The base class used the part; the forward that runs does not."""

    class Forgets(Seeing):
        def forward(self, x):
            return self.head(x)

    result = check_gradient_flow(Forgets())
    assert ("body", "fail") in [(f.where, f.severity) for f in result.findings]


def test_gradients_that_are_sparse():
    """Bags of embeddings with sparse gradients."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(50, 16, sparse=True), nn.Linear(16, 4)

        def forward(self, input_ids):
            return self.head(self.bag(input_ids))

    result = check_gradient_flow(Bag())
    assert result.status == "pass" and not result.details.get("could_not_run")


class Corrected(nn.Module):
    """A frozen matrix with two thin ones beside it."""

    def __init__(self, inside, outside, rank=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside) / inside**0.5, False)
        self.a, self.b = nn.Parameter(torch.randn(rank, inside) * 0.1), nn.Parameter(torch.zeros(outside, rank))

    def forward(self, x):
        return x @ self.weight.T + x @ self.a.T @ self.b.T


def test_low_rank_correction_of_frozen_matrices():
    """Hand-made LoRA."""
    model = nn.Sequential(Corrected(16, 32), nn.ReLU(), Corrected(32, 32), nn.ReLU(), Corrected(32, 8))
    assert check_gradient_flow(model).findings == ()


def test_balancing_bias_of_a_router():
    """A vector that a rule of its own moves, not the gradient."""

    class Balanced(Routed):
        def __init__(self):
            super().__init__(True)
            self.balance = nn.Parameter(torch.zeros(3), False)

        def forward(self, x):
            scores = (self.router(x) + self.balance).softmax(-1)
            return self.leave(sum(scores[:, k : k + 1] * self.experts[k](x) for k in range(3)).relu())

    assert check_gradient_flow(Balanced()).findings == ()


def test_zero_gradients_are_no_fault(tiny):
    """Key biases and parts behind a zero-initialised projection have gradients of exactly zero."""
    model = tiny.GPT()
    nn.init.zeros_(model.blocks[0].attn.proj.weight)
    result = check_gradient_flow(model)
    assert result.status == "pass" and "blocks.0.attn.qkv.weight" in result.details["zero_gradient"]


def test_batchnorm_and_tied_weights(tiny):
    """Sound models of other kinds."""
    assert check_gradient_flow(tiny.ConvNet()).status == "pass"
    assert check_gradient_flow(tiny.GPT(tied=True)).status == "pass"


def test_auxiliary_head_in_training_only():
    """A head that runs in train mode only is used."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.side = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.body(x)
            return (self.head(x), self.side(x)) if self.training else self.head(x)

    assert check_gradient_flow(Auxiliary()).findings == ()


def test_no_parameters():
    """Nothing to train is no fault, unless layers are there that torch does not see."""
    result = check_gradient_flow(nn.Softmax(dim=-1))
    assert (result.status, result.why) == ("skip", "the model has no parameters: nothing to train")

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(8, 8), nn.Linear(8, 3)]

        def forward(self, x):
            return self.layers[1](self.layers[0](x).relu())

    result = check_gradient_flow(Listed())
    assert result.status == "warn" and codes(result) == [("frozen_parameter", "Listed")]


def test_most_of_the_model_frozen(tiny):
    """Frozen blocks under trained embeddings are no usual plan; adapters on a frozen model are; none at all fails."""
    model = tiny.GPT(layers=4)
    model.blocks.requires_grad_(False)
    result = check_gradient_flow(model)
    assert codes(result) == [("frozen_parameter", "blocks.0.mlp.0.weight")] and result.status == "warn"
    assert "only tok, pos, norm, head train" in result.why
    assert check_gradient_flow(model, spec=ModelSpec(frozen=("blocks",))).findings == ()
    model.requires_grad_(False)
    assert codes(check_gradient_flow(model)) == [("frozen_parameter", "TinyGPT")]
    assert check_gradient_flow(model).status == "fail"

    class Adapted(tiny.GPT):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.lora_a, self.lora_b = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, input_ids):
            hidden = self.tok(input_ids)
            return super().forward(input_ids) + self.head(self.lora_b(self.lora_a(hidden)))

    assert check_gradient_flow(Adapted()).findings == ()


class Modes(nn.Module):
    """A classifier that does something else in train mode."""

    def __init__(self, change):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        self.change = change

    def forward(self, x, targets=None):
        x = self.drop(self.body(x))
        return self.head(self.change(x, targets) if self.training else x)


def test_crash_in_train_mode_only():
    """Eval works, training cannot take its first step."""

    def crash(x, targets):
        raise ValueError("deliberate")

    result = check_gradient_flow(Modes(crash))
    assert codes(result) == [("backward_crash", "Modes")] and result.status == "fail"
    assert "a forward pass in train mode raises ValueError: deliberate; in eval mode it works" in result.why


def test_nan_in_train_mode_only():
    """A division by zero that eval mode never meets."""
    result = check_gradient_flow(Modes(lambda x, targets: x / 0))
    assert codes(result) == [("nan_output", "head")] or codes(result) == [("nan_output", "Modes")]
    assert "not finite in train mode" in result.why


def test_gradient_not_finite_in_train_mode_only():
    """The root of zero again, in train mode."""
    result = check_gradient_flow(Modes(lambda x, targets: x + (x - x.detach()).square().sum().sqrt()))
    assert [finding.code for finding in result.findings] == ["exploding_gradient"]
    assert "not finite in train mode" in result.why


def test_train_mode_that_wants_targets_or_returns_more():
    """Labels are given where forward insists on them; another structure of the output is no fault."""

    def wants(x, targets):
        assert targets is not None, "targets should not be none in training"
        return x

    assert check_gradient_flow(Modes(wants)).findings == ()

    class More(Modes):
        def forward(self, x):
            result = super().forward(x)
            return {"logits": result, "side": result * 2} if self.training else result

    assert check_gradient_flow(More(lambda x, targets: x)).findings == ()


def test_backward_that_only_eval_mode_breaks():
    """A cache filled in place in eval mode, as RWKV has: worth a warning, no fault."""

    class Cached(Modes):
        def forward(self, x):
            hidden = torch.exp(self.body(x))
            result = self.head(hidden)
            if not self.training:
                hidden.zero_()
            return result

    result = check_gradient_flow(Cached(None))
    assert result.status == "warn" and [finding.code for finding in result.findings] == ["backward_crash"]
    assert "in train mode it works" in result.why and result.value > 0


def test_all_gradients_zero(tiny):
    """Logits rounded; where they are multiplied by zero the output is constant, which another check reports."""

    class Zero(tiny.GPT):
        def forward(self, input_ids):
            return (super().forward(input_ids) * 10).round()

    result = check_gradient_flow(Zero())
    assert codes(result) == [("zero_gradient", "Zero")] and "gradients are exactly zero" in result.why

    class Constant(tiny.GPT):
        def forward(self, input_ids):
            return super().forward(input_ids) * 0

    assert codes(check_gradient_flow(Constant())) == []


def test_output_not_finite_is_one_finding(tiny):
    """NaN in the logits makes all gradients NaN; only the output is reported, by numerical_stability."""

    class Root(tiny.GPT):
        def forward(self, input_ids):
            return super().forward(input_ids).sqrt()

    assert codes(check_gradient_flow(Root())) == []


def rectified(shift, functional):
    """Two hidden layers with ReLU, the first shifted."""

    class Rectified(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)
            self.relu = torch.relu if functional else nn.ReLU(inplace=True)
            nn.init.constant_(self.a.bias, shift[0])
            nn.init.constant_(self.b.bias, shift[1])

        def forward(self, x):
            x = self.a(x)
            x = x + self.relu(x)
            return self.c(x + self.relu(self.b(x)))

    return Rectified()


@pytest.mark.parametrize("functional", [True, False])
def test_dead_relu(functional):
    """All dead is a fault; a bias below zero that leaves some units alive is none."""
    result = check_gradient_flow(rectified((-1e3, -1e6), functional))
    assert result.status == "fail" and [finding.code for finding in result.findings] == ["dead_relu"]
    assert "ReLUs give zero for every unit" in result.why
    assert check_gradient_flow(rectified((-0.1, -0.1), functional)).findings == ()


def test_one_dead_relu_of_two():
    """The residual path still carries the signal, but the branch will never train."""
    model = tiny_residual()
    result = check_gradient_flow(model)
    assert [(f.code, f.where, f.severity) for f in result.findings] == [("dead_relu", "second.1", "fail")]


def tiny_residual():
    """Two branches with a ReLU each, the second dead."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            self.second = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            self.head = nn.Linear(8, 3)
            nn.init.constant_(self.second[0].bias, -100.0)

        def forward(self, x):
            x = x + self.first(x)
            return self.head(x + self.second(x))

    return Residual()


def test_relu_modules_are_named():
    """A dead ReLU module is reported under its own name; zeros out of a zero layer are no dead ReLU."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    nn.init.constant_(model[0].bias, -100.0)
    assert ("dead_relu", "1") in codes(check_gradient_flow(model))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    assert "dead_relu" not in [code for code, _ in codes(check_gradient_flow(model))]


class Carried(nn.Module):
    """Starts each call in train mode from the state of the last one, with its graph or without."""

    def __init__(self, detach):
        super().__init__()
        self.detach, self.state = detach, None
        self.words, self.rnn, self.head = nn.Embedding(50, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 50)

    def forward(self, input_ids):
        fits = self.training and self.state is not None and self.state.shape[1] == len(input_ids)
        x, state = self.rnn(self.words(input_ids), self.state if fits else None)
        if self.training:
            self.state = state.detach() if self.detach else state
        return self.head(x)


def test_graph_of_the_last_call():
    result = check_gradient_flow(Carried(detach=False))
    crash = next(finding for finding in result.findings if finding.code == "backward_crash")
    assert (crash.severity, crash.where) == ("fail", "Carried")
    assert "second backward pass" in crash.message
    assert "backward_crash" not in codes(check_gradient_flow(Carried(detach=True)))
