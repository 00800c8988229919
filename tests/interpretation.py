"""Runs tests on the Triton kernels in Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported and makes it unable to compile, so they run
in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(file: Path) -> None:
    """Run the tests of `file`; fails if one of them does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PCDVQ_BACKEND": "triton"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
