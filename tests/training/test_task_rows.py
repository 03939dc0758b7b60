import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.continual import accuracy_matrix
from utils.continual.accuracy_matrix import AccuracyMatrix, save_matrix
from utils.continual.matrix_parts import TaskCost
from utils.runtime.files import tag_nonfinite
from utils.training import task_rows
from utils.training.task_rows import COLUMNS, MATRIX, TaskRows, read_tasks, said_method, tasks_markdown, tasks_table

NAN = math.nan
PAST = ((0.9, 0.1, 0.0), (0.5, 0.8, 0.0), (0.3, 0.6, 1.0))


def stream(rows=PAST, **changes):
    """A stream of three tasks."""
    costs = tuple(TaskCost(seconds=1.5 * i, stored_samples=1000 * i) for i in range(1, len(rows) + 1))
    given = {"untrained": (0.1, 0.2, 0.3), "costs": costs, "ends": tuple(10 * i for i in range(1, len(rows) + 1))}
    return AccuracyMatrix(("a", "b", "c"), rows, **(given | changes))


def read(folder, matrix):
    save_matrix(folder, matrix)
    return read_tasks(folder)


def damaged(**changes):
    return json.dumps(stream().to_dict() | changes)


def test_rows_hold_plain_values_under_the_named_columns(tmp_path):
    record = read(tmp_path, stream())
    untrained, first, second, third = record.rows
    assert set(untrained) == set(third) == {"number", "scores", *COLUMNS}
    assert [row["number"] for row in record.rows] == [0, 1, 2, 3]
    assert [row["after"] for row in record.rows] == ["untrained", "a", "b", "c"]
    assert untrained["average"] is None and untrained["scores"] == (0.1, 0.2, 0.3)
    assert (first["average"], first["forgetting"], first["learned"]) == (0.9, None, 0.9)
    assert (second["average"], second["learned"]) == (pytest.approx(0.65), 0.8)
    assert third["forgetting"] == pytest.approx(((0.9 - 0.3) + (0.8 - 0.6)) / 2)
    assert (third["step"], third["seconds"], third["stored_samples"]) == (30, 4.5, 3000)
    assert record.columns == (*COLUMNS, "on a", "on b", "on c")
    assert record.values[3] == ["c", 30, 1.0, third["average"], third["forgetting"], 4.5, 3000, 0.3, 0.6, 1.0]
    assert record.headline == {"average_accuracy": third["average"], "forgetting": third["forgetting"]}
    json.dumps(record.values, allow_nan=False)


def test_the_file_and_its_version_are_those_of_the_matrix():
    assert (task_rows.MATRIX, task_rows.KIND, task_rows.VERSION) == (
        accuracy_matrix.MATRIX, accuracy_matrix.KIND, accuracy_matrix.VERSION
    )  # fmt: skip


numbers = st.one_of(st.floats(0, 1), st.just(NAN))


@st.composite
def matrices(draw):
    count = draw(st.integers(1, 5))
    higher = draw(st.booleans())
    drawn = numbers if higher else st.one_of(numbers, st.floats(0, 1e6), st.just(math.inf))
    row = st.tuples(*[drawn] * count)
    rows = draw(st.lists(row, max_size=count))
    return AccuracyMatrix(
        tuple(f"task {i}" for i in range(count)), tuple(rows), draw(st.none() | row), higher,
        "accuracy" if higher else "nats", draw(st.none() | row),
    )  # fmt: skip


def same(value, exact):
    return value is None if math.isnan(exact) else value == pytest.approx(exact, rel=1e-9, abs=1e-9)


@given(matrices())
def test_average_and_forgetting_are_those_of_the_matrix_after_each_task(tmp_path_factory, matrix):
    record = read(tmp_path_factory.mktemp("run"), matrix)
    assert record.problem is None and len(record.learned) == matrix.trained
    for number, row in enumerate(record.learned, 1):
        until = AccuracyMatrix(
            matrix.tasks, matrix.rows[:number], higher_is_better=matrix.higher_is_better, unit=matrix.unit
        )
        assert same(row["average"], until.average_accuracy)
        assert same(row["forgetting"], until.forgetting)
        assert all(same(score, exact) for score, exact in zip(row["scores"], matrix.rows[number - 1], strict=True))
    assert bool(tasks_table(record)) == bool(tasks_markdown(record)) == bool(record.rows)
    assert bool(record.sentence) == (record.newest is not None) == bool(matrix.rows or matrix.joint)


def test_a_sentence_says_how_it_went(tmp_path):
    assert read(tmp_path, stream()).sentence == (
        "Learned 3 tasks one after another: average accuracy 63.3 %, forgetting 40.0 points"
    )
    assert read(tmp_path, stream(PAST[:1])).sentence == (
        "Learned 1 of 3 tasks one after another: average accuracy 90.0 %"
    )
    losses = stream(((1.0, 3.0, 3.0), (1.5, 1.0, 3.0)), untrained=None, unit="nats", higher_is_better=False)
    record = read(tmp_path, losses)
    assert record.sentence == "Learned 2 of 3 tasks one after another: average loss 1.25 nats, forgetting 0.50 nats"
    assert record.headline == {"average_loss": 1.25, "forgetting": 0.5}
    other = stream(((1.0, 3.0, 3.0),), untrained=None, unit="BLEU")
    assert read(tmp_path, other).sentence == "Learned 1 of 3 tasks one after another: average BLEU 1.00"
    assert read(tmp_path, other).headline == {"average_score": 1.0}


def test_tasks_learned_at_once_are_a_row_too(tmp_path):
    record = read(tmp_path, stream((), joint=(0.9, 0.8, 1.0)))
    assert record.sentence == "Learned 3 tasks at once: average accuracy 90.0 %"
    assert [row["after"] for row in record.rows] == ["untrained", "all at once"]
    assert record.headline == {"average_accuracy": pytest.approx(0.9)}
    beside = read(tmp_path, stream(joint=(0.9, 0.8, 1.0)))
    assert beside.newest["number"] == 3, "what was learned one after another comes first"


def test_a_run_without_tasks_has_no_rows(tmp_path):
    record = read_tasks(tmp_path)
    assert record == TaskRows() and record.newest is None and record.headline == {}
    assert record.sentence == tasks_table(record) == tasks_markdown(record) == ""


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"kind": "accuracy_matrix"}', '{"kind": "accuracy_matrix", "version": 1}',
     "[" * 100_000, damaged(rows=3), damaged(rows=[[0.1]]), damaged(rows=[["0.1", 0, 0]]), damaged(rows=[[2, 0, 0]]),
     damaged(rows=[[True, 0, 0]]), damaged(rows=[[0, 0, 0]] * 4), damaged(tasks=[]), damaged(tasks="abc"),
     damaged(tasks=["a", "a", "b"]), damaged(tasks=["a", "b", 3]), damaged(tasks=["a", "b", "\ud800"]),
     damaged(unit=3), damaged(unit="\udc00"), damaged(higher_is_better=None), damaged(costs=[3, 3, 3]),
     damaged(costs=[{}]), damaged(costs=[{"seconds": "x"}] * 3), damaged(ends=[1, 2, tag_nonfinite(math.inf)]),
     damaged(ends=[1]), damaged(joint={}), damaged(untrained=[0, 0]), damaged(rows=[[10**400, 0, 0]])],
)  # fmt: skip
def test_a_damaged_record_is_a_problem_and_no_error(tmp_path, content):
    (tmp_path / MATRIX).write_text(content)
    record = read_tasks(tmp_path)
    assert record.rows == () and record.problem.startswith("accuracy_matrix.json cannot be read (")


def test_a_newer_or_foreign_file_is_named(tmp_path):
    (tmp_path / MATRIX).write_text(damaged(version=2))
    assert read_tasks(tmp_path).problem == (
        "accuracy_matrix.json is of the kind 'accuracy_matrix', version 2; this Seedbed reads 'accuracy_matrix', "
        "version 1."
    )
    (tmp_path / MATRIX).write_text(damaged(kind="x" * 10_000))
    assert len(read_tasks(tmp_path).problem) < 200


def test_a_file_that_is_no_text_is_a_problem_too(tmp_path):
    (tmp_path / MATRIX).write_bytes(b"\xff\xfe\x00")
    assert "UnicodeDecodeError" in read_tasks(tmp_path).problem
    (tmp_path / MATRIX).unlink()
    (tmp_path / MATRIX).mkdir()
    assert "IsADirectoryError" in read_tasks(tmp_path).problem


def test_costs_and_steps_may_be_missing(tmp_path):
    row = read(tmp_path, stream(costs=(), ends=())).newest
    assert (row["step"], row["seconds"], row["stored_samples"]) == (None, None, None)
    row = read(tmp_path, stream(costs=(TaskCost(),) * 3)).newest
    assert (row["step"], row["seconds"], row["stored_samples"]) == (30, None, None)


def test_better_scores_have_a_stronger_colour(tmp_path):
    def colours(matrix):
        table = tasks_table(read(tmp_path, matrix))
        return [int(share) for share in re.findall(r"var\(--c1\) (\d+)%", table)]

    assert colours(stream(((1.0, 0.5, 0.0),), untrained=None)) == [55, 28, 0]
    losses = {"untrained": None, "unit": "nats", "higher_is_better": False}
    assert colours(stream(((1.0, 1.5, 2.0),), **losses)) == [55, 28, 0]
    assert colours(stream(((1.0, math.inf, 2.0),), **losses)) == [55, 0, 0]
    assert colours(stream(((NAN, NAN, 2.0),), **losses)) == [55]
    table = tasks_table(read(tmp_path, stream()))
    assert table.count('class="number soft"') == 3 + 2 + 1, "untrained: all, after a: two, after b: one"


def test_many_tasks_and_long_names_keep_the_table_narrow(tmp_path):
    names = tuple(f"/some/very/long/folder/with/parts/{i}.txt" for i in range(30))
    rows = tuple(tuple(0.5 if j <= i else 0.0 for j in range(30)) for i in range(30))
    record = read(tmp_path, AccuracyMatrix(names, rows))
    assert record.columns == COLUMNS
    head, _, first, *others = tasks_markdown(record).splitlines()
    assert head == "| after | on this task | average | forgetting | time | kept samples |"
    assert first == "| /some/ver…ts/0.txt | 50.0 | 50.0 | – |  |  |"
    assert len(others) == 29
    assert f'title="{names[7]}"' in tasks_table(record)


def test_tables_escape_what_is_in_them(tmp_path):
    record = read(tmp_path, AccuracyMatrix(('<img "x">', "a | b\nc"), ((0.5, 0.5), (0.5, 0.5))))
    html, markdown = tasks_table(record), tasks_markdown(record)
    assert "<img" not in html and "&lt;img &quot;x&quot;&gt;" in html
    assert len(markdown.splitlines()) == 4 and "on a \\| b c" in markdown


def test_the_method_is_named_as_the_settings_have_it():
    assert said_method({"continual": {"method": "replay"}}) == "method replay"
    for settings in ({}, {"continual": None}, {"continual": {}}, {"continual": 3}, {"continual": {"method": 3}}):
        assert said_method(settings) == "the default method"
