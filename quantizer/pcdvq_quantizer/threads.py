"""The cores that vLLM computes on where there is no GPU."""

from __future__ import annotations

import os

THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"


def all_cores() -> str:
    """The cores this process may use, as `THREADS_BIND` takes them."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))
