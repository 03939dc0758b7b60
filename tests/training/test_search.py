import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn

import utils
from utils.adapters import ModelSpec
from utils.runtime.errors import ConfigError, InstantiationError, MissingPackageError, RunError
from utils.training import TrainingConfig, search
from utils.training.dataset_utilities import load_data
from utils.training.fresh_model import buildable, fresh_model, module_of
from utils.training.resume import train
from utils.training.search import hyperparameter_search
from utils.training.search_result import JOURNAL, SearchResult, TrialRecord, cut_torn_line, read_search
from utils.training.search_space import Choice, Integers, LogUniform, SearchSpace, Uniform
from utils.training.weights import weights_sha256

MODEL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 1, "num_layers": 1, "dropout": 0.1}
CONFIG = {"max_steps": 12, "batch_size": 4, "log_every_steps": 5, "val_every_steps": 3, "checkpoint_every_steps": 3}
SPACE = {"learning_rate": {"log_uniform": [1e-5, 1e-2]}, "schedule": ["cosine", "linear"]}

WORKER = """
import sys
import utils
from utils.training import TrainingConfig
from utils.training.resume import train
from utils.training.search import hyperparameter_search

result = hyperparameter_search(
    utils.load_model("example:gpt", config={model}), "file:{text}", {space}, {trials}, {folder!r},
    config=TrainingConfig(**{config}), progress=False,
)
"""


@pytest.fixture
def model():
    return utils.load_model("example:gpt", config=MODEL)


@pytest.fixture(scope="module")
def found(tmp_path_factory, text_file):
    """A search of five trials."""
    folder = tmp_path_factory.mktemp("found") / "search"
    model, config = utils.load_model("example:gpt", config=MODEL), TrainingConfig(**CONFIG)
    return hyperparameter_search(model, f"file:{text_file}", SPACE, 5, folder, config=config, progress=False)


def worker(tmp_path, root, text_file, folder, trials, name="worker", **config):
    """Start a search in a process of its own."""
    script = tmp_path / f"{name}.py"
    script.write_text(
        WORKER.format(model=MODEL, text=text_file, space=SPACE, trials=trials, folder=str(folder),
                      config={**CONFIG, **config})
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / f"{name}.log").open("w")
    return subprocess.Popen([sys.executable, str(script)], cwd=root, env=environment, stdout=log, stderr=log)


def outcome(result: SearchResult) -> list[tuple]:
    return [(t.number, t.state, t.params, t.loss, t.step) for t in result.trials]


def test_a_search_finds_prunes_and_shows(found):
    assert [trial.number for trial in found.trials] == list(range(5))
    assert {trial.state for trial in found.trials} <= {"complete", "pruned"}
    best = found.best
    assert best.loss == min(trial.loss for trial in found.trials if trial.state == "complete")
    assert all(1e-5 <= trial.params["learning_rate"] <= 1e-2 for trial in found.trials)
    for trial in found.trials:
        record = json.loads((trial.directory / "run.json").read_text())
        assert record["config"]["learning_rate"] == trial.params["learning_rate"]
    assert found.best_config.schedule == best.params["schedule"]
    assert found.text().startswith("Search for GPT on file:")
    assert f"(trial {best.number})" in repr(found)
    assert json.loads(json.dumps(found.to_dict()))["best"]["number"] == best.number
    page = found._repr_html_()
    assert "data:image/png;base64," in page and "learning_rate" in page
    for name in found.figures():
        assert (found.folder / "figures" / f"{name}.png").stat().st_size > 2000
    assert outcome(read_search(found.folder)) == outcome(found)


def test_every_trial_starts_from_the_same_fresh_weights(found):
    from utils.training.resume import open_run

    starts = set()
    for trial in found.trials[:3]:
        run, _ = open_run(trial.directory)
        first = run.metrics[0]
        assert first["step"] == 3
        starts.add(json.dumps(json.loads((trial.directory / "run.json").read_text())["model"]["sha256"]))
    assert len(starts) == 1
    source = buildable(utils.load_model("example:gpt", config=MODEL))
    one, two, other = (weights_sha256(module_of(fresh_model(source, seed))) for seed in (0, 0, 1))
    assert one == two != other


def test_more_trials_continue_a_search_and_the_best_is_trained_fully(found, tmp_path, text_file, model):
    again = hyperparameter_search(
        model, f"file:{text_file}", SPACE, 6, found.folder, config=TrainingConfig(**CONFIG), progress=False
    )
    assert outcome(again)[:5] == outcome(found)
    assert len(again.trials) == 6
    run = again.train_best(tmp_path / "best", max_steps=20, progress=False)
    assert run.finished and run.total_steps == 20
    assert run.config.learning_rate == again.best.params["learning_rate"]
    assert again.train_best(tmp_path / "best", max_steps=20, progress=False).step == 20


def test_another_search_in_the_folder_is_refused_by_name(found, tmp_path, text_file, model):
    config = TrainingConfig(**CONFIG).with_changes(batch_size=8)
    with pytest.raises(RunError, match="batch_size was 4, not 8"):
        hyperparameter_search(model, f"file:{text_file}", SPACE, 5, found.folder, config=config, progress=False)
    with pytest.raises(RunError, match="space was"):
        hyperparameter_search(model, f"file:{text_file}", None, 5, found.folder,
                              config=TrainingConfig(**CONFIG), progress=False)  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and holds no search"):
        hyperparameter_search(model, f"file:{text_file}", SPACE, 5, tmp_path / "mine", config=config, progress=False)


def test_a_time_budget_ends_the_search_and_a_later_call_goes_on(tmp_path, text_file, model):
    config = TrainingConfig(**CONFIG)
    arguments = (model, f"file:{text_file}", SPACE, 2, tmp_path / "search")
    first = hyperparameter_search(*arguments, config=config.with_changes(time_budget_minutes=1e-7), progress=False)
    assert first.best is None
    assert "none is complete yet" in first.text()
    with pytest.raises(RunError, match="No trial of the search"):
        first.best_config  # noqa: B018
    assert len(hyperparameter_search(*arguments, config=config, progress=False).trials) == 2


def test_a_trial_that_was_stopped_in_the_middle_goes_on_in_a_later_call(tmp_path, text_file, model, monkeypatch):
    config = TrainingConfig(**CONFIG)
    arguments = (model, f"file:{text_file}", SPACE, 2)
    with monkeypatch.context() as patch:

        def short(model, data, config, *rest, **named):
            return train(model, data, config.with_changes(time_budget_minutes=1e-9), *rest, **named)

        patch.setattr("utils.training.resume.train", short)
        first = hyperparameter_search(*arguments, tmp_path / "search", config=config, progress=False)
    assert [(trial.state, trial.step) for trial in first.trials] == [("running", 0)]
    again = hyperparameter_search(*arguments, tmp_path / "search", config=config, progress=False)
    whole = hyperparameter_search(*arguments, tmp_path / "whole", config=config, progress=False)
    assert outcome(again) == outcome(whole)


def test_trials_that_fail_are_told_and_a_hopeless_search_ends(tmp_path, text_file, model, monkeypatch):
    def explode(*_):
        raise RuntimeError("mat1 and mat2 do not fit")

    monkeypatch.setattr("utils.training.training_module.TrainingModule._backward", explode)
    with pytest.raises(RunError, match="All 3 trials failed; the last one with RuntimeError: mat1 and mat2 do not fit"):
        hyperparameter_search(model, f"file:{text_file}", SPACE, 5, tmp_path / "search",
                              config=TrainingConfig(**CONFIG), progress=False)  # fmt: skip
    result = read_search(tmp_path / "search")
    assert [trial.state for trial in result.trials] == ["failed"] * 3
    assert "trial 0 failed: RuntimeError" in result.text()


def test_hyperband_ends_trials_too(tmp_path, text_file, model):
    config = TrainingConfig(**{**CONFIG, "max_steps": 9, "val_every_steps": 1})
    result = hyperparameter_search(
        model, f"file:{text_file}", {"learning_rate": {"log_uniform": [1e-7, 1e-2]}}, 6, tmp_path / "search",
        config=config, pruner="hyperband", progress=False,
    )  # fmt: skip
    assert "pruned" in {trial.state for trial in result.trials}
    assert all(trial.step == 9 for trial in result.trials if trial.state == "complete")


def test_a_database_keeps_a_search_too(tmp_path, text_file, model):
    url = f"sqlite:///{tmp_path / 'search.db'}"
    result = hyperparameter_search(
        lambda: utils.load_model("example:gpt", config=MODEL).module, f"file:{text_file}", SPACE, 2,
        tmp_path / "search", config=TrainingConfig(**CONFIG), storage=url, progress=False,
    )  # fmt: skip
    assert [trial.state for trial in result.trials] == ["complete", "complete"]
    assert not (tmp_path / "search" / JOURNAL).exists()
    with pytest.raises(RunError, match="bare GPT and has no source"):
        result.train_best(tmp_path / "best")
    with pytest.raises(RunError, match="cannot be opened"):
        read_search(tmp_path / "search", storage="nodatabase://secret@host")


@pytest.mark.slow
def test_a_search_killed_in_the_middle_of_a_trial_ends_like_one_that_was_not(tmp_path, root, text_file, model):
    steps = {"max_steps": 60, "val_every_steps": 5}
    whole = hyperparameter_search(
        model, f"file:{text_file}", SPACE, 5, tmp_path / "whole", config=TrainingConfig(**{**CONFIG, **steps}),
        progress=False,
    )  # fmt: skip
    folder = tmp_path / "killed"
    for kill in range(2):
        process = worker(tmp_path, root, text_file, folder, 5, f"kill{kill}", **steps)
        metrics = folder / "trials" / f"{2 * kill + 1:04d}" / "metrics.csv"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and "validation" in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / f"kill{kill}.log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with (folder / JOURNAL).open("a") as stream:
            stream.write('{"op_code":6,"worker_id":"torn')
    assert "running" in {trial.state for trial in read_search(folder).trials}
    process = worker(tmp_path, root, text_file, folder, 5, "last", **steps)
    assert process.wait(timeout=240) == 0, (tmp_path / "last.log").read_text()
    assert outcome(read_search(folder)) == outcome(whole)
    assert all(line.startswith("{") and json.loads(line) for line in (folder / JOURNAL).read_text().splitlines())


@pytest.mark.slow
def test_two_processes_share_the_trials(tmp_path, root, text_file):
    folder = tmp_path / "search"
    processes = [worker(tmp_path, root, text_file, folder, 7, f"worker{n}", max_steps=30) for n in range(2)]
    for n, process in enumerate(processes):
        assert process.wait(timeout=240) == 0, (tmp_path / f"worker{n}.log").read_text()
    result = read_search(folder)
    assert [trial.number for trial in result.trials] == list(range(7)), "none is taken twice, none is left"
    assert {trial.state for trial in result.trials} <= {"complete", "pruned"}
    begun = {
        json.loads(line)["worker_id"] for line in (folder / JOURNAL).read_text().splitlines()
        if json.loads(line)["op_code"] == 4
    }  # fmt: skip
    assert len(begun) == 2, "both worked"


def test_a_torn_line_is_cut_and_nothing_else(tmp_path):
    path = tmp_path / "journal"
    for content, kept in ((b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"torn" * 3000, b""),
                          (b"a\n" + b"t" * 9000, b"a\n")):  # fmt: skip
        path.write_bytes(content)
        assert cut_torn_line(path) == len(content) - len(kept)
        assert path.read_bytes() == kept


def test_a_missing_or_damaged_search_is_told(tmp_path):
    with pytest.raises(RunError, match="There is no search in"):
        read_search(tmp_path)
    (tmp_path / "search.json").write_text('{"space": {}')
    with pytest.raises(RunError, match="cannot be read"):
        read_search(tmp_path)


def test_without_optuna_the_install_line_is_told(monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match="pip install optuna"):
        hyperparameter_search(model, "builtin:python-docs", folder=tmp_path / "search")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"trials": 0}, "trials=0"),
        ({"pruner": "luck"}, "pruner='luck'"),
        ({"pruner": "hyperband", "config": TrainingConfig(max_steps=None, max_epochs=1)}, "hyperband.*max_epochs"),
        ({"space": SearchSpace(learning_rate=LogUniform(1e-4, 20.0))}, "SearchSpace.learning_rate.*20.0 is not possib"),
        ({"space": {"schedule": ["cosine", "sine"]}}, "'sine' is not possible"),
        ({"space": {"learning_rate": {"log": [1, 2]}}}, "has learning_rate"),
        ({"space": {"learning_rate": {"uniform": [1]}}}, "Expected two numbers"),
    ],
)
def test_what_a_search_cannot_do_is_told_before_anything_is_written(tmp_path, model, arguments, words):
    with pytest.raises(ConfigError, match=words):
        hyperparameter_search(model, "builtin:python-docs", folder=tmp_path / "search", progress=False, **arguments)
    assert not (tmp_path / "search").exists()


def test_a_bare_module_cannot_be_searched_for(tmp_path):
    module = utils.load_model("example:gpt", config=MODEL).module
    with pytest.raises(InstantiationError, match="No second GPT can be built"):
        hyperparameter_search(module, "builtin:python-docs", folder=tmp_path / "search")
    spec = utils.ModelSpec(factory=lambda: nn.Linear(2, 2))
    assert isinstance(fresh_model(buildable(module, spec)), nn.Linear)


def test_a_space_is_checked_against_the_fields_of_a_config():
    space = SearchSpace(
        learning_rate=LogUniform(1e-4, 1e-2), clip_norm=Uniform(0.5, 2.0), batch_size=Integers(4, 16, 4),
        schedule=Choice("cosine", "linear"),
    )  # fmt: skip
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert "LogUniform(low=0.0001" in repr(space)
    space.check(TrainingConfig())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SearchSpace(), "nothing to search over"),
        (lambda: SearchSpace(learning_rat=Uniform(0, 1)), "Did you mean 'learning_rate'"),
        (lambda: SearchSpace(max_steps=Integers(1, 2)), "max_steps, and a longer run nearly always ends lower"),
        (lambda: SearchSpace(seed=Integers(1, 2)), "choose luck"),
        (lambda: SearchSpace(batch_size=8), "A single value belongs into the config"),
        (lambda: Uniform(2, 1), "no range"),
        (lambda: LogUniform(0, 1), "no logarithm"),
        (lambda: Integers(1, 2.5), "whole numbers"),
        (lambda: Choice(1), "no choice"),
        (lambda: Choice([1], [2]), "Expected numbers, texts"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_killed_trial_is_only_taken_when_its_process_is_gone(tmp_path):
    from contextlib import ExitStack

    with ExitStack() as held, ExitStack() as other:
        assert search._hold(tmp_path, 3, held)
        assert not search._hold(tmp_path, 3, other), "another process has it"
        assert search._hold(tmp_path, 4, other)
    with ExitStack() as later:
        assert search._hold(tmp_path, 3, later)


def test_pictures_of_few_and_odd_trials(tmp_path):
    space = SearchSpace(schedule=Choice("cosine", "linear"), learning_rate=LogUniform(1e-4, 1e-2))
    record = SimpleNamespace(
        one=TrialRecord(0, "complete", {"schedule": "cosine", "learning_rate": 1e-3}, 2.0, 5, tmp_path),
        two=TrialRecord(1, "complete", {"schedule": "cosine", "learning_rate": 1e-3}, 2.0, 5, tmp_path),
    )
    result = SearchResult(tmp_path, "GPT", "file:x", space, TrainingConfig(), (record.one,))
    assert result.figures() == {}
    assert "fewer than 4 complete trials" in result.text()
    result = SearchResult(tmp_path / "file", "GPT", "file:x", space, TrainingConfig(), (record.one, record.two))
    assert list(result.figures()) == ["parallel"]
    (tmp_path / "file").write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert result.save_pictures() == []
    assert "cannot be written" in str(caught[0].message)


class Blind(nn.Module):
    """A language model whose held-out loss is not a number."""

    def __init__(self, broken=True):
        super().__init__()
        self.token, self.head, self.broken = nn.Embedding(300, 8), nn.Linear(8, 300), broken

    def forward(self, input_ids):
        scores = self.head(self.token(input_ids))
        return scores * float("nan") if self.broken and not self.training else scores


QUICK = TrainingConfig(max_steps=2, batch_size=4, val_every_steps=2, log_every_steps=2, context_length=16)
STATED = ModelSpec(task="causal_lm", vocab_size=300, max_length=16, frozen=("token.weight",))


@pytest.fixture(scope="module")
def windows(text_file):
    return load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=16)


def test_trials_whose_loss_is_not_a_number_fail_and_the_search_ends(tmp_path, windows):
    with pytest.raises(RunError, match=r"All 2 trials failed; the last one with RunError.*nan"):
        hyperparameter_search(Blind, windows, None, 2, tmp_path / "s", config=QUICK, spec=STATED, progress=False)
    result = read_search(tmp_path / "s")
    assert [trial.state for trial in result.trials] == ["failed"] * 2
    assert result.best is None
    json.loads(json.dumps(result.to_dict(), allow_nan=False))


def test_a_last_loss_that_is_not_finite_is_a_fault():
    run = SimpleNamespace(last=lambda split: {"loss": float("inf")}, directory="runs/one")
    with pytest.raises(RunError, match="held-out loss at the end of the run in runs/one is inf"):
        search._final_loss(run)
    run.last = lambda split: {}
    with pytest.raises(RunError, match="is nan"):
        search._final_loss(run)


def test_the_best_is_trained_as_it_was_stated_for_the_search(tmp_path, windows, monkeypatch):
    arguments = (lambda: Blind(broken=False), windows, None, 1, tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        result = hyperparameter_search(*arguments, config=QUICK, spec=STATED, progress=False)
        assert result.best is not None, "no picture is no reason to lose the search"
    run = result.train_best(tmp_path / "best", lambda: Blind(broken=False), progress=False)
    stated = json.loads((run.directory / "run.json").read_text())["spec"]
    assert (stated["task"], stated["vocab_size"], stated["frozen"]) == ("causal_lm", 300, ["token.weight"])
    assert result.train_best(tmp_path / "best", lambda: Blind(broken=False), progress=False).finished
    other = replace(STATED, frozen=())
    with pytest.raises(RunError, match="spec was"):
        hyperparameter_search(*arguments, config=QUICK, spec=other, progress=False)
    old = json.loads((tmp_path / "s" / "search.json").read_text())
    del old["spec"]
    (tmp_path / "s" / "search.json").write_text(json.dumps(old))
    hyperparameter_search(*arguments, config=QUICK, spec=STATED, progress=False)


def test_pictures_that_cannot_be_drawn_are_told(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="The search has no pictures: The package matplotlib"):
        assert found.save_pictures() == []
    assert "pip install matplotlib" in found._repr_html_()
