"""An environment is built once, whole or not at all, and everything that can go wrong is one paragraph."""

import ast
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tools import environment
from tools.environment import EnvironmentFailure

TOOL = Path(environment.__file__)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose only requirement is a wheel that lies in it."""
    folder = tmp_path / "checkout"
    (folder / "tests" / "colab").mkdir(parents=True)
    info = "seedling-1.0.dist-info"
    wheel = folder / "seedling-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("seedling.py", "leaves = 2\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: seedling\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    (folder / "requirements-training.txt").write_text("")
    (folder / "requirements-memory.txt").write_text("")
    (folder / "requirements-dev.txt").write_text(f"{wheel}\n")
    (folder / "constraints.txt").write_text("seedling==1.0\n")
    (folder / "tests" / "colab" / "replica.txt").write_text(f"{wheel}\n")
    monkeypatch.setenv("SEEDBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def run(checkout, kind="dev"):
    return subprocess.run(
        [sys.executable, str(TOOL), kind, "--root", str(checkout)], capture_output=True, text=True, timeout=200
    )


def fake_build(monkeypatch, effect=None):
    """Replace the slow part by one that counts."""
    calls = []

    def build(directory, files, constraints, say):
        calls.append((directory, files, constraints))
        os.makedirs(os.path.join(directory, "bin"), exist_ok=True)
        Path(directory, "bin", "python").write_text("")
        if effect:
            effect(directory)
        Path(directory, "complete").write_text("")

    monkeypatch.setattr(environment, "build", build)
    return calls


@pytest.mark.slow
def test_build_link_and_run_again(checkout):
    first = run(checkout)
    assert first.returncode == 0, first.stderr
    assert "Building the dev environment, once" in first.stdout
    python = checkout / ".venv" / "bin" / "python"
    answer = subprocess.run(
        [str(python), "-c", "import seedling; print(seedling.leaves)"], capture_output=True, text=True
    )
    assert answer.stdout == "2\n"
    start = time.monotonic()
    again = run(checkout)
    assert (again.returncode, again.stdout) == (0, "")
    assert time.monotonic() - start < 3
    assert "seedling" in (checkout / ".venv" / "install.log").read_text()


@pytest.mark.slow
def test_two_at_once_build_one(checkout):
    command = [sys.executable, str(TOOL), "dev", "--root", str(checkout)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("Building the dev environment" in output for output in outputs) == 1
    assert sum("waiting for it" in output for output in outputs) <= 1
    assert len([path for path in Path(environment.cache_directory()).iterdir() if path.is_dir()]) == 1


@pytest.mark.slow
def test_a_package_that_cannot_be_had_is_one_paragraph_and_nothing_counts_as_built(checkout):
    (checkout / "requirements-dev.txt").write_text("no-such-seed==3\n")
    result = run(checkout)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Installing the packages failed. ERROR:")
    assert "no-such-seed==3" in result.stderr
    assert "Check the versions it names against this Python" in result.stderr
    assert "The whole output is in" in result.stderr
    assert not (checkout / ".venv").exists()
    assert not list(Path(environment.cache_directory()).glob("*/complete"))


def test_environments_differ_by_pins_and_kind(checkout, monkeypatch):
    calls = fake_build(monkeypatch)
    first = environment.ensure("dev", str(checkout), print)
    assert environment.ensure("dev", str(checkout), print) == first
    assert len(calls) == 1
    (checkout / "constraints.txt").write_text("seedling==1.0\nother==2\n")
    second = environment.ensure("dev", str(checkout), print)
    replica = environment.ensure("replica", str(checkout), print)
    assert len({first, second, replica}) == 3
    assert calls[-1][1:] == ([str(checkout / "tests" / "colab" / "replica.txt")], [])
    (checkout / "tests" / "ui").mkdir()
    (checkout / "tests" / "ui" / "lab.txt").write_text("")
    assert environment.ensure("browser", str(checkout), print) not in (first, second, replica)
    assert calls[-1][1:] == ([str(checkout / "tests" / "ui" / "lab.txt")], [])


def test_an_unfinished_environment_is_built_again(checkout, monkeypatch):
    def die(directory):
        raise KeyboardInterrupt

    fake_build(monkeypatch, die)
    with pytest.raises(KeyboardInterrupt):
        environment.ensure("dev", str(checkout), print)
    calls = fake_build(monkeypatch)
    directory = environment.ensure("dev", str(checkout), print)
    assert len(calls) == 1
    assert environment.is_complete(directory)
    Path(directory, "bin", "python").unlink()
    environment.ensure("dev", str(checkout), print)
    assert len(calls) == 2, "an environment whose interpreter is gone is no environment"


def test_building_removes_what_an_interrupted_build_left(tmp_path, monkeypatch):
    directory = tmp_path / "dev-1"
    directory.mkdir()
    (directory / "leftover").write_text("")
    monkeypatch.setattr(environment, "run_logged", lambda command, *rest: os.makedirs(directory, exist_ok=True) or 0)
    said = []
    environment.build(str(directory), [], [], said.append)
    assert said == ["Removing an environment that was not finished."]
    assert sorted(path.name for path in directory.iterdir()) == ["complete", "install.log"]


def test_without_the_venv_module_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "run_logged", lambda *a: 1)
    with pytest.raises(EnvironmentFailure, match="apt-get install python3-venv"):
        environment.build(str(tmp_path / "dev-1"), [], [], print)


def test_a_link_is_replaced_and_a_folder_is_left_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        environment.link(str(tmp_path / name), str(tmp_path))
        assert (tmp_path / ".venv").resolve() == tmp_path / name
    (tmp_path / ".venv").unlink()
    (tmp_path / ".venv").mkdir()
    with pytest.raises(EnvironmentFailure) as caught:
        environment.link(str(tmp_path / "one"), str(tmp_path))
    assert "exists and is not a link" in str(caught.value)
    assert "Move it away or remove it" in str(caught.value)


def test_a_cache_that_cannot_be_written_is_explained(checkout, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEEDBED_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentFailure, match="Set SEEDBED_CACHE to a folder that can"):
        environment.ensure("dev", str(checkout), print)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "ERROR: Could not install: [Errno 28] No space left on device",
            "set SEEDBED_CACHE to a folder on a larger disk",
        ),
        ("Max retries exceeded\nERROR: No matching distribution found", "check the network and run the command again"),
        ("ERROR: No matching distribution found for torch==9", "Check the versions it names against this Python"),
        ("", "pip gave no reason."),
    ],
)
def test_pips_reasons_become_advice(tmp_path, log, expected):
    path = tmp_path / "install.log"
    path.write_text(log)
    text = environment.explain(str(path))
    assert expected in text
    assert "\n" not in text


def test_old_pythons_can_read_the_file_and_are_refused():
    ast.parse(TOOL.read_text(encoding="utf-8"), feature_version=(3, 6))
    with pytest.raises(EnvironmentFailure) as caught:
        environment.check_python((3, 8, 10))
    assert str(caught.value).startswith("This is Python 3.8. Seedbed needs Python 3.10 or newer.")
    assert "make test PYTHON=python3.11" in str(caught.value)
    environment.check_python((3, 10, 0))


def test_pins_are_used_from_the_python_that_they_were_tested_on(checkout):
    assert environment.requirement_files("dev", str(checkout), (3, 10))[1] == []
    assert environment.requirement_files("dev", str(checkout), (3, 13))[1] == [str(checkout / "constraints.txt")]


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.delenv("SEEDBED_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert environment.cache_directory() == "/somewhere/seedbed/environments"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.cache_directory() == os.path.expanduser("~/.cache/seedbed/environments")
