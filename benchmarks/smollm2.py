"""SmolLM2-135M-Instruct as a dense model, for benchmarks that write variants of it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from demo import smollm2_gguf


def load_smollm2(dtype: torch.dtype) -> PreTrainedModel:
    gguf = smollm2_gguf()
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=config,
        dtype=dtype,
        trust_remote_code=False,
    )


def save_tokenizer(directory: Path) -> None:
    """Write the tokenizer into a model's directory."""
    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(directory)
