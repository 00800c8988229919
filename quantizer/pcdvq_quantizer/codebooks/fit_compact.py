"""Fit the codebooks of codec `compact` shipped in `tables/`.

    python -m pcdvq_quantizer.codebooks.fit_compact compact-2 compact-2.safetensors

Windows that slide over a row's bits select levels (FORMAT.md, "Windows"): a trellis-coded quantizer
(Marcellin and Fischer 1990) whose trellis is a shift register, as in QTIP (arXiv 2406.11235), and
whose levels are a table small enough for the registers of a CPU.

Fitting alternates between the Viterbi search on N(0, 1) samples and setting each level to the mean
of what it stands for. Levels are shaken less and less, or the first labelling found would stay
(stochastic relaxation: Zeger, Vaisey and Gersho 1992, "Globally optimal vector quantizer design").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from pcdvq_kernels import windows
from pcdvq_kernels.codebook import MAX_LEVEL, Codebook, code_states
from pcdvq_kernels.config import SEGMENT_ROWS, CodebookSpec
from pcdvq_kernels.trellis import window_codes
from torch import Tensor

from pcdvq_quantizer.codebooks import NamedCodebook, save_codebook

SEED = 20250605
STARTS = 8
ITERATIONS = 1000
GROUPS = 1 << 15  # of samples in an iteration
RESAMPLE = 8  # iterations that share samples
TEST_GROUPS = 1 << 18
SHAKEN = 0.8  # part of the iterations
ROUNDINGS = 8


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One codebook.

    `clip` is the standard deviation that the largest level stands for: a larger one makes coarser
    steps. `noise` is that of levels at first, in standard deviations.
    """

    id: str
    code_bits: int
    clip: float
    noise: float

    def spec(self) -> CodebookSpec:
        return CodebookSpec(
            codec="compact",
            vector_dim=4,
            signs=False,
            parity=False,
            pattern_bits=self.code_bits,
            magnitude_bits=0,
            shift=0,
            state_bits=windows.state_bits(self.code_bits),
        )


VARIANTS = {
    v.id: v
    for v in (
        Variant(id="compact-2", code_bits=8, clip=2.8, noise=0.4),
        Variant(id="compact-3", code_bits=12, clip=3.2, noise=0.2),
        Variant(id="compact-4", code_bits=16, clip=3.6, noise=0.08),
    )
}


def sample(groups: int, generator: torch.Generator) -> Tensor:
    """N(0, 1) samples [rows, groups per row, 4]."""
    rows = 32 * SEGMENT_ROWS
    return torch.randn(rows, groups // rows, windows.DIM, generator=generator)


def start(variant: Variant, generator: torch.Generator) -> Tensor:
    """A table of quantiles of N(0, 1): every history has levels all over, at places of its own."""
    older, new = windows.state_bits(variant.code_bits), variant.code_bits // windows.DIM
    columns = []
    for _ in range(windows.DIM):
        offset = (torch.randperm(1 << older, generator=generator) + 0.5) / (1 << older)
        columns.append((torch.arange(1 << new).unsqueeze(1) + offset) / (1 << new))
    return torch.special.ndtri(torch.stack([column.flatten() for column in columns], 1))


@dataclass(frozen=True)
class Assignment:
    """Sums and counts of the samples that each level stands for, fp32 [128, 4], and their error."""

    total: Tensor
    count: Tensor
    error: float


def assign(x: Tensor, table: Tensor, code_bits: int) -> Assignment:
    """Search for the codes of samples x [N, G, 4]."""
    codes = window_codes(x, torch.ones(len(x)), table, code_bits).long()
    states = code_states(codes, code_bits, windows.state_bits(code_bits))
    rows = windows.table_rows(codes, states, code_bits)
    error = (windows.look_up(table, rows) - x).square().mean().item()
    rows, x = rows.flatten(0, 1), x.flatten(0, 1)
    total = torch.zeros_like(table).scatter_add_(0, rows, x)
    count = torch.zeros_like(table).scatter_add_(0, rows, torch.ones_like(x))
    return Assignment(total, count, error)


def centroids(table: Tensor, assignment: Assignment) -> Tensor:
    mean = assignment.total / assignment.count.clamp(min=1)
    return torch.where(assignment.count > 0, mean, table)


def fit_float(variant: Variant, generator: torch.Generator) -> Tensor:
    """A table [128, 4] in standard deviations, from one start."""
    table = start(variant, generator)
    for i in range(ITERATIONS):
        if i % RESAMPLE == 0:
            x = sample(GROUPS, generator)
        table = centroids(table, assign(x, table, variant.code_bits))
        noise = variant.noise * max(0.0, 1 - i / (SHAKEN * ITERATIONS)) ** 1.5
        table += noise * torch.randn(table.shape, generator=generator)
    return table


def fit(variant: Variant) -> tuple[NamedCodebook, float]:
    """Fit one variant; the error is measured on samples that took no part in the fit."""
    generator = torch.Generator().manual_seed(SEED)
    tables = [fit_float(variant, generator) for _ in range(STARTS)]
    x = sample(TEST_GROUPS, generator)
    table = min(tables, key=lambda table: assign(x, table, variant.code_bits).error)
    unit, best = MAX_LEVEL / variant.clip, (table, float("inf"))
    for _ in range(ROUNDINGS):
        integers = (table * unit).round().clamp(-MAX_LEVEL, MAX_LEVEL)
        assignment = assign(x, integers / unit, variant.code_bits)
        if assignment.error < best[1]:
            best = integers, assignment.error
        table = centroids(table, assignment)
    integers = best[0]
    error = assign(sample(TEST_GROUPS, generator), integers / unit, variant.code_bits).error
    codebook = Codebook(variant.spec(), integers.to(torch.int8), torch.ones(1, dtype=torch.uint8))
    return NamedCodebook(variant.id, codebook, unit), error


def main(
    codebook: Annotated[str, typer.Argument(help=f"One of {', '.join(VARIANTS)}.")],
    output: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
) -> None:
    """Fit a codebook of codec `compact` to N(0, 1) weights."""
    if codebook not in VARIANTS:
        raise typer.BadParameter(f"{codebook} is not one of {', '.join(VARIANTS)}")
    named, error = fit(VARIANTS[codebook])
    save_codebook(named, output)
    print(f"{output}: unit {named.unit:.4f}, mean squared error {error:.5f}")


if __name__ == "__main__":
    typer.run(main)
