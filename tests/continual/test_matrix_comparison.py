import json
import math
import sys
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from utils.continual.accuracy_matrix import AccuracyMatrix, save_matrix
from utils.continual.matrix_comparison import (
    MatrixComparison,
    compare_matrices,
    comparison_figure,
    comparison_picture,
)
from utils.continual.matrix_parts import MatrixError, Moment, TaskCost
from utils.runtime.errors import MissingPackageError

NAMES = ("a", "b")
WORSE = AccuracyMatrix(
    NAMES, ((0.9, 0.0), (0.1, 0.8)), within=(Moment(14, 1, (0.05,)),), ends=(10, 20),
    costs=(TaskCost(1.25), TaskCost(2.5)),
)  # fmt: skip
BETTER = AccuracyMatrix(
    NAMES, ((0.9, 0.0), (0.85, 0.75)), within=(Moment(14, 1, (0.7,)),), ends=(10, 20),
    costs=(TaskCost(5.0, 50, 1200), TaskCost(6.0, 100, 2400)),
)  # fmt: skip
JOINT = AccuracyMatrix(NAMES, joint=(0.95, 0.85))


@pytest.fixture
def both():
    return compare_matrices({"naive": WORSE, "cured": BETTER})


def test_the_numbers_of_each_run_are_in_a_row(both):
    assert both.rows == [
        {"": "naive", "average accuracy, %": "45.0", "forgetting": "80.0", "right after learning": "85.0",
         "worst drop": "85.0", "seconds": "3.8", "samples kept": "–", "numbers kept": "–"},
        {"": "cured", "average accuracy, %": "80.0", "forgetting": "5.0", "right after learning": "82.5",
         "worst drop": "20.0", "seconds": "11", "samples kept": "100", "numbers kept": "2,400"},
    ]  # fmt: skip
    head, first, second = str(both).splitlines()
    assert repr(both) == both.text()
    assert first.split()[:2] == ["naive", "45.0"] and second.split()[-1] == "2,400"
    assert head.index("forgetting") + len("forgetting") == first.index("80.0") + len("80.0")


def test_what_nobody_measured_has_no_column():
    plain = AccuracyMatrix(NAMES, WORSE.rows)
    row = compare_matrices({"one": plain}).rows[0]
    assert list(row) == ["", "average accuracy, %", "forgetting", "right after learning"]


def test_a_run_on_all_tasks_at_once_has_its_average(both):
    row = compare_matrices({**both.matrices, "at once": JOINT}).rows[2]
    assert (row["average accuracy, %"], row["forgetting"], row["seconds"]) == ("90.0", "–", "–")


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2))])
def test_matrices_stand_two_in_a_row_under_their_names(count, grid):
    names = [f"run {number}" for number in range(count)]
    figure = comparison_figure(compare_matrices(dict.fromkeys(names, WORSE)))
    width, height = figure.get_size_inches()
    assert (round(height / 5.4), round(width / 6.0)) == grid
    shown = [panel for panel in figure.subfigs if panel.axes]
    assert [panel._suptitle.get_text() for panel in shown] == [
        f"{name}\nAverage accuracy 45.0 %, forgetting 80.0 points" for name in names
    ]


def test_every_title_fits(both):
    losses = AccuracyMatrix(NAMES, ((2.0, 4.0), (3.0, 2.0)), unit="nats", higher_is_better=False)
    for one in (both, compare_matrices({"a very long name, of forty or more letters": losses, "at once": losses})):
        figure = comparison_figure(one)
        FigureCanvasAgg(figure).draw()
        for panel in figure.subfigs:
            box = panel._suptitle.get_window_extent()
            assert box.x0 >= panel.bbox.x0 and box.x1 <= panel.bbox.x1 and box.y1 <= panel.bbox.y1


def test_equal_losses_have_equal_colours():
    """Each matrix alone would be stretched over the whole scale."""
    mild = AccuracyMatrix(NAMES, ((2.0, 6.0), (2.5, 2.0)), unit="nats", higher_is_better=False)
    harsh = AccuracyMatrix(NAMES, ((2.0, 6.0), (9.0, 2.5)), unit="nats", higher_is_better=False)
    figure = comparison_figure(compare_matrices({"mild": mild, "harsh": harsh}))
    fills = [panel.axes[0].collections[0].get_array() for panel in figure.subfigs]
    assert tuple(fills[0][0, 0]) == tuple(fills[1][0, 0]), "2.0 in both"
    assert tuple(fills[0][1, 0]) == tuple(fills[1][1, 1]), "2.5 in both"
    assert tuple(fills[0][1, 0]) != tuple(fills[1][1, 0])


def test_runs_and_directories_stand_for_their_matrix(tmp_path):
    (tmp_path / "one").mkdir()
    save_matrix(tmp_path / "one", WORSE)
    run = SimpleNamespace(directory=tmp_path / "one")
    found = compare_matrices({"run": run, "folder": str(tmp_path / "one"), "matrix": WORSE}).matrices
    assert list(found) == ["run", "folder", "matrix"] and set(found.values()) == {WORSE}
    with pytest.raises(MatrixError, match="is not there"):
        compare_matrices({"none": tmp_path / "none"})


def test_the_page_has_both_pictures_and_the_table(both):
    page = both._repr_html_()
    assert page.count("data:image/png;base64,") == 2, "light and dark"
    assert "how good naive, cured are at every task after each task" in page
    assert "<th>" in page and '<td class="number">80.0</td>' in page
    risky = compare_matrices({"<i>": WORSE})._repr_html_()
    assert "<i>" not in risky and "&lt;i&gt;" in risky
    assert comparison_picture(both, dark=True) != comparison_picture(both)


def test_without_matplotlib_the_table_is_left(both, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="draw accuracy matrices"):
        comparison_figure(both)
    assert "pip install matplotlib" in both._repr_html_() and "<table>" in both._repr_html_()


def test_plain_values_can_be_written_and_read(both):
    again = {name: AccuracyMatrix.from_dict(one) for name, one in json.loads(json.dumps(both.to_dict())).items()}
    assert again == {"naive": WORSE, "cured": BETTER}


def test_nothing_and_other_streams_are_refused():
    with pytest.raises(MatrixError, match=r"There is nothing to compare\. Expected at least one matrix\. Name a run\."):
        MatrixComparison({})
    other = AccuracyMatrix(("a", "c"), WORSE.rows)
    with pytest.raises(MatrixError, match=r"The tasks of 'x' and 'y' differ: \('a', 'b'\) and \('a', 'c'\)\. Expected"):
        compare_matrices({"x": WORSE, "y": other})
    losses = AccuracyMatrix(NAMES, ((2.0, math.nan),), unit="nats", higher_is_better=False)
    with pytest.raises(MatrixError, match="The unit of 'x' and 'y' differ: 'accuracy' and 'nats'"):
        compare_matrices({"x": WORSE, "y": losses})
