"""Fit the pvq codebooks shipped in `tables/`: how many pulses, and the magnitudes.

    python -m pcdvq_quantizer.codebooks.fit_pvq --bits 2 --output pvq-2.safetensors

A group is a point of an integer pyramid P(8, K) times a magnitude (FORMAT.md, "Pyramid codes"). Its
codes are divided among magnitudes, each of which has a pyramid of its own: the finer the more
often it is used and the larger its errors are. Magnitudes are the optimum for N(0, 1): each is the
least-squares scale of the samples that are nearest to its points (Lloyd), then rounded to integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from pcdvq_kernels import pyramid
from pcdvq_kernels.codebook import MAX_MAGNITUDE, Codebook
from pcdvq_kernels.config import CodebookSpec
from torch import Tensor

from pcdvq_quantizer.codebooks import NamedCodebook, save_codebook
from pcdvq_quantizer.pyramid_search import nearest_points

SEED = 20250605
GROUPS = 1 << 15  # samples of the fit
ROUNDS = 12
UNITS = torch.arange(16.0, 36.0, 0.25)  # levels per standard deviation that are tried
# Of each rate: exchanging a pulse between any two magnitudes, or a magnitude more, gains under 1 %.
PULSES = {
    "2": (5, 6, 6),
    "2.25": (4, 6, 8, 7),
    "3": (11, 13, 13, 13, 13),
    "3.25": (13, 15, 16, 17, 15),
    "4": (21, 24, 24, 24, 25, 25, 24, 26, 26, 27, 27, 26),
}


@dataclass(frozen=True)
class Fit:
    """Steps (standard deviations per pulse) of each magnitude, and the mean squared error."""

    steps: Tensor
    error: float


def fit_steps(pulses: tuple[int, ...], x: Tensor, rounds: int = ROUNDS) -> Fit:
    """The best steps for samples `x` [G, 8]."""
    total = torch.tensor(pulses)
    magnitudes = x.abs().sum(1).quantile((torch.arange(len(pulses)) + 0.5) / len(pulses))
    steps = magnitudes / total
    for _ in range(rounds):
        points, best, _ = assign(pulses, steps, x)
        used = torch.zeros(2, len(pulses)).index_add_(
            1, best, torch.stack([(points * x).sum(1), points.square().sum(1)])
        )
        steps = torch.where(used[1] > 0, used[0] / used[1], steps)
    return Fit(steps, assign(pulses, steps, x)[2])


def assign(pulses: tuple[int, ...], steps: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Nearest points fp32 [G, 8] of samples x [G, 8], their magnitudes [G], and the mean error."""
    each = [
        nearest_points(x / step, torch.full((len(x),), total)).float()
        for total, step in zip(pulses, steps, strict=True)
    ]
    errors = [(point * step - x).square().sum(1) for point, step in zip(each, steps, strict=True)]
    error, best = torch.stack(errors).min(0)
    return torch.stack(each)[best, torch.arange(len(x))], best, error.mean().item() / x.shape[1]


def round_magnitudes(spec: CodebookSpec, steps: Tensor, x: Tensor) -> NamedCodebook:
    """The codebook of `steps` with the shift and the unit that make the least error."""
    found, lowest = None, float("inf")
    none = torch.empty(0, pyramid.DIM, dtype=torch.int8)
    for shift in range(4):
        layout = spec.model_copy(update={"shift": shift})
        for unit in UNITS.tolist():
            magnitudes = (steps * unit * (1 << shift)).round()
            if magnitudes.max() > MAX_MAGNITUDE or magnitudes.min() < 1:
                continue
            book = Codebook(layout, none, magnitudes.to(torch.uint8))
            named = NamedCodebook(f"pvq-{spec.bits:g}", book, unit)
            if (error := measure(named, x)) < lowest:
                found, lowest = named, error
    assert found is not None  # unit 16 and shift 0 suit all steps
    return found


def measure(named: NamedCodebook, x: Tensor) -> float:
    """Mean squared error of samples x [G, 8]."""
    levels = named.codebook.decode(named.encoder.encode(x.unsqueeze(0) * named.unit))
    return (levels[0] / named.unit - x).square().mean().item()


def main(
    bits: Annotated[str, typer.Option(help=f"Bits per weight: {', '.join(PULSES)}.")],
    output: Annotated[Path, typer.Option(help="Safetensors file to write.")],
) -> None:
    """Fit a pvq codebook to N(0, 1) weights."""
    if bits not in PULSES:
        raise typer.BadParameter(f"{bits} is not one of {', '.join(PULSES)}")
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(GROUPS, pyramid.DIM, generator=generator)
    spec = CodebookSpec(
        codec="pvq",
        vector_dim=8,
        pattern_bits=int(pyramid.DIM * float(bits)),
        magnitude_bits=0,
        shift=0,
        pulses=PULSES[bits],
    )
    fitted = fit_steps(spec.pulses, x)
    codebook = round_magnitudes(spec, fitted.steps, x[: GROUPS // 4])
    save_codebook(codebook, output)
    error = measure(codebook, torch.randn(1 << 16, pyramid.DIM, generator=generator))
    print(
        f"{output}: magnitudes {codebook.codebook.magnitudes.tolist()}, shift "
        f"{codebook.codebook.spec.shift}, unit {codebook.unit:g}, mean squared error {error:.5f} "
        f"({fitted.error:.5f} before rounding)"
    )


if __name__ == "__main__":
    typer.run(main)
