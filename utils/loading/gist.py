"""Fetch a model from a Gist through GitHub's API."""

from typing import Any
from urllib.parse import quote

from utils.loading.github_api import GitHubClient
from utils.loading.source import MODEL_FILE, Source, collect, decode
from utils.runtime.errors import FetchError


def fetch_gist(identifier: str, revision: str | None, client: GitHubClient) -> Source:
    """Fetch ``model.py``, the files it imports and ``config.json`` of a Gist.

    Files that the API cut short are fetched whole through their ``raw_url``; other files are not downloaded.

    Args:
        identifier: The Gist's id.
        revision: Commit id to pin, or None for the newest.
        client: Connection to the API.

    Returns:
        The files, with the revision they belong to.

    Raises:
        FetchError: The Gist cannot be fetched.
        ModelReferenceError: It was fetched and is no model.
    """
    what = f"The Gist {identifier}" + (f" at revision {revision}" if revision else "")
    answer = client.get_json(
        f"/gists/{quote(identifier, safe='')}" + (f"/{quote(revision, safe='')}" if revision else ""), what
    )
    entries = answer.get("files") if isinstance(answer, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise FetchError(
            f"{what}: the answer has no list of files.",
            "Expected the answer of GitHub's Gist API.",
            f"Check the API base {client.api}.",
        )
    files: dict[str, dict[str, Any]] = {str(name): entry for name, entry in entries.items()}

    def read(name: str) -> str:
        entry = files[name]
        label = f"{name} of the Gist {identifier}"
        content, size = entry.get("content"), entry.get("size")
        if isinstance(size, int) and size > client.max_bytes:
            raise client.refuse_size(label, size)
        if not entry.get("truncated") and isinstance(content, str):
            return content.removeprefix("\ufeff")
        raw_url = entry.get("raw_url")
        if not isinstance(raw_url, str):
            raise FetchError(
                f"{label} was cut short by the API and has no raw_url.", "Expected the whole text or its address."
            )
        return decode(client.get(raw_url, label, accept="*/*"), label)

    if answer.get("truncated") and MODEL_FILE not in files:
        raise FetchError(
            f"{what} has more files than the API lists, and {MODEL_FILE} is not among those listed.",
            "Expected a Gist with few files.",
            "Put model.py and config.json into a Gist of their own.",
        )
    source = collect(read, files, what)
    return Source(source, revision or _newest(answer))


def _newest(answer: dict[str, Any]) -> str | None:
    history = answer.get("history")
    first = history[0] if isinstance(history, list) and history else None
    version = first.get("version") if isinstance(first, dict) else None
    return version if isinstance(version, str) else None
