"""A link that opens a notebook with a model already in its form.

Colab gives a notebook no supported way to read its own address, so a link cannot carry the model. But Colab opens
notebooks that live in a Gist: a copy of the notebook with its form filled in, stored in the model's own Gist, is that
link.
"""

import json
import re
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from utils.loading.github_api import GitHubClient
from utils.loading.reference import parse_reference
from utils.runtime.errors import ConfigError, FetchError, ModelReferenceError
from utils.runtime.files import write_atomic
from utils.runtime.project import REPOSITORY

NOTEBOOKS = ("template", "training")
ROOT = Path(__file__).resolve().parents[2]
_FORM = re.compile(r'^MODEL = "[^"\n]*"(?=  # @param )', re.MULTILINE)


@dataclass(frozen=True)
class NotebookLink:
    """A notebook with a model filled in, and how to open it."""

    reference: str
    """The model."""
    path: str
    """The copy of the notebook."""
    address: str
    """The link that opens it in Colab; empty where there is none."""
    published: bool
    """Whether the copy has been added to the Gist."""
    steps: tuple[str, ...]
    """What is left to do."""

    def __str__(self) -> str:
        lines = [f"written: {self.path}", *(f"link: {self.address}" for _ in range(bool(self.address))), *self.steps]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        link = f'<a href="{escape(self.address)}">{escape(self.address)}</a>' if self.address else ""
        rows = [f"<code>{escape(self.path)}</code>", link, *(escape(step) for step in self.steps)]
        return "".join(f"<p>{row}</p>" for row in rows if row)


def filled_notebook(notebook: str, reference: str, root: Path = ROOT) -> str:
    """Return a notebook of this project as JSON text with a reference in its form.

    Args:
        notebook: ``"template"`` or ``"training"``.
        reference: The model.
        root: Folder of the notebooks.

    Raises:
        ConfigError: There is no such notebook, it is not where it should be, or it has no form for the model.
    """
    if notebook not in NOTEBOOKS:
        raise ConfigError(f"There is no notebook {notebook!r}.", f"Expected one of {', '.join(NOTEBOOKS)}.")
    path = root / f"{notebook}.ipynb"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path.name} cannot be read beside the package: {error}.",
            "Expected a complete copy of the project.",
            "Clone the repository, or download its zip, and run the command there.",
        ) from None
    # A JSON string is also a Python string, whatever characters the reference has.
    line = f"MODEL = {json.dumps(reference)}"
    filled = 0
    for cell in content["cells"]:
        source, count = _FORM.subn(lambda _: line, "".join(cell["source"]))
        if cell["cell_type"] == "code" and count:
            cell["source"] = source.splitlines(keepends=True)
            filled += count
    if filled != 1:
        raise ConfigError(f"{path.name} has {filled} fields for the model.", "Expected exactly one.")
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def prefilled_notebook(notebook: str, reference: str, directory: Path | str = ".") -> NotebookLink:
    """Write a copy of a notebook with a model in its form; nothing is sent anywhere.

    Args:
        notebook: ``"template"`` or ``"training"``.
        reference: The model; empty leaves the form empty, and a path becomes absolute, since the copy may move.
        directory: Where the copy goes; a notebook of this project is never overwritten.

    Raises:
        ConfigError: See `filled_notebook`; or the directory holds the notebook itself or is none.
    """
    folder = Path(directory).expanduser()
    named = _anywhere(reference)
    text = filled_notebook(notebook, named)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder.", "Expected an existing one.", "Make it first.")
    path = _free(folder / f"{notebook}-{_slug(reference)}.ipynb", text)
    write_atomic(path, text)
    steps = ["Open the copy: on Drive by double-click, in Colab with File > Upload notebook, or locally with Jupyter."]
    return NotebookLink(named, str(path), "", False, tuple(steps + _unstamped()))


def model_link(
    reference: str,
    notebook: str = "template",
    directory: Path | str = ".",
    publish: bool = False,
    replace: bool = False,
    client: GitHubClient | None = None,
) -> NotebookLink:
    """Make the link that opens a notebook with a model already filled in.

    Args:
        reference: The model; a link needs one that lives in a Gist, anything else gets the copy alone.
        notebook: ``"template"`` or ``"training"``.
        directory: Where the copy is written.
        publish: Whether to add the copy to the Gist, which needs ``GITHUB_TOKEN`` with the scope ``gist``.
        replace: Whether a notebook of that name in the Gist may be replaced.
        client: Connection to GitHub's API.

    Raises:
        ModelReferenceError: The reference cannot be understood, or is a path where nothing is.
        ConfigError: See `prefilled_notebook`; or publishing something that is no Gist, or over what is there.
        FetchError: The Gist does not exist, or cannot be changed.
    """
    parsed = parse_reference(reference)
    if parsed.kind == "path" and not Path(parsed.target).expanduser().exists():
        raise ModelReferenceError(
            f"There is no file or folder {parsed.text}.",
            "Expected a model that the notebook can load.",
            "Correct the path, or run the command where the model is.",
        )
    if parsed.kind != "gist":
        if publish:
            raise ConfigError(
                f"{parsed.text} is not a Gist.",
                "Only a Gist can hold the notebook that is the link.",
                "Leave out --publish to get the copy alone.",
            )
        return prefilled_notebook(notebook, parsed.text, directory)
    client = client or GitHubClient()
    what = f"The Gist {parsed.target}"
    answer = client.get_json(f"/gists/{quote(parsed.target, safe='')}", what)
    owner = answer.get("owner") if isinstance(answer, dict) else None
    login = owner.get("login") if isinstance(owner, dict) else None
    if not isinstance(login, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", login):
        raise FetchError(
            f"{what} has no owner.", "Colab opens Gists by their owner and id.", "Make the Gist while signed in."
        )
    written = prefilled_notebook(notebook, parsed.text, directory)
    name = f"{notebook}.ipynb"
    address = f"https://colab.research.google.com/gist/{login}/{parsed.target}/{name}"
    if publish:
        present = answer.get("files")
        if isinstance(present, dict) and name in present and not replace:
            raise ConfigError(
                f"{what} already holds {name}.",
                "What is there is not overwritten unasked.",
                "Run again with --replace, or remove it from the Gist first.",
            )
        content = Path(written.path).read_text(encoding="utf-8")
        path = f"/gists/{quote(parsed.target, safe='')}"
        client.patch_json(path, {"files": {name: {"content": content}}}, what)
        steps = ["The notebook is in the Gist: whoever opens the link finds the model filled in."]
    else:
        steps = [
            f"Add the copy to {parsed.text} as {name} (Edit > Add file, or run again with --publish): "
            "then the link opens it."
        ]
    return NotebookLink(parsed.text, written.path, address, publish, tuple(steps + _unstamped()))


def _anywhere(reference: str) -> str:
    """Return a reference that means the same in any folder; what is no reference yet stays as it is."""
    try:
        parsed = parse_reference(reference)
    except ModelReferenceError:
        return reference
    return str(Path(parsed.target).expanduser().absolute()) if parsed.kind == "path" else reference


def _free(path: Path, text: str) -> Path:
    """Return a path that is not taken by another text: what somebody has worked on is never overwritten."""
    number, free = 1, path
    while free.exists() and free.read_text(encoding="utf-8", errors="replace") != text:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _slug(reference: str) -> str:
    """Return a reference as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", reference.removeprefix("https://")).strip("-")[:60] or "model"


def _unstamped() -> list[str]:
    """Return the warning that a notebook cannot fetch the code of a repository without an address."""
    if REPOSITORY:
        return []
    return [
        "This copy of Seedbed has no repository address yet, so the notebook runs only beside the code: "
        "make colab-links REPO=owner/name, then run again."
    ]
