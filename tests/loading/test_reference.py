"""What is pasted is understood, or refused with what to paste instead."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.loading.reference import Reference, parse_reference
from utils.runtime.errors import ModelReferenceError

ID = "0123456789abcdef0123456789abcdef"
SHA = "a" * 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ID, Reference("gist", ID)),
        (ID.upper(), Reference("gist", ID)),
        (f"  <{ID}>\n", Reference("gist", ID)),
        ("0123456789abcdef0123", Reference("gist", "0123456789abcdef0123")),
        ("1234567", Reference("gist", "1234567")),
        (f"user/{ID}", Reference("gist", ID)),
        (f"gist:{ID}", Reference("gist", ID)),
        (f"https://gist.github.com/{ID}", Reference("gist", ID)),
        (f"https://gist.github.com/user/{ID}", Reference("gist", ID)),
        (f"gist.github.com/user/{ID}", Reference("gist", ID)),
        (f"https://gist.github.com/user/{ID}.git", Reference("gist", ID)),
        (f"https://gist.github.com/user/{ID}#file-model-py", Reference("gist", ID)),
        (f"https://gist.github.com/user/{ID}?permalink_comment_id=1", Reference("gist", ID)),
        (f"https://gist.github.com/user/{ID}/{SHA}", Reference("gist", ID, SHA)),
        (f"https://gist.github.com/user/{ID}/revisions", Reference("gist", ID)),
        (f"https://gist.github.com/1234567/{ID}", Reference("gist", ID)),
        (f"https://gist.githubusercontent.com/user/{ID}/raw/{SHA}/model.py", Reference("gist", ID, SHA)),
        (f"https://gist.githubusercontent.com/user/{ID}/raw/model.py", Reference("gist", ID)),
        (f"https://api.github.com/gists/{ID}", Reference("gist", ID)),
        (f"https://colab.research.google.com/gist/user/{ID}/template.ipynb", Reference("gist", ID)),
        ("https://github.com/o/r", Reference("github", "o/r")),
        ("https://github.com/o/r.git", Reference("github", "o/r")),
        ("https://github.com/o/r/tree/main/a/b", Reference("github", "o/r", "main", "a/b")),
        ("https://github.com/o/r/blob/v1/a/model.py", Reference("github", "o/r", "v1", "a/model.py")),
        ("https://raw.githubusercontent.com/o/r/main/model.py?token=X", Reference("github", "o/r", "main", "model.py")),
        (
            "https://raw.githubusercontent.com/o/r/refs/heads/main/a/model.py",
            Reference("github", "o/r", "main", "a/model.py"),
        ),
        (
            "https://colab.research.google.com/github/o/r/blob/main/a/model.py",
            Reference("github", "o/r", "main", "a/model.py"),
        ),
        ("hub:openai-community/gpt2", Reference("hub", "openai-community/gpt2")),
        ("hub:gpt2@v1", Reference("hub", "gpt2", "v1")),
        ("https://huggingface.co/o/m/tree/main", Reference("hub", "o/m", "main")),
        ("example:gpt", Reference("example", "gpt")),
        ("model.py", Reference("path", "model.py")),
        ("../models/mine", Reference("path", "../models/mine")),
        ("C:\\models\\mine.py", Reference("path", "C:\\models\\mine.py")),
    ],
)
def test_understood(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The reference is empty"),
        (" \n ", "The reference is empty"),
        ("https://", "not a place"),
        ("http:", "not a complete https address"),
        ("//", "no host"),
        ("gist.github.com", "has no Gist id"),
        ("https://gist.github.com/user", "has a user but no Gist id"),
        ("https://gist.github.com/user/xyz", "not an id"),
        ("#file-model-py", "only a piece of an address"),
        ("?gist_id=abc", "only a piece of an address"),
        ("gist_id=abc", "only a piece of an address"),
        (ID[:-1], "has 31 hexadecimal digits instead of 32"),
        ("https://github.com/o", "names no repository"),
        ("https://github.com/o/r/issues/1", "not a file or folder"),
        ("https://github.com/o/r/tree/main/../x", "with '..'"),
        ("https://colab.research.google.com/drive/abc", "does not lead to a model's source"),
        ("https://example.org/model.py", "leads to example.org"),
        ("ftp://gist.github.com/a", "scheme 'ftp'"),
        ("https://[gist", "not a valid address"),
        ("https://gist.github.com/user/%0a", "control characters"),
        ("git@github.com:o/r.git", "not a complete https address"),
        ("a\nb", "line breaks"),
        ("hub:", "is not a Hub name"),
        ("hub:a/b/c", "is not a Hub name"),
        ("hub:../x", "is not a Hub name"),
        ("gist:", "not an id"),
        ("example:", "does not name an example"),
        ("example:../gpt", "does not name an example"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ModelReferenceError, match="Expected a Gist id") as caught:
        parse_reference(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("exmaple:gpt", "example:gpt"), ("Example:gpt", "example:gpt"), ("examples:gpt", "example:gpt"),
     ("hubs:gpt2", "hub:gpt2"), ("gists:" + ID, "gist:" + ID)],
)  # fmt: skip
def test_a_misspelt_place_is_corrected(text: str, meant: str) -> None:
    with pytest.raises(ModelReferenceError, match=f"Did you mean {meant}\\?"):
        parse_reference(text)


def test_an_error_shows_no_secret() -> None:
    with pytest.raises(ModelReferenceError) as caught:
        parse_reference("https://me:hunter2@example.org/x?token=SECRET")
    assert "SECRET" not in str(caught.value) and "hunter2" not in str(caught.value)
    text = parse_reference("https://raw.githubusercontent.com/o/r/main/model.py?token=SECRET").text
    assert "SECRET" not in text and parse_reference(text).path == "model.py"


_piece = st.sampled_from(
    ["https://", "gist.github.com", "github.com", "/", "//", ID, SHA, "user", "blob", "tree", "raw", "#", "?", ":", "@",
     "hub:", "example:", "gist:", "colab.research.google.com", "gist", "..", "[", "%00", ".git", " ", "\\", "main"]
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.lists(_piece, max_size=8).map("".join)))
def test_always_a_reference_or_a_clear_error(text: str) -> None:
    reference = None
    try:
        reference = parse_reference(text)
    except ModelReferenceError as error:
        clear = "Expected a Gist id" in str(error)
    else:
        clear = bool(reference.target)
    assert clear
    if reference is not None and reference.kind != "path":
        again = parse_reference(reference.text)
        assert (again.kind, again.target, again.path) == (reference.kind, reference.target, reference.path)
