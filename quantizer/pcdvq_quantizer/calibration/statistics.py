"""Second moments of a linear's inputs, in the original and in the quantized model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from pcdvq_kernels.hadamard import block_hadamard
from torch import Tensor

from pcdvq_quantizer.calibration.parallel import ALONE, Processes

# Damping that was not chosen: see QUALITY.md.
DAMPING_TOKENS = 720  # 0.03 at 24 thousand tokens, more where the Hessian is less certain
TARGET_DAMPING = 0.5
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
        kind: of text, a number.
    """

    original: Tensor
    quantized: Tensor
    lack: Tensor | None = None
    weight: Tensor | None = None
    kind: int = 0


@dataclass(frozen=True)
class Damping:
    """Added to the diagonal of a Hessian, as shares of its mean.

    Attributes:
        feedback: where it decides what makes up for an error.
        target: where the weights to round to are learnt.
    """

    feedback: float
    target: float = TARGET_DAMPING


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs of one stage, x in the quantized model; means by `Inputs.weight`.

    Attributes:
        hessian: fp64 [K, K], mean of x x^T.
        cross: fp64 [K, K], mean of (x_original - x) x^T; empty where `lack` is given.
        lack: fp64 [N, K], mean of `Inputs.lack` x^T, or None.
        tokens: how many inputs; with weights w as many as say as much, (sum w)^2 / sum w^2.
        total: sum of the weights.
        chosen: damping that was chosen for these, or None.
    """

    hessian: Tensor
    cross: Tensor
    lack: Tensor | None
    tokens: int
    total: float = 1.0
    chosen: Damping | None = None

    @property
    def damping(self) -> Damping:
        """What was chosen, or else by the number of tokens."""
        return self.chosen or Damping(min(1.0, DAMPING_TOKENS / max(1, self.tokens)))

    @classmethod
    def gather(cls, inputs: Iterable[Inputs], processes: Processes = ALONE) -> InputStatistics:
        """Accumulate the moments of `inputs` of all `processes`; they are on the CPU."""
        return cls.merge(cls.gather_kinds(inputs, processes))

    @classmethod
    def gather_kinds(
        cls, inputs: Iterable[Inputs], processes: Processes = ALONE
    ) -> list[InputStatistics]:
        """The moments of `inputs` of each kind, by number; all processes have the same."""
        sums: dict[int, _Sums] = {}
        for each in inputs:
            sums.setdefault(each.kind, _Sums()).add(each)
        found = processes.all_of(set(sums))
        some = next(iter(sums.values()))
        return [sums.get(kind, some.nothing()).statistics(processes) for kind in sorted(found)]

    @classmethod
    def merge(cls, kinds: list[InputStatistics]) -> InputStatistics:
        """The moments of all `kinds` together."""
        if len(kinds) == 1:
            return kinds[0]
        total = sum(each.total for each in kinds)
        shares = [each.total / max(total, 1e-30) for each in kinds]

        def mean(moments: list[Tensor]) -> Tensor:
            parts = [moment * share for moment, share in zip(moments, shares, strict=True)]
            return sum(parts[1:], parts[0])

        lacks = [each.lack for each in kinds if each.lack is not None]
        return cls(
            mean([each.hessian for each in kinds]),
            mean([each.cross for each in kinds]),
            mean(lacks) if lacks else None,
            round(total**2 / sum(each.total**2 / max(1, each.tokens) for each in kinds)),
            total,
        )

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
        return replace(self, hessian=both(self.hessian), cross=cross, lack=lack)

    def permuted(self, order: Tensor) -> InputStatistics:
        """Moments of x[order] in place of x; order int64 [K]."""
        cross = self.cross[order][:, order] if self.cross.numel() else self.cross
        lack = None if self.lack is None else self.lack[:, order]
        return replace(self, hessian=self.hessian[order][:, order], cross=cross, lack=lack)


def add_lower_square(sums: Tensor, x: Tensor) -> None:
    """Add the lower triangle of x^T x, x fp32 [T, K], to `sums` [K, K].

    What that leaves above the diagonal is not to be used.
    """
    size = x.shape[1]
    rows = -(-size // BLOCKS)
    for start in range(0, size, rows):
        end = min(start + rows, size)
        sums[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])


class _Sums:
    """Sums over inputs of one kind."""

    def __init__(self, *products: _Product) -> None:
        self._hessian, self._cross, self._lack = products or (_Product() for _ in range(3))
        self._powers = torch.zeros(2, dtype=torch.float64)  # of weights, of their squares

    def add(self, inputs: Inputs) -> None:
        x, wrong = inputs.quantized, inputs.lack
        if wrong is None:
            wrong = inputs.original - x
        if inputs.weight is None:
            self._powers += len(x)
        else:
            root = inputs.weight.to(x.device).sqrt().unsqueeze(1)
            x, wrong = x * root, wrong * root
            weight = inputs.weight.cpu().double()
            self._powers += torch.stack([weight.sum(), weight.square().sum()])
        self._hessian.add_square(x)
        (self._cross if inputs.lack is None else self._lack).add(wrong, x)

    def nothing(self) -> _Sums:
        """Those of no inputs."""
        return _Sums(*(each.nothing() for each in (self._hessian, self._cross, self._lack)))

    def statistics(self, processes: Processes) -> InputStatistics:
        """The moments in all processes."""
        used = [each for each in (self._hessian, self._cross, self._lack) if each.parts]
        products = [product.total() for product in used]
        processes.sum(self._powers, *products)
        square, other = (product / self._powers[0].clamp_min(1e-30) for product in products)
        square = square.tril() + square.tril(-1).T
        count = round((self._powers[0].square() / self._powers[1].clamp_min(1e-30)).item())
        total = self._powers[0].item()
        if self._lack.parts:
            empty = torch.empty(0, dtype=torch.float64)
            return InputStatistics(square, empty, other, count, total)
        return InputStatistics(square, other, None, count, total)


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

    def nothing(self) -> _Product:
        """The sum of no products, of the same size."""
        product = _Product()
        product.parts = self.parts
        product._total = torch.zeros_like(self.total())
        return product

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
