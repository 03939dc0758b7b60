from types import SimpleNamespace

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError, DataError
from utils.tokenization import choose_tokenizer
from utils.training.generation import draw, generate

GPT = {"vocab_size": 300, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 1}


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    return utils.load_model("example:gpt", config=GPT)


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=24)
    ).eval()  # fmt: skip


def by_hand(module, ids, count, limit):
    """Take the likeliest token again and again, with the plainest code there is."""
    ids = list(ids)
    for _ in range(count):
        output = module(torch.tensor([ids[-limit:]]))
        ids.append(int(getattr(output, "logits", output)[0, -1].argmax()))
    return ids


def test_a_seed_gives_the_same_text_and_leaves_the_model_and_the_streams(gpt):
    tokenizer = choose_tokenizer(["some text to learn merges from"], 300)
    gpt.module.train()
    stream = torch.get_rng_state()
    first = generate(gpt, "some", 12, tokenizer=tokenizer, seed=3)
    again = generate(gpt, "some", 12, tokenizer=tokenizer, seed=3)
    other = generate(gpt, "some", 12, tokenizer=tokenizer, seed=4)
    assert (first.ids, first.text) == (again.ids, again.text)
    assert first.ids != other.ids
    assert str(first) == "some" + tokenizer.decode([i for i in first.ids if i != tokenizer.eos_id])
    assert gpt.module.training
    assert torch.equal(torch.get_rng_state(), stream)
    assert first.to_dict()["ids"] == list(first.ids)


def test_windowed_generation_goes_on_beyond_the_models_length(gpt):
    made = generate(gpt, [5, 7, 9], 30, temperature=0)
    assert not made.cached
    assert made.how == "from the window of the last tokens, because the model has no cache"
    assert [5, 7, 9, *made.ids] == by_hand(gpt.module.eval(), [5, 7, 9], 30, 16)


def test_the_cache_gives_the_same_tokens_as_the_whole_sequence(llama):
    made = generate(llama, [5, 7, 9], 16, temperature=0)
    assert made.cached
    assert made.how == "with the model's cache"
    assert made.ids == generate(llama, [5, 7, 9], 16, temperature=0, use_cache=False).ids
    assert [5, 7, 9, *made.ids] == by_hand(llama, [5, 7, 9], 16, 24)


def test_beyond_the_cache_the_window_moves_on(llama):
    made = generate(llama, [5, 7, 9], 40, temperature=0)
    assert "up to 24 tokens, then from the window" in made.how
    assert [5, 7, 9, *made.ids] == by_hand(llama, [5, 7, 9], 40, 24)


class WrongCache(nn.Module):
    """Forgets what it was told to remember."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=20, is_decoder=True, max_position_embeddings=64)
        self.embedding = nn.Embedding(20, 8)
        self.output = nn.Linear(8, 20)

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        hidden = self.embedding(input_ids)
        mean = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        result = {"logits": self.output(mean)}
        return {**result, "past_key_values": (hidden,)} if use_cache else result


def test_a_cache_that_is_wrong_is_found_out():
    torch.manual_seed(0)
    model = WrongCache()
    made = generate(ModelAdapter(model, spec=utils.ModelSpec(task="causal_lm")), [1, 2, 3], 8, temperature=0)
    assert not made.cached
    assert "the model's cache failed: its first step gave other logits than the whole sequence" in made.how
    plain = [1, 2, 3]
    for _ in range(8):
        plain.append(int(model(torch.tensor([plain]))["logits"][0, -1].argmax()))
    assert [1, 2, 3, *made.ids] == plain


def test_it_stops_at_the_end_of_a_document(gpt):
    tokenizer = choose_tokenizer(["some text"], 300)
    made = generate(gpt, [5], 200, temperature=0, tokenizer=tokenizer)
    first = made.ids[0]

    class Ending:
        eos_id, vocab_size = first, 300

        def decode(self, ids):
            return f"{len(ids)} ids"

    ended = generate(gpt, [5], 200, temperature=0, tokenizer=Ending())
    assert ended.ids == (first,)
    assert ended.text == "0 ids"
    assert len(generate(gpt, [5], 6, temperature=0, tokenizer=Ending(), stop_at_end=False).ids) == 6


def test_drawing_follows_temperature_and_top_k():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    assert draw(logits, 0, None, generator) == 1
    assert {draw(logits, 1.0, 2, generator) for _ in range(200)} == {1, 2}
    counts = [0] * 4
    for _ in range(4000):
        counts[draw(logits, 1.0, None, generator)] += 1
    expected = logits.double().softmax(0) * 4000
    assert torch.allclose(torch.tensor(counts).double(), expected, atol=120)
    assert {draw(logits, 1e-3, None, generator) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, r"tokens is 0\. Expected a whole number above 0"),
        ({"temperature": -1}, r"temperature is -1\. Expected a number from 0 on"),
        ({"top_k": 0}, r"top_k is 0\. Expected a whole number above 0, or None"),
    ],
)
def test_settings_out_of_range_are_refused(gpt, arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(gpt, [1], **{"tokens": 3, **arguments})


def test_unusable_prompts_are_refused(gpt):
    with pytest.raises(DataError, match=r"The prompt is text, and there is no tokenizer"):
        generate(gpt, "hello")
    with pytest.raises(DataError, match=r"The prompt is empty"):
        generate(gpt, [])
    with pytest.raises(DataError, match=r"The prompt holds the id 300\. Expected ids from 0 to 299"):
        generate(gpt, [1, 300])
    for prompt in (None, 5, [1.5], ["a"]):
        with pytest.raises(DataError, match="does not hold ids alone. Expected text, or whole numbers"):
            generate(gpt, prompt)


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match=r"is no causal language model but for image_classification"):
        generate(utils.load_model("example:vit"), [1])
