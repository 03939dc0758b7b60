import pytest
import torch

import utils
from tests.growth.operators.test_expert import made
from utils.growth.edits import GrowthRefusedError
from utils.growth.operators.expert import CLOSED
from utils.growth.transaction import GrowthUndoneError
from utils.runtime.errors import ConfigError

GPT = {"vocab_size": 60, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 2}


def test_a_loaded_model_grows_where_it_stands_and_its_optimizer_follows():
    loaded = utils.load_model("example:gpt", config=GPT)
    optimizer = torch.optim.SGD(loaded.module.parameters(), 0.1, momentum=0.9)
    tokens = torch.randint(0, 60, (5, 12))
    before = loaded.module.eval()(tokens)
    event = utils.grow(loaded, "depth", to=4, inputs={"input_ids": tokens}, labels=tokens, optimizer=optimizer)
    assert len(loaded.module.blocks) == 4
    assert torch.equal(loaded.module(tokens), before)
    assert event.certificate.equal
    assert event.certificate.loss_before == event.certificate.loss_after > 0
    assert set(optimizer.param_groups[0]["params"]) == set(loaded.module.parameters())


def test_a_run_of_a_grown_model_keeps_its_lineage(tmp_path, tiny_gpt, text_file, quick):
    utils.grow(tiny_gpt, "depth", 1)
    config = quick.with_changes(max_steps=4)
    run = utils.train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert run.config.growth == {}
    again = utils.resume(tmp_path / "run", progress=False)
    assert len(again.model.blocks) == 3
    assert again.summary()["weights_sha256"] == run.summary()["weights_sha256"]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"operator": "sideways", "amount": 1}, "no growth operator 'sideways'. Expected one of depth, feed_forward"),
        ({"operator": "depth"}, "amount is None and to is None"),
        ({"operator": "depth", "to": 2}, "was to grow to 2, and the model has 2 blocks"),
        ({"operator": "depth", "amount": 1, "to": 5}, "amount is 1 and to is 5"),
        ({"operator": "depth", "amount": 1, "where": "head"}, "no block 'head'. Expected one of blocks.0, blocks.1"),
        ({"operator": "depth", "amount": 1, "where": 7}, "Block 7 was asked for, and there are 2"),
        ({"operator": "feed_forward", "amount": 1, "where": "head"}, "no feed-forward pair in 'head'"),
        ({"operator": "channels", "amount": 1, "where": 3}, "Expected the name of a module"),
        ({"operator": "channels", "amount": 1, "where": "head"}, "Nothing in 'head' makes lanes"),
        ({"operator": "expert", "amount": 1}, "expert"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(wish, words):
    loaded = utils.load_model("example:gpt", config=GPT)
    before = {name: id(p) for name, p in loaded.module.named_parameters()}
    with pytest.raises(GrowthRefusedError, match=words):
        utils.grow(loaded, **wish)
    assert {name: id(p) for name, p in loaded.module.named_parameters()} == before


def test_what_does_not_fit_into_memory_is_refused_before_it_is_made():
    loaded = utils.load_model("example:gpt", config=GPT)
    with pytest.raises(GrowthRefusedError, match="B to try, and .* are free"):
        utils.grow(loaded, "feed_forward", 10**9)


def test_a_vocabulary_as_large_as_another_width_grows_alone():
    loaded = utils.load_model("example:gpt", config={**GPT, "vocab_size": 64})
    event = utils.grow(loaded, "vocabulary", 8)
    assert event.plan.where == ("embed", "head")
    assert loaded.module.blocks[0].mlp[0].out_features == 64


def test_frozen_parts_say_so():
    loaded = utils.load_model("example:gpt", config=GPT)
    loaded.module.requires_grad_(False)
    with pytest.raises(GrowthRefusedError, match="what is new would be frozen"):
        utils.grow(loaded, "feed_forward", 8)


def test_a_tolerance_that_rounding_cannot_meet_takes_the_event_back():
    loaded = utils.load_model("example:gpt", config=GPT)
    with pytest.raises(GrowthUndoneError, match="Grow another part"):
        utils.grow(loaded, "vocabulary", 3, tolerance=-1.0)
    assert loaded.module.embed.num_embeddings == 60


@pytest.mark.parametrize(("wish", "filled"), [({}, True), ({"new_second_moment": "zero"}, False)])
def test_new_second_moments_are_those_of_the_settings_of_a_run(wish, filled):
    loaded = utils.load_model("example:gpt", config=GPT)
    optimizer = torch.optim.AdamW(loaded.module.parameters(), 1e-3)
    loaded.module(torch.randint(0, 60, (2, 8))).square().mean().backward()
    optimizer.step()
    mean = optimizer.state[loaded.module.embed.weight]["exp_avg_sq"].mean()
    utils.grow(loaded, "vocabulary", 3, optimizer=optimizer, tolerance=1.0, **wish)
    new = optimizer.state[loaded.module.embed.weight]["exp_avg_sq"][60:]
    assert torch.allclose(new, (mean if filled else torch.zeros(())).expand_as(new))


def test_another_second_moment_is_refused_with_the_nearest():
    loaded = utils.load_model("example:gpt", config=GPT)
    with pytest.raises(
        ConfigError, match="new_second_moment is 'means'. Expected one of zero, mean. Did you mean 'mean'"
    ):
        utils.grow(loaded, "depth", 1, new_second_moment="means")
    with pytest.raises(ConfigError, match="new_second_moment is 7. Expected one of zero, mean. Leave it out"):
        utils.grow(loaded, "depth", 1, new_second_moment=7)
    assert len(loaded.module.blocks) == 2


def test_that_a_new_expert_stays_closed_is_told():
    model = made()
    with pytest.warns(UserWarning, match=r"gets no tokens: blocks\.0\.mixture\.router\.bias\[4:\]"):
        utils.grow(model, "expert", 1)
    assert model.blocks[0].mixture.router.bias[4].item() == CLOSED
