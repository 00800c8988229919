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


def cholesky_feedback(hessian: Tensor, columns: int) -> Tensor:
    """What an error in one group changes in the groups after it.

    Args:
        hessian: fp64 [K, K], positive definite.
        columns: g, of a group: those that are rounded together.

    Returns:
        fp32 [K, K]: rounding group B with error e [g] is made up for by subtracting
        `e @ feedback[B, R]` from the groups R after it.

    Raises:
        torch.linalg.LinAlgError: `hessian` is not positive definite.
    """
    return feedback_of(inverse_cholesky(hessian), columns)


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Upper U, fp64 [K, K], with U^T U the inverse of `hessian`; errors as `cholesky_feedback`."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def feedback_of(upper: Tensor, columns: int) -> Tensor:
    """`cholesky_feedback` for the result of `inverse_cholesky`."""
    size = len(upper)
    rows = upper.view(-1, columns, size)  # [K / g, g, K]
    groups = torch.arange(len(rows))
    diagonal = rows.unflatten(2, (-1, columns))[groups, :, groups]  # [K / g, g, g]
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
        (codes int64 [N, groups], N of whole chains; levels fp32 [N, K]).
    """
    x = x.clone()
    spec = encoder.codebook.spec
    step = spec.strip_columns
    levels, codes = torch.empty_like(x), []
    for start in range(0, x.shape[1], SPAN):
        end = min(start + SPAN, x.shape[1])
        error = x.new_empty(len(x), end - start)
        for left in range(start, end, step):
            right = left + step
            groups = x[:, left:right].unflatten(1, (-1, spec.vector_dim))
            code, level = encoder.round(groups.contiguous(), row_weight)
            level = level.flatten(1)
            wrong = x[:, left:right] - level
            x[:, right:end] -= wrong @ feedback[left:right, right:end]
            error[:, left - start : right - start] = wrong
            levels[:, left:right] = level
            codes.append(code)
        x[:, end:] -= error @ feedback[start:end, end:]
    return torch.cat(codes, 1), levels
