"""Tokenizers that exist already: the one beside the model, or a public one for the same vocabulary.

A public tokenizer is asked for only when the model's vocabulary has the size of a well-known one, and only after one
short look whether the Hub can be reached: its client would otherwise try for half a minute.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from utils.loading import LoadedModel
from utils.runtime.optional import require
from utils.runtime.secrets import find_secret

FILE = "tokenizer.json"
PUBLIC = {
    28996: "google-bert/bert-base-cased",
    30522: "google-bert/bert-base-uncased",
    32128: "google-t5/t5-small",
    49152: "HuggingFaceTB/SmolLM2-135M",
    50257: "openai-community/gpt2",
    50265: "FacebookAI/roberta-base",
    50304: "openai-community/gpt2",
    151936: "Qwen/Qwen2.5-0.5B",
}
"""Public tokenizers by the vocabulary size of the models that use them, on the Hub."""
REACH_SECONDS = 3.0


@dataclass(frozen=True)
class Candidate:
    """A tokenizer that may fit, or why there is none."""

    content: str | None
    """The text of its tokenizer.json; None where it cannot be had."""
    origin: str
    """Where it is from, or why it cannot be had, in words."""


def own_tokenizer(origin: Any) -> Candidate | None:
    """Return the tokenizer that came with a model, if it has one.

    Args:
        origin: What the adapter was made from; only a loaded model can have files beside it.
    """
    if not isinstance(origin, LoadedModel):
        return None
    if FILE in origin.files:
        return Candidate(origin.files[FILE], f"the model's own {FILE}")
    if origin.kind == "path":
        path = Path(origin.reference).expanduser()
        path = (path if path.is_dir() else path.parent) / FILE
        if path.is_file():
            return _read(path, f"the model's own {FILE}")
    if origin.kind == "hub":
        name = origin.reference.removeprefix("hub:")
        if (folder := Path(name).expanduser()).is_dir():
            return _read(folder / FILE, f"the model's own {FILE}") if (folder / FILE).is_file() else None
        return from_hub(name, origin.revision)
    return None


def public_tokenizer(vocab_size: int) -> Candidate | None:
    """Return the public tokenizer for a vocabulary of this size, or None when no well-known one has it."""
    name = PUBLIC.get(vocab_size)
    return None if name is None else from_hub(name)


def from_hub(name: str, revision: str | None = None) -> Candidate:
    """Fetch a model's tokenizer.json from the Hub, or from the copy that an earlier fetch left.

    Args:
        name: Hub name, ``owner/name``.
        revision: Branch, tag or commit id.
    """
    hub = require("huggingface_hub", "fetch a tokenizer", "huggingface_hub")
    try:
        return _read(Path(hub.hf_hub_download(name, FILE, revision=revision, local_files_only=True)), f"hub:{name}")
    except (OSError, ValueError):
        pass
    if reason := hub_unreachable():
        return Candidate(None, f"the tokenizer of hub:{name} cannot be fetched ({reason})")
    try:
        token = find_secret("HF_TOKEN").value
        path = hub.hf_hub_download(name, FILE, revision=revision, token=token, etag_timeout=REACH_SECONDS)
    except (OSError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Candidate(None, f"the tokenizer of hub:{name} cannot be fetched ({text[:120]})")
    return _read(Path(path), f"hub:{name}")


def hub_unreachable() -> str | None:
    """Return why the Hub cannot be reached, or None when it answers."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    if address.scheme in getproxies() and not proxy_bypass(address.hostname or ""):
        # Whether the Hub answers behind a proxy only its client can tell.
        return None
    try:
        socket.create_connection((address.hostname or "", port), REACH_SECONDS).close()
    except OSError as error:
        return f"{address.hostname} does not answer: {error.strerror or error}"
    return None


def _read(path: Path, origin: str) -> Candidate:
    try:
        return Candidate(path.read_text(encoding="utf-8"), origin)
    except (OSError, UnicodeDecodeError) as error:
        return Candidate(None, f"{origin} cannot be read ({error})")
