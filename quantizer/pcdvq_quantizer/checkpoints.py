"""Checkpoints of any method that this package writes."""

from __future__ import annotations

import shlex
from pathlib import Path

from pcdvq_kernels.checkpoint import Checkpoint, open_checkpoint, read_quantization_config
from pcdvq_kernels.config import QUANT_METHOD
from pcdvq_kernels.vptq import layout as vptq
from pcdvq_kernels.vptq.checkpoint import VPTQCheckpoint, open_vptq_checkpoint

AnyCheckpoint = Checkpoint | VPTQCheckpoint


def open_any_checkpoint(directory: Path) -> AnyCheckpoint:
    """Open `directory` and check every header of it against its configuration.

    Raises:
        CheckpointError: anything that would not serve, naming the tensor or file.
    """
    if read_quantization_config(directory).get("quant_method") == vptq.QUANT_METHOD:
        return open_vptq_checkpoint(directory)
    return open_checkpoint(directory)


def serve_command(checkpoint: AnyCheckpoint, name: str) -> str:
    """What serves `checkpoint`, which is at or called `name`."""
    command = ["vllm", "serve", name]
    if isinstance(checkpoint, Checkpoint):
        command += ["--quantization", QUANT_METHOD]
    return shlex.join(command)
