"""`pcdvq inspect`: what a checkpoint holds, read from its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pcdvq_quantizer.checkpoints import AnyCheckpoint, open_any_checkpoint
from pcdvq_quantizer.layer import LayerError
from pcdvq_quantizer.record import read_run


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer; `relative_error` is |W' - W|^2 / |W|^2 as recorded when quantizing."""

    name: str
    shape: tuple[int, int]
    codebook: str
    bits_per_weight: float
    relative_error: float | None
    bytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """All rows and totals; sizes in bytes, `rate` as in `describe_rate`, of what is `counted`."""

    layers: list[LayerRow]
    rate: str
    counted: str
    bits_per_weight: float
    bits_per_weight_with_embeddings: float
    packed_bytes: int
    codebook_bytes: int
    unquantized_bytes: int
    modules_to_not_convert: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def print_table(self, console: Console) -> None:
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold")
        for heading in ("shape", "codebook", "bits", "error", "KiB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.layers:
            error = "-" if row.relative_error is None else figure(row.relative_error, 4)
            table.add_row(
                row.name,
                "x".join(map(str, row.shape)),
                row.codebook,
                f"{row.bits_per_weight:.3f}",
                error,
                f"{row.bytes / 1024:.1f}",
            )
        console.print(table)
        mib = 2**20
        console.print(
            f"{self.rate} ({self.counted}), {self.packed_bytes / mib:.1f} MiB; other tensors "
            f"{self.unquantized_bytes / mib:.1f} MiB",
            highlight=False,
        )
        left = ", ".join(self.modules_to_not_convert) or "none"
        console.print(f"left unquantized: {left}", highlight=False)


def inspect_checkpoint(directory: Path) -> CheckpointSummary:
    """Read the summary of the checkpoint in `directory`.

    Raises:
        CheckpointError: it is not a whole checkpoint of PCDVQ or VPTQ.
    """
    checkpoint = open_any_checkpoint(directory)
    errors = read_run(directory).errors
    rows = [
        LayerRow(
            name,
            (layer.out_features, layer.in_features),
            layer.codebook,
            layer.bits_per_weight,
            _known(errors.get(name)),
            layer.bytes,
        )
        for name, layer in checkpoint.layers.items()
    ]
    packed = sum(row.bytes for row in rows)
    total = sum(tensor.bytes for tensor in checkpoint.tensors.values())
    return CheckpointSummary(
        rows,
        describe_rate(checkpoint),
        checkpoint.counted,
        checkpoint.bits_per_weight,
        checkpoint.bits_per_weight_with_embeddings,
        packed,
        checkpoint.codebook_bytes,
        total - packed,
        checkpoint.modules_to_not_convert,
    )


def describe_rate(checkpoint: AnyCheckpoint) -> str:
    """Bits per weight of the linear layers, and with the embeddings where those are quantized."""
    count, bits = len(checkpoint.linears), checkpoint.bits_per_weight
    text = f"{count} linear layers at {bits:.3f} bits per weight"
    if embeddings := checkpoint.embeddings:
        bits = checkpoint.bits_per_weight_with_embeddings
        text += f", {bits:.3f} with {' and '.join(embeddings)}"
    return text


def figure(value: float, digits: int) -> str:
    """`value` with so many decimal places, or a short form of one that nobody would read so."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _known(error: LayerError | None) -> float | None:
    """The weight error, None if there is none, which is also how JSON can say NaN."""
    return error.weight if error and isfinite(error.weight) else None
