import json

import pytest

from utils.training.growth_rows import (
    COLUMNS,
    LINEAGE,
    GrowthRows,
    events_before,
    growth_markdown,
    growth_table,
    read_growth,
    said_rows,
    table_rows,
)
from utils.training.run import GROWTH_PICTURE, UNFINISHED, make_empty


def event(step, before, after, operator="depth", difference=0.0, losses=(2.0, 2.0), where=("blocks.1",), why="asked"):
    certificate = None
    if difference is not None:
        certificate = {"difference": difference, "loss_before": losses[0], "loss_after": losses[1]}
    return {
        "step": step,
        "plan": {"operator": operator, "where": list(where), "before": 1, "after": 2, "promise": "exact"},
        "certificate": certificate,
        "why": why,
        "parameters_before": before,
        "parameters_after": after,
        "seconds": 0.25,
    }


def written(folder, *events):
    (folder / LINEAGE).write_text(json.dumps({"events": events}))
    return folder


def test_rows_hold_plain_values_under_the_named_columns():
    places = [f"blocks.{number}.mlp" for number in range(5)]
    first, second = table_rows(
        [event(0, 30, 10, difference=None), event(7, 10, 30, "feed_forward", 3e-7, (2.0, 2.5), places)]
    )
    assert tuple(first) == tuple(second) == COLUMNS
    assert (first["difference"], first["loss_jump"]) == (None, None)
    assert (second["difference"], second["loss_jump"]) == (3e-7, 0.5)
    assert second["where"] == "blocks.0.mlp, blocks.1.mlp, blocks.2.mlp and 2 more"
    json.dumps([first, second], allow_nan=False)


def test_numbers_that_were_not_measured_or_are_not_finite_are_none(tmp_path):
    unmeasured, broken = table_rows(
        [event(1, 1, 2, losses=(None, None)), event(2, 2, 3, difference=float("nan"), losses=(float("inf"), 1.0))]
    )
    assert unmeasured["loss_jump"] is None and unmeasured["difference"] == 0
    assert broken["loss_jump"] is None and broken["difference"] is None
    assert said_rows([unmeasured])[0]["change of the loss"] == ""


def test_text_says_bit_equal_only_where_nothing_changed():
    said = said_rows(table_rows([event(1, 1, 2), event(2, 2, 3, difference=2e-7, losses=(1.0, 1.5))]))
    assert [row["change of the answers"] for row in said] == ["bit-equal", "2.0e-07"]
    assert [row["change of the loss"] for row in said] == ["0", "+5.0e-01"]


def test_events_of_an_earlier_run_have_no_step_in_this_one(tmp_path):
    events = [event(500, 10, 20), event(900, 20, 30), event(5, 30, 40)]
    assert [events_before(events, size) for size in (10, 20, 30, 40)] == [0, 1, 2, 3]
    assert events_before(events, None) == events_before(events, 99) == 0
    growth = read_growth(written(tmp_path, *events), parameters=30)
    assert [row["step"] for row in growth.rows] == [None, None, 5]
    assert growth.marks == [(5, "3: depth 1 → 2")]
    assert growth.parameters == 40
    assert [row["step"] for row in said_rows(growth.rows)] == ["earlier run", "earlier run", "5"]


def test_a_beginning_with_fewer_blocks_belongs_to_the_run_and_is_no_mark(tmp_path):
    events = [event(500, 10, 30), event(0, 30, 10, difference=None), event(5, 10, 30)]
    assert events_before(events, 10) == events_before(events, None) == 2
    growth = read_growth(written(tmp_path, *events), parameters=10)
    assert [row["step"] for row in growth.rows] == [None, 0, 5]
    assert [step for step, _ in growth.marks] == [5]


def test_a_run_that_never_grew_has_no_rows(tmp_path):
    assert read_growth(tmp_path) == GrowthRows()
    assert growth_table([]) == growth_markdown([]) == ""
    assert GrowthRows().parameters is None


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"events": 3}', '{"events": [3]}', '{"events": [{}]}', '{"events": null}', "[" * 100_000,
     '{"events": "text"}', '{"events": [{"step": 1, "certificate": null, "parameters_before": 1}]}'],
)  # fmt: skip
def test_a_damaged_record_is_a_problem_and_no_error(tmp_path, content):
    (tmp_path / LINEAGE).write_text(content)
    growth = read_growth(tmp_path, 3)
    assert growth.rows == () and growth.problem.startswith("growth.json cannot be read (")


def test_values_of_other_kinds_are_a_problem_too(tmp_path):
    for name, value in (("step", "x"), ("step", 1e999), ("seconds", None), ("plan", None), ("certificate", 5)):
        growth = read_growth(written(tmp_path, event(1, 1, 2) | {name: value}))
        assert growth.problem is not None, name
    (tmp_path / LINEAGE).write_bytes(b"\xff\xfe\x00")
    assert "UnicodeDecodeError" in read_growth(tmp_path).problem
    (tmp_path / LINEAGE).unlink()
    (tmp_path / LINEAGE).mkdir()
    assert "IsADirectoryError" in read_growth(tmp_path).problem


def test_tables_escape_what_is_in_them():
    rows = table_rows([event(1, 1, 2, "<b>", where=["<img src=x>"], why="a | b\nc <script>")])
    html, markdown = growth_table(rows), growth_markdown(rows)
    assert "<img" not in html and "<script" not in html and "<b>" not in html
    assert "&lt;img src=x&gt;" in html
    assert len(markdown.splitlines()) == 3
    assert "a \\| b c <script>" in markdown


def test_what_a_torn_copy_left_of_it_is_in_nobodys_way(tmp_path):
    for name in (LINEAGE, GROWTH_PICTURE, UNFINISHED):
        (tmp_path / name).touch()
    make_empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]
