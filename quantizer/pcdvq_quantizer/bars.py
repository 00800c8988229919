"""Progress bars of the command line."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TaskID

from pcdvq_quantizer.progress import Progress


class Bars(Progress):
    """Draws a bar for each phase; a context manager."""

    def __init__(self, console: Console, transient: bool = False) -> None:
        self._bars = RichProgress(console=console, transient=transient)
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def start(self, what: str, total: int) -> None:
        self._task = self._bars.add_task(what, total=total)

    def advance(self, steps: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def note(self, text: str) -> None:
        self._bars.console.print(text, highlight=False)
