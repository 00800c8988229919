"""Second moments of a linear's inputs, in the original and in the quantized model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pcdvq_kernels.hadamard import block_hadamard
from torch import Tensor

FP32_SEQUENCES = 8


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
        """Accumulate the moments of `inputs`; they are on the CPU."""
        hessian, cross, drift = _Product(), _Product(), _Product()
        tokens = 0
        for each in inputs:
            x = each.quantized
            hessian.add(x, x)
            cross.add(each.original - x, x)
            if each.drift is not None:
                drift.add(each.drift, x)
            tokens += len(x)
        residual = drift.mean(tokens) if drift.parts else None
        return cls(hessian.mean(tokens), cross.mean(tokens), residual, tokens)

    def rotated(self, signs: Tensor, block: int) -> InputStatistics:
        """Moments of H S x (FORMAT.md) in place of x; signs fp32 [K]."""
        wide = signs.double()
        # As a product with the small matrix: many times faster on [K, K] than the fast transform.
        matrix = block_hadamard(torch.eye(block, dtype=torch.float64), block)

        def columns(moment: Tensor) -> Tensor:
            return ((moment * wide).view(-1, block) @ matrix).view(moment.shape)

        def both(moment: Tensor) -> Tensor:
            return columns(columns(moment).T.contiguous()).T.contiguous()

        drift = None if self.drift is None else columns(self.drift)
        return InputStatistics(both(self.hessian), both(self.cross), drift, self.tokens)


class _Product:
    """Sum of a^T b over sequences: of a few in fp32, which is fast, of all in fp64."""

    def __init__(self) -> None:
        self.parts = 0
        self._part = torch.empty(0)
        self._total = torch.zeros((), dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a^T b; a fp32 [T, M], b fp32 [T, K]."""
        if self.parts % FP32_SEQUENCES == 0:
            self._flush()
            self._part = torch.zeros(a.shape[1], b.shape[1], device=a.device)
        self._part.addmm_(a.T, b)
        self.parts += 1

    def mean(self, tokens: int) -> Tensor:
        """The sum over `tokens`, fp64 [M, K]."""
        self._flush()
        return self._total / tokens

    def _flush(self) -> None:
        if self._part.numel():
            self._total = self._total + self._part.cpu().double()
        self._part = torch.empty(0)
