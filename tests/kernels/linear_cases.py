"""Random layers for the kernel tests."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from pcdvq_kernels import reference
from pcdvq_kernels.codebook import MAX_LEVEL, Codebook, int8_directions
from pcdvq_kernels.config import Activations, CodebookSpec
from pcdvq_kernels.ops import Layout
from torch import Tensor


def _trellis(code_bits: int, chain_rows: int) -> CodebookSpec:
    return CodebookSpec(
        codec="trellis", vector_dim=2, pattern_bits=code_bits, chain_rows=chain_rows
    )


def _e8(pattern_bits: int, magnitude_bits: int) -> CodebookSpec:
    return CodebookSpec(
        codec="e8",
        vector_dim=8,
        pattern_bits=pattern_bits,
        magnitude_bits=magnitude_bits,
        shift=3,
    )


def _pyramids(code_bits: int, pulses: tuple[int, ...]) -> CodebookSpec:
    return CodebookSpec(codec="pvq", vector_dim=8, pattern_bits=code_bits, shift=3, pulses=pulses)


# The layouts with a kernel of their own, then ones that take the generic decoder.
SPECS = {
    "trellis-3x64": _trellis(3, 64),
    "trellis-4x64": _trellis(4, 64),
    "trellis-5x64": _trellis(5, 64),
    "trellis-6x64": _trellis(6, 64),
    "trellis-7x64": _trellis(7, 64),
    "trellis-8x64": _trellis(8, 64),
    "trellis-4x32": _trellis(4, 32),
    "trellis-5x32": _trellis(5, 32),
    "trellis-8x32": _trellis(8, 32),
    "trellis-3x16": _trellis(3, 16),
    "trellis-6x16": _trellis(6, 16),
    "trellis-7x16": _trellis(7, 16),
    "int8": CodebookSpec(codec="int8", vector_dim=1, pattern_bits=8),
    "e8-16": _e8(14, 2),
    "e8-18": _e8(16, 2),
    "pvq-18": _pyramids(18, (8, 3)),
    "pvq-24": _pyramids(24, (11, 1, 14)),
    "pvq-26": _pyramids(26, (17, 15)),
    "pvq-32": _pyramids(32, (25, 12)),
    "generic-pvq-29": _pyramids(29, (26, 2)),
    "generic-8x1": _e8(1, 0),
    "generic-8x13": _e8(13, 0),
    "generic-8x11": _e8(7, 4),
}
BLOCKS = {8: 2, 72: 8, 576: 64, 896: 128, 1536: 512, 4864: 256}


@dataclass(frozen=True)
class Case:
    """A random layer and activations."""

    x: Tensor
    qweight: Tensor
    row_scale: Tensor
    signs_in: Tensor
    codebook: Codebook
    codewords: Tensor
    block: int
    bias: Tensor | None = None
    activations: Activations = "float"  # as the reference computes

    def args(self) -> tuple:
        layout = Layout(self.block, self.codebook.spec, self.activations).to_ints()
        return (
            self.x,
            self.qweight,
            self.row_scale,
            self.signs_in,
            self.codewords,
            self.bias,
            layout,
        )

    def embedding_args(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple:
        _, *weight, _, layout = self.args()
        return ids, *weight, layout, dtype

    def reference(self) -> Tensor:
        return reference.linear(
            self.x,
            self.qweight,
            self.row_scale,
            self.signs_in,
            self.codebook,
            self.block,
            self.bias,
        )

    def embedding_reference(self, ids: Tensor) -> Tensor:
        return reference.embedding(
            ids, self.qweight, self.row_scale, self.signs_in, self.codebook, self.block
        )

    def error_scale(self) -> float:
        """Largest product of norms that an output's factors can have: rounding scales with it."""
        weight_norm = MAX_LEVEL * self.x.shape[-1] ** 0.5 * self.row_scale.abs().max()
        return (self.x.float().norm(dim=-1).max() * weight_norm).item()

    def with_x(self, x: Tensor) -> Case:
        return replace(self, x=x)


@cache
def random_codebook(codec: str) -> tuple[Codebook, Tensor]:
    """A codebook and its codewords; large ones take a while to make."""
    generator = torch.Generator().manual_seed(len(codec))
    spec = SPECS[codec]
    if codec == "int8":
        codebook = Codebook(spec, int8_directions(), torch.ones(1, dtype=torch.uint8))
        return codebook, codebook.codewords()
    directions = torch.randint(-60, 61, (spec.rows, spec.vector_dim), generator=generator)
    highest = 129 if spec.pulses else 17  # levels of pyramids may be cut
    magnitudes = torch.randint(1, highest, (spec.magnitude_count,), generator=generator)
    codebook = Codebook(spec, directions.to(torch.int8), magnitudes.to(torch.uint8))
    return codebook, codebook.codewords()


def random_case(
    codec: str, m: int, n: int, k: int, *, block: int | None = None, bias: bool = False
) -> Case:
    generator = torch.Generator().manual_seed(m + 1000 * n + k)
    codebook, codewords = random_codebook(codec)
    x = torch.randn(m, k, generator=generator)
    shape = codebook.spec.stored_rows(n), codebook.spec.row_bytes(k)
    qweight = _random_bytes(shape, generator)
    row_scale = (torch.rand(n, generator=generator) - 0.25) / 48
    row_scale[6::7] = 0
    return Case(
        x=x,
        qweight=qweight,
        row_scale=row_scale,
        signs_in=_random_bytes((k // 8,), generator),
        codebook=codebook,
        codewords=codewords,
        block=BLOCKS[k] if block is None else block,
        bias=torch.randn(n, generator=generator) if bias else None,
    )


def unit_case(n: int) -> Case:
    """N equal rows with level 1 throughout and row scale 1, K = 8, no signs, no rotation."""
    spec = SPECS["generic-8x1"]
    directions = torch.full((spec.rows, 8), 8, dtype=torch.int8)
    codebook = Codebook(spec, directions, torch.ones(1, dtype=torch.uint8))
    return Case(
        x=torch.zeros(1, 8),
        qweight=torch.zeros(n, 1, dtype=torch.uint8),
        row_scale=torch.ones(n),
        signs_in=torch.zeros(1, dtype=torch.uint8),
        codebook=codebook,
        codewords=codebook.codewords(),
        block=1,
    )


def _random_bytes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def guarded_bytes(data: Tensor) -> Tensor:
    """A copy of `data` whose last byte is the last of its page; the next page is unreadable."""
    page = mmap.PAGESIZE
    size = -(-data.numel() // page) * page
    area = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0):
        pytest.skip("mprotect is not available")
    copy = torch.frombuffer(area, dtype=data.dtype, count=size)[size - data.numel() :]
    return copy.copy_(data.flatten()).view(data.shape)
