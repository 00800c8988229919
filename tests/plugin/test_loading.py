"""What does not fit the format is refused while it loads, and nothing may be missing."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch
from bare_layers import (
    BLOCK_256,
    finish,
    load,
    load_part,
    make_codebook,
    make_config,
    make_parts,
)
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

K, ROWS = 256, (128, 64, 64)
IDS = ("q", "k", "v")
QKV = [f"m.{part}_proj" for part in IDS]
PARTS = make_parts(ROWS, K)


@pytest.fixture
def qkv(vllm_config) -> LinearBase:
    config = make_config(QKV, BLOCK_256, make_codebook())
    return QKVParallelLinear(K, 32, 4, 2, bias=True, quant_config=config, prefix="m.qkv_proj")


def _load_all(layer: LinearBase, without: tuple[str, str] | None = None) -> None:
    for part, shard_id, rows in zip(PARTS, IDS, ROWS, strict=True):
        tensors = {**part.tensors(), "bias": torch.zeros(rows)}
        for name, tensor in tensors.items():
            if (name, shard_id) != without:
                load(layer, name, tensor, shard_id)


def test_complete_layer(qkv: LinearBase) -> None:
    _load_all(qkv)
    finish(qkv)
    assert qkv.qweight.dtype == torch.uint8
    assert qkv.row_scale.dtype == torch.float32
    assert qkv.signs_in.shape == (K // 8,)
    assert dict(qkv.named_parameters()).keys() == {"qweight", "row_scale", "signs_in", "bias"}


def test_layers_share_codewords(vllm_config) -> None:
    config = make_config(["m.a", "m.b"], BLOCK_256, make_codebook())
    layers = [
        ReplicatedLinear(K, 64, bias=False, quant_config=config, prefix=name)
        for name in ("m.a", "m.b")
    ]
    for layer in layers:
        load_part(layer, PARTS[1])
        finish(layer)
    assert layers[0].codewords is layers[1].codewords


def test_one_line_says_what_is_served(vllm_config, caplog: pytest.LogCaptureFixture) -> None:
    """Once all layers are ready, and not again when they are loaded anew."""
    config = make_config(["m.a", "m.b"], BLOCK_256, make_codebook())
    layers = [
        ReplicatedLinear(K, 64, bias=False, quant_config=config, prefix=name)
        for name in ("m.a", "m.b")
    ]
    caplog.set_level(logging.INFO, "vllm.pcdvq")
    for layer, lines in ((layers[0], 0), (layers[1], 1), (layers[1], 1)):
        if layer.signs_in.dim() > 1:
            load_part(layer, PARTS[1])
        finish(layer)
        assert len(caplog.messages) == lines
    gib = 2 * (64 * K * 2 / 8 + 4 * 64 + K / 8) / 2**30
    assert re.fullmatch(
        r"PCDVQ: 2 linear layers \(trellis, codes of 2\.000 bits per weight\); "
        rf"{gib:.3g} GiB packed, made ready in \d+\.\d s; kernels: cpu (scalar|avx2|avx512)",
        caplog.messages[0],
    )


@pytest.mark.parametrize("name", ["qweight", "row_scale", "signs_in", "bias"])
@pytest.mark.parametrize("shard_id", IDS)
def test_missing_part(qkv: LinearBase, name: str, shard_id: str) -> None:
    _load_all(qkv, without=(name, shard_id))
    message = rf"tensor m\.qkv_proj\.{name} \(part {IDS.index(shard_id)} of 3\) is missing"
    with pytest.raises(CheckpointError, match=message):
        finish(qkv)


@pytest.mark.parametrize("name", ["qweight", "row_scale", "signs_in"])
def test_missing_tensor(vllm_config, name: str) -> None:
    config = make_config(["m.down"], BLOCK_256, make_codebook())
    layer = RowParallelLinear(K, 128, bias=False, quant_config=config, prefix="m.down")
    for other, tensor in PARTS[0].tensors().items():
        if other != name:
            load(layer, other, tensor)
    with pytest.raises(CheckpointError, match=rf"tensor m\.down\.{name} is missing"):
        finish(layer)


def test_nothing_loaded(qkv: LinearBase) -> None:
    with pytest.raises(CheckpointError, match=r"tensor m\.qkv_proj\.row_scale is missing"):
        finish(qkv)


def test_unquantized_weight_missing(vllm_config) -> None:
    config = make_config(QKV, BLOCK_256, make_codebook())
    layer = RowParallelLinear(K, 128, bias=False, quant_config=config, prefix="m.down")
    with pytest.raises(CheckpointError, match=r"tensor m\.down\.weight is missing"):
        finish(layer)


Q = PARTS[0]
NOT_BYTES = {
    "qweight": Q.qweight.int(),
    "row_scale": Q.row_scale.float(),
    "signs_in": Q.signs_in.to(torch.int8),
    "bias": torch.zeros(ROWS[0], dtype=torch.int32),
}
NOT_THE_SHAPE = {
    "rows": ("qweight", torch.cat([Q.qweight, Q.qweight])),
    "columns": ("qweight", Q.qweight[:, :-1]),
    "transposed": ("qweight", Q.qweight.T),
    "scales": ("row_scale", Q.row_scale[:-1]),
    "scale matrix": ("row_scale", Q.row_scale[:, None]),
    "signs": ("signs_in", torch.cat([Q.signs_in, Q.signs_in])),
    "bias": ("bias", torch.zeros(ROWS[0] + 1)),
}


@pytest.mark.parametrize("rows", [99, 100, 112, 192])
def test_wrong_padding_of_chains(rows: int, vllm_config) -> None:
    config = make_config(["m.down"], BLOCK_256, make_codebook())
    layer = RowParallelLinear(K, 100, bias=False, quant_config=config, prefix="m.down")
    with pytest.raises(CheckpointError, match=rf"qweight is \[{rows}, 64\], expected \[128, 64\]"):
        load(layer, "qweight", torch.zeros(rows, 64, dtype=torch.uint8))


@pytest.mark.parametrize("name", NOT_BYTES)
def test_wrong_dtype(qkv: LinearBase, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"m\.qkv_proj\.{name} is torch\..*asks for"):
        load(qkv, name, NOT_BYTES[name], "q")


@pytest.mark.parametrize(("name", "tensor"), NOT_THE_SHAPE.values(), ids=NOT_THE_SHAPE)
def test_wrong_shape(qkv: LinearBase, name: str, tensor: Tensor) -> None:
    with pytest.raises(CheckpointError, match=rf"m\.qkv_proj\.{name} is \[.*expected \["):
        load(qkv, name, tensor, "q")


def test_unknown_part(qkv: LinearBase) -> None:
    with pytest.raises(CheckpointError, match="cannot load a part named 'index_q'"):
        load(qkv, "qweight", Q.qweight, "index_q")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_not_finite(qkv: LinearBase, value: float) -> None:
    _load_all(qkv)
    scale = Q.row_scale.clone()
    scale[5] = value
    load(qkv, "row_scale", scale, "q")
    with pytest.raises(CheckpointError, match=r"tensor m\.qkv_proj\.row_scale is not finite"):
        finish(qkv)


def test_bias_not_finite(qkv: LinearBase) -> None:
    _load_all(qkv)
    load(qkv, "bias", torch.full((ROWS[1],), torch.nan), "k")
    with pytest.raises(CheckpointError, match=r"tensor m\.qkv_proj\.bias is not finite"):
        finish(qkv)


def test_unequal_signs(qkv: LinearBase) -> None:
    _load_all(qkv)
    load(qkv, "signs_in", Q.signs_in ^ 4, "k")
    with pytest.raises(CheckpointError, match=r"m\.qkv_proj\.signs_in differs between the 3"):
        finish(qkv)


def test_dummy_weights(qkv: LinearBase) -> None:
    """`--load-format dummy` fills floats itself and leaves whatever integers are there."""
    qkv.row_scale.data.uniform_(-1e-3, 1e-3)
    qkv.bias.data.zero_()
    qkv.qweight.data.random_(0, 256)
    qkv.signs_in.data.random_(0, 256)
    finish(qkv)
    assert qkv(torch.randn(2, K))[0].isfinite().all()


def test_no_hadamard_block(vllm_config) -> None:
    config = make_config(QKV, {512: 64}, make_codebook())
    with pytest.raises(CheckpointError, match="no entry for input size 256"):
        QKVParallelLinear(K, 32, 4, 2, quant_config=config, prefix="m.qkv_proj")


def test_config_that_never_met_its_checkpoint(qkv: LinearBase) -> None:
    _load_all(qkv)
    qkv.quant_config.codebooks = None
    with pytest.raises(PCDVQError, match="no codebooks were read"):
        finish(qkv)


@pytest.mark.parametrize("activations", ["float", "int8"])  # some CPUs pack weights for int8
def test_dequantized_weight(activations: str, qkv: LinearBase) -> None:
    method = qkv.quant_method
    method.layout = replace(method.layout, activations=activations)
    method.layout_ints = method.layout.to_ints()
    _load_all(qkv)
    finish(qkv)
    dense = torch.cat([part.dense(make_codebook(), BLOCK_256[K]) for part in PARTS])
    torch.testing.assert_close(qkv.quant_method.dequantize_weight(qkv), dense, rtol=0, atol=0)
