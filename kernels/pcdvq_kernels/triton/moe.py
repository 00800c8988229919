"""Grouped linear layers: every token times the weights of the experts it was routed to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcdvq_kernels.triton.decode import part_rows
from pcdvq_kernels.triton.format import TILE_ROWS
from pcdvq_kernels.triton.hadamard import rotate_quantize
from pcdvq_kernels.triton.linear import Weight, accumulate, scale_rows
from pcdvq_kernels.triton.tuning import INSTRUCTIONS


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, as vLLM's `moe_align_block_size` says it.

    An assignment is a token and one of its experts, numbered token * top_k + choice.

    Attributes:
        sorted_token_ids: int32 [blocks * block_size], assignments by expert; padding is a number
            that is no assignment.
        expert_ids: int32 [blocks], the expert of each block; -1 leaves its outputs 0.
        num_tokens_post_padded: int32 [1], how many of `sorted_token_ids` are in use.
        block_size: 8 or 16.
        top_k: experts of a token.
    """

    sorted_token_ids: Tensor
    expert_ids: Tensor
    num_tokens_post_padded: Tensor
    block_size: int
    top_k: int


def align(topk_ids: Tensor, experts: int) -> Routing:
    """The routing of `topk_ids`, int [tokens, top_k]; ids below 0 are no expert.

    Sizes depend on shapes only, so nothing waits for the device.
    """
    flat = topk_ids.flatten().long()
    assignments, device = flat.numel(), flat.device
    block = 8 if assignments <= 8 * experts else 16
    flat = torch.where(flat < 0, experts, flat)  # as if of one expert more
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)
    # How far an expert's assignments move to make room for the padding before them.
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    blocks = min(assignments, -(-assignments // block) + experts + 1)
    sorted_ids = torch.full((blocks * block,), assignments, dtype=torch.int32, device=device)
    places = torch.arange(assignments, device=device) + shift[flat[order]]
    sorted_ids[places] = order.int()
    firsts = torch.arange(0, blocks * block, block, device=device)
    expert_ids = torch.searchsorted(ends, firsts, right=True)
    expert_ids = torch.where(expert_ids < experts, expert_ids, -1).int()
    top_k = topk_ids.shape[1]
    return Routing(sorted_ids, expert_ids, ends[-1:].int(), block, top_k)


@triton.jit(do_not_specialize=["assignments", "padded", "tiles"])
def moe_kernel(
    x,
    scales,
    words,
    row_scale,
    sorted_ids,
    expert_ids,
    used,
    out,
    assignments,
    N,
    padded,
    tiles,
    TOP_K: tl.constexpr,
    M_TILE: tl.constexpr,
    FMT: tl.constexpr,
    ASM: tl.constexpr,
):
    """out [assignments, N]; program (g, m) has a row of tiles for a block of assignments."""
    LINE: tl.constexpr = 32 * FMT.lane_words
    block = tl.program_id(1)
    expert = tl.load(expert_ids + block).to(tl.int64)
    if (block * M_TILE < tl.load(used)) & (expert >= 0):
        ids = tl.load(sorted_ids + block * M_TILE + tl.arange(0, M_TILE))
        real = (ids >= 0) & (ids < assignments)
        tokens = tl.where(real, ids // TOP_K, 0)
        row = tl.program_id(0)
        line = expert * tl.num_programs(0) + row
        words += line * (tiles * LINE)
        sums = accumulate(words, x, scales, tokens, padded, 0, tiles, tiles, FMT, ASM)
        for part in tl.static_range(2):
            rows = part_rows(row, part)
            acc = scale_rows(sums[part], row_scale + expert * N, row_scale, rows, N, False)
            to = out + ids.to(tl.int64)[None, :] * N + rows[:, None]
            inside = (rows < N)[:, None] & real[None, :]
            tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


def moe_linear(x: Tensor, weight: Weight, signs_in: Tensor, block: int, routing: Routing) -> Tensor:
    """y[a] = R Q H S x[token of a] with the weight of the expert of assignment a.

    Args:
        x: bf16, fp16 or fp32 [tokens, K]; a second layer takes one row per assignment and
            `top_k` 1.
        weight: words [E, row tiles, words] and row_scale [E, N], stacked experts.
        signs_in: uint8 [K / 8], shared by the experts, which read the same activations.
        block: Hadamard block.
        routing: tokens to experts.

    Returns:
        x.dtype [tokens * top_k, N]; 0 for assignments to no expert of `weight`.
    """
    experts, n = weight.row_scale.shape
    activations = rotate_quantize(x.contiguous(), signs_in, block, 1)
    assignments = x.shape[0] * routing.top_k
    out = torch.zeros((assignments, n), dtype=x.dtype, device=x.device)
    assert weight.words.shape[:2] == (experts, -(-n // TILE_ROWS))
    moe_kernel[weight.words.shape[1], routing.expert_ids.shape[0]](
        activations.values,
        activations.scales,
        weight.words,
        weight.row_scale,
        routing.sorted_token_ids,
        routing.expert_ids,
        routing.num_tokens_post_padded,
        out,
        assignments,
        n,
        activations.padded_tokens,
        weight.tiles,
        TOP_K=routing.top_k,
        M_TILE=routing.block_size,
        FMT=weight.fmt,
        ASM=INSTRUCTIONS,
        num_warps=1,
    )
    return out
