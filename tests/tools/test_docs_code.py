"""The Python of a page of the documentation runs as it stands, from its first block to its last."""

import re
from pathlib import Path

import pytest
import torch

BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALLER = {
    "memory.md": {"max_steps=300": "max_steps=2", "[:60]": "[:40]"},
    "concepts.md": {"max_steps=600": "max_steps=30", "steps=120": "steps=4"},
}
"""What a page says, and what runs instead: enough for every line, and quick."""


def blocks(text):
    """Return the line number, what is said beside the language, and the code of each block of Python."""
    return [
        (text[: found.start(3)].count("\n"), found[2].strip(), found[3])
        for found in BLOCK.finditer(text)
        if found[1] == "python"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", SMALLER)
def test_the_code_of_a_page_runs(page, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / page).read_text(encoding="utf-8")
    for said, smaller in SMALLER[page].items():
        assert said in text, f"{page} no longer says {said}"
        text = text.replace(said, smaller)
    code = blocks(text)
    assert len(code) == text.count("```python") > 2
    names = {"__name__": page}
    torch.manual_seed(0)
    for line, marker, source in code:
        if marker == "no-run":
            continue
        # The lines of an error are those of the page.
        exec(compile("\n" * line + source, str(Path("docs") / page), "exec"), names)


def test_blocks_are_found_where_they_are():
    assert blocks("a\n```python\nx = 1\n```\n```\nno\n```\n```python no-run\ny\n```\n") == [
        (2, "", "x = 1\n"),
        (8, "no-run", "y\n"),
    ]
