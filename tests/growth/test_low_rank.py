"""Light clones against the formula, what they train, and what is refused."""

import sys

import pytest
import torch
from torch import nn

from tests.growth.domain_models import answer, docs, gpt, loss_of, plays, train
from tests.growth.toys import Toy, adapted
from utils.adapters import ModelAdapter
from utils.growth.cloning import clone_for_domain
from utils.growth.low_rank import LowRank, LowRankError
from utils.runtime.errors import ConfigError, MissingPackageError
from utils.training.weights import weights_sha256

IDS = torch.arange(24).reshape(2, 12) % 37
SMALL = LowRank(rank=2, alpha=6.0)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.usefixtures("peft")
def test_corrections_follow_the_formula():
    model = Toy(blocks=2, gate=True)
    clone = clone_for_domain(adapted(model), "law", "light", low_rank=SMALL)
    assert clone.certificate.equal and clone.certificate.passed
    places = ("attention.q", "attention.k", "attention.v", "attention.out", "up", "gate", "down")
    targets = {f"blocks.{number}.{place}" for number in range(2) for place in places}
    assert set(clone.record.targets) == targets
    own = clone.own_tensors()
    with torch.no_grad():
        for tensor in own.values():
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    twin = Toy(blocks=2, gate=True)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for target in targets:
            a, b = (own[f"{target}.lora_{letter}.default.weight"] for letter in "AB")
            twin.get_submodule(target).weight += 6.0 / 2 * b @ a
    torch.testing.assert_close(answer(clone.module, IDS), answer(twin, IDS), rtol=1e-4, atol=1e-4)
    assert set(own) == {f"{target}.lora_{letter}.default.weight" for target in targets for letter in "AB"}
    assert clone.record.own_parameters == sum(tensor.numel() for tensor in own.values())
    assert {name for name, p in clone.module.named_parameters() if p.requires_grad} == set(own)
    assert clone.module.tokens.weight is model.tokens.weight and not model.tokens.weight.requires_grad


@pytest.mark.usefixtures("peft")
def test_light_clones_learn_with_few_parameters():
    loaded, first, second = gpt(), docs(), plays()
    parent = train(loaded.module, first)
    before = answer(parent, first)
    clone = clone_for_domain(loaded, "plays", "light", low_rank=SMALL)
    assert 0 < clone.record.own_parameters < 0.1 * clone.record.parent_parameters
    with torch.no_grad():
        start = float(loss_of(parent, second[150:]))
    train(clone.module, second[:150], rate=1e-2)
    with torch.no_grad():
        assert float(loss_of(clone.module, second[150:])) < start - 0.3
    assert torch.equal(answer(parent, first), before)
    assert weights_sha256(parent) == clone.record.parent_sha256


@pytest.mark.usefixtures("peft")
def test_seeds_parts_and_modules():
    model = adapted(Toy())

    def first_values(**wish):
        clone = clone_for_domain(model, "law", "light", low_rank=SMALL, **wish)
        return next(iter(clone.own_tensors().values()))

    state = torch.get_rng_state()
    assert torch.equal(first_values(seed=1), first_values(seed=1))
    assert not torch.equal(first_values(seed=1), first_values(seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    attention = clone_for_domain(model, "law", "light", low_rank=LowRank(parts=("attention",)))
    assert not any("up" in name for name in attention.record.targets) and len(attention.record.targets) == 8
    assert attention.record.notes[-1] == "8 projections of attention, by the model's structure"
    named = clone_for_domain(model, "law", "light", low_rank=LowRank(modules=("head",)))
    assert named.record.targets == ("head",) and len(named.own_tensors()) == 2


@pytest.mark.usefixtures("peft")
def test_names_are_whole_names():
    model = Toy()
    for block in model.blocks:
        block.head = nn.Linear(2, 2)
    clone = clone_for_domain(adapted(model), "law", "light", low_rank=LowRank(modules=("head",)))
    assert set(clone.own_tensors()) == {"head.lora_A.default.weight", "head.lora_B.default.weight"}


@pytest.mark.usefixtures("peft")
def test_transposed_weights_of_gpt2_are_corrected():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    clone = clone_for_domain(model, "law", "light", low_rank=SMALL)
    assert clone.certificate.equal and len(clone.record.targets) == 8
    # Fused queries, keys and values: rank x (16 + 48); their output; the feed-forward pair.
    assert clone.record.own_parameters == 2 * 2 * ((16 + 48) + (16 + 16) + 2 * (16 + 64))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(37, 16)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids):
        return self.head(self.layers(self.tokens(input_ids)).mean(1))


class Spare(Toy):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(4, 4)


FUSED = LowRank(rank=2, parts=("feed_forward",))


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Encoder, SMALL, r"layers.layers.0.self_attn multiplies by layers.layers.0.self_attn.in_proj_weight itself"),
        (Encoder, FUSED, r"Without gradients the model computes past its corrected layers, in one fused operator"),
        (Toy, LowRank(modules=("blocks.9",)), r"Toy has no module 'blocks.9'. LowRank.modules takes full names"),
        (Toy, LowRank(modules=("norm",)), r"peft cannot correct Toy \(ValueError: Target module LayerNorm"),
        (Spare, LowRank(modules=("spare",)), r"The correction of spare.lora_B.default.weight is never used"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), SMALL,
         r"No projections of attention or feed_forward were found in Sequential"),
    ],
)  # fmt: skip
def test_what_cannot_be_corrected_is_refused(model, settings, message):
    made = model()
    before = weights_sha256(made)
    with pytest.raises(LowRankError, match=message):
        clone_for_domain(
            adapted(made) if isinstance(made, Toy) else ModelAdapter(made), "x", "light", low_rank=settings
        )
    assert weights_sha256(made) == before and all(p.requires_grad for p in made.parameters())


@pytest.mark.usefixtures("peft")
def test_fused_layers_are_corrected_where_the_fast_path_is_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        clone = clone_for_domain(Encoder(), "law", "light", low_rank=FUSED)
        assert clone.certificate.equal and len(clone.record.targets) == 4
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_without_peft_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"needed to make light clones \(LoRA\). .* pip install peft"):
        clone_for_domain(adapted(Toy()), "law", "light")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"rank": 0}, r"LowRank.rank is 0. Expected a whole number of at least 1"),
        ({"rank": 2.0}, r"LowRank.rank is 2.0"),
        ({"alpha": 0}, r"LowRank.alpha is 0. Expected a number above 0"),
        ({"dropout": 1.0}, r"LowRank.dropout is 1.0. Expected a probability below 1"),
        ({"parts": "attention"}, r"LowRank.parts is 'attention'. Expected a tuple of names"),
        ({"parts": ("head",)}, r"LowRank.parts is \('head',\). Expected some of attention, feed_forward"),
        ({"parts": ()}, r"LowRank.parts is \(\)"),
        ({"modules": ("",)}, r"LowRank.modules is \('',\)"),
    ],
)
def test_settings_are_checked(wish, message):
    with pytest.raises(ConfigError, match=message):
        LowRank(**wish)


def test_settings_as_plain_values():
    settings = LowRank(rank=4, modules=["head"])
    assert settings.modules == ("head",)
    assert LowRank.from_dict(settings.to_dict()) == settings
