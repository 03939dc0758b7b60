"""One command writes the address everywhere; twice is the same as once; --check finds what disagrees."""

import json
import shutil

import pytest

from tools import colab_links
from tools.colab_links import CELL, PROJECT, LinkError, check_address, main, with_badges

README = "# Title\n\n<!-- colab-badges -->\nold\n<!-- /colab-badges -->\n\nrest\n"


def notebook(tags=("bootstrap",)):
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Tïtle\n", "text"]},
        {
            "cell_type": "code",
            "id": "b",
            "execution_count": None,
            "metadata": {"tags": list(tags)},
            "outputs": [],
            "source": [],
        },
        {"cell_type": "code", "id": "c", "execution_count": None, "metadata": {}, "outputs": [], "source": ["1 + 1"]},
    ]
    return (
        json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False)
        + "\n"
    )


@pytest.fixture
def checkout(root, tmp_path):
    for name in (PROJECT, CELL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / "README.md").write_text(README)
    for name in ("template.ipynb", "training.ipynb"):
        (tmp_path / name).write_text(notebook(), encoding="utf-8")
    main(["", "--root", str(tmp_path)])
    return tmp_path


def test_stamping_writes_every_place_and_again_changes_nothing(checkout, capsys):
    assert main(["Some-Owner/my.repo_1", "--root", str(checkout)]) == 0
    line = 'REPOSITORY = "Some-Owner/my.repo_1"  # stamped by make colab-links'
    assert line in (checkout / PROJECT).read_text()
    assert line in (checkout / CELL).read_text()
    for name in ("template.ipynb", "training.ipynb"):
        text = (checkout / name).read_text(encoding="utf-8")
        document = json.loads(text)
        assert "".join(document["cells"][1]["source"]) == (checkout / CELL).read_text().rstrip("\n")
        assert document["cells"][2]["source"] == ["1 + 1"]
        assert "Tïtle" in text
    readme = (checkout / "README.md").read_text()
    assert readme.count("github/Some-Owner/my.repo_1/blob/v") == 3
    assert readme.startswith("# Title\n")
    assert readme.endswith("\nrest\n")
    assert "README.md" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*") if path.is_file()}
    assert main(["Some-Owner/my.repo_1", "--root", str(checkout)]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in checkout.rglob("*") if path.is_file()} == before
    assert main(["other/name", "--root", str(checkout)]) == 0
    assert "Some-Owner" not in "".join(path.read_text() for path in checkout.rglob("*") if path.is_file())


def test_unstamped_badges_say_so(checkout):
    readme = (checkout / "README.md").read_text()
    assert readme.count("make colab-links REPO=owner/name") == 3
    assert "old" not in readme


def test_check_names_what_disagrees(checkout, capsys):
    assert main(["--check", "--root", str(checkout)]) == 0
    assert "All places agree: no address is stamped." in capsys.readouterr().out
    main(["a/b", "--root", str(checkout)])
    path = checkout / "training.ipynb"
    path.write_text(path.read_text().replace("a/b", "a/c"))
    capsys.readouterr()
    assert main(["--check", "--root", str(checkout)]) == 1
    assert "training.ipynb. Run: make notebooks" in capsys.readouterr().out
    assert main(["--sync", "--root", str(checkout)]) == 0
    assert main(["--check", "--root", str(checkout)]) == 0


@pytest.mark.parametrize(
    "address",
    [
        "owner",
        "/name",
        "owner/",
        "owner/na me",
        "https://github.com/o/n",
        "o/n/x",
        "-o/n",
        "o/..",
        'o/"',
        "o/n.git",
        "o/n\n",
    ],
)
def test_what_is_no_address_is_refused_and_nothing_is_written(checkout, capsys, address):
    before = (checkout / PROJECT).read_text()
    assert (
        main([f"{address}", "--root", str(checkout)] if address[0] != "-" else ["--root", str(checkout), "--", address])
        == 1
    )
    assert "is not a repository's address. Expected owner/name" in capsys.readouterr().err
    assert (checkout / PROJECT).read_text() == before


def test_no_address_at_all_says_how(capsys, checkout):
    assert main(["--root", str(checkout)]) == 2
    assert "make colab-links REPO=owner/name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (PROJECT, "REPOSITORY = None\n", "has 0 lines of the form"),
        ("README.md", "# Title\n", "has no pair of lines <!-- colab-badges -->"),
        ("template.ipynb", notebook(tags=()), "template.ipynb has 0 code cells tagged bootstrap"),
    ],
)
def test_a_place_that_lost_its_mark_is_named_and_nothing_is_written(checkout, capsys, name, text, expected):
    (checkout / name).write_text(text, encoding="utf-8")
    before = {path: path.read_text() for path in checkout.rglob("*") if path.is_file()}
    assert main(["a/b", "--root", str(checkout)]) == 1
    assert expected in capsys.readouterr().err
    assert {path: path.read_text() for path in checkout.rglob("*") if path.is_file()} == before


def test_addresses_that_are_fine():
    for address in ("a/b", "A-1/b.c_d-e", ""):
        assert check_address(address) == address


def test_badges_need_their_marks():
    with pytest.raises(LinkError, match="Put them where the badges go"):
        with_badges("no marks", "a/b")


def test_this_checkout_agrees(root):
    if not (root / "README.md").exists():
        pytest.skip("there is no README yet")
    assert colab_links.disagreeing(root) == []
