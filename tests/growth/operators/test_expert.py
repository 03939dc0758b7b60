"""One more expert: closed at first, exact to the bit, used once its number is raised, refused where nothing closes."""

import pytest
import torch
from torch import nn

from tests.growth.toys import Toy, assert_undone, planned, shapes, tensors
from utils.growth.edits import GrowthRefusedError, InsertBlock, Plan
from utils.growth.operators.expert import CLOSED, opening
from utils.growth.surgery import Surgery

WIDTH = 16


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Listed(nn.Module):
    """Experts in a list; a token goes to the two with the highest scores, or to all of them."""

    def __init__(self, bias=True, dense=False):
        super().__init__()
        self.router = nn.Linear(WIDTH, 4, bias=bias)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.count, self.dense = 4, dense

    def forward(self, x):
        scores = self.router(x)
        if self.dense:
            shares = scores.softmax(-1)
        else:
            best, chosen = scores.topk(2)
            shares = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        out = torch.zeros_like(x)
        for number in range(self.count):
            used = shares[..., number] > 0
            if used.any():
                out[used] = out[used] + shares[used][:, number, None] * self.experts[number](x[used])
        return out


class Stacked(nn.Module):
    """Experts as slices of tensors; `chooses` is added to the scores only where experts are chosen."""

    def __init__(self, chooses=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, WIDTH) * 0.3)
        if chooses:
            self.register_buffer("correction", torch.zeros(4))
        self.up = nn.Parameter(torch.randn(4, WIDTH, 24) * 0.2)
        self.down = nn.Parameter(torch.randn(4, 24, WIDTH) * 0.2)
        self.chooses = chooses

    def forward(self, x):
        scores = torch.sigmoid(x @ self.weight.T)
        chosen = (scores + self.correction if self.chooses else scores).topk(2).indices
        shares = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        made = torch.einsum("btd,edh->bteh", x, self.up).tanh()
        return torch.einsum("bteh,ehd,bte->btd", made, self.down, shares)


class MixedBlock(nn.Module):
    def forward(self, x):
        x = x + self.attention(self.n1(x))
        return x + self.mixture(self.n2(x))


def made(make=Listed, **options):
    """Return a model whose blocks have mixtures."""
    model = Toy()
    torch.manual_seed(1)
    for number in range(2):
        block = MixedBlock()
        block.attention, block.n1, block.n2 = (
            getattr(model.blocks[number], name) for name in ("attention", "n1", "n2")
        )
        block.mixture = make(**options)
        model.blocks[number] = block
    return model.eval()


KINDS = {
    "top two of a list": (Listed, {}),
    "all of a list": (Listed, {"dense": True}),
    "slices chosen with a correction": (Stacked, {}),
}


@pytest.mark.parametrize(("make", "options"), KINDS.values(), ids=KINDS)
def test_a_new_expert_changes_nothing_bit_for_bit(make, options):
    model = made(make, **options)
    ids = torch.arange(24).reshape(2, 12)
    known = tensors(model)
    with torch.no_grad():
        before = model(ids)
        plan = planned(model, "expert", amount=1)
        surgery = Surgery(model, plan)
        after = model(ids)
    assert plan.promise == "exact"
    assert torch.allclose(after, before, atol=0 if make is Listed else 1e-6)
    surgery.undo()
    assert_undone(model, known)


@pytest.mark.parametrize(("make", "options"), KINDS.values(), ids=KINDS)
def test_raising_its_number_lets_tokens_arrive(make, options):
    model = made(make, **options)
    plan = planned(model, "expert", amount=1)
    Surgery(model, plan)
    assert [place for _, place in opening(plan)] == [4, 4]
    held = dict((*model.named_parameters(), *model.named_buffers()))
    for name, place in opening(plan):
        assert held[name][place] == CLOSED
        held[name].data[place] = 5.0
    model(torch.arange(24).reshape(2, 12)).square().mean().backward()
    mixture = model.blocks[0].mixture
    last = mixture.experts[4].down.weight.grad if make is Listed else mixture.down.grad[4]
    assert last.abs().sum() > 0


def test_the_new_expert_is_a_copy_of_the_busiest():
    model = made()
    with torch.no_grad():
        for block in model.blocks:
            block.mixture.router.bias[2] += 10.0
    plan = planned(model, "expert", amount=1, where=0)
    assert plan.where == ("blocks.0.mixture",)
    insert = next(edit for edit in plan.edits if isinstance(edit, InsertBlock))
    assert (insert.source, insert.index) == (2, 4)
    assert plan.reasons[-1].startswith("a copy of expert 2 of blocks.0.mixture")
    Surgery(model, plan)
    mixture = model.blocks[0].mixture
    assert torch.equal(mixture.experts[4].up.weight, mixture.experts[2].up.weight)
    assert mixture.experts[4].up.weight is not mixture.experts[2].up.weight
    assert torch.equal(mixture.router.weight[4], mixture.router.weight[2])


def test_numbers_that_count_experts_follow():
    model = made()
    Surgery(model, planned(model, "expert", amount=2))
    assert [(block.mixture.count, block.mixture.router.out_features) for block in model.blocks] == [(6, 6), (6, 6)]


def test_a_replay_gives_the_same_names_and_shapes():
    first, second = made(), made()
    plan = planned(first, "expert", amount=1)
    Surgery(first, plan)
    Surgery(second, Plan.from_dict(plan.to_dict()))
    assert shapes(first) == shapes(second)


def test_a_router_without_a_number_per_expert_is_refused():
    for model in (made(bias=False), made(bias=False, dense=True), made(Stacked, chooses=False)):
        with pytest.raises(GrowthRefusedError, match="nothing keeps a new expert from displacing another"):
            planned(model, "expert", amount=1)


def test_a_vector_that_does_not_choose_is_refused():
    class Scaled(Listed):
        def __init__(self):
            super().__init__(bias=False)
            self.temper = nn.Parameter(torch.ones(4))

        def forward(self, x):
            scores = self.router(x)
            best, chosen = scores.topk(2)
            shares = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1)) * self.temper
            return sum(shares[..., n, None] * self.experts[n](x) for n in range(len(self.experts)))

    with pytest.raises(GrowthRefusedError, match="No expert can be added to blocks.0.mixture"):
        planned(made(Scaled), "expert", amount=1)


def test_what_is_no_mixture_is_refused():
    with pytest.raises(GrowthRefusedError, match="There is no mixture of experts"):
        planned(Toy(), "expert", amount=1)
    with pytest.raises(GrowthRefusedError, match=r"There is no mixture of experts in 'head'. Expected one of blocks.0"):
        planned(made(), "expert", amount=1, where="head")
    with pytest.raises(GrowthRefusedError, match="Block 9 was asked for, and there are 2"):
        planned(made(), "expert", amount=1, where=9)
    with pytest.raises(GrowthRefusedError, match="expert was to grow to 4, and the model has 4 experts"):
        planned(made(), "expert", to=4)


def test_mixtures_of_different_sizes_are_named_one_by_one():
    model = made()
    mixture = model.blocks[1].mixture
    mixture.experts.append(Expert())
    mixture.router = nn.Linear(WIDTH, 5)
    mixture.count = 5
    with pytest.raises(GrowthRefusedError, match="The mixtures have 4, 5 experts"):
        planned(model, "expert", amount=1)
    assert planned(model, "expert", amount=1, where="blocks.1").after == 6


@pytest.mark.parametrize(("kind", "grows"), [("gpt_oss", True), ("mixtral", False)])
def test_mixtures_of_others_are_certified_or_refused(kind, grows):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=37, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if not grows:
        with pytest.raises(GrowthRefusedError, match="has no number of its own for each expert"):
            planned(model, "expert", amount=1)
        return
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        Surgery(model, planned(model, "expert", amount=1))
        assert torch.allclose(model(ids).logits, before, atol=1e-6)
    assert model.config.num_local_experts == 5
