"""Everything that edgestill refuses or fails at, as one tree; each names what, where, what next."""

from __future__ import annotations


class EdgestillError(Exception):
    """A failure that a person can act on: `message` says what and where, `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint is not None:
            self.add_note(f"hint: {hint}")  # what Python prints below an error that nobody caught


class UsageError(EdgestillError):
    """The command line or the arguments of a call make no sense together."""

    exit_code = 2


class WireError(EdgestillError):
    """Bytes that are not a safetensors file within the limits."""


class BundleError(EdgestillError):
    """A bundle that is damaged, tampered with, or of another format."""


class StateError(EdgestillError):
    """A state file that does not fit the bundle or the run."""


class DataError(EdgestillError):
    """Images, labels or archives that cannot be used with the bundle."""


class EngineError(EdgestillError):
    """An engine that is not installed, not in the bundle, or failed."""


class TrainingError(EdgestillError):
    """A run that cannot go on, for example because its loss is not finite; `kept` says which file holds what of it,
    `what` is the message without it, for who removes that file."""

    def __init__(self, message: str, hint: str | None = None, kept: str = "") -> None:
        super().__init__(message + kept, hint)
        self.what, self.kept = message, kept


class Interrupted(EdgestillError):
    """A run stopped by a signal after it wrote its checkpoint."""
