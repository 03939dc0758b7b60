"""Create the environment that `.venv` links to, or find it: `python tools/environment.py [dev|replica|browser]`.

Unusual here: environments live outside the checkout, one for each set of pins, so that several checkouts share them and
a second run costs nothing. A virtual environment cannot be moved, hence no temporary name: it is built in place under a
lock, and only the stamp written last makes it valid. The file needs the standard library alone, and its syntax is that
of Python 3.6, so that an old interpreter gets as far as saying that it is too old.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from typing import Callable, Optional

OLDEST = (3, 10)
# Below this, constraints.txt asks for versions that were never published.
CONSTRAINED = (3, 11)
STAMP = "complete"
LOG = "install.log"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class EnvironmentFailure(Exception):
    """An environment cannot be made; the text says why and what to do."""


def requirement_files(kind: str, root: str = ROOT, version: tuple = sys.version_info) -> tuple:
    """Return the requirement files and the constraint files of a kind of environment."""
    if kind == "replica":
        return [os.path.join(root, "tests", "colab", "replica.txt")], []
    if kind == "browser":
        return [os.path.join(root, "tests", "ui", "lab.txt")], []
    constraints = [os.path.join(root, "constraints.txt")] if version[:2] >= CONSTRAINED else []
    names = ["requirements-training.txt", "requirements-memory.txt", "requirements-dev.txt"]
    return [os.path.join(root, name) for name in names], constraints


def cache_directory() -> str:
    """Return the folder that holds all environments."""
    base = os.environ.get("SEEDBED_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "seedbed")
    return os.path.join(os.path.abspath(os.path.expanduser(base)), "environments")


def digest(files: list) -> str:
    """Return a short hash of the pins and of the interpreter that they are installed for."""
    total = hashlib.sha256()
    total.update(repr((sys.implementation.name, sys.version_info[:3], platform.machine(), sys.base_prefix)).encode())
    for path in files:
        with open(path, "rb") as stream:
            total.update(stream.read())
        total.update(b"\0")
    return total.hexdigest()[:12]


def python_in(directory: str) -> str:
    """Return the path of an environment's interpreter."""
    return os.path.join(directory, "bin", "python")


def is_complete(directory: str) -> bool:
    """Return whether an environment was built to the end and its interpreter still exists."""
    return os.path.isfile(os.path.join(directory, STAMP)) and os.path.exists(python_in(directory))


class Lock:
    """A lock between processes; the system releases it when its holder dies."""

    def __init__(self, path: str, say: Callable) -> None:
        self.say, self.stream = say, open(path, "w")  # noqa: SIM115 (held until __exit__)

    def __enter__(self) -> "Lock":
        import fcntl

        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.say("Another process is building this environment; waiting for it.")
            fcntl.flock(self.stream, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


class Progress:
    """The seconds so far and the present step: in place on a terminal, a line every twenty seconds elsewhere."""

    def __init__(self) -> None:
        self.start = time.time()
        self.terminal = sys.stdout.isatty()
        self.text = ""
        self.ended = threading.Event()
        # pip is silent for a minute at a time while it unpacks; the clock must go on.
        self.ticker = threading.Thread(target=self._tick, daemon=True)
        self.ticker.start()

    def show(self, text: str) -> None:
        """Name the present step."""
        self.text = text

    def _tick(self) -> None:
        while not self.ended.wait(1 if self.terminal else 20):
            line = "{:4.0f} s  {}".format(time.time() - self.start, self.text)[:100]
            sys.stdout.write("\r" + line.ljust(100) if self.terminal else line + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Stop, and clear the line."""
        self.ended.set()
        self.ticker.join()
        if self.terminal:
            sys.stdout.write("\r" + " " * 100 + "\r")
            sys.stdout.flush()


def explain(log: str) -> str:
    """Turn a failed pip run into one paragraph."""
    with open(log, encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    errors = [line.strip() for line in text.splitlines() if line.startswith("ERROR") or "No space left" in line]
    found = " ".join(errors[-3:]) or "pip gave no reason."
    if "No space left" in text:
        advice = "Free some disk space, or set SEEDBED_CACHE to a folder on a larger disk, and run the command again."
    elif any(sign in text for sign in ("NewConnectionError", "ConnectTimeout", "Name or service", "Max retries")):
        advice = "The package index was not reached: check the network and run the command again."
    else:
        advice = "Check the versions it names against this Python ({}).".format(platform.python_version())
    return "Installing the packages failed. {} {} The whole output is in {}.".format(found, advice, log)


def run_logged(command: list, log: str, progress: Progress, label: str) -> int:
    """Run a command, keep its output in a file and show its latest steps; return its exit status."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONUNBUFFERED="1")
    environment.pop("PYTHONPATH", None)
    with open(log, "a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            universal_newlines=True,
            errors="replace",
        )
        progress.show(label)
        assert process.stdout is not None
        for line in process.stdout:
            stream.write(line)
            word = line.split(" ", 1)[0].strip()
            if word in ("Collecting", "Downloading", "Using", "Building"):
                progress.show(" ".join(line.split())[:80])
            elif word == "Installing":
                progress.show("Installing the collected packages")
    return process.wait()


def build(directory: str, files: list, constraints: list, say: Callable) -> None:
    """Build an environment in place; the stamp comes last."""
    if os.path.isdir(directory):
        say("Removing an environment that was not finished.")
        shutil.rmtree(directory)
    progress = Progress()
    try:
        log = directory + "." + LOG
        open(log, "w").close()
        # A process that itself runs in an environment must not hand it on: base the new one on the interpreter below.
        python = getattr(sys, "_base_executable", None) or sys.executable
        if run_logged([python, "-m", "venv", directory], log, progress, "Creating the environment") != 0:
            raise EnvironmentFailure(
                "Python's venv module could not create an environment in {}. On Debian and Ubuntu it is a package of "
                "its own: apt-get install python3-venv. The whole output is in {}.".format(directory, log)
            )
        command = [python_in(directory), "-m", "pip", "install", "--progress-bar", "off"]
        for path in files:
            command += ["-r", path]
        for path in constraints:
            command += ["-c", path]
        if run_logged(command, log, progress, "Asking the package index") != 0:
            raise EnvironmentFailure(explain(log))
        os.replace(log, os.path.join(directory, LOG))
        stamp = os.path.join(directory, STAMP)
        with open(stamp + ".tmp", "w") as stream:
            stream.write("{:.0f} s\n".format(time.time() - progress.start))
        os.replace(stamp + ".tmp", stamp)
    finally:
        progress.close()


def ensure(kind: str = "dev", root: str = ROOT, say: Callable = print) -> str:
    """Return the directory of the environment for a kind, building it when there is none."""
    files, constraints = requirement_files(kind, root)
    base = cache_directory()
    directory = os.path.join(base, "{}-{}".format(kind, digest(files + constraints)))
    if is_complete(directory):
        return directory
    try:
        os.makedirs(base, exist_ok=True)
        lock = Lock(directory + ".lock", say)
    except OSError as error:
        raise EnvironmentFailure(
            "The folder for environments, {}, cannot be written ({}). Set SEEDBED_CACHE to a folder that can.".format(
                base, error.strerror
            )
        ) from error
    with lock:
        if is_complete(directory):
            return directory
        say("Building the {} environment, once; this takes a few minutes.".format(kind))
        if kind == "dev" and not constraints:
            say("This Python is older than the tested pins, so versions are chosen anew.")
        build(directory, files, constraints, say)
        return directory


def link(directory: str, root: str = ROOT) -> None:
    """Make `.venv` in the checkout a link to an environment."""
    path = os.path.join(root, ".venv")
    if os.path.islink(path) and os.readlink(path) == directory:
        return
    if os.path.exists(path) and not os.path.islink(path):
        raise EnvironmentFailure(
            "{} exists and is not a link, so Seedbed did not make it and leaves it alone. Move it away or remove it, "
            "and run the command again.".format(path)
        )
    temporary = "{}.tmp-{}".format(path, os.getpid())
    os.symlink(directory, temporary)
    os.replace(temporary, path)


def check_python(version: tuple = sys.version_info) -> None:
    """Refuse a Python that is too old, with what to do."""
    if tuple(version[:2]) < OLDEST:
        raise EnvironmentFailure(
            "This is Python {}.{}. Seedbed needs Python {}.{} or newer. Install one and name it: "
            "make test PYTHON=python3.11".format(version[0], version[1], OLDEST[0], OLDEST[1])
        )


def main(arguments: Optional[list] = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Create or find an environment of Seedbed.")
    parser.add_argument("kind", nargs="?", default="dev", choices=("dev", "replica", "browser"))
    parser.add_argument("--root", default=ROOT, help="the checkout (default: this one)")
    options = parser.parse_args(arguments)
    try:
        check_python()
        directory = ensure(options.kind, os.path.abspath(options.root))
        if options.kind == "dev":
            link(directory, os.path.abspath(options.root))
        else:
            print(directory)
    except EnvironmentFailure as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the next run starts this environment anew.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
