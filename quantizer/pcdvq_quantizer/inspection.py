"""`pcdvq inspect`: what a checkpoint holds, read from its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pcdvq_kernels.checkpoint import REPORT_FILE, read_json
from pcdvq_kernels.errors import CheckpointError
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from pcdvq_quantizer.checkpoints import AnyCheckpoint, open_any_checkpoint


class _Error(BaseModel):
    weight: float


class _Run(BaseModel):
    """What is shown of `REPORT_FILE`."""

    errors: dict[str, _Error] = {}


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
            error = "-" if row.relative_error is None else f"{row.relative_error:.4f}"
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
    errors = _recorded_errors(directory)
    rows = [
        LayerRow(
            name,
            (layer.out_features, layer.in_features),
            layer.codebook,
            layer.bits_per_weight,
            errors.get(name),
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


def _recorded_errors(directory: Path) -> dict[str, float]:
    """Relative errors from the report, {} if the checkpoint came without one."""
    if not (directory / REPORT_FILE).exists():
        return {}
    try:
        run = _Run.model_validate(read_json(directory / REPORT_FILE))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CheckpointError(
            f"{directory / REPORT_FILE} is not the record of a run ({reason}). Delete it: it tells "
            "errors that are measured while quantizing and nothing else"
        ) from None
    return {name: error.weight for name, error in run.errors.items()}
