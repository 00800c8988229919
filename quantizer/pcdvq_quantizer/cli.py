"""The `pcdvq` command."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pcdvq_kernels.errors import PCDVQError
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 2-4 bits per weight for vLLM (PCDVQ).",
)
console = Console()


class Codec(StrEnum):
    signed = "signed"
    e8 = "e8"
    int8 = "int8"


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    context.obj = debug


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Local directory, .gguf file, or hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    bits: Annotated[
        float, typer.Option(help="Bits per weight: 2, 2.25, 3 or 4; 8 with codec int8.")
    ] = 4.0,
    codec: Annotated[
        Codec,
        typer.Option(
            help="signed: fast default; e8: the paper's codebook (2 and 2.25); int8: 8 bits."
        ),
    ] = Codec.signed,
    embedding_bits: Annotated[
        int,
        typer.Option(help="Bits of input embedding and output head: 4, 8, or 16 to leave them."),
    ] = 16,
    max_tp: Annotated[
        int, typer.Option(help="Largest tensor-parallel size to allow where sizes permit.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the input signs.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Quantize MODEL into the PCDVQ checkpoint OUT."""
    from pcdvq_quantizer.inspection import describe_rate
    from pcdvq_quantizer.run import QuantizeOptions, make_plan, quantize_model

    options = QuantizeOptions(
        bits=bits, codec=codec.value, max_tp=max_tp, seed=seed, embedding_bits=embedding_bits
    )
    with console.status(f"Opening {model}"):
        plan = make_plan(model, options)
    for line in plan.selection.skipped_lines():
        console.print(f"left unquantized: {line}", highlight=False)
    with Progress(console=console) as bar:
        task = bar.add_task(f"Quantizing {len(plan.selection.layers)} layers", total=plan.weights)
        advance = partial(bar.advance, task)
        checkpoint = quantize_model(plan, out, overwrite, advance)
    console.print(
        f"{out}: {describe_rate(checkpoint)}. Serve it with: vllm serve {out} --quantization pcdvq",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the layers of CHECKPOINT: shape, bits per weight, relative error, size."""
    from pcdvq_quantizer.inspection import inspect_checkpoint

    report = inspect_checkpoint(checkpoint)
    if json:
        typer.echo(report.to_json())
    else:
        report.print_table(console)


def main() -> None:
    """Run the command; a `PCDVQError` is one sentence, not a traceback."""
    try:
        app(standalone_mode=True)
    except PCDVQError as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
