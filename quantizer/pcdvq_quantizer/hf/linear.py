"""The modules that take the place of `torch.nn.Linear`."""

from __future__ import annotations

import torch
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.ops import Layout
from torch import Tensor, nn

from pcdvq_quantizer.hf.packed import PackedWeight


class PCDVQLinear(PackedWeight):
    """y = W' x + b; `bias` is a parameter [N], or None."""

    def __init__(self, in_features: int, out_features: int, bias: bool, layout: Layout) -> None:
        """Make an empty layer on torch's default device.

        Args:
            in_features: K.
            out_features: N.
            bias: whether it has one.
            layout: of its codes and activations.
        """
        super().__init__(out_features, in_features, layout)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def weight(self) -> Tensor:
        """Empty [0, K]: Mamba-2 looks up its device, and initializes it before weights load."""
        return self.row_scale.new_empty(0, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] in x's dtype, from x [..., K] (bf16, fp16 or fp32)."""
        return self.linear(x, self.bias)

    def dequantize(self, codebook: Codebook, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its dense weight, in `dtype`; `codebook` on the layer's device."""
        return dense_linear(self.dense_weight(codebook, dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.layout.spec.bits:g}"
        )


class PCDVQTiedHead(nn.Module):
    """An output head y = W' x + b whose W' is that of the embedding.

    It has no tensors but its bias, a parameter [N] or None: so the two stay tied on every device.
    """

    def __init__(self, embedding: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, or it would become a submodule
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] in x's dtype, from x [..., K] (bf16, fp16 or fp32)."""
        return self._embedding[0].linear(x, self.bias)


def dense_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """The layer of `weight` [N, K] itself and `bias` [N], which takes the weight's dtype."""
    with torch.device("meta"):
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    dense.weight = weight
    if bias is not None:
        dense.bias = nn.Parameter(bias.data.to(weight.dtype), requires_grad=False)
    return dense
