"""Quantizing the linears of one stage against the original model's outputs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.packing import pack_codes, pack_signs
from torch import Tensor

from pcdvq_quantizer.calibration.damping import damped
from pcdvq_quantizer.calibration.kronecker import RowFactor, kronecker_ldlq
from pcdvq_quantizer.calibration.ldlq import cholesky_feedback, ldlq
from pcdvq_quantizer.calibration.objectives.base import OutputFisher
from pcdvq_quantizer.calibration.parallel import ALONE, Processes
from pcdvq_quantizer.calibration.statistics import InputStatistics
from pcdvq_quantizer.codebooks import NamedCodebook
from pcdvq_quantizer.layer import (
    ErrorSum,
    QuantizedLinear,
    initial_row_scale,
    refit_row_scale,
    refit_row_scales,
    relative,
)


def quantize_stage(
    weights: list[Tensor],
    statistics: InputStatistics,
    codebook: NamedCodebook,
    signs: Tensor,
    block: int,
    processes: Processes = ALONE,
    outputs: list[OutputFisher] | None = None,
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
        processes: each rounds its share of the rows.
        outputs: for each linear, what errors of its outputs cost; None: all the same.

    Returns:
        (packed layers; what they decode to, fp32 [N_i, K]).
    """
    spec = codebook.codebook.spec
    moments = Moments(
        *processes.once(
            lambda: prepare_moments(statistics.rotated(signs, block), spec.strip_columns)
        )
    )
    shares = [processes.share(len(weight), spec.row_multiple) for weight in weights]
    parts = [weight[share] for weight, share in zip(weights, shares, strict=True)]
    original = block_hadamard(torch.cat(parts) * signs, block)
    lack = None if statistics.lack is None else moments.wanted[shares[0]]
    aim = asymmetric_target(original, moments, lack)
    counts = [len(part) for part in parts]
    if outputs is None or not len(aim):
        codes, row_scale, decoded = _round(aim, moments, codebook, counts)
    else:
        blocks = [b for each, s in zip(outputs, shares, strict=True) for b in each.rows(s)]
        codes, row_scale, decoded = _round_rows(aim, moments, codebook, blocks)
    layers, dense = [], []
    split = (each.split(counts) for each in (original, aim, row_scale, decoded))
    stored = codes.split([spec.stored_rows(count) for count in counts])
    rows = zip(*split, stored, strict=True)
    for weight, (part, wanted, scale, levels, code) in zip(weights, rows, strict=True):
        errors = ErrorSum(spec.direction_length)
        errors.add(part, levels)
        energies = torch.stack(
            [energy(levels - wanted, moments.hessian), energy(part, moments.hessian)]
        )
        processes.sum(errors.sums, energies)
        gather = partial(processes.gather, unit=spec.row_multiple)
        whole = partial(gather, total=len(weight))
        layers.append(
            QuantizedLinear(
                gather(pack_codes(code, spec.code_bits), spec.stored_rows(len(weight))),
                whole(scale),
                pack_signs(signs),
                errors.total(relative(*energies.tolist())),
            )
        )
        dense.append(whole(block_hadamard(levels, block) * signs))
    return layers, dense


class Moments(NamedTuple):
    """What rounding a stage takes, in the basis it is rounded in.

    Attributes:
        hessian: fp32 [K, K], damped.
        feedback: fp32 [K, K], of `cholesky_feedback`.
        factor: fp64 [K, K], Cholesky factor of the Hessian with the target's damping.
        wanted: fp64, `InputStatistics.lack` [N, K], or without it `InputStatistics.cross` [K, K].
    """

    hessian: Tensor
    feedback: Tensor
    factor: Tensor
    wanted: Tensor


def prepare_moments(moments: InputStatistics, columns: int) -> Moments:
    """Everything that costs K^3 operations, whatever the number of rows."""
    hessian, feedback = damped_feedback(moments, columns)
    factor = torch.linalg.cholesky(damped(moments.hessian, moments.damping.target))
    wanted = moments.cross if moments.lack is None else moments.lack
    return Moments(hessian, feedback, factor, wanted)


def _round(
    aim: Tensor, moments: Moments, codebook: NamedCodebook, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, row scales, decoded weights) of `aim` [N, K], linears of so many rows each."""
    scale = initial_row_scale(aim, codebook)
    # Together they are faster; but a linear's first row must begin a chain's segment.
    together = not any(count % codebook.codebook.spec.row_multiple for count in counts)
    parts = [sum(counts)] if together else counts
    rounded = [
        ldlq(part / unit.unsqueeze(1), moments.feedback, codebook.encoder, unit.square())
        for part, unit in zip(aim.split(parts), scale.split(parts), strict=True)
    ]
    codes, levels = (torch.cat(each) for each in zip(*rounded, strict=True))
    row_scale = refit_row_scale(aim, levels, moments.hessian)
    return codes, row_scale, levels * row_scale.float().unsqueeze(1)


def _round_rows(
    aim: Tensor, moments: Moments, codebook: NamedCodebook, blocks: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """`_round` with the Fisher information of the outputs: its diagonal blocks, fp64 [n_i, n_i]."""
    results = []
    for part, fisher in zip(aim.split([len(block) for block in blocks]), blocks, strict=True):
        scale = initial_row_scale(part, codebook)
        rows = RowFactor.of(fisher, codebook.codebook.spec.row_multiple)
        codes, levels = kronecker_ldlq(part, scale, moments.feedback, rows, codebook.encoder)
        row_scale = refit_row_scales(part, levels, moments.hessian, rows.fisher)
        results.append((codes, row_scale, levels * row_scale.float().unsqueeze(1)))
    codes, row_scale, decoded = (torch.cat(each) for each in zip(*results, strict=True))
    return codes, row_scale, decoded


def damped_feedback(moments: InputStatistics, columns: int) -> tuple[Tensor, Tensor]:
    """(damped Hessian fp32 [K, K], its `cholesky_feedback`) of the Hessian of `moments`.

    Dead inputs, or fewer tokens than columns, make a Hessian singular: the damping grows until it
    can be factored.
    """
    share = moments.damping.feedback
    while True:
        hessian = damped(moments.hessian, share)
        try:
            return hessian.float(), cholesky_feedback(hessian, columns)
        except torch.linalg.LinAlgError:
            share *= 10


def asymmetric_target(original: Tensor, moments: Moments, lack: Tensor | None) -> Tensor:
    """W* of `quantize_stage`, fp32 [N, K], for `original` [N, K].

    `lack` is W E[(x_original - x) x^T] + E[r x^T] in one.
    """
    right = original.double() @ moments.wanted if lack is None else lack
    return original + torch.cholesky_solve(right.T, moments.factor).T.float()


def energy(error: Tensor, hessian: Tensor) -> Tensor:
    return ((error @ hessian) * error).sum().double()
