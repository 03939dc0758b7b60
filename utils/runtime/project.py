"""Where Seedbed itself lives: its version, the tag that notebooks fetch, and the repository's address.

The address is written here once and stamped into badges and notebooks by ``make colab-links REPO=owner/name``.
"""

VERSION = "0.1.0"
TAG = f"v{VERSION}"
REPOSITORY = ""  # stamped by make colab-links
NOTEBOOKS = ("template.ipynb", "training.ipynb", "concepts.ipynb")


def colab_address(notebook: str, repository: str = REPOSITORY) -> str:
    """Return the link that opens a notebook of this version in Colab, or an empty string when unstamped."""
    return f"https://colab.research.google.com/github/{repository}/blob/{TAG}/{notebook}" if repository else ""


def colab_badge(notebook: str, repository: str = REPOSITORY) -> str:
    """Return the Markdown of a notebook's Colab badge; without an address it says how to stamp one."""
    if not repository:
        return f"{notebook}: no Colab link yet; `make colab-links REPO=owner/name` stamps it."
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"{notebook}: [![Open in Colab]({image})]({colab_address(notebook, repository)})"
