"""The operators on prepacked weights, called by `ops` (which documents the arguments)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pcdvq_kernels.arguments import check_expert_ids, check_prepacked, check_routing, expect
from pcdvq_kernels.triton.dequantize import UNITS, levels
from pcdvq_kernels.triton.dequantize import embedding as embedding_rows
from pcdvq_kernels.triton.format import TILE_ROWS, format_of
from pcdvq_kernels.triton.hadamard import rotate, rotate_quantize
from pcdvq_kernels.triton.linear import Weight
from pcdvq_kernels.triton.linear import linear as decode_linear
from pcdvq_kernels.triton.moe import align, moe_linear
from pcdvq_kernels.triton.tuning import describe, linear_config, on_its_device

# Above this a dense copy of the weight is cheaper than decoding it for every 16 tokens. The copy is
# written and read back, 34 bits per weight with the codes; in that time an H100 issues about 1170
# instructions per 1024 weights, 10 times the 111 that 16 tokens take at 2 bits and 4.6 times the
# 252 at 3: they meet at 168 and 74 tokens if the copy leaves the cache, earlier if it does not.
MOST_DECODE_TOKENS = 64
SCRATCH_BYTES = 128 << 20  # of dense weight at a time


@on_its_device
def linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    """`pcdvq::linear` with a prepacked weight.

    Up to `MOST_DECODE_TOKENS` tokens activations are rounded to int8, which makes an error below
    1 % of the output; above, the weight is decoded in parts of `SCRATCH_BYTES` for dense products
    in x's dtype.
    """
    weight, block = _weight(x.shape[-1], qweight, row_scale, signs_in, codewords, layout, x)
    n, k = row_scale.shape[0], x.shape[-1]
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    if not m or not n:
        y = x.new_empty((m, n))
    elif m <= MOST_DECODE_TOKENS:
        config = linear_config(m, n, k, weight.fmt, describe(x.device))
        activations = rotate_quantize(rows, signs_in, block, config.m_tile)
        y = decode_linear(activations, weight, bias, x.dtype, config)
    else:
        y = _dense_linear(rotate(rows, signs_in, block), weight, bias)
    return y.view(*x.shape[:-1], n)


@on_its_device
def embedding(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """`pcdvq::embedding` with a prepacked weight; ids that are no rows give NaN."""
    k = 8 * signs_in.shape[0]
    weight, block = _weight(k, qweight, row_scale, signs_in, codewords, layout, ids)
    return embedding_rows(ids, weight, signs_in, block, dtype)


@on_its_device
def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    codewords: Tensor,
    gate_up_layout: Sequence[int],
    down_layout: Sequence[int],
) -> Tensor:
    """`pcdvq::moe` with prepacked weights; activations are rounded to int8."""
    check_routing(x, topk_weights, topk_ids, gate_up, down)
    if x.is_cpu:  # elsewhere looking would wait for the device
        check_expert_ids(topk_ids, len(gate_up[1]))
    tokens, top_k = topk_ids.shape
    inner = gate_up[1].shape[1] // 2
    first, first_block = _experts(x.shape[1], gate_up, codewords, gate_up_layout, x)
    second, second_block = _experts(inner, down, codewords, down_layout, x)
    if not tokens:
        return torch.empty_like(x)
    routing = align(topk_ids, len(gate_up[1]))
    both = moe_linear(x, first, gate_up[2], first_block, routing).float()
    active = (torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]).to(x.dtype)
    y = moe_linear(active, second, down[2], second_block, replace(routing, top_k=1))
    weights = topk_weights.float().unsqueeze(-1)
    return (y.view(tokens, top_k, -1).float() * weights).sum(1).to(x.dtype)


def _experts(
    in_features: int,
    tensors: Sequence[Tensor],
    codewords: Tensor,
    layout: Sequence[int],
    like: Tensor,
) -> tuple[Weight, int]:
    """The layer of every expert and its Hadamard block."""
    words, row_scale, signs_in = tensors
    fields = check_prepacked(in_features, row_scale[0], signs_in, layout, like)
    weight = Weight(words, row_scale, format_of(fields))
    replace(weight, words=words[0], row_scale=row_scale[0]).check(
        row_scale.shape[1], in_features, like.device
    )
    expect("row_scale", row_scale, torch.float32, (len(words), row_scale.shape[1]), like.device)
    return weight, fields.hadamard_block


def _weight(
    in_features: int,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    like: Tensor,
) -> tuple[Weight, int]:
    """The layer and its Hadamard block."""
    fields = check_prepacked(in_features, row_scale, signs_in, layout, like)
    weight = Weight(qweight, row_scale, format_of(fields))
    weight.check(row_scale.shape[0], in_features, like.device)
    return weight, fields.hadamard_block


def _dense_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x (R Q)^T + b for rotated x [M, K], a bounded part of the weight at a time."""
    m, k = x.shape
    n = weight.row_scale.shape[0]
    step = max(1, SCRATCH_BYTES // (x.element_size() * k * TILE_ROWS)) * TILE_ROWS
    y = x.new_empty((m, n))
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        part = torch.nn.functional.linear(x, levels(weight, k, x.dtype, rows))
        part = part * (UNITS * weight.row_scale[rows])
        y[:, rows] = part if bias is None else part + bias[rows].float()
    return y
