"""The tables of a layer, its codes, and what they decode to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pcdvq_quantizer.vptq.kmeans import nearest

# Up to so many sums of a centroid and a residual are compared one by one; above, the residual is
# chosen after the centroid.
MOST_SUMS = 1 << 12


@dataclass
class Tables:
    """Tables of a run of columns: outliers or a group.

    Attributes:
        columns: which, in the order that columns are stored in.
        centroids: fp32 [C, v].
        residuals: fp32 [R, v], or None.
    """

    columns: slice
    centroids: Tensor
    residuals: Tensor | None = None

    def parts(self) -> list[Tensor]:
        return [self.centroids] if self.residuals is None else [self.centroids, self.residuals]

    def replaced(self, parts: list[Tensor]) -> Tables:
        """With other values; `parts` as from `parts()`."""
        return Tables(self.columns, *parts)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of normalized columns.

        Args:
            x: fp32 [N, n].

        Returns:
            int64 [1 or 2, blocks, n]: centroid, and residual if there are any.
        """
        vectors = to_vectors(x, self.centroids.shape[1])
        points = vectors.flatten(0, 1)
        if self.residuals is None:
            codes = [nearest(points, self.centroids)]
        elif len(self.centroids) * len(self.residuals) <= MOST_SUMS:
            sums = (self.centroids.unsqueeze(1) + self.residuals).flatten(0, 1)
            index = nearest(points, sums)
            codes = [index // len(self.residuals), index % len(self.residuals)]
        else:
            index = nearest(points, self.centroids)
            codes = [index, nearest(points - self.centroids[index], self.residuals)]
        return torch.stack(codes).unflatten(1, vectors.shape[:2])

    def decode(self, codes: Tensor, rows: int) -> Tensor:
        """Normalized columns fp32 [rows, n] of `codes`, as from `encode`."""
        vectors = self.centroids[codes[0]]
        if self.residuals is not None:
            vectors = vectors + self.residuals[codes[1]]
        return to_rows(vectors, rows)

    def gather(self, codes: Tensor, x: Tensor) -> list[Tensor]:
        """The transpose of `decode`: sums of the vectors of `x` [N, n] that share a code."""
        vectors = to_vectors(x, self.centroids.shape[1]).flatten(0, 1)
        return [
            torch.zeros_like(table).index_add_(0, code.flatten(), vectors)
            for table, code in zip(self.parts(), codes, strict=True)
        ]


def to_vectors(x: Tensor, length: int) -> Tensor:
    """Columns [N, n] as vectors [blocks, n, length] of rows that follow each other; zeros after."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % length))
    return padded.unflatten(0, (-1, length)).transpose(1, 2)


def to_rows(vectors: Tensor, rows: int) -> Tensor:
    """Inverse of `to_vectors`: [rows, n]."""
    return vectors.transpose(1, 2).flatten(0, 1)[:rows]
