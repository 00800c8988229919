"""Errors a user can act on."""


class PCDVQError(ValueError):
    """Bad input; the message names the value, the limit and the remedy."""


class CheckpointError(PCDVQError):
    """A checkpoint that cannot be served."""
