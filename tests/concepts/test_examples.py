"""Examples as texts or tensors, and their order."""

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.activations import representations
from utils.concepts.examples import example_batches, read_sides
from utils.runtime.errors import ConfigError, DataError
from utils.tokenization import choose_tokenizer


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    config = {"vocab_size": 300, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 1}
    return ModelAdapter(utils.load_model("example:gpt", config=config))


@pytest.fixture(scope="module")
def tokenizer():
    return choose_tokenizer(["some text to learn merges from"], 300)


@pytest.fixture(scope="module")
def linear():
    return ModelAdapter(nn.Linear(6, 3), spec=ModelSpec(example_inputs={"input": torch.rand(2, 6)}))


def test_texts_of_one_length_share_a_batch_and_rows_come_back_in_order(gpt, tokenizer):
    texts = ["abc", "a longer one", "xyz", "to", "b", "qrs", "far too long for this model, so that its end is cut"]
    made = example_batches(gpt, texts, tokenizer, batch_size=2)
    assert len(made) == 7
    assert sorted(made.order.tolist()) == list(range(7))
    rows = torch.cat([batch[gpt.main_input].float().mean(1, keepdim=True) for batch in made.batches])
    ids = [torch.as_tensor(own[:16]).float().mean() for own in tokenizer.encode(texts)]
    assert torch.allclose(made.restored(rows)[:, 0], torch.stack(ids))
    assert max(len(batch[gpt.main_input]) for batch in made.batches) == 2
    # A representation of a text does not depend on the others.
    alone = torch.cat([representations(gpt, example_batches(gpt, text, tokenizer).batches).values for text in texts])
    together = made.restored(representations(gpt, made.batches).values)
    assert torch.allclose(alone, together, atol=1e-6)


def test_some_of_them_are_numbered_anew(gpt, tokenizer):
    texts = ["abc", "a longer one", "xyz", "to", "b", "qrs"]
    made = example_batches(gpt, texts, tokenizer, batch_size=2)
    chosen = made.chosen(torch.tensor([1, 2, 5]))
    wanted = example_batches(gpt, [texts[1], texts[2], texts[5]], tokenizer)
    rows = [
        part.restored(torch.cat([batch[gpt.main_input].double().mean(1, keepdim=True) for batch in part.batches]))
        for part in (chosen, wanted)
    ]
    assert torch.equal(*rows)


def test_tensors_mappings_and_batches(linear):
    rows = torch.rand(10, 6)
    for given in (
        rows,
        {"input": rows},
        [{"input": rows[:3]}, {"input": rows[3:]}],
        iter([{"input": rows[:9]}, rows[9:]]),
    ):
        made = example_batches(linear, given, batch_size=4)
        assert torch.equal(made.restored(torch.cat([batch["input"] for batch in made.batches])), rows)
        assert max(len(batch["input"]) for batch in made.batches) <= 4


def test_the_first_of_each_content(linear):
    rows = torch.rand(5, 6)
    made = example_batches(linear, rows[[0, 1, 0, 2, 2, 1, 4]].bfloat16(), batch_size=2)
    assert made.distinct("input").tolist() == [0, 1, 3, 6]


def test_errors(gpt, tokenizer, linear):
    for given in ([], torch.empty(0, 6)):
        with pytest.raises(DataError, match="no examples"):
            example_batches(linear, given)
    with pytest.raises(DataError, match="there is no tokenizer"):
        example_batches(gpt, ["a"])
    with pytest.raises(DataError, match="list of 10 tensors.*torch.stack"):
        example_batches(linear, list(torch.rand(10, 6)))
    with pytest.raises(DataError, match="'' has 0 tokens"):
        example_batches(gpt, ["a", ""], tokenizer)
    with pytest.raises(ConfigError, match="of the type int"):
        example_batches(linear, 5)
    with pytest.raises(ConfigError, match="An example is of the type str"):
        example_batches(linear, [torch.rand(2, 6), "text"])
    with pytest.raises(ConfigError, match="An example has the inputs x"):
        example_batches(linear, {"x": torch.rand(2, 6)})
    with pytest.raises(ConfigError, match="as many in all"):
        example_batches(linear, {"input": torch.rand(2, 6), "x": torch.rand(3, 6)})
    with pytest.raises(ConfigError, match="as many in all"):
        example_batches(linear, torch.tensor(3.0))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        example_batches(linear, torch.rand(2, 6), batch_size=0)


def test_the_same_text_on_both_sides(gpt, tokenizer):
    with pytest.raises(DataError, match="1 of 2 positive examples is negative ones too"):
        read_sides(gpt, ["one text", "another text"], ["a third", "one text"], tokenizer=tokenizer)
