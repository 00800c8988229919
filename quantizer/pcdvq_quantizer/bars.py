"""Progress bars of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TaskID, TextColumn

from pcdvq_quantizer.progress import Progress

if TYPE_CHECKING:
    from pcdvq_quantizer.finetune import Step


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


@contextmanager
def finetune_bar(console: Console, steps: int) -> Iterator[Callable[[Step], None]]:
    """A bar for a fine-tuning run of so many steps; gives what to call after each of them."""
    columns = (*RichProgress.get_default_columns(), TextColumn("{task.fields[figures]}"))
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task("Fine-tuning", total=steps, figures="loading")

        def show(step: Step) -> None:
            bar.update(
                task,
                completed=step.done,
                total=step.total,
                figures=f"KL {step.kl:.4f}, hold-out {step.holdout_kl:.4f}, "
                f"{step.tokens_per_second:.0f} tokens/s",
            )

        yield show
