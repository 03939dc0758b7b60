import json
import struct
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.continual.toys import SPEC, net, settings
from utils.continual.accuracy_matrix import AccuracyMatrix, read_matrix, save_matrix
from utils.runtime.errors import MissingPackageError
from utils.training import TrainingConfig, tracking
from utils.training.growth_rows import COLUMNS, LINEAGE
from utils.training.resume import resume, train
from utils.training.task_rows import MATRIX, TaskRows, read_tasks
from utils.training.tracking import (
    News,
    Tracking,
    WandbTracker,
    architecture,
    check_trackers,
    describe,
    make_trackers,
    task_news,
)
from utils.training.weights import weights_sha256

FAKE_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """Nobody's own key, settings or home are used."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def small(quick):
    return quick.with_changes(max_steps=12)


class Broken:
    """A tracker that fails at one call."""

    name = "broken"

    def __init__(self, at: str, error: BaseException | None = None) -> None:
        self.at, self.error, self.calls = at, error or RuntimeError("no connection"), []

    def _call(self, verb: str) -> str:
        self.calls.append(verb)
        if verb == self.at:
            raise self.error
        return f"closed by {verb}"

    def open(self, run):
        self._call("open")

    def log(self, first, rows):
        self._call("log")

    def close(self, run, ended):
        return self._call("close")


GROWING = {
    "schedule": [{"at": 3, "operator": "depth", "amount": 1}, {"at": 8, "operator": "feed_forward", "amount": 8}]
}


def events(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run_dir / "tracking" / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def growth_text(run_dir: Path) -> list[tuple[int, str]]:
    """Read the tables of growth of a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run_dir / "tracking" / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    found = read.Tensors("growth/text_summary") if "growth/text_summary" in read.Tags()["tensors"] else []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def wandb_history(folder: Path) -> list[dict]:
    """Read the rows of an offline wandb run: records in LevelDB's log format, blocks of 32 KiB after a short header."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    content, place, whole, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or the end of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.slow
def test_wandb_offline_holds_the_whole_run_after_a_stop(tmp_path, text_file, tiny_gpt, small):
    pytest.importorskip("wandb")
    config = small.with_changes(tracking="wandb", time_budget_minutes=1e-9, log_every_steps=1)
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert run.status == "stopped by its time budget"
    assert len(run.notes) == 1 and "wandb sync" in run.notes[0]
    run = resume(tmp_path / "run", time_budget_minutes=60, progress=False)
    assert run.finished
    folders = sorted((run.directory / "tracking" / "wandb").glob("offline-run-*"))
    run_id = json.loads((run.directory / "run.json").read_text())["id"]
    assert len(folders) == 2
    assert all(folder.name.endswith(run_id) for folder in folders), "both sessions are one run"
    newest = max(folders, key=lambda folder: len(wandb_history(folder)))
    assert str(newest) in run.notes[0]
    rows = [row for row in wandb_history(newest) if "step" in row]
    assert [row["step"] for row in rows] == [row["step"] for row in run.metrics]
    logged = [row["train/loss"] for row in rows if "train/loss" in row]
    assert logged == [row["loss"] for row in run.metrics if row["split"] == "train"]
    (table,) = newest.rglob("architecture*.table.json")
    names = [line[0] for line in json.loads(table.read_text())["data"]]
    assert names == [name for name, *_ in architecture(run)]
    assert not (tmp_path / "home" / ".config" / "wandb").exists()
    assert not (tmp_path / "home" / ".local").exists(), "everything is in the run directory"
    assert "wandb sync" in run._repr_html_()


@pytest.mark.slow
def test_a_server_that_is_down_and_a_key_that_is_nowhere(tmp_path, text_file, tiny_gpt, small, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "INIT_SECONDS", 1.0)
    config = small.with_changes(tracking="wandb")
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    assert run.finished
    assert "could not be reached" in run.notes[0] and "wandb sync" in run.notes[0]
    said = capfd.readouterr()
    assert FAKE_KEY not in said.out + said.err + str(run.notes) + run._repr_html_() + json.dumps(run.to_dict())
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert [path for path in files if FAKE_KEY.encode() in path.read_bytes()] == []


def test_an_error_that_quotes_the_key_is_told_without_it(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    assert describe(ValueError(f"bad key\n {FAKE_KEY}!")) == "ValueError: bad key (the key)!"


def test_tensorboard_has_every_row_once_after_a_stop(tmp_path, text_file, tiny_gpt, small):
    pytest.importorskip("tensorboard")
    config = small.with_changes(tracking="tensorboard", time_budget_minutes=1e-9, log_every_steps=1)
    train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    run = resume(tmp_path / "run", time_budget_minutes=60, progress=False)
    losses = [(row["step"], row["loss"]) for row in run.metrics if row["split"] == "train"]
    assert [step for step, _ in losses] == list(range(1, 13))
    found = events(run.directory)
    assert found["train/loss"] == [(step, pytest.approx(loss)) for step, loss in losses]
    assert "validation/bits_per_byte" in found
    assert "tensorboard --logdir" in run.notes[0]


@pytest.mark.parametrize("at", ["open", "log", "close"])
@pytest.mark.parametrize("error", [RuntimeError("no connection"), SystemExit(1)])
def test_a_tracker_that_fails_is_told_once_and_stops_nothing(
    tmp_path, text_file, tiny_gpt, small, monkeypatch, at, error
):
    plain = weights_sha256(train(tiny_gpt, f"file:{text_file}", small, tmp_path / "plain", progress=False).model)
    broken = Broken(at, error)
    monkeypatch.setattr(tracking, "make_trackers", lambda config: [Tracking(broken)])
    import utils

    again = utils.load_model("example:gpt", config=tiny_gpt.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(again, f"file:{text_file}", small, tmp_path / "run", progress=False)
    told = [str(w.message) for w in caught if "Tracking with broken failed" in str(w.message)]
    assert len(told) == 1
    assert type(error).__name__ in told[0] and "metrics.csv" in told[0]
    assert run.finished and weights_sha256(run.model) == plain
    assert broken.calls.count(at) == 1 and broken.calls[-1] == at, "after the fault it is left alone"
    assert run.notes == []


def test_a_tracker_that_hangs_is_left_behind(tmp_path, text_file, tiny_gpt, small, monkeypatch):
    class Hanging(Broken):
        def open(self, run):
            time.sleep(30)

    monkeypatch.setattr(tracking, "make_trackers", lambda config: [Tracking(Hanging("never"), close_seconds=0.1)])
    started = time.monotonic()
    with pytest.warns(UserWarning, match=r"no answer within 0\.1 seconds"):
        run = train(tiny_gpt, f"file:{text_file}", small, tmp_path / "run", progress=False)
    assert run.finished and time.monotonic() - started < 25


def test_training_that_fails_closes_its_trackers(tmp_path, text_file, tiny_gpt, small, monkeypatch):
    ended = []

    class Watching(Broken):
        def close(self, run, finished):
            ended.append(finished)
            return "closed"

    def explode(*_):
        raise RuntimeError("the backward pass broke")

    monkeypatch.setattr(tracking, "make_trackers", lambda config: [Tracking(Watching("never"))])
    monkeypatch.setattr("utils.training.training_module.TrainingModule._backward", explode)
    with pytest.raises(RuntimeError, match="the backward pass broke"):
        train(tiny_gpt, f"file:{text_file}", small, tmp_path / "run", progress=False)
    assert ended == [False]


def test_a_missing_package_is_told_before_the_run_begins(tmp_path, text_file, tiny_gpt, monkeypatch):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
        with pytest.raises(MissingPackageError, match=f"pip install {package}"):
            train(tiny_gpt, f"file:{text_file}", TrainingConfig(tracking=name), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    check_trackers(TrainingConfig())


def test_each_name_has_its_tracker():
    made = make_trackers(TrainingConfig(tracking="wandb, tensorboard"))
    assert [tracker.tracker.name for tracker in made] == ["wandb", "tensorboard"]
    assert make_trackers(TrainingConfig()) == []


def test_tensorboard_is_told_of_each_growth(tmp_path, text_file, tiny_gpt, small):
    pytest.importorskip("tensorboard")
    config = small.with_changes(tracking="tensorboard", log_every_steps=2, growth=GROWING)
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    told = growth_text(run.directory)
    # A thread of its own looks: it may see both events at once.
    assert [len(text.splitlines()) for _, text in told] in ([3, 4], [4]), "a heading, a line, and a row for each event"
    assert all(3 < step <= 12 for step, _ in told)
    assert "depth 2 → 3" in told[-1][1] and "scheduled for step 8" in told[-1][1]


def test_a_damaged_record_of_growth_stops_no_tracker(tmp_path, text_file, tiny_gpt, small):
    pytest.importorskip("tensorboard")

    class Vandal:
        def start(self, run):
            (run.directory / LINEAGE).write_text("{")

        def update(self, rows):
            pass

        def close(self, rows):
            pass

    config = small.with_changes(tracking="tensorboard")
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False, observers=[Vandal()])
    assert growth_text(run.directory) == [] and "validation/bits_per_byte" in events(run.directory)
    assert run.finished and "tensorboard --logdir" in run.notes[0]


@pytest.mark.slow
def test_wandb_has_the_growth_as_a_table(tmp_path, text_file, tiny_gpt, small):
    pytest.importorskip("wandb")
    config = small.with_changes(tracking="wandb", log_every_steps=2, growth=GROWING)
    run = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "run", progress=False)
    (folder,) = (run.directory / "tracking" / "wandb").glob("offline-run-*")
    tables = [json.loads(path.read_text()) for path in folder.rglob("growth*.table.json")]
    newest = max(tables, key=lambda table: len(table["data"]))
    assert newest["columns"] == list(COLUMNS)
    assert [(row[0], row[1]) for row in newest["data"]] == [(3, "depth"), (8, "feed_forward")]
    rows = [row for row in wandb_history(folder) if "step" in row]
    assert [row["step"] for row in rows] == [row["step"] for row in run.metrics], "tables add no rows"


@pytest.mark.slow
def test_wandb_has_the_tasks_as_a_table_and_their_headline_as_numbers(tmp_path):
    pytest.importorskip("wandb")
    run = train(
        net(), "builtin:digits", settings("replay", tracking="wandb"), tmp_path / "run", spec=SPEC, progress=False
    )
    (folder,) = (run.directory / "tracking" / "wandb").glob("offline-run-*")
    tables = [json.loads(path.read_text()) for path in folder.rglob("tasks*.table.json")]
    newest = max(tables, key=lambda table: len(table["data"]))
    record = read_tasks(run.directory)
    assert newest["columns"] == list(record.columns) and newest["data"] == record.values
    matrix, history = read_matrix(run.directory), wandb_history(folder)
    for name, exact in (("average_accuracy", matrix.average_accuracy), ("forgetting", matrix.forgetting)):
        logged = [row[f"tasks/{name}"] for row in history if f"tasks/{name}" in row]
        assert logged[-1] == pytest.approx(exact)
    assert [row["step"] for row in history if "step" in row] == [row["step"] for row in run.metrics]


def test_news_is_a_record_that_got_longer(tmp_path):
    class Here:
        directory = tmp_path

    assert task_news().new() is None and News(TaskRows).new() is None
    news = task_news(Here())
    assert news.new() is None
    matrix = AccuracyMatrix(("a", "b"), ((0.9, 0.1),))
    save_matrix(tmp_path, matrix)
    assert len(news.new().rows) == 1 and news.new() is None
    (tmp_path / MATRIX).write_text("{")
    assert news.new() is None and news.told == 1
    save_matrix(tmp_path, matrix.with_row((0.5, 0.8)))
    assert news.new().headline == {"average_accuracy": 0.65, "forgetting": pytest.approx(0.4)}


def test_a_run_continued_online_sends_only_what_the_server_lacks():
    class Server:
        def __init__(self) -> None:
            self.logged = []

        def log(self, values, step):
            self.logged.append((step, values))

    tracker = WandbTracker()
    tracker._run, tracker._skip = Server(), 2
    rows = [{"step": n, "split": "train", "loss": n / 10} for n in range(4)]
    tracker.log(0, rows)
    tracker.log(4, [{"step": 4, "split": "validation", "loss": 0.5}])
    assert tracker._run.logged == [
        (2, {"step": 2, "train/loss": 0.2}), (3, {"step": 3, "train/loss": 0.3}),
        (4, {"step": 4, "validation/loss": 0.5}),
    ]  # fmt: skip
