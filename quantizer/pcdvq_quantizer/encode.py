"""Codes of groups of rotated weights."""

from __future__ import annotations

import torch
from pcdvq_kernels.codebook import MAX_LEVEL, Codebook, expand_patterns
from pcdvq_kernels.nearest import nearest_codeword
from pcdvq_kernels.trellis import trellis_codes, window_codes
from torch import Tensor

from pcdvq_quantizer.pyramid_search import PyramidSearch


class Encoder:
    """Encodes groups with one codebook.

    For `trellis` and `compact` the codes of a column group in a segment are searched together. In
    the other codecs a group is encoded by itself: by a direction chosen by its angle to the group
    and a magnitude by the group's length, as in the paper (arXiv 2506.05432, section 3.2), for
    `e8`; by the pair nearest to the group in Euclidean distance for `signed`, whose patterns have
    lengths of their own, and for `pvq`; weight by weight for `int8`.
    """

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        spec = codebook.spec
        self._signs = 1 << torch.arange(spec.vector_dim)  # [g]
        if spec.windows:
            self._windows = codebook.codewords().float()
        elif spec.state_bits:
            patterns = expand_patterns(codebook.codewords(), spec)
            self._patterns = patterns.float().reshape(-1, spec.vector_dim)
        elif spec.signs:
            codewords = codebook.codewords().float()
            stride = 2 if spec.parity else 1
            # One sub-table per parity of the sign bits: rows 2 * pattern + parity.
            self._tables = [_Table.euclidean(codewords[parity::stride]) for parity in range(stride)]
        elif spec.pulses:
            self._pyramids = PyramidSearch(codebook)
        elif spec.codec == "e8":
            self._directions = _Table.angular(codebook.directions.float())
            self._lengths = _direction_lengths(codebook)

    def encode(self, x: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Codes of `x`.

        Args:
            x: fp32 [N, G, g], any G column groups of rotated weights in units of their row scale
                (levels). Row 0 is row 0 of the layer, or starts a segment (`spec.row_multiple`).
            row_weight: fp32 [N], what a squared error in each row costs; None: all the same. Only
                codecs with states weigh rows against each other.

        Returns:
            int64 [N, G], each in [0, 2 ** code_bits).
        """
        spec = self.codebook.spec
        if spec.state_bits:
            weight = torch.ones(len(x)) if row_weight is None else row_weight
            if spec.windows:
                return window_codes(x, weight, self._windows, spec.code_bits).long()
            return trellis_codes(x, weight, self._patterns, spec.parity, spec.state_bits).long()
        if spec.codec == "int8":
            return x.round().clamp(-MAX_LEVEL, MAX_LEVEL).long()[..., 0] & 0xFF
        if spec.pulses:
            encode = self._pyramids.encode
        else:
            encode = self._encode_signed if spec.signs else self._encode_table
        return encode(x.reshape(-1, spec.vector_dim)).view(x.shape[:2])

    def _encode_table(self, x: Tensor) -> Tensor:
        pattern = self._directions.nearest(x).long()
        # |x| against the length each magnitude gives the mean direction: separate, as in the paper.
        magnitude = torch.bucketize(x.norm(dim=1), (self._lengths[1:] + self._lengths[:-1]) / 2)
        return pattern | magnitude << self.codebook.spec.pattern_bits

    def _encode_signed(self, x: Tensor) -> Tensor:
        spec = self.codebook.spec
        negative = (x < 0).long()
        signs = (negative * self._signs).sum(1)  # [G]
        y = x.abs()
        if not spec.parity:
            return signs | self._index_to_fields(self._tables[0].nearest(y).long())
        # The parity of the sign bits must be that of the sub-table. A group of the other parity
        # pays by storing its smallest coordinate with the wrong sign.
        smallest = y.argmin(1, keepdim=True)  # [G, 1]
        flipped = y.scatter(1, smallest, -y.gather(1, smallest))
        odd = negative.sum(1) % 2
        codes, scores = [], []
        for parity, table in enumerate(self._tables):
            matches = odd == parity  # [G]
            target = torch.where(matches.unsqueeze(1), y, flipped)
            index = table.nearest(target).long()
            stored = torch.where(matches, signs, signs ^ self._signs[smallest.squeeze(1)])
            codes.append(stored | self._index_to_fields(index))
            scores.append(table.score(target, index))
        return torch.where(scores[1] > scores[0], codes[1], codes[0])

    def _index_to_fields(self, index: Tensor) -> Tensor:
        """Row of a sub-table, [magnitude][pattern], to the pattern and magnitude fields."""
        return index << self.codebook.spec.sign_bits


class _Table:
    """Codewords with the bias that makes `argmax(x . c - bias)` the wanted nearest."""

    def __init__(self, codewords: Tensor, bias: Tensor) -> None:
        self.codewords, self.bias = codewords.contiguous(), bias  # [C, g], [C]

    @classmethod
    def euclidean(cls, codewords: Tensor) -> _Table:
        return cls(codewords, codewords.square().sum(1) / 2)

    @classmethod
    def angular(cls, codewords: Tensor) -> _Table:
        unit = torch.nn.functional.normalize(codewords)
        return cls(unit, torch.zeros(len(unit)))

    def nearest(self, x: Tensor) -> Tensor:
        return nearest_codeword(x.contiguous(), self.codewords, self.bias)

    def score(self, x: Tensor, index: Tensor) -> Tensor:
        return (x * self.codewords[index]).sum(1) - self.bias[index]


def _direction_lengths(codebook: Codebook) -> Tensor:
    """Mean length of the codewords of each magnitude, fp32 [2 ** magnitude_bits]."""
    levels = codebook.codewords().float().view(-1, codebook.spec.rows, codebook.spec.vector_dim)
    return levels.norm(dim=2).mean(1)
