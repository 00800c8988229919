"""Where the time of a decode step goes: operators of one stream, by torch's profiler.

The model is one of `bench_serving.py`'s, with dummy weights, in vLLM's engine in this process and
in eager mode, so that each operator shows.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from serving_models import SHAPES, SYSTEMS, prepare

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
PROMPT, STEPS = list(range(1000, 1064)), 16


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-1b",
    system: Annotated[str, typer.Option(help=f"One of {'; '.join(SYSTEMS)}.")] = (
        "pcdvq 2, head 4"
    ),
    work: Annotated[Path, typer.Option(help="Where model directories are made and kept.")] = Path(
        "bench_models"
    ),
) -> None:
    """Print each operator's own share of the CPU time of a decode step."""
    import torch
    from vllm import LLM, SamplingParams

    work.mkdir(parents=True, exist_ok=True)
    served = prepare(model, SYSTEMS[system], system, work)
    llm = LLM(
        str(served.directory),
        load_format="dummy",
        trust_remote_code=False,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 28,
    )

    def generate(tokens: int) -> dict[str, tuple[float, int]]:
        """Own milliseconds and calls of each operator."""
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
        events = profile.key_averages()
        return {e.key: (e.self_cpu_time_total / 1e3, e.count) for e in events}

    generate(STEPS)  # warms up
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0), generate(1))
    rows = {
        key: ((ms - found[key][0]) / (STEPS - 1), (count - found[key][1]) / (STEPS - 1))
        for key, (ms, count) in generate(STEPS).items()
    }
    total = sum(ms for ms, _ in rows.values())
    table = Table("operator", "calls", "ms", "share", title=f"{model}, {system}: {total:.1f} ms")
    for key, (ms, count) in sorted(rows.items(), key=lambda row: -row[1][0])[:16]:
        table.add_row(key, f"{count:.0f}", f"{ms:.2f}", f"{100 * ms / total:.1f} %")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
