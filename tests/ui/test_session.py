from pathlib import Path

import pytest
from torch import nn

import utils
from utils.adapters import ModelAdapter
from utils.runtime.errors import ConfigError
from utils.ui.session import keep_upload, run_folder, session_settings


@pytest.fixture(scope="module")
def loaded():
    return utils.load_model("example:gpt", config={"d_model": 32, "num_layers": 1, "nhead": 2})


@pytest.fixture(scope="module")
def adapter(loaded):
    return ModelAdapter(loaded)


def test_data_that_fits_the_task_is_found(adapter):
    settings = session_settings(adapter, max_steps=10)
    assert settings.data == "builtin:python-docs"
    assert settings.config.max_steps == 10
    images = ModelAdapter(utils.load_model("example:vit"))
    assert session_settings(images).data == "builtin:digits"
    assert "max_steps=10" in settings._repr_html_()
    assert settings.to_dict()["reason"] == "the built-in data for causal lm"


def test_no_built_in_data_for_a_task_is_said():
    adapter = ModelAdapter(nn.Linear(4, 3))
    with pytest.raises(
        ConfigError, match="No built-in data fits the task tabular_classification.*Choose data yourself"
    ):
        session_settings(adapter)
    assert session_settings(adapter, "file:a.txt").data == "file:a.txt"


def test_the_environment_wins(adapter, monkeypatch, loaded):
    monkeypatch.setenv("SEEDBED_MAX_STEPS", "7")
    monkeypatch.setenv("SEEDBED_DATA", "file:x.txt")
    monkeypatch.setenv("SEEDBED_RUN_DIR", "somewhere/else")
    settings = session_settings(adapter, "builtin:python-docs", max_steps=100)
    assert (settings.config.max_steps, settings.data) == (7, "file:x.txt")
    assert run_folder("name", loaded, settings) == Path("somewhere/else")
    monkeypatch.setenv("SEEDBED_MAX_STEPS", "many")
    with pytest.raises(ConfigError, match="SEEDBED_MAX_STEPS is 'many'.*whole number"):
        session_settings(adapter)


def test_equal_settings_give_the_same_folder_and_others_another(adapter, loaded):
    first = run_folder("", loaded, session_settings(adapter, max_steps=10))
    assert first == run_folder("", loaded, session_settings(adapter, max_steps=10))
    assert first != run_folder("", loaded, session_settings(adapter, max_steps=11))
    assert first.parent == Path("runs")
    assert first.name.startswith("GPT-python-docs-")
    assert run_folder(" mine ", loaded, session_settings(adapter)) == Path("runs/mine")


def test_a_run_name_is_no_path(adapter, loaded):
    with pytest.raises(ConfigError, match="'../../etc' is a path"):
        run_folder("../../etc", loaded, session_settings(adapter))


def test_an_upload_never_takes_the_place_of_another(tmp_path):
    folder = tmp_path / "uploads"
    assert keep_upload("a.tar.gz", b"first", folder) == folder / "a.tar.gz"
    assert keep_upload("a.tar.gz", b"second", folder) == folder / "a-2.tar.gz"
    assert keep_upload("a.tar.gz", b"third", folder) == folder / "a-3.tar.gz"
    assert keep_upload("a.tar.gz", b"second", folder) == folder / "a-2.tar.gz", "the same file again"
    assert (folder / "a.tar.gz").read_bytes() == b"first"
    assert keep_upload("../../evil", b"x", folder) == folder / "evil"
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileExistsError):
        keep_upload("a", b"x", tmp_path / "file")
