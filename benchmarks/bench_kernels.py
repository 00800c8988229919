"""Speed of `pcdvq::linear` on the CPU, beside torch's bf16 linear on the same shapes.

Each shape is checked against the reference before it is timed. Ours and torch's calls alternate
in one process, so that a busy machine slows both, and medians are reported. The weights of a
timed shape rotate through enough copies not to stay in cache at M = 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pcdvq_kernels import cpu, reference
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.hadamard import choose_block
from pcdvq_kernels.ops import Layout
from pcdvq_quantizer.codebooks import OFFERED, get_codebook
from torch import Tensor

TOLERANCE = 1e-4  # of the outputs' root mean square, fp32 activations
CHECKED_ROWS = 256  # weight rows compared with the reference

CODECS = {f"{codec}-{bits:g}": (codec, bits) for codec in OFFERED for bits in OFFERED[codec]}
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (576, 1536), (1536, 576)]
QUICK_SHAPES = [(4096, 4096), (576, 1536)]


@dataclass(frozen=True)
class Layer:
    """Random layers [N, K] of one codec that differ in their codes only."""

    codebook: Codebook
    codewords: Tensor
    qweights: list[Tensor]
    row_scale: Tensor
    signs_in: Tensor
    block: int

    def __call__(self, x: Tensor, index: int) -> Tensor:
        return torch.ops.pcdvq.linear(
            x,
            self.qweights[index % len(self.qweights)],
            self.row_scale,
            self.signs_in,
            self.codewords,
            None,
            Layout(self.block, self.codebook.spec).to_ints(),
        )

    def check(self, x: Tensor) -> None:
        """Raise RuntimeError if the first rows of the output are far from the reference's."""
        rows = slice(0, CHECKED_ROWS)
        x = x.float()
        expected = reference.linear(
            x,
            self.qweights[0][rows],
            self.row_scale[rows],
            self.signs_in,
            self.codebook,
            self.block,
        )
        error = (self(x, 0)[:, rows] - expected).abs().max()
        if not error < TOLERANCE * expected.square().mean().sqrt():
            raise RuntimeError(f"wrong result: {self.codebook.spec}, {list(x.shape)}, {error=}")


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def make_layer(codec: str, n: int, k: int, packed_bytes: int) -> Layer:
    codebook = get_codebook(*CODECS[codec]).codebook
    spec = codebook.spec
    copies = -(-packed_bytes // (n * spec.row_bytes(k)))
    return Layer(
        codebook=codebook,
        codewords=codebook.codewords(),
        qweights=list(random_bytes(copies, n, spec.row_bytes(k))),
        row_scale=torch.rand(n) / 1024,
        signs_in=random_bytes(k // 8),
        block=choose_block(k, max_tp=8),
    )


def interleaved_seconds(
    calls: list[Callable[[int], object]], repeats: int, budget: float
) -> list[float]:
    """Median seconds of each call; they alternate until `repeats` rounds or `budget` seconds."""
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + budget
    for index in range(repeats + 1):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call(index)
            if index:  # the first round warms up
                record.append(time.perf_counter() - start)
        if index >= 3 and time.perf_counter() > stop:
            break
    return [statistics.median(record) for record in times]


def bench_shape(
    n: int, k: int, args: argparse.Namespace, dense: list[Tensor], codec: str
) -> list[dict]:
    results = []
    layer = make_layer(codec, n, k, (16 if args.quick else 200) << 20)
    for m in args.m:
        x = torch.randn(m, k, dtype=torch.bfloat16)
        layer.check(x)
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours, theirs = interleaved_seconds(
                [
                    lambda i, x=x: layer(x, i),
                    lambda i, x=x: torch.nn.functional.linear(x, dense[i % len(dense)]),
                ],
                repeats=10 if args.quick else 40,
                budget=1.0 if args.quick else 6.0,
            )
            results.append(
                {
                    "codec": codec,
                    "bpw": layer.codebook.spec.bits,
                    "M": m,
                    "N": n,
                    "K": k,
                    "threads": threads,
                    "isa": cpu.isas()[-1],
                    "seconds": ours,
                    "gweights_per_s": n * k / ours / 1e9,
                    "vs_torch_bf16": theirs / ours,
                }
            )
            print_row(results[-1])
    return results


def print_row(row: dict) -> None:
    print(
        f"{row['codec']:<12} {row['bpw']:>5.2f} {row['M']:>5} {row['N']:>6} {row['K']:>6} "
        f"{row['threads']:>3} {1e3 * row['seconds']:>10.3f} {row['gweights_per_s']:>9.2f} "
        f"{row['M'] * row['gweights_per_s']:>9.1f} {row['vs_torch_bf16']:>8.2f}x",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, small weights, 1 second")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--codec", nargs="+", choices=CODECS, default=list(CODECS), metavar="CODEC")
    parser.add_argument("--m", nargs="+", type=int, help="default: 1 8 32 512; quick: 1 32")
    default_threads = sorted({1, torch.get_num_threads()})
    parser.add_argument("--threads", nargs="+", type=int, default=default_threads)
    args = parser.parse_args()
    args.m = args.m or ([1, 32] if args.quick else [1, 8, 32, 512])
    return args


def main() -> None:
    args = parse_arguments()
    if not cpu.available():
        raise SystemExit(f"error: {cpu.unavailable_message()}")
    torch.manual_seed(0)
    print(
        f"{platform.processor() or platform.machine()}, {cpu.isas()[-1]}, torch {torch.__version__}"
    )
    print(
        f"{'codec':<12} {'bpw':>5} {'M':>5} {'N':>6} {'K':>6} {'T':>3} {'ms':>10} {'Gweight/s':>9} "
        f"{'GMAC/s':>9} {'vs bf16':>9}"
    )
    results = []
    for n, k in QUICK_SHAPES if args.quick else SHAPES:
        dense_copies = -(-((64 if args.quick else 200) << 20) // (2 * n * k))
        dense = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(dense_copies)]
        for codec in args.codec:
            results += bench_shape(n, k, args, dense, codec)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
