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
            max_model_len=longest + 1,
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=1,
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
