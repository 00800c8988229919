"""Mean squared error per weight of every shipped codebook on N(0, 1)."""

from __future__ import annotations

import torch
from pcdvq_quantizer.codebooks import OFFERED, NamedCodebook, get_codebook
from rich.console import Console
from rich.table import Table

ROWS, GROUPS = 2048, 250  # of samples


def mean_squared_error(named: NamedCodebook, seed: int = 1) -> float:
    """Error of encoding N(0, 1) weights at the codebook's unit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, GROUPS, named.codebook.spec.vector_dim, generator=generator)
    decoded = named.codebook.decode(named.encoder.encode(x * named.unit)).float() / named.unit
    return (decoded - x).square().mean().item()


def main() -> None:
    table = Table("codebook", "bits", "table bytes", "error", "bound", box=None)
    for codec, rates in OFFERED.items():
        for bits in rates:
            named = get_codebook(codec, bits)
            size = named.codebook.directions.numel() + named.codebook.magnitudes.numel()
            row = (f"{bits:g}", f"{size}", f"{mean_squared_error(named):.4f}", f"{4**-bits:.4f}")
            table.add_row(named.id, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
