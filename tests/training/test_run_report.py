import json
import re
import shutil

import pytest

from utils.continual.accuracy_matrix import AccuracyMatrix, save_matrix
from utils.runtime.errors import RunError
from utils.training.figures import save_training_figure, training_figure, trend
from utils.training.growth_rows import LINEAGE
from utils.training.line_chart import Series, line_chart, number, thinned, ticks
from utils.training.resume import train
from utils.training.run import REPORT
from utils.training.run_report import read_facts, run_report
from utils.training.task_rows import MATRIX


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file):
    """Two runs in one folder."""
    import utils
    from utils.training import TrainingConfig

    folder = tmp_path_factory.mktemp("runs")
    small = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
    config = TrainingConfig(max_steps=12, batch_size=4, log_every_steps=2, val_every_steps=4)
    for name, changed in (("first", config), ("second <b>", config.with_changes(learning_rate=1e-4))):
        loaded = utils.load_model("example:gpt", config=small)
        train(loaded, f"file:{text_file}", changed, folder / name, progress=False)
    return folder


def test_a_run_ends_with_its_report(runs):
    text = (runs / "first" / REPORT).read_text()
    assert text.startswith("<!doctype html>")
    assert "This is the only one so far" in text
    assert "Held-out loss beside other runs" not in text


def test_it_compares_with_its_neighbours_and_says_what_differs(runs):
    report = run_report(runs / "first")
    assert report.neighbours == ("second <b>",)
    text = report.path.read_text()
    assert "Held-out loss beside other runs" in text
    assert "learning_rate 0.0001" in text
    assert "second &lt;b&gt;" in text and "second <b>" not in text
    assert "first/report.html, compared with 1 other run" in str(report)
    assert report._repr_html_().startswith('<div class="seedbed-run">')
    best = re.search(r'<tr class=own>.*?best">([\d.]+)<', text)
    assert float(best[1]) == pytest.approx(read_facts(runs / "first").best[0], abs=1e-4)


def test_it_asks_for_nothing_and_is_small(runs):
    text = run_report(runs / "second <b>").path.read_text()
    assert len(text) < 200_000
    assert not re.search(r"https?:|<script|src=|@import|url\(", text)
    assert "prefers-color-scheme:dark" in text


def test_thousands_of_rows_stay_small(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "a")
    lines = (tmp_path / "a" / "metrics.csv").read_text().splitlines()
    train_row = next(line for line in lines if ",train," in line).split(",")
    (tmp_path / "a" / "metrics.csv").write_text(
        "\n".join([lines[0], *(",".join([str(i), *train_row[1:]]) for i in range(1, 30_001))]) + "\n"
    )
    for index in range(40):
        shutil.copytree(tmp_path / "a", tmp_path / f"b{index}") if index < 2 else None
    assert len(run_report(tmp_path / "a").path.read_bytes()) < 2_000_000


def test_broken_neighbours_are_named_and_left_out(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "a")
    shutil.copytree(runs / "first", tmp_path / "torn")
    (tmp_path / "torn" / "run.json").write_text("{")
    shutil.copytree(runs / "first", tmp_path / "bare")
    for name in ("metrics.csv", "summary.json"):
        (tmp_path / "bare" / name).unlink()
    shutil.copytree(runs / "first", tmp_path / "other")
    record = json.loads((tmp_path / "other" / "run.json").read_text())
    record["data"]["reference"] = "file:other.txt"
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    report = run_report(tmp_path / "a")
    assert report.neighbours == ("bare", "other")
    assert "torn is left out" in report.notes[0] and "torn is left out" in report.fragment
    assert "killed, or still running" in report.fragment
    assert "other data: file:other.txt" in report.fragment


def grown(step, before, after, why="scheduled"):
    """An event as growth.json holds it, as far as a report looks."""
    plan = {"operator": "depth", "where": ["blocks.1"], "before": 1, "after": 2, "promise": "exact"}
    certificate = {"difference": 0.0, "loss_before": 2.0, "loss_after": 2.0}
    return {"step": step, "plan": plan, "certificate": certificate, "why": why, "seconds": 0.1,
            "parameters_before": before, "parameters_after": after}  # fmt: skip


def test_growth_is_told_and_marked_in_the_loss_charts(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "a")
    shutil.copytree(runs / "first", tmp_path / "b")
    assert "Growth" not in run_report(tmp_path / "a").fragment
    size = read_facts(tmp_path / "a").record["model"]["parameters"]
    events = [grown(4, size, size + 100, why="<script>alert(1)</script>"), grown(9, size + 100, size + 250)]
    (tmp_path / "a" / LINEAGE).write_text(json.dumps({"events": events}))
    text = run_report(tmp_path / "a").path.read_text()
    assert "<h2>Growth</h2>" in text and "bit-equal" in text
    assert "&lt;script&gt;alert(1)" in text and "<script" not in text
    assert text.count('<line class="mark"') == 3 * 2, "both loss charts and the gradient norm"
    assert text.count("<title>1: depth 1 → 2</title>") == 3
    assert text.count("the model grew</span>") == 2
    assert f"GPT, {size + 250:,} parameters" in text
    assert f'<td class="number">{size + 250:,}</td>' in run_report(tmp_path / "b").fragment
    assert '<line class="mark"' not in run_report(tmp_path / "b").fragment, "marks are of the run itself"
    assert not re.search(r"https?:|src=|@import|url\(", text)


@pytest.mark.parametrize("content", ["{", "[3]", '{"events": [{"step": "<b>"}]}'])
def test_a_damaged_record_of_growth_is_told_and_costs_nothing_else(runs, tmp_path, content):
    shutil.copytree(runs / "first", tmp_path / "a")
    (tmp_path / "a" / LINEAGE).write_text(content)
    fragment = run_report(tmp_path / "a").fragment
    assert "growth.json cannot be read" in fragment
    assert "Loss of this run" in fragment and '<line class="mark"' not in fragment


def test_tasks_are_shown_with_the_score_on_each_after_each(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "a")
    assert "<h2>Tasks</h2>" not in run_report(tmp_path / "a").fragment
    save_matrix(tmp_path / "a", AccuracyMatrix(("<b>", "other"), ((0.9, 0.1), (0.5, 0.8))))
    text = run_report(tmp_path / "a").path.read_text()
    assert "<h2>Tasks</h2><p>Learned 2 tasks one after another: average accuracy 65.0 %, forgetting 40.0 points" in text
    assert "on &lt;b&gt;</th>" in text and "<b>other" not in text
    assert text.count("color-mix") == 4 and not re.search(r"https?:|src=|@import|url\(", text)
    losses = AccuracyMatrix(("first", "other"), ((2.0, 3.0),), higher_is_better=False, unit="nats")
    save_matrix(tmp_path / "a", losses)
    text = run_report(tmp_path / "a").path.read_text()
    assert "average loss 2.00 nats" in text and "Scores are in nats" in text
    many = AccuracyMatrix(tuple(map(str, range(30))), ((0.5,) * 30,))
    save_matrix(tmp_path / "a", many)
    assert "right after it was learned; accuracy_matrix.json has those on all." in run_report(tmp_path / "a").fragment
    save_matrix(tmp_path / "a", AccuracyMatrix(("first", "other"), (), (0.1, 0.2)))
    assert "<h2>Tasks</h2><p class" in run_report(tmp_path / "a").fragment, "nothing was learned yet"


def test_a_stream_is_compared_by_its_last_loss(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "a")
    path = tmp_path / "a" / "metrics.csv"
    head, *lines = path.read_text().splitlines()
    lines = [line for line in lines if ",validation," in line]
    path.write_text("\n".join([head, *reversed(lines)]) + "\n")
    rising = read_facts(tmp_path / "a")
    assert rising.best[0] == min(loss for _, loss in rising.points("validation", "loss"))
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    record["config"]["continual"] = {"method": "naive"}
    (tmp_path / "a" / "run.json").write_text(json.dumps(record))
    stream = read_facts(tmp_path / "a")
    assert stream.best != rising.best
    assert stream.best[0] == stream.last("validation", "loss") == stream.points("validation", "loss")[-1][1]


@pytest.mark.parametrize("content", ["{", "[3]", '{"kind": "accuracy_matrix", "version": 9}'])
def test_a_damaged_record_of_tasks_is_told_and_costs_nothing_else(runs, tmp_path, content):
    shutil.copytree(runs / "first", tmp_path / "a")
    (tmp_path / "a" / MATRIX).write_text(content)
    fragment = run_report(tmp_path / "a").fragment
    assert '<h2>Tasks</h2><p class="soft">accuracy_matrix.json ' in fragment and "Loss of this run" in fragment


def test_a_setting_that_holds_many_others_is_cut(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "a")
    shutil.copytree(runs / "first", tmp_path / "b")
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    record["config"]["growth"] = {"schedule": [{"at": step, "operator": "depth"} for step in range(1, 50)]}
    (tmp_path / "b" / "run.json").write_text(json.dumps(record))
    fragment = run_report(tmp_path / "a").fragment
    assert "growth {" in fragment and "&#x27;at&#x27;: 1," in fragment and "&#x27;at&#x27;: 40" not in fragment


def test_a_run_without_numbers_has_a_report_too(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "a")
    (tmp_path / "a" / "metrics.csv").unlink()
    assert "Nothing was measured yet" in run_report(tmp_path / "a").fragment
    with pytest.raises(RunError, match="no directory"):
        run_report(tmp_path / "none")


def test_charts():
    assert line_chart([], "x") == ""
    assert line_chart([Series("a", [(1, float("nan"))])], "x") == ""
    one = line_chart([Series("a<", [(5, 2.0)])], "t", baseline=("zlib", 3.0))
    assert "<circle" in one and "a&lt;" in one and "zlib" in one
    assert line_chart([Series("a", [(1, 1.0), (2, 1.0)])], "t").count("<polyline") == 1
    marked = line_chart([Series("a", [(1, 1.0), (2, 1.0)])], "t", marks=[(1.5, "here <b>"), (4, "later")])
    assert marked.count('<line class="mark"') == 2 and "here &lt;b&gt;" in marked
    assert '<line class="mark" x1="550.0"' in marked, "the axis reaches to the last mark"
    points = thinned([(float(i), float(i)) for i in range(10_000)])
    assert len(points) <= 300 and points[0] == (0, 0) and points[-1] == (9999, 9999)
    assert ticks(2.1, 2.1)[0] <= 2.1 <= ticks(2.1, 2.1)[-1]
    assert ticks(0.0, 0.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] or ticks(0.0, 0.0)[0] == 0.0
    assert [number(value) for value in (0, 0.5, 12_000, 3e-4, 2e6)] == ["0", "0.5", "12,000", "3.0e-4", "2.0e6"]


def test_the_trend_is_an_average_of_what_came_before():
    assert trend([]) == []
    assert trend([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    values = trend([1.0, float("nan"), 3.0])
    assert values[0] == 1.0 and values[1] == 1.0 and 2.0 < values[2] < 3.0
    assert trend([1.0, 2.0])[0] == trend([1.0, 9.0])[0]


def test_figures(tmp_path):
    rows = [{"step": 10, "split": "train", "loss": 2.0, "learning_rate": 1e-3, "gradient_norm": 0.5},
            {"step": 10, "split": "validation", "loss": 2.1, "bits_per_byte": 3.0}]  # fmt: skip
    assert len(training_figure(rows, 2.7).axes) == 4
    assert len(training_figure(rows[:1]).axes) == 3
    assert len(training_figure([]).axes) == 3
    marked = training_figure(rows, 2.7, marks=[4, 7])
    for axis in marked.axes:
        assert {4, 7} <= {line.get_xdata()[0] for line in axis.lines}
    assert [text.get_text() for text in marked.axes[0].get_legend().get_texts()].count("the model grew") == 1
    save_training_figure(rows, tmp_path / "a.png", 2.7, marks=[4])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
