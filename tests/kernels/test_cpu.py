"""The compiled CPU kernels, each instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_cases import BLOCKS, SPECS, guarded_bytes, random_case, unit_case
from pcdvq_kernels import cpu, cpu_search, fallback
from pcdvq_kernels.arguments import ACTIVATIONS
from pcdvq_kernels.nearest import nearest_codeword
from pcdvq_kernels.reference import decode_levels

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")

FP32_TOLERANCE = 3e-7  # of Case.error_scale
ISAS = [
    pytest.param(
        isa, marks=pytest.mark.skipif(isa not in cpu.isas(), reason=f"this CPU lacks {isa}")
    )
    for isa in ("scalar", "avx2", "avx512")
]
all_isas = pytest.mark.parametrize("isa", ISAS)


def run(case, isa):
    """The kernel's result; what it does not write is NaN."""
    x = case.x
    out = torch.full((*x.shape[:-1], len(case.row_scale)), torch.nan, dtype=x.dtype)
    cpu.linear(*case.args(), isa=isa, out=out)
    return out


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@all_isas
@pytest.mark.parametrize("codec", SPECS)
@pytest.mark.parametrize("k", BLOCKS)
def test_matches_reference(isa, codec, k):
    for n in (1, 7, 33):
        case = random_case(codec, 33, n, k, bias=n != 7)
        expected = case.reference()
        limit = FP32_TOLERANCE * case.error_scale()
        for m in (1, 2, 17, 33):
            y = run(case.with_x(case.x[:m]), isa)
            torch.testing.assert_close(y, expected[:m], rtol=0, atol=limit)


@all_isas
@pytest.mark.parametrize("codec", SPECS)
@pytest.mark.parametrize("k", [8, 72, 1536])
def test_decodes_exactly(isa, codec, k):
    case = random_case(codec, 1, 33, k, block=1).with_x(torch.eye(k))
    case.signs_in.zero_()
    levels = decode_levels(case.qweight, case.codebook, k)[:33].float()
    expected = (levels * case.row_scale.unsqueeze(1)).T
    assert torch.equal(run(case, isa), expected)
    for column in (*range(0, k, 61), k - 1):  # one activation row takes another path
        assert torch.equal(run(case.with_x(case.x[column]), isa), expected[column])


@all_isas
@pytest.mark.parametrize("codec", SPECS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_rows_are_independent(isa, codec, activations, threads):
    case = replace(random_case(codec, 300, 77, 72), activations=activations)
    whole = run(case, isa)
    for first, m in ((0, 1), (299, 1), (3, 2), (5, 3), (7, 4), (12, 6), (20, 8), (11, 9), (0, 257)):
        rows = slice(first, first + m)
        assert torch.equal(run(case.with_x(case.x[rows]), isa), whole[rows])
    for count in (1, 3):
        threads(count)
        assert torch.equal(run(case, isa), whole)
        assert torch.equal(run(case.with_x(case.x[:1]), isa), whole[:1])


@all_isas
def test_hadamard_blocks(isa):
    k = 16384
    for log_block in range(15):
        case = random_case("generic-8x1", 2, 3, k, block=1 << log_block)
        limit = FP32_TOLERANCE * case.error_scale()
        torch.testing.assert_close(run(case, isa), case.reference(), rtol=0, atol=limit)


@all_isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_round_to_nearest_even(isa, dtype):
    n = 1 << 15
    case = unit_case(n)
    bits = torch.randint(-(1 << 31), 1 << 31, (n,), generator=torch.Generator().manual_seed(0))
    case.row_scale.copy_(bits.to(torch.int32).view(torch.float32))
    x = torch.zeros(1, 8, dtype=dtype)
    x[0, 0] = 1
    y = run(case.with_x(x), isa)
    torch.testing.assert_close(y[0], case.row_scale.to(dtype), rtol=0, atol=0, equal_nan=True)


@all_isas
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_convert_exactly(isa, dtype):
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    words = words[words.isfinite()]
    x = torch.zeros(len(words), 8, dtype=dtype)
    x[:, 3] = words
    assert torch.equal(run(unit_case(1).with_x(x), isa)[:, 0], words)
    biased = replace(unit_case(len(words)), bias=words)
    assert torch.equal(run(biased, isa)[0], words.float())


@all_isas
@pytest.mark.parametrize("codec", SPECS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_reads_end_with_the_codes(isa, codec, activations):
    for k in (8, 72, 576):
        for m in (1, 3, 9):
            case = replace(random_case(codec, m, 5, k), activations=activations)
            x, qweight, *rest = case.args()
            y = cpu.linear(x, guarded_bytes(qweight), *rest, isa=isa)
            assert torch.equal(y, run(case, isa))


def test_unavailable_isa():
    case = random_case("trellis-4x64", 1, 1, 8)
    with pytest.raises(ValueError, match="choose from"):
        cpu.linear(*case.args(), isa="avx1024")


def test_out_is_checked():
    case = random_case("trellis-4x64", 2, 7, 72)
    with pytest.raises(ValueError, match="out is"):
        cpu.linear(*case.args(), out=torch.empty(2, 6))


@all_isas
@pytest.mark.parametrize("dim", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 257, 3000])
def test_nearest(isa, dim, count):
    generator = torch.Generator().manual_seed(count)

    def small_integers(*shape):  # scores are exact, and many are equal
        return torch.randint(-4, 5, shape, generator=generator).float()

    codewords, bias = small_integers(count, dim), small_integers(count)
    for groups in (0, 1, 255, 257, 1000):
        x = small_integers(groups, dim)
        scores = (x @ codewords.T - bias).double()
        scores -= torch.arange(count) * 1e-6  # the lowest index of equals
        actual = cpu_search.nearest(x, codewords, bias, isa=isa)
        assert actual.dtype == torch.int32
        assert torch.equal(actual.long(), scores.argmax(1))
        assert torch.equal(fallback.nearest(x, codewords, bias), actual)
        assert torch.equal(nearest_codeword(x, codewords, bias), actual)


@pytest.mark.parametrize(
    ("x", "codewords", "bias"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5)),
        (torch.zeros(4, 8), torch.zeros(5, 4), torch.zeros(5)),
        (torch.zeros(4, 8), torch.zeros(0, 8), torch.zeros(0)),
        (torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(4)),
        (torch.zeros(4, 8, dtype=torch.float64), torch.zeros(5, 8), torch.zeros(5)),
    ],
)
def test_nearest_bad_arguments(x, codewords, bias):
    with pytest.raises(ValueError, match="expected"):
        nearest_codeword(x, codewords, bias)
