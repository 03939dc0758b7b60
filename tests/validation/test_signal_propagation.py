"""Gradients by depth and time, and skip connections, on models with one fault and on sound ones that look like them."""

import itertools
import math

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.runner import run_check
from utils.validation.signal_propagation import bottlenecks, check_signal_propagation, gradient_by_depth


def check(model, config=None):
    return run_check(ModelAdapter(model, config), Check("signal", 1, "?", check_signal_propagation), 20.0)


def codes(result):
    return [(finding.code, finding.where, finding.severity) for finding in result.findings]


def plain(depth, activation, width=32, norm=None):
    layers = [nn.Linear(8, width)]
    for _ in range(depth):
        layers += [activation(), *([norm(width)] if norm else []), nn.Linear(width, width)]
    return nn.Sequential(*layers, activation(), nn.Linear(width, 4))


class Branches(nn.Module):
    """Pre-norm block whose skip connections, and whose scale of branches, can be chosen."""

    def __init__(self, width=16, skip=(True, True), scale=None, parallel=False, post=False, factor=1.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.full((width,), scale)) if scale is not None else 1.0
        self.skip, self.parallel, self.post, self.factor = skip, parallel, post, factor

    def attend(self, x):
        return self.attn(x, x, x, need_weights=False)[0]

    def forward(self, x):
        if self.post:
            x = self.norm1(x * self.skip[0] + self.attend(x))
            return self.norm2(x * self.skip[1] + self.mlp(x))
        if self.parallel:
            return x + self.attend(self.norm1(x)) + self.mlp(self.norm2(x))
        x = x * self.skip[0] + self.scale * self.attend(self.norm1(x))
        return (x * self.skip[1] + self.scale * self.mlp(self.norm2(x))) * self.factor


class Encoder(nn.Module):
    """Token ids in, scores over the vocabulary out."""

    def __init__(self, depth=3, faulty=(), **options):
        super().__init__()
        sound = {key: value for key, value in options.items() if key not in ("skip",)} if faulty else options
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Branches(**(options if i in faulty or not faulty else sound)) for i in range(depth))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 50)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Convolutions(nn.Module):
    """Blocks of convolutions; the model, not the block, adds the skip connection."""

    def __init__(self, skipping):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in skipping)
        self.skipping, self.config = skipping, {"image_size": 16}

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        for stage, skip in zip(self.stages, self.skipping, strict=True):
            x = x + stage(x) if skip else stage(x)
        return self.head(x.mean((2, 3)))


class Apart(nn.Module):
    """Attention and feed-forward parts in two lists."""

    def __init__(self, skip):
        super().__init__()
        self.embed, self.head, self.skip = nn.Embedding(50, 16), nn.Linear(16, 50), skip
        self.attn = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            x = x * self.skip[0] + attn(x, x, x, need_weights=False)[0]
            x = x * self.skip[1] + mlp(x)
        return self.head(x)


class Loop(nn.Module):
    """A recurrent network written by hand, with a chosen gain of its recurrent matrix."""

    def __init__(self, gain, width=32):
        super().__init__()
        self.embed, self.enter = nn.Embedding(50, width), nn.Linear(width, width)
        self.again, self.head = nn.Linear(width, width, bias=False), nn.Linear(width, 50)
        nn.init.normal_(self.again.weight, std=gain / math.sqrt(width))

    def forward(self, input_ids):
        x = self.enter(self.embed(input_ids))
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] + self.again(h))
            states.append(h)
        return self.head(torch.stack(states, 1))


@pytest.mark.parametrize(
    "model", [lambda: plain(12, nn.Sigmoid), lambda: plain(30, nn.Tanh), lambda: plain(20, nn.ReLU)]
)
def test_vanishing_gradient(model):
    """Default weights and no skip connections: a sigmoid layer passes about 0.14 of the gradient, tanh 0.58."""
    result = check(model())
    assert codes(result) == [("vanishing_gradient", "0", "fail")] and "arrives" in result.why
    assert result.findings[0].reproduction


def test_one_step_that_swallows_the_gradient_is_named():
    """Six orders of magnitude are lost in one place."""

    class Dimmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            return self.linear(x) * 1e-7

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Dimmed(), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    assert codes(check(model)) == [("vanishing_gradient", "2", "fail")]


def test_exploding_gradient_by_depth():
    """Each block multiplies the stream by four, so the early gradient is four times the later one, block by block."""
    result = check(Encoder(depth=9, factor=4.0))
    assert [(f.code, f.severity) for f in result.findings] == [("exploding_gradient", "fail")]
    assert result.findings[0].where == "blocks.0" and "it grows" in result.why


def test_exploding_gradient_by_time():
    """A recurrent matrix far beyond a spectral radius of one makes the loop chaotic; one below does not."""
    result = check(Loop(3.0), {"max_position_embeddings": 128})
    assert codes(result) == [("exploding_gradient", "Loop", "fail")] and "back in time" in result.why
    assert check(Loop(0.8), {"max_position_embeddings": 128}).findings == ()


SOUND = {
    "post-norm": lambda: Encoder(12, post=True),
    "layer scale": lambda: Encoder(12, scale=1e-5),
    "rezero": lambda: Encoder(6, scale=0.0),
    "parallel": lambda: Encoder(3, parallel=True),
    "batch norm": lambda: plain(10, nn.ReLU, norm=nn.BatchNorm1d),
    "layer norm": lambda: plain(20, nn.ReLU, norm=nn.LayerNorm),
    "shallow": lambda: plain(2, nn.Sigmoid),
    "plain convolutions": lambda: Convolutions([False] * 4),
    "residual convolutions": lambda: Convolutions([True] * 4),
    "lists": lambda: Apart((True, True)),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models(name):
    """Deep models whose branches, norms or shape keep the gradient whole."""
    torch.manual_seed(1)
    assert check(SOUND[name]()).findings == ()


FAULTS = {
    "whole block": (lambda: Encoder(skip=(False, False)), "blocks.0", "3 of 3"),
    "attention": (lambda: Encoder(skip=(False, True)), "blocks.0", "around attn"),
    "feed-forward": (lambda: Encoder(skip=(True, False)), "blocks.0", "around mlp"),
    "post-norm": (lambda: Encoder(skip=(True, False), post=True), "blocks.0", "around mlp"),
    "one of four": (lambda: Encoder(4, faulty=(2,), skip=(True, False)), "blocks.2", "1 of 4"),
    "one convolution": (lambda: Convolutions([True, True, False, True]), "stages.2", "1 of 4"),
    "list of attention": (lambda: Apart((False, True)), "Apart", "3 of 3"),
    "list of feed-forward": (lambda: Apart((True, False)), "Apart", "3 of 3"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_missing_residual(name):
    """A block, or one half of it, that nothing leads around."""
    build, where, said = FAULTS[name]
    result = check(build())
    assert codes(result) == [("missing_residual", where, "fail")] and said in result.why


def test_reproduction_shows_the_fault():
    """The pasted lines make the logits of a copy the same for any input; the model keeps its own."""
    model = Encoder(skip=(False, True))
    names = {"model": model}
    exec(check(model).findings[0].reproduction, names)
    first, second = (names["trial"](torch.full((1, 5), token)) for token in (3, 7))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    first, second = (model(torch.full((1, 5), token)) for token in (3, 7))
    assert (first - second).abs().max() > 0.01


def test_residual_of_only_one_stream():
    """An encoder block without skip connections is found although the decoder's own tokens reach the logits."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
            self.encoder = nn.ModuleList(Branches(skip=(False, False)) for _ in range(2))
            self.cross = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, input_ids, decoder_input_ids):
            source, target = self.embed(input_ids), self.embed(decoder_input_ids)
            for block in self.encoder:
                source = block(source)
            return self.head(target + self.cross(target, source, source)[0])

    assert codes(check(Both())) == [("missing_residual", "encoder.0", "fail")]


def test_bottlenecks_of_a_graph():
    """Of a chain every node is one; of a branch around it, none inside."""
    x = torch.ones(3, requires_grad=True)
    a = x * 2
    b = a.sin()
    c = a + b
    d = c.exp()
    marked = {tensor.grad_fn: name for name, tensor in {"a": a, "b": b, "c": c, "d": d}.items()}
    assert [marked[node] for node in bottlenecks(d.sum().grad_fn, marked)] == ["a", "c", "d"]
    assert bottlenecks(torch.ones(1, requires_grad=True).sum().grad_fn, marked) == []


def test_gradient_by_depth_matches_autograd():
    """For a chain of linear layers the gradient at each place is the product of the matrices behind it."""
    model = plain(2, nn.Identity).double()
    adapter = ModelAdapter(model)
    _, places = gradient_by_depth(adapter, adapter.example_inputs(2))
    norms = {place.name: place.gradient for place in places}
    x = adapter.example_inputs(2)[adapter.main_input].double()
    hidden = model[:5](x).detach().requires_grad_()
    logits = model[5:](hidden)
    adapter.loss(logits, adapter.random_labels(logits)).backward()
    assert norms["4"] == pytest.approx(float(hidden.grad.norm()), rel=1e-5)


def test_model_without_layers():
    """Nothing to follow."""
    result = check(nn.LayerNorm(8))
    assert result.status == "skip" and "no layers" in result.why


class Centred(nn.Module):
    """Normalises each channel over the picture, and averages what is left over the picture or takes the largest."""

    def __init__(self, mean):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.norm, self.head, self.mean = nn.InstanceNorm2d(16), nn.Linear(16, 5), mean
        self.config = {"image_size": 16}

    def forward(self, pixel_values):
        x = self.norm(self.body(pixel_values))
        return self.head(x.mean((2, 3)) if self.mean else x.amax((2, 3)))


def test_mean_of_what_a_norm_centred():
    """Only rounding is left of the input: that is no gradient that vanishes by degrees."""
    assert codes(check(Centred(True))) == [("constant_output", "norm", "fail")]
    assert check(Centred(False)).findings == ()


class GatedTrunk(nn.Module):
    """All goes through a gate with a given bias, and a norm gives it its scale again."""

    def __init__(self, bias):
        super().__init__()
        self.enter, self.norm, self.head = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        self.gate = nn.Parameter(torch.full((32,), bias))

    def forward(self, x):
        return self.head(self.norm(self.enter(x) * torch.sigmoid(self.gate)))


def test_shut_gate():
    """Two places are enough to see that nothing arrives."""
    assert codes(check(GatedTrunk(-20.0))) == [("vanishing_gradient", "norm", "fail")]
    assert check(GatedTrunk(-3.0)).findings == ()


class Cell(nn.Module):
    """A loop over the rows of a series that calls one layer per row."""

    def __init__(self, gain):
        super().__init__()
        self.enter, self.head = nn.Linear(6, 32), nn.Linear(32, 3)
        self.again = nn.Parameter(torch.randn(32, 32) * gain / math.sqrt(32))

    def forward(self, series):
        h = series.new_zeros(len(series), 32)
        for row in series.unbind(1):
            h = torch.tanh(self.enter(row) + h @ self.again)
        return self.head(h)


@pytest.mark.parametrize(("gain", "expected"), [(4.0, [("exploding_gradient", "Cell", "fail")]), (0.9, [])])
def test_exploding_gradient_by_step(gain, expected):
    """The calls of one layer in a loop are compared, whatever the length of the input may be."""
    torch.manual_seed(0)
    spec = ModelSpec(example_inputs={"series": torch.randn(4, 60, 6)})
    result = run_check(ModelAdapter(Cell(gain), spec=spec), Check("signal", 1, "?", check_signal_propagation), 20.0)
    assert codes(result) == expected


class Unit(nn.Module):
    """Two convolutions that are added to their input."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class PlainUnit(Unit):
    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))))


class Pyramid(nn.Module):
    """Units of two widths under different parents; `odd` names one without a skip connection."""

    def __init__(self, skips=(True, True, True)):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 5)
        a, b, c = (Unit if skip else PlainUnit for skip in skips)
        self.low = nn.Sequential(a(8), b(8))
        self.wider, self.high = nn.Conv2d(8, 16, 3, 2, 1), nn.Sequential(c(16))
        self.config = {"image_size": 16}

    def forward(self, pixel_values):
        return self.head(self.high(self.wider(self.low(self.stem(pixel_values)))).mean((2, 3)))


def test_odd_unit_among_its_kin():
    """Units of the same build elsewhere hint at what was meant; a net of plain units is a design."""
    assert codes(check(Pyramid((True, True, False)))) == [("missing_residual", "high.0", "warn")]
    assert check(Pyramid()).findings == ()
    assert check(Pyramid((False, False, False))).findings == ()


class Lists(nn.Module):
    """Post-norm layers kept as lists of parts; those in `bare` normalise the feed-forward half alone."""

    def __init__(self, bare=()):
        super().__init__()
        self.embed, self.head, self.bare = nn.Embedding(50, 16), nn.Linear(16, 50), bare
        self.attn = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3))
        self.norm1, self.norm2 = (nn.ModuleList(nn.LayerNorm(16) for _ in range(3)) for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(*size) for _ in range(3)) for size in ((16, 32), (32, 16)))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for i, attn in enumerate(self.attn):
            x = self.norm1[i](x + attn(x, x, x, need_weights=False)[0])
            y = self.down[i](torch.relu(self.up[i](x)))
            x = self.norm2[i](y if i in self.bare else x + y)
        return self.head(x)


def test_feed_forward_half_of_a_post_norm_layer():
    """One of three, kept as single layers in lists beside attention."""
    assert codes(check(Lists((1,)))) == [("missing_residual", "up.1", "fail")]
    assert check(Lists()).findings == ()


class Sines(nn.Module):
    """A chain of sines of a frequency, drawn by the default of nn.Linear or as the frequency asks for."""

    def __init__(self, careful, frequency=30.0, width=64, layers=4):
        super().__init__()
        sizes = [2, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last, self.frequency = nn.Linear(width, 3), frequency
        for layer in self.layers if careful else ():
            bound = 0.5 if layer.in_features == 2 else math.sqrt(6 / layer.in_features) / frequency
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return self.last(x)


class Waves(nn.Module):
    """Features of high frequency before a plain net, as radiance fields have them."""

    def __init__(self):
        super().__init__()
        self.net = plain(6, nn.ReLU)
        self.net[0] = nn.Linear(40, 32)

    def forward(self, x):
        waves = x[..., None] * 2.0 ** torch.arange(10) * math.pi
        return self.net(torch.cat([waves.sin(), waves.cos()], -1).flatten(1))


def test_layers_that_part_neighbours():
    """The signal keeps its size while the gradient grows in each layer; one such step, the first, is a choice."""
    torch.manual_seed(0)
    spec = ModelSpec(task="regression", example_inputs={"x": torch.randn(16, 2).tanh()})
    run = Check("signal", 1, "?", check_signal_propagation)
    result = run_check(ModelAdapter(Sines(False), spec=spec), run, 20.0)
    assert codes(result) == [("exploding_gradient", "layers.0", "fail")]
    assert "layer by layer, and the signal does not shrink" in result.why
    for sound in (Sines(True), Waves(), Sines(False, frequency=1.0)):
        assert run_check(ModelAdapter(sound, spec=spec), run, 20.0).status == "pass"
