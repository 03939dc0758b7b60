import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.runtime.errors import DataError
from utils.tokenization import TextTokenizer, adaptive_tokenizer, choose_tokenizer
from utils.tokenization.bpe_trainer import END, MASK, PAD, train_bpe

CORPUS = ["the quick brown fox jumps over the lazy dog. " * 5, "pack my box with five dozen liquor jugs\n" * 5]
TOKENIZER = choose_tokenizer(CORPUS, 300)
ROOT = Path(__file__).resolve().parents[2]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_of_unicode_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode([text])[0]) == text


def test_every_unicode_character_survives():
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)
    assert TOKENIZER.decode(TOKENIZER.encode([text])[0]) == text


@given(st.lists(st.sampled_from([END, PAD, MASK, "<|reserved_0|>", "<|", "|>", "a", " ", "endoftext"]), max_size=8))
def test_names_of_special_tokens_in_a_text_are_only_text(parts):
    ids = TOKENIZER.encode(["".join(parts)])[0]
    assert not set(ids.tolist()) & set(TOKENIZER.special_ids)
    assert TOKENIZER.decode(ids) == "".join(parts)


def test_a_corpus_full_of_special_names_teaches_no_way_to_write_one():
    tokenizer = choose_tokenizer([END * 50 + MASK * 50, PAD * 50] * 20, 320, "masked_lm", pad_token_id=0)
    ids = tokenizer.encode([END + MASK + PAD])[0]
    assert not set(ids.tolist()) & {tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id}


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 400, 2048])
def test_vocabulary_has_exactly_the_size_asked_for(vocab_size):
    trained = train_bpe(CORPUS, vocab_size)
    vocabulary = trained.tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(vocab_size))
    assert trained.merges + trained.reserved + 256 + 1 == vocab_size
    assert f"exactly {vocab_size} entries" in trained.reason
    assert ("reserved and unused" in trained.reason) == (trained.reserved > 0)
    assert (trained.reserved > 0) == (vocab_size > 307), "the corpus has 50 merges to offer"


def test_special_tokens_follow_the_task_and_the_models_padding_row():
    causal = choose_tokenizer(CORPUS, 300)
    assert (causal.eos_id, causal.pad_id, causal.mask_id) == (0, None, None)
    masked = choose_tokenizer(CORPUS, 300, "masked_lm", pad_token_id=0)
    assert (masked.eos_id, masked.pad_id, masked.mask_id) == (1, 0, 2)
    last = choose_tokenizer(CORPUS, 300, pad_token_id=299)
    assert (last.eos_id, last.pad_id, last.vocab_size) == (0, 299, 300)
    assert last.decode(last.encode(CORPUS)[0]) == CORPUS[0]
    assert choose_tokenizer(CORPUS, 300, pad_token_id=50256).pad_id is None


def test_training_gives_the_same_tokenizer_in_another_process():
    code = (
        "from utils.tokenization import choose_tokenizer; import sys, json;"
        "sys.stdout.write(choose_tokenizer(json.loads(sys.argv[1]), 300).to_json())"
    )
    command = [sys.executable, "-c", code, json.dumps(CORPUS)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == TOKENIZER.to_json()


def test_saved_tokenizer_loads_and_still_treats_special_names_as_text(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.to_dict() | {"reason": ""} == TOKENIZER.to_dict() | {"reason": ""}
    for before, after in zip(TOKENIZER.encode([*CORPUS, END]), loaded.encode([*CORPUS, END]), strict=True):
        np.testing.assert_array_equal(before, after)


def test_unreadable_tokenizer_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="There is no tokenizer at"):
        TextTokenizer.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        TextTokenizer.load(tmp_path / "broken.json")


def test_long_texts_are_cut_at_line_ends_without_loss(monkeypatch):
    monkeypatch.setattr(adaptive_tokenizer, "_PIECE", 50)
    texts = ["one line\n" * 40, "", "x" * 333, "short"]
    ids = TOKENIZER.encode(texts)
    assert [TOKENIZER.decode(document) for document in ids] == texts
    assert ids[1].shape == (0,)


def test_lone_surrogates_are_refused():
    with pytest.raises(DataError, match=r"cannot be encoded.*lone surrogates"):
        TOKENIZER.encode(["half a character: \ud83d"])


def test_decode_can_leave_special_tokens_out():
    ids = [TOKENIZER.eos_id, *TOKENIZER.encode(["fox"])[0]]
    assert TOKENIZER.decode(ids) == END + "fox"
    assert TOKENIZER.decode(ids, skip_special=True) == "fox"
