"""The README tells the truth: its tree, its commands and its pictures are there."""

import re
import shlex

import pytest

import utils
from utils.__main__ import build_parser


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def test_the_tree_names_every_file_of_the_package_and_no_other(root, readme):
    tree = readme.split("## The tree")[1].split("## ")[0]
    package = tree[tree.index("    utils/") : tree.index("    tests/")]
    named = set(re.findall(r"\b\w+\.py\b", package))
    present = {path.name for path in (root / "utils").rglob("*.py") if "examples" not in path.parts}
    initial = {"__init__.py"}
    assert named | initial == present | initial
    for name in re.findall(r"^    ([\w.-]+\.(?:ipynb|txt|toml|md))\b", tree, re.MULTILINE):
        assert (root / name).exists(), name


def test_make_targets_exist(root, readme):
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_command_line_examples_parse(readme):
    lines = re.findall(r"^    python -m utils (.+)$", readme, re.MULTILINE)
    verbs = {"validate", "train", "resume", "generate", "export", "bundle", "publish", "link"}
    assert {line.split()[0] for line in lines} == verbs
    for line in lines:
        build_parser().parse_args(shlex.split(line))


def test_the_python_example_names_what_exists(readme):
    block = readme.split("```python")[1].split("```")[0]
    for name in re.findall(r"utils\.(\w+)", block):
        assert hasattr(utils, name), name
    compile(block, "README.md", "exec")


def test_pictures_are_there_and_small(root, readme):
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme)
    assert len([path for path in pictures if path.startswith("docs/gallery/")]) == 5
    for path in pictures:
        if not path.startswith("http"):
            assert 1_000 < (root / path).stat().st_size < 300_000, path


def test_every_public_name_loads():
    for name in utils.__all__:
        assert getattr(utils, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lod_model'; it has"):
        utils.lod_model  # noqa: B018


def test_every_code_and_check_is_documented(root):
    from utils.tier1_critical_validation import TIER1
    from utils.tier2_advanced_analysis import TIER2
    from utils.validation.codes import MEANING

    text = (root / "docs/validation.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z0-9_]+", text))
    assert set(MEANING) <= words and {check.id for check in (*TIER1, *TIER2)} <= words
