"""Fit the trellis codebooks shipped in `tables/`.

    python -m pcdvq_quantizer.codebooks.fit_trellis trellis-2 trellis-2.safetensors

A trellis code is signs and a pattern, as in the signed codec (`fit`), but the directions a pattern
selects from also depend on the code of the same group in the row above (FORMAT.md, "States"): a
trellis-coded vector quantizer (Marcellin and Fischer 1990, "Trellis coded quantization of
memoryless and Gauss-Markov sources"), searched by the Viterbi algorithm.

Fitting alternates between that search on N(0, 1) samples and setting each row of the table to the
mean of what it stands for, first in floating point, then with entries rounded to integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from pcdvq_kernels.codebook import MAX_LEVEL, Codebook, expand_patterns, rotated_coordinates
from pcdvq_kernels.config import SEGMENT_ROWS, CodebookSpec
from pcdvq_kernels.trellis import trellis_codes
from torch import Tensor

from pcdvq_quantizer.codebooks import NamedCodebook, save_codebook

SEED = 20250605


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Layout and fitting effort of one codebook.

    `id` is its codec and bits. `clip` is the standard deviation that the largest entry stands for:
    a larger one makes coarser steps. `iterations` of the floating-point fit take `groups` samples.
    """

    id: str
    vector_dim: Literal[2, 4, 8]
    parity: bool
    pattern_bits: int
    rotation_bits: int
    state_bits: int
    clip: float
    groups: int = 200_000
    iterations: int = 100

    def spec(self) -> CodebookSpec:
        return CodebookSpec(
            codec="trellis",
            vector_dim=self.vector_dim,
            signs=True,
            parity=self.parity,
            pattern_bits=self.pattern_bits,
            magnitude_bits=0,
            shift=0,
            rotation_bits=self.rotation_bits,
            state_bits=self.state_bits,
        )

    def sample(self, groups: int, generator: torch.Generator) -> Tensor:
        """N(0, 1) samples [rows, groups per row, g]."""
        rows = 32 * SEGMENT_ROWS
        return torch.randn(rows, groups // rows, self.vector_dim, generator=generator)


_TRELLIS_2 = Variant(
    id="trellis-2", vector_dim=8, parity=True, pattern_bits=8, rotation_bits=3, state_bits=3,
    clip=3.0,
)  # fmt: skip
_TRELLIS_3 = replace(_TRELLIS_2, id="trellis-3", vector_dim=4, rotation_bits=2, clip=3.4)
# As in `signed` at this rate, parity gains nothing. Four states keep the table at 16 KiB.
_TRELLIS_4 = Variant(
    id="trellis-4", vector_dim=4, parity=False, pattern_bits=12, rotation_bits=2, state_bits=2,
    clip=3.6, groups=100_000, iterations=30,
)  # fmt: skip
_TRELLIS_2_25 = replace(
    _TRELLIS_2, id="trellis-2.25", pattern_bits=10, groups=150_000, iterations=25
)
VARIANTS = {v.id: v for v in (_TRELLIS_2, _TRELLIS_2_25, _TRELLIS_3, _TRELLIS_4)}


@dataclass(frozen=True)
class Assignment:
    """What the search chose for samples [N, G, g], in the order of the samples.

    Attributes:
        row: row of the table, int64 [N * G].
        target: what that row stands for, samples without their signs and rotation, fp32 [N * G, g].
    """

    row: Tensor
    target: Tensor


def assign(x: Tensor, table: Tensor, spec: CodebookSpec) -> Assignment:
    """Search for the codes of samples x [N, G, g] under a floating-point table [spec.rows, g]."""
    codewords = expand_patterns(table, spec).reshape(-1, spec.vector_dim)
    codes = trellis_codes(x, torch.ones(len(x)), codewords, spec.parity, spec.state_bits).long()
    # Which row a code selects does not depend on what the row holds.
    layout = Codebook(
        spec,
        torch.zeros(spec.rows, spec.vector_dim, dtype=torch.int8),
        torch.ones(1, dtype=torch.uint8),
    )
    negative = codes.unsqueeze(-1) >> torch.arange(spec.vector_dim) & 1
    target = x * (1 - 2 * negative)
    if spec.rotation_bits:
        rotation = codes >> (spec.sign_bits + spec.base_bits)
        target = target.gather(-1, rotated_coordinates(-rotation, spec.vector_dim))
    return Assignment(layout.codeword_index(codes).flatten(), target.flatten(0, 1))


def centroids(table: Tensor, assignment: Assignment) -> Tensor:
    """The table [rows, g] with every row that is in use moved to its mean, not below zero."""
    row = assignment.row
    total = torch.zeros_like(table).index_add_(0, row, assignment.target)
    count = torch.bincount(row, minlength=len(table)).unsqueeze(1)
    return torch.where(count > 0, total / count, table).clamp(min=0)


def mean_squared_error(table: Tensor, assignment: Assignment) -> float:
    """Error per weight of an assignment under `table`."""
    return (table[assignment.row] - assignment.target).double().square().mean().item()


def fit_float(variant: Variant, generator: torch.Generator) -> Tensor:
    """Search and centroids in turn from a random table: fp32 [rows, g], in standard deviations."""
    spec, g = variant.spec(), variant.vector_dim
    x = variant.sample(variant.groups, generator)
    # Best for many codewords: normal with variance (g + 2) / g, see `fit.fit_from_random`.
    table = torch.randn(spec.rows, g, generator=generator).abs() * ((g + 2) / g) ** 0.5
    for _ in range(variant.iterations):
        table = centroids(table, assign(x, table, spec))
    return table


def round_table(
    table: Tensor, variant: Variant, generator: torch.Generator, iterations: int = 5
) -> tuple[Tensor, float]:
    """Integer table [rows, g] and its levels per standard deviation, the best seen on the way."""
    spec, unit = variant.spec(), MAX_LEVEL / variant.clip
    x = variant.sample(2 * variant.groups, generator)
    best, lowest = (table, unit), float("inf")
    for _ in range(iterations):
        integers = (table * unit).round().clamp(max=MAX_LEVEL)
        assignment = assign(x, integers / unit, spec)
        error = mean_squared_error(integers / unit, assignment)
        if error < lowest:
            level = integers[assignment.row]
            refitted = level.square().sum() / (level * assignment.target).sum()
            best, lowest = (integers, refitted.item()), error
        table = centroids(table, assignment)
    return best


def fit(variant: Variant) -> tuple[NamedCodebook, float]:
    """Fit one variant; the error is measured on samples that took no part in the fit."""
    generator = torch.Generator().manual_seed(SEED)
    spec = variant.spec()
    integers, unit = round_table(fit_float(variant, generator), variant, generator)
    x = variant.sample(400_000, generator)
    error = mean_squared_error(integers / unit, assign(x, integers / unit, spec))
    codebook = Codebook(spec, integers.to(torch.int8), torch.ones(1, dtype=torch.uint8))
    return NamedCodebook(variant.id, codebook, unit), error


def main(
    codebook: Annotated[str, typer.Argument(help=f"One of {', '.join(VARIANTS)}.")],
    output: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
) -> None:
    """Fit a trellis codebook to N(0, 1) weights."""
    if codebook not in VARIANTS:
        raise typer.BadParameter(f"{codebook} is not one of {', '.join(VARIANTS)}")
    named, error = fit(VARIANTS[codebook])
    save_codebook(named, output)
    print(f"{output}: unit {named.unit:.4f}, mean squared error {error:.5f}")


if __name__ == "__main__":
    typer.run(main)
