"""A file is whole or absent, whatever happens while it is written."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys

import pytest

from utils.runtime import files
from utils.runtime.errors import CheckpointError, DataError
from utils.runtime.files import (
    check_replaceable,
    checked_path,
    is_other_json,
    null_nonfinite,
    own_hash,
    saving,
    sha256_bytes,
    sha256_file,
    sync_file,
    tag_nonfinite,
    untag_nonfinite,
    write_atomic,
    write_json,
)


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
    write_json(path, {"half \ud800": ["\udc00 é \\ud800", "🙂"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"half \ud800": ["\udc00 é \\ud800", "🙂"]}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_are_refused_and_the_old_file_stays(tmp_path, number):
    path = tmp_path / "value.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"deep": [{"loss": number}]})
    assert json.loads(path.read_text()) == {"loss": 1.0}


def test_measured_numbers_become_null_and_settings_keep_theirs(tmp_path):
    value = {"a": [1.5, math.inf, (-math.inf, "NaN")], "b": {"c": math.nan, "d": None, "e": True, "f": 3}}
    assert null_nonfinite(value) == {"a": [1.5, None, [None, "NaN"]], "b": {"c": None, "d": None, "e": True, "f": 3}}
    write_json(tmp_path / "settings.json", tag_nonfinite(value))
    text = (tmp_path / "settings.json").read_text()
    assert "NaN" in text

    def refuse(name):
        raise AssertionError(f"a bare {name}")

    back = untag_nonfinite(json.loads(text, parse_constant=refuse))
    assert back["a"] == [1.5, math.inf, [-math.inf, "NaN"]]
    assert math.isnan(back["b"].pop("c"))
    assert back["b"] == {"d": None, "e": True, "f": 3}
    assert untag_nonfinite({"__float__": "5", "other": {"__float__": ["NaN"]}}) == {
        "__float__": "5",
        "other": {"__float__": ["NaN"]},
    }


def test_sync_accepts_files_and_folders_and_reports_missing_ones(tmp_path):
    (tmp_path / "file").write_text("x")
    sync_file(tmp_path / "file")
    sync_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_file(tmp_path / "missing")


def test_a_hash_of_its_own_is_of_all_else_that_a_file_says():
    said = {"b": [1, 2.5, None], "a": {"ü": True}}
    digest = own_hash(said)
    assert digest == own_hash(said | {"sha256": digest}) == own_hash(dict(reversed(said.items())))
    assert digest == own_hash(json.loads(json.dumps(said)))
    assert digest == hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    assert digest != own_hash({**said, "b": [1, 2.5, 0]})
    deep: list = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nested too deeply to be hashed.*Give another copy"):
        own_hash({"x": deep})


def test_what_is_no_path_is_told(tmp_path):
    assert checked_path(str(tmp_path), "the thing") == checked_path(tmp_path, "the thing") == tmp_path
    for path in (None, 3, "", "  ", "a\0b", b"bytes", ["a"]):
        with pytest.raises(DataError, match="The path of the thing is .*Expected a path.*Give one") as caught:
            checked_path(path, "the thing", DataError)
        assert caught.value.found and caught.value.expected and caught.value.action


def test_what_the_system_refuses_is_told_and_nothing_else_is_caught(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = "The thing cannot be saved as .*Error.*below folders and not below a file.*untouched"
    with pytest.raises(CheckpointError, match=message), saving(tmp_path / "file" / "x", "the thing") as path:
        write_atomic(path, "new")
    with pytest.raises(DataError, match="is a folder"), saving(tmp_path, "the thing", DataError):
        raise AssertionError
    with pytest.raises(CheckpointError, match="is a folder"), saving(".", "the thing"):
        raise AssertionError
    with (
        pytest.raises(CheckpointError, match="File name too long"),
        saving(tmp_path / ("x" * 300), "the thing") as path,
    ):
        write_atomic(path, "new")
    with saving(tmp_path, "the thing", folder=True) as path:
        write_atomic(path / "x", "new")
    assert (tmp_path / "x").read_text() == "new" and (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="another"), saving(tmp_path / "y", "the thing"):
        raise ValueError("another")


def test_json_of_something_else_is_told_from_ours_and_from_what_is_none(tmp_path):
    path = tmp_path / "thing.json"
    assert not is_other_json(path, lambda _: False)
    for content in ("", "{", "\xff", "[" * 100_000, '{"kind": "ours", "damaged": true}'):
        path.write_text(content, encoding="latin-1")
        assert not is_other_json(path, lambda said: said.get("kind") == "ours")
        if "kind" not in content:
            check_replaceable(path, "thing", "save_thing")
    for content in ("[]", "3", "null", "{}", '{"kind": "theirs"}'):
        path.write_text(content)
        assert is_other_json(path, lambda said: said.get("kind") == "ours")
        with pytest.raises(DataError, match="thing.json in .* is of no thing. .*save_thing wrote.*Save into another"):
            check_replaceable(path, "thing", "save_thing", DataError)
    path.write_text(json.dumps({"format": 99, "tensors": {"file": "x", "sha256": "y"}}))
    check_replaceable(path, "thing", "save_thing")
    with pytest.raises(OSError, match="Is a directory"):
        is_other_json(tmp_path, lambda _: True)
