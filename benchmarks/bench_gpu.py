"""`pcdvq::linear` on a GPU beside bf16 cuBLAS and vLLM's 4-bit Marlin kernels.

Every product is checked against the fp32 reference before it is timed. Calls are captured in a CUDA
graph that goes through enough copies of the weights not to find them in the cache; the figure is
the median of its replays. The last column is the bytes of the weight per second over what a copy of
a large tensor reaches on this GPU. `--tune` measures launch parameters first and keeps them.

    python benchmarks/bench_gpu.py --tune
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from pcdvq_kernels import ops, reference
from pcdvq_kernels.arguments import LayoutFields
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.hadamard import choose_block
from pcdvq_kernels.triton import tuning
from pcdvq_kernels.triton.format import format_of
from pcdvq_kernels.triton.hadamard import rotate_quantize
from pcdvq_kernels.triton.linear import Weight, linear
from pcdvq_quantizer.codebooks import get_codebook
from torch import Tensor

from bench_kernels import CODECS

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672)]
TOLERANCE = 0.015  # norm of the error over the output's: int8 activations and bf16 results
CHECKED_ROWS = 512
CACHE_BYTES = 256 << 20  # more than any GPU caches
CALLS, REPLAYS = 20, 30


@dataclass(frozen=True)
class Layer:
    """Random layers [N, K] of one codec that differ in their codes only, prepacked."""

    codebook: Codebook
    codes: Tensor
    words: list[Tensor]
    table: Tensor
    row_scale: Tensor
    signs_in: Tensor
    layout: ops.Layout

    def __call__(self, x: Tensor, index: int) -> Tensor:
        return torch.ops.pcdvq.linear(
            x,
            self.words[index % len(self.words)],
            self.row_scale,
            self.signs_in,
            self.table,
            None,
            self.layout.to_ints(),
        )

    def weight(self, index: int) -> Weight:
        fmt = format_of(LayoutFields(*self.layout.to_ints()))
        return Weight(self.words[index % len(self.words)], self.row_scale, fmt)

    def check(self, x: Tensor) -> None:
        """Raise RuntimeError if the first rows of the output are far from the reference's."""
        rows = slice(0, CHECKED_ROWS)
        expected = reference.linear(
            x.float(),
            self.codes[rows],
            self.row_scale[rows],
            self.signs_in,
            self.codebook,
            self.layout.hadamard_block,
        )
        error = ((self(x, 0)[:, rows].float() - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"wrong result: {self.codebook.spec}, {list(x.shape)}, {error=}")


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def make_layer(codec: str, n: int, k: int) -> Layer:
    book = get_codebook(*CODECS[codec]).codebook
    book = Codebook(book.spec, book.directions.cuda(), book.magnitudes.cuda())
    layout = ops.Layout(choose_block(k, max_tp=8), book.spec)
    codes = random_bytes(book.spec.stored_rows(n), book.spec.row_bytes(k))
    first = ops.prepack_weight(codes, book.codewords(), layout, k)
    copies = -(-CACHE_BYTES // first.nbytes)
    return Layer(
        codebook=book,
        codes=codes,
        words=[first, *(first.roll(copy, 0) for copy in range(1, copies))],
        table=ops.prepack_codewords(book.codewords(), book.spec),
        row_scale=torch.rand(n, device="cuda") / 1024,
        signs_in=random_bytes(k // 8),
        layout=layout,
    )


def seconds(call: Callable[[int], object], calls: int = CALLS) -> float:
    """Median seconds of a call, `calls` of them in a CUDA graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda _: target.copy_(source), calls=3)


def marlin(n: int, k: int) -> Callable[[Tensor], Callable[[int], Tensor]] | None:
    """vLLM's GPTQ-Marlin product at 4 bits in groups of 128; None where it does not run."""
    try:
        from vllm import _custom_ops as vllm_ops
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
        from vllm.scalar_type import scalar_types
    except ImportError as error:
        print(f"no Marlin: {error}")
        return None
    dense = torch.randn(k, n, dtype=torch.bfloat16, device="cuda")
    kind = scalar_types.uint4b8
    _, packed, scales = marlin_quantize(dense, kind, 128)[:3]
    copies = [packed.clone() for _ in range(-(-CACHE_BYTES // packed.nbytes))]
    workspace = marlin_utils.marlin_make_workspace_new(dense.device)

    def prepared(x: Tensor) -> Callable[[int], Tensor]:
        return lambda index: vllm_ops.marlin_gemm(
            a=x,
            c=None,
            b_q_weight=copies[index % len(copies)],
            b_bias=None,
            b_scales=scales,
            a_scales=None,
            global_scale=None,
            b_zeros=None,
            workspace=workspace,
            b_q_type=kind,
            size_m=x.shape[0],
            size_n=n,
            size_k=k,
        )

    return prepared


def tune(layer: Layer, n: int, k: int) -> dict[str, tuning.LinearConfig]:
    """The fastest launch parameters for up to 8 and up to 16 tokens."""
    fmt, best = layer.weight(0).fmt, {}
    for m_tile in (8, 16):
        x = torch.randn(m_tile, k, dtype=torch.bfloat16, device="cuda")
        activations = rotate_quantize(x, layer.signs_in, layer.layout.hadamard_block, m_tile)
        candidates = [
            tuning.LinearConfig(m_tile, splits)
            for splits in (1, 2, 3, 4, 6, 8, 12, 16)
            if splits <= layer.weight(0).tiles
        ]
        timed = {}
        for config in candidates:

            def call(index: int, x=activations, config=config) -> Tensor:
                return linear(x, layer.weight(index), None, torch.bfloat16, config)

            timed[config] = seconds(call)
        best[tuning.tuning_key(m_tile, n, k, fmt)] = min(timed, key=timed.__getitem__)
    return best


def bench_shape(n: int, k: int, args: argparse.Namespace, bandwidth: float) -> None:
    dense = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    copies = [dense.clone() for _ in range(-(-CACHE_BYTES // dense.nbytes))]
    theirs = marlin(n, k)
    layers = {codec: make_layer(codec, n, k) for codec in args.codec}
    if args.tune:
        name = tuning.describe(torch.device("cuda", torch.cuda.current_device())).name
        for layer in layers.values():
            tuning.save_tuned(name, tune(layer, n, k))
    for m in args.m:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        base = seconds(lambda i, x=x: torch.nn.functional.linear(x, copies[i % len(copies)]))
        print_row("bf16 cuBLAS", m, (n, k), base, base, dense.nbytes / base / bandwidth)
        if theirs is not None:
            time = seconds(theirs(x))
            print_row("Marlin, 4 bit", m, (n, k), time, base, n * k / 2 / time / bandwidth)
        for codec, layer in layers.items():
            layer.check(x)
            time = seconds(lambda i, x=x, layer=layer: layer(x, i))
            used = layer.words[0].nbytes / time / bandwidth
            print_row(codec, m, (n, k), time, base, used)


def print_row(
    name: str, m: int, shape: tuple[int, int], time: float, base: float, used: float
) -> None:
    print(
        f"| {name} | {m} | {shape[0]} x {shape[1]} | {1e6 * time:.1f} | {base / time:.2f} "
        f"| {100 * used:.0f} % |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", nargs="+", choices=CODECS, default=list(CODECS), metavar="CODEC")
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 128, 512])
    parser.add_argument("--tune", action="store_true", help=f"and write {tuning.cache_path()}")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU; benchmarks/gpu_static.py needs none")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}; a copy reaches {bandwidth / 1e9:.0f} GB/s\n\n"
        "| kernel | M | N x K | microseconds | times bf16 | of copy bandwidth |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for n, k in SHAPES:
        bench_shape(n, k, args, bandwidth)


if __name__ == "__main__":
    main()
