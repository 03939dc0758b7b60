"""Understand what the user pasted: a Gist, a link, a path, a Hub name or an example. Nothing is opened here."""

import difflib
import os
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

from utils.runtime.errors import ModelReferenceError

Kind = Literal["gist", "github", "path", "hub", "example"]

EXPECTED = "Expected a Gist id or link, a GitHub link, the path of a file or folder, hub:owner/name or example:NAME."
# 32 hexadecimal digits today, 20 some years ago, a plain number before that.
_GIST_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{20}|[0-9]{1,10}")
_REVISION = re.compile(r"[0-9a-f]{7,64}")
# What Git allows in the name of a branch or tag, less what has a meaning in an address.
_REF = re.compile(r"(?!.*(?:\.\.|//|@\{|/\.))[A-Za-z0-9_][A-Za-z0-9._/+@-]{0,199}")
_OWNER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]+")
_HOSTS = (
    "gist.github.com",
    "gist.githubusercontent.com",
    "api.github.com",
    "github.com",
    "raw.githubusercontent.com",
    "colab.research.google.com",
    "huggingface.co",
)


@dataclass(frozen=True)
class Reference:
    """A reference that was understood."""

    kind: Kind
    """Where the model comes from."""
    target: str
    """Gist id, ``owner/name``, path or example name."""
    revision: str | None = None
    """The pinned version, when the reference names one."""
    path: str = ""
    """File or folder inside a GitHub repository; empty for its root."""

    @property
    def text(self) -> str:
        """The reference in its shortest form, without query, which could carry an access token."""
        if self.kind == "gist":
            return f"https://gist.github.com/{self.target}"
        if self.kind == "github":
            tail = f"/tree/{self.revision or 'HEAD'}/{self.path}" if self.path or self.revision else ""
            return f"https://github.com/{self.target}{tail}".rstrip("/")
        return f"{self.kind}:{self.target}" if self.kind in ("hub", "example") else self.target


def _shown(text: str) -> str:
    # A query may carry the access token of a private file, user information a password.
    text = re.sub(r"//[^/@]*@", "//", text.split("?")[0])
    return repr(text if len(text) <= 120 else text[:117] + "...")


def _refuse(text: str, reason: str, action: str = "") -> ModelReferenceError:
    return ModelReferenceError(f"The reference {_shown(text)} {reason}.", EXPECTED, action)


def _gist(text: str, identifier: str, revision: str | None = None) -> Reference:
    identifier = identifier.removesuffix(".git").lower()
    if not _GIST_ID.fullmatch(identifier):
        raise _refuse(
            text,
            f"names the Gist id {_shown(identifier)}, which is not an id",
            "A Gist id has 32 (older ones 20) hexadecimal digits: copy the whole address of the Gist's page.",
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise _refuse(text, f"names the revision {_shown(revision)}, which is not a hexadecimal commit id")
    return Reference("gist", identifier, revision)


def _repository(text: str, owner: str, name: str, revision: str | None, parts: list[str]) -> Reference:
    name = name.removesuffix(".git")
    if not _OWNER.fullmatch(owner) or not _NAME.fullmatch(name):
        raise _refuse(text, "is not the address of a repository")
    if any(part in (".", "..") or "\\" in part for part in parts):
        raise _refuse(text, "has a path with '..', '.' or a backslash in it")
    if revision is not None:
        check_revision(revision, "github")
    return Reference("github", f"{owner}/{name}", revision, "/".join(parts))


def check_revision(revision: str, kind: Kind) -> str:
    """Return a revision in the form it is asked for, or say why it cannot be one.

    Args:
        revision: Commit id of a Gist; branch, tag or commit id of a GitHub or Hub repository.
        kind: Where the model comes from.

    Raises:
        ModelReferenceError: It is no revision; nothing has been sent.
    """
    revision = revision.strip() if isinstance(revision, str) else revision
    if kind == "gist":
        if not isinstance(revision, str) or not _REVISION.fullmatch(revision.lower()):
            raise ModelReferenceError(
                f"The revision {_shown(str(revision))} is not a commit id.",
                "Expected 7 to 64 hexadecimal digits.",
                "Copy the id from the address of the Gist's page under Revisions, or leave it out.",
            )
        return revision.lower()
    if not isinstance(revision, str) or not _REF.fullmatch(revision) or revision.endswith(("/", ".", ".lock")):
        raise ModelReferenceError(
            f"The revision {_shown(str(revision))} is not the name of a branch or tag, and no commit id.",
            "Expected letters, digits and . _ / + @ -, without '..'.",
            "Copy the name from the repository's page, or leave it out.",
        )
    return revision


def _gist_page(text: str, parts: list[str]) -> Reference:
    """Parse ``[user/]id[/revision | /raw[/revision][/file]]``."""
    if not parts:
        raise _refuse(text, "has no Gist id", "Open the Gist and copy the address of its page.")
    # Very old ids are plain numbers, and so are some user names: with two parts the second is the id if it can be.
    has_user = len(parts) > 1 and _GIST_ID.fullmatch(parts[1].removesuffix(".git").lower()) is not None
    if not has_user and not _GIST_ID.fullmatch(parts[0].removesuffix(".git").lower()):
        bad = parts[1] if len(parts) > 1 else ""
        if not bad:
            raise _refuse(text, "has a user but no Gist id", "Open the Gist itself and copy the address of its page.")
        return _gist(text, bad)
    identifier, rest = (parts[1], parts[2:]) if has_user else (parts[0], parts[1:])
    if rest and rest[0] == "raw":
        revision = rest[1] if len(rest) > 1 and re.fullmatch(r"[0-9a-f]{40}", rest[1]) else None
        return _gist(text, identifier, revision)
    revision = next((part for part in rest[:1] if _REVISION.fullmatch(part)), None)
    return _gist(text, identifier, revision)


def _github_page(text: str, parts: list[str]) -> Reference:
    if len(parts) < 2:
        raise _refuse(text, "names no repository", "Copy the address of the file or folder that holds model.py.")
    owner, name, *rest = parts
    if not rest:
        return _repository(text, owner, name, None, [])
    if rest[0] in ("blob", "tree", "raw") and len(rest) > 1:
        return _repository(text, owner, name, rest[1], rest[2:])
    raise _refuse(
        text,
        f"is a GitHub page of the kind {_shown(rest[0])}, not a file or folder",
        "Copy an address with /blob/ or /tree/ in it.",
    )


def _url(text: str) -> Reference:
    try:
        split = urlsplit(text if "://" in text else "https://" + text.removeprefix("//"))
        host = (split.hostname or "").removeprefix("www.")
    except ValueError:
        raise _refuse(text, "is not a valid address") from None
    if split.scheme not in ("http", "https"):
        raise _refuse(text, f"has the scheme {split.scheme!r}, not https")
    parts = [unquote(part) for part in split.path.split("/") if part]
    if any(not part.isprintable() for part in parts):
        raise _refuse(text, "contains control characters")
    if host in ("gist.github.com", "gist.githubusercontent.com"):
        return _gist_page(text, parts)
    if host == "api.github.com" and len(parts) > 1 and parts[0] == "gists":
        return _gist(text, parts[1], parts[2] if len(parts) > 2 else None)
    if host == "github.com":
        return _github_page(text, parts)
    if host == "raw.githubusercontent.com" and len(parts) > 3:
        rest = parts[4:] if parts[2:4] == ["refs", "heads"] else parts[2:]
        if rest:
            return _repository(text, parts[0], parts[1], rest[0], rest[1:])
    if host == "colab.research.google.com":
        if parts[:1] == ["gist"]:
            return _gist_page(text, parts[1:])
        if parts[:1] == ["github"]:
            return _github_page(text, parts[1:])
        raise _refuse(
            text,
            "is a Colab page that does not lead to a model's source",
            "Colab links of the form .../gist/USER/ID and .../github/OWNER/NAME/blob/... can be read.",
        )
    if host == "huggingface.co" and len(parts) > 1:
        revision = parts[3] if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve") else None
        return _hub(text, "/".join(parts[:2]), revision)
    raise _refuse(text, f"leads to {host or 'no host'}, which is not a place Seedbed can load a model from")


def _hub(text: str, name: str, revision: str | None = None) -> Reference:
    name, separator, pinned = name.partition("@")
    parts = name.split("/")
    if len(parts) > 2 or not all(_NAME.fullmatch(part) for part in parts) or (separator and not pinned):
        raise _refuse(text, "is not a Hub name", "Write hub:owner/name, or hub:owner/name@revision.")
    return Reference("hub", name, pinned or revision)


def _meant(prefix: str) -> str | None:
    """Return the place whose name was misspelt, if any; a drive's letter and an address's scheme are none."""
    if not re.fullmatch(r"[A-Za-z]{3,12}", prefix) or prefix.lower() in ("http", "https", "ssh", "git"):
        return None
    return next(iter(difflib.get_close_matches(prefix.lower(), ("hub", "example", "gist"), 1, 0.7)), None)


def parse_reference(text: str) -> Reference:
    """Parse what a user pastes to say which model is meant.

    Args:
        text: Gist id, link to a Gist (page, revision, raw file, Colab), link to a GitHub file or folder, path of a
            file or folder, ``hub:owner/name[@revision]`` or ``example:NAME``. Blanks, quotes and angle brackets
            around it are ignored.

    Raises:
        ModelReferenceError: The text is none of these; the message says what it looks like and what to paste.
    """
    text = text.strip().strip("<>\"'`").strip()
    if not text:
        raise ModelReferenceError("The reference is empty.", EXPECTED, "For a first try use example:gpt.")
    if not text.isprintable():
        raise _refuse(text, "contains line breaks or control characters")
    prefix, separator, rest = text.partition(":")
    if separator and prefix in ("hub", "example", "gist"):
        rest = rest.strip()
        if prefix == "hub":
            return _hub(text, rest)
        if prefix == "gist":
            return _gist_page(text, rest.strip("/").split("/")) if rest.strip("/") else _gist(text, "")
        if not _NAME.fullmatch(rest):
            raise _refuse(text, "does not name an example")
        return Reference("example", rest)
    if separator and rest and (meant := _meant(prefix)):
        raise _refuse(text, f"begins with {prefix!r}, which is no place", f"Did you mean {meant}:{rest}?")
    if "://" in text or text.startswith("//"):
        return _url(text)
    if text.removeprefix("www.").split("/")[0].split("?")[0].lower() in _HOSTS:
        return _url(text)
    if text[0] in "#?&" or re.match(r"\w+=", text):
        raise _refuse(text, "is only a piece of an address", "Paste the whole address.")
    if text.startswith(("http:", "https:", "git@", "ssh:")):
        raise _refuse(text, "is not a complete https address")
    if _GIST_ID.fullmatch(text.lower()):
        return _gist(text, text)
    owner, _, identifier = text.partition("/")
    if _OWNER.fullmatch(owner) and re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{20}", identifier):
        return _gist(text, identifier)
    if re.fullmatch(r"[0-9a-f]{16,}", text):
        raise _refuse(
            text, f"looks like a Gist id but has {len(text)} hexadecimal digits instead of 32", "Copy it again."
        )
    return Reference("path", os.path.expanduser(text))
