"""A small client for GitHub's API: time-outs, retries, a size cap, and answers turned into advice.

The access token goes to the API's own origin and nowhere else: not to raw files on another host, not through a
redirect. Only http and https are spoken, so no answer can make the client read a local file.
"""

import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, Any
from urllib.parse import urlsplit

from utils.loading.source import DEFAULT_MAX_BYTES
from utils.runtime.errors import FetchError
from utils.runtime.resources import format_bytes
from utils.runtime.secrets import find_secret

DEFAULT_API = "https://api.github.com"
DEFAULT_TIMEOUT = 15.0
DEFAULT_DEADLINE = 30.0
HEADERS = {
    "Accept": "application/vnd.github+json",
    "User-Agent": "seedbed",
    "X-GitHub-Api-Version": "2022-11-28",
}
_ATTEMPTS = 4
_FIRST_DELAY = 0.5


def _origin(url: str) -> tuple[str, str, int | None]:
    split = urlsplit(url)
    return split.scheme, split.hostname or "", split.port or {"http": 80, "https": 443}.get(split.scheme)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token is sent again only where the origin stays the same."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if _origin(req.full_url)[0] == "https" and _origin(newurl)[0] != "https":
            raise urllib.error.URLError("redirected from https to an address without encryption")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if request is not None and token and _origin(req.full_url) == _origin(newurl):
            request.add_unredirected_header("Authorization", token)
        return request


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _RedirectHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _Retry(Exception):
    """A failure that may pass; carries what was found, and what to do when it does not pass."""

    def __init__(self, found: str, action: str) -> None:
        self.found, self.action = found, action
        super().__init__(found)


class GitHubClient:
    """Fetches from one API base; all its downloads together stay under one size cap."""

    def __init__(
        self,
        api: str | None = None,
        token: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_bytes: int = DEFAULT_MAX_BYTES,
        sleep: Callable[[float], None] = time.sleep,
        deadline: float | None = None,
    ) -> None:
        """Set up a client; nothing is sent yet.

        Args:
            api: Base address of the API. Default: the environment's ``SEEDBED_GITHUB_API``, else GitHub's own.
            token: Access token. Default: ``GITHUB_TOKEN`` from Colab's secrets, else from the environment, else none.
            timeout: Seconds that one attempt may take in total.
            max_bytes: Most bytes that all answers together may have.
            sleep: Waits between attempts.
            deadline: Seconds that all attempts for one address may take together. Default: 30, or `timeout` if larger.
        """
        self.api = (api or os.environ.get("SEEDBED_GITHUB_API") or DEFAULT_API).rstrip("/")
        if _origin(self.api)[0] not in ("http", "https") or not _origin(self.api)[1]:
            raise FetchError(f"The API base {self.api!r} is not an address.", f"Expected something like {DEFAULT_API}.")
        token = (token if token is not None else find_secret("GITHUB_TOKEN").value or "").strip()
        if re.search(r"[^\x21-\x7e]", token):
            raise FetchError(
                "The GitHub token contains blanks or other characters that no token has.",
                "Expected one word of letters, digits and underscores.",
                "Copy it again, or unset GITHUB_TOKEN to go without.",
            )
        self._token = token
        self.timeout, self.max_bytes, self._sleep = timeout, max_bytes, sleep
        self.deadline = max(DEFAULT_DEADLINE, timeout) if deadline is None else deadline
        self.received = 0
        self._open = _opener()

    def get_json(self, path: str, what: str) -> Any:
        """Fetch an API answer as JSON. `what` names the thing in errors, such as ``"The Gist 1234"``."""
        data = self.get(self.api + path, what)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise FetchError(
                f"{what}: the answer of {urlsplit(self.api).netloc} is not JSON.",
                "Expected the answer of GitHub's API.",
                "A proxy or a sign-in page may stand in between: open the API's address in a browser to see.",
            ) from None

    def patch_json(self, path: str, payload: Any, what: str) -> Any:
        """Change something through the API, in one attempt: what was sent twice could be changed twice.

        Raises:
            FetchError: There is no token, it lacks the right, or the change did not succeed.
        """
        if not self._token:
            raise FetchError(
                f"{what} cannot be changed: there is no access token.",
                "Expected GITHUB_TOKEN with the right to write Gists.",
                "Make one at github.com/settings/tokens with the scope gist, and set it as GITHUB_TOKEN.",
            )
        headers = {**HEADERS, "Content-Type": "application/json"}
        body = json.dumps(payload).encode()
        request = urllib.request.Request(self.api + path, data=body, headers=headers, method="PATCH")
        request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return json.loads(self._within(self.timeout, request, what) or b"null")
        except _Retry as failure:
            action = "Whether it was changed is not known: look at it before trying again."
            raise FetchError(failure.found, action) from None
        except ValueError:
            raise FetchError(f"{what}: the answer is not JSON.", "Look at it before trying again.") from None

    def get(self, url: str, what: str, accept: str = HEADERS["Accept"]) -> bytes:
        """Fetch an address, trying again after connection errors, time-outs and server errors.

        Raises:
            FetchError: Nothing could be fetched; the message says why and what to do.
        """
        if _origin(url)[0] not in ("http", "https") or (_origin(self.api)[0] == "https" and _origin(url)[0] != "https"):
            raise FetchError(
                f"{what}: the answer points to {url[:80]!r}.", "Expected an https address.", "Nothing was loaded."
            )
        headers = {**HEADERS, "Accept": accept}
        end = time.monotonic() + self.deadline
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                request = urllib.request.Request(url, headers=headers)
                if self._token and _origin(url) == _origin(self.api):
                    request.add_unredirected_header("Authorization", f"Bearer {self._token}")
                return self._within(min(self.timeout, end - time.monotonic()), request, what)
            except _Retry as failure:
                pause = _FIRST_DELAY * 2 ** (attempt - 1)
                # Another attempt needs a moment to connect in.
                if attempt == _ATTEMPTS or time.monotonic() + pause + self.timeout / 10 > end:
                    tried = f"Tried {attempt} time{'s' if attempt > 1 else ''}."
                    raise FetchError(failure.found, tried, failure.action) from None
                self._sleep(pause)
        raise AssertionError("unreachable")

    def _within(self, seconds: float, request: urllib.request.Request, what: str) -> bytes:
        """Make one attempt, and give up on it in time even when every byte of the answer is late.

        A socket's own time-out starts again with each byte, so the attempt runs in a thread that can be left.
        """
        answer: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

        def attempt() -> None:
            try:
                answer.put(self._attempt(request, what, seconds))
            except BaseException as error:  # handed to the caller's thread
                answer.put(error)

        threading.Thread(target=attempt, daemon=True, name="seedbed-fetch").start()
        try:
            result = answer.get(timeout=seconds + 0.05)
        except queue.Empty:
            raise self._timed_out(what, urlsplit(request.full_url).netloc, seconds) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def refuse_size(self, what: str, size: int | None) -> FetchError:
        """Return the error for something larger than the cap."""
        found = f"has {format_bytes(size)}" if size else f"is larger than {format_bytes(self.max_bytes)}"
        return FetchError(
            f"{what} {found}.",
            f"At most {format_bytes(self.max_bytes)} are downloaded: it was refused before the download was complete.",
            "Keep weights and data out of it, or pass max_bytes= to allow more.",
        )

    def _attempt(self, request: urllib.request.Request, what: str, seconds: float) -> bytes:
        host = urlsplit(request.full_url).netloc
        deadline = time.monotonic() + seconds
        try:
            with self._open.open(request, timeout=seconds) as response:
                return self._read(response, what, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._explain(error, what, host) from None
        except TimeoutError:
            raise self._timed_out(what, host, seconds) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise self._timed_out(what, host, seconds) from None
            raise _Retry(
                f"{what} cannot be fetched: no connection to {host} ({reason}).",
                "Check the network; a local copy of the files can be loaded by its path.",
            ) from None

    def _read(self, response: Any, what: str, deadline: float) -> bytes:
        declared = response.headers.get("Content-Length")
        size = int(declared) if declared and declared.isdigit() else None
        if size is not None and self.received + size > self.max_bytes:
            raise self.refuse_size(what, size)
        pieces = []
        # read1 returns what has arrived, so that a server which sends drop by drop meets the deadline too.
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            self.received += len(piece)
            if self.received > self.max_bytes:
                raise self.refuse_size(what, None)
            if time.monotonic() > deadline:
                raise TimeoutError
        data = b"".join(pieces)
        if size is not None and len(data) < size:
            raise http.client.IncompleteRead(data, size - len(data))
        return data

    def _timed_out(self, what: str, host: str, seconds: float) -> _Retry:
        return _Retry(
            f"{what} cannot be fetched: {host} did not answer within {max(seconds, 0):.3g} s.",
            "Try again later, or pass a longer timeout=.",
        )

    def _explain(self, error: urllib.error.HTTPError, what: str, host: str) -> Exception:
        """Turn an HTTP error into advice."""
        if error.code >= 500:
            return _Retry(
                f"{what} cannot be fetched: {host} answered with the server error {error.code}.",
                "Try again in a few minutes.",
            )
        if error.code in (403, 429) and (until := self._limited_until(error)) is not None:
            return FetchError(
                f"{what} cannot be fetched: the rate limit of {host} is used up.",
                f"Try again at {until}" + (": the token in use has reached its own limit." if self._token else ""),
                ""
                if self._token
                else "or set GITHUB_TOKEN: without it, all who share this address, as machines on "
                "Colab do, have 60 requests an hour together.",
            )
        if error.code == 404:
            return FetchError(
                f"{what} does not exist or is private (404).",
                "Expected a public or unlisted address.",
                "Check it in a browser where you are signed out"
                + ("; the token in use may lack access to it." if self._token else ", or set GITHUB_TOKEN."),
            )
        if error.code == 401:
            return FetchError(
                f"{what} cannot be fetched: {host} does not accept the token (401).",
                "Expected a valid GITHUB_TOKEN, or none.",
                "The token may have expired: make a new one, or unset GITHUB_TOKEN for public models.",
            )
        if error.code == 403:
            return FetchError(
                f"{what} cannot be fetched: {host} refuses access (403).",
                "Expected an address that may be read.",
                "Check whether the owner or your organisation restricts it, and whether the token has access.",
            )
        return FetchError(
            f"{what} cannot be fetched: {host} answered with the status {error.code}.",
            "Expected the status 200.",
            "Check the reference, and its revision if it has one.",
        )

    @staticmethod
    def _limited_until(error: urllib.error.HTTPError) -> str | None:
        """Return the clock time at which a rate limit ends, or None when the answer is no rate limit."""
        headers = error.headers
        wait, reset = headers.get("Retry-After", ""), headers.get("X-RateLimit-Reset", "")
        if wait.isdigit():
            moment = time.time() + int(wait)
        elif headers.get("X-RateLimit-Remaining") == "0" and reset.isdigit():
            moment = float(reset)
        elif error.code == 429:
            moment = time.time() + 60
        else:
            return None
        try:
            # Rounded up to the full minute, so that the time shown is never too early.
            return time.strftime("%H:%M %Z", time.localtime(moment + 59)).strip()
        except (OverflowError, ValueError, OSError):
            return "a later time"
