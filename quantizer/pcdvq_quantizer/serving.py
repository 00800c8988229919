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
from pcdvq_kernels.cache import cache_directory
from pcdvq_kernels.checkpoint import read_quantization_config
from pcdvq_kernels.config import QUANT_METHOD
from pcdvq_kernels.vptq import layout as vptq
from rich.console import Console
from rich.text import Text

from pcdvq_quantizer.bars import Bars
from pcdvq_quantizer.inspection import describe_checkpoint
from pcdvq_quantizer.plan import PCDVQPlan, QuantizeOptions, plan_source
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.sources import open_source
from pcdvq_quantizer.threads import THREADS_BIND, all_cores


def checkpoint_of(model: str, options: QuantizeOptions, console: Console) -> tuple[str, str]:
    """`model` if it is a checkpoint, else what it is quantized to, which is made once and kept.

    Returns:
        (the checkpoint; its quantization method).
    """
    method = quantization_of(model)
    if method in (QUANT_METHOD, vptq.QUANT_METHOD):
        return model, method
    with console.status(Text(f"Opening {model}")):
        options.check()
        plan = plan_source(open_source(model), options)
    checkpoint = cached_checkpoint(plan)
    if not checkpoint.exists():
        with Bars(console) as bars:
            made = quantize_model(plan, checkpoint, progress=bars)
        console.print(describe_checkpoint(made), highlight=False, soft_wrap=True)
    return str(checkpoint), QUANT_METHOD


def quantization_of(model: str) -> str | None:
    """The `quant_method` of `model`, a directory or a repository of the Hub, or None."""
    directory = Path(model).expanduser()
    if not directory.exists():
        try:
            directory = Path(hf_hub_download(model, "config.json")).parent
        except (OSError, ValueError):
            return None
    if not (directory / "config.json").is_file():
        return None
    return read_quantization_config(directory).get("quant_method")


def cached_checkpoint(plan: PCDVQPlan) -> Path:
    """Where the checkpoint that `plan` makes is kept: another place for every model and option.

    The name of the model is for the reader: the same model has one place under all its names.
    """
    fingerprint = json.dumps(plan.fingerprint(), sort_keys=True, default=str).encode()
    key = f"{plan.options.bits:g}bit-{hashlib.sha256(fingerprint).hexdigest()[:16]}"
    models = cache_directory() / "models"
    name = re.sub(r"[^\w.-]+", "-", plan.source.name).strip("-.")[-80:]
    begun = next(models.glob(f"*-{key}*"), models / f"{name}-{key}")
    return begun.with_name(begun.name.removesuffix(".partial"))


def vllm_command(
    checkpoint: str, arguments: Sequence[str], quantization: str | None = QUANT_METHOD
) -> list[str]:
    """`vllm serve` of the environment that this runs in.

    Args:
        checkpoint: the model.
        arguments: more arguments of `vllm serve`.
        quantization: its method; None for the one that the model's configuration names.
    """
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm) if vllm.exists() else "vllm", "serve", checkpoint]
    if quantization is not None:
        command += ["--quantization", quantization]
    return [*command, *arguments]


def vllm_environment() -> dict[str, str]:
    """This process's environment; on a CPU vLLM computes on every core, unless the user says."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault(THREADS_BIND, all_cores())
    return environment
