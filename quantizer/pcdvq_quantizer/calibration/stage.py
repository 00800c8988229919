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

# Added to the diagonal of a Hessian, as a share of its mean: see QUALITY.md.
DAMPING_TOKENS = 720  # 0.03 at 24 thousand tokens, more where the Hessian is less certain
TARGET_DAMPING = 0.5


def quantize_stage(
    weights: list[Tensor],
    statistics: InputStatistics,
    codebook: NamedCodebook,
    signs: Tensor,
    block: int,
) -> tuple[list[QuantizedLinear], list[Tensor]]:
    """Quantize linears that read the same activation.

    What is rounded is not W but the weights W* that give the original model's outputs on the
    quantized model's inputs x, min E |W x_original + r - W* x|^2 (asymmetric calibration, as in
    GPTAQ, arXiv 2504.02692). r is what the residual stream lacks, for layers that add to it. W* is
    held near W, since it is learnt from few tokens:
    W* = W + (W E[(x_original - x) x^T] + E[r x^T]) (H + d I)^-1.

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
    hessian, feedback = damped_feedback(moments, vector_dim)
    aim = _asymmetric_target(original, moments)
    scale = initial_row_scale(aim, codebook)
    # Together they are faster; but a linear's first row must begin a segment of the trellis.
    counts = [len(weight) for weight in weights]
    together = not any(count % codebook.codebook.spec.row_multiple for count in counts)
    parts = [sum(counts)] if together else counts
    rounded = [
        ldlq(part / unit.unsqueeze(1), feedback, codebook.encoder, unit.square())
        for part, unit in zip(aim.split(parts), scale.split(parts), strict=True)
    ]
    codes, levels = (torch.cat(each) for each in zip(*rounded, strict=True))
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
    return layers, list(dense.split(counts))


def damped_feedback(moments: InputStatistics, vector_dim: int) -> tuple[Tensor, Tensor]:
    """(damped Hessian fp32 [K, K], its `cholesky_feedback`) of the Hessian of `moments`.

    Dead inputs, or fewer tokens than columns, make a Hessian singular: the damping grows until it
    can be factored.
    """
    share = min(1.0, DAMPING_TOKENS / moments.tokens)
    while True:
        damped = _damped(moments.hessian, share)
        try:
            return damped.float(), cholesky_feedback(damped, vector_dim)
        except torch.linalg.LinAlgError:
            share *= 10


def _asymmetric_target(original: Tensor, moments: InputStatistics) -> Tensor:
    """W* of `quantize_stage`, fp32 [N, K], for `original` [N, K].

    `moments.lack` is W E[(x_original - x) x^T] + E[r x^T] in one.
    """
    hessian = _damped(moments.hessian, TARGET_DAMPING)
    right = original.double() @ moments.cross if moments.lack is None else moments.lack
    factor = torch.linalg.cholesky(hessian)
    return original + torch.cholesky_solve(right.T, factor).T.float()


def _damped(hessian: Tensor, share: float) -> Tensor:
    """`hessian` with `share` of its mean diagonal added to the diagonal."""
    mean = hessian.diagonal().mean().item() or 1.0
    return hessian + share * mean * torch.eye(len(hessian), dtype=hessian.dtype)


def _energy(error: Tensor, hessian: Tensor) -> float:
    return ((error @ hessian) * error).sum().item()
