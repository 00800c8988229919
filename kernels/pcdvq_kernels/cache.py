"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`pcdvq` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache); it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcdvq"
