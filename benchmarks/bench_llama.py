"""Tokens per second, latency and memory of llama.cpp, on the shapes of `bench_serving.py`.

Optional: `CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`
builds llama.cpp for this machine. Weights are random, in the format asked for. There is no server:
prompts are decoded one after another, then every stream gets a token in each step.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import psutil
import typer
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from transformers import LlamaConfig

from bench_serving import Load, Result, console, print_results
from serving_models import SHAPES

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

FORMATS = ("BF16", "Q4_0", "Q2_K", "IQ2_XS")
SCALES = {Type.Q4_0: (0,), Type.Q2_K: (80, 82), Type.IQ2_XS: (0,)}  # fp16 scales' bytes in a block
PATTERN_BYTES = 1 << 22  # of random weights, which then repeat
BATCH = 512
CHECKED_TOKENS = 24
TOLERANCE = 0.05  # of logits, alone and beside another stream
SEED = 0


def random_weight(rows: int, columns: int, kind: Type) -> NDArray[np.uint8]:
    """Blocks of a weight, uint8 [rows, bytes of a row]."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(SEED)
    if kind == Type.BF16:
        floats = generator.standard_normal(PATTERN_BYTES // 2, dtype=np.float32) / columns**0.5
        pattern = (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        blocks = generator.integers(0, 256, (PATTERN_BYTES // size, size), dtype=np.uint8)
        for first in SCALES[kind]:
            blocks[:, first : first + 2] = np.float16([0.01 / columns**0.5]).view(np.uint8)
        pattern = blocks.flatten()
    return np.resize(pattern, (rows, columns // values * size))


def write_model(path: Path, config: LlamaConfig, kind: Type, head: Type) -> None:
    """A GGUF file of the shape of `config`, its tied embedding in format `head`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    shapes = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    norm = np.ones(hidden, dtype=np.float32)
    writer.add_tensor("output_norm.weight", norm)
    embedding = random_weight(config.vocab_size, hidden, head)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=head)
    for layer in range(config.num_hidden_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
        for name, shape in shapes.items():
            writer.add_tensor(
                f"blk.{layer}.{name}.weight", random_weight(*shape, kind), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


class Llama:
    """A model and a context for some streams."""

    def __init__(self, model: ctypes.c_void_p, streams: int, tokens: int, threads: int) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = streams * tokens, streams
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context of {streams} x {tokens} tokens")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, items: list[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        """Decode (stream, position, token), at most BATCH; the likeliest tokens after `wanted`."""
        batch = self.batch
        batch.n_tokens = len(items)
        for i, (stream, position, token) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = stream, i in wanted
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")
        return [int(self.logits(i).argmax()) for i in wanted]

    def logits(self, i: int) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self.context, i)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,))

    def prompt(self, stream: int, tokens: list[int]) -> int:
        """The token after a prompt."""
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            items = [(stream, first + i, token) for i, token in enumerate(part)]
            (token,) = self.decode(items, [len(part) - 1])
        return token


def prompts(streams: int, tokens: int, vocabulary: int) -> list[list[int]]:
    return np.random.default_rng(SEED).integers(0, vocabulary, (streams, tokens)).tolist()


def check(model: ctypes.c_void_p, threads: int) -> None:
    """Raise RuntimeError unless a stream's logits are the same beside another one."""
    llama = Llama(model, 2, 2 * CHECKED_TOKENS, threads)
    first, second = prompts(2, CHECKED_TOKENS, llama.vocabulary)
    llama.prompt(0, first)
    llama.decode([(0, CHECKED_TOKENS, 1)], [0])
    alone = llama.logits(0).copy()
    llama.clear()
    for stream, tokens in enumerate((first, second)):
        llama.prompt(stream, tokens)
    llama.decode([(0, CHECKED_TOKENS, 1), (1, CHECKED_TOKENS, 1)], [0, 1])
    error = np.linalg.norm(llama.logits(0) - alone) / np.linalg.norm(alone)
    llama.close()
    if not error < TOLERANCE:
        raise RuntimeError(f"logits beside another stream differ by {error:.2%}")


def run(llama: Llama, streams: int, load: Load) -> tuple[float, list[float], list[float]]:
    """One round: its seconds, those to the first token of each stream, and of each later step."""
    llama.clear()
    start = time.perf_counter()
    tokens, first = [], []
    for stream, prompt in enumerate(prompts(streams, load.input_tokens, llama.vocabulary)):
        tokens.append(llama.prompt(stream, prompt))
        first.append(time.perf_counter() - start)
    steps = []
    for position in range(load.input_tokens, load.input_tokens + load.output_tokens - 1):
        before = time.perf_counter()
        items = [(stream, position, token) for stream, token in enumerate(tokens)]
        tokens = llama.decode(items, list(range(streams)))
        steps.append(time.perf_counter() - before)
    return time.perf_counter() - start, first, steps


def bench_file(path: Path, model_name: str, system: str, load: Load, threads: int) -> list[Result]:
    """Every concurrency of `load`, in a process of its own."""
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    check(model, threads)
    results = []
    for streams in load.concurrency:
        llama = Llama(model, streams, load.input_tokens + load.output_tokens, threads)
        seconds, first, steps = zip(
            *(run(llama, streams, load) for _ in range(load.rounds)), strict=True
        )
        results.append(
            Result(
                system=system,
                model=model_name,
                concurrency=streams,
                input_tokens=load.input_tokens,
                output_tokens=load.output_tokens,
                output_tokens_per_s=load.rounds * streams * load.output_tokens / sum(seconds),
                ttft_ms_median=1e3 * statistics.median(chain.from_iterable(first)),
                itl_ms_median=1e3 * statistics.median(chain.from_iterable(steps)),
                rss_gib=psutil.Process().memory_info().rss / 2**30,
            )
        )
        llama.close()
    return results


def main(
    model: Annotated[list[str], typer.Option(help=f"Some of {', '.join(SHAPES)}; repeatable.")] = [  # noqa: B006
        *SHAPES
    ],
    format: Annotated[
        list[str], typer.Option(help=f"Some of {', '.join(FORMATS)}; repeatable.")
    ] = [*FORMATS],  # noqa: B006
    head: Annotated[str, typer.Option(help="Format of embedding and head, but for BF16.")] = "Q4_0",
    concurrency: Annotated[list[int], typer.Option(help="Streams; repeatable.")] = [1, 8, 32],  # noqa: B006
    input_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Requests per stream.")] = 2,
    threads: Annotated[int, typer.Option(help="vLLM leaves one CPU to its server.")] = max(
        1, (psutil.cpu_count() or 2) - 1
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Q2_K of the 1B shape, short.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where models are made and kept.")] = Path(
        "bench_models"
    ),
) -> None:
    """Measure llama.cpp on the shapes that `bench_serving.py` serves."""
    if llama_cpp is None:
        raise SystemExit("error: llama-cpp-python is not installed; see the head of this file")
    load = Load(concurrency, input_tokens, output_tokens, rounds)
    if quick:
        model, format, load = ["llama-1b"], ["Q2_K"], Load([1, 8], 64, 16, 1)
    if unknown := sorted({*model} - {*SHAPES} | {*format, head} - {*FORMATS}):
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; see --help")
    work.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for each in model:
        for kind in format:
            of_head = "BF16" if kind == "BF16" else head
            system = f"llama.cpp {kind}, head {of_head}"
            console.print(f"{each}, {system}")
            path = work / f"{each}-{kind}-{of_head}.gguf"
            if not path.exists():
                write_model(path, SHAPES[each], Type[kind], Type[of_head])
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn) as child:
                results += child.submit(bench_file, path, each, system, load, threads).result()
            if json_file:
                json_file.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    print_results(results)


if __name__ == "__main__":
    typer.run(main)
