"""The `pcdvq::linear` operator, on whatever kernels are installed."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from linear_cases import SPECS, random_case
from pcdvq_kernels import cpu, fallback, ops
from pcdvq_kernels.errors import PCDVQError

FP32_TOLERANCE = 3e-7  # of Case.error_scale
HALF_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative, of one rounding


def run(case):
    return torch.ops.pcdvq.linear(*case.args())


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "missing.so")
    cpu._library.cache_clear()
    fallback.warn_slow.cache_clear()
    yield
    cpu._library.cache_clear()
    fallback.warn_slow.cache_clear()


@pytest.mark.parametrize("codec", SPECS)
def test_matches_reference(codec):
    case = random_case(codec, 5, 40, 576, bias=True)
    limit = FP32_TOLERANCE * case.error_scale()
    torch.testing.assert_close(run(case), case.reference(), rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_rounds_once(dtype, bias_dtype):
    case = random_case("trellis-4x64", 3, 33, 576, bias=True)
    bias = None if bias_dtype is None else case.bias.to(bias_dtype)
    case = replace(case, x=case.x.to(dtype), bias=bias)
    y = run(case)
    assert y.dtype == dtype
    limit = FP32_TOLERANCE * case.error_scale()
    torch.testing.assert_close(y.float(), case.reference(), rtol=HALF_STEP[dtype], atol=limit)


def test_shapes_of_x():
    case = random_case("trellis-4x64", 6, 7, 72)
    y = run(case)
    assert torch.equal(run(case.with_x(case.x.view(2, 3, 72))), y.view(2, 3, 7))
    assert torch.equal(run(case.with_x(case.x[0])), y[0])
    assert run(case.with_x(case.x[:0])).shape == (0, 7)
    assert run(case.with_x(case.x.view(2, 3, 72)[:, :0])).shape == (2, 0, 7)
    assert torch.equal(run(case.with_x(case.x.T.contiguous().T)), y)
    assert torch.equal(run(case.with_x(case.x[::2])), y[::2])


def test_no_outputs():
    case = random_case("trellis-4x64", 2, 1, 72)
    empty = replace(case, qweight=case.qweight[:0], row_scale=case.row_scale[:0])
    assert run(empty).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 72, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.zeros(2, 80)}, "qweight"),
        ({"x": torch.zeros(2, 70)}, "multiple of 8"),
        ({"qweight": torch.zeros(64, 17, dtype=torch.uint8)}, "qweight"),
        ({"qweight": torch.zeros(64, 36, dtype=torch.uint8)[:, ::2]}, "strides"),
        ({"row_scale": torch.zeros(7, dtype=torch.bfloat16)}, "row_scale"),
        ({"row_scale": torch.zeros(65)}, "qweight"),
        ({"signs_in": torch.zeros(8, dtype=torch.uint8)}, "signs_in"),
        ({"bias": torch.zeros(7, dtype=torch.int32)}, "bias"),
        ({"bias": torch.zeros(6)}, "bias"),
        ({"block": 16}, "hadamard_block 16 does not divide K = 72"),
        ({"block": 6}, "power of two"),
    ],
)
def test_bad_arguments(change, message):
    case = replace(random_case("trellis-4x64", 2, 7, 72), **change)
    with pytest.raises((PCDVQError, RuntimeError), match=message):
        run(case)


@pytest.mark.parametrize(
    ("field", "value"),
    [(1, 3), (2, 0), (2, 9), (3, 1), (4, 8), (4, 0), (5, 3), (5, -1), (6, 2), (0, 0)],
)
def test_bad_layout(field, value):
    *args, layout = random_case("trellis-4x64", 2, 7, 72).args()
    layout[field] = value
    with pytest.raises((PCDVQError, RuntimeError), match="layout is"):
        torch.ops.pcdvq.linear(*args, layout)
    with pytest.raises((PCDVQError, RuntimeError), match="integers"):
        torch.ops.pcdvq.linear(*args, layout[:6])


def test_codewords_must_cover_every_code():
    x, qweight, row_scale, signs_in, codewords, bias, layout = random_case("e8-16", 2, 7, 72).args()
    with pytest.raises((PCDVQError, RuntimeError), match="codewords"):
        torch.ops.pcdvq.linear(x, qweight, row_scale, signs_in, codewords[:-1], bias, layout)


def test_opcheck():
    for case in (
        random_case("trellis-4x64", 2, 7, 72, bias=True),
        random_case("e8-16", 3, 9, 576).with_x(torch.randn(2, 3, 576, dtype=torch.bfloat16)),
    ):
        torch.library.opcheck(torch.ops.pcdvq.linear.default, case.args())


def test_compiles_whole():
    case = random_case("trellis-6x16", 3, 7, 72)
    args = case.args()[1:]
    compiled = torch.compile(
        lambda x: torch.ops.pcdvq.linear(x, *args) + 1.0,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for m in (3, 5):
        x = torch.randn(m, 72)
        assert torch.equal(compiled(x), run(case.with_x(x)) + 1.0)


@pytest.mark.parametrize("codec", SPECS)
def test_fallback_matches_reference(codec, without_library, monkeypatch):
    monkeypatch.setattr(fallback, "CHUNK_WEIGHTS", 16 * 576)
    case = random_case(codec, 5, 33, 576, bias=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = ops.linear(*case.args())
        ops.linear(*case.args())
    limit = FP32_TOLERANCE * case.error_scale()
    torch.testing.assert_close(y, case.reference(), rtol=0, atol=limit)
    assert len(caught) == 1
    assert "apt-get install g++" in str(caught[0].message)


def test_fallback_keeps_dtype_and_checks(without_library):
    case = random_case("trellis-4x64", 5, 33, 576, bias=True)
    case = case.with_x(case.x.bfloat16())
    with pytest.warns(RuntimeWarning, match="slow torch path"):
        y = ops.linear(*case.args())
    assert y.dtype == torch.bfloat16
    limit = FP32_TOLERANCE * case.error_scale()
    torch.testing.assert_close(
        y.float(), case.reference(), rtol=HALF_STEP[torch.bfloat16], atol=limit
    )
    with pytest.raises(ValueError, match="signs_in"):
        ops.linear(*replace(case, signs_in=case.signs_in[:-1]).args())
