"""Fetching, against a real server on loopback."""

import sys
import time
import types
from typing import Any

import pytest

from utils.loading import load_model
from utils.loading.gist import fetch_gist
from utils.loading.github_api import GitHubClient
from utils.runtime.errors import FetchError, ModelReferenceError

GIST = "0123456789abcdef0123456789abcdef"
PATH = f"/gists/{GIST}"


def fetch(revision: str | None = None, **options: Any) -> dict[str, str]:
    return fetch_gist(GIST, revision, GitHubClient(sleep=lambda _: None, **options)).files


def test_a_gist_loads(github: Any) -> None:
    github.gist({"model.py": github.tiny, "config.json": '{"vocab_size": 12}', "notes.md": "hello"})
    loaded = load_model(f"https://gist.github.com/user/{GIST}#file-model-py")
    assert (loaded.kind, loaded.revision, loaded.name) == ("gist", "c" * 40, "Model")
    assert loaded.module.head.out_features == 12
    assert sorted(loaded.files) == ["config.json", "model.py"]


def test_a_revision_is_pinned(github: Any) -> None:
    github.gist({"model.py": github.tiny}, revision="a" * 40)
    loaded = load_model(GIST, revision="a" * 40)
    assert loaded.revision == "a" * 40 and github.requests[0][0] == f"{PATH}/{'a' * 40}"


@pytest.mark.parametrize(
    ("reference", "revision", "words"),
    [
        (GIST, "../../user/repos?x=", "is not a commit id"),
        (GIST, "..", "is not a commit id"),
        (GIST, "main", "is not a commit id"),
        (GIST, "%2e%2e/%2e%2e/user", "is not a commit id"),
        (GIST, "a" * 40 + "/../..", "is not a commit id"),
        (GIST, "a" * 40 + "\nX: y", "is not a commit id"),
        (GIST, 1234567, "is not a commit id"),
        ("https://github.com/o/r", "../../../user/repos?x=", "not the name of a branch or tag"),
        ("https://github.com/o/r", "a..b", "not the name of a branch or tag"),
        ("https://github.com/o/r", "/main", "not the name of a branch or tag"),
        ("https://github.com/o/r", "main?x=1", "not the name of a branch or tag"),
        ("https://github.com/o/r", "ma in", "not the name of a branch or tag"),
        ("https://github.com/o/r/tree/..%2f..%2fuser/a", None, "not the name of a branch or tag"),
        ("hub:owner/name", "../x", "not the name of a branch or tag"),
        ("hub:owner/name@../x", None, "not the name of a branch or tag"),
    ],
)
def test_a_revision_that_could_lead_elsewhere_sends_nothing(
    github: Any, reference: str, revision: Any, words: str
) -> None:
    with pytest.raises(ModelReferenceError, match=words):
        load_model(reference, revision=revision, token="ghp_secret")
    assert github.requests == []


def test_a_branch_with_a_slash_is_one_part_of_the_path(github: Any) -> None:
    with pytest.raises(FetchError, match="does not exist or is private"):
        load_model("https://github.com/o/r", revision="feature/a+b")
    assert [path for path, _ in github.requests] == ["/repos/o/r/commits/feature%2Fa%2Bb"]


def test_the_token_comes_from_colab_before_the_environment(github: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_environment")
    github.gist({"model.py": "x = 1"})
    fetch()
    colab = types.ModuleType("google.colab")
    colab.userdata = types.SimpleNamespace(get={"GITHUB_TOKEN": "ghp_colab"}.get)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    fetch()
    fetch(token="ghp_given")
    sent = [headers["Authorization"] for _, headers in github.requests]
    assert sent == ["Bearer ghp_environment", "Bearer ghp_colab", "Bearer ghp_given"]
    github.answers[PATH] = (401, {}, b"{}")
    with pytest.raises(FetchError) as caught:
        fetch()
    assert "ghp_" not in str(caught.value)


def test_truncated_files_are_fetched_whole_and_others_not_at_all(github: Any) -> None:
    github.gist(
        {
            "model.py": {"content": "import to", "truncated": True, "size": 50},
            "blocks.py": {"content": "", "truncated": True, "size": 10},
            "data.bin": {"content": "", "truncated": True, "size": 40_000_000},
        }
    )
    github.answers[f"/user/{GIST}/raw/model.py"] = b"from blocks import Block\n"
    github.answers[f"/user/{GIST}/raw/blocks.py"] = b"Block = 1\n"
    assert fetch() == {"model.py": "from blocks import Block\n", "blocks.py": "Block = 1\n"}
    assert not any("data.bin" in path for path, _ in github.requests)


def test_the_token_goes_to_the_api_only(github: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_secret")
    other = github.url.replace("127.0.0.1", "localhost")
    github.gist({"model.py": {"truncated": True, "raw_url": f"{other}/raw"}})
    github.answers[PATH] = [(302, {"Location": f"{github.url}/moved"}, b"")]
    github.gist({"model.py": {"truncated": True, "raw_url": f"{other}/raw"}}, identifier="moved")
    github.answers["/moved"] = github.answers["/gists/moved"]
    github.answers["/raw"] = b"x = 1"
    fetch()
    sent = {path: "Authorization" in headers for path, headers in github.requests}
    assert sent == {PATH: True, "/moved": True, "/raw": False}


def test_the_token_does_not_follow_a_redirect_to_another_host(github: Any) -> None:
    other = github.url.replace("127.0.0.1", "localhost")
    github.gist({"model.py": "x = 1"}, identifier="moved")
    github.answers[PATH] = (301, {"Location": f"{other}/gists/moved"}, b"")
    fetch(token="ghp_secret")
    assert [("Authorization" in headers) for _, headers in github.requests] == [True, False]


def test_server_errors_are_tried_again_with_growing_pauses(github: Any) -> None:
    github.gist({"model.py": "x = 1"})
    github.answers[PATH] = [(500, {}, b""), (502, {}, b""), github.answers[PATH]]
    pauses: list[float] = []
    fetch_gist(GIST, None, GitHubClient(sleep=pauses.append))
    assert len(pauses) == 2 and pauses[1] == 2 * pauses[0]


@pytest.mark.parametrize(
    ("answer", "options", "words"),
    [
        ((404, {}, b"{}"), {}, ["does not exist or is private", "set GITHUB_TOKEN"]),
        ((404, {}, b"{}"), {"token": "t"}, ["does not exist or is private", "token in use may lack access"]),
        ((401, {}, b"{}"), {"token": "t"}, ["does not accept the token", "unset GITHUB_TOKEN"]),
        ((403, {}, b"{}"), {}, ["refuses access (403)"]),
        ((410, {}, b"{}"), {}, ["status 410"]),
        ((500, {}, b"{}"), {}, ["server error 500", "Tried 4 times"]),
        (b"<html>", {}, ["is not JSON", "sign-in page"]),
        ({"files": 3}, {}, ["has no list of files"]),
        (["x"], {}, ["has no list of files"]),
        ({"files": {}}, {}, ["has no model.py; it has no files at all"]),
        ({"files": {"Model.py": {"content": "x"}}}, {}, ["it has Model.py", "case-sensitive"]),
        ({"files": {"model.py": {"content": " \n"}}}, {}, ["empty model.py"]),
        ({"files": {"model.py": {"truncated": True}}}, {}, ["no raw_url"]),
        ({"files": {"model.py": {"truncated": True, "raw_url": "file:///etc/passwd"}}}, {}, ["points to 'file:"]),
        ({"files": {"a": {}}, "truncated": True}, {}, ["more files than the API lists"]),
        ({"files": {"model.py": {"truncated": True, "size": 40_000_000}}}, {}, ["40.0 MB", "At most 10.0 MB"]),
    ],
)  # fmt: skip
def test_refused_with_what_to_do(github: Any, answer: Any, options: dict[str, Any], words: list[str]) -> None:
    github.answers[PATH] = answer
    with pytest.raises((FetchError, ModelReferenceError)) as caught:
        fetch(**options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("code", [403, 429])
def test_a_rate_limit_says_when_to_try_again(github: Any, code: int) -> None:
    reset = int(time.time()) + 1800
    github.answers[PATH] = (code, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(reset)}, b"{}")
    clock = time.strftime("%H:%M", time.localtime(reset + 59))
    with pytest.raises(FetchError, match=f"Try again at {clock}.*or set GITHUB_TOKEN"):
        fetch()
    with pytest.raises(FetchError, match=f"Try again at {clock}.*token in use has reached its own limit"):
        fetch(token="t")
    github.answers[PATH] = (code, {"Retry-After": "60"}, b"{}")
    with pytest.raises(FetchError, match=r"Try again at \d\d:\d\d"):
        fetch()


def test_40_mb_are_refused_before_they_arrive(github: Any) -> None:
    for headers in ({}, {"Content-Length": None}):
        github.sent = 0
        github.answers[PATH] = (200, headers, b" " * 40_000_000)
        with pytest.raises(FetchError, match=r"At most 10\.0 MB are downloaded.*max_bytes="):
            fetch()
        assert github.sent < 30_000_000


def test_a_slow_server_times_out(github: Any) -> None:
    github.answers[PATH] = github.slow
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"did not answer within 0\.2 s.*longer timeout="):
        fetch(timeout=0.2)
    assert time.monotonic() - start < 3


def trickle(handler: Any) -> None:
    """Send a header that never ends, one byte at a time."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(30):
            handler.wfile.write(b"a")
            time.sleep(0.05)
    except OSError:
        pass


def silent(handler: Any) -> None:
    time.sleep(1.5)


@pytest.mark.parametrize("answer", [trickle, silent])
def test_all_attempts_together_have_a_deadline(github: Any, answer: Any) -> None:
    github.answers[PATH] = answer
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"did not answer within 0\.\d+ s. Tried 2 times.*longer timeout="):
        fetch(timeout=0.3, deadline=0.5)
    assert time.monotonic() - start < 1.2


def test_the_deadline_is_half_a_minute_or_the_time_of_one_attempt(github: Any) -> None:
    assert GitHubClient().deadline == 30 and GitHubClient(timeout=90).deadline == 90
    github.answers[PATH] = silent
    start = time.monotonic()
    with pytest.raises(FetchError, match="Tried 1 time[.]"):
        load_model(GIST, timeout=0.3, deadline=0.3)
    assert time.monotonic() - start < 1


def test_no_server() -> None:
    with pytest.raises(FetchError, match=r"no connection to 127\.0\.0\.1:9.*local copy"):
        fetch(api="http://127.0.0.1:9")


def test_a_file_that_is_not_utf8(github: Any) -> None:
    github.gist({"model.py": {"truncated": True}})
    github.answers[f"/user/{GIST}/raw/model.py"] = b"x = 1\ny = '\xff'"
    with pytest.raises(ModelReferenceError, match="not UTF-8 text: byte 0xff in line 2"):
        fetch()


def test_a_broken_token_is_refused_and_not_shown() -> None:
    with pytest.raises(FetchError, match="contains blanks") as caught:
        GitHubClient(token="ghp secret\nX: y")
    assert "secret" not in str(caught.value)
    with pytest.raises(FetchError, match="is not an address"):
        GitHubClient(api="nonsense")


def test_a_repository_folder_loads_pinned_to_its_commit(github: Any) -> None:
    sha = "b" * 40
    github.answers["/repos/o/r/commits/main"] = sha.encode()
    names = ("model.py", "blocks.py", "config.json", "train.py")
    github.answers[f"/repos/o/r/contents/a?ref={sha}"] = [
        [{"type": "file", "name": name, "size": 10} for name in names] + [{"type": "dir", "name": "docs"}]
    ]
    github.answers[f"/repos/o/r/contents/a/model.py?ref={sha}"] = github.tiny.replace(
        "import torch\n", "from .blocks import SIZE\n"
    ).encode()
    github.answers[f"/repos/o/r/contents/a/blocks.py?ref={sha}"] = b"SIZE = 3\n"
    github.answers[f"/repos/o/r/contents/a/config.json?ref={sha}"] = b'{"d_model": 4}'
    loaded = load_model("https://github.com/o/r/tree/main/a")
    assert (loaded.kind, loaded.revision, loaded.module.embed.embedding_dim) == ("github", sha, 4)
    assert "train.py" not in loaded.files
    assert load_model("https://github.com/o/r/blob/main/a/model.py").sha256 == loaded.sha256
    with pytest.raises(ModelReferenceError, match="not Python source"):
        load_model("https://github.com/o/r/blob/main/a/template.ipynb")
    with pytest.raises(FetchError, match="The repository o/r at dev does not exist or is private"):
        load_model("https://github.com/o/r/tree/dev/a")
