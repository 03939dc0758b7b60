import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import utils
from utils.adapters import ModelAdapter
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import load_data
from utils.training.growth_rows import LINEAGE
from utils.training.resume import train
from utils.training.weights import weights_sha256
from utils.ui import generations, views
from utils.ui.generations import generate
from utils.ui.views import LiveCurve, in_notebook

SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1, "dropout": 0.1}
CONFIG = TrainingConfig(
    max_steps=6, batch_size=2, log_every_steps=2, val_every_steps=3, checkpoint_every_steps=100, context_length=16
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400)))
    return f"file:{path}"


@pytest.fixture(scope="module")
def gpt():
    return utils.load_model("example:gpt", config=SMALL)


@pytest.fixture(scope="module")
def data(text):
    return load_data(text, task="causal_lm", vocab_size=300, max_length=16)


@pytest.fixture
def screen(monkeypatch):
    """What was shown, and what it was replaced by."""
    display = pytest.importorskip("IPython.display")
    shown, updated = [], []

    class Handle:
        def update(self, content):
            updated.append(content.data)

    def fake(content, display_id=None):
        shown.append(content.data)
        return Handle()

    monkeypatch.setattr(display, "display", fake)
    return shown, updated


def follow(text, folder, *observers, **changes):
    loaded = utils.load_model("example:gpt", config=SMALL)
    return train(loaded, text, CONFIG.with_changes(**changes), folder, progress=False, observers=list(observers))


def test_a_test_is_no_notebook():
    assert not in_notebook()


def test_one_output_is_redrawn_in_place(screen, text, tmp_path, monkeypatch):
    shown, updated = screen
    monkeypatch.setattr(views, "REDRAW_SECONDS", 0.0)
    run = follow(text, tmp_path / "run", LiveCurve())
    assert len(shown) == 1
    assert len(updated) == len(run.metrics), "one for each row after the first, and one at the end"
    last = updated[-1]
    for name in ("held out", "bits per byte", "learning rate", "gradient norm", "tokens per second", "memory"):
        assert f">{name}<" in last
    assert "6 of 6" in last and ">time left<" not in last and ">time left<" in updated[0]
    assert "data:image/png;base64," in last
    assert last.count("written at step") == 2
    assert len(last) < 300_000


def test_it_is_not_redrawn_at_every_row(screen, text, tmp_path):
    shown, updated = screen
    follow(text, tmp_path / "run", LiveCurve())
    assert len(shown) == 1
    assert len(updated) <= 3


def test_nothing_is_shown_without_rows(screen):
    LiveCurve().close([])
    assert screen == ([], [])


def test_growth_is_marked_while_it_happens(screen, text, tmp_path, monkeypatch):
    drawn, draw = [], views.figure_png

    def noting(*given, **named):
        drawn.append(named["marks"])
        return draw(*given, **named)

    monkeypatch.setattr(views, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(views, "figure_png", noting)
    schedule = [{"at": 2, "operator": "depth", "to": "full"}, {"at": 4, "operator": "depth", "amount": 1}]
    loaded = utils.load_model("example:gpt", config=SMALL | {"num_layers": 2})
    config = CONFIG.with_changes(growth={"begin_blocks": 1, "schedule": schedule}, log_every_steps=1)
    run = train(loaded, text, config, tmp_path / "run", progress=False, observers=[LiveCurve(generations=False)])
    assert drawn[0] == [] and drawn[-1] == [2, 4]
    assert drawn == sorted(drawn), "an event stays"
    curve = LiveCurve()
    curve.start(run)
    (run.directory / LINEAGE).write_text("{")
    assert "data:image/png" in curve.html(run.metrics) and drawn[-1] == []


def test_images_have_no_texts(screen, tmp_path):
    loaded = utils.load_model("example:vit")
    config = TrainingConfig(max_steps=2, batch_size=8, val_every_steps=1, log_every_steps=1)
    curve = LiveCurve()
    run = train(loaded, "builtin:digits", config, tmp_path / "run", progress=False, observers=[curve])
    assert curve.generations == [] and not curve.wanted
    names = [name for name, _ in curve.numbers(run.metrics)]
    assert "samples per second" in names and "accuracy" in names


def test_watching_changes_no_bit(screen, text, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "REDRAW_SECONDS", 0.0)
    watched = follow(text, tmp_path / "a", LiveCurve())
    alone = follow(text, tmp_path / "b")
    assert weights_sha256(watched.model) == weights_sha256(alone.model)
    kept = [{name: row[name] for name in row if "second" not in name} for row in watched.metrics]
    assert kept == [{name: row[name] for name in row if "second" not in name} for row in alone.metrics]


def test_an_observer_that_fails_is_told_once_and_stops_nothing(text, tmp_path):
    class Broken:
        def __init__(self, verb):
            self.verb, self.calls = verb, []

        def __getattr__(self, name):
            if name not in ("start", "update", "close"):
                raise AttributeError(name)

            def call(argument):
                self.calls.append(name)
                if name == self.verb:
                    raise RuntimeError("no screen")

            return call

    broken = [Broken(verb) for verb in ("start", "update", "close")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = follow(text, tmp_path / "run", *broken)
    told = [str(warning.message) for warning in caught if "stopped following" in str(warning.message)]
    assert run.finished
    text = "Broken stopped following the run (RuntimeError: no screen). Training goes on without it; metrics.csv has "
    assert told == [f"{text}all numbers."] * 3
    assert broken[0].calls == ["start"]
    assert broken[1].calls == ["start", "update"]
    assert broken[2].calls[-1] == "close"


def test_a_text_is_the_same_every_time_and_leaves_everything_as_it_was(gpt, data):
    adapter = ModelAdapter(gpt)
    before = weights_sha256(gpt.module)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    gpt.module.train()
    first = generate(adapter, data, seed=1, seconds=60)
    assert first == generate(adapter, data, seed=1, seconds=60)
    assert first != generate(adapter, data, seed=2, seconds=60)
    assert gpt.module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_sha256(gpt.module) == before
    assert first.complete and first.prompt and first.text
    assert "<|" not in first.prompt + first.text
    likeliest = generate(adapter, data, temperature=0, new_tokens=5, seconds=60)
    assert likeliest == generate(adapter, data, seed=9, temperature=0, new_tokens=5, seconds=60)


def test_a_slow_model_is_cut_off(gpt, data):
    assert generate(ModelAdapter(gpt), data, seconds=0.0).complete is False


def test_a_model_of_one_length_writes_too(data):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(300, 8)
            self.places = torch.nn.Parameter(torch.zeros(16, 8))
            self.head = torch.nn.Linear(8, 300)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids) + self.places)

    spec = utils.ModelSpec(task="causal_lm", vocab_size=300, max_length=16)
    written = generate(ModelAdapter(Fixed(), spec=spec), data, new_tokens=12, seconds=60)
    assert written.text


def test_only_causal_language_models_write(gpt, data):
    other = type(data)(data.reference, "masked_lm", data.train, data.validation, data.tokenizer, data.facts)
    assert generate(ModelAdapter(gpt), other) is None
    assert generations.SECONDS <= 5


def test_without_matplotlib_the_numbers_are_still_shown(gpt, data, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    curve = LiveCurve()
    curve._run = SimpleNamespace(step=3, total_steps=6, data=data, config=CONFIG, directory=tmp_path)
    page = curve.html([{"step": 3, "split": "train", "loss": 1.5, "samples_per_second": 2.0}])
    assert "pip install matplotlib" in page and "1.500" in page
