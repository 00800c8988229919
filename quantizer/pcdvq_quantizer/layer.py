"""Quantizing one linear layer: rotate, round to codes, refit the row scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from pcdvq_kernels.checkpoint import PACKED_TENSORS
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import pack_codes, pack_signs
from torch import Tensor

from pcdvq_quantizer.codebooks import NamedCodebook

CHUNK_WEIGHTS = 1 << 23


@dataclass(frozen=True)
class LayerError:
    """How far a quantized layer is from the original one.

    Attributes:
        weight: |W' - W|^2 / |W|^2; of a layer of zeros 0.0 if it still is one, else 1.0.
        direction: share of it that is due to directions: of a group w stored as q, the error
            |w - q|^2 is 2 |w| |q| (1 - cos) in direction and (|w| - |q|)^2 in magnitude. In codec
            `trellis` a group is a row, whose magnitude is its scale.
        output: E |y' - y|^2 / E |y|^2 on the calibration text, None without calibration. Counts
            what the choice of codes can change: rounding, not the inputs' own errors.
    """

    weight: float
    direction: float
    output: float | None = None


class QuantizedLayer(Protocol):
    """What a method makes of a layer."""

    @property
    def error(self) -> LayerError:
        """Against the original weight."""

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a checkpoint stores of the layer, by its names there after `prefix`."""


@dataclass(frozen=True)
class StoredLayer:
    """A layer as a checkpoint stores it: `packed` by name."""

    packed: dict[str, Tensor]
    error: LayerError

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in self.packed.items()}


@dataclass(frozen=True)
class QuantizedLinear:
    """Packed tensors of one layer (FORMAT.md) and its error.

    Attributes:
        qweight: uint8 [N, row_bytes], of codec `trellis` with N rounded up to whole chains.
        row_scale: bf16 [N].
        signs_in: uint8 [K / 8].
        error: against the original weight.
    """

    qweight: Tensor
    row_scale: Tensor
    signs_in: Tensor
    error: LayerError

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The packed tensors by their names in a checkpoint."""
        packed = (self.qweight, self.row_scale, self.signs_in)
        return {prefix + name: tensor for name, tensor in zip(PACKED_TENSORS, packed, strict=True)}


class ErrorSum:
    """Adds up the error of row chunks of a layer.

    Attributes:
        sums: fp64 [3], squared error in direction and in magnitude, and energy of the original.
    """

    def __init__(self, group: int) -> None:
        """Make an empty sum; `group` is the length of a vector, 0 that of a row."""
        self._group = group
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, rotated: Tensor, decoded: Tensor) -> None:
        """Count rows: original and decoded weights in the rotated basis, fp32 [n, K]."""
        group = self._group or rotated.shape[1]
        w, q = rotated.view(-1, group), decoded.view(-1, group)
        lengths = w.norm(dim=1), q.norm(dim=1)
        magnitude = (lengths[0] - lengths[1]).square().sum()
        # Not from the angle, where rounding would hide small errors of long vectors.
        direction = ((w - q).square().sum() - magnitude).clamp_min(0.0)
        self.sums += torch.stack([direction, magnitude, w.square().sum()]).double()

    def total(self, output: float | None = None) -> LayerError:
        direction, magnitude, energy = self.sums.tolist()
        error = direction + magnitude
        return LayerError(relative(error, energy), direction / error if error else 0.0, output)


def relative(error: float, energy: float) -> float:
    """error / energy; what is no number, the error of nothing, is 0.0 or, if there is one, 1.0."""
    return error / energy if energy > 0 else float(error > 0)


def check_finite(tensor: Tensor, name: str, model: str) -> None:
    """Raises PCDVQError if tensor `name` of `model` is not finite."""
    if not tensor.isfinite().all():
        raise PCDVQError(f"{name} of {model} holds NaN or infinity; get the model again")


def quantize_linear(
    weight: Tensor, codebook: NamedCodebook, signs: Tensor, block: int
) -> QuantizedLinear:
    """Quantize `weight` without calibration: each group to its nearest code.

    Args:
        weight: floating [N, K], finite.
        codebook: tables and unit.
        signs: fp32 [K] of +1 / -1, diagonal of S.
        block: Hadamard block, divides K.
    """
    encoder = codebook.encoder
    spec = encoder.codebook.spec
    # Segments are independent, so working memory is bounded by a chunk of them.
    segments = max(1, CHUNK_WEIGHTS // (weight.shape[1] * spec.row_multiple))
    qweight, row_scale = [], []
    errors = ErrorSum(spec.direction_length)
    for chunk in weight.split(segments * spec.row_multiple):
        rotated = block_hadamard(chunk.float() * signs, block)
        scale = initial_row_scale(rotated, codebook)
        x = rotated / scale.unsqueeze(1)
        codes, levels = encoder.round(x.unflatten(1, (-1, spec.vector_dim)))
        levels = levels.flatten(1)
        refitted = refit_row_scale(rotated, levels)
        errors.add(rotated, levels * refitted.float().unsqueeze(1))
        qweight.append(pack_codes(codes, spec.code_bits))
        row_scale.append(refitted)
    return QuantizedLinear(
        torch.cat(qweight), torch.cat(row_scale), pack_signs(signs), errors.total()
    )


def initial_row_scale(rotated: Tensor, codebook: NamedCodebook) -> Tensor:
    """Row scales fp32 [N] that bring `rotated` [N, K] to the codebook's unit.

    Any positive scale decodes a row of zeros; its refitted scale is 0.
    """
    return (rotated.square().mean(1).sqrt() / codebook.unit).clamp_min(1e-30)


def refit_row_scale(rotated: Tensor, levels: Tensor, hessian: Tensor | None = None) -> Tensor:
    """Least-squares row scales, bf16 [N], of `levels` for `rotated` (both fp32 [N, K]).

    Args:
        hessian: fp32 [K, K] of the output error to minimise; None for the weight error.
    """
    weighted = levels if hessian is None else levels @ hessian
    power = (levels * weighted).sum(1).clamp_min(1e-30)
    return ((rotated * weighted).sum(1) / power).to(torch.bfloat16)


def refit_row_scales(rotated: Tensor, levels: Tensor, hessian: Tensor, fisher: Tensor) -> Tensor:
    """Row scales, bf16 [N], that together minimise tr(A E H E^T).

    E is diag(scales) levels - rotated.

    Args:
        rotated, levels: fp32 [N, K].
        hessian: H, fp32 [K, K].
        fisher: A, fp64 [N, N], positive definite.
    """
    weighted = (levels @ hessian).double()
    normal = fisher * (weighted @ levels.double().T)  # [N, N]
    diagonal = normal.diagonal()
    unused = diagonal <= 0  # rows of zero levels, whose scale does not matter
    diagonal[unused] = 1.0
    right = ((fisher @ rotated.double()) * weighted).sum(1)
    scale = torch.linalg.solve(normal, right.masked_fill(unused, 0.0))
    return scale.to(torch.bfloat16)
