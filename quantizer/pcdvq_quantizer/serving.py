"""What `pcdvq serve` runs: `vllm serve` on a checkpoint, which is made first if need be."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from pcdvq_kernels.checkpoint import read_json
from pcdvq_kernels.config import QUANT_METHOD

from pcdvq_quantizer.cache import cache_directory
from pcdvq_quantizer.doctor import THREADS_BIND
from pcdvq_quantizer.plan import Plan


def is_checkpoint(model: str) -> bool:
    """Whether `model` is a PCDVQ checkpoint: a directory, or a repository of the Hub."""
    path = Path(model).expanduser()
    config = path / "config.json"
    if not path.exists():
        try:
            config = Path(hf_hub_download(model, "config.json"))
        except (OSError, ValueError):
            return False
    if not config.is_file():
        return False
    method = (read_json(config).get("quantization_config") or {}).get("quant_method")
    return method == QUANT_METHOD


def cached_checkpoint(plan: Plan) -> Path:
    """Where the checkpoint that `plan` makes is kept: another place for every model and option."""
    fingerprint = json.dumps(plan.fingerprint(), sort_keys=True, default=str).encode()
    name = re.sub(r"[^\w.-]+", "-", plan.source.name).strip("-.")[-80:]
    key = hashlib.sha256(fingerprint).hexdigest()[:10]
    return cache_directory() / "models" / f"{name}-{plan.options.bits:g}bit-{key}"


def vllm_command(checkpoint: str, arguments: Sequence[str]) -> list[str]:
    """`vllm serve` of the environment that this runs in; `arguments` are the user's for it."""
    vllm = Path(sys.executable).with_name("vllm")
    return [
        str(vllm) if vllm.exists() else "vllm",
        *("serve", checkpoint, "--quantization", QUANT_METHOD),
        *arguments,
    ]


def vllm_environment() -> dict[str, str]:
    """This process's environment; on a CPU vLLM computes on every core, unless the user says."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment.setdefault(THREADS_BIND, cores)
    return environment
