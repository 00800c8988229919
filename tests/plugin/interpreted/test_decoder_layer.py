"""The linear layers of one decoder layer through vLLM's LinearMethod, on the Triton kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_experts as experts
from bare_layers import (
    PACKED_MODULES,
    finish,
    load_part,
    make_codebook,
    make_config,
    make_parts,
    tensor_parallel,
)
from pcdvq_kernels.ops import kernels_for
from random_checkpoint import E8, INT8, TRELLIS, random_layer
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_pcdvq.config import PCDVQConfig

HIDDEN, INNER, HEAD, BLOCK = 128, 256, 32, 64
SHARDS = {"qkv_proj": {"q": 128, "k": 64, "v": 64}, "gate_up_proj": {0: INNER, 1: INNER}}
INT8_ERROR = 0.01  # of a layer's output


@pytest.fixture
def _vllm() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()), tensor_parallel(0, 1):
        yield


def build(name: str, config: PCDVQConfig) -> LinearBase:
    common = {"bias": False, "quant_config": config, "prefix": f"layer.{name}"}
    if name == "qkv_proj":
        return QKVParallelLinear(HIDDEN, HEAD, 4, 2, **common)
    if name == "gate_up_proj":
        return MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **common)
    return RowParallelLinear(INNER if name == "down_proj" else HIDDEN, HIDDEN, **common)


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize("spec", [TRELLIS, E8], ids=lambda spec: spec.codec)
def test_linears_of_a_decoder_layer(spec) -> None:
    codebook = make_codebook(spec)
    parts = {name: PACKED_MODULES.get(name, [name]) for name in (*SHARDS, "o_proj", "down_proj")}
    names = [f"layer.{part}" for group in parts.values() for part in group]
    config = make_config(names, {HIDDEN: BLOCK, INNER: BLOCK}, codebook)
    assert kernels_for(torch.device("cpu")) == "triton on cpu"
    for name in parts:
        layer = build(name, config)
        columns = INNER if name == "down_proj" else HIDDEN
        shards = SHARDS.get(name, {None: HIDDEN})
        packed = make_parts(list(shards.values()), columns, spec=spec)
        for shard, part in zip(shards, packed, strict=True):
            load_part(layer, part, shard)
        finish(layer)
        assert layer.qweight.dtype == torch.int32
        dense = torch.cat([part.dense(codebook, BLOCK) for part in packed])
        for tokens in (1, 9):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
            found, expected = layer(x)[0], x @ dense.T
            assert ((found - expected).norm() / expected.norm()).item() < INT8_ERROR, name


@pytest.mark.usefixtures("_vllm")
def test_embedding() -> None:
    codebook = make_codebook(INT8)
    config = make_config(["embed"], {HIDDEN: BLOCK}, codebook, embedding="embed")
    layer = VocabParallelEmbedding(
        40, HIDDEN, params_dtype=torch.float32, quant_config=config, prefix="embed"
    )
    part = random_layer(INT8, 40, HIDDEN, torch.Generator().manual_seed(0))
    load_part(layer, part)
    finish(layer)
    assert layer.qweight.dtype == torch.int32
    ids = torch.tensor([0, 39, 7])
    torch.testing.assert_close(layer(ids), part.dense(codebook, BLOCK)[ids])


@pytest.mark.usefixtures("_vllm")
def test_experts() -> None:
    codebook, layers = make_codebook(TRELLIS), experts.random_experts(TRELLIS)
    config = make_config(list(layers), experts.BLOCKS, codebook)
    layer = experts.build(config)
    experts.load(layer, experts.tensors(layers))
    assert layer.w13_qweight.dtype == torch.int32
    tokens = [each[:2] for each in experts.random_tokens()]
    expected = experts.reference(layers, codebook, *tokens)
    found = experts.run(layer, *tokens)
    assert (found - expected).norm() < 3 * INT8_ERROR * expected.norm()
