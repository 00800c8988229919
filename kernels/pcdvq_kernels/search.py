"""Codes of codec `trellis`, the inner loop of its quantization."""

from __future__ import annotations

from torch import Tensor

from pcdvq_kernels import cpu, cpu_search, fallback


def chain_codes(
    x: Tensor, row_weight: Tensor, code_bits: int, chain_rows: int, effort: str = "exhaustive"
) -> Tensor:
    """Codes whose levels have the least weighted squared error in every chain (FORMAT.md).

    Minimises the sum over rows n of row_weight[n] * |x[n] - levels[n]|^2 by dynamic programming.
    Targets beyond 255 count as 255. Weights are rounded to a multiple, not zero, of their chain's
    largest times 2 ** (new bits of a window) / 4096.

    Args:
        x: fp32 [N, K], finite, in levels; N whole segments, K even: the last strip may be narrower.
            On any device.
        row_weight: fp32 [N], not negative.
        code_bits: 3 to 8.
        chain_rows: 64, 32 or 16.
        effort: "exhaustive", or "quick" for less time and a somewhat larger error.

    Returns:
        uint8 [N, K / 2].

    Raises:
        PCDVQError: other dtypes, shapes or devices.
    """
    if x.device.type == "cpu" and cpu.available():
        return cpu_search.chain_codes(x, row_weight, code_bits, chain_rows, effort)
    return fallback.chain_codes(x, row_weight, code_bits, chain_rows)
