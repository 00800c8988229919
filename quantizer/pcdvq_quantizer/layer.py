"""Quantizing one linear layer: rotate, round to codes, refit the row scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pcdvq_kernels.checkpoint import PACKED_TENSORS
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import pack_codes, pack_signs
from torch import Tensor

from pcdvq_quantizer.codebooks import NamedCodebook
from pcdvq_quantizer.encode import Encoder

CHUNK_WEIGHTS = 1 << 23

Rounding = Callable[[Tensor, Encoder], Tensor]
"""Chooses codes: (rotated weights in units of the row scale, fp32 [N, K]; encoder) to int64
codes [N, K / g]. Segments of rows are independent. Calibrated methods (LDLQ) implement this
signature with their Hessian bound to it."""


@dataclass(frozen=True)
class QuantizedLinear:
    """Packed tensors of one layer (FORMAT.md) and its error.

    Attributes:
        qweight: uint8 [N, row_bytes].
        row_scale: bf16 [N].
        signs_in: uint8 [K / 8].
        relative_error: |W' - W|^2 / |W|^2.
    """

    qweight: Tensor
    row_scale: Tensor
    signs_in: Tensor
    relative_error: float

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The packed tensors by their names in a checkpoint."""
        packed = (self.qweight, self.row_scale, self.signs_in)
        return {prefix + name: tensor for name, tensor in zip(PACKED_TENSORS, packed, strict=True)}


def round_to_nearest(rotated: Tensor, encoder: Encoder) -> Tensor:
    """The uncalibrated `Rounding`: each group to its nearest code."""
    return encoder.encode(rotated.unflatten(1, (-1, encoder.codebook.spec.vector_dim)))


def quantize_linear(
    weight: Tensor,
    codebook: NamedCodebook,
    signs: Tensor,
    block: int,
    rounding: Rounding = round_to_nearest,
) -> QuantizedLinear:
    """Quantize `weight`.

    Args:
        weight: floating [N, K], finite.
        codebook: tables and unit.
        signs: fp32 [K] of +1 / -1, diagonal of S.
        block: Hadamard block, divides K.
        rounding: how codes are chosen.
    """
    encoder = codebook.encoder
    spec = encoder.codebook.spec
    # Segments are independent, so working memory is bounded by a chunk of them.
    segments = max(1, CHUNK_WEIGHTS // (weight.shape[1] * spec.row_multiple))
    qweight, row_scale = [], []
    error = energy = 0.0
    for chunk in weight.split(segments * spec.row_multiple):
        rotated = block_hadamard(chunk.float() * signs, block)
        # Any positive scale decodes a row of zeros; its refitted scale is 0.
        scale = (rotated.square().mean(1).sqrt() / codebook.unit).clamp_min(1e-30)
        codes = rounding(rotated / scale.unsqueeze(1), encoder)
        levels = encoder.codebook.decode(codes).flatten(1).float()
        refitted = refit_row_scale(rotated, levels)
        error += (levels * refitted.float().unsqueeze(1) - rotated).square().sum().item()
        energy += rotated.square().sum().item()
        qweight.append(pack_codes(codes, spec.code_bits))
        row_scale.append(refitted)
    return QuantizedLinear(
        torch.cat(qweight), torch.cat(row_scale), pack_signs(signs), error / max(energy, 1e-30)
    )


def refit_row_scale(rotated: Tensor, levels: Tensor) -> Tensor:
    """Least-squares row scales, bf16 [N], of `levels` for `rotated` (both fp32 [N, K])."""
    power = levels.square().sum(1).clamp_min(1e-30)
    return ((rotated * levels).sum(1) / power).to(torch.bfloat16)
