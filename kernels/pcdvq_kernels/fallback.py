"""Torch implementations, for any device and for installs without the compiled kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from pcdvq_kernels import cpu, pyramid, trellis
from pcdvq_kernels.arguments import (
    LayoutFields,
    check_embedding,
    check_expert_ids,
    check_ids,
    check_linear,
    check_moe,
)
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import unpack_codes, unpack_signs
from pcdvq_kernels.reference import rotate_activations
from pcdvq_kernels.search_arguments import check_chains, check_nearest

# Bounds scratch: unpacking holds a few int64 per weight of a chunk.
CHUNK_WEIGHTS = 1 << 20
CHUNK_SCORES = 1 << 24
CHUNK_CHAINS = 16
MOST_CHAIN_ROWS = max(trellis.CHAIN_ROWS)


def linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    """`pcdvq::linear` in torch, a chunk of weight rows at a time; slow. Arguments as in `ops`."""
    fields = check_linear(x, qweight, row_scale, signs_in, codewords, bias, layout).layout
    warn_slow(x.device.type)
    in_features, out_features = x.shape[-1], row_scale.shape[0]
    rotated = rotate_activations(x, signs_in, fields.hadamard_block).reshape(-1, in_features)
    y = x.new_empty(rotated.shape[0], out_features)
    chunk = -(-CHUNK_WEIGHTS // in_features // MOST_CHAIN_ROWS) * MOST_CHAIN_ROWS
    for first in range(0, out_features, chunk):
        rows = slice(first, first + chunk)
        levels = decode_levels(qweight[rows], codewords, fields, in_features)
        part = rotated @ levels[: out_features - first].T * row_scale[rows]
        y[:, rows] = part if bias is None else part + bias[rows].float()
    return y.view(*x.shape[:-1], out_features)


def embedding(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """`pcdvq::embedding` in torch, a chunk of ids at a time; slow. Arguments as in `ops`."""
    shape = check_embedding(ids, qweight, row_scale, signs_in, codewords, layout, dtype)
    warn_slow(ids.device.type)
    if ids.device.type == "cpu":  # elsewhere looking would wait for the device, which checks itself
        check_ids(ids, row_scale.shape[0])
    signs, block = unpack_signs(signs_in), shape.layout.hadamard_block
    flat = ids.flatten().long()
    out = torch.empty(flat.shape[0], signs.shape[0], dtype=dtype, device=ids.device)
    chunk = max(1, CHUNK_WEIGHTS // signs.shape[0])
    for first in range(0, flat.shape[0], chunk):
        rows = flat[first : first + chunk]
        levels = _decode_rows(rows, qweight, codewords, shape.layout, signs.shape[0])
        dense = block_hadamard(levels, block) * signs * row_scale[rows].unsqueeze(1)
        out[first : first + chunk] = dense
    return out.view(*ids.shape, -1)


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
    """`pcdvq::moe` in torch, an expert at a time; slow. Arguments as in `ops`."""
    check_moe(x, topk_weights, topk_ids, gate_up, down, codewords, gate_up_layout, down_layout)
    if x.is_cpu:  # as in `embedding`
        check_expert_ids(topk_ids, len(gate_up[0]))
    sums = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(gate_up[0])):
        token, choice = torch.where(topk_ids == expert)
        if not len(token):
            continue
        signs_in, down_signs = gate_up[2], down[2]
        weight = gate_up[0][expert], gate_up[1][expert], signs_in, codewords
        gate, up = linear(x[token].float(), *weight, None, gate_up_layout).chunk(2, -1)
        weight = down[0][expert], down[1][expert], down_signs, codewords
        y = linear(torch.nn.functional.silu(gate) * up, *weight, None, down_layout)
        sums.index_add_(0, token, y * topk_weights[token, choice, None].float())
    return sums.to(x.dtype)


def _decode_rows(
    rows: Tensor, qweight: Tensor, codewords: Tensor, layout: LayoutFields, in_features: int
) -> Tensor:
    """Levels of single rows (int64 [n]), fp32 [n, K]; chains are decoded whole."""
    if not layout.chain_rows:
        return decode_levels(qweight[rows], codewords, layout, in_features)
    segment, row = rows // layout.chain_rows, rows % layout.chain_rows
    inside = torch.arange(layout.chain_rows, device=rows.device)
    whole = (segment.unsqueeze(1) * layout.chain_rows + inside).flatten()
    levels = decode_levels(qweight[whole], codewords, layout, in_features)
    return levels.unflatten(0, (-1, layout.chain_rows))[torch.arange(len(rows)), row]


def decode_levels(
    qweight: Tensor, codewords: Tensor, layout: LayoutFields, in_features: int
) -> Tensor:
    """Levels of weight rows, fp32 [rows, K].

    Args:
        qweight: uint8 [rows, row_bytes], whole chains.
    """
    codes = unpack_codes(qweight, layout.code_bits, in_features // layout.vector_dim)
    if layout.chain_rows:
        return trellis.decode(codes, layout.code_bits, layout.chain_rows).float().flatten(1)
    if layout.pyramid_rows:
        return pyramid.decode(codes, codewords, layout.code_bits).float().flatten(1)
    return codewords[codes].float().flatten(1)


def nearest(x: Tensor, codewords: Tensor, bias: Tensor) -> Tensor:
    """`nearest_codeword` in torch, a chunk of groups at a time."""
    check_nearest(x, codewords, bias)
    out = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    chunk = max(1, CHUNK_SCORES // codewords.shape[0])
    for first in range(0, x.shape[0], chunk):
        scores = x[first : first + chunk] @ codewords.T - bias
        # argmax leaves open which of equals it returns; the first is the rule.
        equal = scores == scores.amax(1, keepdim=True)
        out[first : first + chunk] = equal.to(torch.int8).argmax(1)
    return out


def chain_codes(x: Tensor, row_weight: Tensor, code_bits: int, chain_rows: int) -> Tensor:
    """`search.chain_codes` in torch, some chains at a time."""
    check_chains(x, row_weight, code_bits, chain_rows)
    windows = torch.arange(1 << trellis.WINDOW_BITS, device=x.device)
    levels = trellis.window_levels(windows, code_bits).float().view(len(windows), -1)
    steps = _by_chain(x, levels.shape[1], chain_rows)
    weight = row_weight.view(-1, 1).expand(-1, x.shape[1])
    weight = _by_chain(weight, levels.shape[1], chain_rows)[..., 0]
    widths = (
        [code_bits] if code_bits < trellis.SINGLES_FROM else [-(-code_bits // 2), code_bits // 2]
    )
    search = _RingSearch(levels, widths)
    chosen = torch.cat(
        [
            search.bits(*chains)
            for chains in zip(
                steps.flatten(0, 1).split(CHUNK_CHAINS),
                weight.flatten(0, 1).split(CHUNK_CHAINS),
                strict=True,
            )
        ]
    )
    fields = chosen.unflatten(1, (-1, len(widths)))
    codes = fields[..., 0] if len(widths) == 1 else fields[..., 0] << widths[1] | fields[..., 1]
    return trellis.row_order(codes.view(*steps.shape[:2], -1), chain_rows).to(torch.uint8)


def _by_chain(x: Tensor, width: int, chain_rows: int) -> Tensor:
    """x [N, K] by chain, `width` columns a step: [segments, strips, steps, width]."""
    pairs = x.unflatten(1, (-1, trellis.PAIR))
    by_column = [trellis.chain_order(pairs[..., i], chain_rows) for i in range(trellis.PAIR)]
    return torch.stack(by_column, -1).flatten(2).unflatten(2, (-1, width))


class _RingSearch:
    """Viterbi search over all windows, for chains whose bits form a ring."""

    def __init__(self, levels: Tensor, widths: list[int]) -> None:
        self._levels, self._widths = (
            levels,
            widths,
        )  # [2^16, width of a step], bits of steps in turn
        self._windows = len(levels)

    def bits(self, x: Tensor, weight: Tensor) -> Tensor:
        """New bits of each step, int64 [chains, T], of x [chains, T, width], weight [chains, T]."""
        half = x.shape[1] // 2 // len(self._widths) * len(self._widths)
        turned = torch.roll(x, half, 1), torch.roll(weight, half, 1)
        path = self._path(*turned, None)
        # The window before the first step is the one of the last; turned, it is at half - 1.
        return self._path(x, weight, path[:, half - 1]) & self._masks(x)

    def _masks(self, x: Tensor) -> Tensor:
        widths = torch.tensor(self._widths, device=x.device)
        return ((1 << widths) - 1).repeat(x.shape[1] // len(self._widths))

    def _path(self, x: Tensor, weight: Tensor, seam: Tensor | None) -> Tensor:
        """Windows of each step; those at both ends share `seam`'s bits but for the first step's."""
        steps = x.shape[1]
        first = self._windows >> self._widths[0]  # windows before that differ
        cost = x.new_zeros(len(x), self._windows)
        before = torch.arange(self._windows, device=x.device)
        if seam is not None:
            outside = before % first != seam.unsqueeze(1) % first
            cost.masked_fill_(outside, torch.inf)
        choices = []
        for step in range(steps):
            width = self._widths[step % len(self._widths)]
            least, choice = cost.view(len(x), 1 << width, -1).min(1)  # [chains, 2^16 >> width]
            error = (x[:, step, None] - self._levels).square().sum(-1) * weight[:, step, None]
            cost = least.repeat_interleave(1 << width, 1) + error
            choices.append(choice)
        if seam is not None:
            cost.masked_fill_(outside, torch.inf)
        window = cost.argmin(1, keepdim=True)
        path = []
        for step in reversed(range(steps)):
            width = self._widths[step % len(self._widths)]
            path.append(window[:, 0])
            older = window >> width
            window = older | choices[step].gather(1, older) << (trellis.WINDOW_BITS - width)
        return torch.stack(path[::-1], 1)


@cache
def warn_slow(device_type: str) -> None:
    """Warn once per device type that the slow path serves."""
    reason = (
        cpu.unavailable_message()
        if device_type == "cpu"
        else f"their codes are not prepacked for the kernels of {device_type} (pcdvq_kernels.ops)"
    )
    warnings.warn(f"PCDVQ layers run on a slow torch path: {reason}.", RuntimeWarning, stacklevel=3)
