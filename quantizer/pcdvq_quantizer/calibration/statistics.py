"""Second moments of a linear's inputs, in the original and in the quantized model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pcdvq_kernels.hadamard import block_hadamard
from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs of one stage.

    Attributes:
        hessian: fp64 [K, K], mean of x x^T; x is the quantized model's input.
        cross: fp64 [K, K], mean of x_original x^T.
        tokens: how many inputs.
    """

    hessian: Tensor
    cross: Tensor
    tokens: int

    @classmethod
    def gather(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> InputStatistics:
        """Accumulate (x_original, x), each fp32 [T, K]."""
        hessian = cross = None
        tokens = 0
        for original, x in pairs:
            if hessian is None or cross is None:
                size = x.shape[1]
                hessian = torch.zeros(size, size, dtype=torch.float64, device=x.device)
                cross = torch.zeros_like(hessian)
            hessian += x.T @ x
            cross += original.T @ x
            tokens += len(x)
        assert hessian is not None and cross is not None
        return cls(hessian / tokens, cross / tokens, tokens)

    def rotated(self, signs: Tensor, block: int) -> InputStatistics:
        """Moments of H S x (FORMAT.md); signs fp32 [K]."""

        def rotate(moment: Tensor) -> Tensor:
            half = block_hadamard(moment * signs.double(), block)
            return block_hadamard(half.T * signs.double(), block).T.contiguous()

        return InputStatistics(rotate(self.hessian), rotate(self.cross), self.tokens)
