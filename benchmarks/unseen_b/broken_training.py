"""Models of which a part never trains, or which break when they are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import broken, initialised


class Denoiser(nn.Module):
    """Autoencoder; the code was detached for a plot and stayed so."""

    def __init__(self, n=64, code=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(n, 48), nn.ReLU(), nn.Linear(48, code))
        self.decoder = nn.Sequential(nn.Linear(code, 48), nn.ReLU(), nn.Linear(48, n))

    def forward(self, x):
        z = self.encoder(x)
        self_code = z.detach()
        return self.decoder(self_code)


class NumpyFeatures(nn.Module):
    """Audio network which takes its filters through numpy."""

    def __init__(self, classes=8):
        super().__init__()
        self.front = nn.Conv1d(1, 24, 9, stride=4)
        self.back = nn.Sequential(nn.Conv1d(24, 32, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.linear = nn.Linear(32, classes)

    def forward(self, waveform):
        spec = torch.tensor(abs(self.front(waveform).detach().cpu().numpy()))
        return self.linear(self.back(torch.log1p(spec)))


class NoGradEmbedding(nn.Module):
    def __init__(self, vocab=96, d=32, classes=4):
        super().__init__()
        self.table = nn.Embedding(vocab, d)
        self.pos = nn.Parameter(torch.randn(1, 80, d) * 0.3)
        self.encoder = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True)
        self.cls = nn.Linear(d, classes)

    def forward(self, input_ids):
        with torch.no_grad():
            x = self.table(input_ids) + self.pos[:, : input_ids.size(1)]
        return self.cls(self.encoder(x).mean(1))


class MoEArgmax(nn.Module):
    """Top-1 mixture of experts: the gate's choice is used, its weight is not, so that the router never learns."""

    def __init__(self, n_in=16, d=32, experts=3, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(n_in, d), nn.ReLU())
        self.router = nn.Linear(d, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d)) for _ in range(experts))
        self.head = nn.Linear(d, classes)

    def forward(self, x):
        h = self.stem(x)
        choice = F.one_hot(self.router(h).argmax(-1), len(self.experts)).to(h.dtype)
        stacked = torch.stack([e(h) for e in self.experts], dim=1)
        return self.head(h + (choice.unsqueeze(-1) * stacked).sum(1))


class OneFrozenLayer(nn.Module):
    """MLP-Mixer like; requires_grad is switched off for a single weight in the middle by a leftover."""

    def __init__(self, tokens=16, d=32, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, d, 8, 8)
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.token_mix = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.channel_mix = nn.Sequential(nn.Linear(d, 64), nn.GELU(), nn.Linear(64, d))
        self.head = nn.Linear(d, classes)
        self.channel_mix[0].weight.requires_grad = False

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = x + self.token_mix(self.n1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channel_mix(self.n2(x))
        return self.head(x.mean(1))


def half_frozen_gpt():
    """The loop which should freeze nothing but a buffer froze all parameters whose name contains 'attn.v'."""
    model = QKV()
    for name, p in model.named_parameters():
        if ".v." in name:
            p.requires_grad_(False)
    return model


class Attn(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class QKV(nn.Module):
    def __init__(self, vocab=80, d=32):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.attns = nn.ModuleList(Attn(d) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.out = nn.Linear(d, vocab, bias=False)
        initialised(self)

    def forward(self, tokens):
        x = self.emb(tokens) + self.pos.weight[: tokens.size(1)]
        for norm, attn in zip(self.norms, self.attns, strict=False):
            x = x + attn(norm(x))
        return self.out(self.norms[-1](x))


class ScalarFrozen(nn.Module):
    """Parameter made from the output of a function under no_grad with requires_grad=False."""

    def __init__(self, n=13, d=40):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(n, d) / n**0.5)
        self.b1 = nn.Parameter(torch.zeros(d))
        self.w2 = nn.Parameter(torch.randn(d, d) / d**0.5, requires_grad=False)
        self.b2 = nn.Parameter(torch.zeros(d))
        self.w3 = nn.Parameter(torch.randn(d, 1) / d**0.5)

    def forward(self, x):
        h = torch.tanh(x @ self.w1 + self.b1)
        h = torch.tanh(h @ self.w2 + self.b2)
        return (h @ self.w3).squeeze(-1)


class LeftoverBranch(nn.Module):
    """ResNet: the shortcut convolution is built and the identity is used."""

    def __init__(self, c=16, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.shortcut = nn.Conv2d(c, c, 1)
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        x = self.stem(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(out + x).mean((2, 3)))


class OneBlockTwice(nn.Module):
    """Copy and paste: block1 runs twice, block2 never."""

    def __init__(self, vocab=60, d=32):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.lstm1, self.lstm2 = nn.LSTM(d, d, batch_first=True), nn.LSTM(d, d, batch_first=True)
        self.dense = nn.Linear(d, 3)

    def forward(self, words):
        x = self.embed(words)
        x, _ = self.lstm1(x)
        x, _ = self.lstm1(x)
        return self.dense(x[:, -1])


class AffineForgotten(nn.Module):
    """A learned temperature and a bias are declared; the functional layer norm is called without them."""

    def __init__(self, n=24, d=32, classes=7):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n, d), nn.Linear(d, classes)
        self.gamma, self.beta = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        h = F.layer_norm(self.fc1(x), (32,))
        return self.fc2(F.gelu(h))


class ListOfLayers(nn.Module):
    def __init__(self, n=20, d=32, depth=3, classes=4):
        super().__init__()
        self.inp = nn.Linear(n, d)
        self.hidden = [nn.Linear(d, d) for _ in range(depth)]
        self.out = nn.Linear(d, classes)

    def forward(self, x):
        x = torch.relu(self.inp(x))
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.out(x)


class DictOfHeads(nn.Module):
    def __init__(self, vocab=66, d=32):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.gru = nn.GRU(d, d, batch_first=True)
        self.heads = {"topic": nn.Linear(d, 5), "mood": nn.Linear(d, 3)}

    def forward(self, input_ids):
        h = self.gru(self.emb(input_ids))[1][-1]
        return {name: head(h) for name, head in self.heads.items()}


class RawTensor(nn.Module):
    """LoRA by hand: the two factors are tensors with requires_grad instead of parameters."""

    def __init__(self, n=28, d=32, rank=4, classes=6):
        super().__init__()
        self.base, self.head = nn.Linear(n, d), nn.Linear(d, classes)
        self.lora_a = torch.randn(n, rank).mul(n**-0.5).requires_grad_()
        self.lora_b = torch.randn(rank, d).mul(0.1).requires_grad_()

    def forward(self, x):
        return self.head(F.relu(self.base(x) + x @ self.lora_a @ self.lora_b))


class LazyHead(nn.Module):
    """The classifier is made at the first call, after the optimizer."""

    def __init__(self, classes=10):
        super().__init__()
        self.classes = classes
        self.conv = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.fc = None

    def forward(self, x):
        x = self.conv(x).flatten(1)
        if self.fc is None:
            self.fc = nn.Linear(x.size(1), self.classes)
        return self.fc(x)


class LazyPositions(nn.Module):
    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.d = d
        self.emb = nn.Embedding(vocab, d)
        self.enc = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True)
        self.fc = nn.Linear(d, 4)

    def forward(self, input_ids):
        if not hasattr(self, "pos"):
            self.pos = nn.Parameter(torch.randn(128, self.d))
        return self.fc(self.enc(self.emb(input_ids) + self.pos[: input_ids.size(1)]).mean(1))


class LazyModules(nn.Module):
    """LazyLinear which nobody ran once before making the optimizer."""

    def __init__(self, classes=10):
        super().__init__()
        self.c1, self.c2 = nn.LazyConv2d(8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.fc = nn.LazyLinear(classes)

    def forward(self, x):
        x = self.c2(torch.relu(self.c1(x))).relu()
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class InplaceSigmoid(nn.Module):
    """An in-place product over the output of a sigmoid, which its gradient needs."""

    def __init__(self, n=18, d=32):
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(n, d), nn.Linear(n, d), nn.Linear(d, 5)

    def forward(self, x):
        g = torch.sigmoid(self.gate(x))
        g *= self.value(x)
        return self.out(g)


class InplaceStates(nn.Module):
    """States are written into one tensor which earlier steps still need."""

    def __init__(self, vocab=60, d=24):
        super().__init__()
        self.emb, self.cell, self.head = nn.Embedding(vocab, d), nn.Linear(2 * d, d), nn.Linear(d, vocab)

    def forward(self, tokens):
        x = self.emb(tokens)
        h, ys = torch.zeros_like(x[:, 0]), []
        h = h + 0 * x[:, 0]
        for t in range(x.size(1)):
            h[:] = torch.tanh(self.cell(torch.cat([x[:, t], h], -1)))
            ys.append(self.head(h))
        return torch.stack(ys, 1)


class TwoRegisters(nn.Module):
    """[layer] * depth: one layer, shown several times."""

    def __init__(self, vocab=72, d=32, depth=4):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.pos = nn.Parameter(torch.randn(64, d) * 0.1)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(d, 4, 64, batch_first=True, norm_first=True)] * depth)
        self.fc = nn.Linear(d, 4)

    def forward(self, input_ids):
        x = self.emb(input_ids) + self.pos[: input_ids.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(1))


class RepeatedConv(nn.Module):
    def __init__(self, c=16, classes=10):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())
        self.net = nn.Sequential(
            nn.Conv2d(3, c, 3, 2, 1), *[block for _ in range(3)], nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        return self.fc(self.net(x))


ENTRIES = [
    broken("detached_submodule", "code_detached_for_a_plot", Denoiser, ("encoder", "encoder.*"), task="regression"),
    broken("detached_submodule", "filters_through_numpy", NumpyFeatures, ("front", "front.*")),
    broken("detached_submodule", "embedding_under_no_grad", NoGradEmbedding, ("table", "table.weight", "pos")),
    broken("detached_submodule", "router_by_argmax", MoEArgmax, ("router", "router.*"), also=("unused_parameter",)),
    broken(
        "frozen_parameter",
        "one_weight_of_a_mixer",
        OneFrozenLayer,
        ("channel_mix.0", "channel_mix.0.weight", "channel_mix"),
    ),
    broken(
        "frozen_parameter", "values_frozen_by_name", half_frozen_gpt, ("attns.*.v", "attns.*.v.*"), task="causal_lm"
    ),
    broken("frozen_parameter", "second_matrix", ScalarFrozen, ("w2",), task="regression"),
    broken("unused_parameter", "shortcut_never_called", LeftoverBranch, ("shortcut", "shortcut.*")),
    broken("unused_parameter", "first_lstm_twice", OneBlockTwice, ("lstm2", "lstm2.*", "lstm1")),
    broken("unused_parameter", "functional_norm_without_gain", AffineForgotten, ("gamma", "beta")),
    broken("unregistered_layer", "python_list", ListOfLayers, ("", "hidden", "hidden.*", "hidden[[]*")),
    broken("unregistered_layer", "python_dict_of_heads", DictOfHeads, ("", "heads", "heads.*", "heads[[]*")),
    broken(
        "unregistered_layer", "lora_as_tensors", RawTensor, ("", "lora_a", "lora_b"), also=("buffer_not_registered",)
    ),
    broken("lazy_parameter", "classifier_at_first_call", LazyHead, ("", "fc", "fc.*")),
    broken("lazy_parameter", "positions_at_first_call", LazyPositions, ("", "pos")),
    broken("lazy_parameter", "lazy_linear_uninitialised", LazyModules, ("", "c1", "c1.*", "fc", "fc.*")),
    broken("backward_crash", "sigmoid_multiplied_in_place", InplaceSigmoid, ("", "gate", "value")),
    broken("backward_crash", "states_written_in_place", InplaceStates, ("", "cell", "head"), task="causal_lm"),
    broken("shared_weight", "list_times_depth", TwoRegisters, ("", "blocks", "blocks.*")),
    broken("shared_weight", "same_conv_block", RepeatedConv, ("", "net", "net.*")),
]
