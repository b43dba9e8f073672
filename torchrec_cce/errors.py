"""The exceptions that a caller may want to catch. Each is also the builtin that it specialises."""


class CCEError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(CCEError, ValueError):
    """A table, training or job configuration that cannot work."""


class InvalidIDError(CCEError, ValueError):
    """A raw ID that its table cannot hold: negative, beyond `num_embeddings`, or not an integer."""


class MapMismatchError(CCEError, ValueError):
    """Weights and an index-pointer map that were not made for each other."""


class MapFileError(CCEError, ValueError):
    """A map file that is not whole, not a map, or not what its digest says."""


class RegistryError(CCEError, OSError):
    """A registry that cannot be reached or does not hold what was asked for. Nothing was changed."""


class PublishConflictError(RegistryError):
    """Somebody else changed the registry first. Nothing was changed; the message says what is current now."""


class ClusteringError(CCEError, ValueError):
    """Embeddings that cannot be clustered: NaN or infinite."""


class DivergedError(CCEError, ArithmeticError):
    """Training that came to numbers that are none: a loss or weights that are NaN or infinite."""

    result: object = None
    """What the run had come to until then: a `RunResult`."""


class GradientError(CCEError, ArithmeticError):
    """Gradients that no row can be trained on: NaN, infinite, or with an infinite square. No row was changed."""


class JobError(CCEError, RuntimeError):
    """A job whose workers did not finish: one was killed or ran out of memory. Nothing was changed.

    Also a folder that another process writes to, or has taken over.
    """


class DataFileError(CCEError, ValueError):
    """A data file that cannot be read as described; the message starts with `path:line:` where there is a line."""


class MissingExtraError(CCEError, ImportError):
    """An optional dependency that is not installed; the message names the extra to install."""
