import json
import math
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.runtime.errors import DataError
from utils.training import TrainingConfig, corpora
from utils.training.dataset_utilities import load_data, load_prepared, prepare_data, split_documents

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "page",
    "of",
    "text",
    "and",
    "learns",
    "what",
    "word",
    "comes",
    "next",
    "in",
    "every",
    "line",
    "of",
    "the",
    "book",
]


def prose(lines, seed=0):
    generator = np.random.default_rng(seed)
    return "".join(" ".join(generator.choice(WORDS, 9)) + ".\n" for _ in range(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    (root / "deep").mkdir()
    for number in range(12):
        (root / "deep" / f"{number}.txt").write_text(prose(40, number), encoding="utf-8")
    (root / "readme.md").write_text(prose(30, 99) + "Ünïcödé 東京 🙂\n", encoding="utf-8")
    (root / "copy.txt").write_text(prose(40, 0) + "\n", encoding="utf-8")
    (root / "image.png").write_bytes(b"\0\1")
    return root


@pytest.fixture(scope="module")
def text_data(folder):
    return load_data(f"file:{folder}", task="causal_lm", vocab_size=300, max_length=32)


def decoded(data, split):
    tensors = getattr(data, split)
    kept = tensors["labels"] >= 0
    return data.tokenizer.decode(tensors["labels"][kept].tolist())


def test_folder_becomes_windows_that_hold_every_document(folder, text_data):
    facts = text_data.facts
    assert (facts["documents"], facts["duplicates_removed"]) == (13, 1)
    assert facts["train_documents"] + facts["validation_documents"] == 13
    end = "<|endoftext|>"
    train, held_out = decoded(text_data, "train").split(end), decoded(text_data, "validation").split(end)
    originals = {
        path.read_text(encoding="utf-8").strip() for path in folder.rglob("*") if path.suffix in (".txt", ".md")
    }
    assert {text.strip() for text in train + held_out} - {""} == originals
    assert len(train) - 1 == facts["train_documents"]
    assert len(held_out) - 1 == facts["validation_documents"]
    for tensors in (text_data.train, text_data.validation):
        assert tensors["input_ids"].shape == tensors["labels"].shape
        assert tensors["input_ids"].shape[1] == 32
        assert torch.equal(
            tensors["input_ids"].flatten()[1:][tensors["labels"].flatten()[1:] >= 0],
            tensors["labels"].flatten()[:-1][tensors["labels"].flatten()[1:] >= 0],
        )


def test_held_out_bytes_and_zlib_baseline_are_of_exactly_the_held_out_text(text_data):
    texts = decoded(text_data, "validation").split("<|endoftext|>")[:-1]
    blob = "\n".join(texts).encode()
    assert text_data.facts["validation_bytes"] == len(blob)
    assert text_data.facts["zlib_bits_per_byte"] == 8 * len(zlib.compress(blob, 9)) / len(blob)
    assert text_data.facts["validation_tokens"] == int((text_data.validation["labels"] >= 0).sum())


def test_preparing_is_deterministic_and_the_seed_chooses_the_split(folder, text_data):
    again = load_data(f"file:{folder}", task="causal_lm", vocab_size=300, max_length=32)
    assert again.fingerprint() == text_data.fingerprint() == text_data.facts["sha256"]
    other = load_data(f"file:{folder}", task="causal_lm", vocab_size=300, max_length=32, seed=1)
    assert other.fingerprint() != text_data.fingerprint()


def test_masked_language_model_gets_a_mask_token_and_unshifted_labels(folder):
    data = load_data(f"file:{folder}", task="masked_lm", vocab_size=300, max_length=32, pad_token_id=0)
    assert data.tokenizer.mask_id is not None
    assert data.tokenizer.pad_id == 0
    kept = data.train["labels"] >= 0
    assert torch.equal(data.train["labels"][kept], data.train["input_ids"][kept])
    assert (data.train["input_ids"][~kept] == 0).all()


def test_one_document_is_split_by_position_at_a_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\ufeff" + prose(400), encoding="utf-8")
    data = load_data(f"file:{path}", task="causal_lm", vocab_size=280, max_length=16, validation_share=0.1)
    train, held_out = (decoded(data, split).removesuffix("<|endoftext|>") for split in ("train", "validation"))
    assert train + held_out == prose(400)
    assert train.endswith(".\n")
    assert len(held_out) / len(prose(400)) == pytest.approx(0.1, abs=0.02)


def test_split_keeps_a_document_on_its_side_when_others_arrive():
    texts = [prose(5, seed) for seed in range(200)]
    train, held_out = split_documents(texts, 0.1, 8, seed=0)
    assert sorted(train + held_out) == sorted(texts)
    share = sum(map(len, held_out)) / sum(map(len, texts))
    assert 0.08 < share < 0.12
    more_train, more_held_out = split_documents([*texts, prose(5, 1000)], 0.1, 8, seed=0)
    assert len(set(held_out) ^ set(more_held_out)) <= 2
    assert len(set(train) ^ set(more_train)) <= 3


def test_one_huge_document_among_small_ones_is_not_held_out_whole():
    texts = [prose(2000), prose(2, 1), prose(2, 2)]
    train, held_out = split_documents(texts, 0.05, 8, seed=0)
    assert "".join(held_out)
    assert sum(map(len, held_out)) < 0.1 * sum(map(len, texts))
    assert sum(map(len, train + held_out)) == sum(map(len, texts))


@pytest.fixture(scope="module")
def python_docs():
    return load_data("builtin:python-docs", task="causal_lm", vocab_size=512, max_length=128)


def test_python_docs_are_about_two_megabytes_of_real_text(python_docs):
    facts = python_docs.facts
    assert 1_000_000 < facts["train_bytes"] + facts["validation_bytes"] < 6_000_000
    assert facts["documents"] > 2000
    assert facts["duplicates_removed"] > 0
    assert 1.5 < facts["zlib_bits_per_byte"] < 4
    assert facts["validation_bytes"] / (facts["train_bytes"] + facts["validation_bytes"]) == pytest.approx(
        0.05, abs=0.01
    )
    assert python_docs.tokenizer.vocab_size == 512
    assert int(python_docs.train["input_ids"].max()) < 512
    text = python_docs.text()
    assert "builtin:python-docs for causal_lm" in text
    assert "bits per byte on the held-out text" in text


@pytest.mark.slow
def test_python_docs_are_the_same_in_another_process(python_docs):
    code = (
        "from utils.training.dataset_utilities import load_data;"
        "print(load_data('builtin:python-docs', task='causal_lm', vocab_size=512, max_length=128).facts['sha256'])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert other.stdout.strip() == python_docs.facts["sha256"]


def test_python_code_is_the_librarys_source():
    texts = corpora.load_texts("builtin:python-code")
    assert sum(map(len, texts)) > 4_000_000
    assert json.JSONDecoder.__doc__ in next(text for text in texts if "class JSONDecoder(" in text)


def test_docstrings_come_from_every_kind_of_definition(monkeypatch):
    long = "x" * 40
    source = (
        f'"""module {long}"""\nif True:\n    class A:\n        """class {long}"""\n        async def f(self):\n'
        f'            """async {long}"""\n            try:\n                pass\n            finally:\n'
        f'                def g():\n                    """inner {long}"""\n    \ndef short():\n    """short"""\n'
    )
    monkeypatch.setattr(corpora, "_library_sources", lambda: iter([source, "def broken(:\n '''", "no = 1"]))
    assert [text.split()[0] for text in corpora._docstrings()] == ["module", "class", "async", "inner"]


def test_digits_are_normalised_stratified_and_resized():
    data = load_data("builtin:digits", task="image_classification", num_labels=10, image_shape=(3, 16, 12))
    assert data.train["pixel_values"].shape == (data.train_samples, 3, 16, 12)
    assert data.train["pixel_values"].dtype == torch.float32
    assert data.train_samples + data.validation_samples == 1797
    assert data.validation_samples / 1797 == pytest.approx(0.2, abs=0.01)
    assert abs(float(data.train["pixel_values"].mean())) < 1e-4
    assert float(data.train["pixel_values"].std()) == pytest.approx(1, abs=1e-3)
    assert torch.equal(data.train["pixel_values"][:, 0], data.train["pixel_values"][:, 2])
    counts = torch.stack([split["labels"].bincount(minlength=10) for split in (data.train, data.validation)])
    assert ((counts[1] / counts.sum(0)) - 0.2).abs().max() < 0.01
    assert "10 classes" not in data.text()
    assert "classes" in data.text()
    smaller = load_data("builtin:digits", task="image_classification", num_labels=12, image_shape=(1, 4, 4))
    assert smaller.train["pixel_values"].shape[1:] == (1, 4, 4)
    assert torch.equal(smaller.train["labels"], data.train["labels"]), "the split does not depend on the size"
    other = load_data("builtin:digits", task="image_classification", seed=3)
    assert other.train["pixel_values"].shape[1:] == (1, 8, 8)
    assert not torch.equal(other.train["labels"], data.train["labels"])


def test_digits_keep_image_and_label_together():
    data = load_data("builtin:digits", task="image_classification")
    images, labels = corpora.load_digits()
    known = {image.tobytes(): int(label) for image, label in zip((images * 16).round(), labels, strict=True)}
    facts = data.facts
    pixels = ((data.validation["pixel_values"] * facts["deviation"] + facts["mean"]) * 16).round().abs()
    for image, label in zip(pixels[:, 0].numpy(), data.validation["labels"].tolist(), strict=True):
        assert known[image.tobytes()] == label


@pytest.mark.parametrize("kind", ["text", "digits"])
def test_saved_data_loads_bit_for_bit(kind, text_data, tmp_path):
    data = text_data if kind == "text" else load_data("builtin:digits", task="image_classification")
    data.save(tmp_path / "data")
    loaded = load_prepared(tmp_path / "data")
    assert loaded.fingerprint() == data.fingerprint()
    assert loaded.to_dict() == data.to_dict()
    assert loaded.train["labels"].dtype == torch.int64
    data.save(tmp_path / "data")
    assert load_prepared(tmp_path / "data").fingerprint() == data.fingerprint()


def test_damaged_or_foreign_data_is_refused(text_data, tmp_path):
    with pytest.raises(DataError, match="There is no prepared data in"):
        load_prepared(tmp_path)
    text_data.save(tmp_path)
    tensors = tmp_path / "data.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(DataError, match=r"data.safetensors is damaged: its SHA-256"):
        load_prepared(tmp_path)
    tensors.unlink()
    with pytest.raises(DataError, match=r"data.safetensors is missing"):
        load_prepared(tmp_path)
    manifest = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(DataError, match="layout version 99"):
        load_prepared(tmp_path)
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_prepared(tmp_path)


def test_report_escapes_and_counts(text_data):
    page = text_data._repr_html_()
    assert "1 duplicates removed" in page
    assert "&lt;|endoftext|&gt;" in page
    assert "<|endoftext|>" not in page
    assert math.isfinite(text_data.to_dict()["facts"]["zlib_bits_per_byte"])


CAUSAL = {"task": "causal_lm", "vocab_size": 300, "max_length": 32}


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        ("web:some/data", CAUSAL, r"'web:some/data' is not available.*builtin:python-docs.*file:PATH"),
        ("hub:some/data", CAUSAL, r"hub:some/data cannot be reached \(HF_HUB_OFFLINE is set\).*file:PATH"),
        ("hub:", CAUSAL, "names no dataset"),
        ("file:a.csv?colour=red", CAUSAL, r"has the option 'colour=red'.*one of text, label.*\?text=body&label=stars"),
        (
            "file:a.csv?text=body&label=author",
            {"task": "masked_lm"},
            r"names 'author' as the label column.*is masked_lm.*takes \?text=COLUMN\. Leave out label=author, or, if "
            r"text_classification or regression is meant, say ModelSpec\(task=",
        ),
        ("hub:a/b?source=en&target=de", CAUSAL, "names 'en' as the source column.*if seq2seq is meant, say"),
        ("file:a.csv?text=t&stream=true&image=i", CAUSAL, r"as the image column.*Leave out image=i\.$"),
        ("file:a.csv?text=t", {"task": "regression", "features": 2}, r"as the text column.*takes \?label=COLUMN and"),
        ("file:a.csv?samples=0", CAUSAL, "says 'samples=0'.*whole number above 0"),
        ("builtin:digits?stream=true", CAUSAL, "cannot be read while training.*Leave out stream=true"),
        ("file:a.csv?stream=true", {"task": "seq2seq"}, "read while training, and the model's task is seq2seq"),
        ("builtin:wine", CAUSAL, "holds rows of numbers.*Use builtin:python-docs"),
        ("builtin:nothing", CAUSAL, "'builtin:nothing' is not available"),
        (7, CAUSAL, "Data given as builtins.int is not available"),
        ("builtin:digits", CAUSAL, r"builtin:digits holds images.*task is causal_lm.*Use builtin:python-docs"),
        ("builtin:python-docs", {"task": "image_classification"}, "holds plain text.*Use builtin:digits"),
        ("builtin:python-docs", {"task": "regression"}, "holds plain text, and the model's task is regression"),
        (
            "builtin:digits",
            {"task": "image_classification", "num_labels": 2},
            "labels 0 to 9.*2 classes.*num_classes=10",
        ),
        ("builtin:digits", {"task": "image_classification", "image_shape": (8, 8)}, r"image shape is \(8, 8\)"),
        ("builtin:digits", {"task": "image_classification", "validation_share": 0.0}, "validation share is 0.0"),
        ("builtin:python-docs", CAUSAL | {"max_length": 4}, "context is 4 tokens.*at least 8"),
        ("builtin:python-docs", {"task": "causal_lm"}, r"vocabulary size is unknown.*ModelSpec\(vocab_size"),
        ("file:", CAUSAL, "names no file"),
        (f"file:{__file__}", CAUSAL, r"is a .py file, a format that is not available"),
        (
            f"file:{ROOT}/README.md",
            {"task": "embedding"},
            "task is embedding. Data is available for causal_lm",
        ),
        (
            "builtin:diabetes",
            {"task": "regression", "num_labels": 2},
            "predicts 2 numbers for each sample",
        ),
        ("builtin:wine", {"task": "regression", "vocab_size": 300}, "holds rows of numbers, and the model reads text"),
    ],
)
def test_what_does_not_fit_is_refused(reference, arguments, message):
    with pytest.raises(DataError, match=message):
        load_data(reference, **arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "There is no file or folder at .*relative paths start at"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("line.txt", b"one line only\n", "too small: it gives .* tokens to train on"),
        ("binary.txt", b"ab\0cd", "is a binary file"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8: byte 0xe9 at position 3.*iconv"),
        ("table.csv", b"a,b\n", "table.csv is empty"),
        ("table.doc", b"a", "table.doc is a .doc file, a format that is not available. Available are"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(f"file:{tmp_path / name}", **CAUSAL)


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no .txt, .md, .jsonl, .csv, .tsv, .parquet or image file"):
        load_data(f"file:{tmp_path}", **CAUSAL)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"All 1 text files in .* are empty"):
        load_data(f"file:{tmp_path}", **CAUSAL)


def test_a_path_alone_is_answered_with_how_to_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.csv").write_text("text\na\n")
    for path in ("book.csv", "./book.csv?text=text", str(tmp_path)):
        with pytest.raises(DataError, match="does not say what kind it is.*name exists") as caught:
            load_data(path, **CAUSAL)
        assert str(caught.value).endswith(f"Write file:{path}")
    for text in ("absent.csv", ".", "", "a" * 5000, "a\0b"):
        with pytest.raises(DataError, match="is not available"):
            load_data(text, **CAUSAL)


def test_a_batch_larger_than_the_data_is_told(folder, tiny_gpt):
    config = TrainingConfig(batch_size=10**6, context_length=16)
    with pytest.warns(UserWarning, match=r"batch_size is 1000000, and file:.* has \d+ samples.*more than once"):
        data = prepare_data(tiny_gpt, f"file:{folder}", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_data(tiny_gpt, data, config.with_changes(batch_size=data.train_samples))
