"""Keeps a process off the network and remembers which code asked for it."""

from __future__ import annotations

import ipaddress
import socket
import sys
import traceback
from pathlib import Path

import pcdvq_kernels

import vllm_pcdvq

OURS = tuple(Path(package.__file__).parent for package in (pcdvq_kernels, vllm_pcdvq))
_attempts: list[tuple[str, list[str]]] = []


def install() -> None:
    """From now on only this machine can be reached from Python code of this process."""
    sys.addaudithook(_refuse)


def attempts_of_ours() -> list[str]:
    """What the plugin or the kernels wanted from elsewhere."""
    return [what for what, files in _attempts if any(Path(file).parent in OURS for file in files)]


def blocks_others() -> bool:
    """Whether an attempt to connect and one to look a name up fail."""
    failures = 0
    for attempt in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("example.com", 80),
    ):
        try:
            attempt()
        except OSError as error:
            failures += "no network" in str(error)
    return failures == 2


def _refuse(event: str, args: tuple) -> None:
    if event == "socket.connect":
        host = args[1][0] if isinstance(args[1], tuple) else None  # else a path
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if not _is_local(host):
        files = [frame.filename for frame in traceback.extract_stack()]
        _attempts.append((f"{event} {host}", files))
        raise OSError(f"no network in tests: {event} {host}")


def _is_local(host: object) -> bool:
    if host in (None, "", b"", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
