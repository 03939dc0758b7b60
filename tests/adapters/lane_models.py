"""Small models whose lanes are known, in the ways in which people write them, and what tests ask of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from utils.adapters import ModelAdapter
from utils.adapters.lanes import LaneGroup


class Convolutions(nn.Module):
    """Channels are flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6 * 4 * 4, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.first(pixel_values))), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.second(x)), 4)
        out: Tensor = self.head(x.view(x.size(0), -1))
        return out


class Residual(nn.Module):
    """A block of a ResNet; where the width changes, a convolution makes the shortcut."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(width, wider, 3, 2 if wider > width else 1, 1, bias=False),
            nn.BatchNorm2d(wider),
        )
        self.conv2, self.bn2 = nn.Conv2d(wider, wider, 3, 1, 1, bias=False), nn.BatchNorm2d(wider)
        self.down = nn.Conv2d(width, wider, 1, 2, bias=False) if wider > width else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        inner += x if self.down is None else self.down(x)
        return F.relu(inner)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(Residual(6, 6), Residual(6, 10), Residual(10, 10))
        self.head = nn.Linear(10, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.stem(pixel_values)).mean((2, 3)))
        return out


class Separable(nn.Module):
    """Depthwise convolutions, one of them with two filters per channel, a squeeze and excitation, and up-sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point, self.twofold = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 10, 3, padding=1, groups=5)
        self.squeeze, self.excite = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.up, self.act, self.head = nn.ConvTranspose2d(10, 7, 2, 2), nn.PReLU(7), nn.Linear(7, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.twofold(F.silu(self.point(F.relu6(self.depth(self.stem(pixel_values))))))
        x = x * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        x = self.act(self.up(F.interpolate(x, scale_factor=2)))
        out: Tensor = self.head(x.flatten(2).mean(-1))
        return out


class Mixer(nn.Module):
    """Patches are mixed along the channels and along the places."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.places = nn.Sequential(nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16))
        self.channels = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = x + self.places(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


class Root(nn.Module):
    """RMSNorm written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class Centred(nn.Module):
    """LayerNorm written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight + self.bias


class Layer(nn.Module):
    def __init__(self, width: int, norm: Any, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.gated = norm(width), norm(width), gated
        self.q, self.kv, self.o = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 22 * 2 if gated else 22, bias=False), nn.Linear(22, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(h), *self.kv(h).chunk(2, -1)))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.up(self.norm2(x))
        if self.gated:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h)
        return x + self.down(h)


class Decoder(nn.Module):
    """A pre-norm transformer with a tied head."""

    def __init__(self, norm: Any = nn.LayerNorm, gated: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(30, 8), nn.Parameter(torch.randn(1, 64, 8))
        self.layers = nn.ModuleList(Layer(8, norm, gated) for _ in range(2))
        self.norm, self.head = norm(8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places[:, : input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


class Between(nn.Module):
    """Two linear layers with some operation between them; `inner` gets the hidden lanes."""

    def __init__(self, inner: Any, hidden: int = 8, after: int = 8, parts: Any = None) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(6, hidden), nn.Linear(after, 4), inner
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out: Tensor = self.last(self.inner(hidden) if self.parts is None else self.inner(hidden, self.parts))
        return out


def adapted(model: Any) -> ModelAdapter:
    torch.manual_seed(0)
    return ModelAdapter(model() if callable(model) and not isinstance(model, nn.Module) else model)


def free(groups: list[LaneGroup]) -> list[LaneGroup]:
    return [group for group in groups if group.fixed is None]


def named(groups: list[LaneGroup], name: str, axis: int) -> LaneGroup:
    """Return the one group with this axis."""
    (found,) = [group for group in groups if any((m.name, m.axis) == (name, axis) for m in group.members)]
    return found


def places(group: LaneGroup) -> set[tuple[str, int, str, int, int]]:
    return {(m.name, m.axis, m.role, m.repeat, m.offset) for m in group.members}


def grown_change(adapter: ModelAdapter, group: LaneGroup, more: int = 3) -> float:
    """Add lanes that are written at random and read with zeros to a group without norms; return the change."""
    torch.manual_seed(1)
    module = adapter.module.double().eval()
    inputs = adapter.example_inputs(2)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        before = adapter.logits(inputs)
        wide: dict[str, Tensor] = {}
        ends = sorted(((offset + repeat * group.size, *rest, repeat) for *rest, repeat, offset in group.places))
        # From the last place on, so that the places before stay where they are.
        for end, name, axis, repeat in reversed(ends):
            tensor = wide.get(name, tensors[name])
            size = [*tensor.shape]
            size[axis] = repeat * more
            reader = any((m.name, m.axis, m.role) == (name, axis, "reader") for m in group.members)
            new = torch.zeros(size, dtype=tensor.dtype) if reader else torch.rand(size, dtype=tensor.dtype)
            parts = tensor.narrow(axis, 0, end), new, tensor.narrow(axis, end, tensor.shape[axis] - end)
            wide[name] = torch.cat(parts, axis)
        after = functional_call(module, wide, tuple(inputs.values()))
    return float((after - before).abs().max() / before.abs().max())
