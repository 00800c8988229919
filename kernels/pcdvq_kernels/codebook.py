"""Codebooks: the direction and magnitude tables, and what a code decodes to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pcdvq_kernels import pyramid, trellis
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import CheckpointError

MAX_LEVEL = 127
MAX_MAGNITUDE = 128


@dataclass(frozen=True, eq=False)
class Codebook:
    """Tables of one codebook (FORMAT.md, "Codebooks").

    Attributes:
        spec: layout of the codes.
        directions: int8 [spec.rows, spec.vector_dim].
        magnitudes: uint8 [spec.magnitude_count].
    """

    spec: CodebookSpec
    directions: Tensor
    magnitudes: Tensor

    def __post_init__(self) -> None:
        spec = self.spec
        _expect("directions", self.directions, torch.int8, (spec.rows, spec.vector_dim))
        _expect("magnitudes", self.magnitudes, torch.uint8, (spec.magnitude_count,))
        smallest, largest = int(self.magnitudes.min()), int(self.magnitudes.max())
        if smallest < 1 or largest > MAX_MAGNITUDE:
            raise CheckpointError(
                f"codebook magnitudes lie in [{smallest}, {largest}], the format's limits are "
                f"[1, {MAX_MAGNITUDE}]"
            )
        if spec.rows:
            self._check_directions()

    def _check_directions(self) -> None:
        lowest = int(self.directions.min())
        if lowest < -MAX_LEVEL:
            raise CheckpointError(f"codebook directions hold {lowest}, below the format's limit")
        if self.spec.codec == "int8" and not torch.equal(self.codewords(), int8_directions()):
            raise CheckpointError("codebook directions are not those of codec int8 (FORMAT.md)")
        highest = int(self._levels().abs().max())
        if highest > MAX_LEVEL:
            raise CheckpointError(f"codebook levels reach {highest}, over the limit {MAX_LEVEL}")

    def _levels(self) -> Tensor:
        """int32 [2 ** magnitude_bits, rows, vector_dim]."""
        directions = self.directions.to(torch.int32)
        magnitudes = self.magnitudes.to(torch.int32).view(-1, 1, 1)
        return (directions * magnitudes + (1 << self.spec.shift >> 1)) >> self.spec.shift

    def codewords(self) -> Tensor:
        """The op's argument `codewords`: levels, or the tables of pyramid codes.

        Returns:
            int8 [2 ** magnitude_bits * rows, vector_dim]; row `magnitude * rows + row` belongs to a
            code whose fields select `row` and `magnitude`. Of codec pvq the levels of every code,
            or `pyramid.make_tables` [spec.pyramid_rows, 8]; of codec trellis none.
        """
        return self._codewords

    @cached_property
    def _codewords(self) -> Tensor:
        spec = self.spec
        if spec.pulses:
            bits = spec.code_bits
            tables = pyramid.make_tables(spec.pulses, bits, self.magnitudes, spec.shift)
            if not spec.pyramid_rows:
                tables = pyramid.decode(torch.arange(1 << bits), tables, bits)
            return tables.to(self.magnitudes.device)
        return self._levels().flatten(0, 1).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes.

        Args:
            codes: int64, of codec trellis [N, groups], whole chains; of any shape otherwise.

        Returns:
            int8 [*codes.shape, vector_dim].
        """
        spec = self.spec
        if spec.chain_rows:
            return trellis.decode(codes, spec.code_bits, spec.chain_rows)
        if spec.pyramid_rows:
            return pyramid.decode(codes, self.codewords(), spec.code_bits)
        return self.codewords()[codes]


def int8_directions() -> Tensor:
    """The directions of codec `int8`, int8 [256, 1]: codes are two's complement, -128 is -127."""
    return torch.arange(256, dtype=torch.uint8).view(torch.int8).clamp(-MAX_LEVEL).view(-1, 1)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"codebook {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"its configuration asks for {dtype} {list(shape)}"
        )
