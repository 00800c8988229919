"""The interface of objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.progress import Progress


@dataclass(frozen=True)
class Text:
    """The calibration text.

    Attributes:
        tokens: int64 [S, T].
        seed: of what an objective draws at random.
    """

    tokens: Tensor
    seed: int


@dataclass(frozen=True)
class OutputFisher:
    """Diagonal blocks of what errors of a linear's outputs cost.

    Attributes:
        blocks: [n_i, n_i], positive definite; the n_i add up to N, all but the last are equal and a
            multiple of the rows of the longest chains.
    """

    blocks: list[Tensor]

    def rows(self, share: slice) -> list[Tensor]:
        """The blocks, fp64, of rows `share`."""
        end = 0
        parts = []
        for block in self.blocks:
            first, end = end, end + len(block)
            inside = slice(max(share.start, first) - first, min(share.stop, end) - first)
            if inside.start < inside.stop:
                parts.append(block[inside, inside].double())
        return parts


@dataclass(frozen=True)
class StageObjective:
    """What errors of linears that read the same activation cost.

    Attributes:
        weights: fp32 [S, T], of a squared error at each token of the text; None: all the same.
        outputs: for each linear, of errors of its outputs; None: all the same.
    """

    weights: Tensor | None = None
    outputs: list[OutputFisher] | None = None


class Objective(Protocol):
    """Says what errors of linears cost."""

    def prepare(
        self, model: LayeredModel, linears: list[str], text: Text, progress: Progress
    ) -> None:
        """Measure what is needed, before the first of `linears` of `model` is quantized.

        What an earlier run measured for the same is used again.
        """

    def stage(self, names: list[str]) -> StageObjective:
        """Of linears `names`, which read the same activation."""
