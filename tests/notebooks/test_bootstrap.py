"""The bootstrap cell finds Seedbed's code on every rung of its ladder, and nothing else that is called utils."""

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CELL = Path("tools") / "bootstrap_cell.py"
ADDRESS = "https://github.com/{REPOSITORY}"
SHOW = "\nimport json, utils\nprint(json.dumps([str(root), utils.__file__, utils.WHO]))\n"


def plant(folder, who):
    """Write a package that looks like Seedbed's code and knows who it is."""
    (folder / "utils" / "runtime").mkdir(parents=True)
    (folder / "utils" / "__init__.py").write_text(f"WHO = {who!r}\n")
    (folder / "utils" / "runtime" / "__init__.py").write_text("")
    (folder / "utils" / "runtime" / "project.py").write_text("VERSION = '0.1.0'\n")
    return folder


def zipped(folder, target):
    """Pack a folder, with its own name as the top folder, as GitHub does."""
    return Path(shutil.make_archive(str(target.with_suffix("")), "zip", folder.parent, folder.name))


@pytest.fixture
def here(tmp_path):
    """The notebook's working directory."""
    folder = tmp_path / "content"
    folder.mkdir()
    return folder


@pytest.fixture
def run_cell(root, here):
    """Return a function that runs the cell in a fresh interpreter and returns its answer and output."""

    def run(before="", after=SHOW, repository="", address=None, times=1, **variables):
        cell = (root / CELL).read_text(encoding="utf-8")
        line = next(line for line in cell.splitlines() if line.startswith("REPOSITORY = "))
        cell = cell.replace(line, f'REPOSITORY = "{repository}"  # stamped by make colab-links')
        if address:
            assert ADDRESS in cell
            cell = cell.replace(ADDRESS, address)
        code = before + "\n" + f"\n{cell}\n" * times + after
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SEEDBED_", "PYTHONPATH"))
        }
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=here,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        answer = json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 and after == SHOW else None
        return answer, result

    return run


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".seedbed-")]


def test_code_beside_the_notebook(run_cell, here):
    plant(here, "beside")
    (found, file, who), result = run_cell()
    assert (found, who) == (str(here), "beside")
    assert file == str(here / "utils" / "__init__.py")
    assert f"Seedbed v0.1.0 from {here}" in result.stdout


def test_a_folder_named_in_the_environment_comes_first(run_cell, here, tmp_path):
    plant(here, "beside")
    plant(tmp_path / "named", "named")
    (_, _, who), _ = run_cell(SEEDBED_SOURCE=str(tmp_path / "named"))
    assert who == "named"


def test_a_zip_named_in_the_environment(run_cell, here, tmp_path):
    archive = zipped(plant(tmp_path / "seedbed-0.1.0", "zip"), tmp_path / "any.zip")
    (found, _, who), _ = run_cell(SEEDBED_SOURCE=str(archive), times=2)
    assert (found, who) == (str(here / "seedbed-v0.1.0"), "zip")
    assert leftovers(here) == []


def test_a_zip_uploaded_beside_the_notebook(run_cell, here, tmp_path):
    zipped(plant(tmp_path / "main", "uploaded"), here / "seedbed.zip")
    (_, _, who), _ = run_cell()
    assert who == "uploaded"


def test_what_was_fetched_before_is_used_again_without_the_network(run_cell, here):
    plant(here / "seedbed-v0.1.0", "kept")
    (_, _, who), _ = run_cell(repository="owner/name", address="http://127.0.0.1:9/nothing")
    assert who == "kept"


def test_a_wrong_source_is_an_error_and_not_passed_over(run_cell, here, tmp_path):
    plant(here, "beside")
    _, result = run_cell(repository="owner/name", SEEDBED_SOURCE=str(tmp_path / "absent"))
    assert result.returncode != 0
    assert f"no utils/runtime/project.py in {tmp_path / 'absent'}" in result.stderr.splitlines()[-1]


def test_without_any_source_an_unstamped_notebook_says_so(run_cell, here):
    _, result = run_cell()
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: Seedbed's code was not found: no utils/runtime/project.py in")
    assert "no repository address is stamped into this notebook (make colab-links REPO=owner/name)" in message
    assert "Upload it as seedbed.zip beside this notebook" in message
    assert "SEEDBED_SOURCE" in message


@pytest.fixture
def repository(tmp_path):
    """A repository with a tag, whose later commits must not arrive."""
    folder = plant(tmp_path / "origin", "tagged")

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "v0.1.0")
    (folder / "utils" / "__init__.py").write_text("WHO = 'later'\n")
    git("commit", "-am", "two")
    return folder


def test_the_tag_is_cloned(run_cell, here, repository):
    (found, _, who), _ = run_cell(repository="owner/name", address=repository.as_uri(), times=2)
    assert (found, who) == (str(here / "seedbed-v0.1.0"), "tagged")
    assert leftovers(here) == []
    log = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=found, capture_output=True, text=True, check=True)
    assert log.stdout.strip() == "1", "a shallow clone"


@pytest.fixture
def server(tmp_path):
    """A web server on loopback that serves a folder."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    instance = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=instance.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    thread.join()
    instance.server_close()


def test_where_cloning_fails_the_zip_of_the_tag_is_fetched(run_cell, here, tmp_path, server):
    folder, address = server
    tags = folder / "owner" / "name" / "archive" / "refs" / "tags"
    tags.mkdir(parents=True)
    zipped(plant(tmp_path / "name-0.1.0", "web zip"), tmp_path / "v0.1.0.zip").rename(tags / "v0.1.0.zip")
    (found, _, who), _ = run_cell(repository="owner/name", address=f"{address}/{{REPOSITORY}}")
    assert (found, who) == (str(here / "seedbed-v0.1.0"), "web zip")
    assert leftovers(here) == []


def test_where_everything_fails_every_attempt_is_named(run_cell, here, server):
    _, result = run_cell(repository="owner/name", address=f"{server[1]}/{{REPOSITORY}}")
    message = result.stderr.splitlines()[-1]
    assert "clone of owner/name v0.1.0:" in message
    assert "unpack of owner/name v0.1.0: HTTP Error 404" in message
    assert "stamped" not in message
    assert leftovers(here) == []


def test_another_utils_on_the_path_does_not_win(run_cell, here, tmp_path):
    plant(here, "beside")
    (tmp_path / "shadow" / "utils").mkdir(parents=True)
    (tmp_path / "shadow" / "utils" / "__init__.py").write_text("WHO = 'shadow'\n")
    before = f"import sys; sys.path.insert(0, {str(tmp_path / 'shadow')!r})"
    assert run_cell(before)[0][2] == "beside"
    assert run_cell(before + "; import utils; assert utils.WHO == 'shadow'")[0][2] == "beside"


def test_an_older_seedbed_that_is_loaded_already_is_dropped_with_its_parts(run_cell, here, tmp_path):
    plant(here, "new")
    plant(tmp_path / "old", "old")
    before = f"import sys; sys.path.insert(0, {str(tmp_path / 'old')!r}); import utils.runtime.project"
    after = "\nimport utils.runtime.project as project\nprint(project.__file__)\n"
    _, result = run_cell(before, after)
    assert result.stdout.splitlines()[-1] == str(here / "utils" / "runtime" / "project.py")


def test_running_the_cell_again_keeps_what_is_loaded(run_cell, here):
    plant(here, "beside")
    # Were it loaded anew, the objects that a user holds would no longer be instances of the classes that are imported.
    before = "import sys; loaded = [*sys.modules.values()]"
    after = "\nprint([module.__name__ for module in seen if module is utils])\n"
    keep = "\nseen = globals().get('seen', []) + [utils]\n"
    _, result = run_cell(before, keep + after.replace("seen if", "seen if"), times=2)
    assert result.stdout.splitlines()[-1] == "['utils']"


def test_a_utils_that_cannot_be_displaced_is_an_error(run_cell, here, tmp_path):
    plant(here, "beside")
    (tmp_path / "hooked.py").write_text("")
    before = f"""
import importlib.util, sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "utils":
            return importlib.util.spec_from_file_location("utils", {str(tmp_path / "hooked.py")!r})
sys.meta_path.insert(0, Hook())
"""
    _, result = run_cell(before)
    assert "restart the runtime and run this cell first" in result.stderr.splitlines()[-1]


def test_the_real_checkout_is_found(run_cell, root):
    _, result = run_cell(after="", SEEDBED_SOURCE=str(root))
    assert result.returncode == 0, result.stderr
    assert f"from {root}" in result.stdout


def test_the_cell_is_short(root):
    assert len((root / CELL).read_text(encoding="utf-8").splitlines()) <= 56
