"""Layers that vLLM cannot serve quantized, because it reorders their rows while it loads them.

Some of vLLM's models rearrange tensors by name or shape before they load them, which is right for
dense weights. This lists the layers whose packed tensors neither survive that nor can be put right
by the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pcdvq_kernels.config import QUANT_METHOD
from pcdvq_kernels.trellis import CHAIN_ROWS
from pcdvq_kernels.vptq import layout as vptq


def _always(config: Mapping[str, Any], method: str, row_multiple: int) -> bool:
    return True


def _falcon(config: Mapping[str, Any], method: str, row_multiple: int) -> bool:
    """Whether codes miss what vLLM does to Falcon: it moves whole heads of tensors with rows."""
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return False  # the heads are in vLLM's order on disk
    head_size = config["hidden_size"] // config["num_attention_heads"]
    return method == vptq.QUANT_METHOD or head_size % row_multiple != 0


@dataclass(frozen=True)
class Reordering:
    """What vLLM reorders in the models of one family.

    Attributes:
        architectures: beginnings of their names.
        layers: last parts of the names of the layers.
        when: whether it concerns a model with this config.json, packed by this method, in parts of
            so many rows.
    """

    architectures: tuple[str, ...]
    layers: tuple[str, ...]
    when: Callable[[Mapping[str, Any], str, int], bool] = _always


REORDERINGS = (
    Reordering(("Bloom",), ("query_key_value",)),  # takes input signs for rows, too
    Reordering(("FalconFor", "FalconModel"), ("query_key_value",), _falcon),
    Reordering(("TeleChat2",), ("key_value",)),
    Reordering(("K2Horizon",), ("q_proj", "k_proj")),
    Reordering(("Glm5Next",), ("kv_a_proj_with_mqa",)),
)


def reordered(
    config: Mapping[str, Any],
    layer: str,
    method: str = QUANT_METHOD,
    row_multiple: int = min(CHAIN_ROWS),
) -> str | None:
    """Why vLLM cannot serve the layer quantized, None if it can.

    Args:
        config: the model's config.json.
        layer: name of a linear layer on disk.
        method: `quant_method` that it is quantized by.
        row_multiple: rows of a part that decodes by itself; the default is the least of codec
            `trellis`.
    """
    part = layer.rpartition(".")[2]
    for architecture in config.get("architectures") or ():
        for each in REORDERINGS:
            if (
                part in each.layers
                and architecture.startswith(each.architectures)
                and each.when(config, method, row_multiple)
            ):
                return f"vLLM's {architecture} reorders its rows while it loads dense weights"
    return None
