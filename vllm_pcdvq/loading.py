"""Loading the tensors of a quantized layer: checked against the format, and none forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import TypeAlias

import torch
from pcdvq_kernels.checkpoint import PACKED_TENSORS, QWEIGHT, REMEDY, ROW_SCALE, SIGNS_IN
from pcdvq_kernels.errors import CheckpointError
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

BIAS = "bias"
DTYPES = {QWEIGHT: torch.uint8, ROW_SCALE: torch.bfloat16, SIGNS_IN: torch.uint8}
QKV_SLOTS = ("q", "k", "v")
PackedLayer: TypeAlias = LinearBase | VocabParallelEmbedding
ShardId = str | int | tuple[int, ...] | None


@dataclass
class LayerLoad:
    """What the weight loader of one layer knows, and what it has loaded.

    A slot is one output partition: three for a fused q/k/v layer, one for a plain layer.

    Attributes:
        name: vLLM's name of the layer.
        widths: length of the last dimension on disk, of the tensors that depend on K.
        slots: number of slots.
        row_multiple: rows of `qweight` on disk are rounded up to a multiple of it.
        load: vLLM's loader of sharded parameters.
        load_bias: vLLM's loader of the layer's bias.
        filled: slots loaded so far, by tensor.
    """

    name: str
    widths: dict[str, int]
    slots: int
    row_multiple: int
    load: Callable[..., None]
    load_bias: Callable[..., None]
    filled: dict[str, set[int]] = field(default_factory=dict)

    def attach(self, layer: PackedLayer) -> Callable[..., None]:
        """Make this the state of `layer`.

        Returns:
            The weight loader for the layer's parameters, bound to the layer: vLLM recognises that
            form when it takes references to a layer out of its parameters for a reload.
        """
        layer.pcdvq_load = self
        loader = MethodType(load_tensor, layer)
        # The layer class creates its bias later and gives it this attribute as the loader.
        layer.weight_loader = loader
        return loader

    def slots_of(self, shard_id: ShardId) -> list[int]:
        """Slots that a tensor with vLLM's `shard_id` fills; None: fused on disk, all of them."""
        if shard_id is None:
            return list(range(self.slots))
        if isinstance(shard_id, str):
            if shard_id not in QKV_SLOTS:
                raise CheckpointError(f"layer {self.name}: cannot load a part named {shard_id!r}")
            return [QKV_SLOTS.index(shard_id)]
        return [shard_id] if isinstance(shard_id, int) else list(shard_id)

    def check_complete(self, has_bias: bool) -> None:
        """Check that every slot of every tensor was loaded, and forget about it.

        Nothing loaded at all is not an error here: `--load-format dummy` fills parameters itself.
        """
        filled, self.filled = self.filled, {}
        for tensor in (*PACKED_TENSORS, *([BIAS] if has_bias else [])) if filled else ():
            missing = set(range(self.slots)) - filled.get(tensor, set())
            if missing:
                part = "" if self.slots == 1 else f" (part {min(missing)} of {self.slots})"
                raise CheckpointError(
                    f"tensor {self.name}.{tensor}{part} is missing from the checkpoint. {REMEDY}"
                )


def load_tensor(
    layer: PackedLayer, param: Parameter, loaded_weight: Tensor, loaded_shard_id: ShardId = None
) -> None:
    """Load one tensor of the checkpoint into a parameter of a quantized layer.

    Args:
        layer: the layer, prepared by `LayerLoad.attach`.
        param: its qweight, row_scale, signs_in or bias.
        loaded_weight: the whole tensor on disk, not yet sharded.
        loaded_shard_id: the part of a fused layer that it belongs to, None if all of it.

    Raises:
        CheckpointError: the tensor's dtype or shape is not the format's.
    """
    state: LayerLoad = layer.pcdvq_load
    tensor = getattr(param, "pcdvq_tensor", BIAS)
    slots = state.slots_of(loaded_shard_id)
    _check(layer, tensor, slots, loaded_weight)
    if tensor == SIGNS_IN:
        columns = param.shape[1]
        first = layer.tp_rank * columns if columns < loaded_weight.shape[0] else 0
        shard = loaded_weight.narrow(0, first, columns)
        param.data[slots] = shard
    elif tensor != BIAS and isinstance(layer, VocabParallelEmbedding):
        _load_vectors(layer, param, loaded_weight, state.row_multiple)
    else:
        load = state.load_bias if tensor == BIAS else state.load
        shard_args = () if loaded_shard_id is None else (loaded_shard_id,)
        load(param, loaded_weight, *shard_args)
    state.filled.setdefault(tensor, set()).update(slots)


def _load_vectors(
    layer: VocabParallelEmbedding, param: Parameter, loaded: Tensor, multiple: int
) -> None:
    """Load a rank's rows of qweight or row_scale [N, ...], which vLLM's loader would cut in chains.

    They start where the chain of the first one does. Those of qweight end where that of the last
    one does, as `loaded` does; what is beyond has no scale.
    """
    shard = layer.shard_indices
    first = shard.padded_org_vocab_start_index // multiple * multiple
    last = shard.padded_org_vocab_end_index
    if param.dim() > 1:
        last = -(-last // multiple) * multiple
    rows = loaded[first:last]
    param.data[: len(rows)] = rows
    param.data[len(rows) :] = 0


def _check(layer: PackedLayer, tensor: str, slots: list[int], loaded: Tensor) -> None:
    """Compare a tensor on disk with the format; vLLM would cut or convert what does not fit."""
    state: LayerLoad = layer.pcdvq_load
    name = f"{state.name}.{tensor}"
    dtype = DTYPES.get(tensor)
    if loaded.dtype != dtype if dtype else not loaded.is_floating_point():
        raise CheckpointError(
            f"tensor {name} is {loaded.dtype}, the format asks for {dtype or 'a float'}"
        )
    rows = _rows_on_disk(layer, slots)
    if rows is not None and tensor == QWEIGHT:
        rows = -(-rows // state.row_multiple) * state.row_multiple
    expected = [loaded.shape[0] if rows is None and loaded.dim() else rows]
    if tensor == SIGNS_IN:
        expected = []
    if tensor in state.widths:
        expected.append(state.widths[tensor])
    if list(loaded.shape) != expected:
        raise CheckpointError(
            f"tensor {name} is {list(loaded.shape)}, expected {expected}. {REMEDY}"
        )


def _rows_on_disk(layer: PackedLayer, slots: list[int]) -> int | None:
    """Rows that the slots have on disk; None for layer classes with sharding rules of their own."""
    if type(layer) is QKVParallelLinear:
        heads = [layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads]
        sizes = [layer.head_size, layer.head_size, layer.v_head_size]
        return sum(heads[slot] * sizes[slot] for slot in slots)
    if type(layer) is MergedColumnParallelLinear:
        return sum(layer.output_sizes[slot] for slot in slots)
    if type(layer) in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear):
        return layer.output_size
    if isinstance(layer, VocabParallelEmbedding):
        return layer.org_vocab_size
    return None
