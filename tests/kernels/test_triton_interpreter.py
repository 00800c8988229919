"""The Triton kernels in Triton's interpreter, in a process of its own (see `interpreted`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from interpretation import run_interpreted

INTERPRETED = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("file", sorted(path.name for path in INTERPRETED.glob("test_*.py")))
def test_interpreted(file: str) -> None:
    run_interpreted(INTERPRETED / file)


def test_not_collected_without_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "no tests collected" in done.stdout
