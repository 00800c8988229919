"""The `pcdvq` command."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pcdvq_kernels.errors import PCDVQError
from rich.console import Console
from rich.text import Text

from pcdvq_quantizer import cli_options
from pcdvq_quantizer.bars import Bars, finetune_bar
from pcdvq_quantizer.cli_options import Codec
from pcdvq_quantizer.redaction import redacted

if TYPE_CHECKING:
    from pcdvq_quantizer.finetune import FinetuneOptions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 2-4 bits per weight for vLLM (PCDVQ).",
)
# Without markup: what is printed has names in it that may look like some.
console = Console(markup=False, emoji=False)


@dataclass
class Options:
    """Of all commands."""

    debug: bool = False


shared = Options()


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="PCDVQ_DEBUG", help="Show tracebacks of errors.")
    ] = False,
) -> None:
    shared.debug = debug


@app.command()
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Local directory, .gguf file, or hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    method: cli_options.MethodOption = cli_options.Method.pcdvq,
    bits: cli_options.Bits = 4.0,
    codec: cli_options.CodecOption = Codec.trellis,
    embedding_bits: Annotated[
        int,
        typer.Option(help="Bits of input embedding and output head: 4, 8, or 16 to leave them."),
    ] = 16,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave layers of this name as they are, such as `model.layers.0.*`, or "
            "`re:` and a regular expression; repeatable."
        ),
    ] = None,
    max_tp: Annotated[
        int, typer.Option(help="Largest tensor-parallel size to allow where sizes permit.")
    ] = 8,
    calibration: Annotated[
        str,
        typer.Option(
            help="Calibration text: a text or JSONL file, a `datasets` name, `self` (the model "
            "writes it) or `none` (fast, much worse)."
        ),
    ] = "self",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 24,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    objective: Annotated[
        str,
        typer.Option(help="What to keep small: hessian, errors of outputs; fisher, their cost."),
    ] = "hessian",
    effort: Annotated[
        str,
        typer.Option(
            help="Of the search for codes: exhaustive, quick (sooner, a larger error), or auto: "
            "quick without calibration."
        ),
    ] = "auto",
    finetune: Annotated[
        bool,
        typer.Option("--finetune", help="Then distil the original into OUT, as `pcdvq finetune`."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of signs and calibration text.")] = 0,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that calibrate together; a GPU each, if any.")
    ] = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    vector_length: cli_options.VectorLength = None,
    centroids: cli_options.Centroids = None,
    residual_centroids: cli_options.ResidualCentroids = 0,
    outliers: cli_options.Outliers = 0,
    outlier_vector_length: cli_options.OutlierVectorLength = 2,
    outlier_centroids: cli_options.OutlierCentroids = 256,
    groups: cli_options.Groups = 1,
    normalize: cli_options.NormalizeOption = cli_options.Normalize.auto,
) -> None:
    """Quantize MODEL into the checkpoint OUT."""
    from pcdvq_quantizer.checkpoints import serve_command
    from pcdvq_quantizer.finetune import FinetuneOptions
    from pcdvq_quantizer.inspection import describe_checkpoint
    from pcdvq_quantizer.plan import NONE, make_plan
    from pcdvq_quantizer.run import quantize_in_processes, quantize_model

    options = cli_options.run_options(context)
    if finetune and method != cli_options.Method.pcdvq:
        raise PCDVQError(f"--finetune is for --method pcdvq, not {method}; drop it")
    with console.status(Text(f"Opening {model}")):
        plan = make_plan(model, options)
    for line in plan.selection.skipped_lines():
        console.print(f"left unquantized: {line}", highlight=False)
    if limit := plan.split_limit():
        console.print(f"not every tensor-parallel size will do: {limit}", highlight=False)
    tuning = FinetuneOptions(calibration, model, sequence_length=sequence_length, seed=seed)
    if finetune and calibration == NONE:
        raise PCDVQError("--finetune needs text to learn from; drop --calibration none")
    with Bars(console) as bars:
        if processes > 1:
            checkpoint = quantize_in_processes(processes, model, options, out, overwrite, bars)
        else:
            checkpoint = quantize_model(plan, out, overwrite, bars)
    if finetune:
        _finetune(checkpoint.directory, checkpoint.directory, tuning, overwrite=True)
    console.print(
        f"{out}: {describe_checkpoint(checkpoint)} Serve it with: "
        f"{serve_command(checkpoint, str(out))}",
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


@app.command()
def report(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write; default: CHECKPOINT.html. An earlier page is replaced, no other "
            "file."
        ),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="File of `pcdvq eval --json`, of any model; repeatable."),
    ] = None,
) -> None:
    """Draw the errors, rates and perplexity of CHECKPOINT on one HTML page."""
    from pcdvq_quantizer.report import write_report

    with console.status("Drawing"):
        page = write_report(checkpoint, output, tuple(evaluations or ()))
    console.print(f"wrote {page}", highlight=False, soft_wrap=True)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    repo: Annotated[str, typer.Argument(help="USER/REPO, made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="File of `pcdvq eval --json` for the model card; repeatable."),
    ] = None,
) -> None:
    """Upload CHECKPOINT to the Hugging Face Hub, with a model card of its figures."""
    from pcdvq_quantizer.checkpoints import open_any_checkpoint, serve_command
    from pcdvq_quantizer.hub import push as push_checkpoint

    url = push_checkpoint(checkpoint, repo, private, tuple(evaluations or ()))
    command = serve_command(open_any_checkpoint(checkpoint), repo)
    console.print(f"{url}. Serve it with: {command}", highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate_model(
    model: Annotated[
        str, typer.Argument(help="Checkpoint or unquantized model: directory, .gguf, hub id.")
    ],
    tasks: cli_options.Tasks = "perplexity",
    text: Annotated[Path | None, typer.Option(help="Text for perplexity and kl.")] = None,
    lambada: Annotated[
        Path | None, typer.Option(help='JSONL for lambada and cloze: {"text": ...} per line.')
    ] = None,
    requests: cli_options.Requests = None,
    windows: Annotated[int, typer.Option(help="First windows of the text to measure.")] = 40,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    limit: Annotated[int, typer.Option(help="First lines of JSONL files to measure.")] = 500,
    bos: Annotated[
        bool,
        typer.Option(
            "--bos",
            help="Put the BOS token before every window and line. Off is the usual protocol; "
            "some models, such as Gemma, make no sense without it.",
        ),
    ] = False,
    reference: cli_options.Reference = None,
    backend: Annotated[str, typer.Option(help="hf (transformers) or vllm.")] = "hf",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto: float32 on a CPU.")
    ] = "auto",
    packed: Annotated[
        bool,
        typer.Option("--packed", help="hf: run the PCDVQ kernels instead of dequantized weights."),
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write JSON to this file; - is stdout.")
    ] = None,
) -> None:
    """Measure MODEL: perplexity, KL from its original on a text and on answers, words chosen."""
    from transformers.utils import logging

    from pcdvq_quantizer.evaluation import EvaluateOptions, evaluate
    from pcdvq_quantizer.evaluation.report import EvaluationReport
    from pcdvq_quantizer.files import check_page, write_page

    logging.disable_progress_bar()
    to_stdout = json == Path("-")
    if json is not None and not to_stdout:
        json = check_page(json, "--json", "report of pcdvq eval", EvaluationReport.is_in)
    shown = Console(stderr=True, markup=False, emoji=False) if to_stdout else console
    options = EvaluateOptions(
        tasks=tuple(filter(None, (task.strip() for task in tasks.split(",")))),
        text=text,
        lambada=lambada,
        requests=requests,
        windows=windows,
        window=window,
        limit=limit,
        bos=bos,
        reference=reference,
        backend=backend,
        dtype=dtype,
        packed=packed,
    )
    with Bars(shown, transient=True) as bars:
        report = evaluate(model, options, bars)
    report.print_table(shown)
    if to_stdout:
        typer.echo(report.to_json())
    elif json is not None:
        write_page(json, report.to_json() + "\n", "--json")


@app.command()
def finetune(
    checkpoint: Annotated[Path, typer.Argument(help="PCDVQ checkpoint directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    calibration: Annotated[
        str,
        typer.Option(help="Text file, JSONL file, `datasets` name, or `self`, as in quantize."),
    ] = "self",
    reference: Annotated[
        str | None, typer.Option(help="Original model; default: the checkpoint's report names it.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    holdout: Annotated[int, typer.Option(help="Windows kept for validation.")] = 4,
    windows_per_step: Annotated[
        int | None, typer.Option(help="Default: up to 4, fewer for the sake of 100 steps.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit for training.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak relative change per step; default: by the KL.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order of windows.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Recover quality: distil the original model into row scales and norms of CHECKPOINT."""
    from pcdvq_quantizer.finetune import FinetuneOptions

    options = FinetuneOptions(
        calibration=calibration,
        reference=reference,
        tokens=tokens,
        sequence_length=sequence_length,
        holdout=holdout,
        windows_per_step=windows_per_step,
        minutes=minutes,
        learning_rate=learning_rate,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    _finetune(checkpoint, out, options, overwrite)


def _note(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _finetune(checkpoint: Path, out: Path, options: FinetuneOptions, overwrite: bool) -> None:
    """Run `finetune_checkpoint` and show how it goes."""
    from transformers.utils import logging

    from pcdvq_quantizer.finetune import finetune_checkpoint

    logging.disable_progress_bar()
    with finetune_bar(console, options.steps) as show:
        result = finetune_checkpoint(checkpoint, out, options, overwrite, show, _note)
    if result.diverged:
        console.print(
            f"Training diverged at step {result.steps} and was stopped; the best parameters before "
            "that are kept. A smaller --learning-rate may get further.",
            soft_wrap=True,
        )
    console.print(
        f"{out}: KL from the original on held-out text {result.kl_before:.4f} -> "
        f"{result.kl_after:.4f} nats per token",
        highlight=False,
        soft_wrap=True,
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="PCDVQ checkpoint, or a model as for `quantize`.")],
    bits: Annotated[float, typer.Option(help="As for `quantize`.")] = 4.0,
    codec: Annotated[Codec, typer.Option(help="As for `quantize`.")] = Codec.trellis,
    calibration: Annotated[str, typer.Option(help="As for `quantize`.")] = "self",
) -> None:
    """Serve MODEL with vLLM, quantized first if it is not yet; other options go to `vllm serve`."""
    from pcdvq_quantizer.plan import QuantizeOptions
    from pcdvq_quantizer.serving import checkpoint_of, vllm_command, vllm_environment

    if model.startswith("-"):  # which might be the beginning of a secret
        raise PCDVQError("MODEL comes first: pcdvq serve MODEL, then the options")
    options = QuantizeOptions(bits=bits, codec=codec.value, calibration=calibration)
    checkpoint, method = checkpoint_of(model, options, console)
    command = vllm_command(checkpoint, context.args, method)
    console.print(shlex.join(redacted(command)), highlight=False, soft_wrap=True)
    try:
        os.execvpe(command[0], command, vllm_environment())
    except FileNotFoundError:
        raise PCDVQError("the command vllm is not installed; `pcdvq doctor` says more") from None


@app.command()
def doctor() -> None:
    """Check this installation and say what to do about what is wrong."""
    from pcdvq_quantizer.doctor import examine, findings_table

    findings = examine()
    console.print(findings_table(findings))
    if any(finding.fatal for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; an error is one line, its traceback is for --debug."""
    try:
        app(standalone_mode=True)
    except Exception as error:
        if shared.debug:
            raise
        shown = Text.assemble(("error:", "red"), " ", _describe(error))
        Console(stderr=True).print(shown, highlight=False, soft_wrap=True)
        sys.exit(1)


def _describe(error: Exception) -> str:
    """One line for the user; only a `PCDVQError` knows the remedy."""
    if isinstance(error, PCDVQError):
        return str(error)
    first_line = next(iter(str(error).splitlines()), "no message")
    again = shlex.join(["pcdvq", "--debug", *redacted(sys.argv[1:])])
    return f"{type(error).__name__}: {first_line} (unexpected; to see where, run: {again})"


if __name__ == "__main__":
    main()
