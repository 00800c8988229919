"""Weights in the order in which the CPU kernels read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_cases import SPECS, Case, guarded_bytes, random_case
from pcdvq_kernels import cpu, cpu_packing, ops
from pcdvq_kernels.arguments import linear_shape
from pcdvq_kernels.packing import unpack_codes
from pcdvq_kernels.reference import decode_levels
from torch import Tensor

# Layouts that are packed; the others are read as they are.
PACKED = [name for name in SPECS if not name.startswith(("generic", "pvq")) and name != "e8-18"]

pytestmark = pytest.mark.skipif("avx512" not in cpu.isas(), reason="this CPU lacks avx512")


def int8_case(codec: str, m: int, n: int, k: int, **options: int | bool) -> Case:
    return replace(random_case(codec, m, n, k, **options), activations="int8")


def pack(case: Case) -> Tensor:
    layout, k = case.args()[-1], case.x.shape[-1]
    return cpu.prepack(case.qweight, layout, k)


def run(case: Case, qweight: Tensor) -> Tensor:
    """The kernel's result; what it does not write is NaN."""
    x, _, *rest = case.args()
    out = torch.full((*x.shape[:-1], len(case.row_scale)), torch.nan, dtype=x.dtype)
    return cpu.linear(x, qweight, *rest, out=out)


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("k", [8, 72, 576, 896])
def test_same_result_as_rows(codec: str, k: int) -> None:
    for n in (1, 16, 33):
        case = int8_case(codec, 33, n, k, bias=n != 16)
        packed = pack(case)
        assert packed.dim() == 3
        for m in (1, 2, 4, 5, 8, 17, 33):
            part = case.with_x(case.x[:m])
            assert torch.equal(run(part, packed), run(part, case.qweight)), (n, m)


def codes_of(qweight: Tensor, case: Case) -> Tensor:
    """Without the bits after the last code, which are random in a random case."""
    spec = case.codebook.spec
    return unpack_codes(qweight, spec.code_bits, case.x.shape[-1] // spec.vector_dim)


def check_decoding(case: Case) -> None:
    k = case.x.shape[-1]
    case = case.with_x(torch.eye(k))
    case.signs_in.zero_()
    case.row_scale.fill_(1)
    expected = decode_levels(case.qweight, case.codebook, k)[: len(case.row_scale)].float().T
    packed = pack(case)
    for rows in (slice(0, k), slice(5, 6), slice(70, 77)):
        # A one is 127 times 1 / 127.
        levels = run(case.with_x(case.x[rows]), packed)
        torch.testing.assert_close(levels, expected[rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("codec", PACKED)
def test_decodes_exactly(codec: str) -> None:
    check_decoding(int8_case(codec, 1, 33, 136, block=1))


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (33, 72), (64, 576)])
def test_unpacks(codec: str, n: int, k: int) -> None:
    case = int8_case(codec, 1, n, k)
    codes = cpu_packing.unpack(pack(case), case.args()[-1], n, k)
    assert torch.equal(*(codes_of(qweight, case) for qweight in (codes, case.qweight)))


def test_large_weights_start_at_huge_pages() -> None:
    case = replace(random_case("trellis-4x64", 1, 2100, 8192, block=8192), activations="int8")
    packed = pack(case)
    assert packed.data_ptr() % cpu.HUGE_PAGE == 0
    assert packed.is_contiguous()
    assert torch.equal(cpu_packing.unpack(packed, case.args()[-1], 2100, 8192), case.qweight)
    assert torch.equal(run(case, packed), run(case, case.qweight))


@pytest.mark.parametrize("codec", PACKED)
def test_reads_end_with_the_codes(codec: str) -> None:
    for m in (1, 9):
        case = int8_case(codec, m, 5, 72)
        packed = pack(case)
        assert torch.equal(run(case, guarded_bytes(packed)), run(case, packed))


@pytest.mark.parametrize("codec", PACKED)
def test_no_larger_than_rows(codec: str) -> None:
    case = int8_case(codec, 1, 64, 576)
    assert pack(case).numel() == case.qweight.numel()
    assert pack(case).shape == linear_shape(tuple(case.args()[-1]), 576).packed_shape(64)


def test_what_is_not_packed() -> None:
    for case in (
        random_case("trellis-4x64", 1, 33, 72),  # float activations
        int8_case("generic-8x13", 1, 33, 72),
        int8_case("pvq-24", 1, 33, 72),
    ):
        assert pack(case) is case.qweight


def test_other_isas_refuse_packed_codes() -> None:
    for codec, isa in (("trellis-4x64", "scalar"), ("e8-16", "avx2")):
        case = int8_case(codec, 1, 33, 72)
        x, _, *rest = case.args()
        with pytest.raises(ValueError, match=f"'{isa}' cannot read packed weights"):
            cpu.linear(x, pack(case), *rest, isa=isa)
        assert cpu.prepack(case.qweight, rest[-1], 72, isa=isa) is case.qweight


@pytest.mark.parametrize("codec", [name for name in PACKED if name.startswith("trellis")])
def test_avx2_and_avx512_agree(codec: str) -> None:
    """Sums of int8 products are exact, and floats are rounded at the same places."""
    case = int8_case(codec, 33, 100, 576, bias=True)
    x, qweight, *rest = case.args()
    packed = cpu.prepack(qweight, rest[-1], 576, isa="avx2")
    assert torch.equal(packed, pack(case))
    for m in (1, 2, 5, 8, 33):
        wide = cpu.linear(x[:m], packed, *rest)
        assert torch.equal(cpu.linear(x[:m], packed, *rest, isa="avx2"), wide)
        assert torch.equal(cpu.linear(x[:m], qweight, *rest, isa="avx2"), wide)


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("k", [8, 72, 576])
def test_rows_of_packed_codes(codec: str, k: int) -> None:
    ids = torch.tensor([[32, 0, 16], [31, 15, 0]])
    case = int8_case(codec, 1, 33, k)
    _, qweight, *rest = case.embedding_args(ids)
    packed = guarded_bytes(pack(case))
    assert torch.equal(cpu.embedding(ids, packed, *rest), cpu.embedding(ids, qweight, *rest))
    with pytest.raises(ValueError, match="rows 0 to 32"):
        cpu.embedding(ids + 1, packed, *rest)
    with pytest.raises(ValueError, match="'scalar' cannot read packed weights"):
        cpu.embedding(ids, packed, *rest, isa="scalar")


def test_wrong_sizes_are_refused() -> None:
    case = int8_case("trellis-4x64", 1, 33, 72)
    x, _, *rest = case.args()
    with pytest.raises(ValueError, match=r"packed qweight is .*; expected .*4, 2, 256"):
        cpu.linear(x, pack(case)[:2].contiguous(), *rest)
    with pytest.raises(ValueError, match=r"qweight is .*; expected .*64, 18"):
        cpu.prepack(case.qweight[:, :9].contiguous(), rest[-1], 72)


@pytest.mark.skipif(ops.prepacks(torch.device("cpu")), reason="the operator is Triton's")
def test_operator() -> None:
    case = int8_case("trellis-8x64", 3, 33, 72, bias=True)
    x, _, *rest = case.args()
    for _ in range(2):  # the second call may be the one without Python
        y = torch.ops.pcdvq.linear(x, pack(case), *rest)
        assert torch.equal(y, run(case, case.qweight))
