"""The weight that stays packed, whatever the module does with it."""

from __future__ import annotations

import torch
from pcdvq_kernels import reference
from pcdvq_kernels.checkpoint import QWEIGHT, ROW_SCALE, SIGNS_IN
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.ops import Layout
from torch import Tensor, nn

# Bounds the scratch of `dense_weight`: unpacking holds a few int64 per code.
CHUNK_WEIGHTS = 1 << 22


class PackedWeight(nn.Module):
    """W' [N, K] as codes (FORMAT.md).

    Buffers:
        qweight    uint8 [stored_rows(N), row_bytes(K)]
        row_scale  fp32 [N], as the operators take it; bf16 on disk
        signs_in   uint8 [K / 8]
        codewords  int8, see `Codebook.codewords`, from `set_codebook`
    """

    qweight: Tensor
    row_scale: Tensor
    signs_in: Tensor
    codewords: Tensor

    def __init__(self, rows: int, columns: int, layout: Layout) -> None:
        """Make an empty weight on torch's default device.

        Args:
            rows: N.
            columns: K.
            layout: of its codes and activations.
        """
        super().__init__()
        self.layout = layout
        self._layout_ints = layout.to_ints()
        spec = layout.spec
        qweight = torch.empty(spec.stored_rows(rows), spec.row_bytes(columns), dtype=torch.uint8)
        self.register_buffer(QWEIGHT, qweight)
        self.register_buffer(ROW_SCALE, torch.empty(rows, dtype=torch.float32))
        self.register_buffer(SIGNS_IN, torch.empty(columns // 8, dtype=torch.uint8))

    def set_codebook(self, codewords: Tensor) -> None:
        """Give the weight `Codebook.codewords()`, on its device; weights may share them."""
        self.register_buffer("codewords", codewords, persistent=False)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W' x + b, [..., N] in x's dtype, from x [..., K] (bf16, fp16 or fp32)."""
        return torch.ops.pcdvq.linear(
            x,
            self.qweight,
            self.row_scale.float(),  # a copy only after `model.to(dtype)`
            self.signs_in,
            self.codewords,
            bias,
            self._layout_ints,
        )

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` (int32 or int64 [...]) of W', [..., K] in `dtype`."""
        return torch.ops.pcdvq.embedding(
            ids,
            self.qweight,
            self.row_scale.float(),
            self.signs_in,
            self.codewords,
            self._layout_ints,
            dtype,
        )

    def dense_weight(self, codebook: Codebook, dtype: torch.dtype) -> nn.Parameter:
        """W' in `dtype`; `codebook` on the weight's device."""
        rows, columns = len(self.row_scale), 8 * len(self.signs_in)
        weight = torch.empty(rows, columns, dtype=dtype, device=self.qweight.device)
        segment = self.layout.spec.row_multiple  # chains start anew at such rows
        step = max(1, CHUNK_WEIGHTS // (columns * segment)) * segment
        for first in range(0, rows, step):
            chunk = slice(first, first + step)
            packed = self.qweight[chunk], self.row_scale[chunk], self.signs_in
            weight[chunk] = reference.dequantize(*packed, codebook, self.layout.hadamard_block)
        return nn.Parameter(weight, requires_grad=False)
