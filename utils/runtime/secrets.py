"""Secrets: from Colab's key store or the environment, never shown, never required."""

import os
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Secret:
    """A secret, or the reason why there is none. Neither its text nor its HTML ever shows the value."""

    name: str
    """What it is called in the key store and the environment."""
    value: str | None = field(default=None, repr=False)
    """The secret itself."""
    source: str = "nowhere"
    """Where it came from."""
    reason: str = ""
    """Why a place that was asked did not have it."""

    def __bool__(self) -> bool:
        """Return whether there is a value."""
        return bool(self.value)

    def __str__(self) -> str:
        """Say where the secret came from."""
        found = f"{self.name} from {self.source}" if self else f"{self.name} not set"
        return found + (f" ({self.reason})" if self.reason else "")

    def to_dict(self) -> dict[str, str | bool]:
        """Return everything but the value."""
        return {"name": self.name, "set": bool(self), "source": self.source, "reason": self.reason}

    def _repr_html_(self) -> str:
        """Return the same words for a notebook."""
        return f"<p>{escape(str(self))}</p>"


def find_secret(name: str) -> Secret:
    """Look for a secret in Colab's key store, then in the environment; going without one is always possible.

    Args:
        name: For example ``"HF_TOKEN"``.

    Returns:
        The secret, or an empty one whose reason says what happened.
    """
    value, reason = _from_colab(name)
    if value:
        return Secret(name, value, "Colab's secrets")
    if value := os.environ.get(name, "").strip():
        return Secret(name, value, "the environment", reason)
    return Secret(name, None, "nowhere", reason)


def _from_colab(name: str) -> tuple[str | None, str]:
    """Ask Colab's key store; return the value, or why there is none."""
    try:
        from google.colab import userdata
    except ImportError:
        return None, ""
    # The three exceptions share no base of their own, and which exist depends on the runtime's age: tell them by name.
    reasons = {
        "SecretNotFoundError": "Colab has no secret of this name",
        "NotebookAccessError": "this notebook may not read it: switch on its access in the Secrets panel",
        "TimeoutException": "Colab did not answer; secrets need the notebook open in a browser",
    }
    try:
        value = userdata.get(name)
    except Exception as error:
        kind = type(error).__name__
        return None, reasons.get(kind, f"Colab's secrets failed with {kind}")
    return (value.strip(), "") if value and value.strip() else (None, "Colab's secret of this name is empty")
