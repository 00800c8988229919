"""Torch implementations, for any device and for installs without the compiled kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from pcdvq_kernels import cpu
from pcdvq_kernels.arguments import (
    LayoutFields,
    check_embedding,
    check_ids,
    check_linear,
    check_nearest,
)
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import unpack_codes, unpack_signs
from pcdvq_kernels.reference import rotate_activations

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
    chunk = max(1, CHUNK_WEIGHTS // in_features)
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
        levels = decode_levels(qweight[rows], codewords, shape.layout, signs.shape[0])
        dense = block_hadamard(levels, block) * signs * row_scale[rows].unsqueeze(1)
        out[first : first + chunk] = dense
    return out.view(*ids.shape, -1)


def decode_levels(
    qweight: Tensor, codewords: Tensor, layout: LayoutFields, in_features: int
) -> Tensor:
    """Levels of some weight rows: uint8 [rows, row_bytes] to fp32 [rows, K]."""
    codes = unpack_codes(qweight, layout.code_bits, in_features // layout.vector_dim)
    row = codes >> layout.sign_bits
    bits = (codes.unsqueeze(-1) >> torch.arange(layout.vector_dim, device=codes.device)) & 1
    if layout.parity:
        row = 2 * row + bits.sum(-1) % 2
    levels = codewords[row].float()
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


@cache
def warn_slow(device_type: str) -> None:
    """Warn once per device type that the slow path serves."""
    reason = (
        cpu.unavailable_message()
        if device_type == "cpu"
        else f"there are no compiled kernels for {device_type} tensors"
    )
    warnings.warn(f"PCDVQ layers run on a slow torch path: {reason}.", RuntimeWarning, stacklevel=3)
