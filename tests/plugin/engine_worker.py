"""What the engine tests run in a process of their own, which vLLM pins to cores and configures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEW_TOKENS = 8
SMALL = {
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 1 << 26,
    "max_model_len": 128,
    "enforce_eager": True,
}


@dataclass(frozen=True)
class Generation:
    """Greedy continuation of a prompt.

    Attributes:
        tokens: prompt and continuation.
        logprobs: of the likeliest tokens, for each token of the continuation.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]


def inspect_models_here() -> None:
    """Let vLLM look at model classes in this process: another one costs ten seconds for each."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def make_engine(checkpoint: Path | str, **arguments: Any) -> Any:
    from vllm import LLM

    return LLM(str(checkpoint), **{**SMALL, **arguments})


def continue_prompts(
    llm: Any, prompts: list[list[int]], adapter: Path | None = None
) -> list[Generation]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    greedy = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=5, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        greedy,
        use_tqdm=False,
        lora_request=adapter and LoRARequest("adapter", 1, str(adapter)),
    )
    return [
        Generation(
            [*prompt, *output.outputs[0].token_ids],
            [
                {token: lp.logprob for token, lp in step.items()}
                for step in output.outputs[0].logprobs
            ],
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _close(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def generate(
    checkpoint: Path | str, prompts: list[list[int]], adapter: Path | None = None, **arguments: Any
) -> list[Generation]:
    llm = make_engine(checkpoint, enable_lora=adapter is not None, **arguments)
    try:
        return continue_prompts(llm, prompts, adapter)
    finally:
        _close(llm)


def generate_in_stages(
    checkpoint: Path, prompts: list[list[int]], **arguments: Any
) -> list[Generation]:
    """With pipeline parallelism, in eager mode.

    On a CPU, vLLM makes the buffers between stages while it warms up, which eager mode leaves out.
    """
    llm = make_engine(checkpoint, distributed_executor_backend="mp", **arguments)
    try:
        llm.collective_rpc(_warm_up)
        return continue_prompts(llm, prompts)
    finally:
        _close(llm)


def _warm_up(worker: Any) -> None:
    worker.model_runner.profile_run()


def generate_twice(
    checkpoint: Path, prompts: list[list[int]], **arguments: Any
) -> tuple[list[list[Generation]], dict[str, float]]:
    """The same prompts twice on one engine, and what its counters say then."""
    llm = make_engine(checkpoint, disable_log_stats=False, **arguments)
    try:
        results = [continue_prompts(llm, prompts) for _ in range(2)]
        metrics = llm.get_metrics()
        return results, {each.name: each.value for each in metrics if hasattr(each, "value")}
    finally:
        _close(llm)


def generate_and_reload(
    first: Path, others: list[Path], prompts: list[list[int]], **arguments: Any
) -> list[list[Generation]]:
    """Serve `first`, then the weights of each of the others in its place."""
    llm = make_engine(first, **arguments)
    try:
        results = [continue_prompts(llm, prompts)]
        for path in others:
            llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            llm.reset_prefix_cache()
            results.append(continue_prompts(llm, prompts))
        return results
    finally:
        _close(llm)


def reload_without(checkpoint: Path, shard: str, missing: str) -> None:
    """Serve a checkpoint, then hand the engine all its tensors again except one."""
    from safetensors.torch import load_file

    llm = make_engine(checkpoint)
    tensors = load_file(checkpoint / shard)
    del tensors[missing]
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors.items())})
    finally:
        _close(llm)


def compiled_models() -> int:
    """Models of this process that run compiled."""
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_models_seen


def configure(checkpoint: Path, **arguments: Any) -> None:
    """Everything the API server does with a checkpoint before it starts an engine."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=str(checkpoint), **{**SMALL, **arguments}).create_engine_config()


def failure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the exception that `function` raises, "" if it raises none."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return str(error)
    return ""
