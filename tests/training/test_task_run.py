"""What a real run of continual learning leaves where people look: the report, TensorBoard and the model card."""

import re

import pytest

from tests.continual.toys import SPEC, net, settings
from utils.continual.accuracy_matrix import read_matrix
from utils.training.bundle import bundle
from utils.training.export_weights import ChosenWeights
from utils.training.model_card import model_card
from utils.training.resume import train
from utils.training.task_rows import read_tasks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("tensorboard")
    config = settings("replay", tracking="tensorboard", max_steps=100, val_every_steps=25)
    folder = tmp_path_factory.mktemp("run") / "run"
    return train(net(), "builtin:digits", config, folder, spec=SPEC, progress=False)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return bundle(run, tmp_path_factory.mktemp("bundle") / "out", progress=False)


def card_of(run, made, **chosen):
    adapter = run.adapter
    return model_card(adapter, made.report, ChosenWeights(**chosen), {"runtime": None, "why": "x"}, run)


def test_the_rows_are_those_of_the_matrix(run):
    record, matrix = read_tasks(run.directory), read_matrix(run.directory)
    assert [row["scores"] for row in record.learned] == list(matrix.rows)
    assert record.headline["average_accuracy"] == pytest.approx(matrix.average_accuracy)
    assert record.headline["forgetting"] == pytest.approx(matrix.forgetting)
    assert [row["step"] for row in record.learned] == list(matrix.ends)
    assert record.newest["stored_samples"] == 60


def test_the_report_shows_the_tasks(run):
    text, matrix = (run.directory / "report.html").read_text(), read_matrix(run.directory)
    assert "<h2>Tasks</h2>" in text
    said = f"average accuracy {100 * matrix.average_accuracy:.1f} %, forgetting {100 * matrix.forgetting:.1f} points"
    assert f"Learned 5 tasks one after another: {said} (method replay)." in text
    assert "best held-out loss" not in text, "that over the first task alone is no measure"
    assert text.count("color-mix") == 6 * 5, "untrained and after each of five tasks, on each of them"
    assert not re.search(r"https?:|<script|src=|@import|url\(", text)


def test_tensorboard_has_the_table_and_a_point_for_each_task(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run.directory / "tracking" / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    matrix = read_matrix(run.directory)
    points = [(event.step, event.value) for event in read.Scalars("tasks/average_accuracy")]
    averages = [sum(row[:number]) / number for number, row in enumerate(matrix.rows, 1)]
    assert points == [(step, pytest.approx(value)) for step, value in zip(matrix.ends, averages, strict=True)]
    forgotten = [(event.step, event.value) for event in read.Scalars("tasks/forgetting")]
    assert [step for step, _ in forgotten] == list(matrix.ends[1:])
    assert forgotten[-1][1] == pytest.approx(matrix.forgetting)
    text = read.Tensors("tasks/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert len(text.splitlines()) == 2 + 6 and text.startswith("| after | on ")


def test_the_card_says_how_the_tasks_were_learned(run, made):
    card = (made.directory / "README.md").read_text(encoding="utf-8")
    assert f"{read_tasks(run.directory).sentence} (method replay)." in card
    assert "Measured on the held-out data of the tasks begun by then, at the first and the last measurement" in card
    assert "This was measured at step" not in card
    rows = [row for row in run.metrics if row["split"] == "validation"]
    assert f"| 100 | {rows[-1]['loss']:.4f} |" in card and "| 50 |" not in card and len(rows) == 4


def test_the_card_tells_weights_of_another_step(run, made):
    assert "at step 100; the exported weights are of step 50." in card_of(run, made, step=50, measured=True)
    assert "This was measured at step" not in card_of(run, made, step=100, measured=True)
