"""Codebooks: the direction and magnitude tables, and what a code decodes to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pcdvq_kernels import pyramid, windows
from pcdvq_kernels.arguments import LayoutFields
from pcdvq_kernels.config import SEGMENT_ROWS, CodebookSpec
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
        if not spec.pulses:
            self._check_directions()

    def _check_directions(self) -> None:
        spec = self.spec
        lowest = int(self.directions.min())
        if lowest < (0 if spec.signs else -MAX_LEVEL):
            raise CheckpointError(f"codebook directions hold {lowest}, below the format's limit")
        if spec.codec == "int8" and not torch.equal(self.codewords(), int8_directions()):
            raise CheckpointError("codebook directions are not those of codec int8 (FORMAT.md)")
        highest = int(self._levels().abs().max())
        if highest > MAX_LEVEL:
            raise CheckpointError(f"codebook levels reach {highest}, over the limit {MAX_LEVEL}")

    def _levels(self) -> Tensor:
        """int32 [2 ** magnitude_bits, rows, vector_dim], before signs."""
        directions = self.directions.to(torch.int32)
        magnitudes = self.magnitudes.to(torch.int32).view(-1, 1, 1)
        return (directions * magnitudes + (1 << self.spec.shift >> 1)) >> self.spec.shift

    def codewords(self) -> Tensor:
        """The op's argument `codewords`: levels before signs, or the tables of pyramid codes.

        Returns:
            int8 [2 ** magnitude_bits * rows, vector_dim]; row `magnitude * rows + row` belongs to a
            code whose fields select `row` and `magnitude`. Of codec pvq the levels of every code,
            or `pyramid.make_tables` [spec.pyramid_rows, 8].
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

    def codeword_index(self, codes: Tensor) -> Tensor:
        """Rows of `codewords()` that `codes` (int64, as in `decode`) select."""
        spec = self.spec
        row = (codes >> spec.sign_bits) & ((1 << spec.base_bits) - 1)
        if spec.state_bits:
            row |= code_states(codes, spec.code_bits, spec.state_bits) << spec.base_bits
        if spec.parity:
            row = 2 * row + _sign_matrix(codes, spec.vector_dim).sum(-1) % 2
        magnitude = (codes >> (spec.sign_bits + spec.pattern_bits)) & (
            (1 << spec.magnitude_bits) - 1
        )
        return magnitude * spec.rows + row

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes.

        Args:
            codes: int64, [N, groups], row 0 the first of a segment, if the codec has states; of any
                shape otherwise.

        Returns:
            int8 [*codes.shape, vector_dim].
        """
        spec = self.spec
        if spec.pyramid_rows:
            return pyramid.decode(codes, self.codewords(), spec.code_bits)
        if spec.pulses:
            return self.codewords()[codes]
        if spec.windows:
            states = code_states(codes, spec.code_bits, spec.state_bits)
            rows = windows.table_rows(codes, states, spec.code_bits)
            return windows.look_up(self.codewords(), rows)
        levels = self.codewords()[self.codeword_index(codes)]
        if spec.rotation_bits:
            rotation = codes >> (spec.sign_bits + spec.base_bits)
            levels = levels.gather(-1, rotated_coordinates(rotation, spec.vector_dim))
        if spec.signs:
            negative = _sign_matrix(codes, spec.vector_dim).bool()
            levels = torch.where(negative, -levels, levels)
        return levels


def expand_patterns(codewords: Tensor, spec: CodebookSpec | LayoutFields) -> Tensor:
    """Codewords of every pattern in every state, rotations included.

    Args:
        codewords: [2 ** magnitude_bits * spec.rows, vector_dim], as `Codebook.codewords()`.
        spec: layout of the codes.

    Returns:
        [2 ** state_bits, 2 ** (pattern_bits + magnitude_bits), 1 + parity, vector_dim].
    """
    if spec.windows:
        return windows.expand(codewords, spec.code_bits).unsqueeze(2)
    g = spec.vector_dim
    rows = codewords.view(1 << spec.state_bits, -1, 1 + spec.parity, g)
    if not spec.rotation_bits:
        return rows
    source = rotated_coordinates(torch.arange(g, device=codewords.device), g)
    # [state, base, parity, rotation, g] to [state, rotation, base, parity, g]
    return rows[..., source].permute(0, 3, 1, 2, 4).flatten(1, 2)


def rotated_coordinates(rotation: Tensor, vector_dim: int) -> Tensor:
    """Source of each coordinate of a rotated row: int64 [..., vector_dim] from rotations [...]."""
    return (rotation.unsqueeze(-1) + torch.arange(vector_dim, device=rotation.device)) % vector_dim


def code_states(codes: Tensor, code_bits: int, state_bits: int) -> Tensor:
    """States of codes [N, groups]: the top bits of the code above, 0 where a segment starts."""
    states = torch.zeros_like(codes)
    states[1:] = codes[:-1] >> (code_bits - state_bits)
    states[::SEGMENT_ROWS] = 0
    return states


def int8_directions() -> Tensor:
    """The directions of codec `int8`, int8 [256, 1]: codes are two's complement, -128 is -127."""
    return torch.arange(256, dtype=torch.uint8).view(torch.int8).clamp(-MAX_LEVEL).view(-1, 1)


def _sign_matrix(codes: Tensor, vector_dim: int) -> Tensor:
    """Sign bits of `codes` (int64 [...]) as 0/1, int64 [..., vector_dim]."""
    return (codes.unsqueeze(-1) >> torch.arange(vector_dim, device=codes.device)) & 1


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"codebook {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"its configuration asks for {dtype} {list(shape)}"
        )
