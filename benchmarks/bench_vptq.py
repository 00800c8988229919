"""Speed of `pcdvq::vptq_linear` on the CPU beside torch's bf16 linear, on random codes.

The calls alternate in one process and medians are reported: of CPU time on one thread, of wall time
on more. Codes and dense weights rotate through enough copies not to stay in cache; the tables do
not, as in a layer that is large beside them. Random codes are the worst case for the cache. Tables
are in int8, as they are served on a CPU by default, and beside that as stored, in bf16.
"""

from __future__ import annotations

import argparse

import torch
from pcdvq_kernels import cpu
from pcdvq_kernels.vptq import ops  # noqa: F401 registers the operator
from pcdvq_kernels.vptq.layout import Segment
from pcdvq_kernels.vptq.weight import TABLE_SLACK, Tables

from bench_kernels import interleaved_seconds

# Of published models: vector length, bits of an index and of a residual's.
LAYOUTS = {
    "v8-k65536-0": (8, 16, 0),
    "v8-k65536-256": (8, 16, 8),
    "v8-k65536-65536": (8, 16, 16),
    "v16-k65536-0": (16, 16, 0),
    "v16-k65536-65536": (16, 16, 16),
    "v12-k65536-4096": (12, 16, 12),
}
SHAPES = [(4096, 4096), (14336, 4096)]
COPIES_BYTES = 64 << 20


def measure(n: int, k: int, m: int, segment: Segment, budget: float) -> dict[str, float]:
    """Median seconds of our calls and of torch's, for a weight [n, k] and m tokens."""
    blocks, row_bytes = -(-n // segment.vector_len), segment.row_bytes()
    copies = -(-COPIES_BYTES // (blocks * row_bytes))
    codes = torch.randint(0, 256, (copies, blocks, row_bytes), dtype=torch.uint8)
    table = torch.randn(segment.rows * segment.vector_len + TABLE_SLACK).bfloat16()
    [rounded] = Tables([table], [1.0]).rounded().tensors
    columns, scale, shift = torch.randperm(k).int(), torch.rand(k), torch.rand(k)
    dense = [torch.randn(n, k).bfloat16() for _ in range(-(-COPIES_BYTES // (2 * n * k)))]
    x = torch.randn(m, k).bfloat16()

    def ours(index: int, table: torch.Tensor) -> torch.Tensor:
        return torch.ops.pcdvq.vptq_linear(
            x, columns, scale, shift, [codes[index % copies]], [table], None, [n, 0, *segment]
        )

    calls = {
        "ours": lambda index: ours(index, rounded),
        "stored": lambda index: ours(index, table),
        "torch": lambda index: torch.nn.functional.linear(x, dense[index % len(dense)]),
    }
    return interleaved_seconds(calls, 30, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "K"))
    parser.add_argument("--m", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    args = parser.parse_args()
    if not cpu.available():
        raise SystemExit(f"error: {cpu.unavailable_message()}")
    torch.set_num_threads(args.threads)
    print(
        f"{'layout':<18} {'M':>4} {'N':>6} {'K':>6} {'ms':>8} {'torch ms':>8} {'ratio':>6} "
        f"{'ratio, tables as stored':>23}"
    )
    for n, k in args.shape or SHAPES:
        for layout in args.layout:
            for m in args.m:
                seconds = measure(n, k, m, Segment(k, *LAYOUTS[layout]), args.seconds)
                ours, theirs = 1e3 * seconds["ours"], 1e3 * seconds["torch"]
                print(
                    f"{layout:<18} {m:>4} {n:>6} {k:>6} {ours:>8.2f} {theirs:>8.2f} "
                    f"{theirs / ours:>6.2f} {theirs / (1e3 * seconds['stored']):>23.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
