"""Errors whose text says what was expected, what arrived and what to do."""


class SO8TError(Exception):
    """Root of every error raised on purpose by this library; ``exit_code`` is the command's exit status."""

    exit_code: int = 1


class ShapeError(SO8TError, ValueError):
    """A tensor has the wrong shape."""


class BackendError(SO8TError, RuntimeError):
    """The requested backend cannot run this call; the text lists every reason."""


class ConfigError(SO8TError, ValueError):
    """A configuration is unknown, contradictory or unreadable."""


class AdapterError(SO8TError, ValueError):
    """An adapter cannot be installed, loaded, merged or baked as asked."""


class DataError(SO8TError, ValueError):
    """A data file breaks its contract; the text names file and line."""


class TrainingError(SO8TError, RuntimeError):
    """Training cannot start or continue: nothing to train, no gradient, non-finite loss."""


class CheckpointError(SO8TError, ValueError):
    """A checkpoint is damaged, incomplete, of another run, or cannot be written."""


class DomainError(SO8TError, ValueError):
    """A value lies outside the set on which the operation is defined."""
