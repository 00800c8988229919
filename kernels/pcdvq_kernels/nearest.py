"""Nearest codewords, the inner loop of quantization."""

from __future__ import annotations

from torch import Tensor

from pcdvq_kernels import cpu, cpu_search, fallback


def nearest_codeword(x: Tensor, codewords: Tensor, bias: Tensor) -> Tensor:
    """Index of each group's best codeword: argmax over c of x . codewords[c] - bias[c].

    Args:
        x: fp32 [G, dim], finite, dim 2, 4 or 8; on any device.
        codewords: fp32 [C, dim].
        bias: fp32 [C]; half the squared norms for the nearest in Euclidean distance.

    Returns:
        int32 [G]; of equal scores the lowest index. Scores are rounded to fp32, in an order that
        depends on the device.

    Raises:
        PCDVQError: other dtypes, shapes or devices.
    """
    if x.device.type == "cpu" and cpu.available():
        return cpu_search.nearest(x, codewords, bias)
    return fallback.nearest(x, codewords, bias)
