import json
import shutil
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

import utils
from utils.growth import lineage_view
from utils.growth.edits import LineageError
from utils.growth.lineage import LINEAGE, read_lineage, save_lineage
from utils.growth.lineage_view import lineage_figure, lineage_table, save_lineage_figure, show_lineage, spread
from utils.runtime.errors import MissingPackageError
from utils.training.config import TrainingConfig
from utils.training.growth_rows import COLUMNS
from utils.training.resume import resume, train
from utils.training.run import GROWTH_PICTURE, METRICS, RECORD

SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 2, "dropout": 0.1}
SCHEDULE = [
    {"at": 2, "operator": "depth", "to": "full"},
    {"at": 4, "operator": "feed_forward", "amount": 8},
    {"at": 4, "operator": "depth", "amount": 1, "where": 0},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400)))
    return f"file:{path}"


@pytest.fixture(scope="module")
def config():
    return TrainingConfig(
        max_steps=6, batch_size=2, log_every_steps=1, val_every_steps=3, context_length=16,
        growth={"begin_blocks": 1, "schedule": SCHEDULE},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(text, config, tmp_path_factory):
    return train(utils.load_model("example:gpt", config=SMALL), text, config, tmp_path_factory.mktemp("g") / "run",
                 progress=False)  # fmt: skip


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run.directory, tmp_path / "copy")


def written(figure):
    """All text of a figure."""
    axes = figure.axes
    return [text.get_text() for axis in axes for text in (*axis.texts, axis.title, *axis.get_yticklabels())] + [
        axis.get_title(loc="left") for axis in axes
    ]


def marks(axis):
    """Steps of the dashed vertical lines of a panel."""
    courses = [line.get_xdata() for line in axis.lines if line.get_linestyle() == "--"]
    return [steps[0] for steps in courses if len(set(steps)) == 1]


def test_a_session_ends_with_the_picture(run):
    assert (run.directory / GROWTH_PICTURE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((run.directory / "summary.json").read_text())["growth_events"] == 4


def test_a_run_that_never_grew_has_no_picture_and_says_so(text, config, tmp_path):
    plain = config.with_changes(growth={"schedule": []}, max_steps=2)
    run = train(utils.load_model("example:gpt", config=SMALL), text, plain, tmp_path / "run", progress=False)
    assert not (run.directory / GROWTH_PICTURE).exists()
    assert "growth_events" not in run.summary()
    assert str(show_lineage(run)) == "The model of this run never grew."
    assert show_lineage(run)._repr_html_() == "<p>The model of this run never grew.</p>"
    for ask, where in ((lineage_figure, run), (show_lineage, tmp_path)):
        with pytest.raises(LineageError, match="holds no growth events.*Expected the directory.*Train with growth="):
            ask(where)


@pytest.mark.parametrize("fault", [OSError("no space"), MissingPackageError("matplotlib is missing.")])
def test_a_picture_that_cannot_be_made_ends_no_run(text, config, tmp_path, monkeypatch, fault):
    def fail(*_):
        raise fault

    monkeypatch.setattr("utils.growth.extension.save_lineage_figure", fail)
    model = utils.load_model("example:gpt", config=SMALL)
    with pytest.warns(UserWarning, match="The picture of the model's growth cannot be made"):
        run = train(model, text, config, tmp_path / "run", progress=False)
    assert run.finished


def test_a_session_that_goes_on_from_before_an_event_forgets_its_record(run, text, config, tmp_path):
    class First:
        """What is on disk when the first row of a session comes."""

        def start(self, run):
            self.run, self.seen = run, None

        def update(self, rows):
            if self.seen is None:
                self.seen = read_lineage(self.run.directory)

        def close(self, rows):
            pass

    model, changed = utils.load_model("example:gpt", config=SMALL), config.with_changes(time_budget_minutes=1e-9)
    stopped = train(model, text, changed.with_changes(growth={"schedule": SCHEDULE[1:]}), tmp_path / "run",
                    progress=False)  # fmt: skip
    assert stopped.step == 1
    save_lineage(stopped.directory, read_lineage(run.directory))
    first = First()
    resume(stopped.directory, time_budget_minutes=60, progress=False, observers=[first])
    assert first.seen == []
    assert [event.step for event in read_lineage(stopped.directory)] == [4, 4]


def test_the_table_has_a_row_of_plain_values_for_each_event(run):
    events = read_lineage(run.directory)
    rows = lineage_table(events)
    assert [tuple(row) for row in rows] == [COLUMNS] * 4
    assert [(row["step"], row["operator"], row["from"], row["to"]) for row in rows] == [
        (0, "depth", 2, 1), (2, "depth", 1, 2), (4, "feed_forward", 64, 72), (4, "depth", 2, 3)
    ]  # fmt: skip
    assert [row["parameters"] for row in rows] == [event.parameters_after for event in events]
    assert rows[0]["difference"] is None and rows[1]["difference"] == 0.0
    assert all(row["seconds"] > 0 for row in rows)
    json.dumps(rows, allow_nan=False)


def test_the_panels_share_their_steps_and_mark_the_events(run):
    figure = lineage_figure(run)
    parts, sizes, losses, _ = figure.axes
    assert parts.get_xlim() == sizes.get_xlim() == losses.get_xlim()
    for axis in (parts, sizes, losses):
        assert marks(axis) == [2, 4, 4]
    figure.draw_without_rendering()
    places = [axis.get_position() for axis in (parts, sizes, losses)]
    assert {round(place.x0, 6) for place in places} == {round(places[0].x0, 6)}
    assert {round(place.x1, 6) for place in places} == {round(places[0].x1, 6)}


def test_bars_begin_where_blocks_were_inserted(run):
    parts = lineage_figure(run).axes[0]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in parts.patches]
    assert bars == [(0, 6), (4, 6), (2, 6), (0, 4), (4, 6)], "three blocks, then two widths"
    labels = [label.get_text() for label in parts.get_yticklabels()]
    assert labels == ["blocks.0", "blocks.1", "blocks.2", "feed forward: blocks.0-2"]


def test_the_curves_are_those_of_the_files(run):
    _, sizes, losses, _ = lineage_figure(run).axes
    events = read_lineage(run.directory)
    curve = next(line for line in sizes.lines if line.get_drawstyle() == "steps-post")
    assert list(curve.get_xdata()) == [0, 2, 4, 4, 6]
    assert list(curve.get_ydata()) == [*(event.parameters_after for event in events), run.adapter.num_parameters]
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert drawn["training"] == [row["loss"] for row in run.metrics if row["split"] == "train"]
    assert drawn["held out"] == [row["loss"] for row in run.metrics if row["split"] == "validation"]


def test_the_key_says_what_the_certificates_say(run):
    texts = written(lineage_figure(run))
    first, last = read_lineage(run.directory)[0].parameters_after, run.adapter.num_parameters
    assert f"{first:,} → {last:,} parameters in 3 growth events" in texts
    for wanted in ("depth 1 → 2", "feed forward 64 → 72", "bit-equal", "untrained", f"{last:,}"):
        assert wanted in texts
    assert {"2", "3", "4"} <= set(texts)


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overlaps_with_twenty_events_close_together(copied, dark):
    events = read_lineage(copied)
    deeper = events[-1]
    crowd = list(events)
    for number in range(17):
        grown = crowd[-1].parameters_after
        plan = type(deeper.plan)("vocabulary", ("embed",), (), 30_000_000 + number, 30_000_001 + number)
        crowd.append(type(deeper)(5, 0, plan, deeper.certificate, "asked", grown, grown + 10, 0.1))
    save_lineage(copied, crowd)
    figure = lineage_figure(copied, dark)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    parts, key = figure.axes[0], figure.axes[3]
    badges = [text for text in parts.texts if text.get_text().isdigit() and text.arrow_patch is not None]
    assert len(badges) == 20
    texts = [text for text in key.texts if text.get_text()]
    # The extent of a badge's text would take in the line to its event.
    for artists in ([badge.get_bbox_patch() for badge in badges], texts):
        boxes = [artist.get_window_extent(renderer) for artist in artists]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number]), artists[number]
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    ink = key.texts[0].get_color()
    assert ink == ("white" if dark else "black")
    assert (sum(figure.get_facecolor()[:3]) < 1) == dark


def test_a_run_that_was_killed_at_once_is_drawn_too(copied):
    (copied / METRICS).unlink()
    assert "nothing was measured yet" in written(lineage_figure(copied))
    (copied / METRICS).write_text("step,split,loss\nx,train,1\n")
    assert "nothing was measured yet" in written(lineage_figure(copied))
    (copied / RECORD).unlink()
    assert save_lineage_figure(copied).stat().st_size > 10_000


def test_a_model_that_grew_in_another_run_has_its_older_events_apart(run, text, config, tmp_path):
    again = train(run.adapter, text, config.with_changes(growth={"schedule": SCHEDULE[1:2]}), tmp_path / "again",
                  progress=False)  # fmt: skip
    view = show_lineage(again)
    assert view.older == 4 and [row["step"] for row in view.rows] == [None, None, None, None, 4]
    texts = written(view.figure())
    assert "before" in texts
    assert marks(view.figure().axes[2]) == [4]
    assert any("in 1 growth event" in text for text in texts)


def test_it_shows_itself_in_a_notebook(run):
    view = show_lineage(run.directory)
    html = view._repr_html_()
    assert html.count("data:image/png;base64,") == 2 and "prefers-color-scheme:dark" in html
    assert "change of the answers" in html and "scheduled for step 4" in html
    assert str(view) == repr(view) == "\n".join(event.describe() for event in read_lineage(run.directory))
    assert view.to_dict() == {"directory": str(run.directory), "rows": view.rows}


def test_without_matplotlib_the_table_is_still_shown(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = show_lineage(run)._repr_html_()
    assert "pip install matplotlib" in html and "change of the answers" in html
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        lineage_figure(run)


def test_a_damaged_lineage_is_named(copied):
    (copied / LINEAGE).write_text("{")
    with pytest.raises(LineageError, match=r"growth\.json cannot be read"):
        lineage_figure(copied)


def test_what_is_not_known_has_a_colour_and_long_names_keep_their_end(copied):
    assert lineage_view._colour("unheard of") == lineage_view.OTHER_COLOUR
    long = lineage_view.Row("encoder.transformer.layers.blocks.11", "depth", ())
    assert lineage_view._label(long) == "…former.layers.blocks.11"
    assert len(lineage_view._label(long)) == lineage_view.LABEL_LENGTH


@given(st.lists(st.floats(0, 100), max_size=40).map(sorted), st.floats(0.1, 20))
def test_places_are_spread_in_order_within_bounds(places, gap):
    moved = spread(places, gap, 0.0, 100.0)
    assert len(moved) == len(places)
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in moved)
    least = min(gap, 100 / max(len(places) - 1, 1))
    assert all(b - a >= least - 1e-6 for a, b in pairwise(moved))
    if all(b - a >= gap for a, b in pairwise(places)):
        assert moved == pytest.approx(places)
