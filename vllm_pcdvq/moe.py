"""Mixtures of experts whose weights are PCDVQ codes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from pcdvq_kernels.checkpoint import PACKED_TENSORS, QWEIGHT, REMEDY, ROW_SCALE, SIGNS_IN
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.ops import Layout, kernels_for, prepack_experts
from pcdvq_kernels.serving import check_rows, check_split
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from vllm_pcdvq.loading import DTYPES

if TYPE_CHECKING:
    from vllm_pcdvq.config import PCDVQConfig

GATE, UP, DOWN = SHARDS = "w1", "w3", "w2"  # vLLM's names for an expert's layers, in any model


def moe_method(config: PCDVQConfig, layer: RoutedExperts, prefix: str) -> PCDVQMoEMethod | None:
    """The method of the experts `prefix`, None to leave them to vLLM.

    Raises:
        CheckpointError: not all experts have the same codebook, or something else inside of the
            layer is quantized.
    """
    names = [
        f"{prefix}.{expert}.{name}"
        for expert in range(layer.moe_config.num_logical_experts)
        for name in _disk_names(layer).values()
    ]
    codebooks = {config.layers.get(name): name for name in names}
    if list(codebooks) == [None]:
        config.refuse_quantized(layer, prefix)
        return None
    if len(codebooks) > 1:
        listed = ", ".join(f"{name}: {id or 'none'}" for id, name in codebooks.items())
        raise CheckpointError(
            f"the experts {prefix} are served as one layer, all of it must have the same codebook "
            f"or none ({listed}). Quantize again with one rate for them."
        )
    (codebook,) = (id for id in codebooks if id is not None)
    return PCDVQMoEMethod(config, layer, prefix, codebook)


def _disk_names(layer: RoutedExperts) -> dict[str, str]:
    """The checkpoint's names of an expert's layers, by vLLM's."""
    up = layer.ckpt_up_proj_name or layer.ckpt_gate_proj_name
    return {GATE: layer.ckpt_gate_proj_name, UP: up, DOWN: layer.ckpt_down_proj_name}


@dataclass(frozen=True)
class Part:
    """A linear layer that every expert has: W13 (gate and up, stacked) or W2 (down).

    Attributes:
        name: of its parameters' prefix, "w13" or "w2".
        shards: vLLM's names of what is stacked.
        rows: of each of those on this rank; on disk `tp_size` times as many if `by_rows`.
        columns: on this rank; on disk `tp_size` times as many unless `by_rows`.
        by_rows: whether tensor parallelism splits rows, else columns.
    """

    name: str
    shards: tuple[str, ...]
    rows: int
    columns: int
    by_rows: bool


@dataclass
class ExpertsLoad:
    """What the weight loader of a layer of experts knows, and what it has loaded.

    Attributes:
        names: on disk, of an expert's layers, by vLLM's names.
        shapes: on disk, by vLLM's name and tensor.
        tp_rank, tp_size: of the split of each expert.
        split: dimension that is split, by vLLM's name and tensor, where one is.
        filled: vLLM's name, tensor and local expert of all that was loaded.
    """

    names: dict[str, str]
    shapes: dict[tuple[str, str], list[int]]
    tp_rank: int
    tp_size: int
    split: dict[tuple[str, str], int]
    filled: set[tuple[str, str, int]] = field(default_factory=set)

    def check_complete(self, layer: RoutedExperts) -> None:
        """Check that every tensor of every expert of this rank was loaded, and forget about it.

        Nothing loaded at all is not an error here: `--load-format dummy` fills parameters itself.
        """
        filled, self.filled = self.filled, set()
        for expert in range(layer.global_num_experts if filled else 0):
            local = layer._map_global_expert_id_to_local_expert_id(expert)
            for shard, tensor in self.shapes:
                if local >= 0 and (shard, tensor, local) not in filled:
                    name = f"{layer.layer_name}.{expert}.{self.names[shard]}.{tensor}"
                    raise CheckpointError(f"tensor {name} is missing from the checkpoint. {REMEDY}")


def load_expert(
    layer: RoutedExperts,
    param: Parameter,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Load a tensor of one expert into a parameter of `PCDVQMoEMethod`.

    Args:
        layer: the experts of a decoder layer.
        param: one of its parameters.
        loaded_weight: the whole tensor on disk, not yet sharded.
        weight_name: vLLM's name of `param`, with that of the layer before it.
        shard_id: one of `SHARDS`.
        expert_id: of all ranks' experts.
        return_success: vLLM asks for the result.

    Returns:
        Whether this rank has the expert.

    Raises:
        CheckpointError: the tensor's dtype or shape is not the format's.
    """
    state: ExpertsLoad = layer.pcdvq_load
    tensor = weight_name.rpartition(".")[2].partition("_")[2]
    name = f"{layer.layer_name}.{expert_id}.{state.names[shard_id]}.{tensor}"
    expected = state.shapes[shard_id, tensor]
    if loaded_weight.dtype != DTYPES[tensor]:
        raise CheckpointError(
            f"tensor {name} is {loaded_weight.dtype}, the format asks for {DTYPES[tensor]}"
        )
    if list(loaded_weight.shape) != expected:
        raise CheckpointError(
            f"tensor {name} is {list(loaded_weight.shape)}, expected {expected}. {REMEDY}"
        )
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if local < 0:
        return False
    dim = state.split.get((shard_id, tensor))
    if dim is not None:
        size = expected[dim] // state.tp_size
        loaded_weight = loaded_weight.narrow(dim, state.tp_rank * size, size)
    param.data[local, int(shard_id == UP)] = loaded_weight
    state.filled.add((shard_id, tensor, local))
    return True


class PCDVQMoEMethod(FusedMoEMethodBase):
    """y = sum of weight * down(silu(gate(x)) * up(x)) over a token's experts, all as codes.

    E is the number of experts on this rank, I their inner size there, H the model's hidden size.

    While weights load, the layer has the parameters
        w13_qweight    uint8 [E, 2, I, row_bytes(H)], gate and up
        w13_row_scale  bfloat16 [E, 2, I]
        w13_signs_in   uint8 [E, 2, H / 8]
        w2_qweight     uint8 [E, 1, H, row_bytes(I)], down
        w2_row_scale   bfloat16 [E, 1, H]
        w2_signs_in    uint8 [E, 1, I / 8]
    and afterwards those that `pcdvq_kernels.ops` describes.
    """

    kind = "layers of experts"  # for the log

    def __init__(
        self, config: PCDVQConfig, layer: RoutedExperts, prefix: str, codebook: str
    ) -> None:
        """Make the method of the experts `prefix`.

        Raises:
            PCDVQError: something that quantized experts are not served with.
        """
        super().__init__(layer.moe_config)
        self.config = config
        self.prefix = prefix
        self.codebook = codebook
        self.spec = config.spec(codebook)
        _check_served(layer, prefix)

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *args: Any
    ) -> tuple[int, int]:
        """The sizes as they are: codes cannot be padded."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: the operator quantizes activations itself."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the parameters of the class docstring to `layer`.

        Raises:
            CheckpointError: no Hadamard block for one of the sizes.
            PCDVQError: a tensor-parallel split that the checkpoint does not allow.
        """
        inner = intermediate_size_per_partition
        parallel = layer.moe_config.moe_parallel_config
        names = _disk_names(layer)
        all_inner = inner * parallel.tp_size
        blocks = [self.config.checkpoint.block(size) for size in (hidden_size, all_inner)]
        down, gate = (f"{self.prefix}.*.{names[shard]}" for shard in (DOWN, GATE))
        check_split(down, self.spec, blocks[1], all_inner, inner)
        check_rows(gate, self.spec, [inner, inner], 2 * all_inner)
        check_rows(down, self.spec, [hidden_size] * 2, 2 * hidden_size)  # experts are stacked
        vllm_config = get_current_vllm_config_or_none()
        activations = self.config.activations(vllm_config)
        self.layouts = [Layout(block, self.spec, activations) for block in blocks]
        self.layout_ints = [layout.to_ints() for layout in self.layouts]
        model = vllm_config and vllm_config.model_config
        self.config.add_layer(
            self.kind, self.codebook, num_experts * 3 * inner * hidden_size, model
        )
        self.parts = (
            Part("w13", (GATE, UP), inner, hidden_size, by_rows=True),
            Part("w2", (DOWN,), hidden_size, inner, by_rows=False),
        )
        state = ExpertsLoad(names, {}, parallel.tp_rank, parallel.tp_size, {})
        layer.pcdvq_load = state
        for part in self.parts:
            self._add_part(layer, part, num_experts, state)

    def _add_part(self, layer: RoutedExperts, part: Part, experts: int, state: ExpertsLoad) -> None:
        """Add the parameters of `part` to `layer`, and what they are on disk to `state`."""
        rows, columns = part.rows, part.columns
        here, size = self._shapes(rows, columns), state.tp_size
        whole = (rows * size, columns) if part.by_rows else (rows, columns * size)
        disk = self._shapes(*whole)
        split = {QWEIGHT: 0, ROW_SCALE: 0} if part.by_rows else {QWEIGHT: 1, SIGNS_IN: 0}
        for tensor in PACKED_TENSORS:
            shape = experts, len(part.shards), *here[tensor]
            data = torch.empty(shape, dtype=DTYPES[tensor])
            if tensor == ROW_SCALE:
                data.fill_(torch.nan)  # finds what nobody writes
            param = Parameter(data, requires_grad=False)
            # Bound to the layer: vLLM recognises that form when it takes references to a layer
            # out of its parameters for a reload.
            set_weight_attrs(param, {"weight_loader": MethodType(load_expert, layer)})
            layer.register_parameter(f"{part.name}_{tensor}", param)
            for shard in part.shards:
                state.shapes[shard, tensor] = disk[tensor]
                if tensor in split:
                    state.split[shard, tensor] = split[tensor]

    def _shapes(self, rows: int, columns: int) -> dict[str, list[int]]:
        """Shapes of the tensors of a layer."""
        row_bytes = self.spec.row_bytes(columns)
        return {QWEIGHT: [rows, row_bytes], ROW_SCALE: [rows], SIGNS_IN: [columns // 8]}

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check what was loaded and bring it into the form that the op takes.

        Raises:
            CheckpointError: a tensor is missing, a scale is not finite, or experts differ in their
                input signs.
        """
        started = time.monotonic()
        codebooks = self.config.loaded_codebooks()
        dummy = not layer.pcdvq_load.filled
        layer.pcdvq_load.check_complete(layer)
        device = layer.w13_qweight.device
        levels = codebooks.codebook(self.codebook, device).codewords()
        for part, layout in zip(self.parts, self.layouts, strict=True):
            self._finish(layer, part, layout, levels, dummy)
        codewords = codebooks.codewords(self.codebook, device)
        layer.register_buffer("codewords", codewords, persistent=False)
        self.config.startup.add_ready(layer, time.monotonic() - started, kernels_for(device))

    def _finish(
        self, layer: RoutedExperts, part: Part, layout: Layout, levels: Tensor, dummy: bool
    ) -> None:
        """Check one part and replace its parameters; `levels` are the codebook's codewords."""
        loaded = {tensor: getattr(layer, f"{part.name}_{tensor}") for tensor in PACKED_TENSORS}
        row_scale = loaded[ROW_SCALE].data.float().flatten(1, 2)
        if not row_scale.isfinite().all():
            state = "missing or not finite" if dummy else "not finite"
            raise CheckpointError(
                f"a tensor {self.prefix}.*.{ROW_SCALE} ({part.name}) is {state}. {REMEDY}"
            )
        signs_in = loaded[SIGNS_IN].data.flatten(0, 1)
        if not dummy and (signs_in != signs_in[0]).any():
            raise CheckpointError(
                f"the {SIGNS_IN} of the experts {self.prefix} ({part.name}) differ; experts of a "
                f"layer must share them. {REMEDY}"
            )
        qweight = loaded[QWEIGHT].data.flatten(1, 2)
        finished = {
            QWEIGHT: prepack_experts(qweight, levels, layout, part.columns),
            ROW_SCALE: row_scale,
            SIGNS_IN: signs_in[0].clone(),
        }
        for tensor, data in finished.items():
            layer.register_parameter(f"{part.name}_{tensor}", Parameter(data, requires_grad=False))

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """What the experts of this rank add to y, [T, H] in x's dtype, from x [T, H].

        Shared experts are layers of their own, which vLLM adds.
        """
        if layer.expert_map is not None:  # -1 for experts of other ranks
            topk_ids = layer.expert_map[topk_ids.long()]
        gate_up, down = (
            [getattr(layer, f"{part.name}_{tensor}") for tensor in PACKED_TENSORS]
            for part in self.parts
        )
        return torch.ops.pcdvq.moe(
            x, topk_weights, topk_ids, gate_up, down, layer.codewords, *self.layout_ints
        )


def _check_served(layer: RoutedExperts, prefix: str) -> None:
    """Raise PCDVQError if something of the layer is not what the operator computes."""
    moe = layer.moe_config
    plain = "leave the experts unquantized (--skip '*.experts.*')"
    problems = {
        f"activation {layer.activation.value}": (layer.activation.value != "silu", plain),
        "biases": (moe.has_bias, plain),
        "a limit of their activations": (layer.swiglu_limit is not None, plain),
        "weights of the router on their input": (layer.apply_router_weight_on_input, plain),
        "LoRA adapters": (moe.is_lora_enabled, "serve without --enable-lora"),
        "tokens sent between data-parallel ranks": (
            moe.moe_parallel_config.use_all2all_kernels,
            "serve without --data-parallel-size or without --enable-expert-parallel",
        ),
    }
    for what, (present, remedy) in problems.items():
        if present:
            raise PCDVQError(
                f"vllm-pcdvq does not serve quantized experts with {what} ({prefix}); {remedy}."
            )
