"""Codes of groups of rotated weights."""

from __future__ import annotations

import torch
from pcdvq_kernels.codebook import MAX_LEVEL, Codebook
from pcdvq_kernels.nearest import nearest_codeword
from pcdvq_kernels.search import chain_codes
from torch import Tensor
from torch.nn import functional

from pcdvq_quantizer.pyramid_search import PyramidSearch


class Encoder:
    """Encodes groups with one codebook.

    The codes of a chain of codec `trellis` are searched together. In the other codecs a group is
    encoded by itself: by a direction chosen by its angle to the group and a magnitude by the
    group's length, as in the paper (arXiv 2506.05432, section 3.2), for `e8`; by the pair nearest
    to the group in Euclidean distance for `pvq`; weight by weight for `int8`.
    """

    def __init__(self, codebook: Codebook, effort: str = "exhaustive") -> None:
        self.codebook, self._effort = codebook, effort
        spec = codebook.spec
        if spec.pulses:
            self._pyramids = PyramidSearch(codebook)
        elif spec.codec == "e8":
            self._directions = _Table.angular(codebook.directions.float())
            self._lengths = _direction_lengths(codebook)

    def encode(self, x: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Codes of `x`.

        Args:
            x: fp32 [N, G, g], any G column groups of rotated weights in units of their row scale
                (levels), of codec `trellis` those of whole strips. Row 0 is row 0 of the layer, or
                starts a segment (`spec.row_multiple`).
            row_weight: fp32 [N], what a squared error in each row costs; None: all the same. Only
                codec `trellis` weighs rows against each other.

        Returns:
            int64 [`spec.stored_rows(N)`, G], each in [0, 2 ** code_bits).
        """
        spec = self.codebook.spec
        if spec.chain_rows:
            weight = torch.ones(len(x)) if row_weight is None else row_weight
            padding = spec.stored_rows(len(x)) - len(x)  # rows that cost nothing
            padded = functional.pad(x.flatten(1), (0, 0, 0, padding))
            weight = functional.pad(weight, (0, padding))
            codes = chain_codes(padded, weight, spec.code_bits, spec.chain_rows, self._effort)
            return codes.long()
        if spec.codec == "int8":
            return x.round().clamp(-MAX_LEVEL, MAX_LEVEL).long()[..., 0] & 0xFF
        encode = self._pyramids.encode if spec.pulses else self._encode_table
        return encode(x.reshape(-1, spec.vector_dim)).view(x.shape[:2])

    def round(self, x: Tensor, row_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes of `x`, as `encode` has them, and their levels, fp32 like `x`."""
        codes = self.encode(x, row_weight)
        return codes, self.codebook.decode(codes)[: len(x)].float()

    def _encode_table(self, x: Tensor) -> Tensor:
        pattern = self._directions.nearest(x).long()
        # |x| against the length each magnitude gives the mean direction: separate, as in the paper.
        magnitude = torch.bucketize(x.norm(dim=1), (self._lengths[1:] + self._lengths[:-1]) / 2)
        return pattern | magnitude << self.codebook.spec.pattern_bits


class _Table:
    """Codewords with the bias that makes `argmax(x . c - bias)` the wanted nearest."""

    def __init__(self, codewords: Tensor, bias: Tensor) -> None:
        self.codewords, self.bias = codewords.contiguous(), bias  # [C, g], [C]

    @classmethod
    def angular(cls, codewords: Tensor) -> _Table:
        unit = torch.nn.functional.normalize(codewords)
        return cls(unit, torch.zeros(len(unit)))

    def nearest(self, x: Tensor) -> Tensor:
        return nearest_codeword(x.contiguous(), self.codewords, self.bias)


def _direction_lengths(codebook: Codebook) -> Tensor:
    """Mean length of the codewords of each magnitude, fp32 [2 ** magnitude_bits]."""
    levels = codebook.codewords().float().view(-1, codebook.spec.rows, codebook.spec.vector_dim)
    return levels.norm(dim=2).mean(1)
