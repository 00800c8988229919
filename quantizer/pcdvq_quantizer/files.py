"""Files that appear whole or not at all, and only where nothing of the user's is."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcdvq_kernels.errors import PCDVQError
from safetensors.torch import save_file
from torch import Tensor

SCRATCH_SUFFIX = ".pcdvq-tmp"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes its place when the block ends.

    No existing file is written to, so what links and hard links lead to stays as it is. The mode
    is what the umask gives, whoever writes.
    """
    scratch = path.with_name(f".{secrets.token_hex(8)}{SCRATCH_SUFFIX}")
    scratch.touch(exist_ok=False)
    mode = stat.S_IMODE(scratch.stat().st_mode)
    try:
        yield scratch
        scratch.chmod(mode)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def save_whole(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """`save_file`, but the file appears whole or not at all."""
    with whole_file(path) as scratch:
        save_file(tensors, scratch, metadata)


def write_json_whole(path: Path, value: Any) -> None:
    """Write `value` to `path`, which appears whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_page(path: Path, option: str, what: str, is_ours: Callable[[Path], bool]) -> Path:
    """The file that `path` leads to, where `write_page` may write.

    Args:
        option: of the command, that named it.
        what: is written there.
        is_ours: whether an existing file is such a thing, which may be replaced.

    Raises:
        PCDVQError: there is no such directory, or something else is there.
    """
    try:
        path = path.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise PCDVQError(f"{option}: {path} leads nowhere ({error}); choose another") from None
    if not path.parent.is_dir():
        raise PCDVQError(f"{option}: there is no directory {path.parent}; create it first")
    if path.is_dir() or (path.is_file() and path.stat().st_size and not is_ours(path)):
        raise PCDVQError(f"{path} exists and is no {what}; choose another {option}")
    return path


def write_page(path: Path, text: str, option: str) -> None:
    """Write `text` to a file that `check_page` gave; a device or pipe is just written to.

    Raises:
        PCDVQError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with whole_file(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PCDVQError(f"cannot write {path}: {error.strerror}; choose another {option}") from (
            error
        )
