"""Secrets are found in order, and never shown."""

import pytest

from utils.runtime.secrets import Secret, find_secret

VALUE = "hf_very-secret"


def raising(kind):
    def get(name):
        raise type(kind, (Exception,), {})(f"{name}: {VALUE}")

    return get


def test_colab_comes_first(colab, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "other")
    colab.userdata.get = lambda name: f" {VALUE}\n" if name == "HF_TOKEN" else None
    secret = find_secret("HF_TOKEN")
    assert (secret.value, secret.source) == (VALUE, "Colab's secrets")
    assert secret


def test_the_environment_comes_second(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    assert find_secret("HF_TOKEN") == Secret("HF_TOKEN", VALUE, "the environment")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("SecretNotFoundError", "Colab has no secret of this name"),
        ("NotebookAccessError", "this notebook may not read it: switch on its access in the Secrets panel"),
        ("TimeoutException", "Colab did not answer; secrets need the notebook open in a browser"),
        ("ValueError", "Colab's secrets failed with ValueError"),
    ],
)
def test_every_failure_of_colab_is_a_reason_and_the_environment_still_counts(colab, monkeypatch, kind, reason):
    colab.userdata.get = raising(kind)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    secret = find_secret("HF_TOKEN")
    assert not secret
    assert secret.reason == reason
    assert str(secret) == f"HF_TOKEN not set ({reason})"
    monkeypatch.setenv("HF_TOKEN", VALUE)
    assert find_secret("HF_TOKEN").value == VALUE


def test_an_empty_secret_counts_as_none(colab, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "  ")
    colab.userdata.get = lambda name: ""
    secret = find_secret("HF_TOKEN")
    assert secret.value is None
    assert secret.reason == "Colab's secret of this name is empty"


def test_the_value_is_never_shown(colab, monkeypatch):
    colab.userdata.get = lambda name: VALUE
    secret = find_secret("HF_TOKEN")
    for text in (repr(secret), str(secret), secret._repr_html_(), str(secret.to_dict())):
        assert VALUE not in text
        assert "HF_TOKEN" in text
    colab.userdata.get = raising("ValueError")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert VALUE not in str(find_secret("HF_TOKEN").to_dict())
