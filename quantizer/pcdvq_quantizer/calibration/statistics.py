"""Second moments of a linear's inputs, in the original and in the quantized model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pcdvq_kernels.hadamard import block_hadamard
from torch import Tensor

from pcdvq_quantizer.calibration.parallel import ALONE, Processes

FP32_SEQUENCES = 8
BLOCKS = 4  # of a symmetric product, of which only those on and below the diagonal are computed


@dataclass(frozen=True)
class Inputs:
    """What the linears of a stage read for one sequence.

    Attributes:
        original: fp32 [T, K], in the original model.
        quantized: fp32 [T, K], in the model quantized so far.
        lack: fp32 [T, N], what the output of a stage of one linear lacks of the wanted one, with
            the linear's original weight. None: what the original model's inputs would change.
        weight: fp32 [T], what a squared error at each token costs. None: all the same.
    """

    original: Tensor
    quantized: Tensor
    lack: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs of one stage, x in the quantized model; means by `Inputs.weight`.

    Attributes:
        hessian: fp64 [K, K], mean of x x^T.
        cross: fp64 [K, K], mean of (x_original - x) x^T; empty where `lack` is given.
        lack: fp64 [N, K], mean of `Inputs.lack` x^T, or None.
        tokens: how many inputs; with weights w as many as say as much, (sum w)^2 / sum w^2.
    """

    hessian: Tensor
    cross: Tensor
    lack: Tensor | None
    tokens: int

    @classmethod
    def gather(cls, inputs: Iterable[Inputs], processes: Processes = ALONE) -> InputStatistics:
        """Accumulate the moments of `inputs` of all `processes`; they are on the CPU."""
        hessian, cross, lack = _Product(), _Product(), _Product()
        powers = torch.zeros(2, dtype=torch.float64)  # sum of weights, sum of their squares
        for each in inputs:
            x, wrong = each.quantized, each.lack
            if wrong is None:
                wrong = each.original - x
            if each.weight is None:
                powers += len(x)
            else:
                root = each.weight.to(x.device).sqrt().unsqueeze(1)
                x, wrong = x * root, wrong * root
                weight = each.weight.cpu().double()
                powers += torch.stack([weight.sum(), weight.square().sum()])
            hessian.add_square(x)
            (cross if each.lack is None else lack).add(wrong, x)
        products = [product.total() for product in (hessian, cross, lack) if product.parts]
        processes.sum(powers, *products)
        square, other = (product / powers[0].clamp_min(1e-30) for product in products)
        square = square.tril() + square.tril(-1).T
        count = round((powers[0].square() / powers[1].clamp_min(1e-30)).item())
        if lack.parts:
            return cls(square, torch.empty(0, dtype=torch.float64), other, count)
        return cls(square, other, None, count)

    def rotated(self, signs: Tensor, block: int) -> InputStatistics:
        """Moments of H S x (FORMAT.md) in place of x; signs fp32 [K]."""
        wide = signs.double()
        # As a product with the small matrix: many times faster on [K, K] than the fast transform.
        matrix = block_hadamard(torch.eye(block, dtype=torch.float64), block)

        def columns(moment: Tensor) -> Tensor:
            return ((moment * wide).view(-1, block) @ matrix).view(moment.shape)

        def both(moment: Tensor) -> Tensor:
            return columns(columns(moment).T.contiguous()).T.contiguous()

        cross = both(self.cross) if self.cross.numel() else self.cross
        lack = None if self.lack is None else columns(self.lack)
        return InputStatistics(both(self.hessian), cross, lack, self.tokens)

    def permuted(self, order: Tensor) -> InputStatistics:
        """Moments of x[order] in place of x; order int64 [K]."""
        cross = self.cross[order][:, order] if self.cross.numel() else self.cross
        lack = None if self.lack is None else self.lack[:, order]
        return InputStatistics(self.hessian[order][:, order], cross, lack, self.tokens)


def add_lower_square(sums: Tensor, x: Tensor) -> None:
    """Add the lower triangle of x^T x, x fp32 [T, K], to `sums` [K, K].

    What that leaves above the diagonal is not to be used.
    """
    size = x.shape[1]
    rows = -(-size // BLOCKS)
    for start in range(0, size, rows):
        end = min(start + rows, size)
        sums[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])


class _Product:
    """Sum of a^T b over sequences: of a few in fp32, which is fast, of all in fp64."""

    def __init__(self) -> None:
        self.parts = 0
        self._part = torch.empty(0)
        self._total = torch.zeros(0, dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a^T b; a fp32 [T, M], b fp32 [T, K]."""
        self._begin(a.shape[1], b).addmm_(a.T, b)

    def add_square(self, x: Tensor) -> None:
        """Add the lower triangle of x^T x, x fp32 [T, K]; what is above it is not to be used."""
        add_lower_square(self._begin(x.shape[1], x), x)

    def _begin(self, rows: int, b: Tensor) -> Tensor:
        """The fp32 sum [rows, K] that a product with b [T, K] is added to."""
        if self.parts % FP32_SEQUENCES == 0:
            self._flush()
            self._part = torch.zeros(rows, b.shape[1], device=b.device)
        self.parts += 1
        return self._part

    def total(self) -> Tensor:
        """The sum, fp64 [M, K]."""
        self._flush()
        return self._total

    def _flush(self) -> None:
        if self._part.numel():
            part = self._part.cpu().double()
            self._total = self._total + part if self._total.numel() else part
        self._part = torch.empty(0)
