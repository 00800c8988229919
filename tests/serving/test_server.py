"""The main job on the real model: quantize, `vllm serve`, answer over the OpenAI API."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import torch
from models import smollm2_gguf
from openai import APIConnectionError, BadRequestError, InternalServerError, OpenAI
from pcdvq_kernels import reference
from pcdvq_kernels.checkpoint import open_checkpoint
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from load_test import load
from server import Server, ServerError, log_tail, running_server

BITS = "4"
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
]
# Largest difference of a token's log-probability between vLLM and Hugging Face, both in fp32.
# They differ in the order of sums alone: 2e-5 was seen.
LOGPROB_TOLERANCE = 2e-4
# vLLM in bf16, its linears with int8 activations, against Hugging Face in fp32: bf16 alone made
# 0.14, int8 alone 0.08.
BF16_LOGPROB_TOLERANCE = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct-pcdvq"
    pcdvq = Path(sys.executable).with_name("pcdvq")
    arguments = [smollm2_gguf(), out, "--bits", BITS, "--calibration", "none"]
    subprocess.run([pcdvq, "quantize", *arguments], check=True)
    return out


@pytest.fixture(scope="module")
def dequantized(checkpoint: Path) -> PreTrainedModel:
    """The model Hugging Face would run: dense weights W' of the checkpoint, in fp32."""
    opened = open_checkpoint(checkpoint)
    state = {}
    for file in {tensor.file for tensor in opened.tensors.values()}:
        state |= load_file(file)
    for name, layer in opened.layers.items():
        packed = [state.pop(f"{name}.{part}") for part in ("qweight", "row_scale", "signs_in")]
        block = opened.config.block(layer.in_features)
        state[f"{name}.weight"] = reference.dequantize(
            *packed, opened.codebooks[layer.codebook], block
        )
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
    return model.eval()


def serve(checkpoint: Path, log: Path, *options: str) -> AbstractContextManager[Server]:
    arguments = ["--enforce-eager", "--max-model-len", "1024", *options]
    return running_server(checkpoint, log, arguments)


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none", timeout=400, max_retries=0)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve(checkpoint, log, "--dtype", "bfloat16") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def model_name(client: OpenAI) -> str:
    return client.models.list().data[0].id


def greedy(client: OpenAI, prompt: str, tokens: int = 24) -> tuple[list[str], list[float]]:
    """Greedy continuation as (tokens, log-probabilities)."""
    choice = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True},
    ).choices[0]
    return choice.logprobs.tokens, choice.logprobs.token_logprobs


def assert_agrees(client: OpenAI, model: PreTrainedModel, checkpoint: Path, tol: float) -> None:
    """Every token the server chose is Hugging Face's choice, with the same log-probability."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for prompt in PROMPTS:
        tokens, logprobs = greedy(client, prompt)
        chosen = torch.tensor([int(token.removeprefix("token_id:")) for token in tokens])
        inputs = tokenizer(prompt, return_tensors="pt").input_ids[0]
        with torch.no_grad():
            logits = model(torch.cat([inputs, chosen]).unsqueeze(0)).logits[0].float()
        expected = logits[len(inputs) - 1 : -1].log_softmax(-1)  # [tokens, vocabulary]
        own = expected.gather(1, chosen.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(logprobs), own, rtol=0, atol=tol)
        # Where the two best are nearer than the tolerance either is a right answer.
        assert (expected.max(1).values - own).max() <= 2 * tol


def test_chat_answers_sensibly(client: OpenAI, model_name: str) -> None:
    # Each token of the answer is ahead of the next by 0.86 nats in fp32: more than rounding moves.
    question = {
        "role": "user",
        "content": "What city is the capital of France? Answer in one sentence.",
    }
    answer = client.chat.completions.create(
        model=model_name, messages=[question], temperature=0, max_completion_tokens=40
    )
    assert "Paris" in answer.choices[0].message.content


def test_streaming_equals_the_whole_answer(client: OpenAI, model_name: str) -> None:
    arguments = {
        "model": model_name,
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0,
        "max_completion_tokens": 32,
    }
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(chunks) > 5
    assert streamed == whole


def test_logprobs_are_a_distribution(client: OpenAI, model_name: str) -> None:
    choice = client.completions.create(
        model=model_name, prompt=PROMPTS[0], max_tokens=4, temperature=0, logprobs=5
    ).choices[0]
    for top in choice.logprobs.top_logprobs:
        assert len(top) == 5
        assert sum(torch.tensor(list(top.values())).exp()) <= 1.0001
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_structured_output(client: OpenAI, model_name: str) -> None:
    properties = {"capital": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model_name,
        messages=[{"role": "user", "content": "What is the capital of France? Is it large?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
        temperature=0,
        max_completion_tokens=48,
    )
    city = json.loads(answer.choices[0].message.content)
    assert city.keys() == properties.keys()
    assert isinstance(city["large"], bool)


def test_concurrent_requests_get_their_own_answers(client: OpenAI) -> None:
    alone = [greedy(client, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: greedy(client, prompt), PROMPTS * 2))
    for (tokens, logprobs), (expected, expected_logprobs) in zip(together, alone * 2, strict=True):
        # Attention and lm_head are vLLM's own and may round otherwise in a batch.
        same = sum(a == b for a, b in zip(tokens, expected, strict=True))
        assert same >= 4
        assert logprobs[:4] == pytest.approx(expected_logprobs[:4], abs=BF16_LOGPROB_TOLERANCE)


def test_bad_request_is_refused_and_the_server_lives(client: OpenAI, model_name: str) -> None:
    with pytest.raises(BadRequestError):
        client.completions.create(model=model_name, prompt="x" * 20_000, max_tokens=1)
    assert greedy(client, PROMPTS[0], tokens=1)[0]


def test_agrees_with_hugging_face_in_bf16(
    client: OpenAI, dequantized: PreTrainedModel, checkpoint: Path
) -> None:
    assert_agrees(client, dequantized, checkpoint, BF16_LOGPROB_TOLERANCE)


def test_rude_clients(server: Server) -> None:
    outcome = asyncio.run(load(server, clients=6, seconds=10, lengths=(1, 8)))
    assert not outcome.errors
    assert outcome.requests["answer"] > 5


def test_server_ends_when_a_worker_is_killed(server: Server, client: OpenAI) -> None:
    """The last test of this server: a supervisor sees the end and starts another."""
    process = psutil.Process(server.pid)
    workers = [child for child in process.children(recursive=True) if "Worker" in child.name()]
    assert workers
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(
            client.completions.create,
            model=client.models.list().data[0].id,
            prompt=PROMPTS[0],
            max_tokens=900,
            extra_body={"ignore_eos": True},
        )
        time.sleep(2)
        for worker in workers:
            worker.kill()
        with pytest.raises((InternalServerError, APIConnectionError)):
            request.result(60)
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert "EngineDeadError" in server.log.read_text()


def test_agrees_with_hugging_face_in_fp32(
    dequantized: PreTrainedModel, checkpoint: Path, tmp_path: Path
) -> None:
    exact = ["--dtype", "float32", "--additional-config", '{"pcdvq_activations": "float"}']
    with serve(checkpoint, tmp_path / "server.log", *exact) as server:
        assert_agrees(client_of(server), dequantized, checkpoint, LOGPROB_TOLERANCE)


def test_damaged_checkpoint_never_gets_to_serve(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        (damaged / path.name).symlink_to(path)
    shard = next(damaged.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[: len(content) // 2])
    log = tmp_path / "server.log"
    with pytest.raises(ServerError), running_server(damaged, log):
        pass
    assert "cannot be read" in log.read_text(), log_tail(log)
