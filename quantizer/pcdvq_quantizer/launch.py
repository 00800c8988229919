"""Starting processes that work together, and ending all of them when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from pcdvq_kernels.errors import PCDVQError

from pcdvq_quantizer.calibration.parallel import Processes, cores
from pcdvq_quantizer.progress import Progress

# Others may wait for what process 0 does alone, such as to write text; a failure ends all at once.
TIMEOUT = timedelta(days=7)


# A process that is killed loses its connections first: the others may fail, with gloo's
# RuntimeError, before its end is seen.
DEATH_SECONDS = 20


@dataclass(frozen=True)
class _Task:
    """What each process does: `run(processes, progress, *arguments)`."""

    run: Callable[..., None]
    arguments: tuple[Any, ...]
    store: str  # the file by which they find each other


def launch(
    count: int, run: Callable[..., None], arguments: tuple[Any, ...], progress: Progress
) -> None:
    """Call `run(processes, progress, *arguments)` in `count` new processes.

    They share the cores, unless OMP_NUM_THREADS says how many threads each has.

    Args:
        run: can be imported by its name.
        arguments: can be pickled.
        progress: is told what process 0 does.

    Raises:
        Exception: what the first that failed raised; its traceback there is a note.
        PCDVQError: one was killed.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    with tempfile.TemporaryDirectory() as directory:
        task = _Task(run, arguments, f"{directory}/store")
        try:
            with _interrupts_blocked():
                for rank in range(count):
                    reader, writer = context.Pipe(duplex=False)
                    given = Processes(rank, count), task, writer
                    worker = context.Process(target=_work, args=given)
                    worker.start()
                    workers[reader] = worker
                    writer.close()
            _watch(dict(workers), progress)
        finally:
            for worker in workers.values():
                worker.kill()
                worker.join()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started here never see Ctrl-C, which is for the launcher."""
    resource_tracker.ensure_running()  # or the first process started would end the blocking
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _watch(workers: dict[Connection, SpawnProcess], progress: Progress) -> None:
    """Pass on what `workers` say until they end."""
    while workers:
        for reader in wait(list(workers)):
            assert isinstance(reader, Connection)
            try:
                message = reader.recv()
            except EOFError:
                worker = workers.pop(reader)
                worker.join()
                _raise_death([worker])
                continue
            if isinstance(message, Exception):
                _raise_death(workers.values(), DEATH_SECONDS * isinstance(message, RuntimeError))
                raise message
            method, *values = message
            getattr(progress, method)(*values)


def _raise_death(workers: Iterable[SpawnProcess], seconds: float = 0) -> None:
    """Raise PCDVQError if one of `workers` was killed, or is within `seconds`."""
    sentinels = {worker.sentinel: worker for worker in workers}
    end = time.monotonic() + seconds
    while sentinels:
        ended = wait(list(sentinels), max(0.0, end - time.monotonic()))
        if not ended:
            return
        for sentinel in ended:
            assert isinstance(sentinel, int)
            worker = sentinels.pop(sentinel)
            worker.join()
            if worker.exitcode:
                raise PCDVQError(
                    f"one of the processes ended with exit code {worker.exitcode} (killed, for "
                    "want of memory?); the same command continues, also with fewer --processes"
                ) from None


class _Sent(Progress):
    """Reports through a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def start(self, what: str, total: int) -> None:
        self._pipe.send(("start", what, total))

    def advance(self, steps: int) -> None:
        self._pipe.send(("advance", steps))

    def note(self, text: str) -> None:
        self._pipe.send(("note", text))


def _work(processes: Processes, task: _Task, pipe: Connection) -> None:
    """What a process of `launch` does."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // processes.count))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other machine is to connect
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{task.store}",
            rank=processes.rank,
            world_size=processes.count,
            timeout=TIMEOUT,
        )
        progress = _Sent(pipe) if processes.rank == 0 else Progress()
        task.run(processes, progress, *task.arguments)
        dist.destroy_process_group()
    except Exception as error:
        error.add_note(traceback.format_exc())
        pipe.send(error)
        # Until the launcher ends all: the others would fail, too, were this one gone.
        time.sleep(TIMEOUT.total_seconds())


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    wait([launcher.sentinel])
    os._exit(1)
