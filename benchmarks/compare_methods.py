"""Perplexity and KL over stored bits of every method, on one model with one calibration.

Each method quantizes the model's linear layers with `pcdvq quantize`, and `pcdvq eval` measures it;
what a former run has left in the work directory is used again. Scalar round-to-nearest is here only
to be compared with: its weights are written back as a dense model.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from pcdvq_quantizer.inspection import inspect_checkpoint
from rich.console import Console
from rich.table import Table
from smollm2 import load_smollm2, save_tokenizer

from demo import PCDVQ, smollm2_gguf

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GROUP = 64  # weights that share a bf16 scale in scalar round-to-nearest
SCALE_BITS = 16
NEAREST = ("--calibration", "none")
TRELLIS = ("1.5", "2", "2.5", "3", "3.5", "4")
# By method, its points: options of `pcdvq quantize`, or bits of scalar round-to-nearest.
METHODS: dict[str, dict[str, tuple[str, ...] | int]] = {
    "trellis": {f"trellis-{bits}": ("--bits", bits) for bits in TRELLIS},
    "trellis, fisher": {
        f"fisher-{bits}": ("--bits", bits, "--objective", "fisher") for bits in ("2", "3", "4")
    },
    "e8": {f"e8-{bits}": ("--bits", bits, "--codec", "e8") for bits in ("2", "2.25")},
    "pvq": {f"pvq-{bits}": ("--bits", bits, "--codec", "pvq") for bits in ("2", "3.25", "4")},
    "vptq": {f"vptq-{bits}": ("--bits", bits, "--method", "vptq") for bits in ("2", "3")},
    "trellis, to nearest": {f"nearest-{bits}": ("--bits", bits, *NEAREST) for bits in ("3", "4")},
    "scalar, to nearest": {f"scalar-{bits}": bits for bits in (3, 4)},
}
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Point:
    """One checkpoint: `bits` are all stored bits of its linear layers over their weights."""

    method: str
    name: str
    bits: float
    perplexity: float
    kl: float
    reference_perplexity: float


@dataclass(frozen=True)
class Protocol:
    """What all are calibrated and measured with."""

    calibration: Path
    samples: int
    text: Path
    windows: int


def measure(
    work: Path, method: str, name: str, how: tuple[str, ...] | int, protocol: Protocol
) -> Point:
    """Make the checkpoint `name` in `work` unless it is there, and measure it likewise."""
    out, report = work / name, work / f"{name}-{protocol.windows}.json"
    if not out.exists():
        if isinstance(how, int):
            round_scalars(out, how)
        else:
            options = ["--calibration", protocol.calibration, "--samples", str(protocol.samples)]
            options = how if "--calibration" in how else [*how, *options]
            subprocess.run([PCDVQ, "quantize", smollm2_gguf(), out, *options], check=True)
    if not report.exists():
        arguments = ["--text", protocol.text, "--windows", str(protocol.windows), "--json", report]
        arguments += ["--tasks", "perplexity,kl", "--reference", smollm2_gguf()]
        subprocess.run([PCDVQ, "eval", out, *arguments], check=True)
    measured: dict[str, Any] = json.loads(report.read_text())
    bits = (
        how + SCALE_BITS / GROUP
        if isinstance(how, int)
        else inspect_checkpoint(out).bits_per_weight
    )
    return Point(
        method,
        name,
        bits,
        measured["perplexity"]["perplexity"],
        measured["kl"]["kl"],
        measured["kl"]["reference_perplexity"],
    )


def round_scalars(out: Path, bits: int) -> None:
    """Write the model with each run of `GROUP` weights rounded to `bits` and a scale."""
    model = load_smollm2(torch.float32)
    top = 2 ** (bits - 1)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.view(-1, GROUP)
            scale = (groups.abs().amax(1, keepdim=True) / (top - 0.5)).bfloat16().float()
            levels = (groups / scale).round().clamp(-top, top - 1)
            module.weight.data = (levels * scale).view_as(module.weight)
    model.save_pretrained(out)
    save_tokenizer(out)


def print_points(points: list[Point]) -> None:
    table = Table("method", "bits, all stored", "perplexity", "KL, nats")
    for point in sorted(points, key=lambda point: point.bits):
        table.add_row(
            *(point.method, f"{point.bits:.3f}"), f"{point.perplexity:.2f}", f"{point.kl:.3f}"
        )
    console.print(table)


def plot_points(points: list[Point], file: Path) -> None:
    """Draw perplexity and KL over bits, a line for each method."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, field, label in zip(
        panels, ("perplexity", "kl"), ("perplexity", "KL from the original, nats"), strict=True
    ):
        for method in dict.fromkeys(point.method for point in points):
            mine = sorted((p for p in points if p.method == method), key=lambda p: p.bits)
            values = [getattr(point, field) for point in mine]
            axes.plot([p.bits for p in mine], values, marker="o", label=method)
        axes.set(yscale="log", xlabel="bits per weight, all stored", ylabel=label)
        axes.grid(visible=True, which="both", alpha=0.3)
    panels[0].axhline(points[0].reference_perplexity, color="gray", linestyle=":", label="original")
    panels[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def main(
    calibration: Annotated[Path, typer.Option(help="Text to calibrate on.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    samples: Annotated[int, typer.Option(help="Windows of 1024 tokens to calibrate on.")] = 8,
    windows: Annotated[int, typer.Option(help="Of 2048 tokens, to measure on.")] = 4,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Some of {'; '.join(METHODS)}; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Points by name, such as trellis-2; repeatable.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where checkpoints are made and kept.")] = Path(
        "bench_methods"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the points.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG.")] = None,
) -> None:
    """Compare methods; all of them take about an hour on two cores."""
    chosen = {name: METHODS[name] for name in method or METHODS if name in METHODS}
    if unknown := set(method or ()) - {*METHODS}:
        raise typer.BadParameter(f"{min(unknown)!r} is unknown; see --help")
    work.mkdir(parents=True, exist_ok=True)
    protocol, points = Protocol(calibration, samples, text, windows), []
    for name, ways in chosen.items():
        for point, how in ways.items():
            if only and point not in only:
                continue
            console.print(point)
            points.append(measure(work, name, point, how, protocol))
            if json_file:
                json_file.write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n")
    print_points(points)
    if plot:
        plot_points(points, plot)


if __name__ == "__main__":
    typer.run(main)
