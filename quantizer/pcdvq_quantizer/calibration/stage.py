"""Quantizing the linears of one stage against the original model's outputs."""

from __future__ import annotations

import torch
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import pack_codes, pack_signs
from torch import Tensor

from pcdvq_quantizer.calibration.ldlq import cholesky_feedback, ldlq
from pcdvq_quantizer.calibration.statistics import InputStatistics
from pcdvq_quantizer.codebooks import NamedCodebook
from pcdvq_quantizer.layer import (
    ErrorSum,
    QuantizedLinear,
    initial_row_scale,
    refit_row_scale,
)

DAMPING = 0.01  # of the mean diagonal of the Hessian


def quantize_stage(
    weights: list[Tensor],
    statistics: InputStatistics,
    codebook: NamedCodebook,
    signs: Tensor,
    block: int,
) -> tuple[list[QuantizedLinear], list[Tensor]]:
    """Quantize linears that read the same activation.

    What is rounded is not W but the weights W* that give the original model's outputs on the
    quantized model's inputs, min E |W x_original - W* x|^2 (asymmetric calibration, as in GPTAQ,
    arXiv 2504.02692), held near W where the calibration text says nothing:
    W* (H + d I) = W (M + d I), M = E[x_original x^T].

    Args:
        weights: fp32 [N_i, K].
        statistics: moments of their input.
        codebook: for all of them.
        signs, block: of the rotation, as in `quantize_linear`.

    Returns:
        (packed layers; what they decode to, fp32 [N_i, K]).
    """
    moments = statistics.rotated(signs, block)
    original = block_hadamard(torch.cat(weights) * signs, block)
    vector_dim = codebook.codebook.spec.vector_dim
    hessian, feedback, damping = damped_feedback(moments.hessian, vector_dim)
    aim = _asymmetric_target(original, moments.cross, hessian, damping)
    hessian = hessian.float()
    scale = initial_row_scale(aim, codebook)
    codes, levels = ldlq(aim / scale.unsqueeze(1), feedback, codebook.encoder, scale.square())
    row_scale = refit_row_scale(aim, levels, hessian)
    decoded = levels * row_scale.float().unsqueeze(1)
    layers = []
    start = 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        errors = ErrorSum(vector_dim)
        errors.add(original[rows], decoded[rows])
        output = _energy(decoded[rows] - aim[rows], hessian) / _energy(original[rows], hessian)
        layers.append(
            QuantizedLinear(
                pack_codes(codes[rows], codebook.codebook.spec.code_bits),
                row_scale[rows],
                pack_signs(signs),
                errors.total(output),
            )
        )
        start = rows.stop
    dense = block_hadamard(decoded, block) * signs
    return layers, list(dense.split([len(weight) for weight in weights]))


def damped_feedback(hessian: Tensor, vector_dim: int) -> tuple[Tensor, Tensor, float]:
    """(damped Hessian fp64 [K, K], its `cholesky_feedback`, what was added to the diagonal).

    Dead inputs, or fewer tokens than columns, make a Hessian singular: the damping grows until it
    can be factored.
    """
    mean = hessian.diagonal().mean().item() or 1.0
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    share = DAMPING
    while True:
        damped = hessian + share * mean * identity
        try:
            return damped, cholesky_feedback(damped, vector_dim), share * mean
        except torch.linalg.LinAlgError:
            share *= 10


def _asymmetric_target(original: Tensor, cross: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """W* of `quantize_stage`, fp32 [N, K]; hessian and damping of `damped_feedback`."""
    wide = original.double()
    right = wide @ cross + damping * wide
    return torch.linalg.solve(hessian, right, left=False).float()


def _energy(error: Tensor, hessian: Tensor) -> float:
    return ((error @ hessian) * error).sum().item()
