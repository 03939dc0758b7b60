"""Several references, and tables cut by a column, as one piece of data that knows its parts."""

import json
import zipfile

import numpy as np
import pytest
import torch

from utils.runtime.errors import DataError
from utils.training import TrainingConfig
from utils.training.data_parts import divide, parts_of
from utils.training.dataset_utilities import load_data, prepare_data, reference_of
from utils.training.prepared_data import load_prepared
from utils.training.tables import Table

CAUSAL = {"task": "causal_lm", "vocab_size": 300, "max_length": 16}
TEXTS = {"task": "text_classification", "vocab_size": 300, "max_length": 16}
ROWS = {"task": "tabular_classification"}


@pytest.fixture
def english(tmp_path):
    path = tmp_path / "english.txt"
    path.write_text(" ".join(f"the {n} ships sailed home" for n in range(400)), encoding="utf-8")
    return f"file:{path}"


@pytest.fixture
def greek(tmp_path):
    path = tmp_path / "greek.txt"
    path.write_text(" ".join(f"τα {n} πλοία γύρισαν" for n in range(400)), encoding="utf-8")
    return f"file:{path}"


def table(path, columns):
    names = list(columns)
    lines = [",".join(names), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"file:{path}"


def labelled(path, labels, count=20, word="text"):
    return table(path, {"text": [f"{word} number {n}" for n in range(count)],
                        "label": [labels[n % len(labels)] for n in range(count)]})  # fmt: skip


def message(reference, **needs):
    with pytest.raises(DataError) as caught:
        load_data(reference, **needs)
    error = caught.value
    assert error.found and error.expected
    return str(error)


def test_texts_are_joined_in_their_order_with_the_tokenizer_of_the_first(english, greek):
    first = load_data(english, **CAUSAL)
    data = load_data([english, greek], **CAUSAL)
    one, other = data.facts["parts"]
    assert (one["name"], other["name"]) == ("english.txt", "greek.txt")
    assert data.tokenizer.to_json() == first.tokenizer.to_json()
    assert torch.equal(data.train["input_ids"][: one["train"]], first.train["input_ids"])
    assert torch.equal(data.validation["labels"][: one["validation"]], first.validation["labels"])
    assert one["train"] + other["train"] == data.train_samples
    assert one["validation"] + other["validation"] == data.validation_samples
    assert data.reference == reference_of([english, greek]) == f"{english} + {greek}"
    # A byte-level tokenizer gives every later text back.
    text = data.tokenizer.decode(data.train["input_ids"][one["train"] :].flatten(), skip_special=True)
    assert "πλοία γύρισαν" in text
    assert other["unknown_share"] == 0
    assert any("greek.txt" in note and "0.00% of the tokens unknown" in note for note in data.report.notes)


def test_facts_are_those_of_all_parts(english, greek):
    one, other = load_data(english, **CAUSAL), load_data([english, greek], **CAUSAL)
    alone = load_data([greek, english], **CAUSAL).facts
    for name in ("train_bytes", "validation_bytes", "documents"):
        assert other.facts[name] == alone[name] > one.facts[name]
    bits = other.facts["zlib_bits_per_byte"] * other.facts["validation_bytes"]
    assert bits == pytest.approx(alone["zlib_bits_per_byte"] * alone["validation_bytes"])
    assert other.report.train == 2 and other.report.overlap["checked"] == 2
    assert other.facts["length"] == 16


def test_a_dict_names_the_parts(english, greek, tmp_path):
    data = load_data({"old": english, "new": greek}, **CAUSAL)
    assert [part["name"] for part in data.facts["parts"]] == ["old", "new"]
    assert data.reference == f"old={english} + new={greek}"
    data.save(tmp_path / "data")
    assert load_prepared(tmp_path / "data").facts["parts"] == data.facts["parts"]


def test_names_of_parts():
    assert parts_of("builtin:digits") is None
    same = parts_of(("file:a/x.txt", "file:b/x.txt", object))
    assert [name for name, _ in same] == ["file:a/x.txt", "file:b/x.txt", "part 3"]
    with pytest.raises(DataError, match=r"empty list.*Expected references.*Name at least two"):
        parts_of([])
    with pytest.raises(DataError, match=r"Two parts.*different name.*dict"):
        parts_of(["file:x.txt", "file:x.txt"])


def test_characters_that_the_first_part_lacks_are_told_and_too_many_refused(english, greek, tmp_path):
    needs = {"task": "causal_lm", "vocab_size": 60, "max_length": 16}
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(" ".join(f"the {n} πλοία ships sailed home at noon" for n in range(400)), encoding="utf-8")
    data = load_data([english, f"file:{mixed}"], **needs)
    share = data.facts["parts"][1]["unknown_share"]
    assert 0.05 < share < 0.4 and data.facts["validation_unknown"] > 0
    assert any(warning.startswith("mixed.txt: ") and "no id" in warning for warning in data.report.warnings)
    said = message([english, greek], **needs)
    assert "Part 2 of the data (greek.txt)" in said and "no id of their own" in said and "257" in said


def test_an_error_names_its_part(english, tmp_path):
    said = message([english, f"file:{tmp_path}/none.txt"], **CAUSAL)
    assert said.startswith("Part 2 of the data (none.txt) cannot be used.") and "There is no file" in said
    data = load_data(english, **CAUSAL)
    assert "prepared already" in message([english, data], **CAUSAL)
    assert "Part 1 of the data (part 1)" in message([["builtin:digits"], english], **CAUSAL)


def test_what_is_not_in_memory_is_refused(english, tmp_path, monkeypatch):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"story {n} " * 30}) + "\n" for n in range(60)))
    said = message([english, f"file:{path}?stream=true"], **CAUSAL)
    assert "Part 2" in said and "read while training" in said and "stream=true" in said
    monkeypatch.setattr("utils.training.dataset_utilities.IN_MEMORY", 1000)
    said = message([f"{english}?samples=1", f"file:{path}"], **CAUSAL)
    assert "Part 2" in said and "joined in memory" in said and "?samples=N" in said


def test_classes_are_united_by_name(tmp_path):
    one = labelled(tmp_path / "a.csv", ["cat", "dog"])
    other = labelled(tmp_path / "b.csv", ["ant", "dog", "bee"], word="a longer text with a")
    data = load_data([one, other], **TEXTS)
    assert data.facts["class_names"] == ["cat", "dog", "ant", "bee"] and data.facts["classes"] == 4
    alone = [load_data(each, **TEXTS) for each in (one, other)]
    parts, start = data.facts["parts"], 0
    for own, part in zip(alone, parts, strict=True):
        names = [own.facts["class_names"][n] for n in own.train["labels"]]
        joined = [data.facts["class_names"][n] for n in data.train["labels"][start : start + part["train"]]]
        assert joined == names
        start += part["train"]
    lengths = data.train["lengths"]
    assert data.train["input_ids"].shape[1] == lengths.max() and (lengths > 0).all()
    assert data.report.classes["dog"][0] > data.report.classes["bee"][0] > 0
    said = message([one, other], **TEXTS, num_labels=3)
    assert "4 classes" in said and "num_classes=4" in said


def test_whole_numbers_keep_their_value_where_they_can(tmp_path):
    low, high = labelled(tmp_path / "a.csv", [0, 1]), labelled(tmp_path / "b.csv", [2, 3])
    data = load_data([low, high], **TEXTS, num_labels=4)
    assert data.facts["class_names"] == ["0", "1", "2", "3"]
    split = data.facts["parts"][0]["train"]
    assert set(data.train["labels"][:split].tolist()) == {0, 1} and set(data.train["labels"][split:].tolist()) == {2, 3}
    # A class that one part lacks moves no other.
    gap = load_data([labelled(tmp_path / "c.csv", [0, 1, 2]), labelled(tmp_path / "d.csv", [0, 2])], **TEXTS)
    assert gap.facts["class_names"] == ["0", "1", "2"]
    assert set(gap.train["labels"][gap.facts["parts"][0]["train"] :].tolist()) == {0, 2}
    stars = load_data([labelled(tmp_path / "e.csv", [1, 5]), labelled(tmp_path / "f.csv", [1, 3, 5])], **TEXTS)
    assert stars.facts["class_names"] == ["1", "3", "5"]


@pytest.mark.parametrize(("one", "other"), [([0, 1, 2], [1, 2, 3]), ([1, 2], [0, 1])])
def test_labels_that_shift_are_refused(tmp_path, one, other):
    said = message([labelled(tmp_path / "a.csv", one), labelled(tmp_path / "b.csv", other)], **TEXTS)
    assert "'a.csv'" in said and "'b.csv'" in said and "counted from 0" in said and "Count alike" in said


def test_words_and_numbers_are_not_mixed(tmp_path):
    said = message([labelled(tmp_path / "a.csv", ["no", "yes"]), labelled(tmp_path / "b.csv", [0, 1])], **TEXTS)
    assert "'a.csv' are words" in said and "'b.csv' are numbers" in said and "names of the classes" in said


def test_too_many_numbers_for_the_model(tmp_path):
    parts = [labelled(tmp_path / "a.csv", [0, 1]), labelled(tmp_path / "b.csv", [2, 3])]
    assert "All parts together" in message(parts, **TEXTS, num_labels=3)
    assert "holds the one label" in message([parts[0], labelled(tmp_path / "c.csv", [1])], **TEXTS)


def test_rows_have_the_scale_and_the_columns_of_the_first_part(tmp_path):
    draw = np.random.default_rng(0)
    values = {"x": draw.normal(5, 2, 40).round(3), "kind": ["a", "b"] * 20, "label": [0, 1] * 20}
    later = {"kind": ["b", "b"] * 20, "x": draw.normal(-100, 9, 40).round(3), "label": [1, 0] * 20}
    refs = [table(tmp_path / "a.csv", values), table(tmp_path / "b.csv", later)]
    data = load_data(refs, **ROWS)
    first = load_data(refs[0], **ROWS)
    parts = data.facts["parts"]
    assert torch.equal(data.train["features"][: parts[0]["train"]], first.train["features"])
    mean, deviation = first.facts["feature_means"][0], first.facts["feature_deviations"][0]
    place = data.facts["features"].index("x")
    restored = data.train["features"][parts[0]["train"] :, place].double() * deviation + mean
    assert np.abs(restored.numpy()[:, None] - later["x"]).min(1).max() < 1e-4
    other = table(tmp_path / "c.csv", {"y": values["x"], "kind": values["kind"], "label": values["label"]})
    said = message([refs[0], other], **ROWS)
    assert "Part 2" in said and "first part: x, kind=a, kind=b" in said and "same columns" in said


def test_numbers_to_predict_have_the_scale_of_the_first_part(tmp_path):
    draw = np.random.default_rng(0)
    refs = [
        table(tmp_path / f"{n}.csv", {"x": draw.normal(size=30).round(4), "y": draw.normal(n, 1 + n, 30).round(4)})
        for n in (0, 50)
    ]
    data = load_data(refs, task="regression", features=1)
    first = load_data(refs[0], task="regression", features=1)
    assert data.facts["target_mean"] == first.facts["target_mean"]
    split = data.facts["parts"][0]["train"]
    assert torch.equal(data.train["labels"][:split], first.train["labels"])
    assert data.train["labels"][split:].mean() > 10


def test_images_have_the_scale_of_the_first_part_and_one_shape(tmp_path):
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for folder, low in (("dark", 0), ("light", 120)):
        for kind in ("0", "1"):
            (tmp_path / folder / kind).mkdir(parents=True)
            for n in range(6):
                pixels = draw.integers(low, low + 100, (8, 8), dtype=np.uint8)
                image.fromarray(pixels).save(tmp_path / folder / kind / f"{n}.png")
    refs = [f"file:{tmp_path / name}" for name in ("dark", "light")]
    needs = {"task": "image_classification", "image_shape": (1, 8, 8)}
    data, first = load_data(refs, **needs), load_data(refs[0], **needs)
    split = data.facts["parts"][0]["train"]
    assert torch.equal(data.train["pixel_values"][:split], first.train["pixel_values"])
    assert data.train["pixel_values"][split:].mean() > 1
    assert load_data(["builtin:digits", refs[0]], **needs).facts["flips"] is False
    said = message(["builtin:digits", refs[0]], task="image_classification")
    assert "Part 2" in said and "pixel_values: [3, 64, 64]" in said and "[1, 8, 8]" in said


def test_a_table_is_divided_by_a_column(tmp_path):
    rows = {
        "text": [f"{'abc'[n % 3]} text {n}" for n in range(60)],
        "label": [n // 3 % 2 for n in range(60)],
        "domain": ["", *["xyz"[n % 3] for n in range(1, 60)]],
    }
    data = load_data(table(tmp_path / "all.csv", rows) + "?task=domain", **TEXTS)
    parts = data.facts["parts"]
    assert [part["name"] for part in parts] == ["y", "z", "x"]
    assert [part["train"] + part["validation"] for part in parts] == [20, 20, 19]
    start = 0
    for part, letter in zip(parts, "bca", strict=True):
        for ids, length in zip(data.train["input_ids"][start : start + part["train"]],
                               data.train["lengths"][start : start + part["train"]], strict=True):  # fmt: skip
            assert data.tokenizer.decode(ids[: int(length)])[0] == letter
        start += part["train"]
    assert all(part["columns"] == {"text": "text", "label": "label"} for part in parts)
    assert any("1 rows without a value" in note for note in data.report.notes)
    # In one table a label means the same everywhere: no suspicion of labels that shift.
    rows["label"] = [n // 3 % 2 + (n % 3 == 1) for n in range(60)]
    assert load_data(table(tmp_path / "all.csv", rows) + "?task=domain", **TEXTS).facts["classes"] == 3


def test_a_jsonl_of_text_is_divided_for_a_language_model(tmp_path):
    path = tmp_path / "all.jsonl"
    rows = [{"body": f"{kind} story number {n} " * 12, "kind": kind} for n in range(12) for kind in ("old", "new")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(f"file:{path}?task=kind&text=body", **CAUSAL)
    parts = data.facts["parts"]
    assert [part["name"] for part in parts] == ["old", "new"]
    texts = [data.tokenizer.decode(rows.flatten(), skip_special=True)
             for rows in data.train["input_ids"].split([part["train"] for part in parts])]  # fmt: skip
    assert "old" in texts[0] and "new" not in texts[0] and "new" in texts[1] and "old" not in texts[1]


def test_builtin_tables_are_divided_and_held_out_rows_follow():
    rows = Table({"x": [1, 2, 3, 4], "kind": [0, 1, 1, None]}, "t", {"kind": ["left", "right"]})
    held = Table({"x": [5, 6], "kind": [1, 2]}, "h", {"kind": ["left", "right"]})
    found = divide(rows, "kind", held)
    assert [(name, one.columns, other.columns) for name, one, other in found] == [
        ("left", {"x": [1]}, {"x": []}), ("right", {"x": [2, 3]}, {"x": [5]})
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no column 'no'.*Its columns are x, kind.*task=COLUMN"):
        divide(rows, "no")
    with pytest.raises(DataError, match=r"holds 1 different values.*2 to 100"):
        divide(Table({"x": [1, 2], "kind": ["a", "a"]}, "t"), "kind")


def test_where_a_column_cannot_divide(english, tmp_path):
    rows = labelled(tmp_path / "a.csv", [0, 1])
    assert "holds no table" in message(f"{english}?task=x", **CAUSAL)
    assert "holds no table" in message("builtin:digits?task=x", task="image_classification")
    assert "one of several parts" in message([rows, f"{rows}?task=label"], **TEXTS)
    assert "read while training" in message(f"{rows}?task=label&stream=true", **CAUSAL)
    assert "no column 'nothing'" in message("builtin:wine?task=nothing", task="tabular_classification")


def test_a_model_is_asked_about_boundaries_of_all_parts(english, text_file, tiny_gpt):
    data = prepare_data(tiny_gpt, [f"file:{text_file}", english])
    assert data.facts["boundaries"] and data.facts["length"] == 32
    with pytest.warns(UserWarning, match=r"batch_size is 9999.*topics.txt \+ file"):
        prepare_data(tiny_gpt, [f"file:{text_file}", english], TrainingConfig(batch_size=9999))


def test_datasets_are_parts_and_a_folder_of_the_hub_is_divided(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        datasets.Dataset.from_dict({"text": [f"{word} {n}" for n in range(20)], "label": [0, 1] * 10}).cast_column(
            "label", datasets.ClassLabel(names=["bad", "good"])
        )
        for word in ("old", "new")
    ]
    data = load_data({"first": rows[0], "second": rows[1]}, **TEXTS)
    assert data.facts["class_names"] == ["bad", "good"]
    assert data.reference.startswith("first=datasets:") and " + second=datasets:" in data.reference
    (tmp_path / "hub").mkdir()
    lines = [f"{kind} {n},{n % 2},{kind}" for n in range(20) for kind in ("old", "new")]
    (tmp_path / "hub" / "train.csv").write_text("text,label,kind\n" + "\n".join(lines))
    parts = load_data(f"hub:{tmp_path}/hub?task=kind", **TEXTS).facts["parts"]
    assert [(part["name"], part["train"] + part["validation"]) for part in parts] == [("old", 20), ("new", 20)]


def test_images_beside_a_table_in_an_archive_are_divided(tmp_path):
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    lines = []
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for n in range(24):
            image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"{n}.png")
            lines.append(f"{n}.png,{n % 2},{'day' if n % 4 < 2 else 'night'}")
        archive.writestr("table.csv", "image,label,time\n" + "\n".join(lines))
    needs = {"task": "image_classification", "image_shape": (1, 8, 8)}
    data = load_data(f"file:{tmp_path}/all.zip?task=time", **needs)
    assert [part["name"] for part in data.facts["parts"]] == ["day", "night"]
    assert data.train_samples + data.validation_samples == 24
