"""Tokens per second, latency and memory of `vllm serve`: ours beside vLLM's own formats.

Each system serves the same model in turn, and `vllm bench serve` asks it for random prompts, after
a check: of real weights, that the server gives a passage the likelihood transformers gives it;
of shapes, whose weights are `--load-format dummy`, that all tokens asked for come. Systems that
vLLM cannot serve on this machine are named and left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import matplotlib
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import Server, ServerError, running_server, server_environment
from serving_models import SHAPES, SYSTEMS, Served, prepare

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MODELS = ("smollm2", *SHAPES)
PASSAGE = (
    "The quick brown fox jumps over the lazy dog. Paris is the capital of France, and the Seine "
    "runs through it. Water boils at one hundred degrees."
)
TOLERANCE = 0.01  # of the nats per token, bf16 against fp32
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Result:
    """One run of `vllm bench serve`."""

    system: str
    model: str
    concurrency: int
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    ttft_ms_median: float
    itl_ms_median: float
    rss_gib: float


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        concurrency: numbers of streams, each a run.
        input_tokens, output_tokens: of every request.
        rounds: requests per stream.
    """

    concurrency: Sequence[int]
    input_tokens: int
    output_tokens: int
    rounds: int


def bench_system(model: str, name: str, work: Path, load: Load, serve: list[str]) -> list[Result]:
    """Serve `model` with system `name` and measure every concurrency of `load`.

    Raises:
        ServerError: it does not start.
        RuntimeError: it fails its check or a request.
    """
    served = prepare(model, SYSTEMS[name], name, work)
    length = load.input_tokens + load.output_tokens + 16
    arguments = ["--max-model-len", str(length), "--max-num-seqs", str(max(load.concurrency))]
    arguments += ["--no-enable-prefix-caching", *serve]
    if not served.real:
        arguments += ["--load-format", "dummy"]
    log = work / f"{served.directory.name}.log"
    with running_server(served.directory, log, arguments, quantization=None) as server:
        if served.real:
            check_likelihood(server, served)
        return [bench(server, model, name, served, streams, load) for streams in load.concurrency]


def check_likelihood(server: Server, served: Served) -> None:
    """Compare the server's likelihood of `PASSAGE` with that of transformers in fp32.

    It may be off by `TOLERANCE`, or by as much as transformers is in bf16: 2 bits without
    calibration make much of bf16.
    """
    import pcdvq_quantizer.hf  # noqa: F401  (makes our checkpoints known to transformers)

    answer = httpx.post(
        f"{server.base_url}/completions",
        json={
            "model": str(served.directory),
            "prompt": PASSAGE,
            "max_tokens": 1,
            "prompt_logprobs": 0,
        },
        timeout=300,
    ).raise_for_status()
    tokens = answer.json()["choices"][0]["prompt_logprobs"][1:]
    ours = -sum(next(iter(token.values()))["logprob"] for token in tokens) / len(tokens)
    tokenizer = AutoTokenizer.from_pretrained(served.directory, trust_remote_code=False)
    ids = tokenizer(PASSAGE, return_tensors="pt").input_ids
    theirs, in_bfloat = (
        _transformers_nats(served.directory, ids, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    if not abs(ours - theirs) < max(TOLERANCE * theirs, abs(in_bfloat - theirs)):
        raise RuntimeError(f"{served.directory}: {ours:.4f} nats a token, not {theirs:.4f}")


@torch.no_grad()
def _transformers_nats(directory: Path, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Nats a token of `ids`, int64 [1, T]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
    return model(ids, labels=ids).loss.item()


def bench(
    server: Server, model: str, name: str, served: Served, streams: int, load: Load
) -> Result:
    """One run of `vllm bench serve` with `streams` streams."""
    prompts = streams * load.rounds
    with tempfile.TemporaryDirectory() as directory:
        arguments = {
            "--backend": "openai",
            "--base-url": server.base_url.removesuffix("/v1"),
            "--model": str(served.directory),
            "--dataset-name": "random",
            "--random-input-len": load.input_tokens,
            "--random-output-len": load.output_tokens,
            "--num-prompts": prompts,
            "--max-concurrency": streams,
            "--num-warmups": 1,
            "--result-dir": directory,
            "--result-filename": "result.json",
        }
        command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve"]
        command += ["--ignore-eos", "--disable-tqdm", "--save-result"]
        command += [str(part) for pair in arguments.items() for part in pair]
        run = subprocess.run(command, capture_output=True, text=True, env=server_environment())
        if run.returncode:
            raise RuntimeError(
                f"vllm bench serve failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
            )
        measured = json.loads((Path(directory) / "result.json").read_text())
    if measured["total_output_tokens"] != prompts * load.output_tokens:
        raise RuntimeError(f"{name}: {measured['total_output_tokens']} tokens came")
    return Result(
        system=name,
        model=model,
        concurrency=streams,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        output_tokens_per_s=measured["output_throughput"],
        ttft_ms_median=measured["median_ttft_ms"],
        itl_ms_median=measured["median_itl_ms"],
        rss_gib=worker_rss(server.pid),
    )


def worker_rss(pid: int) -> float:
    """GiB of the largest process of a server: the one that holds the model."""
    server = psutil.Process(pid)
    return (
        max(each.memory_info().rss for each in [server, *server.children(recursive=True)]) / 2**30
    )


def print_results(results: list[Result]) -> None:
    table = Table(
        "model", "system", "streams", "tokens/s", "TTFT ms", "ITL ms", "RSS GiB", "vs bf16"
    )
    speed = {(r.model, r.system, r.concurrency): r.output_tokens_per_s for r in results}
    for r in results:
        base = speed.get((r.model, "bf16", r.concurrency))
        table.add_row(
            *(r.model, r.system, str(r.concurrency), f"{r.output_tokens_per_s:.1f}"),
            *(f"{r.ttft_ms_median:.0f}", f"{r.itl_ms_median:.1f}", f"{r.rss_gib:.2f}"),
            f"{r.output_tokens_per_s / base:.2f}" if base else "",
        )
    console.print(table)


def plot_results(results: list[Result], directory: Path) -> None:
    """Write tokens/s over concurrency and memory per system, a PNG of each for every model."""
    directory.mkdir(parents=True, exist_ok=True)
    for model in dict.fromkeys(r.model for r in results):
        rows = [r for r in results if r.model == model]
        systems = list(dict.fromkeys(r.system for r in rows))
        figure, axes = plt.subplots()
        for system in systems:
            mine = [r for r in rows if r.system == system]
            streams = [r.concurrency for r in mine]
            axes.plot(streams, [r.output_tokens_per_s for r in mine], marker="o", label=system)
        axes.set(
            xscale="log", yscale="log", xlabel="streams", ylabel="output tokens/s", title=model
        )
        axes.legend()
        figure.savefig(directory / f"{model}-tokens.png", dpi=150)
        figure, axes = plt.subplots()
        rss = [max(r.rss_gib for r in rows if r.system == system) for system in systems]
        axes.barh(systems, rss)
        axes.invert_yaxis()
        axes.set(xlabel="GiB resident in the worker", title=model)
        figure.savefig(directory / f"{model}-memory.png", dpi=150, bbox_inches="tight")
        plt.close("all")


def main(
    model: Annotated[list[str], typer.Option(help=f"Some of {', '.join(MODELS)}; repeatable.")] = [  # noqa: B006
        *MODELS
    ],
    system: Annotated[
        list[str] | None, typer.Option(help=f"Some of {'; '.join(SYSTEMS)}; repeatable.")
    ] = None,
    concurrency: Annotated[list[int], typer.Option(help="Streams; repeatable.")] = [1, 8, 32],  # noqa: B006
    input_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Requests per stream.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="bf16 and 2 bits of SmolLM2, short, in eager mode.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Serve with --enforce-eager.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Write plots into this directory.")] = None,
    work: Annotated[Path, typer.Option(help="Where model directories are made and kept.")] = Path(
        "bench_models"
    ),
) -> None:
    """Measure serving, all systems side by side."""
    load = Load(concurrency, input_tokens, output_tokens, rounds)
    systems = system or list(SYSTEMS)
    if quick:
        model, load, eager = ["smollm2"], Load([1, 8], 128, 32, 1), True
        systems = system or ["bf16", "pcdvq 2"]
    if unknown := sorted({*model} - {*MODELS} | {*systems} - {*SYSTEMS}):
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; see --help")
    work.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for each in model:
        for name in systems:
            console.print(f"{each}, {name}")
            try:
                results += bench_system(
                    each, name, work, load, ["--enforce-eager"] if eager else []
                )
            except ServerError as error:
                console.print(f"  left out, it does not start here: {reason(error)}")
            if json_file:
                json_file.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    print_results(results)
    if plots:
        plot_results(results, plots)


def reason(error: ServerError) -> str:
    """The line of a server's log that says why it ended."""
    lines = [line for line in str(error).splitlines() if "Error" in line]
    return lines[-1].strip() if lines else str(error)


if __name__ == "__main__":
    typer.run(main)
