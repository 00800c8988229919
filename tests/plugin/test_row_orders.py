"""What vLLM does to dense weights while it loads them is done to codes, or refused by name."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pcdvq_quantizer.hf  # noqa: F401 transformers then loads PCDVQ checkpoints
import pytest
import torch
from bare_layers import (
    PACKED_MODULES,
    finish,
    load,
    load_part,
    make_codebook,
    make_config,
    make_parts,
    tensor_parallel,
)
from engine_worker import generate, generate_and_reload
from loading_transforms import find_transforms
from models import change_config, save_model, tiny_config
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.row_orders import REORDERINGS, reordered
from pcdvq_kernels.vptq import layout as vptq
from pcdvq_kernels.vptq.reference import dequantize
from pcdvq_quantizer.plan import NONE, QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from random_checkpoint import E8, ODD_BITS, SHORT_CHAINS, TRELLIS
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.models.llama4 import Llama4ForCausalLM
from vllm.model_executor.models.registry import ModelRegistry
from vptq_layers import random_layer

from vllm_pcdvq.row_order import HALVES
from vllm_pcdvq.vptq import VPTQConfig

# Of vLLM 0.32, by what makes it right for packed tensors. A file or digest that is not here has a
# change to look at: serve it (`vllm_pcdvq.row_order`), refuse it (`pcdvq_kernels.row_orders`), or
# say here why it never meets packed tensors.
REVIEWED = {
    "in the table, or done by the plugin": {
        "bloom": "326255",
        "falcon": "104431",
        "glm5next/common/model": "29d775",
        "k2_horizon": "588002",
        "layers/mamba/mamba_mixer2": "41afe5",
        "llama4": "350876",
        "mllama4": "d4032e",
        "telechat2": "f0ec6f",
    },
    "names of Mistral's own format, which the quantizer does not read": {"mistral": "cc03de"},
    "experts stored as one tensor, which stay dense": {
        "bert_with_rope": "d17532",
        "dbrx": "712432",
        "ernie45_vl_moe": "90a72f",
        "gpt_oss": "78bded",
        "granitemoehybrid": "7dab53",
        "hy_v4/nvidia/model": "1a8f47",
        "hy_v4/nvidia/mtp": "501eb9",
        "inkling/nvidia/model": "25a7bd",
        "inkling/nvidia/moe": "9374a5",
        "minicpm": "087aee",
        "moondream3": "80e0ae",
        "openai_privacy_filter": "24f914",
        "step3_text": "5998bd",
        "step3p5": "39d399",
        "step3p5_mtp": "d386b9",
    },
    "shared experts among the others, on AMD's devices": {
        "AXK1": "f81fde",
        "deepseek_mtp": "f81fde",
        "deepseek_v2": "fcbede",
        "glm4_moe_lite": "c6dc71",
        "glm4_moe_lite_mtp": "c6dc71",
        "glm4_moe_mtp": "f81fde",
        "utils": "e821bb",
    },
    "tensors of another quantization": {
        "bailing_moe_v3": "744b51",
        "deepseek_v4/cpu/model": "915177",
        "deepseek_v4/nvidia/dspark": "c3a4a2",
        "deepseek_v4/nvidia/model": "c80fa8",
        "deepseek_v4/nvidia/mtp": "915177",
        "deepseek_v41/common/ops/fused_layout": "37c08b",
        "deepseek_v41/nvidia/dspark": "c3a4a2",
        "deepseek_v41/nvidia/model": "dc70ad",
        "dots3_note/nvidia/model": "010ad4",
        "mimo_v2": "e886b0",
        "mimo_v2_mtp": "cab98a",
    },
    "norms, convolutions, embeddings and the like": {
        "bagel": "dad6d6",
        "cohere2_moe": "26eaea",
        "commandr": "6d9bbe",
        "deepseek_v41/common/engram": "b2c779",
        "glm5next/common/kda": "1a7ade",
        "inkling/nvidia/short_conv": "528634",
        "kimi_k3/nvidia/kda": "fc615b",
        "laguna": "5b2d36",
        "layers/mamba/gdn/kimi_gdn_linear_attn": "04efe2",
        "layers/mamba/gdn/olmo_gdn_linear_attn": "35af50",
        "layers/mamba/gdn/qwen_gdn_linear_attn": "d986b5",
        "layers/mamba/linear/bailing_linear_attn": "f13c94",
        "layers/mamba/mamba_mixer": "523a07",
        "llama_eagle3": "b0d00b",
        "longcat_flash": "0cf153",
        "longcat_flash_ngram": "22a633",
        "medusa": "22c5ed",
        "molmo": "2d8b5d",
        "molmo2": "2d8b5d",
        "openpangu": "f249a4",
        "plamo3": "605307",
        "qwen2_moe": "8029b0",
        "qwen3_dflash": "58e73a",
        "qwen3_eagle3": "b0d00b",
        "qwen4_exp/common/ple": "f6a3d4",
        "transformers/fusers/attention": "16a89e",
    },
    "layers that transformers has not as torch.nn.Linear of a causal LM": {
        "gpt2": "bfab55",
        "hy_v3_mtp": "9828c8",
        "jina": "0e44d5",
        "openpangu_vl": "80ec36",
    },
    "no change of a tensor": {
        "inkling/nvidia/mtp": "8bcfdb",
        "nano_nemotron_vl": "a11cb4",
        "pixtral": "bdb849",
    },
}


def test_every_transform_of_vllm_was_reviewed() -> None:
    reviewed = {place: digest for group in REVIEWED.values() for place, digest in group.items()}
    assert find_transforms() == reviewed


MODELS = {
    "llama4": {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 256,
        "interleave_moe_layer_step": 4,  # no experts: vLLM does not reload dense ones right
        "attention_chunk_size": 128,
        "head_dim": 32,
    },
    "bloom": {"model_type": "bloom", "n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
    "falcon": {
        "model_type": "falcon",
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "bias": True,
    },
}
PROMPTS = [[7], list(range(20, 31)), list(range(250, 190, -1))]


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    """The quantizer's own checkpoints, of codes that tie rows, against vLLM's own dense model."""
    fields = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.15}
    config = tiny_config(**{**fields, "pad_token_id": 0, **MODELS[name]})
    source = save_model(tmp_path / "model", config)
    plan = make_plan(str(source), QuantizeOptions(bits=3.0, calibration=NONE))
    assert any(book.codebook.spec.chain_rows for book in plan.distinct_codebooks)
    left = [reason for reason in plan.selection.skipped.values() if "reorders its rows" in reason]
    assert bool(left) == (name == "bloom")
    packed = quantize_model(plan, tmp_path / "packed").directory
    change_config(packed, activations="float")  # as dense weights compute
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).dequantize()
    model.save_pretrained(tmp_path / "dense")
    runs = engine.submit(generate_and_reload, packed, [packed], PROMPTS, dtype="float32").result()
    expected = engine.submit(generate, tmp_path / "dense", PROMPTS, dtype="float32").result()
    assert len(runs) == 2
    for served in runs:
        for ours, theirs in zip(served, expected, strict=True):
            assert ours.tokens == theirs.tokens
            for found, dense in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert found == pytest.approx(dense, abs=1e-3)


K, HEAD, HEADS, KV_HEADS = 256, 32, 8, 2
ROWS = {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD}
NAMES = [f"m.{part}" for part in ROWS]
VISION = "vision_model.model.layers.0.self_attn"


def _model(vllm_config: VllmConfig, architecture: str) -> None:
    """Let vLLM's layers believe that they are part of such a model."""
    model = SimpleNamespace(architecture=architecture, model="model")
    object.__setattr__(vllm_config, "model_config", model)


def _llama4(weights: list[Tensor]) -> list[Tensor]:
    """q, k and v as vLLM's Llama 4 loads them."""
    config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    model = SimpleNamespace(config=config)
    names = [f"m.{part}.weight" for part in ROWS]
    return [
        Llama4ForCausalLM.permute_qk_weight_for_rotary(model, name, weight)[1]
        for name, weight in zip(names, weights, strict=True)
    ]


def _qkv(config: object, prefix: str = "m.qkv_proj") -> LinearBase:
    return QKVParallelLinear(
        K, HEAD, HEADS, KV_HEADS, bias=False, quant_config=config, prefix=prefix
    )


@pytest.mark.parametrize("architecture", HALVES)
@pytest.mark.parametrize("spec", [E8, SHORT_CHAINS], ids=lambda spec: spec.codec)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_llama4_ranks(
    size: int, spec: CodebookSpec, architecture: str, vllm_config: VllmConfig
) -> None:
    """With more ranks than heads of k and v, too."""
    _model(vllm_config, architecture)
    parts = make_parts(list(ROWS.values()), K, spec=spec)
    dense = _llama4([part.dense(make_codebook(spec), 64) for part in parts])
    x = torch.randn(3, K)
    for rank in range(size):
        with tensor_parallel(rank, size):
            layer = _qkv(make_config(NAMES, {K: 64}, make_codebook(spec)))
            for part, shard_id in zip(parts, "qkv", strict=True):
                load_part(layer, part, shard_id)
            finish(layer)
            kv_ranks = min(size, KV_HEADS)
            shares = [(rank, size), *2 * [(rank * kv_ranks // size, kv_ranks)]]
            expected = torch.cat(
                [
                    each.chunk(count)[index]
                    for each, (index, count) in zip(dense, shares, strict=True)
                ]
            )
            torch.testing.assert_close(layer(x)[0], x @ expected.T, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.quant_method.dequantize_weight(layer), expected)


def test_llama4_of_vptq(vllm_config: VllmConfig) -> None:
    _model(vllm_config, "Llama4ForCausalLM")
    parts = {name: random_layer(rows, K) for name, rows in zip(NAMES, ROWS.values(), strict=True)}
    layers = {
        name: layout.model_dump(exclude_none=True, exclude={"dtype", "device"})
        for name, (layout, _) in parts.items()
    }
    config = VPTQConfig(layers)
    config.packed_modules_mapping = PACKED_MODULES
    layer = _qkv(config)
    for part, shard_id in zip(parts.values(), "qkv", strict=True):
        for key, tensor in part[1].items():
            load(layer, key, tensor, shard_id)
    x = torch.randn(3, K)
    expected = torch.cat(_llama4([dequantize(*part) for part in parts.values()]))
    torch.testing.assert_close(finish(layer)(x)[0], x @ expected.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "parent"),
    [
        ("Llama4ForConditionalGeneration", VISION),
        ("LlamaForCausalLM", "m"),
        ("TransformersForCausalLM", "m"),
    ],
)
def test_order_on_disk(architecture: str, parent: str, vllm_config: VllmConfig) -> None:
    _model(vllm_config, architecture)
    config = make_config([f"{parent}.{part}" for part in ROWS], {K: 64}, make_codebook())
    assert _qkv(config, f"{parent}.qkv_proj").quant_method.order is None


def _config(architecture: str, **fields: object) -> PreTrainedConfig:
    return PreTrainedConfig(architectures=[architecture], **fields)


@pytest.mark.parametrize("method", ["pcdvq", "vptq"])
@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (BloomConfig(architectures=["BloomForCausalLM"]), "h.0.self_attention.query_key_value"),
        (
            FalconConfig(architectures=["FalconForCausalLM"], multi_query=False, hidden_size=568),
            "h.0.self_attention.query_key_value",
        ),
        (_config("TeleChat2ForCausalLM"), "h.0.self_attention.key_value"),
        (_config("K2HorizonForCausalLM"), "layers.0.self_attn.q_proj"),
        (_config("Glm5NextForCausalLM"), "layers.0.self_attn.kv_a_proj_with_mqa"),
    ],
    ids=lambda value: (
        value.rpartition(".")[2] if isinstance(value, str) else value.architectures[0]
    ),
)
def test_refused_at_start(method: str, config: PreTrainedConfig, layer: str) -> None:
    (architecture,) = config.architectures
    assert architecture in ModelRegistry.get_supported_archs()
    message = f"layer {layer} is quantized, and vLLM's {architecture} reorders its rows"
    if method == "vptq":
        served = VPTQConfig({layer: {}})
    else:
        served = make_config([layer], {K: 64}, make_codebook())
    with pytest.raises(CheckpointError, match=re.escape(message)):
        served.maybe_update_config("model", config)


def test_table_names_models_of_vllm() -> None:
    known = ModelRegistry.get_supported_archs()
    for each in REORDERINGS:
        assert any(name.startswith(each.architectures) for name in known)
    assert set(HALVES) <= set(known)


@pytest.mark.parametrize(
    ("fields", "packed", "vptq_too"),
    [
        ({"multi_query": True}, True, True),
        ({"multi_query": False}, True, False),
        ({"multi_query": True, "new_decoder_architecture": True}, True, False),
        ({"multi_query": False, "hidden_size": 96}, False, False),  # heads of 24 rows
    ],
)
def test_falcon(fields: dict[str, object], packed: bool, vptq_too: bool) -> None:
    """Whole heads of packed rows move; the codes of VPTQ do not, nor parts of a segment."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "new_decoder_architecture": False}
    config = {"architectures": ["FalconForCausalLM"], **sizes, **fields}
    layer = "transformer.h.0.self_attention.query_key_value"
    assert (reordered(config, layer) is None) == packed
    assert (reordered(config, layer, vptq.QUANT_METHOD) is None) == vptq_too
    assert reordered(config, "transformer.h.0.self_attention.dense") is None


def test_falcon_of_longer_chains_than_heads() -> None:
    """The quantizer asks for the shortest chains, a server for those of the checkpoint."""
    config = FalconConfig(
        architectures=["FalconForCausalLM"],
        multi_query=False,
        hidden_size=128,
        num_attention_heads=4,
    )
    layer = "transformer.h.0.self_attention.query_key_value"
    message = f"layer {layer} is quantized, and vLLM's FalconForCausalLM reorders its rows"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        make_config([layer], {K: 64}, make_codebook(TRELLIS)).maybe_update_config("model", config)
    served = make_config([layer], {K: 64}, make_codebook(ODD_BITS))
    with pytest.raises(CheckpointError, match="cannot fetch"):  # all else is well
        served.maybe_update_config("model", config)


@pytest.mark.parametrize("place", ["config", "text_config"])
def test_classifier_from_rows_of_codes(place: str) -> None:
    fields = {"classifier_from_token": ["no", "yes"]}
    config = PreTrainedConfig(**fields)
    if place == "text_config":
        config = PreTrainedConfig()
        config.get_text_config = lambda: PreTrainedConfig(**fields)
    name = "model.embed_tokens"
    served = make_config([name, "m.up"], {K: 64}, make_codebook(), embedding=name)
    message = rf"{name} is quantized, and classifier_from_token.*--embedding-bits 16"
    with pytest.raises(CheckpointError, match=message):
        served.maybe_update_config("model", config)


def test_mixer_with_fewer_groups_than_ranks(vllm_config: VllmConfig) -> None:
    """vLLM then builds the projection as a plain layer, and as a merged one otherwise."""
    config = make_config(["m.in_proj"], {K: 64}, make_codebook(SHORT_CHAINS))
    plain = {"bias": False, "quant_config": config, "prefix": "m.in_proj"}
    ColumnParallelLinear(K, 96, **plain)
    message = "fewer groups than --tensor-parallel-size 2.*--skip '\\*.in_proj'"
    with tensor_parallel(0, 2):
        MergedColumnParallelLinear(K, [64, 32], **plain)
        with pytest.raises(PCDVQError, match=message):
            ColumnParallelLinear(K, 96, **plain)
