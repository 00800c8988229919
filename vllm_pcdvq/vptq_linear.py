"""Linear layers whose weights are VPTQ codes, from published checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import pcdvq_kernels.vptq.ops  # noqa: F401 registers the operator
import torch
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.ops import kernels_for
from pcdvq_kernels.vptq.layout import REMEDY, VPTQLayout
from pcdvq_kernels.vptq.weight import VPTQWeight, check_values, pack_tables, pack_weight
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.utils import set_weight_attrs

from vllm_pcdvq.config import activations_option
from vllm_pcdvq.loading import BIAS, LayerLoad, ShardId
from vllm_pcdvq.row_order import check_mixer, in_order, output_order, set_order

if TYPE_CHECKING:
    from vllm_pcdvq.vptq import VPTQConfig

# Column-parallel layers of which the rows of a rank are known.
SPLIT_CLASSES = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)


class VPTQPart(Module):
    """Some rows and columns of a layer, served."""

    def __init__(self, weight: VPTQWeight) -> None:
        super().__init__()
        self.layout = weight.layout
        self.segments = range(len(weight.codes))
        tensors = {"columns": weight.columns, "scale": weight.scale, "shift": weight.shift}
        for index in self.segments:
            tensors[f"codes_{index}"] = weight.codes[index]
            tensors[f"table_{index}"] = weight.tables[index]
        for name, tensor in tensors.items():
            self.register_parameter(name, Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., rows] in x's dtype, from x [..., K]."""
        codes = [getattr(self, f"codes_{index}") for index in self.segments]
        tables = [getattr(self, f"table_{index}") for index in self.segments]
        return torch.ops.pcdvq.vptq_linear(
            x, self.columns, self.scale, self.shift, codes, tables, bias, self.layout
        )


@dataclass
class Source:
    """A layer on disk, whole or a part of the one that vLLM serves.

    Attributes:
        name: its name.
        layout: its layout.
        slots: output partitions of vLLM's layer that it has.
        rows: of each slot, those that this rank serves.
        columns: that this rank serves.
        rounds: whether tables are rounded where that is of use on the device (`Tables.rounded`).
        tensors: loaded and not yet packed.
        parts: what was made of them, one for each slot.
        packed: whether it was.
    """

    name: str
    layout: VPTQLayout
    slots: list[int]
    rows: list[range]
    columns: range
    rounds: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: list[VPTQWeight] = field(default_factory=list)
    packed: bool = False

    def add(self, key: str, tensor: Tensor, device: torch.device) -> None:
        """Take one tensor from disk; with the last of them, make the parts.

        Raises:
            CheckpointError: it is not what the layout says.
        """
        if self.packed:
            raise PCDVQError(
                f"layer {self.name} is loaded already, and VPTQ weights are not reloaded in place. "
                "Start a server for the other checkpoint."
            )
        self.layout.check_tensor(self.name, key, tensor)
        # A copy: loaders may use the memory again.
        self.tensors[key] = tensor.cpu().clone()
        if self.tensors.keys() == self.layout.tensors().keys():
            self.pack(device)

    def pack(self, device: torch.device) -> None:
        """Make the parts from all tensors, and let go of those.

        Raises:
            CheckpointError: a tensor is missing or has values that cannot be.
        """
        tensors, self.tensors = self.tensors, {}
        check_values(self.layout, tensors, self.name)
        tables = pack_tables(self.layout, tensors, device)
        if self.rounds and device.type == "cpu":
            tables = tables.rounded()
        self.parts = [
            pack_weight(self.layout, tensors, tables, rows, self.columns) for rows in self.rows
        ]
        self.packed = True

    def pack_dummy(self, device: torch.device) -> None:
        """Make parts without a checkpoint, for `--load-format dummy`."""
        for key, spec in self.layout.tensors().items():
            self.tensors[key] = torch.zeros(spec.shape, dtype=spec.dtypes[0])
            if key == "perm":
                self.tensors[key] = torch.arange(self.layout.in_features)
        self.pack(device)


class VPTQLinearMethod(LinearMethodBase):
    """y = W x + b of one linear layer (or several fused ones), W as VPTQ codes.

    While weights load, the layer has an empty parameter for each tensor on disk, whose loader packs
    a layer's tensors as soon as it has all; afterwards `layer.parts`, a `VPTQPart` for each output
    partition. Layers that are fused keep tables and permutation of their own.
    """

    def __init__(self, config: VPTQConfig, prefix: str, entries: dict[str, dict[str, Any]]) -> None:
        self.config = config
        self.prefix = prefix
        self.entries = entries

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the parameters of the class docstring to `layer`.

        Raises:
            CheckpointError: the layers on disk are not those that vLLM serves as this one, or a
                layout that is not served.
            PCDVQError: a layer that cannot be split among tensor-parallel ranks.
        """
        check_mixer(layer, self.prefix)
        self.order = output_order(layer, self.prefix, get_current_vllm_config_or_none())
        first = layer.tp_rank * input_size_per_partition
        columns = range(
            *(
                (first, first + input_size_per_partition)
                if input_size_per_partition < input_size
                else (0, input_size)
            )
        )
        slots = rows_of_rank(layer, self.prefix, output_partition_sizes)
        layer.vptq_sources = self._sources(slots, columns, input_size)
        loaders = layer.weight_loader, layer.weight_loader
        load = LayerLoad(self.prefix, {}, len(slots), 1, *loaders)
        load.attach(layer)
        loader = MethodType(load_tensor, layer)
        for source in layer.vptq_sources:
            self.config.startup.add_layer(
                "linear layers", source.layout, sum(map(len, source.rows)) * len(columns)
            )
            for key, spec in source.layout.tensors().items():
                dtype = params_dtype if params_dtype in spec.dtypes else spec.dtypes[0]
                param = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                set_weight_attrs(param, {"vptq_tensor": key, "weight_loader": loader})
                layer.register_parameter(key, param)

    def _sources(
        self, slots: list[tuple[int, range]], columns: range, input_size: int
    ) -> list[Source]:
        """The layers on disk; `slots` are `rows_of_rank`."""
        fused = len(self.entries) == 1
        if not fused and len(self.entries) != len(slots):
            raise CheckpointError(
                f"layer {self.prefix} has {len(slots)} output partitions, the checkpoint "
                f"{len(self.entries)} layers for them ({', '.join(self.entries)}): which is which "
                "cannot be told for this architecture. Choose another model."
            )
        rounds = activations_option(get_current_vllm_config_or_none()) in (None, "int8")
        groups = [list(range(len(slots)))] if fused else [[slot] for slot in range(len(slots))]
        sources = []
        for (name, entry), group in zip(self.entries.items(), groups, strict=True):
            total, rows = 0, []
            for slot in group:
                disk, served = slots[slot]
                rows.append(range(total + served.start, total + served.stop))
                total += disk
            layout = VPTQLayout.parse(name, entry, in_features=input_size, out_features=total)
            sources.append(Source(name, layout, group, rows, columns, rounds))
        return sources

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that all was loaded, and put the parts in place of the empty parameters.

        Raises:
            CheckpointError: a tensor is missing.
        """
        started = time.monotonic()
        sources: list[Source] = layer.vptq_sources
        device = next(layer.parameters()).device
        dummy = not any(source.packed or source.tensors for source in sources)
        for source in sources:
            if dummy:
                source.pack_dummy(device)
            elif not source.packed:
                source.pack(device)  # says what is missing
        bias = getattr(layer, BIAS, None)
        if bias is not None and not dummy:
            self._check_bias(layer, bias)
        for key in {key for source in sources for key in source.layout.tensors()}:
            delattr(layer, key)
        layer.parts = ModuleList(VPTQPart(part) for source in sources for part in source.parts)
        for source in sources:
            source.parts = []
        set_order(layer, self.order, device)
        self.config.startup.add_ready(layer, time.monotonic() - started, kernels_for(device))

    def _check_bias(self, layer: LinearBase, bias: Tensor) -> None:
        load: LayerLoad = layer.pcdvq_load
        if len(load.filled.get(BIAS, ())) < load.slots or not bias.isfinite().all():
            raise CheckpointError(
                f"tensor {self.prefix}.{BIAS} is missing from the checkpoint or not finite. "
                f"{REMEDY}"
            )

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] in x's dtype, from x [..., K]."""
        sizes = [part.layout[0] for part in layer.parts]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        outputs = [part(x, b) for part, b in zip(layer.parts, biases, strict=True)]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return in_order(layer, y, -1)


def load_tensor(
    layer: LinearBase, param: Any, loaded_weight: Tensor, loaded_shard_id: ShardId = None
) -> None:
    """Load one tensor of the checkpoint into a VPTQ layer.

    Args:
        layer: the layer.
        param: the empty parameter of that name.
        loaded_weight: the whole tensor on disk.
        loaded_shard_id: the part of a fused layer that it belongs to, None if all of it.

    Raises:
        CheckpointError: not what the layer's layout says.
    """
    load: LayerLoad = layer.pcdvq_load
    slots = load.slots_of(loaded_shard_id)
    key = param.vptq_tensor
    source = next((each for each in layer.vptq_sources if each.slots == slots), None)
    if source is None:
        raise CheckpointError(
            f"tensor {load.name}.{key} is of parts {slots}, the quantization_config "
            f"has {', '.join(each.name for each in layer.vptq_sources)}. {REMEDY}"
        )
    source.add(key, loaded_weight, param.device)


def rows_of_rank(
    layer: LinearBase, name: str, partition_sizes: list[int]
) -> list[tuple[int, range]]:
    """For each output partition its rows on disk, and those among them of this rank.

    Raises:
        PCDVQError: a class of layers with rules of its own, split.
    """
    size = layer.tp_size if isinstance(layer, ColumnParallelLinear) else 1
    if size > 1 and type(layer) not in SPLIT_CLASSES:
        raise PCDVQError(
            f"layer {name} is a {type(layer).__name__}: which rows a rank of "
            f"--tensor-parallel-size {size} serves cannot be told. Serve with "
            "--tensor-parallel-size 1."
        )
    found = []
    for slot, rows in enumerate(partition_sizes):
        copies = layer.num_kv_head_replicas if type(layer) is QKVParallelLinear and slot else 1
        first = layer.tp_rank // copies * rows if size > 1 else 0
        found.append((rows * (size // copies), range(first, first + rows)))
    return found
