"""Small GGUF files with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter

VOCAB = 64
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, BLOCKS = 64, 96, 4, 2, 16, 2
SIZES: dict[str, Any] = {
    "block_count": BLOCKS,
    "context_length": 256,
    "embedding_length": HIDDEN,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HEAD_DIM,
    "vocab_size": VOCAB,
}
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*map(chr, range(33, 32 + VOCAB)), "AB"],
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.merges": ["A B"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def llama_tensors() -> dict[str, np.ndarray]:
    """The tensors of a tied model of `SIZES` by their names in a GGUF file."""
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for block in range(BLOCKS):
        parts = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in parts.items()}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a tied model of `SIZES` to `path`.

    Args:
        metadata: keys to add, or to leave out where the value is None; those without a prefix
            belong to the architecture.
        tensors: more of them, or other ones.
    """
    fields = {f"{architecture}.{key}": value for key, value in SIZES.items()} | TOKENIZER
    for key, value in (metadata or {}).items():
        known = key.startswith(("general.", "tokenizer.", "split.", "other."))
        fields[key if known else f"{architecture}.{key}"] = value
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        if value is not None:
            writer.add_key_value(key, value, _type(value))
    for name, tensor in (llama_tensors() | (tensors or {})).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(value: object) -> GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return GGUFValueType.UINT32
    return GGUFValueType.get_type(value)
