"""Codes of the codecs with states, the inner loop of their quantization."""

from __future__ import annotations

from torch import Tensor

from pcdvq_kernels import cpu, cpu_search, fallback


def trellis_codes(
    x: Tensor, row_weight: Tensor, codewords: Tensor, parity: bool, state_bits: int
) -> Tensor:
    """Codes whose levels have the least weighted squared error in every segment (FORMAT.md).

    Minimises the sum over rows n of row_weight[n] * |x[n] - levels[n]|^2 by dynamic programming.
    Signs are those of x; with parity, the smallest coordinate of a group may have the other.

    Args:
        x: fp32 [N, G, dim], finite, dim 2, 4 or 8; row 0 is the first of a segment. On any device.
        row_weight: fp32 [N], not negative.
        codewords: fp32 [2 ** state_bits * 2 ** field_bits * (2 if parity else 1), dim], ordered
            [state][field][parity]; the top state_bits of a field are the state of the row below.
        parity: whether the parity of the sign bits selects codewords.
        state_bits: 1 to 4, at most field_bits.

    Returns:
        int32 [N, G]: sign bits, above them the field. Scores are rounded to fp32, in an order that
        depends on the device.

    Raises:
        PCDVQError: other dtypes, shapes or devices.
    """
    run = cpu_search.trellis if x.device.type == "cpu" and cpu.available() else fallback.trellis
    return run(x, row_weight, codewords, parity, state_bits)


def window_codes(x: Tensor, row_weight: Tensor, table: Tensor, code_bits: int) -> Tensor:
    """Codes of codec `compact` with the least weighted squared error in every segment.

    As `trellis_codes`, coordinate by coordinate.

    Args:
        x: fp32 [N, G, 4], finite; row 0 is the first of a segment. On any device.
        row_weight: fp32 [N], not negative.
        table: fp32 [128, 4], the directions.
        code_bits: 8, 12 or 16.

    Returns:
        int32 [N, G].

    Raises:
        PCDVQError: other dtypes, shapes or devices.
    """
    on_cpu = x.device.type == "cpu" and cpu.available()
    run = cpu_search.window_codes if on_cpu else fallback.window_codes
    return run(x, row_weight, table, code_bits)


def chain_codes(
    x: Tensor, row_weight: Tensor, code_bits: int, singles: bool, chain_rows: int, effort: str
) -> Tensor:
    """Codes of the computed trellis whose levels are near x (FORMAT.md).

    Minimises for every chain the sum over its weights of row_weight * (x - level)^2, in integers:
    targets beyond 255 count as 255, and row weights as multiples, not zero, of the largest in the
    chain over 4096 / 2 ** new, where new is code_bits, or half of it (rounded up) for singles; at
    least 4 for a quick search.

    Args:
        x: fp32 [N, K], finite, in units of levels (divided by the row scale). N is a multiple of
            chain_rows, K is even. On any device; the search runs on the CPU.
        row_weight: fp32 [N], not negative; rows of weight 0 mean nothing.
        code_bits: 3 to 8, twice the bits of a weight.
        singles: whether every weight has a window of its own.
        chain_rows: 64, 32 or 16.
        effort: "exhaustive", or "quick" for more error.

    Returns:
        uint8 [N, K / 2], the same on every CPU and with any number of threads.

    Raises:
        PCDVQError: other arguments, or no compiled CPU kernels.
    """
    codes = cpu_search.chain_codes(
        x.cpu(), row_weight.cpu(), code_bits, singles, chain_rows, effort
    )
    return codes.to(x.device)
