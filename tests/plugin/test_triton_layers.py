"""vLLM's layers on the Triton kernels, interpreted in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent / "interpreted" / "test_decoder_layer.py"


def test_layers() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FILE]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PCDVQ_BACKEND": "triton"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
