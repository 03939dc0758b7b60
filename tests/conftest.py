"""What every test may rely on: one thread, no network beyond this machine, and the shared data where there is any."""

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data sets (../shared/data) are not on this machine")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep torch on one thread: timings vary less, and two busy threads on two busy cores are far slower than one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Let Ctrl-C reach the tests of it: a shell starts what it puts into the background with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_loopback(address) -> bool:
    """Return whether a socket address stays on this machine."""
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    """Fail at once when a test reaches beyond loopback; tests marked ``network`` or ``replica`` may, in processes."""
    if request.node.get_closest_marker("network") or request.node.get_closest_marker("replica"):
        return
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(original):
        def call(self, address):
            if not is_loopback(address):
                raise AssertionError(f"This test reached for {address!r}; only loopback is allowed.")
            return original(self, address)

        return call

    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Hide the environment variables that would steer Seedbed."""
    for name in list(os.environ):
        if name.startswith("SEEDBED_") and name != "SEEDBED_CACHE":
            monkeypatch.delenv(name)


def pytest_collection_modifyitems(items):
    """Skip GPU tests on machines without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def run_python(tmp_path):
    """Return a function that runs code in a fresh interpreter, with some modules made impossible to import."""

    def run(code: str, blocked: tuple[str, ...] = (), cwd: Path = ROOT, check: bool = True, **environment: str):
        prelude = f"""
            import sys

            class Block:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] in {set(blocked)!r}:
                        raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)

            sys.meta_path.insert(0, Block())
        """
        script = tmp_path / "script.py"
        script.write_text((textwrap.dedent(prelude) if blocked else "") + textwrap.dedent(code), encoding="utf-8")
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        result = subprocess.run(
            [sys.executable, str(script)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=250
        )
        if check:
            assert result.returncode == 0, result.stderr[-4000:]
        return result

    return run


REHEARSING = ("tests/runtime", "test_containment", "test_bad_input", "test_model_adapter", "test_main")
"""Modules whose tests need the rehearsal that comes before a model's first pass."""


@pytest.fixture(autouse=True)
def without_rehearsal(request, monkeypatch):
    """Make adapters without copying this process first: harmless models by the thousand need no rehearsal."""
    if not any(part in request.module.__name__ or part in str(request.path) for part in REHEARSING):
        monkeypatch.setattr("utils.adapters.model_adapter.rehearse_once", lambda *_, **__: None)
