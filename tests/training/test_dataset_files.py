"""Archives, image folders and texts too large for memory."""

import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

import utils
from utils.runtime.errors import DataError
from utils.training import TrainingConfig, archives, dataset_utilities, language, text_files
from utils.training.dataset_utilities import load_data, load_prepared

CAUSAL = {"task": "causal_lm", "vocab_size": 300, "max_length": 16}
WORDS = ["the", "model", "reads", "a", "page", "of", "text", "and", "learns", "what", "word", "comes", "next"]


def prose(lines, seed=0):
    generator = np.random.default_rng(seed)
    return "".join(" ".join(generator.choice(WORDS, 9)) + ".\n" for _ in range(lines))


@pytest.fixture
def pictures(tmp_path):
    """Two classes of twelve pictures each: dark and bright, with some noise."""
    library = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for name, level in (("bright", 200), ("dark", 20)):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(level, level + 40, (20, 30, 3), dtype=np.uint8)
            library.fromarray(pixels).save(root / name / f"{number}.png")
    return root


IMAGES = {"task": "image_classification", "num_labels": 2, "image_shape": (3, 8, 8)}


def test_image_folder_keeps_image_and_class_together(pictures):
    data = load_data(f"file:{pictures}", **IMAGES)
    assert data.facts["class_names"] == ["bright", "dark"]
    assert data.train["pixel_values"].shape[1:] == (3, 8, 8)
    assert (data.train_samples, data.validation_samples) == (20, 4)
    for split in (data.train, data.validation):
        bright = split["pixel_values"].mean((1, 2, 3)) > 0
        assert torch.equal(bright, split["labels"] == 0)
    assert data.report.classes == {"bright": [10, 2], "dark": [10, 2]}
    assert "<svg" in data._repr_html_()


def test_a_few_damaged_images_are_left_out_and_many_are_an_error(pictures):
    (pictures / "dark" / "0.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 24 images cannot be read and were left out: dark/0.png"):
        data = load_data(f"file:{pictures}", **IMAGES)
    assert data.train_samples + data.validation_samples == 23
    assert "1 of 24 images cannot be read" in data.text()
    for number in range(1, 4):
        (pictures / "dark" / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"4 of 24 images of .* cannot be read: .* and 1 more.*at most 10%"):
        load_data(f"file:{pictures}", **IMAGES)


def test_images_outside_class_folders_are_refused(pictures):
    shutil.copy(pictures / "dark" / "0.png", pictures / "loose.png")
    with pytest.raises(DataError, match="do not all lie in a folder that names their class"):
        load_data(f"file:{pictures}", **IMAGES)


def test_more_classes_than_outputs_and_other_tasks_are_refused(pictures):
    (pictures / "grey").mkdir()
    shutil.copy(pictures / "dark" / "0.png", pictures / "grey" / "0.png")
    with pytest.raises(DataError, match=r"3 different labels \(bright, dark, grey\), and the model tells 2 classes"):
        load_data(f"file:{pictures}", **IMAGES)
    with pytest.raises(DataError, match="holds images, and the model's task is causal_lm"):
        load_data(f"file:{pictures}", **CAUSAL)


def test_too_many_images_for_memory_are_refused(pictures, monkeypatch):
    monkeypatch.setattr("utils.training.images.available_memory", lambda: 10_000)
    with pytest.raises(DataError, match=r"holds 24 images, which take 18.4 kB at \(3, 8, 8\)"):
        load_data(f"file:{pictures}", **IMAGES)


def zipped(folder, target):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    return f"file:{target}"


def test_zip_is_the_same_as_the_folder(pictures, tmp_path):
    folder = load_data(f"file:{pictures}", **IMAGES)
    archive = load_data(zipped(pictures, tmp_path / "pictures.zip"), **IMAGES)
    assert archive.fingerprint() == folder.fingerprint()
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(prose(20, number), encoding="utf-8")
    assert (
        load_data(zipped(texts, tmp_path / "t.zip"), **CAUSAL).fingerprint()
        == load_data(f"file:{texts}", **CAUSAL).fingerprint()
    )


def test_one_file_in_a_zip(tmp_path):
    (tmp_path / "book.txt").write_text(prose(200), encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.write(tmp_path / "book.txt", "deep/book.txt")
    assert load_data(f"file:{tmp_path}/one.zip", **CAUSAL).facts["documents"] == 1


def test_bad_archives_are_refused(tmp_path, monkeypatch):
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_data(f"file:{tmp_path}/bad.zip", **CAUSAL)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "torn.zip", "w", method) as archive:
            archive.writestr("a.txt", "hello world " * 5000)
        content = bytearray((tmp_path / "torn.zip").read_bytes())
        for place in range(45, 70):
            content[place] ^= 0x5A
        (tmp_path / "torn.zip").write_bytes(bytes(content))
        with pytest.raises(DataError, match="torn.zip cannot be unpacked"):
            load_data(f"file:{tmp_path}/torn.zip", **CAUSAL)
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../outside.txt", "text")
    with pytest.raises(DataError, match=r"wants to write outside its folder, to '../outside.txt'"):
        load_data(f"file:{tmp_path}/evil.zip", **CAUSAL)
    with zipfile.ZipFile(tmp_path / "fine.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    monkeypatch.setattr(archives, "MOST_FILES", 0)
    with pytest.raises(DataError, match="holds 1 files of 4 B when unpacked"):
        load_data(f"file:{tmp_path}/fine.zip", **CAUSAL)


@pytest.fixture
def small_memory(monkeypatch):
    """Every text is large now, and every file comes in blocks of a few kilobytes."""
    monkeypatch.setattr(dataset_utilities, "IN_MEMORY", 1000)
    monkeypatch.setattr(text_files, "WHOLE", 1000)
    monkeypatch.setattr(text_files.blocks, "__defaults__", (2000,))


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_large_text_becomes_a_file_of_ids_that_holds_every_byte(tmp_path, small_memory, task):
    text = "\ufeff" + prose(3000) + "Ünïcödé 東京 🙂\n" * 30
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    data = load_data(f"file:{tmp_path}/large.txt", **CAUSAL | {"task": task})
    assert data.tokens is not None
    assert data.train["input_ids"].dtype == torch.uint16
    end = "<|endoftext|>"
    ids = np.fromfile(data.tokens.path, dtype=data.tokens.dtype)
    kept = data.validation["labels"][data.validation["labels"] >= 0].tolist()
    pieces = data.tokenizer.decode(ids).split(end) + data.tokenizer.decode(kept).split(end)
    assert sorted(piece for piece in pieces if piece) == sorted(text_files.blocks(tmp_path / "large.txt"))
    assert sum(map(len, pieces)) == len(text) - 1
    windows = data.train
    assert windows["input_ids"].flatten().tolist() == ids[: windows["input_ids"].numel()].tolist()
    shift = int(task == "causal_lm")
    assert windows["labels"].flatten().tolist() == ids[shift : shift + windows["labels"].numel()].tolist()


def test_large_text_is_saved_and_loaded_as_a_file(tmp_path, small_memory):
    (tmp_path / "large.txt").write_text(prose(2000), encoding="utf-8")
    data = load_data(f"file:{tmp_path}/large.txt", **CAUSAL)
    temporary = data.tokens.path
    data.save(tmp_path / "data")
    loaded = load_prepared(tmp_path / "data")
    assert loaded.fingerprint() == data.fingerprint()
    assert loaded.to_dict() == data.to_dict()
    assert torch.equal(loaded.train["labels"], data.train["labels"])
    loaded.save(tmp_path / "data")
    assert load_prepared(tmp_path / "data").fingerprint() == loaded.fingerprint()
    del data
    assert not temporary.exists(), "the temporary file goes with the object"
    with open(tmp_path / "data" / "tokens.bin", "r+b") as stream:
        stream.write(b"\xff")
    with pytest.raises(DataError, match=r"tokens.bin is damaged"):
        load_prepared(tmp_path / "data")


def test_a_run_on_large_text_resumes_from_its_own_copy(tmp_path, small_memory, tiny_gpt):
    (tmp_path / "large.txt").write_text(prose(400), encoding="utf-8")
    config = TrainingConfig(
        max_steps=6, batch_size=4, val_every_steps=6, checkpoint_every_steps=3, keep_best=0, validation_share=0.3
    )
    whole = utils.train(tiny_gpt, f"file:{tmp_path}/large.txt", config, run_dir=tmp_path / "run", progress=False)
    assert whole.data.tokens is not None
    expected = whole.summary()["weights_sha256"]
    del whole
    (tmp_path / "large.txt").unlink()
    shutil.rmtree(sorted(path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())[-1])
    resumed = utils.resume(tmp_path / "run", progress=False)
    assert resumed.data.tokens is not None
    assert resumed.summary()["weights_sha256"] == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_utilities, "IN_MEMORY", 1000)
    monkeypatch.setattr(text_files, "WHOLE", 1000)
    monkeypatch.setattr(text_files.blocks, "__defaults__", (20_000,))
    monkeypatch.setattr(language, "AT_ONCE", 40_000)
    monkeypatch.setattr(language, "SAMPLE_FOR_TOKENIZER", 50_000)
    monkeypatch.setattr(language, "MOST_HELD_OUT", 100_000)

    def peak(lines):
        (tmp_path / "large.txt").write_text(prose(lines), encoding="utf-8")
        tracemalloc.start()
        load_data(f"file:{tmp_path}/large.txt", **CAUSAL, validation_share=0.3)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    small, large = peak(8_000), peak(32_000)
    assert large < 1.5 * small


def test_twenty_gigabytes_are_not_read_into_memory(tmp_path):
    path = tmp_path / "huge.txt"
    with open(path, "wb") as stream:
        stream.truncate(20_000_000_000)  # sparse: takes no space
    with pytest.raises(DataError, match=r"huge.txt is a binary file"):
        load_data(f"file:{path}", **CAUSAL)


def test_a_disk_too_small_for_the_ids_is_told_before(tmp_path, small_memory, monkeypatch):
    (tmp_path / "large.txt").write_text(prose(500), encoding="utf-8")
    monkeypatch.setattr(language.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(DataError, match=r"whose token ids take up to .* has 0 B to spare.*\?stream=true"):
        load_data(f"file:{tmp_path}/large.txt", **CAUSAL)


def test_tables_too_large_for_memory_are_refused(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("text,label\n" + "word,0\nother,1\n" * 50)
    monkeypatch.setattr(dataset_utilities, "available_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"holds .* of rows. At most 50 B.*\?samples=N"):
        load_data(f"file:{tmp_path}/t.csv", task="text_classification", vocab_size=300, max_length=16)


def test_blocks_name_the_place_of_a_broken_byte(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("é ".encode() * 3000 + b"\xe9 " + b"a " * 3000)
    with pytest.raises(DataError, match="byte 0xe9 at position 9000 cannot be decoded"):
        list(text_files.blocks(path, 1001))
    path.write_bytes("é ".encode() * 300 + b"\xc3")
    with pytest.raises(DataError, match="byte 0xc3 at position 900 cannot"):
        list(text_files.blocks(path, 101))
    path.write_text("x" * 10_000)
    assert "".join(text_files.blocks(path, 100)) == "x" * 10_000


def test_a_column_of_text_from_a_table_is_read_row_by_row(tmp_path):
    import json

    rows = [{"id": n, "content": prose(6, n)} for n in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(f"file:{tmp_path}/t.jsonl", **CAUSAL)
    assert data.facts["documents"] == 20
    assert load_data(f"file:{tmp_path}/t.jsonl?samples=10", **CAUSAL).facts["documents"] == 10
