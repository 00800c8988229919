"""KL divergence of the student from the original model, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pcdvq_quantizer.hf.logits import CHUNK_POSITIONS, ChunkedLogits
from pcdvq_quantizer.limits import check_vocabulary


class Distillation:
    """KL(original || student) of next-token distributions, mean over positions, nats."""

    def __init__(self, student: PreTrainedModel, original: PreTrainedModel) -> None:
        self._student = ChunkedLogits(student)
        self._original = ChunkedLogits(original)

    @torch.no_grad()
    def original_body(self, ids: Tensor) -> Tensor | None:
        """What `measure` can be given again for `ids` [T]: small, or None."""
        return self._original.body(ids) if self._original.chunked else None

    @torch.no_grad()
    def measure(self, ids: Tensor, original: Tensor | None = None) -> float:
        """KL over the window `ids`, int64 [T]; `original` is what `original_body` gave for it."""
        theirs = self._original.body(ids) if original is None else original
        mine = self._student.body(ids)
        total = 0.0
        for positions in _chunks(ids):
            target = self._original.head(ids, theirs, positions).log_softmax(1)
            found = self._student.head(ids, mine, positions).log_softmax(1)
            total += _divergence(target, found).item()
        return total / len(ids)

    def accumulate(self, ids: Tensor, share: float) -> float:
        """KL over the window `ids`, int64 [T]; adds `share` times its gradient to the student's.

        The gradient goes through the head chunk by chunk, then through the body once: the logits
        of a whole window never exist.
        """
        with torch.no_grad():
            theirs = self._original.body(ids)
        output = self._student.body(ids)
        mine = output.detach().requires_grad_()
        total = 0.0
        for positions in _chunks(ids):
            logits = self._student.head(ids, mine, positions)
            with torch.no_grad():
                target = self._original.head(ids, theirs, positions).log_softmax(1)
                found = logits.log_softmax(1)
                total += _divergence(target, found).item()
                # d KL / d logits; in place: each of these is a chunk times the vocabulary.
                gradient = found.exp_().sub_(target.exp_()).mul_(share / len(ids))
            logits.backward(gradient)
        output.backward(mine.grad)
        return total / len(ids)


def _chunks(ids: Tensor) -> tuple[Tensor, ...]:
    return torch.arange(len(ids), device=ids.device).split(CHUNK_POSITIONS)


def _divergence(target: Tensor, found: Tensor) -> Tensor:
    """Sum over positions of KL(target || found), both log-probabilities [C, vocabulary]."""
    check_vocabulary(found.shape[1], target.shape[1])
    return (target.exp() * (target - found)).sum()
