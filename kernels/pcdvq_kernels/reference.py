"""Slow fp32 reference of everything the kernels compute. Kernels are tested against it."""

from __future__ import annotations

from torch import Tensor

from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import unpack_codes, unpack_signs


def decode_levels(qweight: Tensor, codebook: Codebook, in_features: int) -> Tensor:
    """Decode codes to levels.

    Args:
        qweight: uint8 [N, spec.row_bytes(K)], whole chains.
        codebook: its codebook.
        in_features: K.

    Returns:
        int8 [N, K]: Q of FORMAT.md.
    """
    spec = codebook.spec
    codes = unpack_codes(qweight, spec.code_bits, in_features // spec.vector_dim)
    return codebook.decode(codes).flatten(1)


def rotate_activations(x: Tensor, signs_in: Tensor, block: int) -> Tensor:
    """H S x in fp32: x floating [..., K], signs_in uint8 [K / 8]."""
    return block_hadamard(x.float() * unpack_signs(signs_in), block)


def dequantize(
    qweight: Tensor, row_scale: Tensor, signs_in: Tensor, codebook: Codebook, block: int
) -> Tensor:
    """The dense weight W' = R Q H S, fp32 [N, K]."""
    in_features = 8 * signs_in.numel()
    levels = decode_levels(qweight, codebook, in_features)[: len(row_scale)].float()
    return block_hadamard(levels, block) * unpack_signs(signs_in) * row_scale.float().unsqueeze(1)


def embedding(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codebook: Codebook,
    block: int,
) -> Tensor:
    """Rows `ids` (int [...]) of W', fp32 [..., K]."""
    return dequantize(qweight, row_scale, signs_in, codebook, block)[ids.long()]


def linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codebook: Codebook,
    block: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y = R (Q H S x) + b in fp32, [..., N], from x [..., K]."""
    levels = decode_levels(qweight, codebook, x.shape[-1])[: len(row_scale)].float()
    y = rotate_activations(x, signs_in, block) @ levels.T * row_scale.float()
    return y if bias is None else y + bias.float()
