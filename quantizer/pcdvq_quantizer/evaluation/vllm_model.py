"""Scoring with vLLM: what a server would compute."""

from __future__ import annotations

from typing import Any

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

from pcdvq_quantizer.evaluation.data import Sequence
from pcdvq_quantizer.evaluation.files import ModelFiles

# vLLM computes the logits of a prompt for all tokens of a step at once.
STEP_TOKENS = 512
SPARE_TOKENS = 1024


class VLLMModel:
    """A model in vLLM's offline engine as a scorer of sequences."""

    def __init__(self, files: ModelFiles, dtype: str, longest: int) -> None:
        """Start the engine.

        Args:
            files: the model.
            dtype: of `EvaluateOptions`.
            longest: length of the longest sequence.

        Raises:
            PCDVQError: vLLM is not installed or cannot serve the model.
        """
        if files.gguf:
            raise PCDVQError(
                f"--backend vllm needs a Hugging Face directory, {files.name} is a GGUF file; "
                "measure it with --backend hf"
            )
        files.check_length(longest + 1)  # vLLM always generates a token
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise PCDVQError(
                f"--backend vllm needs vLLM ({error}); install it, or measure with --backend hf"
            ) from error
        self._llm: Any = LLM(
            str(files.directory),
            dtype=dtype,
            trust_remote_code=False,
            max_model_len=longest + 1,
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=1,
            kv_cache_memory_bytes=cache_bytes(files.config, longest + 1),
            enforce_eager=True,
            enable_prefix_caching=False,
        )
        # 0: of each prompt token its own log-probability and rank, and of no other token.
        self._params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)

    @property
    def dtype(self) -> str:
        return str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def log_likelihoods(self, sequence: Sequence) -> Tensor:
        """Log-likelihood of each scored token, fp32 [scored]."""
        return torch.tensor([entry.logprob for entry in self._entries(sequence)])

    def is_likeliest(self, sequence: Sequence) -> bool:
        """Whether each scored token is the likeliest one."""
        return all(entry.rank == 1 for entry in self._entries(sequence))

    def close(self) -> None:
        """Stop the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _entries(self, sequence: Sequence) -> list[Any]:
        """vLLM's `Logprob` of each scored token."""
        tokens = sequence.tokens.tolist()
        output = self._llm.generate({"prompt_token_ids": tokens}, self._params, use_tqdm=False)[0]
        entries = [
            found[token]
            for found, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
        ]
        return entries[-sequence.scored :]


def cache_bytes(config: dict[str, Any], tokens: int) -> int | None:
    """KV cache for one sequence with room to spare; None, vLLM's choice, for unusual models.

    By default vLLM claims nearly all memory, and on a CPU fails when others use some of it.

    Args:
        config: config.json of the model.
        tokens: length of the sequence.
    """
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads")
    head_dim = config.get("head_dim") or (heads and config.get("hidden_size", 0) // heads)
    layers = config.get("num_hidden_layers")
    if not heads or not head_dim or not layers:
        return None
    kv_heads = config.get("num_key_value_heads") or heads
    fp32_key_and_value = 8
    # Twice, because layers may differ from what the config says first.
    return 2 * fp32_key_and_value * layers * kv_heads * head_dim * (tokens + SPARE_TOKENS)
