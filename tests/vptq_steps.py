"""The steps of VPTQ's published algorithm (arXiv 2409.17066, algorithm 1; the branch `algorithm` of
https://github.com/microsoft/VPTQ), done slowly and plainly in fp64. Quality is measured against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal of the Hessian
ITERATIONS, SHIFT = 100, 1e-5  # of k-means: its end by squared movement of the centroids


@dataclass(frozen=True)
class Steps:
    """Options of the algorithm: `length` of vectors, `centroids` and `residuals` (0: none) of the
    tables, whether columns are scaled and shifted by their deviation and mean (`norm`)."""

    length: int
    centroids: int
    residuals: int = 0
    norm: bool = False


def published(weight: Tensor, hessian: Tensor, steps: Steps, seed: int = 0) -> Tensor:
    """What `weight` [N, K] is quantized to for inputs of second moments `hessian` [K, K]: fp64."""
    weight, hessian = weight.double(), hessian.double()
    hessian = hessian / hessian.diagonal().mean() + DAMPING * torch.eye(len(hessian))
    scale, shift = torch.ones(len(hessian)).double(), torch.zeros(len(hessian)).double()
    if steps.norm:
        scale, shift = weight.std(0), weight.mean(0)
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]
    aim = ((weight - shift) / scale)[:, order]
    cost = hessian.diagonal()
    tables = [kmeans(aim, cost, steps.length, steps.centroids, seed)]
    rounded, errors = second_order(aim, hessian, tables)
    if steps.residuals:
        tables.append(kmeans(errors, cost, steps.length, steps.residuals, seed))
        rounded, _ = second_order(aim, hessian, tables)
    return rounded[:, order.argsort()] * scale + shift


def vectors(matrix: Tensor, length: int) -> Tensor:
    """Columns [N, n], zeros added below, as vectors [n * blocks, length]."""
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % length))
    return padded.T.reshape(-1, length)


def closest(points: Tensor, table: Tensor) -> Tensor:
    return torch.cdist(points, table).argmin(1)


def kmeans(matrix: Tensor, cost: Tensor, length: int, count: int, seed: int) -> Tensor:
    """Centroids [count, length] of the vectors of columns, each column weighted by its cost [n]."""
    points = vectors(matrix, length)
    weight = cost.repeat_interleave(len(points) // matrix.shape[1])
    generator = torch.Generator().manual_seed(seed)
    centroids = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(ITERATIONS):
        index = closest(points, centroids)
        mass = torch.zeros(count).double().index_add_(0, index, weight)
        moment = torch.zeros_like(centroids).index_add_(0, index, points * weight[:, None])
        moved = torch.where(mass[:, None] > 0, moment / mass[:, None].clamp_min(1e-300), centroids)
        shift, centroids = (moved - centroids).square().sum(), moved
        if shift < SHIFT:
            break
    return centroids


def second_order(aim: Tensor, hessian: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Columns rounded one by one to sums of entries of `tables`, the nearest of one after another.

    Returns:
        (rounded [N, K]; what each column lacked when it was rounded [N, K]).
    """
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, rounded = aim.clone(), torch.empty_like(aim)
    for column in range(aim.shape[1]):
        vector = vectors(left[:, column : column + 1], tables[0].shape[1])
        found = torch.zeros_like(vector)
        for table in tables:
            found += table[closest(vector - found, table)]
        rounded[:, column] = found.flatten()[: len(aim)]
        wrong = (left[:, column] - rounded[:, column]) / upper[column, column]
        left[:, column + 1 :] -= torch.outer(wrong, upper[column, column + 1 :])
    return rounded, left - rounded
