"""Fit the signed codebooks shipped in `tables/`.

    python -m pcdvq_quantizer.codebooks.fit --bits 2 --output signed-2.safetensors

A signed codebook codes a group of g weights, N(0, 1) after incoherence processing, as g sign
bits, a pattern and a magnitude: the polar decoupling of PCDVQ (arXiv 2506.05432) with the signs
split off the direction. Directions are non-negative; with `parity`, each pattern has two rows and
the parity of the sign bits selects one. Patterns are the cyclic rotations of base rows,

    pattern = base | rotation << base_bits
    directions[row][j] = base_row[(rotation + j) % g]
    level[j] = (directions[row][j] * magnitudes[magnitude] + (1 << shift >> 1)) >> shift

negated where sign bit j is set, approximates `unit` times weight j.

Fitting runs k-means on folded samples in floating point, rounds to integers, continues with
rounded centroids, and polishes by coordinate descent. A sample x is folded to y = |x|, once per
parity; where x itself has the other parity, its smallest coordinate is negated. Since
|y|^2 = |x|^2, the codeword c closest to x is the one with the largest score y.c - |c|^2 / 2.

Letters in shapes: G samples, g vector_dim, P parities (2, or 1 without `parity`), B base rows per
parity, R rotations, M magnitudes, K = R * B * M codewords per parity,
ordered [rotation, base, magnitude].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import CodebookSpec
from torch import Tensor

from pcdvq_quantizer.codebooks import NamedCodebook, save_codebook

SEED = 20250605
_SCORES_PER_CHUNK = 1 << 20  # 4 MiB of fp32 scores stay in cache between product and maximum


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Layout and fitting effort of one codebook.

    `magnitudes` fixes the integer magnitudes; None takes them from the floating-point fit, the
    largest being 1 << shift. `top_entries` are the values tried for the largest direction entry
    before it is clamped to `entry_max`: a larger one makes finer steps and clips more.
    `wedge_iterations` of k-means, cheaper by the number of rotations, precede the others on
    samples rotated to have their largest coordinate first, where codewords need not be rotated.
    """

    bits: str
    vector_dim: Literal[4, 8]
    parity: bool
    base_bits: int
    rotation_bits: int
    shift: int
    entry_max: int
    top_entries: tuple[float, ...]
    magnitudes: tuple[int, ...] | None = None
    magnitude_bits: int = 1
    samples: int = 200_000
    restarts: int = 1
    wedge_iterations: int = 0
    iterations: int = 60
    final_samples: int = 400_000
    polish_sweeps: int = 0

    @property
    def pattern_bits(self) -> int:
        return self.base_bits + self.rotation_bits

    def rotations(self) -> Tensor:
        """Source coordinate of every rotated coordinate: int64 [R, g]."""
        rotation = torch.arange(1 << self.rotation_bits)[:, None]
        return (rotation + torch.arange(self.vector_dim)) % self.vector_dim


# Entries 0..15 fit a nibble, and 15 * 7 fits int8 without a shift.
_SIGNED_2 = Variant(
    bits="2", vector_dim=8, parity=True, base_bits=4, rotation_bits=3,
    shift=0, entry_max=15, top_entries=(14, 15, 16, 17), magnitudes=(5, 7),
    samples=100_000, restarts=8, polish_sweeps=4,
)  # fmt: skip
_SIGNED_3 = Variant(
    bits="3", vector_dim=4, parity=True, base_bits=5, rotation_bits=2,
    shift=7, entry_max=127, top_entries=(127, 140, 155), restarts=4,
)  # fmt: skip
# At 4 bits the smallest coordinate is seldom near zero, and parity gains nothing.
_SIGNED_4 = replace(
    _SIGNED_3, bits="4", parity=False, base_bits=8, magnitude_bits=2, top_entries=(127, 145),
    samples=400_000, restarts=1, wedge_iterations=50, iterations=1,
)  # fmt: skip
_SIGNED_2_25 = replace(
    _SIGNED_2, bits="2.25", base_bits=6, top_entries=(15, 16),
    samples=150_000, restarts=1, iterations=40, final_samples=300_000, polish_sweeps=2,
)  # fmt: skip
VARIANTS = {v.bits: v for v in (_SIGNED_2, _SIGNED_2_25, _SIGNED_3, _SIGNED_4)}


@dataclass(frozen=True)
class IntegerCodebook:
    """Base rows int64 [B, P, g], magnitudes int64 [M] and levels per standard deviation."""

    base: Tensor
    magnitudes: Tensor
    unit: float


def fold(x: Tensor, parity: bool) -> Tensor:
    """The foldings [P, G, g] of samples x [G, g], indexed by the parity of the coded signs."""
    even = x.abs()
    if not parity:
        return even[None]
    smallest = even.argmin(1, keepdim=True)
    odd = even.scatter(1, smallest, -even.gather(1, smallest))
    is_odd = ((x < 0).sum(1, keepdim=True) & 1).bool()
    return torch.stack([torch.where(is_odd, odd, even), torch.where(is_odd, even, odd)])


def sample_folded(variant: Variant, count: int, generator: torch.Generator) -> Tensor:
    """Folded N(0, 1) samples [P, count, g]."""
    return fold(torch.randn(count, variant.vector_dim, generator=generator), variant.parity)


def rotate_largest_first(y: Tensor) -> Tensor:
    """Vectors [..., g], each rotated cyclically to start with its largest coordinate."""
    source = y.argmax(-1, keepdim=True) + torch.arange(y.shape[-1])
    return y.gather(-1, source % y.shape[-1])


def expand_directions(base: Tensor, rotations: Tensor) -> Tensor:
    """Directions [P, R * B, g] from base rows [B, P, g]."""
    rotated = base[:, :, rotations]  # [B, P, R, g]
    return rotated.permute(1, 2, 0, 3).flatten(1, 2)


def expand_codewords(base: Tensor, magnitudes: Tensor, rotations: Tensor) -> Tensor:
    """Every direction times every magnitude: [P, K, g]."""
    directions = expand_directions(base, rotations)
    return (directions[:, :, None] * magnitudes[:, None]).flatten(1, 2)


def integer_levels(codebook: IntegerCodebook, variant: Variant) -> Tensor:
    """Levels int64 [P, K, g]."""
    products = expand_codewords(codebook.base, codebook.magnitudes, variant.rotations())
    return (products + (1 << variant.shift >> 1)) >> variant.shift


def score_weights(codewords: Tensor) -> Tensor:
    """Weights [..., g + 1, K] that turn samples with a 1 appended into scores."""
    half_norm = codewords.square().sum(-1, keepdim=True) / 2
    return torch.cat([codewords, -half_norm], -1).transpose(-1, -2).contiguous()


def append_one(y: Tensor) -> Tensor:
    return torch.cat([y, torch.ones(*y.shape[:-1], 1)], -1)


def assign(y: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codeword of each sample, as parity * K + k [G], and its score [G]."""
    count = codewords.shape[1]
    scores, indices = [], []
    for samples, weights in zip(append_one(y), score_weights(codewords), strict=True):
        chunks = samples.split(max(1, _SCORES_PER_CHUNK // count))
        best = [(chunk @ weights).max(1) for chunk in chunks]
        scores.append(torch.cat([part.values for part in best]))
        indices.append(torch.cat([part.indices for part in best]))
    score, parity = torch.stack(scores).max(0)
    index = torch.stack(indices).gather(0, parity[None])[0]
    return parity * count + index, score


def mean_squared_error(y: Tensor, score: Tensor) -> float:
    """Error per weight of samples y [P, G, g] coded with these scores [G]."""
    energy = y[0].double().square().sum()
    return ((energy - 2 * score.double().sum()) / y[0].numel()).item()


def select_folding(y: Tensor, nearest: Tensor, codewords: Tensor) -> Tensor:
    """The folding [G, g] of each sample that has the parity of its nearest codeword [G]."""
    return y[nearest // codewords.shape[1], torch.arange(len(nearest))]


def update_base(
    base: Tensor, magnitudes: Tensor, rotations: Tensor, y: Tensor, nearest: Tensor
) -> Tensor:
    """Least-squares non-negative base rows [B, P, g] for fixed nearest codewords.

    y [G, g] is in the folding of its codeword, nearest [G] comes from `assign`, magnitudes [M]
    multiply the rows. Rows that no sample uses keep their value.
    """
    shape = (base.shape[1], len(rotations), len(base))
    row, weight = nearest // len(magnitudes), magnitudes[nearest % len(magnitudes)]
    total = torch.zeros(shape).flatten().index_add_(0, row, weight.square())
    moment = torch.zeros(len(total), y.shape[1]).index_add_(0, row, weight[:, None] * y)
    moment = moment.view(*shape, -1).permute(2, 0, 1, 3)  # [B, P, R, g]
    inverse = rotations.argsort(1).expand_as(moment)
    moment = moment.gather(3, inverse).sum(2)  # [B, P, g]
    total = total.view(shape).permute(2, 0, 1).sum(2)[..., None]  # [B, P, 1]
    return torch.where(total > 0, moment / total, base).clamp(min=0)


def update_magnitudes(
    directions: Tensor, magnitude_count: int, y: Tensor, nearest: Tensor
) -> Tensor:
    """Least-squares magnitudes [M], the largest scaled to 1, for directions [P, R * B, g]."""
    direction = directions.flatten(0, 1)[nearest // magnitude_count]  # [G, g]
    magnitude = nearest % magnitude_count
    zero = torch.zeros(magnitude_count)
    projection = zero.index_add(0, magnitude, (y * direction).sum(1))
    energy = zero.index_add(0, magnitude, direction.square().sum(1))
    fitted = projection / energy
    return fitted / fitted.max()


def fit_float(
    y: Tensor, base: Tensor, magnitudes: Tensor, rotations: Tensor, iterations: int
) -> tuple[Tensor, Tensor, float]:
    """K-means on folded samples y [P, G, g]: base rows, magnitudes and the last error seen."""
    error = float("inf")
    for _ in range(iterations):
        codewords = expand_codewords(base, magnitudes, rotations)
        nearest, score = assign(y, codewords)
        error = mean_squared_error(y, score)
        folded = select_folding(y, nearest, codewords)
        base = update_base(base, magnitudes, rotations, folded, nearest)
        directions = expand_directions(base, rotations)
        magnitudes = update_magnitudes(directions, len(magnitudes), folded, nearest)
    return base, magnitudes, error


def fit_from_random(
    variant: Variant, y: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """`fit_float` from random base rows.

    Their distribution is the best one for many codewords, density^(g / (g + 2)): normal with
    variance (g + 2) / g (Gersho 1979, "Asymptotically optimal block quantization").
    """
    magnitudes = torch.linspace(0.75, 1, 1 << variant.magnitude_bits)
    g, rotations = variant.vector_dim, variant.rotations()
    base = torch.randn(1 << variant.base_bits, 1 + variant.parity, g, generator=generator).abs()
    base *= ((g + 2) / g) ** 0.5 / magnitudes.mean()
    if variant.wedge_iterations:
        wedge, base = rotate_largest_first(y), rotate_largest_first(base)
        fitted = fit_float(wedge, base, magnitudes, rotations[:1], variant.wedge_iterations)
        base, magnitudes, _ = fitted
    return fit_float(y, base, magnitudes, rotations, variant.iterations)


def refit_unit(
    codebook: IntegerCodebook, variant: Variant, y: Tensor
) -> tuple[IntegerCodebook, float, Tensor]:
    """The codebook with its least-squares `unit`; the error and nearest [G] at the old one."""
    levels = integer_levels(codebook, variant).float()
    nearest, score = assign(y, levels / codebook.unit)
    level = levels.flatten(0, 1)[nearest]  # [G, g]
    folded = select_folding(y, nearest, levels)
    unit = (level.square().sum() / (folded * level).sum()).item()
    return replace(codebook, unit=unit), mean_squared_error(y, score), nearest


def fit_integer(
    codebook: IntegerCodebook, variant: Variant, y: Tensor, iterations: int
) -> tuple[IntegerCodebook, float]:
    """K-means with rounded base rows on y [P, G, g]: the best codebook seen and its error."""
    best, lowest = codebook, float("inf")
    for _ in range(iterations):
        refitted, error, nearest = refit_unit(codebook, variant, y)
        if error < lowest:
            best, lowest = refitted, error
        multipliers = codebook.magnitudes / (refitted.unit * (1 << variant.shift))
        folded = select_folding(y, nearest, integer_levels(codebook, variant))
        base = update_base(codebook.base.float(), multipliers, variant.rotations(), folded, nearest)
        codebook = replace(refitted, base=base.round().clamp(max=variant.entry_max).long())
    return best, lowest


def round_codebook(
    base: Tensor, magnitudes: Tensor, variant: Variant, y: Tensor
) -> IntegerCodebook:
    """Integer codebook from floating-point base rows and magnitudes, at the best scale tried."""
    if variant.magnitudes is None:
        integers = (magnitudes * (1 << variant.shift)).round().long()
    else:
        integers = torch.tensor(variant.magnitudes)
    candidates = []
    for top in variant.top_entries:
        scale = top / base.max().item()
        rounded = (base * scale).round().clamp(max=variant.entry_max).long()
        unit = scale * integers.max().item() / (1 << variant.shift)
        codebook = IntegerCodebook(rounded, integers, unit)
        candidates.append(fit_integer(codebook, variant, y, iterations=8))
    return min(candidates, key=lambda candidate: candidate[1])[0]


def row_scores(
    row: Tensor, parity: int, codebook: IntegerCodebook, variant: Variant, y: Tensor
) -> Tensor:
    """Best score [G] that the patterns of one base row [g] reach on y [P, G, g + 1]."""
    products = row[variant.rotations()][:, None] * codebook.magnitudes[:, None]
    levels = (products + (1 << variant.shift >> 1)) >> variant.shift  # [R, M, g]
    weights = score_weights(levels.flatten(0, 1) / codebook.unit)
    return torch.cat([(chunk @ weights).amax(1) for chunk in y[parity].split(1 << 12)])


def polish_row(
    row: Tensor, parity: int, others: Tensor, codebook: IntegerCodebook, variant: Variant, y: Tensor
) -> Tensor:
    """Change the entries of one base row [g] by 1 wherever that raises the total score.

    others [G] is the best score of all the other rows. Returns the row's scores [G]; `row` is
    updated in place.
    """
    scores = row_scores(row, parity, codebook, variant, y)
    highest = torch.maximum(others, scores).double().sum()
    for j in range(len(row)):
        for step in (1, -1):
            moved = row.clone()
            moved[j] += step
            if not 0 <= moved[j] <= variant.entry_max:
                continue
            moved_scores = row_scores(moved, parity, codebook, variant, y)
            total = torch.maximum(others, moved_scores).double().sum()
            if total > highest:
                row.copy_(moved)
                scores, highest = moved_scores, total
    return scores


def polish(codebook: IntegerCodebook, variant: Variant, y: Tensor) -> IntegerCodebook:
    """Coordinate descent over all integer entries on folded samples y [P, G, g]."""
    y_one = append_one(y)
    rows = [(b, parity) for b in range(len(codebook.base)) for parity in range(1 + variant.parity)]
    for _ in range(variant.polish_sweeps):
        codebook, _, _ = refit_unit(codebook, variant, y)
        base = codebook.base.clone()
        scores = torch.stack([row_scores(base[r], r[1], codebook, variant, y_one) for r in rows])
        for index, (b, parity) in enumerate(rows):
            scores[index] = -torch.inf
            others = scores.amax(0)
            scores[index] = polish_row(base[b, parity], parity, others, codebook, variant, y_one)
        codebook = replace(codebook, base=base)
    return codebook


def fit(variant: Variant) -> tuple[IntegerCodebook, float]:
    """Fit one variant; the error is measured on samples that took no part in the fit."""
    generator = torch.Generator().manual_seed(SEED)
    y = sample_folded(variant, variant.samples, generator)
    fits = [fit_from_random(variant, y, generator) for _ in range(variant.restarts)]
    base, magnitudes, _ = min(fits, key=lambda fitted: fitted[2])
    y = sample_folded(variant, variant.final_samples, generator)
    base, magnitudes, _ = fit_float(y, base, magnitudes, variant.rotations(), iterations=4)
    codebook = polish(round_codebook(base, magnitudes, variant, y), variant, y)
    codebook, _, _ = refit_unit(codebook, variant, y)
    _, error, _ = refit_unit(codebook, variant, sample_folded(variant, 2_000_000, generator))
    return codebook, error


def to_named_codebook(codebook: IntegerCodebook, variant: Variant) -> NamedCodebook:
    """The codebook as checkpoints store it, rows ordered [pattern][parity]."""
    directions = expand_directions(codebook.base, variant.rotations())  # [P, R * B, g]
    spec = CodebookSpec(
        codec="signed",
        vector_dim=variant.vector_dim,
        signs=True,
        parity=variant.parity,
        pattern_bits=variant.pattern_bits,
        magnitude_bits=variant.magnitude_bits,
        shift=variant.shift,
    )
    tables = Codebook(
        spec,
        directions.transpose(0, 1).flatten(0, 1).to(torch.int8),
        codebook.magnitudes.to(torch.uint8),
    )
    return NamedCodebook(f"signed-{variant.bits}", tables, codebook.unit)


def main(
    bits: Annotated[str, typer.Option(help=f"Bits per weight: {', '.join(VARIANTS)}.")],
    output: Annotated[Path, typer.Option(help="Safetensors file to write.")],
) -> None:
    """Fit a signed codebook to N(0, 1) weights."""
    if bits not in VARIANTS:
        raise typer.BadParameter(f"{bits} is not one of {', '.join(VARIANTS)}")
    codebook, error = fit(VARIANTS[bits])
    save_codebook(to_named_codebook(codebook, VARIANTS[bits]), output)
    print(f"{output}: unit {codebook.unit:.4f}, mean squared error {error:.5f}")


if __name__ == "__main__":
    typer.run(main)
