"""Which tokenizer a model gets: its own, a public one, byte level, or characters."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from utils.adapters import ModelAdapter
from utils.runtime.errors import DataError
from utils.tokenization import Candidate, TextTokenizer, choose_tokenizer, document_positions, own_tokenizer, pretrained
from utils.tokenization.bpe_trainer import END, UNKNOWN

CORPUS = ["the quick brown fox jumps over the lazy dog. " * 5, "pack my box with five dozen liquor jugs\n" * 5]
CHARACTERS = choose_tokenizer(CORPUS, 100)
KNOWN = sorted(set("".join(CORPUS)))


@pytest.mark.parametrize("vocab_size", [5, 30, 60, 100, 256])
def test_characters_fill_the_vocabulary_exactly(vocab_size):
    tokenizer = choose_tokenizer(CORPUS, vocab_size)
    assert sorted(tokenizer.tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert not tokenizer.lossless
    assert f"character level, because {vocab_size} entries are too few" in tokenizer.reason
    assert tokenizer.to_dict()["unknown_id"] == tokenizer.unknown_id == 1
    ids = tokenizer.encode(CORPUS)[0]
    assert (tokenizer.decode(ids) == CORPUS[0]) == (vocab_size >= len(KNOWN) + 2)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(KNOWN), max_size=60))
def test_known_characters_survive(text):
    ids = CHARACTERS.encode([text])[0]
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_other_character_becomes_one_unknown_id(text):
    ids = CHARACTERS.encode([text])[0].tolist()
    assert [number == CHARACTERS.unknown_id for number in ids] == [character not in KNOWN for character in text]
    assert CHARACTERS.decode(ids) == "".join(c if c in KNOWN else UNKNOWN for c in text)


def test_the_commonest_characters_are_kept_and_the_rest_is_counted():
    tokenizer = choose_tokenizer(["aaaabbbccd"], 5)
    assert tokenizer.decode(tokenizer.encode(["abcd"])[0]) == f"abc{UNKNOWN}"
    assert "10.00% of the training text's characters become" in tokenizer.reason
    padded = choose_tokenizer(["ab"], 8, "masked_lm", pad_token_id=7)
    assert (padded.eos_id, padded.mask_id, padded.unknown_id, padded.pad_id) == (0, 1, 2, 7)
    assert "2 reserved and unused" in padded.reason


def test_names_of_special_tokens_are_spelled_out():
    ids = choose_tokenizer([END], 60).encode([END])[0]
    assert len(ids) == len(END)


def test_too_small_even_for_characters():
    with pytest.raises(DataError, match=r"vocabulary has 3 entries. Even character level needs at least 4"):
        choose_tokenizer(CORPUS, 3)


def test_saved_characters_load(tmp_path):
    CHARACTERS.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json", lossless=False)
    assert loaded.encode(["fox é"])[0].tolist() == CHARACTERS.encode(["fox é"])[0].tolist()
    assert loaded.to_dict() | {"reason": ""} == CHARACTERS.to_dict() | {"reason": ""}


def test_byte_level_begins_where_bytes_fit():
    assert choose_tokenizer(CORPUS, 257).lossless
    assert not choose_tokenizer(CORPUS, 257, "masked_lm").lossless
    assert choose_tokenizer(CORPUS, 258, "masked_lm").lossless
    assert choose_tokenizer(CORPUS, 300, "text_classification").pad_id is not None


BYTES = choose_tokenizer(CORPUS, 280).to_json()


def test_a_fitting_candidate_wins_and_the_others_are_explained():
    chosen = choose_tokenizer(
        CORPUS, 300, candidates=[None, Candidate(None, "nothing there"), Candidate(BYTES, "mine")]
    )
    assert chosen.vocab_size == 280
    assert chosen.reason == "mine: 280 entries for a vocabulary of 300"
    trained = choose_tokenizer(
        CORPUS,
        270,
        candidates=[Candidate(BYTES, "mine"), Candidate("{", "torn"), Candidate(None, "the Hub does not answer")],
    )
    assert trained.vocab_size == 270
    assert "(mine has ids up to 279, and the model knows 270)" in trained.reason
    assert "torn cannot be read as a tokenizer" in trained.reason
    assert "(the Hub does not answer)" in trained.reason
    masked = choose_tokenizer(CORPUS, 300, "masked_lm", candidates=[Candidate(BYTES, "mine")])
    assert "mine has no mask token" in masked.reason


def lower_case():
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(BYTES)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    return tokenizer.to_str()


def test_a_tokenizer_that_loses_something_is_not_for_writing():
    text = ["The Quick Brown Fox " * 20]
    written = choose_tokenizer(text, 300, candidates=[Candidate(lower_case(), "lower")])
    assert "lower does not give the text back that it took apart" in written.reason
    assert written.lossless
    read = choose_tokenizer(text, 300, "text_classification", candidates=[Candidate(lower_case(), "lower")])
    assert not read.lossless
    assert "it changes the text" in read.reason


def test_names_of_other_makers_are_understood():
    import tokenizers

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[SEP]": 2, "[MASK]": 3, "a": 4}, "[UNK]")
    )
    found = TextTokenizer(tokenizer, "")
    assert (found.unknown_id, found.pad_id, found.eos_id, found.mask_id, found.fill_id) == (0, 1, 2, 3, 1)


def test_the_tokenizer_beside_a_model_is_its_own(tmp_path):
    example = utils.load_model(
        "example:gpt", config={"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
    )
    example.save_source(tmp_path / "model")
    assert own_tokenizer(example) is None
    (tmp_path / "model" / "tokenizer.json").write_text(BYTES)
    loaded = utils.load_model(tmp_path / "model")
    found = own_tokenizer(loaded)
    assert found is not None
    assert json.loads(found.content) == json.loads(BYTES)
    from utils.training.dataset_utilities import prepare_data

    (tmp_path / "t.txt").write_text(" ".join(CORPUS) * 20)
    data = prepare_data(ModelAdapter(loaded), f"file:{tmp_path}/t.txt")
    assert data.tokenizer.vocab_size == 280
    assert "the model's own tokenizer.json" in data.tokenizer.reason


def test_a_public_tokenizer_is_asked_for_by_size_only(monkeypatch):
    assert pretrained.public_tokenizer(1234) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = pretrained.public_tokenizer(50257)
    assert found.content is None
    assert "hub:openai-community/gpt2 cannot be fetched (HF_HUB_OFFLINE is set)" in found.origin


def test_a_public_tokenizer_comes_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    calls = []

    def download(name, file, **arguments):
        calls.append((name, arguments.get("local_files_only", False)))
        if arguments.get("local_files_only"):
            raise OSError("not there")
        (tmp_path / file).write_text(BYTES)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(pretrained, "hub_unreachable", lambda: None)
    found = pretrained.public_tokenizer(50257)
    assert found == Candidate(BYTES, "hub:openai-community/gpt2")
    assert calls == [("openai-community/gpt2", True), ("openai-community/gpt2", False)]


def test_positions_begin_anew_at_each_document():
    ids = torch.tensor([[0, 5, 6, 0, 7, 8], [5, 6, 0, 0, 7, 0]])
    assert document_positions(ids, 0).tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 0]]
