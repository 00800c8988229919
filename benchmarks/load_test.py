"""Many streaming clients at once against `vllm serve`, some of them rude, for minutes.

`python benchmarks/load_test.py CHECKPOINT --minutes 5 --clients 64 --json load.json`

Each client asks one thing after another: most read a streamed answer to its end, some hang up in
the middle, some send nonsense. What must hold, or the program ends with 1:

- every well-formed request gets its whole answer, every malformed one a status 4xx;
- answers at temperature 0 are those of a quiet server. The kernels of PCDVQ layers give a row the
  same result in any batch; vLLM's attention and torch's bf16 products (the output head, what is
  not quantized) do not, so an answer may differ from a token on where the quiet server saw two
  about equally likely ones. How often, and how near those were, is part of the result;
- afterwards nothing runs or waits, and the server answers as it did at first;
- memory: of all processes of the server, before and after warm-up and at the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console

from server import Server, log_tail, running_server

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
    "List three colours and say where each of them is found in nature. " * 4,
    "x",
    "1 2 3 4 5 6 7 8",
    "The quick brown fox jumps over the lazy dog. " * 8,
)
LENGTHS = (1, 8, 24, 48)  # of answers, in tokens
# Of the nats between the two likeliest tokens where an answer under load leaves the quiet one.
MOST_GAP = 0.3
MOST_REQUESTS = 100_000
REQUEST_SECONDS = 300.0
# Parts of the time after which memory is taken to be that of a warm server.
WARM_UP = 0.2
MIB = 1 << 20
LOG_LINES = 100
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: as text.
        gaps: nats between the two likeliest tokens at each place.
    """

    tokens: list[str]
    gaps: list[float]


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        clients, seconds: how many, and for how long.
        requests: how many of each kind.
        tokens: received.
        identical: answers that are those of the quiet server.
        repeats: whether the quiet server's answers afterwards were those before, to the last bit.
        gaps_where_answers_part: of the others, nats between the quiet server's two best tokens.
        errors: what must not be.
        memory_mib: at each time, of the server's first process and of all its others.
    """

    clients: int
    seconds: float
    requests: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    identical: int = 0
    repeats: bool = False
    gaps_where_answers_part: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory_mib: dict[str, tuple[int, int]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        gaps = self.gaps_where_answers_part
        values = vars(self) | {"errors": self.errors[:20], "error_count": len(self.errors)}
        del values["gaps_where_answers_part"]
        return values | {
            "differing": len(gaps),
            "largest_gap_nats": max(gaps, default=0.0),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def body(model: str, prompt: str, tokens: int, **changes: object) -> dict[str, Any]:
    fields = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**fields, "ignore_eos": True, "logprobs": 2, **changes}


# Each makes a request that must be refused.
NONSENSE: tuple[Callable[[str], bytes], ...] = (
    lambda model: b"",
    lambda model: b"{",
    lambda model: b"[" * 5000,
    lambda model: b"\xff\xfe\x00",
    lambda model: json.dumps(body("no such model", "x", 4)).encode(),
    lambda model: json.dumps(body(model, "x", -1)).encode(),
    lambda model: json.dumps(body(model, "x", 1 << 40)).encode(),
    lambda model: json.dumps(body(model, "word " * 5000, 4)).encode(),
    lambda model: json.dumps({**body(model, "", 4), "prompt": [1 << 40]}).encode(),
    lambda model: json.dumps({**body(model, "", 4), "prompt": [-1]}).encode(),
    lambda model: json.dumps({**body(model, "", 4), "prompt": {"a": 1}}).encode(),
    lambda model: json.dumps(body(model, "x", 4, temperature=-1)).encode(),
    lambda model: json.dumps(body(model, "x", 4, temperature="hot")).encode(),
    lambda model: json.dumps(body(model, "x", 4, logprobs=10**6)).encode(),
    lambda model: json.dumps(body(model, "x", 4, top_p=7)).encode(),
)


async def read_answer(
    client: httpx.AsyncClient, request: dict[str, Any], hang_up_after: int | None = None
) -> Answer:
    """The streamed answer, or its first chunks, after which the connection is closed.

    Raises:
        RuntimeError: another status than 200, an error in the stream, or an end before the end.
    """
    answer = Answer([], [])
    async with client.stream("POST", "/completions", json={**request, "stream": True}) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise RuntimeError(f"status {response.status_code}: {text[:300]}")
        chunks = 0
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not data:
                continue
            if data == "[DONE]":
                return answer
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(f"error in the stream: {data[:300]}")
            for choice in chunk["choices"]:
                _append(answer, choice["logprobs"])
            chunks += 1
            if hang_up_after is not None and chunks >= hang_up_after:
                return answer
    raise RuntimeError(f"the stream ended after {len(answer.tokens)} tokens")


def _append(answer: Answer, logprobs: dict[str, Any]) -> None:
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        answer.tokens.append(token)
        best = sorted(top.values(), reverse=True)
        answer.gaps.append(best[0] - best[1] if len(best) > 1 else 0.0)


async def quiet_answers(client: httpx.AsyncClient, model: str, tokens: int) -> list[Answer]:
    """Every prompt's answer from a server that has nothing else to do."""
    return [await read_answer(client, body(model, prompt, tokens)) for prompt in PROMPTS]


@dataclass
class Run:
    """A load under way."""

    client: httpx.AsyncClient
    model: str
    lengths: Sequence[int]
    quiet: list[Answer]
    deadline: float
    outcome: Outcome

    async def one_client(self, seed: int) -> None:
        """Ask one thing after another until the time is over."""
        rng = random.Random(seed)
        while time.monotonic() < self.deadline and self.outcome.requests.total() < MOST_REQUESTS:
            kind = rng.choices(("answer", "hang up", "nonsense"), (8, 1, 1))[0]
            self.outcome.requests[kind] += 1
            try:
                await (self.nonsense(rng) if kind == "nonsense" else self.ask(rng, kind))
            except (RuntimeError, ValueError, httpx.HTTPError) as error:
                self.outcome.errors.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(1)  # a server that is gone is not asked in a tight loop

    async def ask(self, rng: random.Random, kind: str) -> None:
        number, tokens = rng.randrange(len(PROMPTS)), rng.choice(self.lengths)
        after = rng.randrange(1, 8) if kind == "hang up" else None
        request = body(self.model, PROMPTS[number], tokens)
        answer = await read_answer(self.client, request, after)
        self.outcome.tokens += len(answer.tokens)
        if kind == "answer" and len(answer.tokens) != tokens:
            raise RuntimeError(f"{len(answer.tokens)} tokens instead of {tokens}")
        self.compare(answer, self.quiet[number])

    def compare(self, answer: Answer, quiet: Answer) -> None:
        pairs = enumerate(zip(answer.tokens, quiet.tokens, strict=False))
        parting = next((at for at, (token, other) in pairs if token != other), None)
        if parting is None:
            self.outcome.identical += 1
            return
        gap = quiet.gaps[parting]
        self.outcome.gaps_where_answers_part.append(gap)
        if gap > MOST_GAP:
            raise RuntimeError(
                f"another answer at token {parting}, where the gap is {gap:.3f} nats"
            )

    async def nonsense(self, rng: random.Random) -> None:
        index = rng.randrange(len(NONSENSE))
        content = NONSENSE[index](self.model)
        headers = {"Content-Type": "application/json"}
        response = await self.client.post("/completions", content=content, headers=headers)
        if not 400 <= response.status_code < 500:
            raise RuntimeError(f"nonsense {index} got status {response.status_code}")


def memory(server: Server) -> tuple[int, int]:
    """MiB of the server's first process and of all it started."""
    first = psutil.Process(server.pid)
    others = sum(process.memory_info().rss for process in first.children(recursive=True))
    return first.memory_info().rss // MIB, others // MIB


async def settle(client: httpx.AsyncClient) -> None:
    """Wait until nothing runs or waits.

    Raises:
        RuntimeError: something still does after a minute.
    """
    metrics = str(client.base_url).removesuffix("/v1/") + "/metrics"
    left = -1.0
    for _ in range(60):
        text = (await client.get(metrics)).text
        found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.M)
        left = sum(map(float, found))
        if found and not left:
            return
        await asyncio.sleep(1)
    raise RuntimeError(f"{left:g} requests still run or wait a minute after the last client left")


async def load(
    server: Server, clients: int, seconds: float, lengths: Sequence[int] = LENGTHS
) -> Outcome:
    """Put the load on `server`, answers of one of `lengths` tokens, and see what becomes of it."""
    outcome = Outcome(clients, seconds)
    outcome.memory_mib["ready"] = memory(server)
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(
        base_url=server.base_url, timeout=REQUEST_SECONDS, limits=limits, trust_env=False
    ) as client:
        model = (await client.get("/models")).json()["data"][0]["id"]
        quiet = await quiet_answers(client, model, max(lengths))
        outcome.memory_mib["after quiet answers"] = memory(server)
        run = Run(client, model, lengths, quiet, time.monotonic() + seconds, outcome)
        tasks = [asyncio.create_task(run.one_client(seed)) for seed in range(clients)]
        await asyncio.sleep(WARM_UP * seconds)
        outcome.memory_mib["warm, under load"] = memory(server)
        await asyncio.gather(*tasks)
        outcome.memory_mib["end of load"] = memory(server)
        try:
            await settle(client)
            again = await quiet_answers(client, model, max(lengths))
            outcome.repeats = again == quiet
            for answer, first in zip(again, quiet, strict=True):
                run.compare(answer, first)
        except (RuntimeError, httpx.HTTPError) as error:
            outcome.errors.append(f"afterwards: {error}")
        outcome.memory_mib["end, idle"] = memory(server)
    return outcome


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    minutes: Annotated[float, typer.Option(min=0.1, max=120, help="Time under load.")] = 5.0,
    clients: Annotated[int, typer.Option(min=1, max=512, help="Streams at once.")] = 64,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = None,
    serve: Annotated[
        list[str] | None, typer.Option(help="An argument of `vllm serve`; repeatable.")
    ] = None,
    quantization: Annotated[
        str, typer.Option(help="pcdvq, or `none` to test vLLM with an unquantized model.")
    ] = "pcdvq",
) -> None:
    """Load a server on the loopback interface; ends with 1 if anything went wrong."""
    # With prefix caching a prompt's second run computes in other batches than its first.
    arguments = ["--host", "127.0.0.1", "--no-enable-prefix-caching", "--max-num-seqs", "64"]
    arguments += ["--max-model-len", "512", *(serve or [])]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        method = None if quantization == "none" else quantization
        with running_server(model, log, arguments, quantization=method) as server:
            try:
                outcome = asyncio.run(load(server, clients, 60 * minutes))
            except (RuntimeError, httpx.HTTPError) as error:
                sys.exit(f"no quiet answers ({error}):\n{log_tail(log, LOG_LINES)}")
            result = {"model": str(model), "arguments": arguments, **outcome.summary()}
            if outcome.errors:
                console.print(log_tail(log, LOG_LINES), markup=False)
    console.print_json(data=result)
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if outcome.errors else 0)


if __name__ == "__main__":
    typer.run(main)
