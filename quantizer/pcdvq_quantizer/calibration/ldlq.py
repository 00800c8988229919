"""Rounding with error feedback (block LDLQ) to the Hessian of a layer's output error.

The error of a layer on its inputs x is E |(W' - W) x|^2 = tr((W' - W) H (W' - W)^T), H = E[x x^T].
Rounding group by group and letting the groups that are still to come make up for the error made so
far minimises it greedily (GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304; for vectors, QuIP#,
arXiv 2402.04396, section 4.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_quantizer.encode import Encoder

SPAN = 128  # Columns whose feedback is applied at once to all columns after them.


def cholesky_feedback(hessian: Tensor, vector_dim: int) -> Tensor:
    """What an error in one group changes in the groups after it.

    Args:
        hessian: fp64 [K, K], positive definite.
        vector_dim: g, columns of a group.

    Returns:
        fp32 [K, K]: rounding group B with error e [g] is made up for by subtracting
        `e @ feedback[B, R]` from the groups R after it.

    Raises:
        torch.linalg.LinAlgError: `hessian` is not positive definite.
    """
    size = len(hessian)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rows = upper.view(-1, vector_dim, size)  # [K / g, g, K]
    groups = torch.arange(len(rows))
    diagonal = rows.unflatten(2, (-1, vector_dim))[groups, :, groups]  # [K / g, g, g]
    return torch.linalg.solve_triangular(diagonal, rows, upper=True).float().reshape(size, size)


def ldlq(
    x: Tensor, feedback: Tensor, encoder: Encoder, row_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes of `x` with error feedback.

    Args:
        x: fp32 [N, K] in units of the row scales.
        feedback: of `cholesky_feedback`.
        encoder: chooses codes.
        row_weight: fp32 [N], importance of each row's error.

    Returns:
        (codes int64 [N, K / g], levels fp32 [N, K]).
    """
    x = x.clone()
    step = encoder.codebook.spec.vector_dim
    levels, codes = torch.empty_like(x), []
    for start in range(0, x.shape[1], SPAN):
        end = min(start + SPAN, x.shape[1])
        error = x.new_empty(len(x), end - start)
        for left in range(start, end, step):
            right = left + step
            code, level = encoder.round(x[:, left:right], row_weight)
            codes.append(code)
            levels[:, left:right] = level
            error[:, left - start : right - start] = x[:, left:right] - level
            x[:, right:end] -= (
                error[:, left - start : right - start] @ feedback[left:right, right:end]
            )
        x[:, end:] -= error @ feedback[start:end, end:]
    return torch.stack(codes, 1), levels


def descend(
    x: Tensor, codes: Tensor, levels: Tensor, hessian: Tensor, encoder: Encoder, row_weight: Tensor
) -> None:
    """One pass of coordinate descent: choose each group anew, given all others. In place.

    Args:
        x: fp32 [N, K] in units of the row scales, the target.
        codes, levels: as of `ldlq`.
        hessian: fp32 [K, K].
    """
    step = encoder.codebook.spec.vector_dim
    inverse = _diagonal_blocks(hessian, step).double().inverse().float()
    gradient = (x - levels) @ hessian
    for start in range(0, x.shape[1], SPAN):
        end = min(start + SPAN, x.shape[1])
        before = levels[:, start:end].clone()
        for left in range(start, end, step):
            right = left + step
            best = levels[:, left:right] + gradient[:, left:right] @ inverse[left // step]
            code, level = encoder.round(best, row_weight)
            change = level - levels[:, left:right]
            gradient[:, start:end] -= change @ hessian[left:right, start:end]
            codes[:, left // step] = code
            levels[:, left:right] = level
        change = levels[:, start:end] - before
        gradient[:, end:] -= change @ hessian[start:end, end:]
        gradient[:, :start] -= change @ hessian[start:end, :start]


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[K / size, size, size] of `matrix` [K, K]."""
    blocks = matrix.view(len(matrix) // size, size, -1, size)
    index = torch.arange(len(blocks))
    return blocks[index, :, index]
