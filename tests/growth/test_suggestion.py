import torch
from torch import nn

import utils
from utils.adapters import ModelSpec
from utils.growth.suggestion import suggested_growth
from utils.training.config import TrainingConfig


def test_a_model_of_blocks_begins_with_one():
    loaded = utils.load_model("example:gpt", config={"num_layers": 3, "d_model": 16, "nhead": 2, "vocab_size": 60,
                                                     "max_seq_len": 16})  # fmt: skip
    before = {name: id(p) for name, p in loaded.module.named_parameters()}
    suggestion = suggested_growth(loaded, at=0.4)
    assert suggestion.config.begin_blocks == 1
    assert suggestion.config.schedule[0].at == 0.4
    assert "one of the 3 blocks" in str(suggestion)
    assert "<p>Begin with one" in suggestion._repr_html_()
    assert {name: id(p) for name, p in loaded.module.named_parameters()} == before
    assert TrainingConfig(growth=suggestion.settings).growth["begin_blocks"] == 1


def test_a_model_without_blocks_gets_wider():
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    suggestion = suggested_growth(model, spec=ModelSpec(example_inputs={"input": torch.randn(4, 3)}))
    assert suggestion.config.begin_blocks is None
    assert suggestion.config.schedule[0].operator in ("feed_forward", "channels")
    assert "after 50% of the steps. Depth: There are no repeated blocks" in suggestion.why


def test_a_model_that_cannot_grow_says_why():
    model = nn.Sequential(nn.Linear(3, 2))
    suggestion = suggested_growth(model, spec=ModelSpec(example_inputs={"input": torch.randn(4, 3)}))
    assert suggestion.config.schedule == ()
    assert suggestion.why.startswith("This model cannot grow by itself: There are no repeated blocks")
