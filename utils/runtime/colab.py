"""Colab: which model a notebook was opened for, and installing what is missing without changing what is there.

Colab has numpy loaded before the first cell, so replacing a preinstalled package on disk breaks the live kernel. Hence
`install_missing` pins every installed version as a constraint and compares all versions afterwards.
"""

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from utils.runtime.errors import SeedbedError

BROWSER_SECONDS = 3.0


class InstallError(SeedbedError):
    """The missing packages could not be installed, or installing them changed others."""


def in_colab() -> bool:
    """Return whether this process is a Colab kernel."""
    try:
        return importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class Choice:
    """A value and where it came from."""

    value: str
    """What was chosen."""
    source: str
    """Which place decided."""

    def __str__(self) -> str:
        """Say both."""
        return f"{self.value} (from {self.source})"

    def to_dict(self) -> dict[str, str]:
        """Return both as plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """Return both for a notebook."""
        return f"<p>Model: <code>{escape(self.value)}</code>, from {escape(self.source)}</p>"


def choose_reference(
    form_value: str | None = None, environment: str = "SEEDBED_MODEL", default: str = "example:gpt"
) -> Choice:
    """Choose a model reference: the form field, then the environment, then the page's address, then the default.

    Colab gives a notebook no supported way to read its own address; that step is a guarded attempt which can only fill
    a gap, takes at most three seconds and is not made outside Colab.

    Args:
        form_value: What the user typed into the notebook's form, empty for nothing.
        environment: Name of the environment variable.
        default: What to use when nothing else says.
    """
    if form_value and form_value.strip():
        return Choice(form_value.strip(), "the form field")
    if value := os.environ.get(environment, "").strip():
        return Choice(value, f"the environment variable {environment}")
    if value := _reference_in_page():
        return Choice(value, "the address of this page")
    return Choice(default, "the built-in default; paste a link into the form to use another")


def _reference_in_page() -> str:
    """Return the Gist id in the address of the Colab page or its referrer, or an empty string."""
    if not in_colab() or threading.current_thread() is not threading.main_thread():
        return ""
    try:
        from google.colab import output

        with _time_limit(BROWSER_SECONDS):
            text = output.eval_js("(() => document.location.href + ' ' + document.referrer)()")
    except Exception:  # an unsupported read: any failure means that the page did not say
        return ""
    match = re.search(r"(?:[?&#](?:gist|gist_id|model)=|/gist/[\w.-]+/)([0-9a-f]{20,40})(?![0-9a-zA-Z])", str(text))
    return match.group(1) if match else ""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt a block of the main thread with TimeoutError; a thread would be left behind polling the kernel."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def canonical_name(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Return the version of every installed distribution, by canonical name; the first on the path counts."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonical_name(name), distribution.version)
    return dict(sorted(versions.items()))


def changed_packages(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the distributions of `before` that differ in `after`, each with both versions ("absent" when removed)."""
    return {
        name: (version, after.get(name, "absent"))
        for name, version in before.items()
        if after.get(name, "absent") != version
    }


@dataclass(frozen=True)
class InstallReport:
    """What an installation did to the environment."""

    added: dict[str, str]
    """Distributions that are new, with their versions."""
    changed: dict[str, tuple[str, str]]
    """Distributions that were there before and are not the same; always empty in a report that was returned."""
    kept: dict[str, str]
    """Requirements that were met already, with the installed versions."""
    preinstalled: int
    """How many distributions were compared."""
    seconds: float
    """How long it took."""
    outside: dict[str, str] = field(default_factory=dict)
    """Requirements installed in a version outside the asked range, left as they are, with the range."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """Say it in a sentence or two."""
        new = ", ".join(f"{name} {version}" for name, version in self.added.items()) or "nothing"
        text = f"Installed {new} in {self.seconds:.0f} s."
        text += f" {self.preinstalled} packages were there before; {len(self.changed)} of them changed."
        for name, wanted in self.outside.items():
            text += f" {name} was left as it is, outside {wanted}."
        return text

    def _repr_html_(self) -> str:
        """Return the same words for a notebook."""
        return f"<p>{escape(str(self))}</p>"


def install_missing(requirements_file: str | Path, timeout: float = 900.0) -> InstallReport:
    """Install what a requirements file names and this environment lacks; nothing that is installed changes.

    Args:
        requirements_file: One requirement per line; comments and empty lines are skipped.
        timeout: Seconds after which the installation is given up.

    Raises:
        InstallError: The file cannot be read, the packages cannot be installed, or an installed one changed.
    """
    start = time.monotonic()
    before = installed_versions()
    missing, kept, outside = _missing_requirements(Path(requirements_file), before)
    if missing:
        _pip_install(missing, before, timeout)
        importlib.invalidate_caches()
    after = installed_versions()
    changed = changed_packages(before, after)
    if changed:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        raise InstallError(
            f"Installing {', '.join(missing)} changed packages that were there before: {listed}.",
            "No installed package may change under a running kernel.",
            "Restart the runtime before going on, and report this.",
        )
    added = {name: version for name, version in after.items() if name not in before}
    return InstallReport(added, changed, kept, len(before), time.monotonic() - start, outside)


def _missing_requirements(path: Path, installed: Mapping[str, str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Split a requirements file into what is missing, what is met and what is installed outside its range."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InstallError(
            f"The requirements file {path} cannot be read ({error.strerror}).",
            "Expected a text file with one requirement per line.",
            "Run the first cell again: it fetches Seedbed's files.",
        ) from error
    missing: list[str] = []
    kept: dict[str, str] = {}
    outside: dict[str, str] = {}
    for line in lines:
        text = line.split("#")[0].strip()
        if not text:
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise InstallError(
                f"{path.name} has the line {text!r}, which is not a requirement.",
                "Expected a name with bounds, for example optuna>=4,<6.",
            ) from error
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name = canonical_name(requirement.name)
        if name not in installed:
            missing.append(text)
        elif requirement.specifier.contains(installed[name], prereleases=True):
            kept[name] = installed[name]
        else:
            outside[name] = str(requirement.specifier)
    return missing, kept, outside


def _pip_install(missing: list[str], installed: Mapping[str, str], timeout: float) -> None:
    """Run pip with every installed version as a constraint."""
    from packaging.version import InvalidVersion, Version

    pins = []
    for name, version in installed.items():
        try:
            Version(version)
        except InvalidVersion:
            continue  # pip refuses a constraint that it cannot parse, and could not replace such a package by accident
        pins.append(f"{name}=={version}\n")
    action = "Check that this machine reaches the package index, then run the cell again."
    with tempfile.TemporaryDirectory(prefix="seedbed-") as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("".join(pins), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--upgrade-strategy", "only-if-needed", "--constraint", str(constraints), *missing]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise InstallError(
                f"Installing {', '.join(missing)} took longer than {timeout:.0f} s.", "", action
            ) from error
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        detail = " ".join((errors or result.stderr.splitlines() or ["pip gave no reason."])[-2:])
        raise InstallError(
            f"Installing {', '.join(missing)} failed: {detail}",
            "Everything that was installed before is unchanged.",
            action,
        )
