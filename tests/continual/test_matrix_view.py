import math
import sys
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from utils.continual.accuracy_matrix import MATRIX_PICTURE, AccuracyMatrix, save_matrix
from utils.continual.matrix_panels import (
    COLOURS,
    CURVES,
    LABELS,
    LOST,
    UNSEEN,
    borders,
    course_of,
    seen_average,
    shortened,
)
from utils.continual.matrix_parts import MatrixError, Moment
from utils.continual.matrix_view import (
    headline,
    matrix_figure,
    matrix_html,
    matrix_picture,
    matrix_text,
    save_matrix_figure,
    task_rows,
)
from utils.runtime.errors import MissingPackageError

NAN = math.nan


def stream(count, trained=None, unit="accuracy", within=True, untrained=True, name="task {}"):
    """A stream in which every task is learned well and then forgotten bit by bit."""
    up = unit == "accuracy"
    turn = (lambda value: value) if up else (lambda value: 5 - 3 * value)
    names, start = tuple(name.format(j) for j in range(count)), (turn(0.12),) * count if untrained else None
    rows = [
        tuple(turn(max(0.2, 0.95 - 0.1 * (i - j)) if j <= i else 0.1) for j in range(count))
        for i in range(count if trained is None else trained)
    ]
    moments = [Moment(10 * i + 4, i, tuple(turn(0.3) for _ in range(i))) for i in range(1, len(rows)) if within]
    return AccuracyMatrix(
        names, tuple(rows), start, up, unit, within=tuple(moments), ends=tuple(range(10, 10 * len(rows) + 1, 10))
    )


def said(axis):
    """All text of a panel's drawing."""
    return [text.get_text() for text in axis.texts if text.get_text()]


def panel(matrix, part, dark=False):
    return matrix_figure(matrix, (part,), dark).subfigs[0].axes[0]


def test_the_matrix_shows_every_score_the_means_and_what_was_forgotten():
    axis = panel(stream(3), "matrix")
    texts = said(axis)
    for score in ("12.0", "95.0", "85.0", "75.0", "10.0", "90.0", "−20.0", "−10.0", "forgotten", "mean"):
        assert score in texts, score
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["task 0", "task 1", "task 2"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["untrained", "task 0", "task 1", "task 2"]
    assert axis.get_xlabel() == "accuracy, %, on held-out data of"


def cells(axis):
    """Colours of the cells by place, the first row being the untrained one."""
    colours = axis.collections[0].get_array()
    return {(i - 1, j): tuple(colours[i, j]) for i in range(len(colours)) for j in range(colours.shape[1])}


def brightness(colour):
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


@pytest.mark.parametrize("dark", [False, True])
def test_tasks_that_were_not_trained_are_grey_and_worse_cells_are_darker(dark):
    from matplotlib.colors import to_rgba

    for unit in ("accuracy", "nats"):
        found = cells(panel(stream(3, unit=unit), "matrix", dark))
        grey = {place for place, colour in found.items() if colour == to_rgba(UNSEEN[dark])}
        assert grey == {(row, column) for row in range(-1, 3) for column in range(3) if column > row}
        assert brightness(found[2, 0]) < brightness(found[1, 0]) < brightness(found[0, 0])


def test_losses_that_rose_have_a_plus_and_no_percent():
    axis = panel(stream(3, unit="nats"), "matrix")
    assert {"+0.60", "+0.30", "2.15", "4.70"} <= set(said(axis))
    lost = [text.get_color() for text in axis.texts if text.get_text().startswith("+")]
    assert lost == [LOST[False]] * 2
    assert panel(stream(3, unit="nats"), "course").get_ylabel() == "loss, nats per token (lower is better)"


def test_what_was_not_measured_stays_empty():
    matrix = AccuracyMatrix(("a", "b"), ((0.5, NAN), (NAN, 0.8)))
    texts = said(panel(matrix, "matrix"))
    assert texts.count("50.0") == 2 and "80.0" in texts
    assert not any("nan" in text for text in texts)
    assert "–" in texts  # the mean of a row with a gap


@pytest.mark.parametrize(
    ("count", "unit"), [(1, "accuracy"), (2, "nats"), (8, "accuracy"), (20, "nats"), (50, "accuracy")]
)
def test_any_number_of_tasks_fits(count, unit):
    figure = matrix_figure(stream(count, unit=unit))
    FigureCanvasAgg(figure).draw()
    matrix, course = (part.axes[0] for part in figure.subfigs)
    numbered = [text for text in said(matrix) if text.strip("−+")[:1].isdigit()]
    assert bool(numbered) == (count < LABELS)
    assert len(matrix.get_xticklabels()) <= LABELS
    # Without numbers a bar says which colour is which score.
    assert len(figure.subfigs[0].axes) == (1 if numbered else 2)
    width, height = figure.get_size_inches() * figure.dpi
    for axis in (matrix, course):
        low, high = sorted(axis.get_ylim())
        # matplotlib keeps a label beyond each end of an axis, and does not draw it.
        names = [name for name in axis.get_yticklabels() if low <= name.get_position()[1] <= high]
        for text in [*axis.texts, *names, *(axis.get_xticklabels() if axis is matrix else ())]:
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= width + 1, text
            assert box.y0 >= -1 and box.y1 <= height + 1, text


def test_numbers_stay_within_their_cells():
    for count, unit in ((5, "nats"), (12, "accuracy"), (14, "nats")):
        figure = matrix_figure(stream(count, unit=unit), ("matrix",))
        FigureCanvasAgg(figure).draw()
        axis = figure.subfigs[0].axes[0]
        left, right = (axis.transData.transform((at, 0))[0] for at in (0, 1))
        inside = [text for text in axis.texts if text.get_text()[0].isdigit() and text.get_position()[0] < count]
        assert inside
        assert max(text.get_window_extent().width for text in inside) < right - left


def test_a_course_begins_faintly_before_its_task_and_marks_the_borders():
    matrix = stream(3)
    axis = panel(matrix, "course")
    borders_drawn = [
        line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert borders_drawn == [10, 20, 30]
    own = [line for line in axis.lines if line.get_color() == COLOURS[1]]
    early, late, ends = own
    assert early.get_linestyle() == ":" and list(early.get_xdata()) == [0, 10]
    assert list(late.get_xdata()) == [10, 20, 24, 30] and list(ends.get_xdata()) == [20, 30]
    assert list(late.get_ydata()) == pytest.approx([10, 95, 30, 85])
    average = next(line for line in axis.lines if line.get_label() == "mean of the tasks trained so far")
    assert list(average.get_ydata()) == pytest.approx([95, 90, 85])
    assert {"task 0", "task 1", "task 2", "training"} <= set(said(axis))


def test_curves_are_named_while_their_names_fit():
    few, many = panel(stream(CURVES), "course"), panel(stream(CURVES + 1), "course")
    assert said(few).count(f"task {CURVES - 1}") >= 1
    assert len([text for text in many.texts if text.get_position()[0] == 1.04]) == 0
    assert len([text for text in few.texts if text.get_position()[0] == 1.04]) == CURVES


def test_places_without_steps_are_spread_over_the_task():
    matrix = AccuracyMatrix(
        ("a", "b"), ((0.9, 0.1), (0.5, 0.8)), within=((3, 1, (0.4,)), (8, 1, (0.6, 0.7))), untrained=(0.2, 0.3)
    )
    assert borders(matrix) == [1, 2]
    assert course_of(matrix, 0) == [
        (0, 0.2),
        (1, 0.9),
        (pytest.approx(4 / 3), 0.4),
        (pytest.approx(5 / 3), 0.6),
        (2, 0.5),
    ]
    assert course_of(matrix, 1) == [(0, 0.3), (1, 0.1), (pytest.approx(5 / 3), 0.7), (2, 0.8)]
    assert panel(matrix, "course").get_xlabel() == "tasks trained"
    assert seen_average(matrix) == [0.9, pytest.approx(0.65)]


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_a_stream_that_is_still_running(trained):
    matrix = stream(4, trained)
    FigureCanvasAgg(matrix_figure(matrix)).draw()
    assert headline(matrix).startswith(f"After {trained} of 4 tasks: ")
    assert ("nothing was measured yet" in headline(matrix)) == (trained == 0)
    assert ("forgetting" in headline(matrix)) == (trained > 1)


def test_infinite_and_equal_losses_are_drawn():
    for score in (math.inf, 2.0):
        matrix = AccuracyMatrix(("a", "b"), ((score, 2.0), (score, 2.0)), unit="nats", higher_is_better=False)
        FigureCanvasAgg(matrix_figure(matrix)).draw()


def test_headlines():
    assert headline(stream(3)) == "After 3 of 3 tasks: average accuracy 85.0 %, forgetting 15.0 points"
    assert headline(stream(3, unit="nats")) == (
        "After 3 of 3 tasks: average loss 2.45 nats per token, forgetting 0.45 nats"
    )
    joint = AccuracyMatrix(("a", "b"), joint=(0.9, 0.8))
    assert headline(joint) == "Trained on all 2 tasks at once: average accuracy 85.0 %"
    assert matrix_text(joint).splitlines()[2].split() == ["all", "at", "once", "90.0", "80.0"]
    other = AccuracyMatrix(("a",), ((2.0,),), unit="rmse", higher_is_better=False)
    assert headline(other) == "After 1 of 1 tasks: average rmse 2.00"


def test_a_single_panel_is_wide_enough_for_its_headline():
    for unit in ("accuracy", "nats"):
        figure = matrix_figure(stream(10, unit=unit), ("matrix",))
        FigureCanvasAgg(figure).draw()
        assert figure._suptitle.get_window_extent().x1 < figure.get_size_inches()[0] * figure.dpi
        assert figure._suptitle.get_text().replace("\n", " ") == headline(stream(10, unit=unit))


def test_what_rounds_to_nothing_has_no_sign():
    matrix = AccuracyMatrix(("a", "b"), ((0.5, 0), (0.50001, 0.5)))
    assert "0.0" in said(panel(matrix, "matrix")) and "+0.0" not in said(panel(matrix, "matrix"))


def test_losses_are_dark_where_a_task_is_as_good_as_unseen():
    from utils.continual.matrix_panels import score_scale

    near = AccuracyMatrix(("a", "b"), ((2.0, 4.0), (2.1, 2.0)), unit="nats", higher_is_better=False)
    assert (score_scale(near).vmin, score_scale(near).vmax) == (2.0, 4.0)
    blind = AccuracyMatrix(("a", "b"), ((2.0, NAN), (2.5, 2.0)), unit="nats", higher_is_better=False)
    assert (score_scale(blind).vmin, score_scale(blind).vmax) == (2.0, 2.5)
    assert (score_scale(stream(2)).vmin, score_scale(stream(2)).vmax) == (0, 1)
    r2 = AccuracyMatrix(("a", "b"), ((0.9, -1.0), (0.5, 0.8)), unit="r2")
    assert (score_scale(r2).vmin, score_scale(r2).vmax) == (-1.0, 0.9)


def test_long_names_keep_both_ends():
    assert shortened("permutation number 17", 12) == "permutat… 17"
    assert shortened("short", 12) == "short"
    assert len(shortened("a" * 99)) == 18
    FigureCanvasAgg(matrix_figure(stream(9, name="a very long name of a task, the number {}"))).draw()


def test_files(tmp_path):
    matrix = stream(3)
    assert matrix_picture(matrix, dark=True).startswith(b"\x89PNG")
    picture = matrix_picture(matrix, "svg", ("matrix",))
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    save_matrix(tmp_path, matrix)
    path = save_matrix_figure(tmp_path)
    assert path == tmp_path / MATRIX_PICTURE and path.read_bytes().startswith(b"\x89PNG")
    assert save_matrix_figure(tmp_path / "other", matrix).exists()
    with pytest.raises(MatrixError, match="is not there"):
        save_matrix_figure(tmp_path / "none")


def test_parts_and_kinds_that_do_not_exist():
    with pytest.raises(ValueError, match="There are the parts 'matrix' and 'course', not \\('tree',\\)"):
        matrix_figure(stream(2), ("tree",))
    with pytest.raises(ValueError, match="'png' and 'svg', not 'gif'"):
        matrix_picture(stream(2), "gif")


def test_the_page_shows_picture_numbers_and_a_table():
    page = stream(3, name="<b>{}")._repr_html_()
    assert page.count("data:image/png;base64,") == 2
    assert "<b>85.0 %</b><span>average accuracy: on the tasks learned, now</span>" in page
    assert "stability gap" in page and "intransigence" not in page
    assert "&lt;b&gt;0" in page and "<td><b>0" not in page
    assert stream(3)._repr_html_() == matrix_html(stream(3))
    assert (
        "<table>" not in matrix_html(stream(3, 0)) and "nan" not in matrix_html(stream(3, 0)).split("base64")[-1][-500:]
    )


def test_rows_of_the_table():
    rows = task_rows(stream(3))
    assert rows[0] == {
        "task": "task 0", "learned": "95.0", "best": "95.0", "now": "75.0", "forgotten": "20.0", "worst drop": "65.0",
    }  # fmt: skip
    assert rows[2]["forgotten"] == rows[2]["worst drop"] == "–"
    assert "worst drop" not in task_rows(stream(3, within=False))[0]
    assert task_rows(stream(3, 0)) == []


def test_text_of_nothing_measured():
    assert "0 of 30 tasks trained" in matrix_text(stream(30, 0))
    assert "0 of 3 tasks trained" in matrix_text(stream(3, 0))


def test_without_matplotlib_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="draw the accuracy matrix"):
        matrix_figure(stream(2))
    page = matrix_html(stream(2))
    assert "pip install matplotlib" in page and "<table>" in page
    empty = matrix_html(stream(3, 0))
    assert "<table>" not in empty and "nan" not in empty
