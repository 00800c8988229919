"""Time and memory of loading a checkpoint in vLLM, each in a process of its own.

By default SmolLM2-135M-Instruct in bf16 and at 2 and 4 bits; any model directory can be given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

KV_CACHE_BYTES = 64 << 20
DEFAULT_SYSTEMS = ("bf16", "pcdvq 2", "pcdvq 4")
GIB = 2**30


@dataclass(frozen=True)
class Load:
    """One load.

    Attributes:
        model: directory.
        file_gib: its weights on disk.
        seconds: from the first weight read to the last made ready for the kernels.
        added_gib: memory that the process held more afterwards.
        peak_gib: the most it held more meanwhile; pages of mapped files count.
    """

    model: str
    file_gib: float
    seconds: float
    added_gib: float
    peak_gib: float


def peak_bytes() -> int:
    """The most this process ever held, or held since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_here(model: str) -> Load:
    """Load `model` in this process."""
    from vllm import LLM
    from vllm.model_executor.model_loader import BaseModelLoader

    load_model = BaseModelLoader.load_model
    measured: list[Load] = []

    def timed(*args: object, **kwargs: object) -> object:
        process = psutil.Process()
        forget_peak()
        before, started = process.memory_info().rss, time.monotonic()
        try:
            return load_model(*args, **kwargs)
        finally:
            seconds = time.monotonic() - started
            added = (process.memory_info().rss - before) / GIB
            size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / GIB
            measured.append(Load(model, size, seconds, added, (peak_bytes() - before) / GIB))

    BaseModelLoader.load_model = timed
    LLM(
        model,
        trust_remote_code=False,
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    return measured[0]


def measure(model: Path) -> Load:
    """Load `model` in a new process.

    Raises:
        RuntimeError: it does not load.
    """
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, __file__, "--here", str(model)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{model} does not load:\n{run.stderr[-3000:]}")
    return Load(**json.loads(run.stdout.splitlines()[-1]))


def default_models(work: Path) -> list[Path]:
    from serving_models import SYSTEMS, prepare

    work.mkdir(parents=True, exist_ok=True)
    return [prepare("smollm2", SYSTEMS[name], name, work).directory for name in DEFAULT_SYSTEMS]


def main(
    models: Annotated[list[Path] | None, typer.Argument(help="Model directories.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where the default models are made and kept.")] = Path(
        "bench_models"
    ),
    here: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure loading."""
    if here and models:
        print(json.dumps(asdict(measure_here(str(models[0])))))
        return
    table = Table("model", "files GiB", "seconds", "memory added GiB", "at its peak GiB")
    loads = [measure(model) for model in models or default_models(work)]
    for load in loads:
        figures = load.file_gib, load.seconds, load.added_gib, load.peak_gib
        table.add_row(Path(load.model).name, *(f"{figure:.3f}" for figure in figures))
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps([asdict(load) for load in loads], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
