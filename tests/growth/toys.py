"""Small transformers whose parts are laid out as others lay theirs out."""

from types import SimpleNamespace

import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.structure import structure
from utils.growth.operators.depth import plan_depth
from utils.growth.operators.expert import plan_expert
from utils.growth.operators.feed_forward import plan_feed_forward
from utils.growth.operators.heads import plan_heads
from utils.growth.operators.vocabulary import plan_classes, plan_vocabulary
from utils.growth.request import Request
from utils.growth.scratch import Scratch
from utils.growth.surgery import Surgery

PLANNERS = {
    "depth": plan_depth,
    "feed_forward": plan_feed_forward,
    "heads": plan_heads,
    "vocabulary": plan_vocabulary,
    "classes": plan_classes,
    "expert": plan_expert,
}
VOCABULARY = 37
WIDTH = 16


class Attention(nn.Module):
    """Causal attention; `layout` says how the rows of queries, keys and values lie."""

    def __init__(self, layout="apart", heads=4, kv_heads=4, bias=True, config=None, extra=None):
        super().__init__()
        self.layout, self.heads, self.kv_heads, self.head_dim = layout, heads, kv_heads, 4
        if config is not None:
            self.config = config
        rows = 4 * heads, 4 * kv_heads
        if layout in ("apart", "strided", "written"):
            self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=bias) for n in (rows[0], rows[1], rows[1]))
        else:
            self.qkv = nn.Linear(WIDTH, rows[0] + 2 * rows[1], bias=bias)
        self.out = nn.Linear(4 * heads, WIDTH, bias=bias)
        if extra == "temperature":
            self.temperature = nn.Parameter(torch.linspace(0.5, 1.5, heads).reshape(heads, 1, 1))
        if extra == "norm":
            self.whole = nn.LayerNorm(rows[0])
        self.extra = extra

    def parts(self, x):
        batch, length, _ = x.shape
        kv_heads = self.kv_heads if self.config_heads is None else self.config_heads
        if self.layout in ("apart", "written"):
            q = self.q(x)
            q = self.whole(q) if self.extra == "norm" else q
            heads = 4 if self.layout == "written" else -1
            made = (q, self.k(x), self.v(x))
            return [part.view(batch, length, heads, self.head_dim).transpose(1, 2) for part in made]
        if self.layout == "strided":
            made = (self.q(x), self.k(x), self.v(x))
            return [part.view(batch, length, self.head_dim, self.heads).permute(0, 3, 1, 2) for part in made]
        whole = self.qkv(x)
        if self.layout == "fused":
            sizes = self.heads * 4, kv_heads * 4, kv_heads * 4
            return [part.view(batch, length, -1, 4).transpose(1, 2) for part in whole.split(sizes, -1)]
        each = self.heads // kv_heads
        whole = whole.view(batch, length, kv_heads, each + 2, 4)
        q = whole[:, :, :, :each].reshape(batch, length, -1, 4)
        return [part.transpose(1, 2) for part in (q, whole[:, :, :, each], whole[:, :, :, each + 1])]

    @property
    def config_heads(self):
        return getattr(getattr(self, "config", None), "kv_heads", None)

    def forward(self, x):
        q, k, v = self.parts(x)
        each = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        scores = q @ k.transpose(-2, -1) / 2.0
        if self.extra == "temperature":
            scores = scores * self.temperature
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward pair, pre-norm or post-norm."""

    def __init__(self, post=False, hidden=24, gate=False, index=0, **options):
        super().__init__()
        self.post, self.index = post, index
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(**options)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.gate = nn.Linear(WIDTH, hidden) if gate else None

    def feed_forward(self, x):
        hidden = torch.tanh(self.up(x)) if self.gate is None else self.up(x) * torch.sigmoid(self.gate(x))
        return self.down(hidden)

    def forward(self, x):
        if self.post:
            x = self.n1(x + self.attention(x))
            return self.n2(x + self.feed_forward(x))
        x = x + self.attention(self.n1(x))
        return x + self.feed_forward(self.n2(x))


class Toy(nn.Module):
    """A language model, or a classifier where `classes` is given."""

    def __init__(self, blocks=2, tied=False, bias=True, classes=None, padding=None, head=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=VOCABULARY, n_layer=blocks, num_labels=classes, kv_heads=None)
        self.vocab_size, self.num_classes = VOCABULARY, classes
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.places = nn.Parameter(torch.randn(64, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(index=number, **options) for number in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes or VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter += torch.randn(parameter.shape) * 0.1

    def forward(self, input_ids, labels=None):
        x = self.tokens(input_ids) + self.places[: input_ids.shape[1]]
        for number in range(self.config.n_layer):
            x = self.blocks[number](x)
        x = self.norm(x)
        logits = self.head(x.mean(1) if self.num_classes else x)
        if labels is None:
            return logits
        size = self.config.num_labels or self.config.vocab_size
        return nn.functional.cross_entropy(logits.reshape(-1, size), labels.reshape(-1)), logits


def adapted(model, task=None):
    """Return an adapter; a model with `num_classes` is a classifier."""
    task = task or ("text_classification" if getattr(model, "num_classes", None) else "causal_lm")
    return ModelAdapter(model, spec=ModelSpec(task=task))


def planned(model, operator, task=None, **wish):
    """Return a plan, tried on a copy of the model."""
    adapter = model if isinstance(model, ModelAdapter) else adapted(model, task)
    return PLANNERS[operator](Scratch(adapter), structure(adapter), Request(operator, **wish))


def answer(model, ids=None):
    """Return what a model answers in double precision, in eval mode."""
    twin = model.eval().double()
    ids = torch.arange(24).reshape(2, 12) % VOCABULARY if ids is None else ids
    with torch.no_grad():
        return twin(ids)


def grown(model, operator, task=None, **wish):
    """Let a model in double precision grow; return the plan, the change, and the answers before and after."""
    plan = planned(model, operator, task, **wish)
    before = answer(model)
    surgery = Surgery(model, plan)
    return plan, surgery, before, answer(model)


def tensors(model):
    """Return the parameters and buffers, the very objects, with their values."""
    return {name: (t, t.detach().clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}


def assert_undone(model, known):
    """Check that a model holds the very same tensors with the same bits."""
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert list(now) == list(known)
    for name, (tensor, values) in known.items():
        assert now[name] is tensor
        assert torch.equal(tensor, values)


def shapes(model):
    """Return the names and shapes of all tensors."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}
