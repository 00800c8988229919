"""Scoring with transformers, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.vptq.checkpoint import dense_state, open_vptq_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import pcdvq_quantizer.hf  # noqa: F401 (registers the quantization method)
from pcdvq_quantizer.continuation import continue_texts
from pcdvq_quantizer.evaluation.data import Sequence
from pcdvq_quantizer.evaluation.files import ModelFiles
from pcdvq_quantizer.hf.logits import CHUNK_POSITIONS, ChunkedLogits
from pcdvq_quantizer.limits import check_vocabulary
from pcdvq_quantizer.selection import hf_config
from pcdvq_quantizer.sources import reason


@dataclass(frozen=True)
class Comparison:
    """Two models on one sequence; each fp32 [scored], on the CPU.

    Attributes:
        nll: negative log-likelihood of the tokens, nats.
        reference_nll: by the reference.
        kl: KL(reference || model) before each token, nats.
        agreement: 1 where both hold the same token for the likeliest, else 0.
    """

    nll: Tensor
    reference_nll: Tensor
    kl: Tensor
    agreement: Tensor

    @classmethod
    def join(cls, chunks: list[tuple[Tensor, ...]]) -> Comparison:
        """Of its fields, a chunk of tokens at a time."""
        return cls(*(torch.cat(each).float().cpu() for each in zip(*chunks, strict=True)))


def load_causal_lm(files: ModelFiles, dtype: str) -> PreTrainedModel:
    """Load `files` in `dtype` (`EvaluateOptions.dtype`), on the GPU if there is one.

    Raises:
        PCDVQError: transformers cannot load it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if files.is_vptq:
            return _load_vptq(files, _dtype(files, dtype, device)).to(device)
        model, loading = AutoModelForCausalLM.from_pretrained(
            files.directory,
            gguf_file=files.gguf,
            dtype=_dtype(files, dtype, device),
            trust_remote_code=False,
            output_loading_info=True,
        )
        _check_complete(files, loading["missing_keys"])
        return model.to(device)
    except PCDVQError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PCDVQError(
            f"transformers cannot load {files.name}: {reason(error)}. Check that the directory is "
            "whole"
        ) from error


def _check_complete(files: ModelFiles, missing: Iterable[str]) -> None:
    """Raise PCDVQError for parameters that are not stored: transformers makes them up."""
    if names := sorted(missing):
        raise PCDVQError(
            f"{files.name} does not store {names[0]} ({len(names)} parameters in all), without "
            "which it cannot write or predict text; give a causal language model that is whole"
        )


def _load_vptq(files: ModelFiles, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model: transformers loads VPTQ on GPUs only, by a package that is not needed."""
    state = dense_state(open_vptq_checkpoint(files.directory), dtype)
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            hf_config(config), dtype=dtype, trust_remote_code=False
        )
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if odd := [*empty, *unexpected]:
        raise PCDVQError(
            f"{files.name} does not store {odd[0]} as transformers names it ({len(odd)} in all); "
            "measure it with --backend vllm"
        )
    return model


class HFModel:
    """A causal language model of transformers as a scorer of sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        self._logits = ChunkedLogits(self._model)

    @classmethod
    def load(cls, files: ModelFiles, dtype: str, packed: bool) -> HFModel:
        """Load `files` in `dtype` (`EvaluateOptions.dtype`), dequantized unless `packed`.

        Raises:
            PCDVQError: transformers cannot load it.
        """
        model = load_causal_lm(files, dtype)
        if files.is_pcdvq and not packed:
            model.dequantize()
        return cls(model)

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def log_likelihoods(self, sequence: Sequence) -> Tensor:
        """Log-likelihood of each scored token, fp32 [scored]."""
        parts = [_of_targets(chunk, targets) for chunk, targets in self.scored(sequence)]
        return torch.cat(parts)

    def is_likeliest(self, sequence: Sequence) -> bool:
        """Whether each scored token is the likeliest one."""
        return all(
            torch.equal(chunk.argmax(1), targets) for chunk, targets in self.scored(sequence)
        )

    def compare(self, reference: HFModel, sequence: Sequence) -> Comparison:
        """Compare the next-token distributions before each scored token.

        Raises:
            PCDVQError: the models have different vocabularies.
        """
        chunks: list[tuple[Tensor, ...]] = []
        both = zip(self.scored(sequence), reference.scored(sequence), strict=True)
        for (mine, targets), (theirs, _) in both:
            check_vocabulary(mine.shape[1], theirs.shape[1])
            kl = nn.functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(1)
            same = mine.argmax(1) == theirs.argmax(1)
            chunks.append((-_of_targets(mine, targets), -_of_targets(theirs, targets), kl, same))
        return Comparison.join(chunks)

    @torch.inference_mode()
    def answers(self, prompts: list[list[int]], ends: set[int], new_tokens: int) -> list[list[int]]:
        """The greedy answer to each of `prompts`, of at most `new_tokens`, its end included."""
        return [more for _, more in continue_texts(self._model, prompts, ends, new_tokens)]

    @torch.inference_mode()
    def scored(self, sequence: Sequence) -> Iterator[tuple[Tensor, Tensor]]:
        """(log-probabilities fp32 [C, vocabulary], targets [C]) of the scored tokens in chunks."""
        ids = sequence.tokens.to(self._model.device)
        positions = torch.arange(len(ids) - sequence.scored - 1, len(ids) - 1, device=ids.device)
        hidden = self._logits.body(ids)
        for chunk in positions.split(CHUNK_POSITIONS):
            scores = self._logits.head(ids, hidden, chunk)
            yield scores.float().log_softmax(1), ids[chunk + 1]


def _of_targets(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(1, targets[:, None])[:, 0].cpu()


def _dtype(files: ModelFiles, dtype: str, device: torch.device) -> torch.dtype:
    # bf16 products take many times as long as fp32 ones on CPUs without instructions for them.
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if files.config.get("dtype") == "float16" else torch.bfloat16
