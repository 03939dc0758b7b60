"""Send a bundle to the Hugging Face Hub: first a dry run that shows what would be sent, then the real thing.

Only the files that the bundle's manifest lists are sent, and only if they are as they were made; the model card may be
edited, because the licence and the words about the model are its owner's. The token is never shown and never written.
"""

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.runtime.errors import ConfigError, ExportError
from utils.runtime.files import sha256_file
from utils.runtime.optional import require
from utils.runtime.resources import format_bytes
from utils.runtime.secrets import find_secret
from utils.training.bundle import CARD, MANIFEST, Bundle, read_manifest

TOKEN = "HF_TOKEN"
READABLE = 1 << 22
"""Files up to this size are searched for the token before anything is sent."""


@dataclass(frozen=True)
class Publication:
    """What was sent, or would be."""

    repo_id: str
    """``owner/name`` on the Hub."""
    endpoint: str
    """Address of the Hub."""
    private: bool
    """Whether a repository that is new is private."""
    files: tuple[tuple[str, int], ...]
    """Names and sizes."""
    left_out: tuple[str, ...]
    """Files in the folder that are not the bundle's and stay where they are."""
    notes: tuple[str, ...]
    """What the owner should look at."""
    sent: bool
    """False for a dry run."""
    url: str = ""
    """The commit; empty for a dry run."""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size in self.files)

    def text(self) -> str:
        """Return what was or would be sent, for a terminal."""
        verb = "Sent" if self.sent else "Would send"
        kind = "private" if self.private else "public"
        lines = [
            f"{verb} {len(self.files)} files, {format_bytes(self.bytes)}, to {self.endpoint}/{self.repo_id} "
            f"({kind} if it is new)"
        ]
        lines += [f"{format_bytes(size):>10}  {name}" for name, size in self.files]
        if self.left_out:
            lines.append(f"Not of the bundle and not sent: {', '.join(self.left_out)}")
        lines += self.notes
        lines.append(f"Commit: {self.url}" if self.sent else "Nothing was sent. Send it with dry_run=False.")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return the text."""
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**vars(self), "files": [list(file) for file in self.files], "bytes": self.bytes}

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        return f"<pre>{html.escape(self.text())}</pre>"


def publish(
    bundle: Bundle | str | Path,
    repo_id: str,
    dry_run: bool = True,
    *,
    private: bool = True,
    token: str | None = None,
    message: str = "Upload a model with Seedbed",
) -> Publication:
    """Upload a bundle to the Hugging Face Hub, or show what an upload would send.

    Args:
        bundle: What `utils.bundle` returned, or its folder.
        repo_id: ``owner/name``; made when it does not exist.
        dry_run: Only show what would be sent; needs no token and no network.
        private: Make a new repository private.
        token: A token that may write; None takes the secret ``HF_TOKEN``, then the one of ``hf auth login``.
        message: Message of the commit.

    Raises:
        ConfigError: `repo_id` is no name of a repository.
        ExportError: The folder is no bundle or was changed, there is no token, or the Hub refused.
    """
    hub = require("huggingface_hub", "publish a model")
    # The package loads its submodules when they are asked for by import only.
    tools = require("huggingface_hub.utils", "publish a model")
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    try:
        tools.validate_repo_id(repo_id)
        if str(repo_id).count("/") != 1:
            raise ValueError("there is no owner in it")
    except ValueError as error:
        raise ConfigError(
            f"repo_id is {repo_id!r}: {error}.", "Expected owner/name, of letters, digits, '-', '_' and '.'."
        ) from None
    directory = bundle.directory if isinstance(bundle, Bundle) else Path(bundle)
    paths, notes = _verified(directory)
    listed = {name for name, _ in paths}
    others = sorted(
        name
        for path in directory.rglob("*")
        if path.is_file() and (name := path.relative_to(directory).as_posix()) not in listed
    )
    made = Publication(
        repo_id, endpoint, private, tuple((name, path.stat().st_size) for name, path in paths), tuple(others),
        tuple(notes), sent=False,
    )  # fmt: skip
    if dry_run:
        return made
    secret = token or find_secret(TOKEN).value or hub.get_token()
    if not secret:
        raise ExportError(
            "There is no token for the Hugging Face Hub.",
            f"Expected the secret {TOKEN}, or a login.",
            "Make a token that may write at huggingface.co/settings/tokens, and store it as a secret of that name.",
        )
    _refuse_leak(paths, secret)
    url = _send(hub, endpoint, secret, repo_id, private, paths, message)
    return Publication(**{**vars(made), "sent": True, "url": url})


def _verified(directory: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return the files of a bundle with their paths, and what to tell about them.

    Raises:
        ExportError: A file is missing, changed or outside the folder.
    """
    manifest = read_manifest(directory)
    paths, notes = [], []
    for entry in manifest["files"]:
        name, path = str(entry["name"]), directory / str(entry["name"])
        if not path.is_file() or not path.resolve().is_relative_to(directory.resolve()):
            raise ExportError(
                f"{name} is not in the bundle {directory}.", f"{MANIFEST} lists it.", "Make the bundle again."
            )
        if sha256_file(path) != entry["sha256"]:
            if name != CARD:
                raise ExportError(
                    f"{name} is not as the bundle was made (SHA-256 differs).",
                    f"Expected what was checked; only {CARD} may be edited.",
                    "Make the bundle again.",
                )
            notes.append(f"{CARD} was edited since the bundle was made.")
        paths.append((name, path))
    card = next((path for name, path in paths if name == CARD), None)
    if card is not None and "\nlicense:" not in card.read_text(encoding="utf-8").split("\n---", 1)[0]:
        notes.append(f"{CARD} names no licence; without one nobody may use the model.")
    return [*paths, (MANIFEST, directory / MANIFEST)], notes


def _refuse_leak(paths: list[tuple[str, Path]], secret: str) -> None:
    """Make sure that the token is in none of the smaller files.

    Raises:
        ExportError: It is.
    """
    for name, path in paths:
        if path.stat().st_size <= READABLE and secret.encode() in path.read_bytes():
            raise ExportError(
                f"{name} holds the token that would be used to send it.",
                "Expected files without secrets.",
                "Take it out, and make a new token: this one may have been seen.",
            )


def _send(
    hub: Any, endpoint: str, secret: str, repo_id: str, private: bool, paths: list[tuple[str, Path]], message: str
) -> str:
    """Make the repository if it is not there, and add the files in one commit; return the commit's address."""
    tools = require("huggingface_hub.utils", "publish a model")
    silent = tools.are_progress_bars_disabled()
    tools.disable_progress_bars()
    try:
        api = hub.HfApi(endpoint=endpoint, token=secret)
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd(name, str(path)) for name, path in paths]
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)
    except Exception as error:
        words = " ".join(str(error).replace(secret, "***").split())
        # Without the original's chain: its request carries the token in a header.
        raise ExportError(
            f"{endpoint} did not take the bundle ({type(error).__name__}: {words[:300]}).",
            f"Expected a Hub that can be reached, and a token that may write to {repo_id}.",
            "Check both and publish again; files that arrived are not sent twice.",
        ) from None
    finally:
        if not silent:
            tools.enable_progress_bars()
