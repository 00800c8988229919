"""Second moments of a linear's inputs, in the original and in the quantized model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pcdvq_kernels.hadamard import block_hadamard
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What the linears of a stage read for one sequence.

    Attributes:
        original: fp32 [T, K], in the original model.
        quantized: fp32 [T, K], in the model quantized so far.
        drift: fp32 [T, H], the residual stream that the stage adds to: original minus quantized.
            None where it adds to none.
    """

    original: Tensor
    quantized: Tensor
    drift: Tensor | None = None


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs of one stage, x in the quantized model.

    Attributes:
        hessian: fp64 [K, K], mean of x x^T.
        cross: fp64 [K, K], mean of (x_original - x) x^T.
        drift: fp64 [H, K], mean of (residual_original - residual) x^T, or None.
        tokens: how many inputs.
    """

    hessian: Tensor
    cross: Tensor
    drift: Tensor | None
    tokens: int

    @classmethod
    def gather(cls, inputs: Iterable[Inputs]) -> InputStatistics:
        """Accumulate the moments of `inputs` on the CPU, products in fp32, their sums in fp64."""
        hessian = cross = torch.zeros((), dtype=torch.float64)
        drift: Tensor | None = None
        tokens = 0
        for each in inputs:
            x = each.quantized
            hessian = hessian + (x.T @ x).cpu().double()
            cross = cross + ((each.original - x).T @ x).cpu().double()
            if each.drift is not None:
                moment = (each.drift.T @ x).cpu().double()
                drift = moment if drift is None else drift + moment
            tokens += len(x)
        drift = None if drift is None else drift / tokens
        return cls(hessian / tokens, cross / tokens, drift, tokens)

    def rotated(self, signs: Tensor, block: int) -> InputStatistics:
        """Moments of H S x (FORMAT.md) in place of x; signs fp32 [K]."""
        wide = signs.double()

        def columns(moment: Tensor) -> Tensor:
            return block_hadamard(moment * wide, block)

        def both(moment: Tensor) -> Tensor:
            return columns(columns(moment).T).T.contiguous()

        drift = None if self.drift is None else columns(self.drift)
        return InputStatistics(both(self.hessian), both(self.cross), drift, self.tokens)
