"""Rounded activations of the compiled CPU kernels, each instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_cases import SPECS, Case, random_case
from pcdvq_kernels import cpu
from pcdvq_kernels.codebook import MAX_LEVEL, Codebook
from pcdvq_kernels.reference import decode_levels
from torch import Tensor

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")

LIMIT = {"int8": 127, "int16": 32767}
SCALE_COLUMNS = 64
FP32_TOLERANCE = 3e-7  # of Case.error_scale
# Relative error of a product, over N(0, 1) activations after the rotation: root mean square.
ACTIVATION_ERROR = {"int8": 0.0075, "int16": 0.00003}
all_isas = pytest.mark.parametrize("isa", cpu.isas())
both_activations = pytest.mark.parametrize("activations", LIMIT)
BLOCKS = {8: 2, 72: 8, 576: 64, 896: 128, 1536: 512, 4864: 256}


def run(case: Case, isa: str) -> Tensor:
    """The kernel's result; what it does not write is NaN."""
    out = torch.full((*case.x.shape[:-1], len(case.row_scale)), torch.nan, dtype=case.x.dtype)
    return cpu.linear(*case.args(), isa=isa, out=out)


def unrotated(case: Case) -> Case:
    """The same without a rotation: what is quantized is x itself."""
    return replace(case, block=1, signs_in=torch.zeros_like(case.signs_in))


def scaled_blocks(x: Tensor) -> Tensor:
    """x [M, K] as [M, blocks, 64], padded with zeros."""
    padding = -x.shape[1] % SCALE_COLUMNS
    return torch.nn.functional.pad(x, (0, padding)).unflatten(1, (-1, SCALE_COLUMNS))


def quantized_reference(case: Case, limit: int) -> Tensor:
    """fp64 [M, N] with x rounded as the kernels do."""
    x = scaled_blocks(case.x)
    highest = x.abs().amax(-1, keepdim=True)
    integers = (x * torch.where(highest > 0, limit / highest, 0)).round()
    rounded = (integers.double() * (highest / limit)).flatten(1)[:, : case.x.shape[1]]
    levels = decode_levels(case.qweight, case.codebook, case.x.shape[1])
    levels = levels[: len(case.row_scale)].double()
    return rounded @ levels.T * case.row_scale


@all_isas
@both_activations
@pytest.mark.parametrize("codec", SPECS)
@pytest.mark.parametrize("k", BLOCKS)
def test_rounds_as_specified(isa: str, activations: str, codec: str, k: int) -> None:
    for n in (1, 7, 33):
        case = replace(unrotated(random_case(codec, 33, n, k)), activations=activations)
        expected = quantized_reference(case, LIMIT[activations])
        limit = FP32_TOLERANCE * case.error_scale()
        for m in (1, 2, 5, 17, 33):
            found = run(case.with_x(case.x[:m]), isa).double()
            torch.testing.assert_close(found, expected[:m], rtol=0, atol=limit)


@all_isas
@pytest.mark.parametrize("codec", SPECS)
def test_sums_are_exact(isa: str, codec: str) -> None:
    """Activations that int8 needs not round; sums are below 2^24, where floats hold them."""
    k = 576
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (9, k), generator=generator).float()
    x[:, ::SCALE_COLUMNS] = 127  # the scale of every block is 1
    case = unrotated(random_case(codec, 9, 33, k)).with_x(x)
    case = replace(case, activations="int8", row_scale=torch.ones(33))
    expected = x.long() @ decode_levels(case.qweight, case.codebook, k)[:33].long().T
    for m in (1, 2, 9):
        assert torch.equal(run(case.with_x(x[:m]), isa).long(), expected[:m])


@all_isas
@both_activations
@pytest.mark.parametrize("codec", ["int8", "e8-16", "e8-18"])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_overflows(isa: str, activations: str, codec: str, sign: int) -> None:
    """The largest levels and activations, all of one sign, at the largest K."""
    k = 65536
    case = unrotated(random_case(codec, 1, 5, k, block=1))
    if codec == "int8":
        case.qweight.fill_(127)
    else:
        case.qweight.zero_()
        directions = torch.full_like(case.codebook.directions, MAX_LEVEL)
        spec = case.codebook.spec.model_copy(update={"shift": 0})
        book = Codebook(spec, directions, torch.ones_like(case.codebook.magnitudes))
        case = replace(case, codebook=book, codewords=book.codewords())
    x = torch.full((9, k), float(sign * LIMIT[activations]))
    case = replace(case, activations=activations, row_scale=torch.ones(5))
    expected = torch.full((9, 5), float(sign) * LIMIT[activations] * MAX_LEVEL * k)
    for m in (1, 2, 9):
        torch.testing.assert_close(run(case.with_x(x[:m]), isa), expected[:m], rtol=1e-6, atol=0)


@all_isas
@both_activations
@pytest.mark.parametrize("codec", ["trellis-4x64", "trellis-8x64", "trellis-6x16", "e8-16"])
def test_error_of_rotated_activations(isa: str, activations: str, codec: str) -> None:
    case = random_case(codec, 64, 256, 1536)
    x = case.x.clone()
    x[:, ::97] *= 20  # outliers, which the rotation spreads
    exact = case.with_x(x).reference()
    found = run(replace(case.with_x(x), activations=activations), isa)
    error = ((found - exact).square().mean() / exact.square().mean()).sqrt()
    assert error < ACTIVATION_ERROR[activations]


@all_isas
@both_activations
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_activations(isa: str, activations: str, value: float) -> None:
    case = replace(unrotated(random_case("trellis-4x64", 9, 7, 576)), activations=activations)
    expected = run(case, isa)
    x = case.x.clone()
    x[3, 100] = value
    found = run(case.with_x(x), isa)
    assert not found[3].isfinite().any()
    assert not run(case.with_x(x[3]), isa).isfinite().any()
    others = torch.arange(9) != 3
    assert torch.equal(found[others], expected[others])


@all_isas
@both_activations
def test_zeros_and_tiny_activations(isa: str, activations: str) -> None:
    case = replace(random_case("trellis-5x64", 3, 7, 576), activations=activations)
    assert torch.equal(run(case.with_x(torch.zeros(3, 576)), isa), torch.zeros(3, 7))
    tiny = case.with_x(case.x * 1e-35)
    assert (run(tiny, isa).abs() < 1e-30).all()
