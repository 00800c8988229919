"""The module that takes the place of `torch.nn.Embedding`."""

from __future__ import annotations

import torch
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.ops import Layout
from torch import Tensor, nn

from pcdvq_quantizer.hf.packed import PackedWeight


class PCDVQEmbedding(PackedWeight):
    """Row n of W' for token n, times the scale of the original module if it has one.

    The empty buffer `weight` holds the dtype of the output: it follows `model.to(dtype)`, and
    models ask their embedding's weight for dtype and device.
    """

    weight: Tensor

    def __init__(self, original: nn.Embedding, layout: Layout) -> None:
        """Make an empty layer on torch's default device.

        Args:
            original: what it replaces, a plain `nn.Embedding` or a scaled one; its weight is not
                needed.
            layout: of its codes.

        Raises:
            CheckpointError: `original` does something else to its vectors.
        """
        super().__init__(original.num_embeddings, original.embedding_dim, layout)
        self._original = (original,)  # in a tuple, or it would become a submodule
        self._scale = _find_scale(original)
        empty = torch.empty(0, dtype=original.weight.dtype)
        self.register_buffer("weight", empty, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors [..., K] of `input_ids` (int32 or int64 [...]), in the model's dtype."""
        vectors = self.rows(input_ids, self.weight.dtype)
        if isinstance(self._scale, Tensor):
            return vectors * self._scale.to(vectors.dtype)
        return vectors if self._scale is None else vectors * self._scale

    def dequantize(self, codebook: Codebook, dtype: torch.dtype) -> nn.Embedding:
        """The original module with its dense weight, in `dtype`; `codebook` on this device."""
        (dense,) = self._original
        dense.weight = self.dense_weight(codebook, dtype)
        if isinstance(self._scale, Tensor):  # a buffer, which loading has left empty
            dense.embed_scale = self._scale.to(dense.weight)
        return dense

    def extra_repr(self) -> str:
        bits = self.layout.spec.bits
        return f"{len(self.row_scale)}, {8 * len(self.signs_in)}, bits={bits:g}"


def _find_scale(module: nn.Embedding) -> float | Tensor | None:
    """What `module` multiplies its vectors by: a number, a tensor in their dtype, or None.

    The tensor is a buffer of Gemma's `...ScaledWordEmbedding`; while a model is being loaded it is
    on the meta device and only `scalar_embed_scale` tells its value.
    """
    if type(module).forward is nn.Embedding.forward:
        return None
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, float | int):
        return float(scale)
    value = getattr(module, "scalar_embed_scale", None)
    if scale is None or value is None:
        raise CheckpointError(
            f"this release loads no quantized {type(module).__name__} in transformers. Serve the "
            "checkpoint with vLLM, or quantize again with --embedding-bits 16."
        )
    return torch.tensor(value, dtype=torch.float32, device="cpu")
