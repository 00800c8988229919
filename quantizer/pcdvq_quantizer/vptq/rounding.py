"""VPTQ's second-order rounding of a weight, and the tables that fit it best.

The paper (arXiv 2409.17066) makes tables by k-means weighted by the Hessian, rounds column after
column with the error of each made up for by the columns after it, and tunes the tables afterwards.
Here the tuning is a least-squares problem, solved by conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pcdvq_quantizer.vptq.kmeans import weighted_kmeans
from pcdvq_quantizer.vptq.tables import Tables, to_vectors

SPAN = 128  # columns whose feedback is applied at once to all columns after them
ROUNDS = 2  # of rounding and refitting
STEPS = 12  # of conjugate gradients
CONVERGED = 1e-12  # share of the first step's power that is only rounding


@dataclass(frozen=True)
class Problem:
    """What is rounded, columns in the order they are rounded in.

    Attributes:
        aim: fp32 [N, K].
        hessian: fp32 [K, K], damped.
        feedback: fp32 [K, K], `cholesky_feedback` F of it for single columns.
        cost: fp32 [K], `column_costs` of both.
        scale, shift: fp32 [K]: columns are normalized, (aim - shift) / scale.
    """

    aim: Tensor
    hessian: Tensor
    feedback: Tensor
    cost: Tensor
    scale: Tensor
    shift: Tensor

    def decode(self, tables: list[Tables], codes: list[Tensor]) -> Tensor:
        """The weight fp32 [N, K] of `codes`."""
        rows = len(self.aim)
        parts = [table.decode(code, rows) for table, code in zip(tables, codes, strict=True)]
        return torch.cat(parts, 1) * self.scale + self.shift


def column_costs(hessian: Tensor, feedback: Tensor) -> Tensor:
    """What a squared error in each column costs when those after it make up for it, fp32 [K].

    That is D of F H F^T = D, where the published algorithm weighs with the diagonal of H: the
    errors of k-means are then those that count in the end.
    """
    return ((feedback @ hessian) * feedback).sum(1)


def make_tables(problem: Problem, columns: slice, length: int, count: int, seed: int) -> Tables:
    """Centroids of `columns` by k-means, weighted by what errors cost: [count, length]."""
    x = (problem.aim[:, columns] - problem.shift[columns]) / problem.scale[columns]
    return Tables(columns, _kmeans(problem, columns, x, length, count, seed))


def add_residuals(
    problem: Problem, tables: Tables, errors: Tensor, count: int, seed: int
) -> Tables:
    """`tables` with `count` residuals, by k-means on what columns lacked, `errors` [N, n]."""
    length = tables.centroids.shape[1]
    residuals = _kmeans(problem, tables.columns, errors, length, count, seed)
    return Tables(tables.columns, tables.centroids, residuals)


def _kmeans(
    problem: Problem, columns: slice, x: Tensor, length: int, count: int, seed: int
) -> Tensor:
    vectors = to_vectors(x, length)
    cost = problem.cost[columns] * problem.scale[columns].square()
    weight = cost.expand(vectors.shape[:2]).flatten()
    return weighted_kmeans(vectors.flatten(0, 1).contiguous(), weight, count, seed)


def round_columns(problem: Problem, tables: list[Tables]) -> tuple[list[Tensor], Tensor]:
    """Codes with error feedback.

    Returns:
        (codes of each of `tables`; what each column still lacked when it was rounded, normalized,
        fp32 [N, K]).
    """
    x = problem.aim.clone()
    lacks = torch.empty_like(x)
    codes: list[list[Tensor]] = [[] for _ in tables]
    sizes = [table.columns.stop - table.columns.start for table in tables]
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    for start in range(0, x.shape[1], SPAN):
        end = min(start + SPAN, x.shape[1])
        error = x.new_empty(len(x), end - start)
        for column in range(start, end):
            table, one = tables[owner[column]], slice(column, column + 1)
            scale, shift = problem.scale[one], problem.shift[one]
            wanted = (x[:, one] - shift) / scale
            code = table.encode(wanted)
            lacks[:, one] = wanted - table.decode(code, len(x))
            wrong = lacks[:, one] * scale
            x[:, column + 1 : end] -= wrong * problem.feedback[column, column + 1 : end]
            error[:, column - start] = wrong[:, 0]
            codes[owner[column]].append(code)
        x[:, end:] -= error @ problem.feedback[start:end, end:]
    return [torch.cat(each, 2) for each in codes], lacks


def refit_tables(problem: Problem, tables: list[Tables], codes: list[Tensor]) -> list[Tables]:
    """Tables that make tr(E H E^T) least for these `codes`, E = W' - W*: conjugate gradients."""

    def transposed(x: Tensor) -> list[Tensor]:
        """Of the linear map from tables to weights."""
        parts = zip(tables, codes, strict=True)
        return [g for table, code in parts for g in table.gather(code, x[:, table.columns])]

    def weights(values: list[Tensor]) -> Tensor:
        left = iter(values)
        parts = [
            table.replaced([next(left) for _ in table.parts()]).decode(code, len(problem.aim))
            for table, code in zip(tables, codes, strict=True)
        ]
        return torch.cat(parts, 1) * problem.scale

    cost = problem.hessian.diagonal() * problem.scale.square()
    shares = transposed(cost.expand(problem.aim.shape))
    scaling = [1 / share.clamp_min(1e-30) * (share > 0) for share in shares]
    value = [part for table in tables for part in table.parts()]
    lack = problem.aim - problem.decode(tables, codes)
    residual = transposed(lack @ problem.hessian * problem.scale)
    direction: list[Tensor] = []
    first = power = 0.0
    for _ in range(STEPS):
        step = [r * m for r, m in zip(residual, scaling, strict=True)]
        before, power = power, _dot(residual, step)
        first = first or power
        if power <= CONVERGED * first:
            break
        if direction:
            step = [s + power / before * d for s, d in zip(step, direction, strict=True)]
        direction = step
        image = transposed(weights(direction) @ problem.hessian * problem.scale)
        length = power / max(_dot(direction, image), 1e-30)
        value = [v + length * d for v, d in zip(value, direction, strict=True)]
        residual = [r - length * i for r, i in zip(residual, image, strict=True)]
    left = iter(value)
    return [table.replaced([next(left) for _ in table.parts()]) for table in tables]


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))
