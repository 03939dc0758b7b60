"""Weights far too large, all but zero, zero where no gradient will move them; and schemes that are only unusual."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.initialization import check_initialization
from utils.validation.runner import run_check
from utils.validation.weight_scales import weights


def check(model):
    return run_check(ModelAdapter(model), Check("init", 1, "?", check_initialization), 20.0)


def found(model):
    return [(finding.code, finding.where, finding.severity) for finding in check(model).findings]


def redrawn(model, std, name=None):
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and (name is None or key == name):
            nn.init.normal_(parameter, std=std)
    return model


def test_gain_of_a_matrix():
    """Root mean square times the square root of the fan-in, for every kind of layer."""
    model = nn.Sequential(nn.Linear(100, 50), nn.Conv2d(8, 4, 5), nn.LSTM(64, 16), nn.Embedding(1000, 30))
    redrawn(model, 0.5)
    gains = {weight.name: weight.gain for weight in weights(ModelAdapter(model))}
    assert gains["0.weight"] == pytest.approx(5.0, rel=0.05)
    assert gains["1.weight"] == pytest.approx(0.5 * 200**0.5, rel=0.1)
    assert gains["2.weight_ih_l0"] == pytest.approx(4.0, rel=0.1)
    assert gains["3.weight"] == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("std", [1.0, 10.0])
def test_all_weights_too_large(tiny, std):
    """A standard deviation of one or more everywhere."""
    model = redrawn(tiny.GPT(width=32), std)
    assert found(model) == [("exploding_init", "blocks.0.attn.qkv.weight", "fail")]


def test_all_weights_too_small(tiny):
    """A millionth everywhere."""
    for model in (tiny.GPT(width=32), tiny.LSTM(), tiny.MLP()):
        assert [code for code, _, severity in found(redrawn(model, 1e-6)) if severity == "fail"] == ["vanishing_init"]


@pytest.mark.parametrize(("std", "code"), [(10.0, "exploding_init"), (1e-6, "vanishing_init")])
def test_one_matrix_unlike_its_sisters(tiny, std, code):
    """The same matrix of the other blocks shows what was meant."""
    model = redrawn(tiny.GPT(layers=4), std, "blocks.2.mlp.0.weight")
    assert found(model) == [(code, "blocks.2.mlp.0.weight", "fail")]


def test_embedding_too_large(tiny):
    """Thirty is no scale for a table."""
    assert found(redrawn(tiny.GPT(), 30.0, "tok.weight"))[0] == ("exploding_init", "tok.weight", "fail")


def test_structure_and_not_weights():
    """Weights of usual scale in blocks that multiply by a constant: no fault of initialisation."""

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(8))

        def forward(self, x):
            for layer in self.layers:
                x = 6 * layer(x)
            return x[:, :4]

    assert found(Loud())[0][0] == "exploding_gradient"


def test_two_zeros_in_a_row_stay(tiny):
    """Both matrices of a branch are zero: each multiplies the other's gradient by zero."""
    model = tiny.GPT()
    for parameter in model.blocks[1].mlp.parameters():
        nn.init.zeros_(parameter)
    result = check(model)
    assert [(f.code, f.where) for f in result.findings] == [("zero_init", "blocks.1.mlp")]
    assert "gradient is exactly zero" in result.why


def test_two_pairs_of_zeros_are_said_at_the_first(tiny):
    """Each block has its pair; what holds both blocks says nothing."""
    model = tiny.GPT()
    for block in model.blocks[:2]:
        for parameter in block.mlp.parameters():
            nn.init.zeros_(parameter)
    assert [(code, where) for code, where, _ in found(model)] == [("zero_init", "blocks.0.mlp")]


class Repeated(nn.Module):
    """A rotation, made `factor` times as long in forward() or in the layer, is applied many times before a layer."""

    def __init__(self, factor, inside=False):
        super().__init__()
        self.enter, self.leave = nn.Linear(32, 32), nn.Linear(32, 4)
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(32, 32))[0])
        self.factor, self.inside = factor, inside
        self.last = nn.Sequential(Times(factor**12), nn.Linear(32, 32)) if inside else nn.Identity()

    def forward(self, x):
        x = self.enter(x)
        for _ in range(12):
            x = x @ self.turn * (1 if self.inside else self.factor)
        return self.leave(self.last(x))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_code_that_makes_the_signal_loud_is_blamed():
    """The layer that is handed a loud signal is not; the part whose code hands it is."""
    torch.manual_seed(0)
    assert [(c, w) for c, w, _ in found(Repeated(2.0))] == [("exploding_gradient", "Repeated")]
    assert [(c, w) for c, w, _ in found(Repeated(2.0, inside=True))] == [("exploding_gradient", "last")]
    assert found(Repeated(1.0)) == []


def test_zeros_that_move(tiny):
    """Last layers of branches, the head, and gates start at zero in many sound models, also all at once."""
    model = tiny.GPT()
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp[2].weight)
    assert found(model) == []
    nn.init.zeros_(model.head.weight)
    assert found(model) == []


@pytest.mark.parametrize("scheme", [nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_])
def test_usual_schemes(tiny, scheme):
    """What libraries offer passes."""
    torch.manual_seed(0)
    model = tiny.GPT(layers=4, width=32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scheme(module.weight)
    assert not [finding for finding in check(model).findings if finding.severity == "fail"]


class Raw(nn.Module):
    """Matrices of its own, drawn with one, and divided by the root of their fan-in in forward or not."""

    def __init__(self, scaled):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(64, 64))
        self.third, self.scaled = nn.Parameter(torch.randn(64, 8)), scaled

    def forward(self, x):
        for weight in (self.first, self.second, self.third):
            x = torch.relu(x) @ weight * ((2 / weight.shape[0]) ** 0.5 if self.scaled else 1)
        return x


def test_raw_matrices():
    """Without a scale they explode; a scale at run time is as good as one at the start."""
    torch.manual_seed(0)
    spec = ModelSpec(example_inputs={"x": torch.randn(4, 32)})
    for scaled, expected in ((False, ["exploding_init"]), (True, [])):
        adapter = ModelAdapter(Raw(scaled), spec=spec)
        result = run_check(adapter, Check("init", 1, "?", check_initialization), 20.0)
        assert [finding.code for finding in result.findings if finding.severity == "fail"] == expected


class Equalised(nn.Module):
    """A layer drawn with one that scales its matrix itself, or does not, or hides it behind a saturating end."""

    def __init__(self, fan_in, fan_out, how):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(fan_out, fan_in)), nn.Parameter(torch.zeros(fan_out))
        self.how = how

    def forward(self, x):
        if self.how == "unit length":
            return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)
        scale = self.weight.shape[1] ** -0.5 if self.how == "scaled" else 1.0
        result = nn.functional.linear(x, self.weight * scale, self.bias)
        return result.tanh() if self.how == "saturating" else result


class Deep(nn.Module):
    def __init__(self, how, norm, head):
        super().__init__()
        self.layers = nn.ModuleList(Equalised(64 if i else 32, 64, how) for i in range(4))
        self.norm, self.head = norm, Equalised(64, 10, how) if head else nn.Linear(64, 10)

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.2)
            x = nn.functional.rms_norm(x, x.shape[-1:]) if self.norm else x
        return self.head(x)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    ("how", "sound"), [("scaled", True), ("unit length", True), ("plain", False), ("saturating", False)]
)
def test_layers_that_scale_at_run_time(how, sound, head, norm):
    """Judged at the layer: a norm behind it neither hides a fault nor makes one."""
    torch.manual_seed(0)
    codes = [code for code, _, severity in found(Deep(how, norm, head)) if severity == "fail"]
    assert codes == ([] if sound else ["exploding_init"])


@pytest.mark.parametrize(("classes", "std", "severity"), [(10, 1.0, "fail"), (10, 0.1, None), (2, 0.36, "warn")])
def test_head_of_large_numbers(classes, std, severity):
    """Certain of wrong answers before it has seen any; with two classes a scale that stays below three nats warns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, classes, bias=False))
    redrawn(model, std, "3.weight")
    assert [(w, s) for _, w, s in found(model)] == ([("3.weight", severity)] if severity else [])


class GatedBranch(nn.Module):
    """A gate over a branch that ends in a matrix; each may start at zero."""

    def __init__(self, gate=0.0, last=0.0, bias=0.0):
        super().__init__()
        self.enter, self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.gate, self.head = nn.Parameter(torch.full((1,), gate)), nn.Linear(32, 4)
        self.down.weight.data.mul_(last)
        nn.init.constant_(self.down.bias, bias)

    def forward(self, x):
        x = self.enter(x)
        return self.head(x + self.gate * self.down(torch.relu(self.up(x))))


def test_gate_over_a_branch_at_zero():
    """Either zero alone moves with the first step; together neither does, unless a bias is there."""
    torch.manual_seed(0)
    assert found(GatedBranch()) == [("zero_init", "down.weight", "fail")]
    for sound in ({"gate": 1.0}, {"last": 1.0}, {"bias": 0.1}):
        assert found(GatedBranch(**sound)) == []


def test_head_whose_config_states_its_scale(tiny):
    """What a class draws by default is no accident."""

    class Config:
        def __init__(self):
            self.initializer_factor = 1.0

    model = redrawn(tiny.GPT(width=64), 1.0, "head.weight")
    assert ("exploding_init", "head.weight", "fail") in found(model)
    model.config = Config()
    assert "fail" not in [severity for *_, severity in found(model)]


class Zeros(nn.Module):
    """A branch and a last layer from zero, whose output is folded; or a zero in the middle as well."""

    def __init__(self, middle):
        super().__init__()
        self.enter, self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.middle, self.out = nn.Linear(32, 32), nn.Linear(32, 12)
        for layer in (self.down, self.out, *([self.middle] if middle else ())):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.out(torch.relu(self.middle(x))).unflatten(1, (3, 4)).sum(1)


def test_last_layer_and_branch_at_zero():
    """Both move with the first step, whatever the shape of the output; a third zero between them never does."""
    torch.manual_seed(0)
    assert "zero_init" not in [code for code, *_ in found(Zeros(False))]
    assert "zero_init" in [code for code, *_ in found(Zeros(True))]
