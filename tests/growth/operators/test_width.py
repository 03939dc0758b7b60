import math

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.edits import GrowthRefusedError, Number, Scale, Widen
from utils.growth.growing import grow
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.transaction import grow_by
from utils.training.weight_average import WeightAverage


def perturbed(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return module.eval()


class RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        return self.gain * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Residual(nn.Module):
    """A pre-norm stream of two blocks whose code takes its sizes from the tensors, with a tied head."""

    def __init__(self, norm, width=12):
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, width) for _ in range(2))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids):
        x = self.table(input_ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.nn.functional.gelu(up(norm(x))))
        return self.head(self.norms[2](x))


@pytest.mark.parametrize("norm", [RMS, nn.LayerNorm, nn.RMSNorm], ids=["rms by hand", "layer", "rms"])
def test_the_residual_stream_grows_under_norms_and_a_tied_table_once(norm):
    model = perturbed(Residual(norm))
    if norm is nn.RMSNorm:
        for each in model.norms:
            each.eps = 1e-6
    tokens = torch.randint(0, 20, (3, 7))
    before = model.double()(tokens)
    event = grow(model, "residual", 5, inputs={"input_ids": tokens})
    assert event.certificate.double_difference < 1e-9
    assert torch.allclose(model(tokens), before, rtol=0, atol=1e-9)
    assert model.table.weight is model.head.weight
    assert model.table.weight.shape == (20, 17)
    assert model.table.embedding_dim == model.head.in_features == 17
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert (model.table.weight[:, 12:] != start["table.weight"][:, 12:]).any()
    assert (model.down[0].weight[12:] != start["down.0.weight"][12:]).any()


def test_gain_and_epsilon_take_back_what_more_lanes_do_to_a_norm():
    plan = plan_growth(ModelAdapter(Residual(RMS)), Request("residual", 12))
    scales = [edit for edit in plan.edits if isinstance(edit, Scale)]
    assert [edit.name for edit in scales] == ["norms.0.gain", "norms.1.gain", "norms.2.gain"]
    assert all(edit.factor == math.sqrt(12 / 24) for edit in scales)
    epsilons = [edit for edit in plan.edits if isinstance(edit, Number) and edit.path == ("eps",)]
    assert [edit.after for edit in epsilons] == [5e-7] * 3
    fills = {edit.name: edit.fill for edit in plan.edits if isinstance(edit, Widen) and edit.axis == 0}
    assert fills["down.0.weight"] == fills["down.0.bias"] == "zero"


def test_hidden_layers_and_channels_grow_with_their_batch_norm():
    model = perturbed(nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 6 * 6, 5),
    ))  # fmt: skip
    spec = ModelSpec(example_inputs={"input": torch.randn(4, 1, 8, 8)}, task="image_classification")
    images = torch.randn(5, 1, 8, 8)
    before = model(images)
    event = grow(model, "channels", 3, where="0", spec=spec)
    assert event.plan.before == 4
    assert torch.allclose(model(images), before, atol=1e-5)
    assert model[0].weight.shape == (7, 1, 3, 3)
    assert model[1].running_var.shape == (7,)
    assert (model[1].running_var > 0).all()
    assert (model[1].num_features, model[3].in_channels) == (7, 7)
    # Channels that are flattened into a linear layer bring all of their positions.
    grow(model, "channels", 2, where="3", spec=spec)
    assert model[6].weight.shape == (5, 8 * 6 * 6)
    assert model[6].in_features == 8 * 6 * 6
    assert torch.allclose(model(images), before, atol=1e-5)


def test_without_a_name_the_lanes_with_the_most_weights_grow():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2))
    event = grow(model, "channels", to=44, spec=ModelSpec(example_inputs={"input": torch.randn(4, 3)}))
    assert (event.plan.before, event.plan.after) == (40, 44)
    assert event.plan.where == ("2", "4")


@pytest.mark.parametrize(
    ("model", "operator", "where", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2)), "channels", None, "There are no lanes that channels could widen"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "residual", None,
         "Expected features that one layer makes and another reads, with norms across them"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "channels", "2",
         "cannot change in number"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)), "residual",
         None, "has no gain"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), "residual", None, "group"),
    ],
)  # fmt: skip
def test_what_cannot_widen_is_refused_with_the_reason(model, operator, where, words):
    with pytest.raises(GrowthRefusedError, match=words):
        grow(model(), operator, 2, where=where, spec=ModelSpec(example_inputs={"input": torch.randn(4, 3)}))


def test_a_post_norm_stream_is_refused():
    class Post(Residual):
        def forward(self, input_ids):
            x = self.table(input_ids)
            for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
                x = norm(x + down(torch.nn.functional.gelu(up(x))))
            return self.head(self.norms[2](x))

    model = perturbed(Post(nn.LayerNorm))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(GrowthRefusedError, match="does not keep the function: the output changes"):
        grow(model, "residual", 5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_code_that_computes_the_size_of_a_head_from_the_width_is_refused():
    loaded = utils.load_model("example:gpt", config={"d_model": 16, "nhead": 2, "num_layers": 1, "vocab_size": 50,
                                                     "max_seq_len": 16})  # fmt: skip
    with pytest.raises(GrowthRefusedError, match="RuntimeError: shape"):
        utils.grow(loaded, "residual", 4)


class OnePlus(RMS):
    """A norm whose gain is added to one, as Gemma's is."""

    def __init__(self, width):
        super().__init__(width)
        nn.init.zeros_(self.gain)

    def forward(self, x):
        return (1 + self.gain) * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def test_a_gain_that_is_added_to_one_is_scaled_around_minus_one():
    model = perturbed(Residual(OnePlus)).double()
    tokens = torch.randint(0, 20, (3, 7))
    before = model(tokens)
    plan = plan_growth(ModelAdapter(model), Request("residual", 4))
    assert {edit.around for edit in plan.edits if isinstance(edit, Scale)} == {-1.0}
    grow(model, "residual", 4)
    assert torch.allclose(model(tokens), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [nn.LayerNorm, OnePlus])
def test_an_average_of_the_weights_keeps_its_function_too(norm):
    model = perturbed(Residual(norm)).double()
    tokens = torch.randint(0, 20, (3, 7))
    average = WeightAverage(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        average.update()
    with average.applied():
        before = model(tokens)
    adapter = ModelAdapter(model)
    grow_by(adapter, plan_growth(adapter, Request("residual", 4)), {"input_ids": tokens}, None, average.migrate)
    with average.applied():
        after = model(tokens)
    assert not torch.allclose(model(tokens), after)
    assert torch.allclose(after, before, rtol=0, atol=1e-9)
