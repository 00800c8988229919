"""Linear layers whose weights are PCDVQ codes."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from pcdvq_kernels import reference
from pcdvq_kernels.checkpoint import (
    PACKED_TENSORS,
    QWEIGHT,
    REMEDY,
    ROW_SCALE,
    SIGNS_IN,
    is_finite,
)
from pcdvq_kernels.cpu_packing import unpack
from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.ops import Layout, kernels_for, prepack_weight
from pcdvq_kernels.serving import check_rows, check_split
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    PackedvLLMParameter,
)

from vllm_pcdvq.loading import DTYPES, LayerLoad, PackedLayer
from vllm_pcdvq.row_order import check_mixer, in_order, output_order, set_order

if TYPE_CHECKING:
    from vllm_pcdvq.config import PCDVQConfig


@register_weight_loader_v2_supported_method
class PCDVQLinearMethod(LinearMethodBase):
    """y = W' x + b of one linear layer (or several fused ones), W' as codes (FORMAT.md).

    N and K are the layer's output and input size on this tensor-parallel rank.

    While weights load, the layer has the parameters
        qweight    uint8 [stored_rows(N), row_bytes(K)]
        row_scale  bfloat16 [N]
        signs_in   uint8 [slots, K / 8], one row per part of a fused layer
    and afterwards
        qweight    unchanged, or as the device reads it fastest (`prepack_weight`)
        row_scale  float32 [N]
        signs_in   uint8 [K / 8]
        codewords  int8, shared by all layers; see `pcdvq_kernels.ops`

    The buffer `output_order` is int64 [N] where vLLM's model has the rows in another order.
    """

    kind = "linear layers"  # for the log

    def __init__(self, config: PCDVQConfig, prefix: str, codebook: str) -> None:
        self.config = config
        self.prefix = prefix
        self.codebook = codebook
        self.spec = config.spec(codebook)

    def create_weights(
        self,
        layer: PackedLayer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the parameters of the class docstring to `layer`.

        Raises:
            CheckpointError: no Hadamard block for this input size.
            PCDVQError: a tensor-parallel split that the checkpoint does not allow, or an option
                that does not exist.
        """
        self.block = self.config.checkpoint.block(input_size)
        check_split(self.prefix, self.spec, self.block, input_size, input_size_per_partition)
        check_rows(self.prefix, self.spec, output_partition_sizes, output_size)
        check_mixer(layer, self.prefix)
        self.params_dtype = params_dtype
        rows, slots = sum(output_partition_sizes), len(output_partition_sizes)
        vllm_config = get_current_vllm_config_or_none()
        activations = self.config.activations(vllm_config)
        self.layout = Layout(self.block, self.spec, activations)
        self.layout_ints = self.layout.to_ints()
        self.order = output_order(layer, self.prefix, vllm_config)
        model = vllm_config and vllm_config.model_config
        self.config.add_layer(self.kind, self.codebook, rows * input_size_per_partition, model)

        loader = LayerLoad(
            self.prefix,
            {QWEIGHT: self.spec.row_bytes(input_size), SIGNS_IN: input_size // 8},
            slots,
            self.spec.row_multiple,
            load=extra_weight_attrs["weight_loader"],
            load_bias=layer.weight_loader,
        ).attach(layer)
        shapes = {
            QWEIGHT: (self.spec.stored_rows(rows), self.spec.row_bytes(input_size_per_partition)),
            ROW_SCALE: (rows,),
            SIGNS_IN: (slots, input_size_per_partition // 8),
        }
        data = {name: torch.empty(shapes[name], dtype=DTYPES[name]) for name in PACKED_TENSORS}
        # A scale that nobody writes must not look like one: `_finish` finds the NaN.
        data[ROW_SCALE].fill_(torch.nan)
        params = {
            QWEIGHT: PackedvLLMParameter(
                data=data[QWEIGHT],
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=Fraction(8 * self.spec.vector_dim, self.spec.code_bits),
                weight_loader=loader,
            ),
            ROW_SCALE: ChannelQuantScaleParameter(
                data=data[ROW_SCALE], output_dim=0, weight_loader=loader
            ),
            SIGNS_IN: BasevLLMParameter(data=data[SIGNS_IN], weight_loader=loader),
        }
        for name, param in params.items():
            param.pcdvq_tensor = name
            layer.register_parameter(name, param)

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        """Check what was loaded and bring it into the form that the op takes.

        Raises:
            CheckpointError: a tensor is missing, a scale or a bias is not finite, or fused layers
                differ in their input signs.
        """
        started = time.monotonic()
        codebooks = self.config.loaded_codebooks()
        row_scale, signs_in = self._finish(layer)
        device = layer.qweight.device
        levels = codebooks.codebook(self.codebook, device).codewords()
        qweight = self.prepack(layer.qweight.data, levels, 8 * signs_in.shape[0])
        for name, data in ((QWEIGHT, qweight), (ROW_SCALE, row_scale), (SIGNS_IN, signs_in)):
            layer.register_parameter(name, Parameter(data.data, requires_grad=False))
        codewords = codebooks.codewords(self.codebook, device)
        layer.register_buffer("codewords", codewords, persistent=False)
        set_order(layer, self.order, device)
        self.config.startup.add_ready(layer, time.monotonic() - started, kernels_for(device))

    def prepack(self, qweight: Tensor, codewords: Tensor, in_features: int) -> Tensor:
        return prepack_weight(qweight, codewords, self.layout, in_features)

    def _finish(self, layer: PackedLayer) -> tuple[Tensor, Tensor]:
        """Check the loaded parameters: float32 row_scale [N] and uint8 signs_in [K / 8]."""
        dummy = not layer.pcdvq_load.filled
        layer.pcdvq_load.check_complete(getattr(layer, "bias", None) is not None)
        row_scale = layer.row_scale.data.float()
        if not is_finite(row_scale):
            state = "missing or not finite" if dummy else "not finite"
            raise CheckpointError(f"tensor {self.prefix}.{ROW_SCALE} is {state}. {REMEDY}")
        bias = getattr(layer, "bias", None)
        if bias is not None and not is_finite(bias):
            raise CheckpointError(f"tensor {self.prefix}.bias is not finite. {REMEDY}")
        signs_in = layer.signs_in.data
        if signs_in.dim() == 1:
            return row_scale, signs_in
        if not dummy and (signs_in != signs_in[0]).any():
            raise CheckpointError(
                f"tensor {self.prefix}.{SIGNS_IN} differs between the {len(signs_in)} layers that "
                f"are served as one; they read the same input and must share it. {REMEDY}"
            )
        return row_scale, signs_in[0].clone()

    def apply(self, layer: PackedLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] in x's dtype, from x [..., K]."""
        y = torch.ops.pcdvq.linear(
            x,
            layer.qweight,
            layer.row_scale,
            layer.signs_in,
            layer.codewords,
            bias,
            self.layout_ints,
        )
        return in_order(layer, y, -1)

    def dequantize_weight(self, layer: PackedLayer) -> Tensor:
        """The dense weight [N, K] in the model's dtype; vLLM requantizes from it online."""
        row_scale, signs_in = self._finish(layer)
        codebooks = self.config.loaded_codebooks()
        codebook = codebooks.codebook(self.codebook, layer.qweight.device)
        qweight = layer.qweight.data
        if qweight.dim() == 3:
            qweight = unpack(qweight, self.layout_ints, len(row_scale), 8 * len(signs_in))
        dense = reference.dequantize(qweight, row_scale, signs_in, codebook, self.block)
        return in_order(layer, dense.to(self.params_dtype), 0)


@register_weight_loader_v2_supported_method
class CheckedUnquantizedLinearMethod(UnquantizedLinearMethod):
    """vLLM's method for a layer left as it was, where a missing weight is an error.

    vLLM checks that a checkpoint has every weight only if no quantization is configured.
    """

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check the weight, then do what vLLM does.

        Raises:
            CheckpointError: the checkpoint has no such weight, or one beyond the layer's dtype.
        """
        if not is_finite(layer.weight):
            raise CheckpointError(
                f"tensor {layer.prefix}.weight is missing from the checkpoint, or not finite as "
                f"{layer.weight.dtype}. {REMEDY}"
            )
        super().process_weights_after_loading(layer)
