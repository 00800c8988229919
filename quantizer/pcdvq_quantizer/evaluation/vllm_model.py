"""Scoring with vLLM: what a server would compute."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

from pcdvq_quantizer.evaluation.data import Sequence
from pcdvq_quantizer.evaluation.files import ModelFiles
from pcdvq_quantizer.evaluation.hf_model import Comparison, HFModel
from pcdvq_quantizer.limits import check_vocabulary

# vLLM computes the logits of a prompt for all tokens of a step at once.
STEP_TOKENS = 512
SPARE_TOKENS = 1024
TOP = 512  # tokens whose probabilities vLLM gives before each one
NOTHING = 1e-6  # what fp32 leaves of the probability of all other tokens, where they have none


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
            max_logprobs=TOP,
        )
        self._vocabulary = files.limits.vocabulary
        # 0: of each prompt token its own log-probability and rank, and of no other token.
        self._params, self._top = (
            SamplingParams(
                max_tokens=1, prompt_logprobs=count, detokenize=False, flat_logprobs=count > 0
            )
            for count in (0, min(TOP, self._vocabulary or TOP))
        )

    @property
    def knows_all(self) -> bool:
        """Whether `compare` knows whole distributions."""
        return self._top.prompt_logprobs == self._vocabulary

    @property
    def dtype(self) -> str:
        return str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def log_likelihoods(self, sequence: Sequence) -> Tensor:
        """Log-likelihood of each scored token, fp32 [scored]."""
        return torch.tensor([entry.logprob for entry in self._entries(sequence)])

    def is_likeliest(self, sequence: Sequence) -> bool:
        """Whether each scored token is the likeliest one."""
        return all(entry.rank == 1 for entry in self._entries(sequence))

    def compare(self, reference: HFModel, sequence: Sequence) -> Comparison:
        """Compare the next-token distributions before each scored token.

        vLLM gives the `TOP` likeliest tokens; all others are taken as one. So `Comparison.kl` is a
        lower bound of the divergence, and the divergence itself where the vocabulary is no larger.

        Raises:
            PCDVQError: the models have different vocabularies.
        """
        found = self._generate(sequence, self._top).prompt_logprobs
        positions = iter(range(len(sequence.tokens) - sequence.scored, len(sequence.tokens)))
        chunks = []
        for theirs, targets in reference.scored(sequence):
            rows = [found[position] for position in islice(positions, len(targets))]
            chunks.append(_compare_top(rows, theirs.cpu(), targets.cpu()))
        return Comparison.join(chunks)

    def close(self) -> None:
        """Stop the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _entries(self, sequence: Sequence) -> list[Any]:
        """vLLM's `Logprob` of each scored token."""
        tokens = sequence.tokens.tolist()
        output = self._generate(sequence, self._params)
        entries = [
            found[token]
            for found, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
        ]
        return entries[-sequence.scored :]

    def _generate(self, sequence: Sequence, params: Any) -> Any:
        prompt = {"prompt_token_ids": sequence.tokens.tolist()}
        return self._llm.generate(prompt, params, use_tqdm=False)[0]


def _compare_top(rows: list[dict[int, Any]], theirs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The fields of `Comparison` from some tokens of the model and all of another.

    Args:
        rows: at each position, vLLM's `Logprob` of the likeliest tokens and of the scored one.
        theirs: fp32 [C, vocabulary], log-probabilities.
        targets: int64 [C].
    """
    nll, kl, same = [], [], []
    for row, reference, target in zip(rows, theirs, targets.tolist(), strict=True):
        check_vocabulary(max(len(reference), *(token + 1 for token in row)), len(reference))
        tokens = torch.tensor(list(row))
        mine = torch.tensor([entry.logprob for entry in row.values()]).double()
        p = reference[tokens].double()
        others, theirs_of_others = ((1 - each.exp().sum()).clamp_min(0) for each in (mine, p))
        kl.append((p.exp() * (p - mine)).sum())
        if theirs_of_others > NOTHING:
            ratio = theirs_of_others / others.clamp_min(NOTHING)
            kl[-1] += theirs_of_others * ratio.log()
        nll.append(-row[target].logprob)
        same.append(tokens[mine.argmax()] == reference.argmax())
    reference_nll = -theirs.gather(1, targets[:, None])[:, 0]
    return torch.tensor(nll), reference_nll, torch.stack(kl), torch.stack(same)


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
