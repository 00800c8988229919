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


def make_engine(checkpoint: Path, **arguments: Any) -> Any:
    import torch._dynamo
    from vllm import LLM

    arguments = {**SMALL, **arguments}
    # vLLM compiles a few helpers even in eager mode, which takes longer than all else here.
    torch._dynamo.config.disable = arguments["enforce_eager"]
    return LLM(str(checkpoint), **arguments)


def continue_prompts(llm: Any, prompts: list[list[int]]) -> list[Generation]:
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=5, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
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


def generate(checkpoint: Path, prompts: list[list[int]], **arguments: Any) -> list[Generation]:
    llm = make_engine(checkpoint, **arguments)
    try:
        return continue_prompts(llm, prompts)
    finally:
        _close(llm)


def generate_and_reload(
    first: Path, others: list[Path], prompts: list[list[int]], **arguments: Any
) -> list[list[Generation] | str]:
    """Serve `first`, then the weights of the others in its place: results, or errors as text."""
    llm = make_engine(first, **arguments)
    results: list[list[Generation] | str] = [continue_prompts(llm, prompts)]
    try:
        for path in others:
            llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
            try:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            except ValueError as error:
                results.append(str(error))
            else:
                llm.reset_prefix_cache()
                results.append(continue_prompts(llm, prompts))
        return results
    finally:
        _close(llm)


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
