"""Datasets of the datasets library: a folder stands in for the Hub, objects are taken as they are."""

import json

import numpy as np
import pytest
import torch

import utils
from utils.runtime.errors import DataError
from utils.training import TrainingConfig, hub_data, text_stream
from utils.training.dataset_utilities import load_data
from utils.training.hub_data import hub_documents

datasets = pytest.importorskip("datasets")

CAUSAL = {"task": "causal_lm", "vocab_size": 300, "max_length": 16, "validation_share": 0.2}
LABELLED = {"task": "text_classification", "vocab_size": 300, "max_length": 32, "num_labels": 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset as its repository holds it: one file for each split."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "hub"
    root.mkdir()
    for split, count, start in (("train", 40, 0), ("test", 10, 100)):
        rows = [{"text": f"{'good' if n % 2 else 'bad'} film number {n}, told at length", "label": n % 2}
                for n in range(start, start + count)]  # fmt: skip
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_a_hub_dataset_is_read_as_a_stream_up_to_a_number_of_samples(folder):
    data = load_data(f"hub:{folder}?samples=30", **LABELLED)
    assert data.train_samples + data.validation_samples == 30
    everything = load_data(f"hub:{folder}", **LABELLED)
    assert everything.train_samples + everything.validation_samples == 40
    assert everything.facts["columns"] == {"text": "text", "label": "label"}


def test_a_named_split_is_what_is_measured_on(folder):
    data = load_data(f"hub:{folder}?validation=test", **LABELLED)
    assert (data.train_samples, data.validation_samples) == (40, 10)
    for ids, length in zip(data.validation["input_ids"], data.validation["lengths"], strict=True):
        assert "number 10" in data.tokenizer.decode(ids[:length].tolist())
    language = load_data(f"hub:{folder}?validation=test", **CAUSAL)
    assert (language.facts["train_documents"], language.facts["validation_documents"]) == (40, 10)


def test_splits_and_datasets_that_are_not_there(folder, tmp_path):
    with pytest.raises(DataError, match=r"has no split 'dev'. Its splits are .*train.*\?split=NAME"):
        load_data(f"hub:{folder}?split=dev", **LABELLED)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"hub:.*nothing cannot be read"):
        load_data(f"hub:{tmp_path}/nothing", **LABELLED)


def test_documents_are_counted_so_that_a_place_can_be_found_again(folder):
    everything = list(hub_documents(str(folder), None, {}))
    assert len(everything) == 40
    for start in (1, 7, 39):
        assert list(hub_documents(str(folder), None, {}, start)) == everything[start:]


def test_a_run_on_a_hub_stream_resumes_bit_for_bit(folder, tmp_path, tiny_gpt, monkeypatch):
    monkeypatch.setattr(text_stream, "WINDOWS", 12)
    monkeypatch.setattr(text_stream, "TOGETHER", 4)
    config = TrainingConfig(
        max_steps=9, batch_size=4, val_every_steps=4, checkpoint_every_steps=3, keep_best=0, validation_share=0.2,
        context_length=16,
    )  # fmt: skip
    whole = utils.train(tiny_gpt, f"hub:{folder}?stream=true", config, run_dir=tmp_path / "a", progress=False)
    newest = sorted(path for path in (tmp_path / "a" / "checkpoints").iterdir() if path.is_dir())[-1]
    import shutil

    expected = whole.summary()["weights_sha256"]
    shutil.rmtree(newest)
    resumed = utils.resume(tmp_path / "a", progress=False)
    assert resumed.summary()["weights_sha256"] == expected


def test_a_dataset_object_knows_the_names_of_its_classes():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"text": [f"film {n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    data = load_data(datasets.Dataset.from_dict(rows, features=features), **LABELLED)
    assert data.facts["class_names"] == ["bad", "good"]
    assert data.reference.startswith("datasets:")
    same = load_data(datasets.Dataset.from_dict(rows, features=features), **LABELLED)
    assert same.reference == data.reference
    assert same.fingerprint() == data.fingerprint()


def test_a_dict_of_datasets_is_measured_on_its_own_split():
    train = datasets.Dataset.from_dict({"text": [f"film {n}" for n in range(20)], "label": [n % 2 for n in range(20)]})
    test = datasets.Dataset.from_dict({"text": ["other 1", "other 2", "film 3"], "label": [0, 1, 1]})
    data = load_data(datasets.DatasetDict({"train": train, "test": test}), **LABELLED)
    # The sample that is in both is trained on and not measured on.
    assert (data.train_samples, data.validation_samples) == (20, 2)
    assert data.report.duplicates == 1


def test_an_iterable_dataset_is_cut(monkeypatch):
    monkeypatch.setattr(hub_data, "MOST_SAMPLES", 12)
    train = datasets.Dataset.from_dict({"text": [f"film {n}" for n in range(20)], "label": [n % 2 for n in range(20)]})
    data = load_data(train.to_iterable_dataset(), **LABELLED)
    assert data.train_samples + data.validation_samples == 12
    assert "only the first 12 rows are used" in data.text()


def test_pictures_of_a_dataset():
    pytest.importorskip("PIL")
    generator = np.random.default_rng(0)
    pictures = [generator.integers(level, level + 30, (9, 9), dtype=np.uint8) for level in [10, 200] * 10]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 10})
    rows = rows.cast_column("image", datasets.Array2D((9, 9), "uint8")).map(
        lambda row: {"picture": {"bytes": _png(np.array(row["image"], dtype=np.uint8)), "path": None}}
    )
    rows = rows.remove_columns("image").rename_column("picture", "image").cast_column("image", datasets.Image())
    data = load_data(rows, task="image_classification", num_labels=2, image_shape=(1, 9, 9))
    for split in (data.train, data.validation):
        assert torch.equal(split["pixel_values"].mean((1, 2, 3)) > 0, split["labels"] == 1)
    assert data.train_samples + data.validation_samples == 20


def _png(pixels):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_data_module_is_refused_with_the_reason():
    lightning = pytest.importorskip("pytorch_lightning")

    class Mine(lightning.LightningDataModule):
        pass

    with pytest.raises(DataError, match=r"Mine is a LightningDataModule.*an order of its own.*Give what it reads"):
        load_data(Mine(), **CAUSAL)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="the dataset is empty"):
        load_data(datasets.Dataset.from_dict({"text": []}), **CAUSAL)


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch):
    import socket
    import time

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(DataError, match=r"hub:owner/name cannot be reached \(127.0.0.1 does not answer"):
            load_data("hub:owner/name", **CAUSAL)
        assert time.monotonic() - started < 5


def test_blank_rows_are_counted_and_not_trained_on(folder):
    rows = [{"text": "" if n % 3 == 0 else f"film number {n}, told at length"} for n in range(200)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").unlink()
    assert len(list(hub_documents(str(folder), None, {}, 5))) == 195, "a place is a number of rows"
    data = load_data(f"hub:{folder}?stream=true", **CAUSAL)
    end = data.tokenizer.eos_id
    stream = text_stream.open_stream(data, TrainingConfig(max_steps=1, batch_size=64))
    for windows in (data.train["input_ids"], next(iter(stream.batches(1)))["input_ids"]):
        for row in windows:
            assert not bool(((row[1:] == end) & (row[:-1] == end)).any())
