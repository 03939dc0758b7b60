"""Devices and dtypes written into forward(), found without a GPU; and code that moves and casts well."""

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn

from tests.validation.faulty_modes import Model, found, result_of
from utils.validation.portability import MIXED, check_portability

DEVICE, DTYPE = "hardcoded_device", "hardcoded_dtype"


def masked(part, h):
    future = torch.ones(h.shape[1], h.shape[1]).triu(1).bool()
    return h + (h @ h.transpose(1, 2)).masked_fill(future, float("-inf")).softmax(-1) @ h


def filled(part, h):
    out = torch.zeros(h.shape, device=h.device)
    out[:, 0] = h[:, 0]
    return part.linear(out)


def routed(part, h):
    return h + h[h.sum(-1) > 0].sum() + torch.arange(16)


def decided(part, h):
    return h + torch.arange(16) if h.sum().item() > -1e9 else h


DEVICES = {
    "range": lambda part, h: h + torch.arange(16),
    "mask": masked,
    "tensor": lambda part, h: h.masked_fill(torch.tensor([True] * 16), 0),
    "moved to the cpu": lambda part, h: h.cpu() + part.linear.bias,
    "through numpy": lambda part, h: h + torch.from_numpy(h.detach().numpy()).sum(-1, keepdim=True),
    "through numpy and the cpu": lambda part, h: h + torch.from_numpy(h.detach().cpu().float().numpy()).to(h.dtype),
    "after data dependent shapes": routed,
    "after a data dependent branch": decided,
    "after asking for the meta device": lambda part, h: h + torch.arange(16) if h.device.type != "cpu" else h,
    "moved to the gpu for its shape": lambda part, h: (
        h + torch.arange(16) * (torch.arange(16).cuda() if h.is_cuda else 1)
    ),
}
DTYPES = {
    "float": lambda part, h: part.linear(h.float()),
    "ones": lambda part, h: part.linear(h * torch.ones(16, device=h.device)),
    "upcast and not cast back": lambda part, h: part.linear(h + h.float().softmax(-1)),
    "noticed later": lambda part, h: h + torch.zeros(16, device=h.device),
    "filled": filled,
}


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name):
    results = found(check_portability, Model(DEVICES[name]))
    assert (DEVICE, "fail", "bad") in results
    assert {code for code, _, _ in results} <= {DEVICE, DTYPE}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name):
    assert found(check_portability, Model(DTYPES[name])) == [(DTYPE, "fail", "bad")]


class Routed(nn.Module):
    """Multiplies in float32 with a weight that has to stay in float32."""

    def __init__(self, declared):
        super().__init__()
        self.body = Model(lambda part, h: h * nn.functional.linear(h.float(), part.gate.weight).to(h.dtype),
                          lambda part: setattr(part, "gate", nn.Linear(16, 16)))  # fmt: skip
        if declared:
            self._keep_in_fp32_modules_strict = declared

    def forward(self, x):
        return self.body(x)


def test_what_is_declared_to_stay_in_float32_is_not_cast():
    assert found(check_portability, Routed(["bad.gate"])) == []
    assert found(check_portability, Routed({"gate.weight"})) == []
    # Nothing is declared, or something else is.
    assert found(check_portability, Routed([])) == [(DTYPE, "fail", "body.bad")]
    assert found(check_portability, Routed(["ate.weight", "good.gate"])) == [(DTYPE, "fail", "body.bad")]


def test_the_caller_is_blamed_for_what_it_hands_down():
    class Positions(Model):
        def __init__(self):
            super().__init__()
            self.position = nn.Embedding(64, 16)

        def forward(self, x):
            return self.head(self.enter(x) + self.position(torch.arange(x.shape[1])))

    class Initial(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(50, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 50)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x), torch.zeros(1, len(x), 8))[0])

    assert found(check_portability, Positions()) == [(DEVICE, "fail", "Positions")]
    assert (DTYPE, "fail", "Initial") in found(check_portability, Initial())


SOUND = {
    "plain": None,
    "on the input's device": lambda part, h: h + torch.arange(16, device=h.device),
    "like the input": lambda part, h: part.linear(h + torch.zeros_like(h) + h.new_ones(16)),
    "single number": lambda part, h: h * torch.tensor(3.0),
    "index on the cpu": lambda part, h: h[:, torch.arange(h.shape[1])],
    "data dependent": lambda part, h: h + h[h.sum(-1) > 0].sum() * (1 if h.sum().item() > 0 else 2),
    "upcast and cast back": lambda part, h: part.linear(h.float().softmax(-1).to(h.dtype)),
    "upcast within": lambda part, h: h + torch.sin(h.double()).to(h),
    "asks for the meta device": lambda part, h: (
        h + torch.arange(16, device=None if part.linear.weight.device.type == "meta" else part.linear.weight.device)
    ),
    "to the gpu where the input is": lambda part, h: h + (torch.arange(16).cuda() if h.is_cuda else torch.arange(16)),
    "to the gpu by its name": lambda part, h: (
        h + (torch.arange(16).cuda() if h.device.type == "cuda" else torch.arange(16))
    ),
    "to the gpu by its number": lambda part, h: (
        h + (torch.arange(16).cuda(h.get_device()) if h.device.type != "cpu" else torch.arange(16))
    ),
    "a list of numbers": lambda part, h: h * len(h.sum((1, 2)).tolist()),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_look_alikes(name):
    result = result_of(check_portability, Model(SOUND[name]))
    assert result.status == "pass", result.why


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(8, 8, 2, batch_first=True),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda: Model().double(),
        lambda: Model().to(torch.bfloat16),
    ],
)
def test_sound_layers_and_other_dtypes(build):
    result = result_of(check_portability, build())
    assert result.status == "pass", result.why


def test_the_model_comes_back_where_it_was():
    model = nn.LSTM(8, 8, batch_first=True)
    weights = [id(p) for p in model.parameters()]
    result_of(check_portability, model)
    assert [id(p) for p in model.parameters()] == weights
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


def test_messages_name_the_operation_and_the_devices():
    finding = result_of(check_portability, Model(DEVICES["range"])).findings[0]
    assert "add of (1, " in finding.message and "on the new device, (16,) on cpu" in finding.message
    finding = result_of(check_portability, Model(DTYPES["float"])).findings[0]
    assert finding.message.startswith("cast to bfloat16 this raises: RuntimeError")


def test_values_are_there_on_the_other_device():
    """Branches, shapes and loops that depend on values go as they do here, and views still share their values."""

    def forward(part, h):
        rows = torch.zeros_like(h)
        rows[0, 1:3].fill_(2)
        columns = rows.transpose(1, 2).contiguous().unsqueeze_(0)[0]
        assert columns.sum().item() == 2 * 2 * 16 and len(torch.nonzero(columns)) == 2 * 16
        assert torch.arange(4, device=h.device).flip(0).tolist() == [3, 2, 1, 0]
        first = torch.zeros(2, device="cpu").copy_(h[0, 0, :2])
        assert first.tolist() == h[0, 0, :2].tolist()
        return h + columns.sum() * torch.randn(16, device=h.device, dtype=h.dtype)

    result = result_of(check_portability, Model(forward))
    assert result.status == "pass" and result.details["tried"]["another device"] == "runs", result.why


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "vit", "swin", "mamba", "rwkv", "whisper", "deberta"])
def test_transformers_models_are_portable(name):
    transformers = pytest.importorskip("transformers")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    usual = dict(zip(names, (16, 2, 2, 32, 99), strict=True))
    small = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 32},
        "t5": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 99},
        "whisper": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99, "pad_token_id": 0,
                    "encoder_attention_heads": 2, "decoder_attention_heads": 2},
        "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 4},
    }.get(name, usual)  # fmt: skip
    if name == "vit":
        small |= {"image_size": 32, "patch_size": 8}
    config = transformers.AutoConfig.for_model(name, **small)
    result = result_of(check_portability, transformers.AutoModel.from_config(config))
    assert not result.findings, result.why


def test_layers_made_at_the_first_call_are_another_fault():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.read = nn.Embedding(50, 8), None

        def forward(self, input_ids):
            x = self.words(input_ids)
            if self.read is None:
                self.read = nn.Linear(8, x.shape[-1])
            return self.read(x)

    result = result_of(check_portability, Later())
    assert result.status == "skip"
    assert "makes parameters" in result.why


class Packed(nn.Module):
    def __init__(self, place, kind=nn.LSTM):
        super().__init__()
        self.place = place
        self.words, self.read = nn.Embedding(50, 8, padding_idx=0), kind(8, 8, batch_first=True)

    def forward(self, input_ids):
        lengths = self.place((input_ids != 0).sum(1).clamp(min=1))
        packed = rnn.pack_padded_sequence(self.words(input_ids), lengths, batch_first=True, enforce_sorted=False)
        out, lengths = rnn.pad_packed_sequence(self.read(packed)[0], batch_first=True, total_length=input_ids.shape[1])
        real = torch.arange(out.shape[1], device=out.device) < lengths.to(out.device)[:, None]
        return out * real[..., None]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("place", [torch.Tensor.cpu, torch.Tensor.tolist])
def test_lengths_of_packed_sequences_belong_on_the_cpu(place, kind):
    assert found(check_portability, Packed(place, kind)) == []


def test_lengths_of_packed_sequences_must_be_on_the_cpu():
    assert [code for code, *_ in found(check_portability, Packed(lambda lengths: lengths))] == [DEVICE]


class FirstState(nn.Module):
    def __init__(self, kind, place):
        super().__init__()
        self.words, self.read, self.place = nn.Embedding(50, 8), kind(8, 8, batch_first=True), place

    def forward(self, input_ids):
        x = self.words(input_ids)
        start = torch.zeros(1, len(x), 8, device=self.place or x.device, dtype=x.dtype)
        return self.read(x, (start, start) if isinstance(self.read, nn.LSTM) else start)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_first_states_on_the_cpu(kind):
    assert [code for code, *_ in found(check_portability, FirstState(kind, "cpu"))] == [DEVICE]
    assert found(check_portability, FirstState(kind, None)) == []


class Spectrum(nn.Module):
    """Sound in, scores out; `where` says on which device the window is made."""

    def __init__(self, where=lambda x: {"device": x.device}, window=torch.hann_window):
        super().__init__()
        self.where, self.window, self.head = where, window, nn.Linear(17, 4)

    def forward(self, waveform):
        window = self.window(32, **self.where(waveform))
        spectrum = torch.stft(waveform.float(), 32, 16, window=window, return_complex=True).abs().mean(-1)
        return self.head(spectrum.to(self.head.weight.dtype))


def test_functions_that_look_at_devices_themselves():
    """stft says in its own words that its window is elsewhere."""
    assert found(check_portability, Spectrum(lambda x: {})) == [(DEVICE, "fail", "Spectrum")]
    result = result_of(check_portability, Spectrum())
    assert result.status == "pass" and result.why == "it runs on another device and in bfloat16"


@pytest.mark.parametrize(
    "words",
    [
        "indices should be either on cpu or on the same device as the indexed tensor (cpu)",
        "grid_sampler(): expected input and grid to be on same device, but input is on meta",
        "take(): self, index and out expected to be in the same device",
        "multinomial arguments must have the same device",
        "Expected same device for binary mkldnn op",
        "Expected all tensors to be on the same device, but found at least two devices",
        "Input and hidden tensors are not at the same device",
    ],
)
def test_words_for_two_devices(words):
    assert MIXED.search(words)


def test_what_cannot_be_tried_is_no_pass():
    """An error that is about neither device nor dtype says nothing, and the report does not say that it ran."""

    def refuses(part, h):
        if h.is_cuda or h.is_meta:
            raise NotImplementedError("no kernel here")
        return h

    result = result_of(check_portability, Model(refuses))
    assert (result.status, result.could_not_run, result.findings) == ("skip", False, ())
    assert result.why.startswith("it runs in bfloat16; on another device it could not be tried: ")
    assert "NotImplementedError: no kernel here" in result.why

    def no_half(part, h):
        if h.dtype == torch.bfloat16:
            raise NotImplementedError("no kernel here")
        return h

    result = result_of(check_portability, Model(no_half))
    assert result.status == "pass" and result.why == (
        "it runs on another device and in float64; in bfloat16 it could not be tried: "
        "NotImplementedError: no kernel here"
    )
