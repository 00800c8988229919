"""The module that takes the place of `torch.nn.Linear`."""

from __future__ import annotations

import torch
from pcdvq_kernels import reference
from pcdvq_kernels.checkpoint import QWEIGHT, ROW_SCALE, SIGNS_IN
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.ops import Layout
from torch import Tensor, nn

# Bounds the scratch of `dequantize`: unpacking holds a few int64 per code.
CHUNK_WEIGHTS = 1 << 22


class PCDVQLinear(nn.Module):
    """y = W' x + b, with W' [N, K] as codes (FORMAT.md).

    Buffers:
        qweight    uint8 [N, row_bytes(K)]
        row_scale  fp32 [N], as the operator takes it; bf16 on disk
        signs_in   uint8 [K / 8]
        codewords  int8 [2 ** magnitude_bits * rows, vector_dim], from `set_codebook`
    `bias` is a parameter [N], or None.
    """

    qweight: Tensor
    row_scale: Tensor
    signs_in: Tensor
    codewords: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, layout: Layout) -> None:
        """Make an empty layer on torch's default device.

        Args:
            in_features: K.
            out_features: N.
            bias: whether it has one.
            layout: of its codes and activations.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout
        self._layout_ints = layout.to_ints()
        qweight = torch.empty(out_features, layout.spec.row_bytes(in_features), dtype=torch.uint8)
        self.register_buffer(QWEIGHT, qweight)
        self.register_buffer(ROW_SCALE, torch.empty(out_features, dtype=torch.float32))
        self.register_buffer(SIGNS_IN, torch.empty(in_features // 8, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def set_codebook(self, codewords: Tensor) -> None:
        """Give the layer `Codebook.codewords()`, on the layer's device; layers may share them."""
        self.register_buffer("codewords", codewords, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] in x's dtype, from x [..., K] (bf16, fp16 or fp32)."""
        return torch.ops.pcdvq.linear(
            x,
            self.qweight,
            self.row_scale.float(),  # a copy only after `model.to(dtype)`
            self.signs_in,
            self.codewords,
            self.bias,
            self._layout_ints,
        )

    def dequantize(self, codebook: Codebook, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its dense weight, in `dtype`; `codebook` on the layer's device."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        weight = torch.empty(
            self.out_features, self.in_features, dtype=dtype, device=self.qweight.device
        )
        segment = self.layout.spec.row_multiple  # the trellis starts anew at such rows
        rows = max(1, CHUNK_WEIGHTS // (self.in_features * segment)) * segment
        block = self.layout.hadamard_block
        for first in range(0, self.out_features, rows):
            chunk = slice(first, first + rows)
            packed = self.qweight[chunk], self.row_scale[chunk], self.signs_in
            weight[chunk] = reference.dequantize(*packed, codebook, block)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.data.to(dtype), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.layout.spec.bits:g}"
        )
