"""`pcdvq::vptq_linear` in Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from pcdvq_kernels.triton import vptq
from pcdvq_kernels.vptq import ops  # noqa: F401 registers the operator
from pcdvq_kernels.vptq.reference import dequantize
from pcdvq_kernels.vptq.weight import pack_tables, pack_weight
from vptq_layers import CASES, random_layer


@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vptq, "_split_columns", lambda *_: 64)  # several splits
    columns = 98
    layout, tensors = random_layer(50, columns, **CASES[case])
    rows = range(13, 50)
    tables = pack_tables(layout, tensors, torch.device("cpu"))
    weight = pack_weight(layout, tensors, tables, rows)
    assert weight.codes[0].dtype == torch.int32
    x, bias = torch.randn(18, columns), torch.randn(len(rows))
    expected = torch.nn.functional.linear(x, dequantize(layout, tensors)[13:50], bias)
    y = torch.ops.pcdvq.vptq_linear(x, *weight.args(), bias, weight.layout)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_types_and_splits() -> None:
    layout, tensors = random_layer(40, 576)
    weight = pack_weight(layout, tensors, pack_tables(layout, tensors, torch.device("cpu")))
    x = torch.randn(2, 1, 576).bfloat16()
    y = torch.ops.pcdvq.vptq_linear(x, *weight.args(), None, weight.layout)
    expected = (x.float() @ dequantize(layout, tensors).T).bfloat16()
    torch.testing.assert_close(y, expected)
    assert torch.ops.pcdvq.vptq_linear(x[:0], *weight.args(), None, weight.layout).numel() == 0
