"""A server on loopback that answers as GitHub does, and small model sources."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

GIST = "0123456789abcdef0123456789abcdef"
TINY = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, vocab_size=16, d_model=8):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))
"""


class GitHub:
    """What the server answers, by path; every request is kept."""

    identifier = GIST
    tiny = TINY

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.changes: list[tuple[str, Any]] = []
        self.sent = 0
        self.url = ""

    @staticmethod
    def slow(handler: Any) -> None:
        """Answer one byte at a time, for longer than any test waits."""
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(20):
                handler.wfile.write(b" ")
                time.sleep(0.1)
        except OSError:
            pass

    def gist(self, files: dict[str, Any], identifier: str = GIST, revision: str | None = None) -> None:
        """Publish a Gist; a file is its text or the fields of its entry."""
        entries = {}
        for name, value in files.items():
            entry = {"content": value, "size": len(value)} if isinstance(value, str) else value
            raw = f"{self.url}/user/{identifier}/raw/{name}"
            entries[name] = {"filename": name, "type": "text/plain", "raw_url": raw, "truncated": False} | entry
        body = {"id": identifier, "files": entries, "truncated": False, "history": [{"version": "c" * 40}]}
        self.answers[f"/gists/{identifier}" + (f"/{revision}" if revision else "")] = body


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    """Serve a `GitHub` on loopback and make it the API base."""
    state = GitHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers)))
            answer = state.answers.get(self.path, (404, {}, b'{"message": "Not Found"}'))
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            if callable(answer):
                answer = answer(self)
                if answer is None:
                    return
            if not isinstance(answer, tuple):
                answer = (200, {}, answer)
            status, headers, body = answer
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                if value is not None:
                    self.send_header(key, value)
            self.end_headers()
            try:
                for start in range(0, len(data), 1 << 16):
                    self.wfile.write(data[start : start + (1 << 16)])
                    state.sent += 1 << 16
            except OSError:
                pass

        def do_PATCH(self) -> None:
            size = int(self.headers.get("Content-Length", "0"))
            state.changes.append((self.path, json.loads(self.rfile.read(size))))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("SEEDBED_GITHUB_API", state.url)
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    monkeypatch.setattr("utils.loading.github_api._FIRST_DELAY", 0.001)
    yield state
    server.shutdown()
    server.server_close()
