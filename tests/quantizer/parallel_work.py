"""What the processes of test_parallel_calibration.py do; importing this is quick."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pcdvq_quantizer.calibration.parallel import Processes
from pcdvq_quantizer.progress import Progress


def exchange(processes: Processes, progress: Progress) -> None:
    """Every method, on parts of uneven sizes."""
    for total, unit in ((7, 1), (40, 16), (2, 1)):
        whole = torch.arange(2 * total).view(total, 2)
        part = whole[processes.share(total, unit)]
        assert torch.equal(processes.gather(part, total, unit), whole)
    total = torch.tensor(processes.rank + 1.0)
    processes.sum(total)
    assert total == sum(range(1, processes.count + 1))
    by_columns = torch.arange(6.0).view(2, 3).T
    (made,) = processes.once(lambda: (by_columns + processes.rank,))
    assert torch.equal(made, by_columns)
    assert processes.agree("same")
    assert not processes.agree(processes.rank)
    progress.note(f"{processes.rank} of {processes.count}")
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def lose_a_process(processes: Processes, progress: Progress, late: bool) -> None:
    """Process 1 is killed, before or after what process 0 says of lost connections."""
    if processes.rank == 1:
        time.sleep(2 * late)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2 * (not late))
    raise RuntimeError("Connection closed by peer [127.0.0.1]:1")


def fail(processes: Processes, progress: Progress) -> None:
    raise RuntimeError("of its own")


def quantize_all(
    processes: Processes,
    progress: Progress,
    runs: list[tuple[str, Any, Path]],
    few_tokens: int,
    interrupted: str,
) -> None:
    """Quantize model after model; that to the directory `interrupted` up to its second layer."""
    from pcdvq_quantizer.calibration import experts
    from pcdvq_quantizer.calibration.run import _Calibration
    from pcdvq_quantizer.run import quantize_share

    def stop(self: _Calibration, index: int, *rest: Any) -> None:
        if index == 1:
            raise InterruptedError
        quantize_layer(self, index, *rest)

    experts.FEW_TOKENS = few_tokens
    quantize_layer = _Calibration._quantize_layer
    for model, options, output in runs:
        arguments = (processes, progress, model, options, output, False)
        if output.name == interrupted:
            _Calibration._quantize_layer = stop
            with pytest.raises(InterruptedError):
                quantize_share(*arguments)
            _Calibration._quantize_layer = quantize_layer
        else:
            quantize_share(*arguments)
