"""Errors that a user can act on: what was found, what was expected, what to do.

Every error that Seedbed raises on purpose is a `SeedbedError`; anything else that escapes is a bug.
"""


class SeedbedError(Exception):
    """Base of all errors raised on purpose."""

    def __init__(self, found: str, expected: str = "", action: str = "") -> None:
        """Join up to three sentences into the one-paragraph message that the user reads.

        Args:
            found: What was found.
            expected: What was expected instead.
            action: What to do about it.
        """
        self.found, self.expected, self.action = found, expected, action
        super().__init__(" ".join(part for part in (found, expected, action) if part))


class ModelReferenceError(SeedbedError):
    """A model reference (link, path, name) that cannot be understood or does not exist."""


class FetchError(SeedbedError):
    """A model's files could not be fetched over the network."""


class AuditError(SeedbedError):
    """Source code does something that needs the user's consent first."""


class InstantiationError(SeedbedError):
    """Source code was read, but no model could be built from it."""


class AdapterError(SeedbedError):
    """It could not be found out how to call a model."""


class ConfigError(SeedbedError):
    """A setting is unknown, out of range or in conflict with another."""


class DataError(SeedbedError):
    """Data that is missing, empty or does not fit the model."""


class CheckpointError(SeedbedError):
    """A checkpoint cannot be written, or what is on disk cannot be trusted."""


class RunError(SeedbedError):
    """A run directory that is missing, half-written or belongs to another model."""


class ExportError(SeedbedError):
    """A model cannot be exported as asked."""


class MissingPackageError(SeedbedError, ImportError):
    """An optional package is needed for this call and is not installed."""
