"""A file is whole or absent, whatever happens while it is written."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest

from utils.runtime import files
from utils.runtime.files import sha256_bytes, sha256_file, sync_file, write_atomic, write_json


def test_hashes_agree_with_hashlib(tmp_path):
    data = bytes(range(256)) * 9000  # more than two of the pieces that are read at once
    path = tmp_path / "data"
    path.write_bytes(data)
    assert sha256_file(path) == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("content", ["text with ü", b"\x00\xff bytes", ""])
def test_content_arrives_and_nothing_is_left_beside_it(tmp_path, content):
    path = tmp_path / "new" / "folder" / "file"
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "file"
    contents = {letter * 200_000 for letter in "ab"}
    write_atomic(path, "a" * 200_000)
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom utils.runtime.files import write_atomic\nfrom pathlib import Path\n"
            "for i in range(60): write_atomic(Path(sys.argv[1]), 'ba'[i % 2] * 200_000)",
            str(path),
        ],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    seen = 0
    while writer.poll() is None:
        assert path.read_text() in contents
        seen += 1
    assert writer.returncode == 0
    assert seen > 0


def test_json_is_readable_and_keeps_unicode(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"name": "ü", "list": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ü", "list": [1, 2.5, None]}
    assert "ü" in path.read_text(encoding="utf-8")
    assert path.read_text().endswith("}\n")


def test_sync_accepts_files_and_folders_and_reports_missing_ones(tmp_path):
    (tmp_path / "file").write_text("x")
    sync_file(tmp_path / "file")
    sync_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_file(tmp_path / "missing")
