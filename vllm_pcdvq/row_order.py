"""Layers whose rows are in another order in vLLM's models than on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.row_orders import reordered
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# While they load, these put the dense rows of q and k as rotation by halves wants them.
HALVES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration", "EagleLlama4ForCausalLM")


def check_row_orders(
    method: str, hf_config: PreTrainedConfig | None, layers: Mapping[str, int], remedy: str
) -> None:
    """Check that vLLM loads the rows of all quantized layers in an order that can be served.

    Args:
        method: `quant_method` of the checkpoint.
        hf_config: the model's configuration.
        layers: names of the quantized layers on disk, each with the rows of a part that decodes by
            itself.
        remedy: what to do about one that cannot.

    Raises:
        CheckpointError: one cannot.
    """
    config = hf_config.to_dict() if hf_config is not None else {}
    for layer, row_multiple in layers.items():
        if reason := reordered(config, layer, method, row_multiple):
            raise CheckpointError(
                f"layer {layer} is quantized, and {reason}, which codes do not survive. {remedy}"
            )


def check_classifier(hf_config: PreTrainedConfig | None, head: str | None) -> None:
    """Check that vLLM is not to make a classifier from rows of an output head that are codes.

    Args:
        hf_config: the model's configuration.
        head: name of the quantized output head, or of the embedding that it is tied to, if any.

    Raises:
        CheckpointError: it is.
    """
    configs = [hf_config, hf_config.get_text_config()] if hf_config is not None else []
    if head is not None and any(getattr(each, "classifier_from_token", None) for each in configs):
        raise CheckpointError(
            f"{head} is quantized, and classifier_from_token asks vLLM for a classifier made from "
            "its dense rows. Quantize again with --embedding-bits 16."
        )


def check_mixer(layer: LinearBase, name: str) -> None:
    """Check that vLLM splits the layer by rows as it would a dense one.

    Raises:
        PCDVQError: it is the input projection of a Mamba-2 mixer with fewer groups than ranks,
            which vLLM loads by rules that it has for tensors of certain names only.
    """
    plain = type(layer) is ColumnParallelLinear and name.endswith(".in_proj")
    if plain and layer.tp_size > 1:
        raise PCDVQError(
            f"layer {name} has fewer groups than --tensor-parallel-size {layer.tp_size}, so that "
            "vLLM copies some of its rows, which vllm-pcdvq does not do to codes. Serve with "
            "--tensor-parallel-size 1, or quantize again with --skip '*.in_proj'."
        )


def output_order(layer: LinearBase, name: str, vllm_config: VllmConfig | None) -> Tensor | None:
    """For each output of the layer on this rank in vLLM's order, which row on disk gives it.

    Rows themselves cannot move: some codecs tie them together.

    Args:
        layer: the layer.
        name: vLLM's name for it.
        vllm_config: names the model that it is part of.

    Returns:
        int64 [N], None if the orders are the same.
    """
    model = vllm_config and vllm_config.model_config
    if model is None or model.architecture not in HALVES or type(layer) is not QKVParallelLinear:
        return None
    if "vision_model." in name:
        return None
    heads, size = layer.num_heads + layer.num_kv_heads, layer.head_size
    rows = torch.arange(heads * size + layer.num_kv_heads * layer.v_head_size)
    pairs = rows[: heads * size].view(heads, size // 2, 2)
    rows[: heads * size] = pairs.transpose(1, 2).flatten()
    return rows


def set_order(layer: LinearBase, order: Tensor | None, device: torch.device) -> None:
    """Keep what `output_order` said of the layer, next to its weights."""
    order = None if order is None else order.to(device)
    layer.register_buffer("output_order", order, persistent=False)


def in_order(layer: LinearBase, outputs: Tensor, dim: int) -> Tensor:
    """`outputs`, whose dimension `dim` are rows on disk, in vLLM's order of the layer's outputs."""
    order = layer.output_order
    return outputs if order is None else outputs.index_select(dim, order)
