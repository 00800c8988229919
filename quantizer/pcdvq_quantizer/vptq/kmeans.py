"""Weighted k-means, by which VPTQ makes its tables of centroids."""

from __future__ import annotations

import torch
from pcdvq_kernels.nearest import nearest_codeword
from torch import Tensor

KERNEL_DIMS = (2, 4, 8)  # that `nearest_codeword` has fast code for; it takes no others
ITERATIONS = 50
TOLERANCE = 1e-4  # relative fall of the error below which an iteration was the last
# Of more points than these the heaviest and some of the others are taken: half each.
POINTS_PER_CENTROID = 256
MOST_POINTS = 1 << 19
# Vectors compared with a table at a time where there is no kernel.
CHUNK_SCORES = 1 << 22


def nearest(points: Tensor, table: Tensor) -> Tensor:
    """Index of the row of `table` [C, v] nearest to each of `points`: int64 [P].

    Args:
        points: fp32 [P, v], finite.
        table: fp32 [C, v].
    """
    bias = table.square().sum(1) / 2
    length = points.shape[1]
    wide = next((dim for dim in KERNEL_DIMS if dim >= length), None)
    if wide is not None:
        grow = (0, wide - length)  # zeros change no product
        points = torch.nn.functional.pad(points, grow).contiguous()
        table = torch.nn.functional.pad(table, grow).contiguous()
        return nearest_codeword(points, table, bias).long()
    chunks = points.split(max(1, CHUNK_SCORES // len(table)))
    return torch.cat([(chunk @ table.T - bias).argmax(1) for chunk in chunks])


def weighted_kmeans(points: Tensor, weight: Tensor, count: int, seed: int) -> Tensor:
    """Centroids that make the weighted squared distance of `points` to the nearest one small.

    Lloyd's iteration from points drawn at random. Centroids that no point is nearest to move to
    the points that cost most.

    Args:
        points: fp32 [P, v], finite.
        weight: fp32 [P], not negative: what a squared distance costs.
        count: C.
        seed: of the draw.

    Returns:
        fp32 [C, v]; those that C exceeds the points by are zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    points, weight = _sample(
        points, weight, max(MOST_POINTS, POINTS_PER_CENTROID * count), generator
    )
    if len(points) <= count:
        return torch.nn.functional.pad(points, (0, 0, 0, count - len(points)))
    centroids = points[_draw(weight, count, points.shape[1], generator)]
    last = torch.inf
    for _ in range(ITERATIONS):
        index = nearest(points, centroids)
        cost = (points - centroids[index]).square().sum(1) * weight
        error = cost.sum().item()
        if error >= (1 - TOLERANCE) * last:
            break
        last = error
        mass = weight.new_zeros(count).index_add_(0, index, weight)
        moment = torch.zeros_like(centroids).index_add_(0, index, points * weight.unsqueeze(1))
        used = mass > 0
        centroids = torch.where(used.unsqueeze(1), moment / mass.clamp_min(1e-30).unsqueeze(1), 0)
        if empty := int((~used).sum()):
            centroids[~used] = points[cost.topk(min(empty, len(cost))).indices]
    return centroids


def _draw(weight: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` of the points: as dense as the best centroids of many are, weight^(v / (v + 2)).

    That density is Gersho's (1979), for points of any distribution and squared distances.
    """
    share = (weight / weight.max()).pow(length / (length + 2)).clamp_min(1e-20)
    times = torch.empty_like(share).exponential_(generator=generator) / share
    return times.topk(count, largest=False).indices


def _sample(
    points: Tensor, weight: Tensor, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """At most `most` points in random order with their weights, the same cost on average.

    Inputs of a few columns can outweigh all others by far: the heaviest points are always among
    them.
    """
    order = torch.randperm(len(points), generator=generator)
    weight = weight.clamp_min(1e-30)
    if len(points) > most:
        heavy = weight.topk(most // 2).indices
        light = torch.ones(len(points), dtype=torch.bool)
        light[heavy] = False
        rest = order[light[order]]
        drawn = rest[: most - len(heavy)]
        weight = weight.clone()
        weight[drawn] *= len(rest) / len(drawn)
        order = torch.cat([heavy, drawn])
        order = order[torch.randperm(len(order), generator=generator)]
    return points[order], weight[order]
