"""Models that break on legal sizes, and parts that never train."""

# ruff: noqa: D102, D103

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_a.sound_images import ResNetty, SmallUNet, TinyViT
from benchmarks.unseen_a.sound_language import Llamaish, PocketGPT
from benchmarks.unseen_a.sound_others import MiniBert
from benchmarks.zoo.entry import broken, initialised


class Squeezed(nn.Module):
    """Squeezes the spatial axes away, and the batch of one with them."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        return self.classifier(self.features(x).squeeze())


class EvenOnly(SmallUNet):
    """Doubles the small map instead of matching the skip."""

    def forward(self, image):
        a = self.d1(image)
        b = F.interpolate(self.d2(F.max_pool2d(a, 2)), scale_factor=2)
        return self.final(F.relu(self.u1(torch.cat((a, b), 1))))


class ShortTable(PocketGPT):
    """The table has a row less than the context it announces."""

    def __init__(self):
        super().__init__()
        self.pos = nn.Embedding(self.cfg.ctx - 1, self.cfg.dim)


class RememberedBatch(nn.Module):
    """The first state has the batch size of the training script."""

    def __init__(self, batch_size=2):
        super().__init__()
        self.batch_size = batch_size
        self.embed = nn.Embedding(60, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.out = nn.Linear(32, 60)

    def forward(self, tokens):
        x = self.embed(tokens)
        h = x.new_zeros(1, self.batch_size, 32)
        return self.out(self.lstm(x, (h, h.clone()))[0])


class Blocked(nn.Module):
    """Local attention over blocks of four; other lengths do not fold."""

    def __init__(self, vocab=68, d=32):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ln_f = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, input_ids):
        b, t = input_ids.shape
        x = self.wte(input_ids) + self.wpe.weight[:t]
        q, k, v = self.qkv(x).view(b, t // 4, 4, -1).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.ln_f(x + self.proj(y.reshape(b, t, -1))))


class ProbeLeftover(TinyViT):
    """`no_grad` of the probing phase is still around the encoder."""

    def forward(self, img):
        with torch.no_grad():
            x = self.encoder(self.tokens(img))
        return self.head(x[:, 0])


class ThroughNumpy(nn.Module):
    """Normalises the features outside of autograd."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(1, 16, 7, 2, 3), nn.ReLU(), nn.Conv1d(16, 24, 5, 2, 2), nn.ReLU())
        self.back = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, audio):
        h = self.front(audio).mean(-1)
        h = torch.as_tensor(h.detach().cpu().numpy(), device=h.device)
        return self.back(h / (h.norm(dim=-1, keepdim=True) + 1e-6))


class DataBranch(nn.Module):
    """The gate is read through `.data`, so it never learns."""

    def __init__(self):
        super().__init__()
        self.gate_net = nn.Linear(16, 32)
        self.value_net = nn.Linear(16, 32)
        self.out = nn.Linear(32, 3)

    def forward(self, x):
        return self.out(torch.sigmoid(self.gate_net(x).data) * self.value_net(x))


def frozen_middle():
    """Freezes layer 1 of four, a leftover of an ablation."""
    model = initialised(Llamaish(n=4))
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith("blocks.1.")
    return model


def frozen_head():
    """The condition is the wrong way round: the fresh head is frozen, the rest trains."""
    model = ResNetty()
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith("fc")
    return model


class FixedGain(nn.Module):
    """The gain of a norm was made without gradient."""

    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d), requires_grad=False)

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.gain)


def frozen_gain():
    model = initialised(Llamaish())
    model.blocks[1].post_norm = FixedGain(64)
    return model


class ForgottenNorm(PocketGPT):
    """The last norm is made and not used."""

    def forward(self, idx):
        return self.head(self.body(self.embed(idx)))


class SameConvTwice(nn.Module):
    """Types `conv2` where `conv3` was meant."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class OneLayerLess(MiniBert):
    """The loop stops before the last layer."""

    def encode(self, input_ids, attention_mask):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.ln(self.word(input_ids) + self.place.weight[: input_ids.shape[1]])
        for i in range(len(self.layers) - 1):
            x = self.layers[i](x, attention_mask)
        return x


class PlainList(nn.Module):
    """Residual rows in a list of Python."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(18, 48)
        self.blocks = [nn.Linear(48, 48) for _ in range(3)]
        self.out = nn.Linear(48, 5)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return self.out(x)


class HeadsInDict(nn.Module):
    """Heads of the tasks in a dict of Python."""

    def __init__(self, tasks=("age", "sex")):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = {name: nn.Linear(16, 4) for name in tasks}

    def forward(self, x):
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


class RawTensor(nn.Module):
    """The class token is a tensor with gradient, not a parameter."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.pos = nn.Parameter(torch.randn(1, 17, 32) * 0.02)
        self.cls_token = torch.zeros(1, 1, 32, requires_grad=True)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        return self.head(self.enc(torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos)[:, 0])


def lazy_head():
    """The lazy classifier has no weights when the optimizer is made."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )


class MadeInForward(nn.Module):
    """Makes its projection in the first call, after the optimizer."""

    def __init__(self, d_hidden=32):
        super().__init__()
        self.d_hidden = d_hidden
        self.emb = nn.Embedding(64, d_hidden)
        self.adapter = None
        self.rnn = nn.GRU(d_hidden, d_hidden, batch_first=True)
        self.out = nn.Linear(d_hidden, 64)

    def forward(self, tokens):
        x = self.emb(tokens)
        if self.adapter is None:
            self.adapter = nn.Linear(x.shape[-1], self.d_hidden).to(x.device)
        return self.out(self.rnn(self.adapter(x))[0])


ENTRIES = [
    broken("shape_crash", "squeezed_batch_of_one", Squeezed, ""),
    broken("shape_crash", "odd_skip", EvenOnly, ("", "u1*", "d2*")),
    broken("shape_crash", "table_one_short", lambda: initialised(ShortTable()), ("pos*", ""), max_length=64),
    broken("shape_crash", "remembered_batch", RememberedBatch, ("lstm*", "")),
    broken("shape_crash", "blocks_of_four", Blocked, ("qkv*", ""), task="causal_lm"),
    broken("detached_submodule", "probe_leftover", ProbeLeftover, ("encoder*", "to_patch*", "cls", "pos")),
    broken("detached_submodule", "through_numpy", ThroughNumpy, "front*"),
    broken("detached_submodule", "data_of_the_gate", DataBranch, "gate_net*"),
    broken("frozen_parameter", "frozen_middle_block", frozen_middle, "blocks.1*"),
    broken("frozen_parameter", "frozen_head", frozen_head, "fc*"),
    broken("frozen_parameter", "gain_without_gradient", frozen_gain, "blocks.1.post_norm*"),
    broken("unused_parameter", "forgotten_norm", lambda: initialised(ForgottenNorm()), "norm*"),
    broken("unused_parameter", "same_conv_twice", SameConvTwice, "conv3*"),
    broken("unused_parameter", "one_layer_less", lambda: initialised(OneLayerLess()), "layers.1*"),
    broken("unregistered_layer", "plain_list", PlainList, ("", "blocks*")),
    broken("unregistered_layer", "heads_in_dict", HeadsInDict, ("", "heads*")),
    broken("unregistered_layer", "raw_class_token", RawTensor, ("", "cls_token")),
    broken(
        "lazy_parameter",
        "lazy_classifier",
        lazy_head,
        "5*",
        example_inputs={"input": torch.linspace(0, 1, 1568).view(2, 1, 28, 28)},
    ),
    broken("lazy_parameter", "made_in_forward", MadeInForward, ("adapter*", "")),
]
