import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.continual.accuracy_matrix import MATRIX, NUMBERS, AccuracyMatrix, read_matrix, save_matrix
from utils.continual.matrix_parts import MatrixError, Moment, TaskCost

NAN = math.nan
ROWS = ((0.9, 0.2, 0.1), (0.6, 0.8, 0.3), (0.5, 0.7, 1.0))
FULL = AccuracyMatrix(
    ("a", "b", "c"), ROWS, untrained=(0.1, 0.1, 0.2), joint=(0.95, 0.9, 1.0), ends=(10, 20, 30),
    costs=(TaskCost(1.0, 5, 0, 100, 1e6), TaskCost(2.0, 10, 0, 100, 1e6), TaskCost(3.0, 10, 40, 120, 2e6)),
    within=(Moment(12, 1, (0.3,)), Moment(15, 1, (0.7,)), Moment(24, 2, (0.4, 0.75)), Moment(28, 2, (0.55, 0.2))),
)  # fmt: skip


def nats(value):
    """A loss that is as good as an accuracy."""
    return 3.0 - 2.0 * value


LOSSES = AccuracyMatrix(
    FULL.tasks, tuple(tuple(map(nats, row)) for row in ROWS), tuple(map(nats, FULL.untrained)), False, "nats",
    tuple(map(nats, FULL.joint)), FULL.costs,
    tuple(Moment(m.step, m.task, tuple(map(nats, m.scores))) for m in FULL.within), FULL.ends,
)  # fmt: skip
DIFFERENCES = (
    "forgetting", "backward_transfer", "forward_transfer", "intransigence", "stability_gap",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("average_accuracy", (0.5 + 0.7 + 1.0) / 3),
        ("average_incremental_accuracy", (0.9 + (0.6 + 0.8) / 2 + (0.5 + 0.7 + 1.0) / 3) / 3),
        ("learning_accuracy", (0.9 + 0.8 + 1.0) / 3),
        ("forgetting", ((0.9 - 0.5) + (0.8 - 0.7)) / 2),
        ("backward_transfer", ((0.5 - 0.9) + (0.7 - 0.8)) / 2),
        ("forward_transfer", ((0.2 - 0.1) + (0.3 - 0.2)) / 2),
        ("intransigence", (0.05 + 0.1 + 0.0) / 3),
        ("stability_gap", 0.6),  # task b from 0.8 to 0.3 is less than task a from 0.9 to 0.3
        ("minimum_accuracy", (0.3 + 0.2) / 2),
        ("worst_case_accuracy", 1.0 / 3 + 2 / 3 * 0.25),
    ],
)
def test_closed_forms(name, value):
    assert getattr(FULL, name) == pytest.approx(value, abs=1e-12)
    assert getattr(LOSSES, name) == pytest.approx(2 * value if name in DIFFERENCES else nats(value), abs=1e-12)


def test_forgetting_looks_at_rows_before_the_task_too():
    matrix = AccuracyMatrix(("a", "b", "c"), ((0.9, 0.95, 0), (0.9, 0.8, 0), (0.9, 0.7, 1)))
    assert matrix.forgotten == pytest.approx((0.0, 0.25))
    assert -matrix.backward_transfer == pytest.approx(0.05)


def test_drops():
    assert [(d.old, d.during, d.step) for d in FULL.drops] == [(0, 1, 12), (0, 2, 24), (1, 2, 28)]
    first = FULL.drops[0]
    assert (first.before, first.worst, first.after) == (0.9, 0.3, 0.6)
    assert (first.size, first.recovered) == pytest.approx((0.6, 0.3))
    assert LOSSES.drops[0].size == pytest.approx(1.2)


def test_a_drop_at_the_very_end_of_a_task_counts_and_a_rise_is_none():
    fell = AccuracyMatrix(("a", "b"), ((0.9, 0.1), (0.5, 0.9)), within=((3, 1, (0.8,)),))
    assert fell.drops[0].step is None and fell.stability_gap == pytest.approx(0.4)
    rose = AccuracyMatrix(("a", "b"), ((0.5, 0.1), (0.6, 0.9)), within=((3, 1, (0.55,)),), ends=(2, 4))
    assert rose.stability_gap == 0.0
    assert fell.minimum_accuracy == 0.5 and rose.minimum_accuracy == 0.55


def test_one_task():
    one = AccuracyMatrix(("a",), ((0.7,),), untrained=(0.1,), joint=(0.8,))
    assert (one.average_accuracy, one.average_incremental_accuracy, one.learning_accuracy) == (0.7, 0.7, 0.7)
    assert one.worst_case_accuracy == 0.7
    assert one.intransigence == pytest.approx(0.1)
    for name in ("forgetting", "backward_transfer", "forward_transfer", "stability_gap", "minimum_accuracy"):
        assert math.isnan(getattr(one, name)), name


def test_nothing_was_trained_yet():
    none = AccuracyMatrix(("a", "b"))
    assert all(math.isnan(getattr(none, name)) for name in NUMBERS)
    assert "0 of 2 tasks trained" in none.text()


def test_an_unfinished_stream_is_as_if_it_had_ended():
    moments = tuple(moment for moment in FULL.within if moment.task < 2)
    short = AccuracyMatrix(("a", "b"), tuple(row[:2] for row in ROWS[:2]), FULL.untrained[:2], joint=FULL.joint[:2],
                           within=moments, ends=(10, 20))  # fmt: skip
    running = AccuracyMatrix(
        ("a", "b", "c"), ROWS[:2], FULL.untrained, joint=FULL.joint, within=FULL.within, ends=(10, 20)
    )
    for name in NUMBERS:
        assert getattr(running, name) == getattr(short, name), name


def test_what_needs_a_score_that_was_not_measured_is_nan():
    bare = AccuracyMatrix(("a", "b"), ((0.9, NAN), (NAN, 0.8)))
    for name in set(NUMBERS) - {"learning_accuracy"}:
        assert math.isnan(getattr(bare, name)), name
    lower = AccuracyMatrix(("a", "b"), ((0.9, NAN), (0.4, 0.8)), untrained=(0.1, 0.1))
    assert lower.forgetting == 0.5 and lower.average_accuracy == pytest.approx(0.6)
    assert math.isnan(lower.forward_transfer)


scores = st.floats(0, 1)


@st.composite
def matrices(draw):
    count = draw(st.integers(1, 6))
    row = st.lists(scores, min_size=count, max_size=count)
    done = draw(st.integers(0, count))
    rows = draw(st.lists(row, min_size=done, max_size=done))
    within = [(10 * i + 5, i, tuple(draw(row))) for i in range(done)]
    return AccuracyMatrix(
        tuple(f"t{i}" for i in range(count)), tuple(map(tuple, rows)), tuple(draw(row)), within=tuple(within),
        joint=tuple(draw(row)), ends=tuple(range(10, 10 * done + 1, 10)),
    )  # fmt: skip


@given(matrices())
def test_rules_that_hold_for_every_stream(matrix):
    if matrix.trained > 1:
        assert matrix.forgetting >= -matrix.backward_transfer
        assert matrix.minimum_accuracy <= matrix.average_accuracy * matrix.trained / (matrix.trained - 1) + 1e-9
        assert matrix.worst_case_accuracy <= matrix.average_accuracy + 1e-9
        assert 0 <= matrix.stability_gap <= 1
    summary = matrix.summary()
    assert all(math.isnan(summary[name]) or -1 <= summary[name] <= 1 for name in NUMBERS)


@given(matrices())
def test_names_do_not_matter(matrix):
    plain = matrix.to_dict() | {"tasks": [name[::-1] for name in reversed(matrix.tasks)]}
    assert str(AccuracyMatrix.from_dict(plain).summary()) == str(matrix.summary())


@given(matrices())
def test_losses_mirror_accuracies(matrix):
    turn = lambda row: tuple(nats(value) for value in row)  # noqa: E731
    mirrored = AccuracyMatrix(
        matrix.tasks, tuple(map(turn, matrix.rows)), turn(matrix.untrained), False, "nats", turn(matrix.joint), (),
        tuple(Moment(m.step, m.task, turn(m.scores)) for m in matrix.within), matrix.ends,
    )  # fmt: skip
    for name in NUMBERS:
        value = getattr(matrix, name)
        expected = 2 * value if name in DIFFERENCES else nats(value)
        assert getattr(mirrored, name) == pytest.approx(expected, abs=1e-9, nan_ok=True), name


@given(matrices())
def test_there_and_back(matrix):
    said = json.dumps(matrix.to_dict(), allow_nan=False)
    assert AccuracyMatrix.from_dict(json.loads(said)) == matrix


def test_infinite_losses_are_kept():
    matrix = AccuracyMatrix(("a", "b"), ((1.0, math.inf), (math.inf, NAN)), unit="nats", higher_is_better=False)
    again = AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False)))
    assert again.rows[0] == (1.0, math.inf) and math.isnan(again.rows[1][1])
    assert matrix.forgetting == math.inf


def test_rows_are_added_one_by_one():
    matrix = AccuracyMatrix(FULL.tasks, untrained=FULL.untrained, joint=FULL.joint)
    for i, row in enumerate(ROWS):
        moments = [moment for moment in FULL.within if moment.task == i]
        matrix = matrix.with_row(list(row), FULL.ends[i], FULL.costs[i], moments)
    assert matrix == FULL
    with pytest.raises(MatrixError, match=r"4 rows for 3 tasks\. Expected at most one row"):
        AccuracyMatrix(("a", "b", "c"), ROWS).with_row((1, 1, 1))


def test_summary():
    summary = FULL.summary()
    assert summary["average_accuracy"] == FULL.average_accuracy
    spent = {name: summary[name] for name in TaskCost.__dataclass_fields__}
    assert spent == {
        "seconds": 6.0, "stored_samples": 10, "stored_floats": 40, "parameters": 120, "training_flops": 4e6,
        "cpu_seconds": None,
    }  # fmt: skip
    assert (summary["tasks"], summary["trained"], summary["unit"]) == (3, 3, "accuracy")
    partly = AccuracyMatrix(("a", "b"), ((1, 0), (1, 1)), costs=(TaskCost(), TaskCost(seconds=1.0)))
    assert partly.summary()["seconds"] is None
    assert AccuracyMatrix(("a",), ((1,),)).summary()["parameters"] is None


def test_text():
    lines = FULL.text().splitlines()
    assert lines[1].split() == ["a", "b", "c"]
    assert lines[2].split() == ["untrained", "10.0", "10.0", "20.0"]
    assert lines[5].split() == ["c", "50.0", "70.0", "100.0"]
    assert "forgetting 25.00" in lines and str(FULL) == repr(FULL) == FULL.text()
    assert "forgetting 0.500" in LOSSES.text().splitlines() and "nats per token" in LOSSES.text()
    missing = AccuracyMatrix(("a", "b"), ((0.5, NAN),)).text()
    assert missing.splitlines()[2].split() == ["a", "50.0", "–"] and "forgetting" not in missing


def test_text_of_many_tasks_has_a_line_for_each():
    names = tuple(f"a task with the number {i}" for i in range(20))
    lines = AccuracyMatrix(names, ((0.5,) * 20,) * 15).text().splitlines()
    assert lines[1].split() == ["task", "learned", "best", "now", "forgotten"]
    assert lines[2].split()[-4:] == ["50.0", "50.0", "50.0", "0.0"]
    assert max(map(len, lines)) < 80 and "15 of 20 tasks trained" in lines


def moments(*wrong):
    return {"tasks": ("a", "b"), "within": wrong}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "ab"}, "The tasks are 'ab'. Expected a sequence of names. Use"),
        ({"tasks": (1, 2)}, r"The tasks are (1, 2). Expected a sequence of names. Use"),
        ({"tasks": ()}, "There are no tasks. Expected at least one task, each with a name of its own. Name the"),
        ({"tasks": ("a", "a")}, "The names 'a' stand for several tasks. Expected at least one task"),
        ({"unit": "nats"}, "The unit is 'nats' and higher_is_better is True. Expected True with 'accuracy'"),
        ({"higher_is_better": 1}, "The unit is 'accuracy' and higher_is_better is 1. Expected"),
        ({"unit": ["r2"]}, "The unit is ['r2'] and higher"),
        ({"rows": ((0.5,),)}, "Row 0 has 1 scores for 2 tasks. Expected a score for each task of the stream. Put NaN"),
        ({"rows": ((0.5, "0.1"),)}, "Row 0 holds '0.1'. Expected numbers, NaN where a task was not measured. Turn"),
        ({"rows": ((0.5, True),)}, "Row 0 holds True. Expected numbers"),
        ({"rows": ((97.0, 1),)}, "Row 0 holds the accuracy 97.0. Expected shares from 0 to 1. Divide percentages"),
        ({"rows": 0.5}, "Rows is 0.5. Expected a list or a tuple. Turn tensors into lists"),
        ({"rows": (0.5,)}, "Row 0 is 0.5. Expected a list or a tuple."),
        ({"untrained": (1,)}, "Untrained has 1 scores for 2 tasks."),
        ({"joint": (1, 2)}, "Joint holds the accuracy 2."),
        ({"rows": ((1, 1),) * 3}, "There are 3 rows for 2 tasks. Expected at most one row for each task. Name every"),
        ({"rows": ((1, 1),), "ends": (1, 2)}, "There are 2 ends for 1 rows. Expected one of ends for each row"),
        ({"rows": ((1, 1),), "costs": (3.0,)}, "The costs are (3.0,). Expected TaskCost. Use TaskCost(seconds=3.2)."),
        ({"rows": ((1, 1),) * 2, "ends": (5, 5)}, "The steps of the rows are [5, 5], those within tasks []. Expected"),
        ({"rows": ((1, 1),), "ends": (2.5,)}, "The steps of the rows are [2.5]"),
        (moments((2, 1, (1,)), (1, 1, (1,))), "those within tasks [2, 1]. Expected whole numbers that rise"),
        (moments((1, 2, (1,))), "A measurement within a task is (1, 2, (1,)). Expected (step, number of the task from"),
        (moments((1, 1, (1, 1, 1))), "A measurement within a task is (1, 1, (1, 1, 1))."),
        (moments(7), "A measurement within a task is 7."),
        (moments((1.5, 1, (1,))), "A measurement within a task is (1.5"),
        (moments((1, 1, (3,))), "The measurement at step 1 holds the accuracy 3."),
        (
            {"rows": ((1, 1),) * 2, "ends": (5, 9), "within": ((3, 1, (1,)),)},
            "Something was measured at step 3, during task 1, which lasted from step 5 to 9. Expected a step within",
        ),
    ],
)  # fmt: skip
def test_contradictions(settings, message):
    with pytest.raises(MatrixError) as caught:
        AccuracyMatrix(**{"tasks": ("a", "b")} | settings)
    assert message in str(caught.value)
    assert caught.value.action


@pytest.mark.parametrize("value", [-1, math.nan, "3", True])
def test_a_cost_is_a_number(value):
    with pytest.raises(MatrixError, match=r"TaskCost\.seconds is .* Expected a number from 0\. Leave out"):
        TaskCost(seconds=value)


def test_any_other_unit_says_its_direction():
    assert AccuracyMatrix(("a", "b"), ((3.0, 9.0), (4.0, 2.0)), unit="rmse", higher_is_better=False).forgetting == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lineage"}, "say {'kind': 'lineage', 'version': 1}. Expected kind 'accuracy_matrix' and version 1."),
        ({"version": 2}, "update Seedbed when a newer one wrote it"),
        ({"more": 1}, "more is missing or unknown. Expected costs, ends"),
        ({"costs": [{"time": 1}]}, "have another shape"),
        ({"costs": 3}, "have another shape"),
        ({"within": [3]}, "have another shape"),
        ({"rows": [[5, 5, 5]]}, "Row 0 holds the accuracy 5"),
    ],
)
def test_values_that_describe_something_else(change, message):
    with pytest.raises(MatrixError) as caught:
        AccuracyMatrix.from_dict(FULL.to_dict() | change)
    assert message in str(caught.value)


def test_values_that_lack_something_or_are_none():
    plain = FULL.to_dict()
    del plain["rows"]
    with pytest.raises(MatrixError, match="rows is missing or unknown"):
        AccuracyMatrix.from_dict(plain)
    with pytest.raises(MatrixError, match="say 3"):
        AccuracyMatrix.from_dict(3)


def test_saved_and_read(tmp_path):
    path = save_matrix(tmp_path, FULL)
    assert path == tmp_path / MATRIX
    assert read_matrix(tmp_path) == FULL
    assert json.loads(path.read_text())["summary"]["forgetting"] == FULL.forgetting


def test_a_missing_a_torn_and_a_foreign_file(tmp_path):
    with pytest.raises(MatrixError, match=r"accuracy_matrix\.json is not there\. Expected the directory .* Train with"):
        read_matrix(tmp_path)
    path = save_matrix(tmp_path, FULL)
    path.write_text(path.read_text()[:200])
    with pytest.raises(MatrixError, match=r"cannot be read \(JSONDecodeError: .*Expected a whole JSON file\."):
        read_matrix(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MatrixError, match=r"cannot be read \(UnicodeDecodeError"):
        read_matrix(tmp_path)
    path.write_text('{"events": []}')
    with pytest.raises(MatrixError, match=r"is no accuracy matrix\. Values that .* Expected kind"):
        read_matrix(tmp_path)
