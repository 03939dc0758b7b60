"""The data report: counted by hand."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from utils.training import data_report
from utils.training.data_report import DataReport, class_warnings, describe_lengths, find_overlap
from utils.training.dataset_utilities import load_data, load_prepared

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_overlap_by_hand():
    train = [f"before {LONG} after", "a short text", "another"]
    held = [" a short text\n", f"elsewhere {LONG}", LONG.rsplit(" ", 1)[0] + " fourteen", "nothing"]
    assert find_overlap(train, held) == {"exact": 1, "near": 2, "checked": 4, "searched_share": 1.0}
    assert find_overlap([], ["x"])["near"] == 0
    assert find_overlap(["x"], [])["checked"] == 0


def test_only_a_part_of_very_long_text_is_searched(monkeypatch):
    monkeypatch.setattr(data_report, "SEARCHED", 100)
    overlap = find_overlap([f"{LONG} {number}" for number in range(10)], [f"x {LONG}"])
    assert overlap["near"] == 1
    assert 0 < overlap["searched_share"] < 0.5


@pytest.mark.parametrize("lengths", [[5], [1, 2, 3], list(range(1, 500)), [1, 10_000_000], [0, 0, 4]])
def test_histograms_count_every_unit(lengths):
    found = describe_lengths(lengths)
    assert sum(found["counts"]) == len(lengths)
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert (found["shortest"], found["longest"]) == (min(lengths), max(lengths))
    assert json.loads(json.dumps(found)) == found
    assert describe_lengths([]) is None


def test_rare_and_missing_classes_are_told():
    found = class_warnings({"a": [100, 1], "b": [5, 1], "c": [0, 1]})
    assert found == [
        "no training sample of 1 class: c",
        "the largest class has 20 times as many samples as the smallest",
    ]


def full_report():
    return DataReport(
        "texts", 80, 20, 3, 1, describe_lengths(np.arange(1, 90)), 12, 0.034, 0.002,
        {"exact": 0, "near": 2, "checked": 20, "searched_share": 0.5}, {"<b>": [60, 15], "other": [20, 5]}, None,
        ["text is the column 'body'"], ["look at this"],
    )  # fmt: skip


def test_the_text_says_everything_in_one_line_each():
    text = full_report().text()
    for line in (
        "texts        80 to train, 20 held out",
        "repetitions  3 left out; 1 with equal content and different labels",
        "cut off      12 texts, 3.4% of the tokens",
        "unknown      0.20% of the tokens",
        "overlap      of 20 held out 0 are in the training data, 2 share 13 words in a row with it (50% of",
        "classes      2: <b> 75.0%, other 25.0%",
        "note         text is the column 'body'",
        "look         look at this",
    ):
        assert line in text
    assert "1 to 89 tokens, half up to 45" in text


def test_the_page_is_self_contained_and_escaped():
    page = full_report()._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "http" not in page
    pictures = full_report().pictures()
    assert pictures.count("<svg") == 2
    for part in pictures.split("</svg>")[:-1]:
        ElementTree.fromstring(part + "</svg>")


def test_a_report_survives_json_and_later_versions():
    report = full_report()
    again = DataReport.from_dict(json.loads(json.dumps({**report.to_dict(), "invented_later": 1})))
    assert again.to_dict() == report.to_dict()


def test_repetitions_contradictions_and_what_is_cut_off(tmp_path):
    rows = [f"text {n} {'word ' * (40 if n == 7 else 2)},{n % 2}" for n in range(20)] + [
        "text 0 word word ,0",
        "text 1 word word ,0",
    ]
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(rows) + "\n,1\n")
    data = load_data(f"file:{tmp_path}/t.csv", task="text_classification", vocab_size=300, max_length=16)
    report = data.report
    assert (report.duplicates, report.contradictions, report.cut_units) == (1, 1, 1)
    assert 0 < report.cut_share < 1
    assert report.warnings == ["1 rows have no text or no label and were left out"]
    data.save(tmp_path / "data")
    assert load_prepared(tmp_path / "data").report.to_dict() == report.to_dict()


def test_data_of_the_first_layout_still_loads(tmp_path):
    text = " ".join(f"word{n % 97}" for n in range(4000))
    (tmp_path / "t.txt").write_text(text)
    data = load_data(f"file:{tmp_path}/t.txt", task="causal_lm", vocab_size=300, max_length=32)
    data.save(tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "data.json").read_text())
    for name in ("dtypes", "stream", "tokens"):
        del manifest[name]
    del manifest["facts"]["report"]
    (tmp_path / "data" / "data.json").write_text(json.dumps(manifest | {"version": 1}))
    loaded = load_prepared(tmp_path / "data")
    assert loaded.fingerprint() == data.fingerprint()
    assert loaded.report is None
    assert "windows" in loaded.text()
