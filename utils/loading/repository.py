"""Fetch a model from a file or folder of a GitHub repository through the contents API."""

import re
from urllib.parse import quote

from utils.loading.github_api import GitHubClient
from utils.loading.source import MODEL_FILE, Source, collect, decode
from utils.runtime.errors import FetchError, ModelReferenceError


def fetch_repository(name: str, path: str, revision: str | None, client: GitHubClient) -> Source:
    """Fetch a model's source from GitHub, pinned to the commit that the branch or tag points to now.

    Args:
        name: ``owner/name``.
        path: Folder with ``model.py``, or a ``.py`` file; empty for the repository's root.
        revision: Branch (without a slash), tag or commit id; None for the default branch.
        client: Connection to the API.

    Raises:
        FetchError: The repository, the revision or the path cannot be fetched.
        ModelReferenceError: It was fetched and is no model.
    """
    what = f"The repository {name} at {revision or 'its default branch'}"
    commit = client.get(
        f"{client.api}/repos/{name}/commits/{quote(revision or 'HEAD', safe='')}", what, "application/vnd.github.sha"
    )
    sha = commit.decode("ascii", "replace").strip()
    if not re.fullmatch(r"[0-9a-f]{40,64}", sha):
        raise FetchError(f"{what}: the answer is not a commit id.", "Expected the answer of GitHub's API.")
    folder, entry = path, MODEL_FILE
    if path.endswith(".py"):
        folder, _, entry = path.rpartition("/")
    elif path.rpartition("/")[2].count(".") and path.endswith((".ipynb", ".json", ".md", ".txt", ".yaml")):
        raise ModelReferenceError(
            f"The link leads to {path}, which is not Python source.",
            "Expected a link to a .py file, or to a folder with model.py.",
            "Copy the address of the folder that holds model.py.",
        )
    where = f"The folder {folder or '/'} of {name}"

    def address(item: str) -> str:
        return f"/repos/{name}/contents/{quote(item)}?ref={sha}".replace("/contents/?", "/contents?")

    listing = client.get_json(address(folder), where)
    if not isinstance(listing, list):
        raise ModelReferenceError(f"{where} is not a folder.", "Expected a .py file, or a folder with model.py.")
    sizes = {
        str(item["name"]): item.get("size")
        for item in listing
        if isinstance(item, dict) and item.get("type") == "file" and "name" in item
    }

    def read(item: str) -> str:
        label, size = f"{item} of {name}", sizes[item]
        if isinstance(size, int) and size > client.max_bytes:
            raise client.refuse_size(label, size)
        url = client.api + address(f"{folder}/{item}".lstrip("/"))
        return decode(client.get(url, label, "application/vnd.github.raw+json"), label)

    return Source(collect(read, sizes, where, entry), sha, entry)
