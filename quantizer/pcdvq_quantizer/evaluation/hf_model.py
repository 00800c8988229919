"""Scoring with transformers, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

import pcdvq_quantizer.hf  # noqa: F401 (registers the quantization method)
from pcdvq_quantizer.evaluation.data import Sequence
from pcdvq_quantizer.evaluation.files import ModelFiles

# Of logits that exist at a time: 256 x 262144 (Gemma) in fp32 are 256 MiB.
CHUNK_POSITIONS = 256
PROBE_TOKENS = 8


@dataclass(frozen=True)
class Comparison:
    """Means over the scored tokens of one sequence; nats."""

    nll: float
    reference_nll: float
    kl: float
    agreement: float


class HFModel:
    """A causal language model of transformers as a scorer of sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        self._chunked = self._head_works_in_chunks()

    @classmethod
    def load(cls, files: ModelFiles, dtype: str, packed: bool) -> HFModel:
        """Load `files` in `dtype` (`EvaluateOptions.dtype`), dequantized unless `packed`.

        Raises:
            PCDVQError: transformers cannot load it.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                files.directory, gguf_file=files.gguf, dtype=_dtype(files, dtype, device)
            ).to(device)
        except PCDVQError:
            raise
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise PCDVQError(
                f"transformers cannot load {files.name}: {error}. Check that the directory is whole"
            ) from error
        if files.is_pcdvq and not packed:
            model.dequantize()
        return cls(model)

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def log_likelihoods(self, sequence: Sequence) -> Tensor:
        """Log-likelihood of each scored token, fp32 [scored]."""
        parts = [_of_targets(chunk, targets) for chunk, targets in self._scored(sequence)]
        return torch.cat(parts)

    def is_likeliest(self, sequence: Sequence) -> bool:
        """Whether each scored token is the likeliest one."""
        return all(
            torch.equal(chunk.argmax(1), targets) for chunk, targets in self._scored(sequence)
        )

    def compare(self, reference: HFModel, sequence: Sequence) -> Comparison:
        """Compare the next-token distributions before each scored token.

        Raises:
            PCDVQError: the models have different vocabularies.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        both = zip(self._scored(sequence), reference._scored(sequence), strict=True)
        for (mine, targets), (theirs, _) in both:
            if mine.shape != theirs.shape:
                raise PCDVQError(
                    f"the model has {mine.shape[1]} tokens, the reference {theirs.shape[1]}; name "
                    "the original model with --reference"
                )
            kl = nn.functional.kl_div(mine, theirs, reduction="sum", log_target=True)
            same = (mine.argmax(1) == theirs.argmax(1)).sum()
            nlls = [-_of_targets(chunk, targets).sum() for chunk in (mine, theirs)]
            sums += torch.stack([*nlls, kl, same]).double().cpu()
        return Comparison(*(sums / sequence.scored).tolist())

    @torch.inference_mode()
    def _scored(self, sequence: Sequence) -> Iterator[tuple[Tensor, Tensor]]:
        """(log-probabilities fp32 [C, vocabulary], targets [C]) of the scored tokens in chunks."""
        ids = sequence.tokens.to(self._model.device)
        positions = torch.arange(len(ids) - sequence.scored - 1, len(ids) - 1, device=ids.device)
        hidden = self._hidden(ids) if self._chunked else None
        logits = None if self._chunked else self._all_logits(ids)
        for chunk in positions.split(CHUNK_POSITIONS):
            scores = self._head(ids, hidden, chunk) if logits is None else logits[chunk]
            yield scores.float().log_softmax(1), ids[chunk + 1]

    def _all_logits(self, ids: Tensor) -> Tensor:
        """[T, vocabulary]."""
        return self._model(input_ids=ids[None], use_cache=False).logits[0]

    def _hidden(self, ids: Tensor) -> Tensor:
        """What the output head reads, [1, T, hidden size]."""
        return self._model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state

    def _head(self, ids: Tensor, hidden: Tensor | None, positions: Tensor) -> Tensor:
        """Logits at `positions`, [C, vocabulary].

        The model's own `forward` makes them, over a body that only returns `hidden`: so whatever
        the architecture does to logits (scaling, capping) is done.
        """
        with _body(self._model, _Replay(hidden)):
            output = self._model(input_ids=ids[None], logits_to_keep=positions, use_cache=False)
        return output.logits[0]

    @torch.inference_mode()
    def _head_works_in_chunks(self) -> bool:
        """Whether `_head` gives the model's logits, tried on a few tokens.

        Other architectures compute all logits of a window at once.
        """
        ids = torch.arange(PROBE_TOKENS, device=self._model.device)
        expected = self._all_logits(ids)
        try:
            parts = [self._head(ids, self._hidden(ids), part) for part in ids.split(3)]
        except (TypeError, AttributeError, KeyError, RuntimeError, ValueError):
            return False
        found = torch.cat(parts)
        if found.shape != expected.shape:
            return False
        # Only rounding may differ; a step of the head that was left out is far outside of this.
        return bool((found - expected).abs().max() <= 0.05 * expected.float().std())


class _Replay(nn.Module):
    """A model body that returns given hidden states."""

    def __init__(self, hidden: Tensor | None) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self._hidden)


@contextmanager
def _body(model: PreTrainedModel, body: nn.Module) -> Iterator[None]:
    """Put `body` in the place of the model's own for a while."""
    name = model.base_model_prefix
    original = model._modules[name]
    model._modules[name] = body
    try:
        yield
    finally:
        model._modules[name] = original


def _of_targets(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(1, targets[:, None])[:, 0].cpu()


def _dtype(files: ModelFiles, dtype: str, device: torch.device) -> torch.dtype:
    # bf16 products take many times as long as fp32 ones on CPUs without instructions for them.
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if files.config.get("dtype") == "float16" else torch.bfloat16
