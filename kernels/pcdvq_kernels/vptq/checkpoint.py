"""Reading and checking directories in VPTQ's published layout without loading their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pcdvq_kernels.checkpoint import (
    INDEX_FILE,
    LayerInfo,
    TensorInfo,
    open_tensors,
    read_headers,
    read_quantization_config,
)
from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.vptq.layout import QUANT_METHOD, REMEDY, TABLES, VPTQLayout
from pcdvq_kernels.vptq.reference import dequantize
from pcdvq_kernels.vptq.weight import check_values

SINGLE_FILE = "model.safetensors"
# Names of dtypes in safetensors headers.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
}


def disk_name(layer: str, key: str) -> str:
    """The name on disk of tensor `key` of `VPTQLayout.tensors()`."""
    return f"{layer}.{key}.weight" if key in TABLES else f"{layer}.{key}"


@dataclass(frozen=True)
class VPTQCheckpoint:
    """A checked checkpoint directory.

    Attributes:
        directory: where it is.
        layouts: of every quantized layer by name.
        tensors: every tensor of the model by name.
        layers: sizes of every quantized layer, its centroids, permutation and scales included.
        modules_to_not_convert: what the configuration says is left as it was.
    """

    directory: Path
    layouts: dict[str, VPTQLayout]
    tensors: dict[str, TensorInfo]
    layers: dict[str, LayerInfo]
    modules_to_not_convert: list[str]

    codebook_bytes: ClassVar[int] = 0  # every layer has tables of its own, counted with it
    embeddings: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[str] = "indices, centroids, permutations, column scales"

    @property
    def linears(self) -> dict[str, LayerInfo]:
        """The quantized layers, all of which are linear."""
        return self.layers

    @property
    def codebooks(self) -> list[str]:
        """Kinds of tables, such as `vptq v8-k65536-256`."""
        return sorted({layout.codec for layout in self.layouts.values()})

    @property
    def bits_per_weight(self) -> float:
        """All stored bits of the quantized layers over their weights."""
        stored = sum(layer.bytes for layer in self.layers.values())
        return 8 * stored / sum(layer.weights for layer in self.layers.values())

    @property
    def bits_per_weight_with_embeddings(self) -> float:
        """The same: embeddings are not quantized."""
        return self.bits_per_weight

    def dequantize(self, name: str) -> Tensor:
        """The dense weight of layer `name`, fp32 [N, K].

        Raises:
            CheckpointError: values that no decoder could take.
        """
        layout = self.layouts[name]
        tensors = {}
        for key in layout.tensors():
            disk = disk_name(name, key)
            with open_tensors(self.tensors[disk].file) as file:
                tensors[key] = file.get_tensor(disk)
        check_values(layout, tensors, name)
        return dequantize(layout, tensors)


def open_vptq_checkpoint(directory: Path) -> VPTQCheckpoint:
    """Open `directory` and check every header of it against its configuration.

    Raises:
        CheckpointError: anything that would not serve, naming the tensor or file; or layers are
            described by `shared_layer_config`, which does not say their sizes.
    """
    config = read_quantization_config(directory)
    entries = config.get("config_for_layers")
    if config.get("quant_method") != QUANT_METHOD or not isinstance(entries, dict) or not entries:
        raise CheckpointError(
            f"{directory}/config.json has no quantization_config of quant_method {QUANT_METHOD!r} "
            "with config_for_layers; choose another directory"
        )
    tensors = _headers(directory)
    layouts, layers = {}, {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"config_for_layers: the entry of {name} is no object. {REMEDY}")
        layouts[name] = VPTQLayout.parse(name, entry)
        layers[name] = _check_layer(name, layouts[name], tensors)
    left = config.get("modules_to_not_convert") or []
    return VPTQCheckpoint(directory, layouts, tensors, layers, list(map(str, left)))


def _headers(directory: Path) -> dict[str, TensorInfo]:
    if (directory / INDEX_FILE).exists():
        return read_headers(directory)
    path = directory / SINGLE_FILE
    with open_tensors(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: TensorInfo(path, view.get_dtype(), tuple(view.get_shape()))
            for name, view in views.items()
        }


def _check_layer(name: str, layout: VPTQLayout, tensors: Mapping[str, TensorInfo]) -> LayerInfo:
    size = 0
    for key, spec in layout.tensors().items():
        disk = disk_name(name, key)
        if disk not in tensors:
            raise CheckpointError(f"tensor {disk} is missing. {REMEDY}")
        found = tensors[disk]
        if found.shape != spec.shape or DTYPES.get(found.dtype) not in spec.dtypes:
            dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in spec.dtypes)
            raise CheckpointError(
                f"tensor {disk} is {found.dtype} {list(found.shape)}, expected {dtypes} "
                f"{list(spec.shape)}. {REMEDY}"
            )
        size += found.bytes
    return LayerInfo(layout.out_features, layout.in_features, layout.codec, size)


def dense_state(checkpoint: VPTQCheckpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the unquantized model by name, floating ones in `dtype`."""
    packed = {
        disk_name(name, key)
        for name, layout in checkpoint.layouts.items()
        for key in layout.tensors()
    }
    state = {f"{name}.weight": checkpoint.dequantize(name).to(dtype) for name in checkpoint.layouts}
    for name, info in checkpoint.tensors.items():
        if name not in packed:
            with open_tensors(info.file) as file:
                tensor: Any = file.get_tensor(name)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state
