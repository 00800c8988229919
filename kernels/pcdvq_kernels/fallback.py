"""Torch implementations, for any device and for installs without the compiled kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from pcdvq_kernels import cpu, pyramid, windows
from pcdvq_kernels.arguments import (
    LayoutFields,
    check_embedding,
    check_expert_ids,
    check_ids,
    check_linear,
    check_moe,
)
from pcdvq_kernels.codebook import code_states, rotated_coordinates
from pcdvq_kernels.config import SEGMENT_ROWS
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import unpack_codes, unpack_signs
from pcdvq_kernels.reference import rotate_activations
from pcdvq_kernels.search_arguments import check_nearest, check_trellis, check_windows

# Bounds scratch: unpacking holds a few int64 per weight of a chunk.
CHUNK_WEIGHTS = 1 << 20
CHUNK_SCORES = 1 << 24


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
    in_features, out_features = x.shape[-1], qweight.shape[0]
    rotated = rotate_activations(x, signs_in, fields.hadamard_block).reshape(-1, in_features)
    y = x.new_empty(rotated.shape[0], out_features)
    chunk = -(-CHUNK_WEIGHTS // in_features // SEGMENT_ROWS) * SEGMENT_ROWS
    for first in range(0, out_features, chunk):
        rows = slice(first, first + chunk)
        levels = decode_levels(qweight[rows], codewords, fields, in_features)
        part = rotated @ levels.T * row_scale[rows]
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
        check_ids(ids, qweight.shape[0])
    signs, block = unpack_signs(signs_in), shape.layout.hadamard_block
    flat = ids.flatten().long()
    out = torch.empty(flat.shape[0], signs.shape[0], dtype=dtype, device=ids.device)
    chunk = max(1, CHUNK_WEIGHTS // signs.shape[0])
    for first in range(0, flat.shape[0], chunk):
        rows = flat[first : first + chunk]
        states = _states_of(rows, qweight, shape.layout, signs.shape[0])
        levels = decode_levels(qweight[rows], codewords, shape.layout, signs.shape[0], states)
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


def _states_of(
    rows: Tensor, qweight: Tensor, layout: LayoutFields, in_features: int
) -> Tensor | None:
    """States of single rows, int64 [rows, groups], from the rows above; None without states."""
    if not layout.state_bits:
        return None
    above = qweight[(rows - 1).clamp_min(0)]
    codes = unpack_codes(above, layout.code_bits, in_features // layout.vector_dim)
    inside = (rows % SEGMENT_ROWS != 0).unsqueeze(1)
    return (codes >> (layout.code_bits - layout.state_bits)) * inside


def decode_levels(
    qweight: Tensor,
    codewords: Tensor,
    layout: LayoutFields,
    in_features: int,
    states: Tensor | None = None,
) -> Tensor:
    """Levels of weight rows, fp32 [rows, K].

    Args:
        qweight: uint8 [rows, row_bytes], whole segments unless `states` are given.
        states: int64 [rows, groups], where the layout has any.
    """
    codes = unpack_codes(qweight, layout.code_bits, in_features // layout.vector_dim)
    if layout.pyramid_rows:
        return pyramid.decode(codes, codewords, layout.code_bits).float().flatten(1)
    if states is None:
        states = code_states(codes, layout.code_bits, layout.state_bits)
    if layout.windows:
        rows = windows.table_rows(codes, states, layout.code_bits)
        return windows.look_up(codewords, rows).float().flatten(1)
    row = codes >> layout.sign_bits
    bits = (codes.unsqueeze(-1) >> torch.arange(layout.vector_dim, device=codes.device)) & 1
    base_bits = layout.pattern_bits - layout.rotation_bits
    if layout.rotation_bits:
        source = rotated_coordinates(row >> base_bits, layout.vector_dim)
        row &= (1 << base_bits) - 1
    if layout.state_bits:
        row |= states << base_bits
    if layout.parity:
        row = 2 * row + bits.sum(-1) % 2
    levels = codewords[row].float()
    if layout.rotation_bits:
        levels = levels.gather(-1, source)
    if layout.sign_bits:
        levels *= 1 - 2 * bits
    return levels.flatten(1)


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


def trellis(
    x: Tensor, row_weight: Tensor, codewords: Tensor, parity: bool, state_bits: int
) -> Tensor:
    """`trellis_codes` in torch, a segment at a time."""
    check_trellis(x, row_weight, codewords, parity, state_bits)
    table = codewords.view(1 << state_bits, -1, 1 + parity, x.shape[2])
    out = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    for first in range(0, len(x), SEGMENT_ROWS):
        rows = slice(first, first + SEGMENT_ROWS)
        out[rows] = _segment_codes(x[rows], row_weight[rows], table)
    return out


def window_codes(x: Tensor, row_weight: Tensor, table: Tensor, code_bits: int) -> Tensor:
    """`trellis.window_codes` in torch, a segment at a time."""
    check_windows(x, row_weight, table, code_bits)
    out = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    for first in range(0, len(x), SEGMENT_ROWS):
        rows = slice(first, first + SEGMENT_ROWS)
        out[rows] = _window_segment(x[rows], row_weight[rows], table, code_bits)
    return out


def _window_segment(x: Tensor, row_weight: Tensor, table: Tensor, code_bits: int) -> Tensor:
    """Viterbi search in one segment x [rows, G, DIM]: int32 [rows, G]."""
    width, older = windows.extra_bits(code_bits), windows.state_bits(code_bits)
    states, new = 1 << older, torch.arange(4, device=x.device)
    cost = x.new_full((states, x.shape[1]), torch.inf)
    cost[0] = 0
    after = torch.arange(states, device=x.device).unsqueeze(1)
    steps = []
    for row, weight in enumerate(row_weight):
        for j in range(windows.DIM):
            # Windows that lead to each state, [state, 4]: the last bit of a row is in no state.
            last = j == windows.DIM - 1
            window = new & 1 | after << 1 | (new >> 1) << (older + 1) if last else after << 2 | new
            extra = torch.arange(1 << width, device=x.device) << (older + 2)
            index = (window.unsqueeze(-1) | extra).flatten(1)  # [state, candidates]
            error = weight * (x[row, :, j] - table[index, j].unsqueeze(-1)).square()
            cost, choice = (cost[index & (states - 1)] + error).min(1)  # [state, G]
            steps.append(index.gather(1, choice))
    state = cost.argmin(0).unsqueeze(0)  # [1, G]
    chosen = []
    for index in reversed(steps):
        chosen.append(index.gather(0, state)[0])
        state = chosen[-1].unsqueeze(0) & (states - 1)
    rows = torch.stack(chosen[::-1]).unflatten(0, (-1, windows.DIM))  # [rows, DIM, G]
    coordinate = torch.arange(windows.DIM, device=x.device).unsqueeze(1)
    stream = ((rows >> older & 3) << (2 * coordinate)).sum(1)
    extra = ((rows >> (older + 2)) << (width * coordinate)).sum(1)
    top = (stream << 1 | stream >> 7) & 255
    return (top << (windows.DIM * width) | extra).to(torch.int32)


def _segment_codes(x: Tensor, row_weight: Tensor, table: Tensor) -> Tensor:
    """Viterbi search in one segment x [rows, G, dim]; table is [state, field, parity, dim]."""
    states, fields, parities, dim = table.shape
    signs, y = _fold(x, parities)  # [P, rows, G], [P, rows, G, dim]
    cost = x.new_full((states, x.shape[1]), torch.inf)
    cost[0] = 0
    choices = fields // states * parities  # that lead from one state to another
    steps = []
    for row, weight in enumerate(row_weight):
        product = torch.einsum("pgd,sfpd->sgfp", y[:, row], table)
        error = weight * (table.square().sum(-1).unsqueeze(1) - 2 * product)
        error, choice = error.view(states, -1, states, choices).min(-1)  # [state, G, state below]
        total, before = (cost.unsqueeze(-1) + error).min(0)  # [G, state below]
        index = torch.arange(states, device=x.device) * choices
        index = index + choice.gather(0, before.unsqueeze(0))[0]
        code = signs[:, row].T.gather(1, index % parities) | index // parities << dim
        steps.append((before, code))
        cost = total.T
    state = cost.argmin(0).unsqueeze(1)  # [G, 1]
    codes = []
    for before, code in reversed(steps):
        codes.append(code.gather(1, state)[:, 0])
        state = before.gather(1, state)
    return torch.stack(codes[::-1]).to(torch.int32)


def _fold(x: Tensor, parities: int) -> tuple[Tensor, Tensor]:
    """Sign bits int64 [P, ...] and magnitudes [P, ..., dim] of x [..., dim], by parity of signs."""
    y, bits = x.abs(), 1 << torch.arange(x.shape[-1], device=x.device)
    signs = ((x < 0) * bits).sum(-1)
    if parities == 1:
        return signs.unsqueeze(0), y.unsqueeze(0)
    smallest = y.argmin(-1, keepdim=True)
    flipped = y.scatter(-1, smallest, -y.gather(-1, smallest))
    odd = (x < 0).sum(-1) % 2
    matches = torch.stack([odd == parity for parity in range(2)])  # [P, ...]
    return (
        torch.where(matches, signs, signs ^ bits[smallest[..., 0]]),
        torch.where(matches.unsqueeze(-1), y, flipped),
    )


@cache
def warn_slow(device_type: str) -> None:
    """Warn once per device type that the slow path serves."""
    reason = (
        cpu.unavailable_message()
        if device_type == "cpu"
        else f"their codes are not prepacked for the kernels of {device_type} (pcdvq_kernels.ops)"
    )
    warnings.warn(f"PCDVQ layers run on a slow torch path: {reason}.", RuntimeWarning, stacklevel=3)
