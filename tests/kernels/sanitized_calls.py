"""Calls every kernel of a library built with sanitizers, which end the process at a finding.

Run by test_sanitizers.py: python sanitized_calls.py LIBRARY, with libasan preloaded. Values are
checked by the other tests; here inputs and outputs are buffers with nothing readable around them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import torch
from linear_cases import SPECS, Case, random_case
from pcdvq_kernels import cpu, cpu_search, trellis
from pcdvq_kernels.arguments import ACTIVATIONS
from pcdvq_kernels.vptq import cpu as vptq
from pcdvq_kernels.vptq import ops
from pcdvq_kernels.vptq.weight import pack_tables, pack_weight
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vptq_layers import CASES as VPTQ_CASES
from vptq_layers import random_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (M, N, K): rows of activations on every path, whole and cut panels, segments and units.
SHAPES = (
    (1, 25, 576),
    (2, 17, 896),
    (17, 33, 72),
    (33, 7, 1536),
    (1, 1, 8),
    (33, 50, 72),
    (2, 3, 4864),
    (1, 33, 1536),
    (17, 1, 896),
    (9, 16, 8),
)
SMALL = tuple(shape for shape in SHAPES if shape[0] * shape[1] * shape[2] < 100_000)


def cases(codec: str, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Case]:
    """Layers of the shapes, then one whose codes and signs are all ones and one with NaN."""
    dtypes = cycle(DTYPES)
    for m, n, k in shapes:
        case = random_case(codec, m, n, k, bias=n % 2 == 0)
        yield case.with_x(case.x.to(next(dtypes)))
    case = random_case(codec, 3, 20, 72)
    ones = replace(case, qweight=case.qweight | 255, signs_in=case.signs_in | 255)
    yield ones
    yield ones.with_x(torch.full((3, 72), torch.nan))
    yield ones.with_x(torch.full((1, 72), torch.inf))
    yield ones.with_x(torch.full((9, 72), torch.finfo(torch.float32).max))


def call_layers(isa: str, codec: str) -> int:
    """Products and look-ups of one codec; returns how many."""
    calls = 0
    for case in cases(codec, SMALL if isa == "scalar" else SHAPES):
        for activations in ACTIVATIONS:
            x, qweight, *rest = replace(case, activations=activations).args()
            cpu.linear(x, qweight, *rest, isa=isa)
            packed = cpu.prepack(qweight, rest[-1], x.shape[-1], isa=isa)
            if packed is not qweight:
                cpu.linear(x, packed, *rest, isa=isa)
        rows = len(case.row_scale)
        ids = torch.arange(rows).flip(0)
        cpu.embedding(*case.embedding_args(ids, case.x.dtype), isa=isa)
        try:
            cpu.embedding(*case.embedding_args(torch.tensor([0, rows])), isa=isa)
        except ValueError:
            calls += len(ACTIVATIONS) + 2
    return calls


def call_searches(isa: str) -> int:
    """Nearest codewords; returns the number of calls."""
    calls = 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(calls))

    for dim in (2, 4, 8):
        for count, groups in ((1, 1), (3, 257), (600, 40), (257, 0)):
            cpu_search.nearest(normal(groups, dim), normal(count, dim), normal(count), isa=isa)
            calls += 1
    return calls


def call_chains(isa: str) -> int:
    """Chains of all lengths, of numbers and of NaN; returns the number of calls."""
    calls = 0
    for code_bits, effort in product(trellis.CODE_BITS, cpu_search.EFFORTS):
        for chain_rows, columns in ((16, 10), (64, 2), (32, 0)):
            x = 50 * torch.randn(chain_rows, columns)
            for values in (x, torch.full_like(x, torch.nan)):
                args = values, torch.rand(chain_rows), code_bits, chain_rows, effort
                cpu_search.chain_codes(*args, isa=isa)
                calls += 1
    return calls


def call_vptq(isa: str) -> int:
    """VPTQ products, then with codes of ones alone; returns the number of calls."""
    for changes in VPTQ_CASES.values():
        layout, tensors = random_layer(37, 98, **changes)
        tables = pack_tables(layout, tensors, torch.device("cpu"))
        weight = pack_weight(layout, tensors, tables, range(5, 37))
        for m in (1, 2, 7):
            args = torch.randn(m, 98), *weight.args(), None
            vptq.linear(*args, ops.check(*args, weight.layout), isa=isa)
            for codes in weight.codes:
                codes.fill_(255)
    return 3 * len(VPTQ_CASES)


def main() -> None:
    cpu.LIBRARY = Path(sys.argv[1])
    assert cpu.available(), cpu.unavailable_message()
    for isa in cpu.isas():
        calls = sum(call_layers(isa, codec) for codec in SPECS)
        calls += call_searches(isa) + call_chains(isa) + call_vptq(isa)
        print(f"{isa}: {calls} calls", flush=True)


if __name__ == "__main__":
    main()
