import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from torch import nn

import utils
from utils.runtime.errors import ConfigError, ExportError
from utils.runtime.files import sha256_bytes
from utils.training.bundle import bundle
from utils.training.publish import publish

TOKEN = "hf_loopback_only_0123456789"


class Hub(BaseHTTPRequestHandler):
    """Speaks as much of the Hub's protocol as an upload needs, large files through LFS."""

    def log_message(self, *arguments):
        pass

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_GET(self):
        self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_PUT(self):
        content = self.body()
        self.server.large[sha256_bytes(content)] = content
        self.answer({})

    def do_POST(self):
        server, body = self.server, self.body()
        server.asked.append(self.path)
        address = f"http://127.0.0.1:{server.server_port}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "validate" not in self.path:
            self.answer({"error": f"Invalid credentials {self.headers.get('Authorization')}"}, 401)
        elif self.path == "/api/repos/create":
            server.repository = json.loads(body)
            self.answer({"url": f"{address}/me/model", "name": "me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            large = (".onnx", ".safetensors", ".data", ".pt2")
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                 "shouldIgnore": False} for f in files
            ]  # fmt: skip
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{address}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            server.commit = [json.loads(line) for line in body.splitlines()]
            commit = {"commitUrl": f"{address}/me/model/commit/abc", "commitOid": "abc", "success": True}
            self.answer({**commit, "hookOutput": ""})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": "unknown"}, 404)


@pytest.fixture
def server(monkeypatch):
    from huggingface_hub import constants

    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.asked, made.large, made.commit, made.repository = [], {}, [], {}
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # Read from the environment at the first import, which may be in a test that keeps the network away.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids):
        return self.output(self.embedding(input_ids))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return bundle(Scores(), tmp_path_factory.mktemp("bundle") / "out", progress=False)


@pytest.fixture
def made(original, tmp_path):
    import shutil

    return shutil.copytree(original.directory, tmp_path / "copy")


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(original, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    shown = publish(original, "me/model")
    assert not server.asked
    assert not shown.sent
    sizes = dict(shown.files)
    assert sizes["model.onnx"] == (original.directory / "model.onnx").stat().st_size
    assert set(sizes) == {file.name for file in original.files} | {"bundle.json"}
    assert shown.bytes == sum(sizes.values())
    assert "Would send" in shown.text()
    assert "Nothing was sent. Send it with dry_run=False." in shown._repr_html_()
    assert "README.md names no licence; without one nobody may use the model." in str(shown)


def test_an_upload_arrives_byte_for_byte(made, server, capfd):
    (made / "notes.txt").write_text("mine")
    sent = publish(made, "me/model", dry_run=False)
    assert sent.sent
    assert sent.url.endswith("/me/model/commit/abc")
    assert server.repository["name"] == "model"
    assert server.repository["organization"] == "me"
    assert server.repository.get("private", True) is True
    arrived = {}
    for line in server.commit[1:]:
        value = line["value"]
        if line["key"] == "file":
            arrived[value["path"]] = base64.b64decode(value["content"])
        else:
            assert line["key"] == "lfsFile"
            arrived[value["path"]] = server.large[value["oid"]]
    assert arrived == {name: (made / name).read_bytes() for name, _ in sent.files}
    assert "notes.txt" not in arrived
    assert sent.left_out == ("notes.txt",)
    assert server.large, "large files went through LFS"
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err + sent.text() + repr(sent) + json.dumps(sent.to_dict())
    assert all(TOKEN.encode() not in path.read_bytes() for path in made.rglob("*") if path.is_file())
    assert "Sent" in str(sent)


def test_an_edited_card_is_sent_and_an_edited_file_is_not(made, server):
    card = made / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("---\n\n#", "license: mit\n---\n\n#", 1), encoding="utf-8")
    assert publish(made, "me/model").notes == ("README.md was edited since the bundle was made.",)
    (made / "inference.py").write_text("changed")
    with pytest.raises(ExportError, match=r"inference.py is not as the bundle was made .* only README.md may be"):
        publish(made, "me/model", dry_run=False)
    (made / "inference.py").unlink()
    with pytest.raises(ExportError, match=r"inference.py is not in the bundle .* bundle.json lists it"):
        publish(made, "me/model", dry_run=False)
    assert not server.asked


def test_a_token_in_a_file_is_found_before_anything_is_sent(made, server):
    card = made / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + TOKEN, encoding="utf-8")
    with pytest.raises(ExportError, match=r"README.md holds the token that would be used to send it") as caught:
        publish(made, "me/model", dry_run=False)
    assert TOKEN not in str(caught.value)
    assert not server.asked


def test_a_refused_token_is_told_without_showing_it(made, server):
    wrong = "hf_wrong_token_98765"
    with pytest.raises(ExportError, match=r"did not take the bundle .*401.* a token that may write") as caught:
        publish(made, "me/model", dry_run=False, token=wrong)
    assert wrong not in str(caught.value)
    assert not server.commit


def test_without_a_token_nothing_is_sent(made, server, monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ExportError, match=r"There is no token for the Hugging Face Hub.*secret HF_TOKEN"):
        publish(made, "me/model", dry_run=False)
    assert not server.asked


def test_names_that_are_none_are_refused(made, tmp_path):
    with pytest.raises(ConfigError, match=r"repo_id is 'model': there is no owner in it.* Expected owner/name"):
        publish(made, "model")
    with pytest.raises(ConfigError, match=r"repo_id is 'me/mo del'"):
        publish(made, "me/mo del")
    with pytest.raises(ExportError, match=r"is no bundle"):
        publish(tmp_path, "me/model")


def test_the_public_names():
    assert utils.publish is publish
    assert utils.bundle is bundle
