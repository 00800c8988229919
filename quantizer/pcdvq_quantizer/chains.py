"""Rows of the chains of codec `trellis`: as many as tensor-parallel shards allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pcdvq_kernels.trellis import CHAIN_ROWS

# Of which vLLM moves whole heads while it loads them (`pcdvq_kernels.row_orders`).
MOVED_BY_HEADS = ("query_key_value",)


def choose_chain_rows(
    rows: Mapping[str, int], config: Mapping[str, Any], max_tp: int
) -> dict[str, int]:
    """The longest chains for each layer whose shards are whole chains at every size allowed.

    Layers of one module are often served as one, such as q, k and v: they have the same.

    Args:
        rows: N of each layer by name.
        config: the model's config.json.
        max_tp: largest tensor-parallel size to keep possible.

    Returns:
        For each layer one of `trellis.CHAIN_ROWS`: the shortest where none fits.
    """
    text = config.get("text_config") or config
    sizes = _parallel_sizes(text, max_tp)
    head_rows = _head_rows(text)
    chains: dict[str, int] = {}
    for name, count in rows.items():
        module, _, part = name.rpartition(".")
        shards = {max(count // size, min(head_rows, count)) for size in sizes if count % size == 0}
        if part in MOVED_BY_HEADS and head_rows:
            shards.add(head_rows)
        chains[module] = min(chains.get(module, CHAIN_ROWS[0]), _longest(count, shards))
    return {name: chains[name.rpartition(".")[0]] for name in rows}


def _parallel_sizes(config: Mapping[str, Any], max_tp: int) -> list[int]:
    """Powers of two that vLLM serves the model at."""
    heads = config.get("num_attention_heads")
    sizes = [1 << i for i in range(max_tp.bit_length()) if 1 << i <= max_tp]
    if not isinstance(heads, int) or heads < 1:
        return sizes
    return [size for size in sizes if heads % size == 0]


def _head_rows(config: Mapping[str, Any]) -> int:
    """Rows of a key or value head, the least that a shard of k or v has; 0 where not known."""
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(size, int):
        return size
    hidden = config.get("hidden_size")
    if isinstance(heads, int) and heads > 0 and isinstance(hidden, int):
        return hidden // heads
    return 0


def _longest(count: int, shards: set[int]) -> int:
    for length in CHAIN_ROWS:
        if not any(shard % length for shard in shards):
            return length
    return CHAIN_ROWS[0] if count % CHAIN_ROWS[-1] else CHAIN_ROWS[-1]
