"""Quantizing one layer, against the fp32 reference."""

import pytest
import torch
from pcdvq_kernels import reference
from pcdvq_quantizer.codebooks import OFFERED, get_codebook
from pcdvq_quantizer.layer import ErrorSum, LayerError, quantize_linear
from pcdvq_quantizer.plan import input_signs

LARGEST_ERROR = {
    1.5: 0.2,
    2.0: 0.12,
    2.25: 0.09,
    2.5: 0.07,
    3.0: 0.04,
    3.25: 0.03,
    3.5: 0.02,
    4.0: 0.012,
}


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(codec, bits) for codec in ("trellis", "pvq") for bits in OFFERED[codec]],
)
@pytest.mark.parametrize(("rows", "columns"), [(33, 576), (5, 896), (1, 72)])
def test_reported_error_is_the_error_of_the_stored_weight(
    codec: str, bits: float, rows: int, columns: int
) -> None:
    named = get_codebook(codec, bits, effort="quick")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight *= torch.logspace(-3, 1, rows).unsqueeze(1)  # rows of very different size
    signs = input_signs(columns, 0)
    layer = quantize_linear(weight, named, signs, block=8)
    stored = reference.dequantize(
        layer.qweight, layer.row_scale, layer.signs_in, named.codebook, block=8
    )
    error = ((stored - weight).square().sum() / weight.square().sum()).item()
    assert layer.error.weight == pytest.approx(error, rel=1e-3)
    assert error < LARGEST_ERROR[bits]


def test_rotation_rescues_outliers() -> None:
    """What the transform is for: one huge column must not spoil its row."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    weight[:, 17] *= 30
    named = get_codebook("trellis", 3.0, 16, "quick")
    errors = [
        quantize_linear(weight, named, input_signs(512, 0), block).error.weight
        for block in (1, 512)
    ]
    assert errors[1] < 0.04 < errors[0]


def test_zero_and_tiny_rows_stay_finite() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1e-20
    weight[2] = 1e20
    layer = quantize_linear(
        weight, get_codebook("trellis", 2.0, 16, "quick"), input_signs(64, 0), 64
    )
    assert layer.row_scale.isfinite().all()
    assert layer.row_scale[0] == 0


def test_error_of_a_layer_of_zeros() -> None:
    layer = quantize_linear(
        torch.zeros(16, 64), get_codebook("trellis", 2.0, 16, "quick"), input_signs(64, 0), 64
    )
    assert layer.error == LayerError(0.0, 0.0)
    errors = ErrorSum(8)
    errors.add(torch.zeros(1, 8), torch.ones(1, 8))
    assert errors.total(0.0).weight == 1.0


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1e12])
def test_relative_error_does_not_depend_on_the_size_of_weights(scale: float) -> None:
    weight = scale * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    layer = quantize_linear(
        weight, get_codebook("trellis", 2.0, 16, "quick"), input_signs(64, 0), 64
    )
    assert 0.05 < layer.error.weight < 0.12


@pytest.mark.parametrize(("codec", "bits"), [("e8", 2.0), ("trellis", 2.0)])
def test_chunking_does_not_change_the_result(
    codec: str, bits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(2))
    arguments = (get_codebook(codec, bits, 16, "quick"), input_signs(128, 0), 128)
    whole = quantize_linear(weight, *arguments)
    monkeypatch.setattr("pcdvq_quantizer.layer.CHUNK_WEIGHTS", 20 * 128)
    chunked = quantize_linear(weight, *arguments)
    assert torch.equal(whole.qweight, chunked.qweight)
    assert torch.equal(whole.row_scale, chunked.row_scale)
