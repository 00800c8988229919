"""`pcdvq inspect`: what a checkpoint holds, read from its files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pcdvq_quantizer.checkpoints import AnyCheckpoint, open_any_checkpoint
from pcdvq_quantizer.layer import LayerError
from pcdvq_quantizer.record import RunRecord, read_run
from pcdvq_quantizer.selection import describe_skipped

MIB = 2**20


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
    """All rows and totals; sizes in bytes, `rate` as in `describe_rate`, of what is `counted`.

    `whole` is the sentence of `describe_checkpoint`, `left` says what is not quantized and why.
    """

    layers: list[LayerRow]
    rate: str
    counted: str
    bits_per_weight: float
    bits_per_weight_with_embeddings: float
    packed_bytes: int
    codebook_bytes: int
    unquantized_bytes: int
    modules_to_not_convert: list[str]
    whole: str
    left: list[str]

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
        console.print(f"{self.whole} Bits per weight count {self.counted}.", highlight=False)
        left = ", ".join(self.left) or "none"
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
        describe_checkpoint(checkpoint),
        describe_left(checkpoint),
    )


def describe_left(checkpoint: AnyCheckpoint) -> list[str]:
    """What is not quantized and why, numbered layers together, as far as the record tells it.

    Raises:
        CheckpointError: as `describe_checkpoint`.
    """
    unknown = dict.fromkeys(checkpoint.modules_to_not_convert, "reason not recorded")
    return describe_skipped(read_run(checkpoint.directory).skipped or unknown)


def describe_checkpoint(checkpoint: AnyCheckpoint) -> str:
    """What is quantized, all bytes before and after, and what was left and why.

    Raises:
        CheckpointError: its record of the run is something else.
    """
    run = read_run(checkpoint.directory)
    left = _left_bytes(checkpoint, run)
    packed = sum(layer.bytes for layer in checkpoint.layers.values())
    dense = 2 * sum(layer.weights for layer in checkpoint.layers.values())
    now = packed + checkpoint.codebook_bytes + left.total()
    before, when = run.original_bytes, "before"
    if before is None:
        before, when = dense + left.total(), "at 16 bits per weight"
    text = (
        f"{describe_rate(checkpoint)}. All tensors: {before / MIB:.1f} MiB {when}, "
        f"{now / MIB:.1f} MiB now."
    )
    shares = [f"{100 * size / before:.1f} % {reason}" for reason, size in left.most_common()]
    if not shares:
        return text
    return (
        f"{text} Of the bytes {when}, {100 * left.total() / before:.1f} % stay as they were: "
        f"{'; '.join(shares)}."
    )


def _left_bytes(checkpoint: AnyCheckpoint, run: RunRecord) -> Counter[str]:
    """Bytes that are not quantized by the reason."""
    left = Counter[str]()
    tensors = checkpoint.tensors
    for name, reason in run.skipped.items():
        tensor = tensors.get(name) or tensors.get(f"{name}.weight")
        left[reason] += tensor.bytes if tensor else 0
    packed = sum(layer.bytes for layer in checkpoint.layers.values())
    rest = sum(tensor.bytes for tensor in tensors.values()) - packed - left.total()
    left["norms, biases and the like" if run.skipped else "other tensors"] += rest
    return +left


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
