import numpy as np
import pytest
import torch
from torch import nn

import utils
from utils.adapters.activations import representations
from utils.adapters.model_adapter import ModelAdapter
from utils.loading.loader import load_model
from utils.memory.embedding import Embedder, as_embedder, function_embedder, model_embedder
from utils.memory.long_term_memory import LongTermMemory
from utils.runtime.errors import AdapterError, CheckpointError, ConfigError, DataError
from utils.tokenization.adaptive_tokenizer import choose_tokenizer

TEXTS = ["the cat sat on the mat", "import numpy as np", "def f(x):\n    return x " * 60, "a"]


@pytest.fixture(scope="module")
def gpt():
    return ModelAdapter(load_model("example:gpt"))


@pytest.fixture(scope="module")
def tokenizer(gpt):
    return choose_tokenizer(TEXTS, gpt.vocab_size.value)


@pytest.fixture
def image_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("pool", ["auto", "last"])
def test_texts_of_any_length_by_windows(gpt, tokenizer, pool):
    """The vector of a text is that of its tokens, read window by window, whatever it is embedded together with."""
    made = model_embedder(gpt, tokenizer, pool=pool, batch_size=2)(TEXTS)
    limit = gpt.max_length.value
    for text, vector in zip(TEXTS, made, strict=True):
        ids = torch.from_numpy(tokenizer.encode([text])[0].astype(np.int64))
        windows = [ids[-limit:]] if pool == "last" else ids.split(limit)
        rows = torch.cat([representations(gpt, [window[None]], pool="positions").values for window in windows])
        expected = rows[-1] if pool == "last" else rows.mean(0)
        assert np.allclose(vector, expected, atol=1e-5)
    assert len(tokenizer.encode([TEXTS[2]])[0]) > 2 * limit
    assert np.array_equal(model_embedder(gpt, tokenizer, pool=pool)(TEXTS[0])[0], made[0])


class WithPart(nn.Module):
    """Has a part that is called as what runs have."""

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.adapter(x))


def test_a_part_named_adapter_is_a_part():
    model = WithPart()
    rows = torch.randn(5, 4)
    with torch.no_grad():
        assert np.allclose(model_embedder(model)(rows), model.adapter(rows), atol=1e-6)


class Fixed(nn.Module):
    """Reads sixteen tokens and no other number, and takes a mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 6)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(6, 300)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        return self.head(self.mix(hidden.transpose(1, 2)).transpose(1, 2))


def test_a_model_of_one_length_reads_padded_windows_under_a_mask():
    torch.manual_seed(0)
    model = Fixed()
    adapter = ModelAdapter(model)
    assert adapter.lengths.value.fixed and adapter.lengths.value.shortest == 16
    tokens = lambda texts: {"input_ids": [[ord(letter) for letter in text] for text in texts]}  # noqa: E731
    made = model_embedder(adapter, tokens)(["abc", "b" * 20])
    ids = torch.zeros(1, 16, dtype=torch.int64)
    ids[0, :3] = torch.tensor([97, 98, 99])
    mask = torch.zeros(1, 16)
    mask[0, :3] = 1
    with torch.no_grad():
        hidden = model.mix((model.embed(ids) * mask.unsqueeze(-1)).transpose(1, 2)).transpose(1, 2)
    assert np.allclose(made[0], hidden[0, :3].mean(0), atol=1e-5) and made.shape == (2, 6)


def test_a_memory_of_texts_keeps_to_its_embedder(gpt, tokenizer, tmp_path):
    embedder = model_embedder(gpt, tokenizer)
    memory = LongTermMemory(embedder=embedder)
    memory.add(TEXTS, [{"text": text} for text in TEXTS])
    assert memory.search("the cat sat on the", 1)[0][0].metadata["text"] == TEXTS[0]
    assert memory.search(vectors=embedder(TEXTS), k=1).ids.ravel().tolist() == [0, 1, 2, 3]
    assert embedder.description in memory._repr_html_() and memory.to_dict()["embedder"] == embedder.to_dict()
    memory.save(tmp_path)
    again = LongTermMemory.load(tmp_path, model_embedder(gpt, tokenizer))
    assert again.search(TEXTS, 1).ids.ravel().tolist() == [0, 1, 2, 3]
    for other in (
        model_embedder(gpt, tokenizer, pool="last"),
        model_embedder(gpt, choose_tokenizer(["x y z"], gpt.vocab_size.value)),
        model_embedder(gpt, tokenizer, "blocks.0" if "blocks.0" in dict(gpt.module.named_modules()) else "head"),
    ):
        with pytest.raises(CheckpointError, match="those of input of .* with another fingerprint"):
            LongTermMemory.load(tmp_path, other)
    bare = LongTermMemory.load(tmp_path)
    assert bare.search(vectors=embedder(TEXTS[:1]), k=1).ids.tolist() == [[0]]
    with pytest.raises(DataError, match="the embedder of this memory is not: input of .*Load the memory with its"):
        bare.search(TEXTS)
    bare.save(tmp_path)
    assert LongTermMemory.load(tmp_path, embedder).embedder is embedder, "what wrote the vectors is still known"
    given = LongTermMemory()
    given.add(embedder(TEXTS))
    given.save(tmp_path / "given")
    with pytest.raises(CheckpointError, match="are vectors that were given"):
        LongTermMemory.load(tmp_path / "given", embedder)


@pytest.mark.slow
def test_a_run_brings_its_tokenizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {number} of a text about {number % 7}" for number in range(400)))
    config = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
    loaded = load_model("example:gpt", config=config)
    run = utils.train(loaded, f"file:{text}", utils.TrainingConfig(max_steps=2, batch_size=2), run_dir=tmp_path / "run")
    memory = LongTermMemory(embedder=run)
    memory.add(["line 3 of a text", "something else " * 30])
    assert memory.search("line 3 of a text", 1).ids.tolist() == [[0]] and memory.dimension == 16
    assert memory.embedder.fingerprint == model_embedder(run.adapter, run.data.tokenizer).fingerprint


def test_images_rows_and_batches(image_model):
    images = torch.randn(70, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    memory = LongTermMemory(embedder=image_model)
    before = {name: value.clone() for name, value in image_model.state_dict().items()}
    memory.add(images)
    assert image_model.training and all(torch.equal(before[n], v) for n, v in image_model.state_dict().items())
    image_model.eval()
    with torch.no_grad():
        expected = nn.functional.normalize(image_model[:-1](images))
    image_model.train()
    assert np.allclose(memory.get(memory.ids()).vectors, expected, atol=1e-5)
    for items in (images[3:5], images[3:5].numpy(), {"input": images[3:5], "labels": torch.ones(2)}, list(images[3:5])):
        assert memory.search(items, 1).ids.ravel().tolist() == [3, 4]


def test_flat_keeps_every_place(image_model):
    made = model_embedder(image_model, layer="0", pool="flat")(torch.zeros(2, 1, 8, 8))
    assert made.shape == (2, 144)


def test_weights_that_change_are_noticed(image_model):
    memory = LongTermMemory(embedder=image_model)
    images = torch.randn(3, 1, 8, 8)
    memory.add(images)
    kept = image_model[4].weight.detach().clone()
    with torch.no_grad():
        image_model[4].weight.add_(1)
    for call in (memory.add, memory.search):
        with pytest.raises(DataError, match="The weights of the embedder have changed since it was made"):
            call(images)
    with torch.no_grad():
        image_model[4].weight.copy_(kept)
    assert memory.search(images, 1).ids.ravel().tolist() == [0, 1, 2], "they were put back"
    assert model_embedder(image_model).fingerprint == memory.embedder.fingerprint


class Sentences(nn.Module):
    """As a sentence-embedding model: `encode` takes texts and returns an array."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 12)

    def encode(self, texts):
        return np.stack([self.table(torch.tensor(list(text.encode()))).mean(0).detach().numpy() for text in texts])


def test_a_sentence_embedding_model_and_a_function(tmp_path):
    torch.manual_seed(0)
    model = Sentences()
    memory = LongTermMemory(embedder=model.encode)
    memory.add(["alpha", "beta", "gamma"])
    assert memory.search(["beta"], 1).ids.tolist() == [[1]] and memory.embedder.description == "encode of Sentences"
    memory.save(tmp_path)
    torch.manual_seed(1)
    with pytest.raises(CheckpointError, match="encode of Sentences, with another fingerprint"):
        LongTermMemory.load(tmp_path, Sentences().encode)
    named = function_embedder(lambda texts: [[1.0, float(len(text))] for text in texts], "lengths, version 1")
    assert as_embedder(named) is named and named(["ab"]).tolist() == [[1.0, 2.0]] and "lengths" in named.description
    with pytest.raises(DataError, match="The vectors that the embedder made are of the dtype"):
        function_embedder(lambda texts: texts, "itself")(["a"])


def test_what_makes_no_embedder(gpt, tokenizer, image_model):
    for wrong in (len, lambda texts: texts):
        with pytest.raises(ConfigError, match="The embedder is a function, and nothing says.*fingerprint="):
            LongTermMemory(embedder=wrong)
    with pytest.raises(ConfigError, match="The embedder is of the type str"):
        LongTermMemory(embedder="all-MiniLM-L6-v2")
    with pytest.raises(ConfigError, match="The fingerprint of the embedder is ''"):
        Embedder(len, "", "nothing")
    with pytest.raises(ConfigError, match="has no layer 'haed'. Expected one of its .*head"):
        model_embedder(gpt, tokenizer, "haed")
    for options, message in (
        ({"pool": "positions"}, "The pool of the embedder is 'positions'. Expected one of auto, mean, last, flat"),
        ({"batch_size": 0}, "The batch_size of the embedder is 0. Expected a whole number, at least 1. 32 is usual"),
        ({"side": "top"}, "The side is 'top'. Expected one of input, output"),
        ({"channels": 1.5}, "The axis of channels is 1.5. Expected a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_embedder(gpt, tokenizer, **options)
    with pytest.raises(
        ConfigError, match="The tokenizer of the embedder is 'words'. Expected a TextTokenizer, or a fun"
    ):
        model_embedder(gpt, "words")
    with pytest.raises(ConfigError, match="The tokenizer makes of 3 texts what is .*Expected a list of ids for each"):
        model_embedder(gpt, lambda texts: 3)
    with pytest.raises(ConfigError, match="The function of the embedder is 5. Expected a function from items"):
        Embedder(5, "five", "nothing")
    with pytest.raises(ConfigError, match="The description of the embedder is None. Expected a text"):
        Embedder(len, "length", None)
    broken = nn.Module()
    with pytest.raises(AdapterError):
        model_embedder(broken)


class Encoder:
    """Looks like a model of sentences, and is no `nn.Module`."""

    def encode(self, texts):
        return np.array([[len(text), text.count("e"), 1] for text in texts], dtype=np.float32)


def test_an_object_with_a_method_encode_is_told_how_to_be_one():
    m = Encoder()
    with pytest.raises(ConfigError, match="of the type Encoder, which has a method `encode`") as told:
        LongTermMemory(embedder=m)
    call = told.value.action.removeprefix("Use ").split(" of utils")[0]
    memory = LongTermMemory(embedder=eval(call, {"function_embedder": function_embedder, "m": m}))
    memory.add(["here", "else where"])
    assert memory.search(["here"], 1).ids.tolist() == [[0]]


def test_items_that_cannot_be_embedded(gpt, tokenizer, image_model):
    texts, images = model_embedder(gpt, tokenizer), model_embedder(image_model)
    with pytest.raises(DataError, match="1 of 2 texts have no token: number 1 first"):
        texts(["a", ""])
    with pytest.raises(DataError, match="The items are 2 texts, and the embedder has no tokenizer"):
        images(["a", "b"])
    with pytest.raises(ConfigError, match="Texts are to be embedded with pool=.flat"):
        model_embedder(gpt, tokenizer, pool="flat")(["a"])
    for wrong in (7, [], ["a", 1], None):
        with pytest.raises(DataError, match="Expected texts, samples as a tensor"):
            texts(wrong)
    for wrong in ({"labels": torch.ones(2)}, {}, {"input": torch.ones(0, 1, 8, 8)}):
        with pytest.raises(DataError, match="Expected 'input', and as many rows, one at least"):
            images(wrong)
