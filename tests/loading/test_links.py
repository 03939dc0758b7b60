"""Links that carry a model: a copy of the notebook, in the model's own Gist."""

import json
from pathlib import Path

import pytest

from utils.__main__ import main
from utils.loading import links
from utils.loading.links import filled_notebook, model_link, prefilled_notebook
from utils.runtime.errors import ConfigError, FetchError, ModelReferenceError

ROOT = Path(__file__).resolve().parents[2]


def sources(text):
    """Return the code of a notebook."""
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def gist(github):
    """A Gist with an owner."""
    github.gist({"model.py": github.tiny, "config.json": "{}"})
    github.answers[f"/gists/{github.identifier}"]["owner"] = {"login": "octo-cat"}
    return github


@pytest.mark.parametrize("notebook", ["template", "training"])
@pytest.mark.parametrize("reference", ["https://gist.github.com/abc", 'a "quoted" \\ path', "Zoë\n# @param", ""])
def test_only_the_form_changes_and_holds_exactly_the_reference(notebook, reference):
    """Whatever a reference contains, the cell assigns it and nothing else, and every other cell is as it was."""
    original = (ROOT / f"{notebook}.ipynb").read_text(encoding="utf-8")
    before, after = sources(original), sources(filled_notebook(notebook, reference))
    changed = [index for index, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert len(changed) == (1 if reference else 0)
    line = next(line for source in after for line in source.splitlines() if line.startswith("MODEL = "))
    scope = {}
    exec(compile(line, "form", "exec"), scope)
    assert scope["MODEL"] == reference


def test_a_gist_gets_a_link_and_what_is_left_to_do(gist, tmp_path):
    """Without publishing, the copy is written and the step is named."""
    found = model_link(gist.identifier, directory=tmp_path)
    assert found.address == f"https://colab.research.google.com/gist/octo-cat/{gist.identifier}/template.ipynb"
    assert not found.published and "Add the copy to" in found.steps[0] and gist.changes == []
    assert any(gist.identifier in source for source in sources(Path(found.path).read_text(encoding="utf-8")))
    assert f"link: {found.address}" in str(found) and found.address in found._repr_html_()


def test_publishing_adds_the_copy_to_the_gist(gist, tmp_path, monkeypatch):
    """One request with the token, holding exactly the written file; the token is shown nowhere."""
    monkeypatch.setenv("GITHUB_TOKEN", "secret-token")
    found = model_link(gist.identifier, "training", tmp_path, publish=True)
    ((path, sent),) = gist.changes
    assert path == f"/gists/{gist.identifier}" and list(sent["files"]) == ["training.ipynb"]
    assert sent["files"]["training.ipynb"]["content"] == Path(found.path).read_text(encoding="utf-8")
    assert found.published and "secret-token" not in str(found) + json.dumps(found.to_dict())
    assert gist.requests[-1][1]["Authorization"] == "Bearer secret-token"


def test_what_is_in_the_gist_is_not_overwritten_unasked(gist, tmp_path, monkeypatch):
    """A notebook of that name may hold somebody's work."""
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    gist.answers[f"/gists/{gist.identifier}"]["files"]["template.ipynb"] = {"content": "{}"}
    with pytest.raises(ConfigError, match="already holds template.ipynb"):
        model_link(gist.identifier, directory=tmp_path, publish=True)
    assert gist.changes == []
    assert model_link(gist.identifier, directory=tmp_path, publish=True, replace=True).published


def test_an_edited_copy_stays(tmp_path):
    """The next copy gets another name; an equal one is written over itself."""
    first = prefilled_notebook("template", "example:gpt", tmp_path)
    assert prefilled_notebook("template", "example:gpt", tmp_path).path == first.path
    Path(first.path).write_text("edited")
    second = prefilled_notebook("template", "example:gpt", tmp_path)
    assert second.path.endswith("template-example-gpt-2.ipynb") and Path(first.path).read_text() == "edited"


def test_publishing_without_a_token_says_how_to_get_one(gist, tmp_path):
    """Nothing is sent."""
    with pytest.raises(FetchError, match=r"there is no access token. Expected GITHUB_TOKEN .* scope gist"):
        model_link(gist.identifier, directory=tmp_path, publish=True)
    assert gist.changes == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}, b"{}"), "server error 500.*look at it before trying again"),
        ((404, {}, b"{}"), "does not exist or is private"),
        ((403, {}, b"{}"), "refuses access"),
        ((200, {}, b"nonsense"), "the answer is not JSON"),
    ],
)
def test_a_change_that_fails_is_tried_once(gist, tmp_path, monkeypatch, answer, message):
    """A write is never repeated."""
    monkeypatch.setenv("GITHUB_TOKEN", "token")
    first = gist.answers[f"/gists/{gist.identifier}"]
    gist.answers[f"/gists/{gist.identifier}"] = [(200, {}, first), answer]
    with pytest.raises(FetchError, match=message):
        model_link(gist.identifier, directory=tmp_path, publish=True)
    assert len(gist.changes) == 1


@pytest.mark.parametrize("owner", [None, {"login": "a/../b"}, {"login": 7}, "x"])
def test_a_gist_without_a_usable_owner(gist, tmp_path, owner):
    """Anonymous Gists exist; an answer may hold anything."""
    gist.answers[f"/gists/{gist.identifier}"]["owner"] = owner
    with pytest.raises(FetchError, match="has no owner"):
        model_link(gist.identifier, directory=tmp_path)


def test_anything_else_gets_the_copy_alone(tmp_path):
    """A built-in example has no Gist to live in."""
    found = model_link("example:bert", "training", tmp_path)
    assert found.address == "" and Path(found.path).name == "training-example-bert.ipynb"
    with pytest.raises(ConfigError, match="example:bert is not a Gist"):
        model_link("example:bert", directory=tmp_path, publish=True)
    with pytest.raises(ModelReferenceError):
        model_link("https://example.com/x", directory=tmp_path)


def test_a_path_is_absolute_in_the_copy_and_leads_somewhere(tmp_path, monkeypatch):
    """The copy may be opened in another folder than the one where it was made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    for found in (model_link("mine.py"), prefilled_notebook("template", "mine.py")):
        assert found.reference == str(tmp_path / "mine.py") and Path(found.path).name == "template-mine-py.ipynb"
        assert any(json.dumps(found.reference) in source for source in sources(Path(found.path).read_text()))
    with pytest.raises(ModelReferenceError, match=r"There is no file or folder nope.py. .* Correct the path"):
        model_link("nope.py")


def test_bad_arguments(tmp_path, monkeypatch):
    """No such notebook, no folder, an incomplete copy, a notebook without the form."""
    with pytest.raises(ConfigError, match="no notebook 'other'. Expected one of template, training"):
        filled_notebook("other", "x")
    with pytest.raises(ConfigError, match="is not a folder"):
        prefilled_notebook("template", "x", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"template.ipynb cannot be read .* complete copy of the project"):
        filled_notebook("template", "x", tmp_path)
    (tmp_path / "template.ipynb").write_text('{"cells": []}')
    with pytest.raises(ConfigError, match="has 0 fields for the model"):
        filled_notebook("template", "x", tmp_path)
    monkeypatch.setattr(links, "REPOSITORY", "owner/name")
    assert len(prefilled_notebook("template", "", tmp_path).steps) == 1


def test_command_line(gist, tmp_path, capsys):
    """The verb prints the link, as text and as JSON."""
    assert main(["link", gist.identifier, "--output", str(tmp_path)]) == 0
    assert "link: https://colab.research.google.com/gist/octo-cat/" in capsys.readouterr().out
    assert main(["link", gist.identifier, "--json", "--notebook", "training", "--output", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["address"].endswith("/training.ipynb")
    assert main(["link", "f" * 32, "--output", str(tmp_path)]) == 2
    assert "does not exist or is private" in capsys.readouterr().err
