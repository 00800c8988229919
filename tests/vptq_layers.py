"""Random layers and checkpoints in VPTQ's public layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pcdvq_kernels.vptq.layout import TABLES, VPTQLayout
from pcdvq_kernels.vptq.reference import dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def entry(
    rows: int,
    columns: int,
    *,
    length: int = 8,
    centroids: int = 256,
    residuals: int = -1,
    groups: int = 1,
    outliers: tuple[int, int, int] | None = None,
    perm: bool = True,
    norm: bool = True,
) -> dict[str, Any]:
    """A layer's entry in `config_for_layers`; outliers: columns, vector length and centroids."""
    size, outlier_length, outlier_centroids = outliers or (0, -1, -1)
    return {
        "bias": False,
        "enable_norm": norm,
        "enable_perm": perm,
        "group_num": groups,
        "group_size": (columns - size) // groups,
        "in_features": columns,
        "indices_as_float": False,
        "is_indice_packed": True,
        "num_centroids": [outlier_centroids, centroids],
        "num_res_centroids": [-1, residuals],
        "out_features": rows,
        "outlier_size": size,
        "vector_lens": [outlier_length, length],
    }


# Layouts by what is special in them: published ones (with fewer centroids), then the others.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"perm": False, "norm": False},
    "residual": {"residuals": 256},
    "v16": {"length": 16, "residuals": 64, "centroids": 1024},
    "v12": {"length": 12, "centroids": 4096, "residuals": 4096},
    "v6": {"length": 6, "centroids": 128},
    "outliers": {"outliers": (5, 4, 64), "centroids": 512},
    "groups": {"groups": 3, "outliers": (32, 4, 100), "residuals": 16},
    "65536": {"centroids": 65536},
    "65536-256": {"centroids": 65536, "residuals": 256},
    "65536-65536": {"length": 16, "centroids": 65536, "residuals": 65536},
}


def pack_indices(codes: Tensor, bits: int) -> Tensor:
    """Codes int64 [..., columns] as the published int32 [..., words]: bit i of a row is bit i % 32
    of word i // 32."""
    stream = (codes.unsqueeze(-1) >> torch.arange(bits)) & 1
    stream = stream.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32))
    words = (stream.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return words.to(torch.int32)  # wraps around


def random_tensors(
    layout: VPTQLayout, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Tensors of a layer, named as in `VPTQLayout.tensors`; outputs as large as inputs."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    group = layout.segments()[-1]
    blocks = -(-layout.out_features // group.vector_len)
    codes = torch.randint(
        1 << group.bits, (layout.group_num, blocks, layout.group_size), generator=generator
    )
    tensors = {"indices": pack_indices(codes, group.bits)}
    for key, spec in layout.tensors().items():
        if key in TABLES:
            scale = 0.2 if key == "res_centroids" else 1.0
            unit = 1.0 if layout.enable_norm else layout.in_features**-0.5
            tensors[key] = (normal(*spec.shape) * scale * unit).to(dtype)
        if key == "outlier_indices":
            high = layout.num_centroids[0]
            found = torch.randint(high, spec.shape, generator=generator)
            tensors[key] = found.to(torch.int32).to(torch.uint16).view(torch.int16)
        if key == "perm":
            order = torch.randperm(layout.in_features, generator=generator)
            tensors[key] = order.to(torch.int32).to(torch.uint16).view(torch.int16)
        if key == "weight_scale":
            unit = 1 / math.sqrt(layout.in_features)
            tensors[key] = (unit * (0.5 + normal(*spec.shape).abs())).to(dtype)
        if key == "weight_bias":
            tensors[key] = (0.1 * normal(*spec.shape) / layout.in_features).to(dtype)
    return tensors


def random_layer(
    rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **case: Any
) -> tuple[VPTQLayout, dict[str, Tensor]]:
    """A layer of `entry(rows, columns, **case)`."""
    layout = VPTQLayout.parse("layer", entry(rows, columns, **case))
    return layout, random_tensors(layout, torch.Generator().manual_seed(seed), dtype)


def on_disk(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of layer `name` under their names in a checkpoint."""
    return {
        f"{name}.{key}" + (".weight" if key in TABLES else ""): tensor
        for key, tensor in tensors.items()
    }


def write_checkpoint(
    path: Path,
    hf_config: PreTrainedConfig,
    cases: dict[str, dict[str, Any]],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """Write a random VPTQ checkpoint to `path`.

    Args:
        path: the new directory.
        hf_config: the model.
        cases: what is special (see `CASES`) of the layers with this last name; others are left.
        dtype: of every float tensor.
        seed: of everything random.

    Returns:
        The same model in fp32 with the dense weights.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    # Logits far enough apart that the likeliest token is no matter of rounding.
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight.data.normal_(0, 3 * hf_config.hidden_size**-0.5)
    model = model.to(dtype).float()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if hf_config.tie_word_embeddings:
        del state["lm_head.weight"]
    generator, entries = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.rpartition(".")[2] not in cases:
            continue
        case = cases[name.rpartition(".")[2]]
        entries[name] = entry(module.out_features, module.in_features, **case)
        layout = VPTQLayout.parse(name, entries[name])
        tensors = random_tensors(layout, generator, dtype)
        module.weight.data = dequantize(layout, tensors)
        if module.bias is not None:
            bias = torch.randn(module.out_features, generator=generator).div(10).to(dtype)
            state[f"{name}.bias"], module.bias.data = bias, bias.float()
        del state[f"{name}.weight"]
        state |= on_disk(name, tensors)
    path.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {"quant_method": "vptq", "config_for_layers": entries}
    (path / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors"
    )
    return model
