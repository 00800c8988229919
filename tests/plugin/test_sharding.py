"""Shards of every kind of linear layer add up to the dense layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from bare_layers import finish, load_part, make_codebook, make_config, make_parts, tensor_parallel
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import choose_block
from random_checkpoint import E8, ODD_BITS, SHORT_CHAINS, TRELLIS, PackedLayer
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from vllm_pcdvq.config import PCDVQConfig

K, BLOCK, HEAD = 256, 64, 16
# fp32 sums of K products in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Of outputs of standard deviation 0.7 to 1.2, activations rounded to int8: 3 times what was seen.
INT8_ERROR = 0.1


@dataclass(frozen=True)
class Case:
    """A layer class, the parts it has on disk, and how its shards make the whole.

    Attributes:
        build: makes the layer from a config.
        name: the layer's name.
        disk: names and rows of the parts on disk.
        shard_ids: how vLLM's models load each of them.
        outputs: rows of each output partition, which the shards split evenly.
        distinct: how many shards an output partition can be cut into; further ranks get copies.
    """

    build: Callable[[PCDVQConfig], LinearBase]
    name: str
    disk: dict[str, int]
    shard_ids: tuple[str | int | tuple[int, ...] | None, ...]
    outputs: tuple[int, ...]
    distinct: tuple[int, ...] = ()


def _qkv(config: PCDVQConfig) -> LinearBase:
    return QKVParallelLinear(K, HEAD, 8, 2, bias=True, quant_config=config, prefix="m.qkv_proj")


def _merged(config: PCDVQConfig) -> LinearBase:
    return MergedColumnParallelLinear(
        K, [96, 64], bias=True, quant_config=config, prefix="m.gate_up_proj"
    )


def _three(config: PCDVQConfig) -> LinearBase:
    return MergedColumnParallelLinear(
        K, [96, 64, 32], bias=True, quant_config=config, prefix="m.three"
    )


def _column(config: PCDVQConfig) -> LinearBase:
    return ColumnParallelLinear(K, 96, bias=True, quant_config=config, prefix="m.up")


def _replicated(config: PCDVQConfig) -> LinearBase:
    return ReplicatedLinear(K, 96, bias=True, quant_config=config, prefix="m.same")


QKV_ROWS = 8 * HEAD, 2 * HEAD, 2 * HEAD
QKV_PARTS = dict(zip(("m.q_proj", "m.k_proj", "m.v_proj"), QKV_ROWS, strict=True))
CASES = {
    "qkv": Case(_qkv, "m.qkv_proj", QKV_PARTS, ("q", "k", "v"), QKV_ROWS, (8, 2, 2)),
    "qkv on disk": Case(
        _qkv, "m.qkv_proj", {"m.qkv_proj": sum(QKV_ROWS)}, (None,), QKV_ROWS, (8, 2, 2)
    ),
    "merged": Case(
        _merged, "m.gate_up_proj", {"m.gate_proj": 96, "m.up_proj": 64}, (0, 1), (96, 64)
    ),
    "merged on disk": Case(_merged, "m.gate_up_proj", {"m.gate_up_proj": 160}, (None,), (96, 64)),
    "partly merged on disk": Case(
        _three, "m.three", {"m.three": 160, "m.third": 32}, ((0, 1), 2), (96, 64, 32)
    ),
    "column": Case(_column, "m.up", {"m.up": 96}, (None,), (96,)),
    "replicated": Case(_replicated, "m.same", {"m.same": 96}, (None,), (96,), (1,)),
}


def _shard(
    case: Case,
    parts: list[PackedLayer],
    biases: list[Tensor],
    rank: int,
    size: int,
    spec: CodebookSpec = E8,
) -> LinearBase:
    config = make_config(list(case.disk), {K: BLOCK}, make_codebook(spec))
    with tensor_parallel(rank, size):
        layer = case.build(config)
        for part, bias, shard_id in zip(parts, biases, case.shard_ids, strict=True):
            load_part(layer, part, shard_id, bias)
        return finish(layer)


def _forward(layer: LinearBase, x: Tensor, rank: int, size: int) -> Tensor:
    with tensor_parallel(rank, size):
        return layer(x)[0]


def _dense(
    parts: list[PackedLayer], biases: list[Tensor], x: Tensor, spec: CodebookSpec = E8
) -> Tensor:
    codebook = make_codebook(spec)
    return torch.cat(
        [
            x @ part.dense(codebook, BLOCK).T + bias
            for part, bias in zip(parts, biases, strict=True)
        ],
        dim=-1,
    )


@pytest.mark.parametrize(
    ("name", "size", "spec"),
    [(name, size, E8) for name in CASES for size in (1, 2, 4)]
    + [("qkv", 4, SHORT_CHAINS), ("qkv on disk", 4, SHORT_CHAINS), ("merged", 2, SHORT_CHAINS)]
    + [(name, 1, SHORT_CHAINS) for name in ("merged on disk", "partly merged on disk")]
    + [(name, 1, TRELLIS) for name in ("column", "replicated")],
)
def test_output_shards(name: str, size: int, spec: CodebookSpec, vllm_config) -> None:
    case = CASES[name]
    parts = make_parts(list(case.disk.values()), K, spec=spec)
    biases = [torch.randn(rows) for rows in case.disk.values()]
    x = torch.randn(3, K)
    outputs = [
        _forward(_shard(case, parts, biases, rank, size, spec), x, rank, size)
        for rank in range(size)
    ]
    copies = [max(1, size // limit) for limit in case.distinct or (size,) * len(case.outputs)]
    widths = [rows * count // size for rows, count in zip(case.outputs, copies, strict=True)]
    whole = []
    for index, count in enumerate(copies):
        pieces = [output.split(widths, dim=-1)[index] for output in outputs]
        for first in range(0, size, count):
            same = pieces[first : first + count]
            torch.testing.assert_close(same, [same[0]] * count, rtol=0, atol=0)
        whole.append(torch.cat(pieces[::count], dim=-1))
    torch.testing.assert_close(
        torch.cat(whole, dim=-1), _dense(parts, biases, x, spec), **TOLERANCE
    )


@pytest.mark.parametrize(
    ("width", "size"),
    [(K, 1), (K, 2), (K, 4), (576, 1), (576, 3), (896, 2), (4864, 2), (4864, 4)],
)
def test_input_shards(width: int, size: int, vllm_config) -> None:
    """Also at widths that are no powers of two, with the blocks that `--max-tp 8` chooses."""
    block, codebook = choose_block(width, 8), make_codebook()
    (part,), bias, x = make_parts([96], width), torch.randn(96), torch.randn(3, width)
    config = make_config(["m.down"], {width: block}, codebook)
    total = torch.zeros(3, 96)
    for rank, columns in enumerate(x.chunk(size, dim=-1)):
        with tensor_parallel(rank, size):
            layer = RowParallelLinear(width, 96, quant_config=config, prefix="m.down")
            load_part(layer, part, bias=bias)
            total += finish(layer)(columns)[0]
    expected = x @ part.dense(codebook, block).T + bias
    torch.testing.assert_close(total, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("columns", "block", "size", "remedy"),
    [
        (256, 64, 8, r"--tensor-parallel-size 4\."),
        (4096, 4096, 2, r"--tensor-parallel-size 1, or quantize again with --max-tp 2\."),
        (72, 8, 2, r"--tensor-parallel-size 1\."),
        (576, 64, 2, r"--tensor-parallel-size 1\."),
        (896, 64, 4, r"--tensor-parallel-size 2\."),
        (4864, 256, 4, r"--tensor-parallel-size 1, or quantize again with --max-tp 4\."),
    ],
)
def test_input_shards_that_cut_blocks(
    columns: int, block: int, size: int, remedy: str, vllm_config
) -> None:
    config = make_config(["m.down"], {columns: block}, make_codebook())
    with tensor_parallel(0, size), pytest.raises(PCDVQError, match=remedy) as caught:
        RowParallelLinear(columns, 96, quant_config=config, prefix="m.down")
    for words in (f"layer m.down has {columns}", f"blocks of {block}", f"size {size} would"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "rows", "remedy"),
    [
        ("merged", 4, 24, "Serve with --tensor-parallel-size 2, or quantize again with"),
        ("column", 4, 24, "Serve with --tensor-parallel-size 2, or quantize again with"),
        ("odd parts", 1, 24, "Quantize again with"),
    ],
)
def test_output_shards_that_cut_segments(
    name: str, size: int, rows: int, remedy: str, vllm_config
) -> None:
    def build_odd(config: PCDVQConfig) -> LinearBase:
        return MergedColumnParallelLinear(K, [24, 64], quant_config=config, prefix="m.gate_up_proj")

    build = build_odd if name == "odd parts" else CASES[name].build
    layers = ["m.gate_proj", "m.up_proj", "m.up"]
    config = make_config(layers, {K: BLOCK}, make_codebook(SHORT_CHAINS))
    with tensor_parallel(0, size), pytest.raises(PCDVQError, match=remedy) as caught:
        build(config)
    for words in (f"a part of {rows} rows", f"parallel-size {size};", "multiples of 16 rows"):
        assert words in str(caught.value)


@pytest.mark.parametrize("activations", ["float", "int8"])  # some CPUs pack weights for int8
@pytest.mark.parametrize("spec", [TRELLIS, ODD_BITS, SHORT_CHAINS], ids=lambda s: s.chain_rows)
@pytest.mark.parametrize(
    ("kind", "size"),
    [(ColumnParallelLinear, 1), (ReplicatedLinear, 2), (RowParallelLinear, 1)],
    ids=["column", "replicated", "row"],
)
def test_a_lone_layer_need_not_end_with_a_segment(
    kind: type[LinearBase], size: int, spec: CodebookSpec, activations: str, vllm_config
) -> None:
    config = make_config(["m.up"], {K: BLOCK}, make_codebook(spec))
    config.checkpoint = config.checkpoint.model_copy(update={"activations": activations})
    (part,), bias, x = make_parts([100], K, spec=spec), torch.randn(100), torch.randn(3, K)
    assert len(part.qweight) == -(-100 // spec.chain_rows) * spec.chain_rows
    with tensor_parallel(0, size):
        layer = kind(K, 100, quant_config=config, prefix="m.up")
        load_part(layer, part, bias=bias)
        y = finish(layer)(x)[0]
    dense = part.dense(make_codebook(spec), BLOCK)
    tolerance = TOLERANCE if activations == "float" else {"rtol": 0, "atol": INT8_ERROR}
    torch.testing.assert_close(y, x @ dense.T + bias, **tolerance)
    found = layer.quant_method.dequantize_weight(layer)
    torch.testing.assert_close(found, dense, rtol=0, atol=0)
