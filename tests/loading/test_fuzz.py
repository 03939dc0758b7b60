"""Whatever a reference, a config or an answer of the API holds: a model or a clear error, never a traceback."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from utils.loading import LoadedModel
from utils.runtime.errors import SeedbedError

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
NAMES = st.sampled_from(
    ["vocab_size", "d_model", "nhead", "num_layers", "max_seq_len", "model_name", "nodes", "params", "num_classes"]
)  # fmt: skip


def model_or_clear_error(call):
    """Run a call; every error must be one of Seedbed's own, with a sentence of its own."""
    try:
        return call()
    except SeedbedError as error:
        text = str(error)
        assert len(text) > 20 and "Traceback" not in text
        return None


@pytest.fixture
def gist(github):
    """A sound Gist that a test spoils."""
    github.gist({"model.py": github.tiny, "config.json": '{"vocab_size": 16, "d_model": 8}'})
    return github


@FUZZ
@given(text=st.text(max_size=60))
def test_references(text):
    """Any text: a reference is understood, or refused with what was expected. Paths that exist are no models here."""
    model_or_clear_error(lambda: utils.load_model(f"example:{text}"))
    model_or_clear_error(lambda: utils.load_model(f"/nonexistent/{text}"))


@FUZZ
@given(config=st.dictionaries(NAMES | st.text(max_size=8), JSON, max_size=6))
def test_configs(gist, config):
    """A flat or graph config of anything; a model that loads has sane sizes."""
    entry = gist.answers[f"/gists/{gist.identifier}"]["files"]["config.json"]
    entry["content"] = json.dumps(config)
    entry["size"] = len(entry["content"])
    loaded = model_or_clear_error(lambda: utils.load_model(gist.identifier))
    assert loaded is None or isinstance(loaded, LoadedModel)


@FUZZ
@given(text=st.text(max_size=80) | st.binary(max_size=40).map(lambda data: data.decode("latin-1")))
def test_config_files(gist, text):
    """Text that is seldom JSON."""
    entry = gist.answers[f"/gists/{gist.identifier}"]["files"]["config.json"]
    entry["content"] = text
    entry["size"] = len(text)
    model_or_clear_error(lambda: utils.load_model(gist.identifier))


@FUZZ
@given(body=JSON)
def test_answers_of_another_kind(gist, body):
    """Valid JSON that no Gist API would send."""
    original = gist.answers[f"/gists/{gist.identifier}"]
    gist.answers[f"/gists/{gist.identifier}"] = (200, {}, json.dumps(body).encode())
    try:
        assert model_or_clear_error(lambda: utils.load_model(gist.identifier)) is None
    finally:
        gist.answers[f"/gists/{gist.identifier}"] = original


@FUZZ
@given(data=st.data())
def test_answers_with_one_value_replaced(gist, data):
    """A sound answer in which any one value is something else, or missing."""
    original = gist.answers[f"/gists/{gist.identifier}"]
    spoiled = copy.deepcopy(original)
    spots = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(spoiled)
    node, key = data.draw(st.sampled_from(range(len(spots))).map(spots.__getitem__))
    if isinstance(node, dict) and data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(JSON)
    gist.answers[f"/gists/{gist.identifier}"] = (200, {}, json.dumps(spoiled).encode())
    try:
        model_or_clear_error(lambda: utils.load_model(gist.identifier))
    finally:
        gist.answers[f"/gists/{gist.identifier}"] = original


@FUZZ
@given(
    lines=st.lists(
        st.sampled_from(
            [
                "import torch", "from torch import nn", "class Model(nn.Module):", "    def __init__(self):",
                "        super().__init__()", "        self.x = nn.Linear(2, 2)", "    def forward(self, x):",
                "        return self.x(x)", "def build_model(config):", "    return Model()", "x = (", "\t", "return 1",
                "class Model:", "Model = None", "import model", "from . import other", "raise ValueError('x')",
            ]
        ) | st.text(max_size=20),
        max_size=12,
    )
)  # fmt: skip
def test_source_files(gist, lines):
    """Lines of code in any order; what is not harmless is refused by the audit before it runs."""
    entry = gist.answers[f"/gists/{gist.identifier}"]["files"]["model.py"]
    kept = entry["content"]
    entry["content"] = "\n".join(lines)
    entry["size"] = len(entry["content"].encode("utf-8", "surrogatepass"))
    try:
        model_or_clear_error(lambda: utils.load_model(gist.identifier))
    finally:
        entry["content"], entry["size"] = kept, len(kept)
