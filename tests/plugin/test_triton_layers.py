"""vLLM's layers on the Triton kernels, interpreted in a process of its own."""

from __future__ import annotations

from pathlib import Path

from interpretation import run_interpreted


def test_layers() -> None:
    run_interpreted(Path(__file__).parent / "interpreted" / "test_decoder_layer.py")
