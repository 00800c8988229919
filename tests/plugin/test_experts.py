"""Quantized experts in vLLM without an engine: shards and experts of all ranks add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bare_layers import make_codebook, make_config
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from random_checkpoint import E8, SHORT_CHAINS, TRELLIS, PackedLayer, random_layer
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_pcdvq.config import PCDVQConfig

NAME = "m.experts"
EXPERTS, HIDDEN, INNER, TOP_K = 5, 256, 128, 2
BLOCKS = {HIDDEN: 64, INNER: 32}
PARTS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
LAYERS = [f"{NAME}.{expert}.{part}" for expert in range(EXPERTS) for part in PARTS]
ALONE = FusedMoEParallelConfig.make_no_parallel()


def build(
    config: PCDVQConfig, parallel: FusedMoEParallelConfig = ALONE, **changes: object
) -> RoutedExperts:
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=TOP_K,
        global_num_experts=EXPERTS,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    moe = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=manager.local_num_experts,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.float32,
    )
    moe = replace(moe, **changes)
    return RoutedExperts(NAME, torch.float32, moe, config, expert_map_manager=manager)


def random_experts(spec: CodebookSpec) -> dict[str, PackedLayer]:
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for name in LAYERS:
        rows, columns = PARTS[name.rpartition(".")[2]]
        layer = random_layer(spec, rows, columns, generator)
        first = layers.get(f"{NAME}.0.{'down' if columns == INNER else 'gate'}_proj", layer)
        layers[name] = replace(layer, signs_in=first.signs_in)
    return layers


def tensors(layers: dict[str, PackedLayer]) -> dict[str, Tensor]:
    """By their names below `NAME`, as vLLM hands them to the layer."""
    return {
        f"{name.removeprefix(f'{NAME}.')}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.tensors().items()
    }


def load(layer: RoutedExperts, loaded: dict[str, Tensor]) -> RoutedExperts:
    list(layer.load_weights(loaded.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer: RoutedExperts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    return layer.forward_modular(x, weights, ids)


def random_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and the weights and numbers of their experts."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, HIDDEN, generator=generator)
    weights = torch.rand(9, TOP_K, generator=generator)
    return x, weights, torch.rand(9, EXPERTS, generator=generator).topk(TOP_K).indices.int()


def reference(
    layers: dict[str, PackedLayer], codebook: Codebook, x: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """What the experts make of x with dense weights."""
    y = torch.zeros_like(x)
    for token, each in enumerate(x):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up, down = (
                layers[f"{NAME}.{expert}.{part}"].dense(codebook, BLOCKS[columns])
                for part, (_, columns) in PARTS.items()
            )
            y[token] += weight * (down @ (torch.nn.functional.silu(gate @ each) * (up @ each)))
    return y


RANKS = {
    "tensor parallel": [replace(ALONE, tp_size=2, tp_rank=rank) for rank in range(2)],
    "expert parallel": [replace(ALONE, ep_size=2, ep_rank=rank, use_ep=True) for rank in range(2)],
    "alone": [ALONE],
}


@pytest.mark.parametrize("spec", [E8, TRELLIS, SHORT_CHAINS], ids=["e8", "trellis", "short chains"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_ranks_add_up(
    ranks: list[FusedMoEParallelConfig], spec: CodebookSpec, vllm_config: object
) -> None:
    codebook, layers = make_codebook(spec), random_experts(spec)
    x, weights, ids = random_tokens()
    expected = reference(layers, codebook, x, weights, ids)
    found = torch.zeros_like(x)
    for parallel in ranks:
        layer = build(make_config(LAYERS, BLOCKS, codebook), parallel)
        found += run(load(layer, tensors(layers)), x, weights, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def layer(vllm_config: object) -> RoutedExperts:
    return build(make_config(LAYERS, BLOCKS, make_codebook()))


@pytest.mark.parametrize(
    "missing", ["0.gate_proj.qweight", "3.up_proj.row_scale", "4.down_proj.signs_in"]
)
def test_missing_tensor(missing: str, layer: RoutedExperts) -> None:
    loaded = tensors(random_experts(TRELLIS))
    del loaded[missing]
    with pytest.raises(CheckpointError, match=f"tensor {NAME}.{missing} is missing"):
        load(layer, loaded)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("1.up_proj.qweight", torch.zeros(INNER, 65, dtype=torch.uint8), r"expected \[128, 64\]"),
        ("1.down_proj.row_scale", torch.zeros(HIDDEN), "is torch.float32"),
        ("1.down_proj.row_scale", torch.zeros(8, dtype=torch.bfloat16), r"expected \[256\]"),
        (
            "2.gate_proj.row_scale",
            torch.full((INNER,), torch.nan, dtype=torch.bfloat16),
            r"row_scale \(w13\) is not finite",
        ),
        ("2.up_proj.signs_in", torch.zeros(32, dtype=torch.uint8), "must share them"),
        ("2.down_proj.signs_in", torch.zeros(16, dtype=torch.uint8), "must share them"),
    ],
)
def test_bad_tensor(name: str, value: Tensor, message: str, layer: RoutedExperts) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(layer, {**tensors(random_experts(TRELLIS)), name: value})


def test_dummy_weights_and_reload(layer: RoutedExperts) -> None:
    for name, param in layer.named_parameters():
        if name.endswith("row_scale"):
            param.data.fill_(0.01)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.w13_qweight.shape == (EXPERTS, 2 * INNER, 64)
    assert layer.w2_signs_in.shape == (INNER // 8,)


def test_unquantized_experts_are_left_to_vllm(vllm_config: object) -> None:
    layer = build(make_config(["m.other"], BLOCKS, make_codebook()))
    assert not hasattr(layer, "w13_qweight")
    assert layer.w13_weight.shape == (EXPERTS, 2 * INNER, HIDDEN)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LAYERS[:-1], "must have the same codebook"),
        ({**dict.fromkeys(LAYERS, "a"), LAYERS[0]: "b"}, "must have the same codebook"),
        ([f"{NAME}.0.router"], "does not serve quantized RoutedExperts"),
    ],
)
def test_experts_unlike_each_other(layers: object, message: str, vllm_config: object) -> None:
    with pytest.raises(CheckpointError, match=message):
        build(make_config(layers, BLOCKS, make_codebook()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": MoEActivation.GELU}, "activation gelu"),
        ({"has_bias": True}, "biases"),
        ({"is_lora_enabled": True}, "without --enable-lora"),
    ],
)
def test_experts_of_another_kind(
    changes: dict[str, object], message: str, vllm_config: object
) -> None:
    with pytest.raises(PCDVQError, match=message):
        build(make_config(LAYERS, BLOCKS, make_codebook()), **changes)


def test_splits_that_do_not_fit(vllm_config: object) -> None:
    config = make_config(LAYERS, {**BLOCKS, INNER: 128}, make_codebook())
    with pytest.raises(PCDVQError, match=r"layer m.experts.\*.down_proj has 128 input columns"):
        build(config, RANKS["tensor parallel"][0])
    config = make_config(LAYERS, {**BLOCKS, INNER: 8}, make_codebook(TRELLIS))
    with pytest.raises(PCDVQError, match=r"layer m.experts.\*.gate_proj has a part of 8 rows"):
        build(config, replace(ALONE, tp_size=16))
    config = make_config(LAYERS, {224: 32, INNER: 32}, make_codebook(TRELLIS))
    with pytest.raises(PCDVQError, match=r"layer m.experts.\*.down_proj has a part of 224 rows"):
        build(config, hidden_dim=224)
