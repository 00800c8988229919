"""Checkpoints with random codes: as good as real ones where exactness is asked."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pcdvq_kernels import reference
from pcdvq_kernels.checkpoint import CODEBOOK_FILE, INDEX_FILE
from pcdvq_kernels.codebook import Codebook, int8_directions
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.hadamard import choose_block
from pcdvq_kernels.packing import pack_codes
from pcdvq_quantizer.experts import NAMINGS, experts_of, separate_experts
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel


def trellis(code_bits: int, chain_rows: int) -> CodebookSpec:
    return CodebookSpec(
        codec="trellis", vector_dim=2, pattern_bits=code_bits, chain_rows=chain_rows
    )


TRELLIS = trellis(4, 64)
ODD_BITS = trellis(5, 32)
SHORT_CHAINS = trellis(6, 16)
TRELLIS_4 = trellis(8, 64)
INT8 = CodebookSpec(codec="int8", vector_dim=1, pattern_bits=8)
E8 = CodebookSpec(codec="e8", vector_dim=8, pattern_bits=10, magnitude_bits=2)
PVQ = CodebookSpec(codec="pvq", vector_dim=8, pattern_bits=26, shift=3, pulses=(16, 13))

NOT_QUANTIZED = ("lm_head", "shared_expert_gate")


@dataclass(frozen=True)
class PackedLayer:
    """The tensors of one quantized layer, as they are on disk."""

    qweight: Tensor
    row_scale: Tensor
    signs_in: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def dense(self, codebook: Codebook, block: int) -> Tensor:
        return reference.dequantize(self.qweight, self.row_scale, self.signs_in, codebook, block)


def random_codebook(spec: CodebookSpec, generator: torch.Generator) -> Codebook:
    if spec.codec == "int8":
        return Codebook(spec, int8_directions(), torch.ones(1, dtype=torch.uint8))
    directions = torch.randint(-15, 16, (spec.rows, spec.vector_dim), generator=generator)
    # A pyramid's levels are small numbers of pulses.
    low, high = (30, 60) if spec.pulses else (3, 9)
    magnitudes = torch.randint(low, high, (spec.magnitude_count,), generator=generator)
    return Codebook(spec, directions.to(torch.int8), magnitudes.to(torch.uint8))


def random_layer(
    spec: CodebookSpec, rows: int, columns: int, generator: torch.Generator
) -> PackedLayer:
    """A layer whose outputs are about as large as its inputs."""
    shape = spec.stored_rows(rows), columns // spec.vector_dim
    codes = torch.randint(0, 1 << spec.code_bits, shape, generator=generator)
    size = 100 if spec.codec == "int8" else 50  # of levels, about
    scale = (0.5 + torch.rand(rows, generator=generator)) / (size * columns**0.5)
    return PackedLayer(
        pack_codes(codes, spec.code_bits),
        scale.to(torch.bfloat16),
        torch.randint(0, 256, (columns // 8,), generator=generator, dtype=torch.uint8),
    )


def tiny_llama(**changes: object) -> LlamaConfig:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **changes})


def write_random_checkpoint(
    path: Path,
    hf_config: PreTrainedConfig,
    spec: CodebookSpec = TRELLIS,
    *,
    max_tp: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    embeddings: CodebookSpec | None = None,
) -> PreTrainedModel:
    """Write a checkpoint of a random model to `path`.

    Layers that read the same activation share signs, as the format asks.

    Args:
        path: the new directory.
        hf_config: the model; every linear layer except `NOT_QUANTIZED` is quantized.
        spec: layout of the codes.
        max_tp: tensor-parallel size that the Hadamard blocks allow, where K does.
        dtype: of all that is not quantized.
        seed: of everything random.
        embeddings: layout of the codes of input embedding and output head; None leaves them.

    Returns:
        The same model in fp32 with the dense weights that the codes stand for.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    _separate_experts(model)
    # Logits far enough apart that the likeliest token is no matter of rounding.
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight.data.normal_(0, 3 * hf_config.hidden_size**-0.5)
    model = model.to(dtype).float()
    codebook = random_codebook(spec, generator)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    blocks = _quantize_linears(model, state, codebook, max_tp, generator)
    layers = {
        name.removesuffix(".qweight"): spec.codec for name in state if name.endswith(".qweight")
    }
    if hf_config.tie_word_embeddings:
        del state["lm_head.weight"]
    codebooks = {spec.codec: codebook}
    roles = {}
    if embeddings is not None:
        codebooks["embeddings"] = random_codebook(embeddings, generator)
        roles = _quantize_embeddings(model, state, codebooks["embeddings"], blocks, generator)
        layers.update(dict.fromkeys(roles.values(), "embeddings"))
    quantization = {
        "quant_method": "pcdvq",
        "format_version": 2,
        "codebooks": {id: book.spec.model_dump() for id, book in codebooks.items()},
        "layers": layers,
        "hadamard_blocks": blocks,
        "max_tp": max_tp,
        "modules_to_not_convert": [] if roles else ["lm_head"],
        "activations": "float",  # as the model that is returned computes
        **roles,
    }
    _write(path, model, dtype, state, quantization, codebooks)
    return model


def _separate_experts(model: PreTrainedModel) -> None:
    """Give each expert linear layers of its own, with other weights."""
    naming = NAMINGS.get(model.config.model_type)
    if naming is not None:
        moe = [
            index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")
        ]
        blocks = [f"model.layers.{index}.{naming.block}" for index in moe]
        separate_experts(model, [f"{block}.experts.0.{naming.gate}.weight" for block in blocks])


def _quantize_linears(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    codebook: Codebook,
    max_tp: int,
    generator: torch.Generator,
) -> dict[str, int]:
    """Give linear layers random codes, in `model` and `state`; returns the Hadamard blocks."""
    blocks: dict[str, int] = {}
    signs: dict[tuple[str, bool], Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith(NOT_QUANTIZED):
            continue
        columns = module.in_features
        block = blocks.setdefault(str(columns), choose_block(columns, max_tp))
        packed = random_layer(codebook.spec, module.out_features, columns, generator)
        parent, _, part = name.rpartition(".")
        place = experts_of(name) or parent, part in ("o_proj", "down_proj", "w2")
        shared = signs.setdefault(place, packed.signs_in)
        packed = replace(packed, signs_in=shared.clone())
        module.weight.data = packed.dense(codebook, block)
        if module.bias is not None:
            bias = torch.randn(module.out_features).div(10)
            state[f"{name}.bias"] = bias.to(state[f"{name}.bias"].dtype)
            module.bias.data = state[f"{name}.bias"].float()
        del state[f"{name}.weight"]
        state.update({f"{name}.{key}": tensor for key, tensor in packed.tensors().items()})
    return blocks


def _quantize_embeddings(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    codebook: Codebook,
    blocks: dict[str, int],
    generator: torch.Generator,
) -> dict[str, str]:
    """Give embedding and head random codes; returns their names by their role in the format."""
    roles = {"embedding": "model.embed_tokens"}
    if not model.config.tie_word_embeddings:
        roles["head"] = "lm_head"
    for name in roles.values():
        weight = model.get_submodule(name).weight
        rows, columns = weight.shape
        packed = random_layer(codebook.spec, rows, columns, generator)
        packed = replace(packed, row_scale=4 * packed.row_scale)
        weight.data.copy_(packed.dense(codebook, blocks[str(columns)]))
        del state[f"{name}.weight"]
        state.update({f"{name}.{key}": tensor for key, tensor in packed.tensors().items()})
    return roles


def _write(
    path: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    state: dict[str, Tensor],
    quantization: dict[str, object],
    codebooks: dict[str, Codebook],
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    shard = "model-00001-of-00001.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
    (path / INDEX_FILE).write_text(json.dumps(index))
    tables = {}
    for id, codebook in codebooks.items():
        tables[f"{id}.directions"] = codebook.directions
        tables[f"{id}.magnitudes"] = codebook.magnitudes
    save_file(tables, path / CODEBOOK_FILE)


def add_random_adapter(path: Path, model: PreTrainedModel, rank: int = 8) -> None:
    """Write a random LoRA adapter of all quantized layers to `path` and add it to `model`."""
    path.mkdir()
    tensors = {}
    parts = set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        down = torch.randn(rank, module.in_features).div(20)
        up = torch.randn(module.out_features, rank).div(20)
        module.weight.data += up @ down
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        parts.add(name.rpartition(".")[2])
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(parts),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
