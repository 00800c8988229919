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


def _spec(
    vector_dim: int,
    signs: bool,
    parity: bool,
    pattern_bits: int,
    magnitude_bits: int,
    *,
    rotation_bits: int = 0,
    state_bits: int = 0,
) -> CodebookSpec:
    return CodebookSpec(
        codec="trellis" if state_bits else "signed" if signs else "e8",
        vector_dim=vector_dim,
        signs=signs,
        parity=parity,
        pattern_bits=pattern_bits,
        magnitude_bits=magnitude_bits,
        shift=3,
        rotation_bits=rotation_bits,
        state_bits=state_bits,
    )


def _compact(code_bits: int) -> CodebookSpec:
    return CodebookSpec(
        codec="compact",
        vector_dim=4,
        signs=False,
        parity=False,
        pattern_bits=code_bits,
        magnitude_bits=0,
        shift=3,
        state_bits=5 - (code_bits - 8) // 4,
    )


def _pyramids(code_bits: int, pulses: tuple[int, ...]) -> CodebookSpec:
    return CodebookSpec(
        codec="pvq",
        vector_dim=8,
        signs=False,
        parity=False,
        pattern_bits=code_bits,
        magnitude_bits=0,
        shift=3,
        pulses=pulses,
    )


# The layouts with a kernel of their own, then ones that take the generic decoder.
SPECS = {
    "signed-8x16": _spec(8, True, True, 7, 1),
    "signed-8x18": _spec(8, True, True, 9, 1),
    "signed-4x12": _spec(4, True, True, 7, 1),
    "signed-4x16": _spec(4, True, False, 10, 2),
    "trellis-8x16": _spec(8, True, True, 8, 0, rotation_bits=3, state_bits=3),
    "trellis-8x18": _spec(8, True, True, 10, 0, rotation_bits=3, state_bits=3),
    "trellis-4x12": _spec(4, True, True, 8, 0, rotation_bits=2, state_bits=3),
    "trellis-4x16": _spec(4, True, False, 12, 0, rotation_bits=2, state_bits=2),
    "compact-4x8": _compact(8),
    "compact-4x12": _compact(12),
    "compact-4x16": _compact(16),
    "generic-trellis-4x8": _spec(4, True, True, 4, 0, state_bits=2),
    "generic-trellis-8x16": _spec(8, True, True, 8, 0, state_bits=4),
    "generic-trellis-8x11": _spec(8, True, False, 3, 0, rotation_bits=3, state_bits=3),
    "generic-trellis-4x15": _spec(4, True, True, 11, 0, rotation_bits=2, state_bits=1),
    "generic-trellis-2x8": _spec(2, True, False, 6, 0, state_bits=3),
    "generic-trellis-2x7": _spec(2, True, True, 5, 0, rotation_bits=1, state_bits=2),
    "generic-2x8": _spec(2, True, False, 5, 1),
    "generic-rotated-4x13": _spec(4, True, True, 9, 0, rotation_bits=2),
    "int8": CodebookSpec(
        codec="int8",
        vector_dim=1,
        signs=False,
        parity=False,
        pattern_bits=8,
        magnitude_bits=0,
        shift=0,
    ),
    "e8-16": _spec(8, False, False, 14, 2),
    "e8-18": _spec(8, False, False, 16, 2),
    "pvq-18": _pyramids(18, (8, 3)),
    "pvq-24": _pyramids(24, (11, 1, 14)),
    "pvq-26": _pyramids(26, (17, 15)),
    "pvq-32": _pyramids(32, (25, 12)),
    "generic-pvq-29": _pyramids(29, (26, 2)),
    "generic-8x1": _spec(8, False, False, 1, 0),
    "generic-8x13": _spec(8, True, False, 5, 0),
    "generic-8x24": _spec(8, True, True, 14, 2),
    "generic-4x11": _spec(4, True, False, 5, 2),
    "generic-2x20": _spec(2, True, True, 16, 2),
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
    lowest = 0 if spec.signs else -60
    directions = torch.randint(lowest, 61, (spec.rows, spec.vector_dim), generator=generator)
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
    qweight = _random_bytes((n, codebook.spec.row_bytes(k)), generator)
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
