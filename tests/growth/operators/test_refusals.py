"""Every refusal of a place or a size says what was found, what was expected and what to do."""

import pytest
import torch
from torch import nn

from tests.growth.operators.test_expert import Listed, made
from tests.growth.toys import Toy, adapted
from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.edits import GrowthRefusedError
from utils.growth.planning import plan_growth
from utils.growth.request import Request

MODELS = {
    "toy": lambda: adapted(Toy()),
    "mixture": lambda: ModelAdapter(made(Listed)),
    "mlp": lambda: ModelAdapter(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        spec=ModelSpec(example_inputs={"input": torch.randn(4, 4)}, task="tabular_classification"),
    ),
}
REFUSED = [
    ("toy", "depth", "nonsense", "There is no block 'nonsense'. Expected one of blocks.0, blocks.1. Name one"),
    ("toy", "depth", 99, "Block 99 was asked for, and there are 2. Expected a number from 0 to 1. Set where"),
    ("toy", "feed_forward", 99, "Block 99 was asked for, and there are 2. Expected a number from 0 to 1. Set where"),
    ("toy", "feed_forward", "x", "no feed-forward pair in 'x'. Expected one of blocks.0, blocks.1. Name one"),
    ("toy", "heads", 99, "Block 99 was asked for, and there are 2. Expected a number from 0 to 1. Set where"),
    ("toy", "heads", "x", "no attention in 'x'. Expected one of blocks.0.attention, blocks.1.attention. Name one"),
    ("toy", "vocabulary", "x", "There is no token table 'x'. Expected one of tokens. Name one"),
    ("toy", "residual", 3, "at place 3. Expected the name of a module or a parameter. Name one"),
    ("mixture", "expert", 99, "Block 99 was asked for, and there are 2. Expected a number from 0 to 1. Set where"),
    ("mixture", "expert", "x", "Expected one of blocks.0.mixture, blocks.1.mixture. Name one"),
    (
        "mlp",
        "feed_forward",
        0,
        "There is no feed-forward pair to widen: .* Expected two linear layers .* Grow the depth",
    ),
    ("mlp", "feed_forward", "x", "There is no feed-forward pair to widen: .* Expected two linear layers"),
    ("mlp", "classes", "", "No parameter of the model itself has 3 rows. Expected a linear layer .* Name such a layer"),
]


@pytest.mark.parametrize(("model", "operator", "where", "words"), REFUSED)
def test_a_place_that_is_none_is_refused_in_three_sentences(model, operator, where, words):
    with pytest.raises(GrowthRefusedError, match=words) as caught:
        plan_growth(MODELS[model](), Request(operator, 1, where=where))
    assert caught.value.found.endswith(".")
    assert caught.value.expected.endswith(".")
    assert caught.value.action.endswith(".")
