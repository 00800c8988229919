"""Speed of `pcdvq::linear` on the CPU beside three references on the same shapes.

The references are torch's bf16 linear and, at M = 1, a tuned bf16 GEMV and reading the packed
weights once, which bounds every kernel. Each shape is checked against the reference result before
it is timed. All calls alternate in one process, so that a busy machine slows all, and medians are
reported: of CPU time on one thread, of wall time on more. The weights of a timed shape rotate
through enough copies not to stay in cache at M = 1. Rotating and rounding the activations is part
of the time.
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
from pcdvq_kernels.arguments import ACTIVATIONS
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import DEFAULT_ACTIVATIONS
from pcdvq_kernels.hadamard import choose_block
from pcdvq_kernels.ops import Layout, prepack_weight
from pcdvq_quantizer.codebooks import OFFERED, get_codebook
from torch import Tensor

import roofline

# Root mean square of the error over that of the outputs.
TOLERANCE = {"int8": 1e-2, "int16": 1e-4, "float": 1e-5}
CHECKED_ROWS = 256  # weight rows compared with the reference

CODECS = {f"{codec}-{bits:g}": (codec, bits) for codec in OFFERED for bits in OFFERED[codec]}
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (576, 1536), (1536, 576)]
QUICK_SHAPES = [(4096, 4096), (576, 1536)]


@dataclass(frozen=True)
class Layer:
    """Random layers [N, K] of one codec that differ in their codes only."""

    codebook: Codebook
    codewords: Tensor
    codes: Tensor  # uint8 [N, row_bytes], those of the first copy
    qweights: list[Tensor]  # of each copy, as the operator takes them
    row_scale: Tensor
    signs_in: Tensor
    layout: Layout
    layout_ints: list[int]

    def __call__(self, x: Tensor, index: int) -> Tensor:
        return torch.ops.pcdvq.linear(
            x,
            self.qweights[index % len(self.qweights)],
            self.row_scale,
            self.signs_in,
            self.codewords,
            None,
            self.layout_ints,
        )

    def read(self, index: int) -> int:
        return roofline.read_all(self.qweights[index % len(self.qweights)])

    def check(self, x: Tensor) -> None:
        """Raise RuntimeError if the first rows of the output are far from the reference's."""
        rows = slice(0, CHECKED_ROWS)
        x = x.float()
        expected = reference.linear(
            x,
            self.codes[rows],
            self.row_scale[rows],
            self.signs_in,
            self.codebook,
            self.layout.hadamard_block,
        )
        error = (self(x, 0)[:, rows] - expected).norm() / expected.norm()
        if not error < TOLERANCE[self.layout.activations]:
            raise RuntimeError(f"wrong result: {self.codebook.spec}, {list(x.shape)}, {error=}")


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def make_layer(codec: str, n: int, k: int, packed_bytes: int, activations: str) -> Layer:
    codebook = get_codebook(*CODECS[codec]).codebook
    spec = codebook.spec
    shape = spec.stored_rows(n), spec.row_bytes(k)
    copies = -(-packed_bytes // (shape[0] * shape[1]))
    codes = random_bytes(copies, *shape)
    codewords = codebook.codewords()
    layout = Layout(choose_block(k, max_tp=8), spec, activations)
    return Layer(
        codebook=codebook,
        codewords=codewords,
        codes=codes[0],
        qweights=[prepack_weight(q, codewords, layout, k) for q in codes],
        row_scale=torch.rand(n) / 1024,
        signs_in=random_bytes(k // 8),
        layout=layout,
        layout_ints=layout.to_ints(),
    )


def interleaved_seconds(
    calls: dict[str, Callable[[int], object]], repeats: int, budget: float
) -> dict[str, float]:
    """Median seconds of each call; they alternate until `repeats` rounds or `budget` seconds."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + budget
    for index in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call(index)
            if index:  # the first round warms up
                times[name].append(clock() - start)
        if index >= 3 and time.perf_counter() > stop:
            break
    return {name: statistics.median(record) for name, record in times.items()}


def time_layer(layer: Layer, m: int, dense: list[Tensor], quick: bool) -> dict[str, float]:
    """Median seconds of our call and of the references."""
    x = torch.randn(m, dense[0].shape[1], dtype=torch.bfloat16)
    layer.check(x)
    calls: dict[str, Callable[[int], object]] = {
        "ours": lambda i: layer(x, i),
        "torch": lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]),
    }
    if m == 1:
        calls["gemv"] = lambda i: roofline.bf16_gemv(dense[i % len(dense)], x[0])
        calls["read"] = layer.read
    repeats, budget = (15, 1.0) if quick else (60, 6.0)
    return interleaved_seconds(calls, repeats, budget)


def bench_shape(
    n: int, k: int, args: argparse.Namespace, dense: list[Tensor], codec: str
) -> list[dict]:
    results = []
    layer = make_layer(codec, n, k, (32 if args.quick else 200) << 20, args.activations)
    for m in args.m:
        for threads in args.threads:
            torch.set_num_threads(threads)
            seconds = time_layer(layer, m, dense, args.quick)
            ours = seconds["ours"]
            results.append(
                {
                    "codec": codec,
                    "bpw": layer.codebook.spec.bits,
                    "activations": args.activations,
                    "M": m,
                    "N": n,
                    "K": k,
                    "threads": threads,
                    "isa": cpu.isas()[-1],
                    "seconds": ours,
                    "gweights_per_s": n * k / ours / 1e9,
                    "fraction_of_read_limit": seconds["read"] / ours if m == 1 else None,
                    "vs_torch_bf16": seconds["torch"] / ours,
                    "vs_tuned_bf16_gemv": seconds["gemv"] / ours if m == 1 else None,
                }
            )
            print_row(results[-1])
    return results


def print_row(row: dict) -> None:
    bounds = ""
    if row["M"] == 1:
        bounds = f" {row['vs_tuned_bf16_gemv']:>8.2f}x {row['fraction_of_read_limit']:>9.2f}"
    print(
        f"{row['codec']:<12} {row['bpw']:>5.2f} {row['M']:>5} {row['N']:>6} {row['K']:>6} "
        f"{row['threads']:>3} {1e3 * row['seconds']:>10.3f} {row['gweights_per_s']:>9.2f} "
        f"{row['M'] * row['gweights_per_s']:>9.1f} {row['vs_torch_bf16']:>8.2f}x{bounds}",
        flush=True,
    )


def plot(results: list[dict], path: Path) -> None:
    """Draw Gweights/s over M at each rate, on the first shape and thread count, as a PNG file."""
    from matplotlib.figure import Figure

    first = results[0]
    shape = {key: first[key] for key in ("N", "K", "threads")}
    rows = [row for row in results if all(row[key] == shape[key] for key in shape)]
    rates = sorted({row["bpw"] for row in rows})
    figure = Figure(figsize=(4 * len(rates), 4), layout="constrained")
    axes = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    for ax, rate in zip(axes, rates, strict=True):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["bpw"] == rate):
            speed = row["gweights_per_s"]
            series.setdefault(row["codec"], []).append((row["M"], speed))
            if row["codec"] == next(iter(series)):
                series.setdefault("torch bf16", []).append((row["M"], speed / row["vs_torch_bf16"]))
            if row["M"] == 1 and "read limit" not in ax.get_legend_handles_labels()[1]:
                limit = speed / row["fraction_of_read_limit"]
                ax.axhline(limit, linestyle="--", color="black", label="read limit")
                gemv = speed / row["vs_tuned_bf16_gemv"]
                ax.plot(1, gemv, "k*", label="tuned bf16 GEMV")
        for name, points in series.items():
            ax.plot(*zip(*points, strict=True), marker="o", label=name)
        ax.set(xscale="log", yscale="log", xlabel="M (tokens)", title=f"{rate:g} bits per weight")
        ax.legend(fontsize="small")
    axes[0].set_ylabel("Gweights/s")
    figure.suptitle(f"[{shape['N']}, {shape['K']}], {shape['threads']} threads, {first['isa']}")
    figure.savefig(path, format="png", dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, small weights, 1 second")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed over M, a PNG file")
    parser.add_argument("--activations", choices=ACTIVATIONS, default=DEFAULT_ACTIVATIONS)
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "K"))
    parser.add_argument("--codec", nargs="+", choices=CODECS, default=list(CODECS), metavar="CODEC")
    parser.add_argument("--m", nargs="+", type=int, help="default: 1 8 32 512; quick: 1 32")
    default_threads = sorted({1, torch.get_num_threads()})
    parser.add_argument("--threads", nargs="+", type=int, default=default_threads)
    args = parser.parse_args()
    args.m = args.m or ([1, 32] if args.quick else [1, 8, 32, 512])
    args.shape = args.shape or (QUICK_SHAPES if args.quick else SHAPES)
    return args


def main() -> None:
    args = parse_arguments()
    if not cpu.available():
        raise SystemExit(f"error: {cpu.unavailable_message()}")
    torch.manual_seed(0)
    roofline.check()
    print(
        f"{platform.processor() or platform.machine()}, {cpu.isas()[-1]}, torch {torch.__version__}"
    )
    print(
        f"{'codec':<12} {'bpw':>5} {'M':>5} {'N':>6} {'K':>6} {'T':>3} {'ms':>10} {'Gweight/s':>9} "
        f"{'GMAC/s':>9} {'vs torch':>9} {'vs GEMV':>9} {'of limit':>9}"
    )
    results = []
    for n, k in args.shape:
        dense_copies = -(-((64 if args.quick else 200) << 20) // (2 * n * k))
        dense = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(dense_copies)]
        for codec in args.codec:
            results += bench_shape(n, k, args, dense, codec)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
