"""A stand-in for Colab's own package, whose parts do what a test tells them to."""

import sys
import types

import pytest


@pytest.fixture
def colab(monkeypatch):
    """Return a stub of google.colab: set `colab.drive.mount`, `colab.userdata.get` or `colab.output.eval_js`."""
    google, stub = types.ModuleType("google"), types.ModuleType("google.colab")
    google.__path__, stub.__path__ = [], []
    google.colab = stub
    stub.__spec__ = types.SimpleNamespace(name="google.colab", submodule_search_locations=[])
    for name in ("drive", "userdata", "output"):
        module = types.ModuleType(f"google.colab.{name}")
        setattr(stub, name, module)
        monkeypatch.setitem(sys.modules, f"google.colab.{name}", module)
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", stub)
    return stub
