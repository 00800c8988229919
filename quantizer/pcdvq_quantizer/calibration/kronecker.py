"""Rounding with error feedback between the columns and between the rows of a weight.

With a Kronecker-factored Fisher information an error E = W' - W of a layer costs tr(A E B E^T), A
[N, N] from the gradients to the outputs, B [K, K] from the inputs. An error is then made up for not
only by the column groups after it (`ldlq.py`) but also by the rows after it: the adaptive rounding
of YAQA (arXiv 2505.22988). Any order will do in which a block follows all those above and to the
left of it, so those on an anti-diagonal are rounded together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pcdvq_kernels.config import CodebookSpec
from torch import Tensor
from torch.nn import functional

from pcdvq_quantizer.calibration.ldlq import SPAN, feedback_of, inverse_cholesky
from pcdvq_quantizer.encode import Encoder

LEAST_BLOCK = 16  # rows that are rounded together, whole chains; no feedback among them
PANEL = 256  # rows whose feedback is applied at once to all rows after them


@dataclass(frozen=True)
class RowFactor:
    """The output side of a Fisher information, prepared for rounding.

    Attributes:
        fisher: fp64 [N, N], damped.
        feedback: fp32 [P, P], as of `cholesky_feedback` for blocks of rows; P is N rounded up to
            whole blocks.
        importance: fp32 [N], what a squared error of a row costs once later rows make up for it.
        block: rows of a block.
    """

    fisher: Tensor
    feedback: Tensor
    importance: Tensor
    block: int

    @classmethod
    def of(cls, fisher: Tensor, row_multiple: int) -> RowFactor:
        """Factor `fisher`, fp64 [N, N], for codes of which so many rows are chosen together.

        Raises:
            torch.linalg.LinAlgError: it is not positive definite.
        """
        rows, block = len(fisher), max(row_multiple, LEAST_BLOCK)
        padding = -rows % block
        padded = functional.pad(fisher, (0, padding, 0, padding))
        padded.diagonal()[rows:] = 1.0
        upper = inverse_cholesky(padded)
        blocks = upper.view(-1, block, upper.shape[1] // block, block)
        index = torch.arange(len(blocks))
        inverse = torch.linalg.inv(blocks[index, :, index])  # [P / block, block, block]
        importance = inverse.square().sum(2).flatten()  # diagonal of inverse @ inverse^T
        return cls(fisher, feedback_of(upper, block), importance[:rows].float(), block)


def kronecker_ldlq(
    aim: Tensor, scale: Tensor, feedback: Tensor, rows: RowFactor, encoder: Encoder
) -> tuple[Tensor, Tensor]:
    """Codes of `aim` with error feedback in both directions.

    Args:
        aim: fp32 [N, K], weights; row 0 begins a segment.
        scale: fp32 [N], row scales.
        feedback: fp32 [K, K], of `cholesky_feedback`.
        rows: the output side.
        encoder: chooses codes.

    Returns:
        (codes int64 [N, groups], N of whole chains; levels fp32 [N, K]).
    """
    count, columns = aim.shape
    spec = encoder.codebook.spec
    step, dim = spec.strip_columns, spec.vector_dim
    padding = -count % rows.block
    weight = functional.pad(scale.square() * rows.importance, (0, padding))
    y = functional.pad(aim, (0, 0, 0, padding))
    scale = functional.pad(scale, (0, padding), value=1.0)
    codes = torch.empty(len(y), columns // dim, dtype=torch.int64)
    levels = torch.empty_like(y)
    above = torch.zeros_like(y)  # what the errors of rows above add to the target
    for top in range(0, len(y), PANEL):
        panel = slice(top, min(top + PANEL, len(y)))
        across = _padded_feedback(rows.feedback[panel, panel], rows.block)
        wrong = torch.empty_like(y[panel])
        for left in range(0, columns, SPAN):
            span = slice(left, min(left + SPAN, columns))
            parts = y[panel, span], above[panel, span], scale[panel], weight[panel]
            tile = _Tile(*parts, rows.block, spec)
            tile.round(encoder, _padded_feedback(feedback[span, span], step), across)
            codes[panel, left // dim : span.stop // dim] = tile.codes
            levels[panel, span], wrong[:, span] = tile.levels, tile.wrong
            y[panel, span.stop :] -= tile.wrong_in_row @ feedback[span, span.stop :]
        above[panel.stop :] -= rows.feedback[panel, panel.stop :].T @ wrong
    return codes[: spec.stored_rows(count)], levels[:count]


class _Tile:
    """Blocks of `block` rows and g columns, `strip_columns`, rounded by anti-diagonals.

    A block's target is y + above: `y` is the weight with the feedback of the columns before,
    `above` that of the rows above. Their errors differ: `wrong_in_row` is y - levels, `wrong` is
    y + above - levels.
    """

    def __init__(
        self,
        y: Tensor,
        above: Tensor,
        scale: Tensor,
        weight: Tensor,
        block: int,
        spec: CodebookSpec,
    ) -> None:
        self._step, self._dim = spec.strip_columns, spec.vector_dim
        self._y = y.unflatten(0, (-1, block)).clone()  # [b, block, C]
        # [C / g, R, g]
        self._above = above.unflatten(1, (-1, self._step)).transpose(0, 1).clone()
        self._scale = scale.view(-1, block, 1)
        self._weight = weight.view(-1, block)
        shape = len(self._y), block, len(self._above)
        self._codes = torch.empty(*shape, self._step // self._dim, dtype=torch.int64)
        self._levels, self._wrong, self._wrong_in_row = (
            y.new_empty(*shape, self._step) for _ in "123"
        )

    def round(self, encoder: Encoder, along: Tensor, across: Tensor) -> None:
        """Round all blocks; `along` and `across`: `_padded_feedback` of the columns and rows."""
        blocks, rows, groups = self._codes.shape[:3]
        y = self._y.unflatten(2, (groups, self._step))
        above = self._above.unflatten(1, (blocks, rows))
        for diagonal in range(blocks + groups - 1):
            first, end = max(0, diagonal - groups + 1), min(blocks, diagonal + 1)
            i = torch.arange(first, end)
            j = diagonal - i
            mine = y[i, :, j]  # [n, block, g]
            target = mine + above[j, i]
            scale = self._scale[first:end]
            x = (target / scale).view(-1, self._step // self._dim, self._dim)
            code, level = encoder.round(x, self._weight[first:end].reshape(-1))
            level = level.reshape(target.shape)
            wrong_in_row, wrong = mine - level * scale, target - level * scale
            self._y[first:end] -= wrong_in_row @ along[j]
            self._above[j] -= across[i].transpose(1, 2) @ wrong
            self._codes[i, :, j] = code.reshape(len(i), rows, -1)
            self._levels[i, :, j] = level
            self._wrong[i, :, j], self._wrong_in_row[i, :, j] = wrong, wrong_in_row

    @property
    def codes(self) -> Tensor:
        """int64 [R, groups]."""
        return self._codes.flatten(2).flatten(0, 1)

    @property
    def levels(self) -> Tensor:
        """fp32 [R, C]."""
        return self._levels.flatten(2).flatten(0, 1)

    @property
    def wrong(self) -> Tensor:
        """fp32 [R, C]."""
        return self._wrong.flatten(2).flatten(0, 1)

    @property
    def wrong_in_row(self) -> Tensor:
        """fp32 [R, C]."""
        return self._wrong_in_row.flatten(2).flatten(0, 1)


def _padded_feedback(feedback: Tensor, step: int) -> Tensor:
    """Rows of `feedback` [C, C], 0 up to and with their own block: [C / step, step, C]."""
    blocks = torch.arange(len(feedback)) // step
    later = blocks.unsqueeze(1) < blocks
    return torch.where(later, feedback, 0.0).unflatten(0, (-1, step))
