"""VPTQ weights: the format against its own package, the operator against the reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pcdvq_kernels import cpu
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.vptq import cpu as vptq_cpu
from pcdvq_kernels.vptq import ops
from pcdvq_kernels.vptq.layout import VPTQLayout
from pcdvq_kernels.vptq.reference import dequantize
from pcdvq_kernels.vptq.weight import VPTQWeight, check_values, pack_tables, pack_weight
from torch import Tensor
from vptq_layers import CASES, entry, pack_indices, random_layer

FP32_TOLERANCE = 1e-6  # of the largest sum of magnitudes of products
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(isa not in cpu.isas(), reason=f"no {isa} here"))
    for isa in ("scalar", "avx2", "avx512")
]
all_isas = pytest.mark.parametrize("isa", ISAS)
needs_library = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
all_cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def packed(
    layout: VPTQLayout, tensors: dict[str, Tensor], *part: range, device: str = "cpu"
) -> VPTQWeight:
    check_values(layout, tensors, "layer")
    tables = pack_tables(layout, tensors, torch.device(device))
    return pack_weight(layout, tensors, tables, *part)


def run(weight: VPTQWeight, x: Tensor, bias: Tensor | None = None, isa: str = "auto") -> Tensor:
    """The CPU kernel's result; what it does not write is NaN."""
    args = x, *weight.args(), bias
    shape = ops.check(*args, weight.layout)
    out = torch.full((*x.shape[:-1], shape.rows), torch.nan, dtype=x.dtype)
    return vptq_cpu.linear(*args, shape, isa=isa, out=out)


def layer(case: str, rows: int, columns: int) -> tuple[VPTQLayout, dict[str, Tensor]]:
    """The layer of a case; groups of equal size leave the rest to the outliers."""
    changes = dict(CASES[case])
    if groups := changes.get("groups"):
        changes["outliers"] = (30 + (columns - 30) % groups, *changes["outliers"][1:])
    return random_layer(rows, columns, **changes)


def product(x: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, computed in fp64, as fp32."""
    y = x.double() @ dense.double().T
    return (y if bias is None else y + bias).float()


def limit(dense: Tensor, x: Tensor) -> float:
    return FP32_TOLERANCE * (x.abs() @ dense.abs().T.to(x)).max().item()


def test_indices_are_a_stream_of_bits() -> None:
    """Golden words: three 12-bit codes, the first in the lowest bits."""
    words = pack_indices(torch.tensor([0xABC, 0x123, 0x89D]), 12)
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [0x9D123ABC, 0x8]


def test_one_weight_by_hand() -> None:
    fields = entry(2, 3, length=2, centroids=2, residuals=2, outliers=(1, 2, 2))
    layout = VPTQLayout.parse("layer", fields)
    tensors = {
        "centroids": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "res_centroids": torch.tensor([[0.0, 0.0, 0.5, 0.25]]),
        "indices": torch.tensor(
            [[[0b0111]]], dtype=torch.int32
        ),  # 1 with residual 1, then 1 with 0
        "outlier_centroids": torch.tensor([[-1.0, -2.0, -3.0, -4.0]]),
        "outlier_indices": torch.tensor([[[1]]], dtype=torch.int16),
        "perm": torch.tensor([2, 0, 1], dtype=torch.int16),  # the outlier is column 2
        "weight_scale": torch.tensor([1.0, 10.0, 2.0]),
        "weight_bias": torch.tensor([0.0, 1.0, 0.5]),
    }
    expected = torch.tensor([[3.5, 31.0, -5.5], [4.25, 41.0, -7.5]])
    assert torch.equal(dequantize(layout, tensors), expected)


@pytest.mark.skipif(find_spec("vptq") is None, reason="the package vptq is not installed")
def test_dequantizes_as_the_vptq_package() -> None:
    """In a process of its own: importing the package imports much, and prints."""
    program = Path(__file__).with_name("vptq_package.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == " ".join(CASES)


@needs_library
@all_cases
@pytest.mark.parametrize("k", [576, 1536, 896, 4864])
def test_matches_reference(case: str, k: int) -> None:
    layout, tensors = layer(case, 37, k)
    weight, dense = packed(layout, tensors), dequantize(layout, tensors)
    x = torch.randn(33, k)
    bias = None if k == 576 else torch.randn(37)
    expected = product(x, dense, bias)
    for isa in cpu.isas() if k == 576 else cpu.isas()[-1:]:
        for m in (1, 2, 17, 33):
            y = run(weight, x[:m], bias, isa)
            torch.testing.assert_close(y, expected[:m], rtol=0, atol=limit(dense, x))


@needs_library
@all_isas
@pytest.mark.filterwarnings("ignore:.*slow")
@pytest.mark.parametrize("case", ["outliers", "groups", "65536", "65536-256", "65536-65536"])
def test_rounded_tables(case: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are those of the rounded weight, which is near the stored one."""
    monkeypatch.setattr("pcdvq_kernels.vptq.weight.SMALL_TABLE", 0)
    layout, tensors = layer(case, 37, 576)
    tables = pack_tables(layout, tensors, torch.device("cpu"))
    rounded = tables.rounded()
    assert {table.dtype for table in rounded.tensors} == {torch.int8}
    for table, levels, unit in zip(tables.tensors, rounded.tensors, rounded.units, strict=True):
        torch.testing.assert_close(
            levels * unit, table.float(), rtol=0, atol=0.5001 * unit, check_dtype=False
        )
    weight, exact = pack_weight(layout, tensors, rounded), pack_weight(layout, tensors, tables)
    x, dense = torch.randn(33, 576), dequantize(layout, tensors)
    args = x, *weight.args(), None
    expected = ops.fallback(*args, ops.check(*args, weight.layout))
    for m in (1, 2, 17, 33):
        y = run(weight, x[:m], None, isa)
        torch.testing.assert_close(y, expected[:m], rtol=0, atol=limit(dense, x))
    error = (expected - run(exact, x, None, isa)).norm() / expected.norm()
    assert 1e-4 < error < 0.02


def test_tables_that_stay_as_they_are() -> None:
    """Small ones, and those that a few large values would leave with few levels."""
    for case, damage in (("plain", 1.0), ("65536", 1e4)):
        layout, tensors = layer(case, 37, 576)
        tensors["centroids"][0, 0] *= damage
        tables = pack_tables(layout, tensors, torch.device("cpu"))
        assert tables.rounded() is tables


@needs_library
@all_cases
def test_rows_and_threads_change_nothing(case: str, threads: Callable[[int], None]) -> None:
    layout, tensors = layer(case, 200, 96)
    weight = packed(layout, tensors)
    x = torch.randn(401, 96)
    threads(1)
    expected = torch.cat([run(weight, row[None]) for row in x])
    for count in (1, 3):
        threads(count)
        for m in (2, 401):
            assert torch.equal(run(weight, x[:m]), expected[:m])


@needs_library
@all_isas
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(isa: str, dtype: torch.dtype) -> None:
    """Of tables and scales, then of activations, output and bias."""
    layout, tensors = random_layer(48, 98, dtype=dtype, **CASES["groups"])
    dense, x = dequantize(layout, tensors), torch.randn(5, 98)
    y = run(packed(layout, tensors), x, None, isa)
    torch.testing.assert_close(y, product(x, dense), rtol=0, atol=limit(dense, x))
    x, bias = x.to(dtype), torch.randn(48).to(dtype)
    y = run(packed(layout, tensors), x, bias, isa)
    torch.testing.assert_close(y, product(x.float(), dense, bias.float()).to(dtype))


@pytest.mark.filterwarnings("ignore:.*slow")
@all_cases
def test_fallback(case: str) -> None:
    layout, tensors = layer(case, 37, 576)
    dense, x, bias = dequantize(layout, tensors), torch.randn(2, 3, 576), torch.randn(37)
    args = x, *packed(layout, tensors).args(), bias
    y = ops.fallback(*args, ops.check(*args, packed(layout, tensors).layout))
    torch.testing.assert_close(y, product(x, dense, bias), rtol=0, atol=limit(dense, x))


@all_cases
def test_parts_add_up(case: str) -> None:
    """Any rows, as a column-parallel rank has them, and any columns, as a row-parallel one."""
    layout, tensors = layer(case, 90, 576)
    dense, x = dequantize(layout, tensors), torch.randn(3, 576)
    for rows in (range(0, 45), range(45, 90), range(31, 32)):
        y = run(packed(layout, tensors, rows), x)
        torch.testing.assert_close(
            y, product(x, dense[rows.start : rows.stop]), rtol=0, atol=limit(dense, x)
        )
    cuts = 0, 100, 101, 576
    parts = [
        run(packed(layout, tensors, range(90), range(*cut)), x[:, slice(*cut)])
        for cut in itertools.pairwise(cuts)
    ]
    torch.testing.assert_close(sum(parts), product(x, dense), rtol=0, atol=limit(dense, x))


@all_cases
def test_memory(case: str) -> None:
    """At most 15 % over the tensors on disk."""
    layout, tensors = layer(case, 4096, 512)
    weight = packed(layout, tensors)
    served = [weight.columns, weight.scale, weight.shift, *weight.codes, *weight.tables]
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in served) <= 1.15 * stored


def test_any_bits_are_codes() -> None:
    layout, tensors = random_layer(16, 64, centroids=65536, residuals=64)
    weight = packed(layout, tensors)
    weight.codes[0].fill_(255)
    assert (
        torch.ops.pcdvq.vptq_linear(torch.randn(2, 64), *weight.args(), None, weight.layout)
        .isfinite()
        .all()
    )


def test_operator() -> None:
    layout, tensors = layer("groups", 48, 98)
    weight = packed(layout, tensors)
    args = torch.randn(2, 98), *weight.args(), torch.randn(48), weight.layout
    torch.library.opcheck(torch.ops.pcdvq.vptq_linear, args)
    assert torch.ops.pcdvq.vptq_linear(torch.empty(0, 98), *args[1:]).shape == (0, 48)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 63), r"x is torch.float32 \[2, 63\]; expected .* \[..., 64\]"),
        (1, torch.zeros(64), "columns is torch.float32"),
        (2, torch.zeros(63), r"scale is torch.float32 \[63\]"),
        (4, [torch.zeros(2, 8, dtype=torch.uint8)], "codes is torch.uint8"),
        (4, [], "0 codes and 1 tables for 1 segments"),
        (5, [torch.zeros(5)], r"table is torch.float32 \[5\]"),
        (5, [torch.zeros(5, dtype=torch.int16)], "tables are torch.int16"),
        (6, torch.zeros(15), r"bias is torch.float32 \[15\]"),
        (7, [16, 0, 64, 8, 8], "layout has 5 integers"),
        (7, [16, 0, 64, 17, 8, 0], "vector_len in"),
        (7, [16, 8, 64, 8, 8, 0], "layout begins with"),
    ],
)
def test_arguments_that_do_not_fit(position: int, value: object, message: str) -> None:
    weight = packed(*random_layer(16, 64))
    args = [torch.zeros(2, 64), *weight.args(), None, weight.layout]
    args[position] = value
    with pytest.raises(PCDVQError, match=message):
        torch.ops.pcdvq.vptq_linear(*args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_centroids": [-1, 300]}, r"num_centroids is \[-1, 300\].* power of two up to 65536"),
        ({"num_centroids": [-1, 131072]}, "power of two up to 65536"),
        ({"num_res_centroids": [-1, 3]}, "num_res_centroids is"),
        ({"vector_lens": [-1, 24]}, r"vector_lens is \[-1, 24\], served are lengths up to 16"),
        ({"vector_lens": [8]}, "vector_lens"),
        ({"group_size": 63}, "1 groups of 63 make 63 columns, in_features is 64"),
        ({"is_indice_packed": False}, "pack the model"),
        ({"norm_dim": 1}, "norm_dim is 1"),
        ({"vector_quant_dim": "in"}, "vector_quant_dim is 'in'"),
        ({"rotation": True}, "rotation: Extra inputs"),
        ({"out_features": 17}, "out_features is 17 in the quantization_config, the model has 16"),
        (
            {"vector_lens": [4, 8], "num_centroids": [1 << 17, 256], "outlier_size": 1},
            "outliers of 131072 centroids",
        ),
    ],
)
def test_layouts_that_are_not_served(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PCDVQError, match=message) as caught:
        VPTQLayout.parse("model.q_proj", entry(16, 64) | changes, out_features=16)
    assert "layer model.q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "damage", "message"),
    [
        ("perm", lambda t: t.fill_(3), "perm has 1 different values from 3 to 3"),
        ("perm", lambda t: t[:-1], r"perm is torch.int16 \[575\]"),
        ("centroids", lambda t: t.fill_(torch.nan), "centroids is not finite"),
        ("centroids", lambda t: t.double(), "centroids is torch.float64"),
        ("weight_scale", lambda t: t.fill_(torch.inf), "weight_scale is not finite"),
        ("outlier_indices", lambda t: t.fill_(-1), "index 65535, there are 64 outlier"),
        ("indices", None, "indices is missing"),
        ("indices", lambda t: t[:, :-1], "indices is torch.int32"),
    ],
)
def test_damaged_tensors(key: str, damage: Callable[[Tensor], Tensor] | None, message: str) -> None:
    layout, tensors = layer("outliers", 37, 576)
    tensors.pop(key) if damage is None else tensors.update({key: damage(tensors[key])})
    with pytest.raises(PCDVQError, match=message):
        _check(layout, tensors)


def _check(layout: VPTQLayout, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        layout.check_tensor("layer", name, tensor)
    check_values(layout, tensors, "layer")
