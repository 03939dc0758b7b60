"""Links and badges follow the address; without one they say so."""

from utils.runtime.project import NOTEBOOKS, TAG, VERSION, colab_address, colab_badge


def test_tag_is_the_version():
    assert f"v{VERSION}" == TAG


def test_link_names_repository_tag_and_notebook():
    link = colab_address("template.ipynb", "owner/name")
    assert link == f"https://colab.research.google.com/github/owner/name/blob/{TAG}/template.ipynb"
    assert link in colab_badge("template.ipynb", "owner/name")


def test_unstamped_badges_say_how_to_stamp():
    assert colab_address("template.ipynb", "") == ""
    for notebook in NOTEBOOKS:
        badge = colab_badge(notebook, "")
        assert notebook in badge
        assert "make colab-links REPO=owner/name" in badge
        assert "http" not in badge
