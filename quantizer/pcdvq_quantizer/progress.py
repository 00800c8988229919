"""Reporting how far a run is."""

from __future__ import annotations

from collections.abc import Callable


class Progress:
    """Told by a run what it does; this one keeps it to itself, the command line draws bars."""

    def start(self, what: str, total: int) -> None:
        """A phase of `total` steps begins."""

    def advance(self, steps: int) -> None:
        """`steps` of the phase are done."""

    def note(self, text: str) -> None:
        """Something the user should know, but need not act on."""


class Notes(Progress):
    """Passes on notes, and nothing else."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def note(self, text: str) -> None:
        self._tell(text)
