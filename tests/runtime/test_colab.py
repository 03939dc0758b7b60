"""Choosing a model's reference, and installing without changing what is installed."""

import sys
import threading
import time
import zipfile

import pytest

from utils.runtime import colab as module
from utils.runtime.colab import (
    InstallError,
    InstallReport,
    canonical_name,
    changed_packages,
    choose_reference,
    in_colab,
    install_missing,
    installed_versions,
)

GIST = "0123456789abcdef0123456789abcdef"


def test_colab_is_recognised(colab):
    assert in_colab()


def test_this_is_not_colab():
    assert not in_colab()


class TestChoice:
    def test_form_wins_over_everything(self, colab, monkeypatch):
        colab.output.eval_js = lambda code: pytest.fail("the page was read although the form decides")
        monkeypatch.setenv("SEEDBED_MODEL", "example:bert")
        choice = choose_reference("  hub:owner/name ")
        assert (choice.value, choice.source) == ("hub:owner/name", "the form field")

    def test_environment_wins_over_page_and_default(self, colab, monkeypatch):
        colab.output.eval_js = lambda code: pytest.fail("the page was read although the environment decides")
        monkeypatch.setenv("SEEDBED_MODEL", "example:bert")
        choice = choose_reference("")
        assert (choice.value, choice.source) == ("example:bert", "the environment variable SEEDBED_MODEL")

    @pytest.mark.parametrize(
        "page",
        [
            f"https://colab.research.google.com/gist/someone/{GIST}/template.ipynb ",
            f"https://frame.example/ https://colab.research.google.com/gist/some-one/{GIST}",
            f"https://frame.example/?gist={GIST}&x=1 ",
            f"https://frame.example/#gist_id={GIST} ",
        ],
    )
    def test_page_fills_the_gap_in_colab(self, colab, page):
        colab.output.eval_js = lambda code: page
        choice = choose_reference()
        assert (choice.value, choice.source) == (GIST, "the address of this page")

    @pytest.mark.parametrize("page", ["", None, "https://x/?gist=rm%20-rf", f"https://x/?gist={GIST * 2}", "gist=", 3])
    def test_a_page_that_does_not_say_leaves_the_default(self, colab, page):
        colab.output.eval_js = lambda code: page
        assert choose_reference().value == "example:gpt"

    def test_an_error_in_the_browser_leaves_the_default(self, colab):
        def fail(code):
            raise RuntimeError("MessageError: no frame")

        colab.output.eval_js = fail
        assert choose_reference().source.startswith("the built-in default")

    def test_a_browser_that_never_answers_is_left_after_the_limit(self, colab, monkeypatch):
        monkeypatch.setattr(module, "BROWSER_SECONDS", 0.2)
        colab.output.eval_js = lambda code: time.sleep(60)
        start = time.monotonic()
        assert choose_reference().value == "example:gpt"
        assert time.monotonic() - start < 5

    def test_outside_the_main_thread_the_page_is_not_asked(self, colab):
        colab.output.eval_js = lambda code: f"https://x/?gist={GIST}"
        answers = []
        thread = threading.Thread(target=lambda: answers.append(choose_reference().value))
        thread.start()
        thread.join()
        assert answers == ["example:gpt"]

    def test_default_and_words(self):
        choice = choose_reference(None, environment="SEEDBED_OTHER", default="example:vit")
        assert str(choice).startswith("example:vit (from the built-in default")
        assert choice.to_dict()["value"] == "example:vit"
        assert "example:vit" in choice._repr_html_()


class TestVersions:
    def test_snapshot_has_what_is_installed(self):
        import torch

        versions = installed_versions()
        assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert all(name == canonical_name(name) for name in versions)

    def test_changes_are_upgrades_and_removals_not_additions(self):
        before, after = {"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}
        assert changed_packages(before, after) == {"b": ("1", "2"), "c": ("1", "absent")}
        assert changed_packages(before, before) == {}


def wheel(folder, name, version, requires=()):
    """Write a wheel with one empty module."""
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip looks in instead of an index, and a folder that it installs into."""
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    target.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_TARGET", str(target))
    monkeypatch.setattr(sys, "path", [*sys.path, str(target)])
    return wheels


def requirements(tmp_path, text):
    path = tmp_path / "requirements.txt"
    path.write_text(text)
    return path


class TestInstallMissing:
    def test_nothing_missing_runs_no_pip(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
        report = install_missing(requirements(tmp_path, "# comment\n\ntorch>=1  # here\nnumpy\n"))
        assert report.added == report.changed == report.outside == {}
        assert set(report.kept) == {"torch", "numpy"}
        assert str(report).startswith("Installed nothing in ")

    def test_what_is_missing_is_added_and_nothing_changes(self, tmp_path, index):
        wheel(index, "seedling", "1.0", ["seedroot"])
        wheel(index, "seedroot", "2.0")
        report = install_missing(requirements(tmp_path, "seedling>=1,<2\ntorch\nabsent; python_version < '3'\n"))
        assert report.added == {"seedling": "1.0", "seedroot": "2.0"}
        assert report.changed == {}
        assert report.preinstalled > 20
        assert "seedling 1.0, seedroot 2.0" in report._repr_html_()
        assert "0 of them changed" in str(report)
        assert report.to_dict()["added"] == report.added
        assert install_missing(requirements(tmp_path, "seedling>=1,<2\n")).added == {}

    def test_a_package_that_wants_to_change_another_is_refused(self, tmp_path, index):
        numpy = installed_versions()["numpy"]
        wheel(index, "seedling", "1.0", ["numpy>=999"])
        wheel(index, "numpy", "999.0")
        with pytest.raises(InstallError) as caught:
            install_missing(requirements(tmp_path, "seedling\n"))
        assert "Installing seedling failed:" in str(caught.value)
        assert "Everything that was installed before is unchanged." in str(caught.value)
        assert installed_versions()["numpy"] == numpy

    def test_no_network_is_one_paragraph(self, tmp_path, index):
        with pytest.raises(InstallError) as caught:
            install_missing(requirements(tmp_path, "no-such-seed>=1\n"))
        text = str(caught.value)
        assert "Installing no-such-seed>=1 failed: ERROR" in text
        assert "Check that this machine reaches the package index, then run the cell again." in text
        assert "\n" not in text

    def test_a_version_outside_the_range_is_left_alone_and_reported(self, tmp_path):
        report = install_missing(requirements(tmp_path, "torch<0.1\n"))
        assert report.outside == {"torch": "<0.1"}
        assert "torch was left as it is, outside <0.1." in str(report)

    def test_a_change_that_happens_all_the_same_is_an_error(self, tmp_path, monkeypatch):
        snapshots = iter([{"a": "1"}, {"a": "2", "seedling": "1"}])
        monkeypatch.setattr(module, "installed_versions", lambda: next(snapshots))
        monkeypatch.setattr(module, "_pip_install", lambda *a: None)
        with pytest.raises(InstallError, match="changed packages that were there before: a 1 -> 2") as caught:
            install_missing(requirements(tmp_path, "seedling\n"))
        assert "Restart the runtime" in str(caught.value)

    def test_a_time_limit(self, tmp_path, monkeypatch, index):
        with pytest.raises(InstallError, match=r"Installing no-such-seed took longer than 0 s\."):
            install_missing(requirements(tmp_path, "no-such-seed\n"), timeout=0.01)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(InstallError, match=r"absent\.txt cannot be read \(No such file or directory\)"):
            install_missing(tmp_path / "absent.txt")

    def test_a_line_that_is_no_requirement(self, tmp_path):
        with pytest.raises(InstallError, match="has the line '-r other', which is not a requirement"):
            install_missing(requirements(tmp_path, "-r other\n"))


def test_report_is_html_safe():
    report = InstallReport({"<b>": "1"}, {}, {}, 1, 0.0)
    assert "<b>" not in report._repr_html_().removeprefix("<p>")
