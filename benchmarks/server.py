"""Starting and stopping a real `vllm serve`, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from pcdvq_quantizer.serving import vllm_command, vllm_environment

READY_POLL_SECONDS = 0.5


class ServerError(RuntimeError):
    """The server ended or did not get ready; the message holds the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        base_url: of its OpenAI API, ending in /v1.
        pid: of its first process.
        command: what started it.
        log: its output.
        ready_seconds: time from start to ready.
    """

    base_url: str
    pid: int
    command: list[str]
    log: Path
    ready_seconds: float


@contextmanager
def running_server(
    model: Path,
    log: Path,
    arguments: Sequence[str] = (),
    timeout: float = 600.0,
    quantization: str | None = "pcdvq",
) -> Iterator[Server]:
    """Run `vllm serve MODEL --quantization pcdvq ARGUMENTS` on a free port until the block ends.

    Args:
        model: checkpoint directory.
        log: file for the server's output.
        arguments: more arguments of `vllm serve`.
        timeout: seconds to wait for readiness.
        quantization: another method, or None for the one that the model's configuration names.

    Raises:
        ServerError: it ended or was not ready in time.
    """
    port = _free_port()
    command = vllm_command(str(model), ["--port", str(port), *arguments], quantization)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(),
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log, started + timeout)
        ready = time.monotonic() - started
        yield Server(f"http://127.0.0.1:{port}/v1", process.pid, command, log, ready)
    finally:
        _stop(process)


def server_environment() -> dict[str, str]:
    """That of `pcdvq serve`, with little memory for the KV cache."""
    environment = vllm_environment()
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return environment


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with {process.returncode}:\n{log_tail(log)}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(READY_POLL_SECONDS)
    raise ServerError(f"vllm serve was not ready in time:\n{log_tail(log)}")


def log_tail(log: Path, lines: int = 40) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen) -> None:
    """Stop the server and the engine processes it started."""
    for signal_number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
