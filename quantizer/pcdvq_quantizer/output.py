"""Where a checkpoint is written: OUT, which is whole at any moment, and OUT.partial beside it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pcdvq_kernels.errors import PCDVQError
from safetensors import SafetensorError

from pcdvq_quantizer.contents import check_replaceable
from pcdvq_quantizer.files import SCRATCH_SUFFIX

RUN_FILE = "run.json"
LOCK_FILE = "lock"
WORK_DIR = "layers"
NEW_DIR = "checkpoint"
OLD_DIR = "replaced"
# What the user can do something about: space, permissions, a path through a file.
CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.EXDEV, errno.EBUSY),
)


@dataclass(frozen=True)
class Output:
    """A directory to write, and the one where that is prepared.

    `partial` holds RUN_FILE, which describes the run, LOCK_FILE, and

    - WORK_DIR: what a run needs to go on after an interruption,
    - NEW_DIR: what will be OUT; where it is missing, the rest is of no use any more,
    - OLD_DIR: what was OUT, between the two moves of `publish`.

    Attributes:
        path: OUT, links followed.
        overwrite: whether an earlier checkpoint may be replaced.
        models: files and directories that the run reads; none of them may be touched.
    """

    path: Path
    overwrite: bool
    models: tuple[Path, ...]

    @classmethod
    def at(cls, output: Path, overwrite: bool = False, models: Sequence[Path] = ()) -> Output:
        """OUT as the user has given it.

        Raises:
            PCDVQError: it leads nowhere.
        """
        try:
            path = output.expanduser().resolve()
        except (OSError, RuntimeError) as error:
            raise PCDVQError(f"OUT {output} leads nowhere ({error}); choose another") from None
        if not path.name:
            raise PCDVQError(f"OUT is {path}; give a directory in it")
        return cls(path, overwrite, tuple(models))

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def work(self) -> Path:
        return self.partial / WORK_DIR

    @property
    def new(self) -> Path:
        return self.partial / NEW_DIR

    @property
    def _old(self) -> Path:
        return self.partial / OLD_DIR

    def check(self) -> None:
        """Raise PCDVQError if something would be lost by writing here."""
        for place in (self.path, self.partial):
            for model in self.models:
                if _leads_through(model, place):
                    raise PCDVQError(
                        f"{place} is needed to write OUT, and {model}, which is read, is that or "
                        "lies in it; choose another OUT"
                    )
        if self.path.exists():
            self._check_existing()
        self._check_partial()

    def _check_existing(self) -> None:
        if not self.path.is_dir():
            raise PCDVQError(f"{self.path} is a file; OUT is a directory: choose another")
        if not self.overwrite:
            raise PCDVQError(f"{self.path} exists; choose another OUT or pass --overwrite")
        check_replaceable(self.path)
        if _leads_through(Path.cwd(), self.path):
            raise PCDVQError(f"OUT {self.path} is the current directory; start from another one")
        if os.path.ismount(self.path):
            raise PCDVQError(f"OUT {self.path} cannot be replaced: a file system begins there")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PCDVQError(f"OUT {self.path} may not be written by you; choose another")

    def _check_partial(self) -> None:
        """Nobody but an earlier run may have made `partial`."""
        if not os.path.lexists(self.partial):
            return
        remedy = "move it away or choose another OUT"
        is_plain = self.partial.is_dir() and not self.partial.is_symlink()
        if not is_plain or os.path.ismount(self.partial):
            raise PCDVQError(
                f"{self.partial}, where work would go, is no plain directory; {remedy}"
            )
        found = sorted(self.partial.iterdir())
        links = (path for path in found if path.is_symlink())
        ours = {RUN_FILE, LOCK_FILE}
        if any(path.name == RUN_FILE for path in found):
            ours |= {WORK_DIR, NEW_DIR, OLD_DIR}
        others = (path for path in found if path.name not in ours and not _is_scratch(path))
        if strange := next(links, None) or next(others, None):
            raise PCDVQError(f"{strange} was left there by no run that could continue; {remedy}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of `partial`, which is made, and put away what is of no use there.

        Raises:
            PCDVQError: another run is there, something would be lost, or, in the block too, the
                system lets nothing be written.
        """
        try:
            self.check()
            self.partial.mkdir(parents=True, exist_ok=True)
            with FileLock(self.partial / LOCK_FILE, timeout=0):
                self._settle()
                self.check()  # again: OUT may be there now
                yield
        except Timeout:
            raise PCDVQError(f"another run is writing {self.partial}; wait for it") from None
        except (OSError, SafetensorError) as error:
            # safetensors has no number, only the system's text.
            full = "No space left" in str(error)
            if not full and getattr(error, "errno", None) not in CANNOT_WRITE:
                raise
            raise PCDVQError(
                f"cannot write {self.partial}: {error}. Free some space, and the same command "
                "continues; or choose another place: OUT, for `pcdvq serve` XDG_CACHE_HOME"
            ) from error

    def recover(self) -> None:
        """Put OUT back where a run was killed while it replaced it."""
        if os.path.isdir(self._old) and not os.path.lexists(self.path):
            with self.locked():
                pass

    def _settle(self) -> None:
        """End what a run that was killed in `publish` or `discard` had begun."""
        if self._old.is_dir() and not self.path.exists():
            os.replace(self._old, self.path)
        if not self.new.is_dir():
            self._clear()
        for path in self.partial.rglob(f"*{SCRATCH_SUFFIX}"):
            path.unlink()

    def publish(self) -> None:
        """Let NEW_DIR be OUT; at any moment one of the two checkpoints is whole.

        Raises:
            PCDVQError: something would be lost.
        """
        self.check()
        if self.path.exists():
            os.replace(self.path, self._old)
        try:
            os.replace(self.new, self.path)
        except OSError:
            if self._old.is_dir():
                os.replace(self._old, self.path)
            raise
        self.discard()

    def discard(self) -> None:
        """Delete `partial`; the file that shows whose it is goes last."""
        self._clear()
        (self.partial / LOCK_FILE).unlink(missing_ok=True)
        self.partial.rmdir()

    def _clear(self) -> None:
        for directory in (self.new, self.work, self._old):
            if directory.is_dir():
                shutil.rmtree(directory)
        for path in self.partial.glob(f".*{SCRATCH_SUFFIX}"):
            path.unlink()
        (self.partial / RUN_FILE).unlink(missing_ok=True)


def _is_scratch(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(SCRATCH_SUFFIX)


def _leads_through(path: Path, place: Path) -> bool:
    """Whether `path`, as it is written or with links followed, is `place` or lies in it."""
    if not place.exists():
        return False
    ways = {each for way in (path.absolute(), path.resolve()) for each in (way, *way.parents)}
    return any(place.samefile(way) for way in ways if way.exists())
