"""Model directories for `bench_serving.py`: SmolLM2, and shapes for dummy weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pcdvq_kernels.checkpoint import TensorInfo
from pcdvq_quantizer.plan import NONE, QuantizeOptions, plan_source
from pcdvq_quantizer.sources import SafetensorsSource
from pcdvq_quantizer.writer import save_codebooks
from smollm2 import load_smollm2, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

SHAPES = {
    "llama-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama-3b": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class System:
    """What serves the model.

    Attributes:
        quantization: `quantization_config` of vLLM's own method; None for bf16 and ours.
        bits, codec, embedding_bits: of ours; bits 0 for the others.
    """

    quantization: dict[str, Any] | None = None
    bits: float = 0
    codec: str = "trellis"
    embedding_bits: int = 16


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}
_INT4 = {"bits": 4, "group_size": 64}
SYSTEMS = {
    "bf16": System(),
    "int8 (W8A8)": System({**_W8A8}),
    "int4 (GPTQ)": System({**_INT4, "quant_method": "gptq", "desc_act": False, "sym": True}),
    "int4 (AWQ)": System({**_INT4, "quant_method": "awq", "zero_point": True, "version": "gemm"}),
    "pcdvq 2": System(bits=2),
    "pcdvq 3": System(bits=3),
    "pcdvq 4": System(bits=4),
    "pcdvq 2, head 4": System(bits=2, embedding_bits=4),
}


@dataclass(frozen=True)
class Served:
    """A directory for `vllm serve`, and whether its weights are real."""

    directory: Path
    real: bool


def prepare(model: str, system: System, name: str, work: Path) -> Served:
    """Make the directory of `model` ("smollm2" or a shape) for `system` in `work`, or reuse it."""
    base = work / model
    if not base.exists():
        _write_base(model, base)
    real = model == "smollm2" and system.quantization is None
    if real and not system.bits:
        return Served(base, real)
    out = work / f"{model} {name}".replace(" ", "-").replace(",", "")
    if not out.exists():
        (_quantize if real else _write_shape)(base, out, system)
    return Served(out, real)


def _write_base(model: str, base: Path) -> None:
    """bf16 weights of SmolLM2, or the configuration of a shape; with SmolLM2's tokenizer."""
    if model == "smollm2":
        load_smollm2(torch.bfloat16).save_pretrained(base)
    else:
        config = SHAPES[model]
        config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
        config.save_pretrained(base)
    save_tokenizer(base)


def _quantize(base: Path, out: Path, system: System) -> None:
    """Without calibration: it changes no speed."""
    pcdvq = Path(sys.executable).with_name("pcdvq")
    options = ["--bits", f"{system.bits:g}", "--codec", system.codec, "--calibration", "none"]
    options += ["--embedding-bits", f"{system.embedding_bits:g}"]
    subprocess.run([pcdvq, "quantize", base, out, *options], check=True)


def _write_shape(base: Path, out: Path, system: System) -> None:
    """`base` without weights, with the `quantization_config` of `system`."""
    out.mkdir()
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    if system.bits:
        config["quantization_config"] = _write_codebooks(base, out, system)
    elif system.quantization is not None:
        config["quantization_config"] = system.quantization
    (out / "config.json").write_text(json.dumps(config, indent=1))


def _write_codebooks(base: Path, out: Path, system: System) -> dict[str, Any]:
    """Write the codebook file of `system` and return its `quantization_config`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base, trust_remote_code=False), trust_remote_code=False
        )
    tensors = {
        name: TensorInfo(base, "BF16", tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    config = json.loads((base / "config.json").read_text())
    options = QuantizeOptions(
        bits=system.bits,
        codec=system.codec,
        embedding_bits=system.embedding_bits,
        calibration=NONE,
    )
    plan = plan_source(SafetensorsSource(base.name, base, config, tensors), options)
    save_codebooks(plan.distinct_codebooks, out)
    return plan.config.model_dump(exclude_none=True)
